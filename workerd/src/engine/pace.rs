//! How many prompt tokens a step has time for, by a model of what steps cost that follows what they did cost.
//!
//! A step costs a fixed part, a part for each token it computes and a part for each position these attend to. After each
//! step the three are moved by just so much (half, against noise) that this step would have been foretold: the model
//! need not be right everywhere, only for steps like those that are run. Pure: times are arguments.

use std::time::Duration;

/// What a step computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Tokens.
    pub rows: u32,
    /// Positions all of them attend to, together.
    pub reach: u64,
}

/// Sizes prefill chunks.
#[derive(Clone, Debug, PartialEq)]
pub struct Pace {
    /// Seconds a step with a prefill should take.
    target: f64,
    /// Seconds for one of each of [`UNITS`].
    costs: [f64; 3],
}

/// A step, its tokens and their reach, in amounts that cost about the same on a small model.
const UNITS: [f64; 3] = [1.0, 64.0, 524_288.0];
/// Share of an error that is corrected at once.
const GAIN: f64 = 0.5;
/// A step counts as at most so much longer or shorter than foretold: the machine may have been busy with other things.
const MOST_OFF: f64 = 4.0;
/// No step is for nothing, and no token.
const LEAST: [f64; 3] = [1e-7, 1e-7, 0.0];

impl Work {
    /// `count` tokens more, from position `start` of their sequence on.
    pub fn add(&mut self, start: u32, count: u32) {
        let (start, tokens) = (u64::from(start), u64::from(count));
        self.rows += count;
        self.reach += tokens * start + tokens * (tokens + 1) / 2;
    }
}

impl Pace {
    /// Steps with a prefill shall take `target`; `row` is a guess of what one token costs.
    pub fn new(target: Duration, row: Duration) -> Self {
        let costs = [LEAST[0], (row.as_secs_f64() * UNITS[1]).max(LEAST[1]), LEAST[2]];
        Self { target: target.as_secs_f64(), costs }
    }

    /// A step of this work took so long.
    pub fn observe(&mut self, work: Work, took: Duration) {
        let amounts = amounts(work);
        let foretold = self.cost(amounts);
        let seen = took.as_secs_f64().clamp(foretold / MOST_OFF, foretold * MOST_OFF);
        let square: f64 = amounts.iter().map(|amount| amount * amount).sum();
        let correction = GAIN * (seen - foretold) / square;
        for ((cost, amount), least) in self.costs.iter_mut().zip(amounts).zip(LEAST) {
            *cost = (*cost + correction * amount).max(least);
        }
    }

    /// Tokens from position `start` on, of `wanted`, that a step which has `so_far` still has time for: all of them, or
    /// a multiple of `granule`.
    pub fn chunk(&self, so_far: Work, start: u32, wanted: u32, granule: u32) -> u32 {
        let left = self.target - self.cost(amounts(so_far));
        if left <= 0.0 {
            return 0;
        }
        // n tokens from there cost `n row + (n start + n (n + 1) / 2) reach`: a quadratic equation for n.
        let (row, reach) = (self.costs[1] / UNITS[1], self.costs[2] / UNITS[2]);
        let first = row + reach * (f64::from(start) + 0.5);
        let fitting = 2.0 * left / (first + (first * first + 2.0 * reach * left).sqrt());
        if fitting >= f64::from(wanted) {
            return wanted;
        }
        fitting as u32 / granule * granule
    }

    fn cost(&self, amounts: [f64; 3]) -> f64 {
        self.costs.iter().zip(amounts).map(|(cost, amount)| cost * amount).sum()
    }
}

fn amounts(work: Work) -> [f64; 3] {
    [1.0, f64::from(work.rows) / UNITS[1], work.reach as f64 / UNITS[2]]
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    const TARGET: Duration = Duration::from_millis(75);

    /// What a machine really takes, in seconds: a step, a token, a position attended to.
    type Machine = [f64; 3];

    fn took(machine: Machine, work: Work) -> Duration {
        let [step, row, reach] = machine;
        Duration::from_secs_f64(step + row * f64::from(work.rows) + reach * work.reach as f64)
    }

    /// Prefills of `len` tokens beside `decodes` sequences; the times of steps that time bounds, in milliseconds.
    fn drive(
        pace: &mut Pace,
        decodes: u32,
        lens: &[u32],
        mut time: impl FnMut(Work) -> Duration,
    ) -> Vec<f64> {
        let mut times = Vec::new();
        for len in lens {
            let mut at = 0;
            while at < *len {
                let mut work = Work::default();
                (0..decodes).for_each(|_| work.add(500, 1));
                let fits = pace.chunk(work, at, len - at, 1);
                let count = fits.max(16).min(len - at);
                work.add(at, count);
                at += count;
                let took = time(work);
                pace.observe(work, took);
                if at < *len && fits > 16 {
                    times.push(took.as_secs_f64() * 1e3);
                }
            }
        }
        times
    }

    const MACHINES: [Machine; 4] = [
        [4e-3, 0.8e-3, 0.1e-6],
        [0.2e-3, 40e-6, 5e-9],
        [25e-3, 0.5e-3, 0.3e-6],
        [1e-3, 0.3e-3, 1e-6],
    ];

    #[test]
    fn steps_with_a_prefill_take_50_to_100_ms_on_any_machine_wherever_in_the_prompt() {
        for machine in MACHINES {
            for (guess, decodes) in [(10, 0), (300, 3), (1_000, 8)] {
                let mut pace = Pace::new(TARGET, Duration::from_micros(guess));
                let prompts = [8_000, 8_000, 1_000, 8_000, 4_000, 500, 8_000, 8_000, 8_000];
                let times = drive(&mut pace, decodes, &prompts, |work| took(machine, work));
                // It has to find out first.
                let learned = &times[10..];
                assert!(learned.len() > 10);
                let short = learned.iter().filter(|time| **time < 50.0).count();
                let long = learned.iter().filter(|time| **time > 100.0).count();
                let case = format!("machine {machine:?}, guess {guess} us: {short} and {long}");
                assert!(long == 0 && short * 10 < learned.len(), "{case} of {}", learned.len());
            }
        }
    }

    #[test]
    fn a_noisy_machine_is_followed_and_a_stall_is_forgotten() {
        let mut random = SmallRng::seed_from_u64(3);
        for machine in MACHINES {
            let mut pace = Pace::new(TARGET, Duration::from_micros(100));
            let prompts = [4_000, 1_000, 6_000, 8_000, 300, 8_000, 8_000, 8_000, 8_000];
            // A stalled step takes as long as it takes: what matters is how long the others are.
            let mut stalls = 0;
            let mut times = drive(&mut pace, 4, &prompts, |work| {
                let stall = if random.random_bool(0.03) { 6.0 } else { 1.0 };
                stalls += usize::from(stall > 1.0);
                took(machine, work).mul_f64(random.random_range(0.8..1.25) * stall)
            });
            let learned = &mut times[10..];
            learned.sort_by(f64::total_cmp);
            let (middle, high) = (learned.len() / 2, learned.len().saturating_sub(1 + stalls));
            let (median, longest) = (learned[middle], learned[high]);
            let case = format!("machine {machine:?}: {median} and {longest} ms");
            assert!((50.0..=100.0).contains(&median) && longest <= 150.0, "{case}");
        }
    }

    #[test]
    fn time_that_decodes_take_is_not_there_for_prefills() {
        let machine = [4e-3, 0.8e-3, 0.1e-6];
        let mut pace = Pace::new(TARGET, Duration::from_micros(800));
        drive(&mut pace, 8, &[4_000; 4], |work| took(machine, work));
        let with = |decodes: u32| {
            let mut work = Work::default();
            (0..decodes).for_each(|_| work.add(500, 1));
            pace.chunk(work, 0, 10_000, 1)
        };
        let (alone, beside) = (with(0), with(32));
        assert!(alone > beside && beside > 0, "{alone} and {beside}");
        assert_eq!(with(10_000), 0);
    }

    #[test]
    fn what_fits_whole_is_not_cut_and_the_rest_is_whole_granules() {
        let pace = Pace::new(TARGET, Duration::from_millis(1));
        assert_eq!(pace.chunk(Work::default(), 0, 70, 32), 70);
        assert_eq!(pace.chunk(Work::default(), 0, 80, 32), 64);
        assert_eq!(pace.chunk(Work { rows: 50, reach: 0 }, 0, 80, 32), 0);
    }

    #[test]
    fn work_is_the_same_however_it_is_cut() {
        let (mut whole, mut cut) = (Work::default(), Work::default());
        whole.add(5, 20);
        [(5, 3), (8, 16), (24, 1)].into_iter().for_each(|(start, count)| cut.add(start, count));
        assert_eq!(whole, cut);
        assert_eq!(whole, Work { rows: 20, reach: (6..=25).sum() });
    }
}
