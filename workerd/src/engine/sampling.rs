//! How a token is chosen: parameters, and the host sampler that every back end without one of its own uses.
//!
//! A choice is a pure function of (parameters, history, logits): the random number belongs to (seed, output
//! position), sums have one order, and `exp` is our own. So it is the same alone or batched, on one worker or two.
//! A logit that is not a number counts as minus infinity.

use std::cmp::Ordering;
use std::collections::HashMap;

use super::philox;
use super::step::{Sampled, Slot, StepOut};

/// Parameters of one sequence; validated by the API, so every value is in range here.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 = greedy.
    pub temperature: f32,
    /// Smallest set of most probable tokens with this mass; 1 = off.
    pub top_p: f32,
    /// Most probable tokens kept; 0 = off.
    pub top_k: u32,
    /// Tokens below this share of the best one's probability are dropped; 0 = off.
    pub min_p: f32,
    /// Seeds the random numbers, one an output position.
    pub seed: u64,
    /// Subtracted from a token's logit for each time it was generated.
    pub frequency_penalty: f32,
    /// Subtracted once from the logit of each token that was generated.
    pub presence_penalty: f32,
    /// Divides (positive) or multiplies (negative) the logit of each token of prompt and output; 1 = off.
    pub repetition_penalty: f32,
    /// `Some(n)`: report the sampled token's log-probability and the `n` best tokens'.
    pub logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            seed: 0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            repetition_penalty: 1.0,
            logprobs: None,
        }
    }
}

impl SamplingParams {
    /// The most probable token, always.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    fn has_penalties(&self) -> bool {
        self.frequency_penalty != 0.0
            || self.presence_penalty != 0.0
            || self.repetition_penalty != 1.0
    }
}

/// Chooses the tokens of one sequence; holds what it must know of the sequence's past.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    /// How often each token of prompt and output was generated (0: only in the prompt). Empty without penalties.
    generated: HashMap<u32, u32>,
    /// Output position of the next token.
    position: u64,
    last: Option<u32>,
}

impl Sampler {
    /// `history` is the prompt (its first `prompt_len` tokens) and what was generated so far.
    pub fn new(params: &SamplingParams, history: &[u32], prompt_len: u32) -> Self {
        let (prompt, output) = history.split_at((prompt_len as usize).min(history.len()));
        let mut sampler = Self {
            params: params.clone(),
            generated: HashMap::new(),
            position: output.len() as u64,
            last: history.last().copied(),
        };
        if params.has_penalties() {
            sampler.generated.extend(prompt.iter().map(|token| (*token, 0)));
            output.iter().for_each(|token| *sampler.generated.entry(*token).or_insert(0) += 1);
        }
        sampler
    }

    /// The newest token of the history: what a step's `Input::Last` means.
    pub fn last(&self) -> Option<u32> {
        self.last
    }

    /// Chooses a token by `logits` (one a vocabulary id, spoilt by this), appends it to `out` and to the history.
    pub fn sample(&mut self, slot: Slot, logits: &mut [f32], out: &mut StepOut) {
        for logit in logits.iter_mut().filter(|logit| logit.is_nan()) {
            *logit = f32::NEG_INFINITY;
        }
        let (token, logprob, rank, top) = match self.params.logprobs {
            None => (self.choose(logits), 0.0, 0, out.top.len()..out.top.len()),
            Some(alternatives) => {
                let raw = logits.to_vec();
                let log_sum = log_sum_exp(&raw);
                let token = self.choose(logits);
                let rank = rank_of(token, &raw);
                let from = out.top.len();
                let best = best_tokens(&raw, alternatives as usize);
                out.top.extend(best.map(|token| (token, log_probability(&raw, token, log_sum))));
                (token, log_probability(&raw, token, log_sum), rank, from..out.top.len())
            }
        };
        let top = top.start as u32..top.end as u32;
        out.samples.push(Sampled { slot, token, logprob, rank, top });
        self.record(token);
    }

    fn record(&mut self, token: u32) {
        if self.params.has_penalties() {
            *self.generated.entry(token).or_insert(0) += 1;
        }
        self.position += 1;
        self.last = Some(token);
    }

    fn choose(&self, logits: &mut [f32]) -> u32 {
        self.penalise(logits);
        let best = argmax(logits);
        let highest = logits[best as usize];
        if self.params.temperature <= 0.0 || !highest.is_finite() {
            return best;
        }
        let temperature = f64::from(self.params.temperature);
        for logit in logits.iter_mut() {
            *logit = exp((f64::from(*logit) - f64::from(highest)) / temperature) as f32;
        }
        let random = philox::uniform(self.params.seed, self.position);
        self.draw(logits, random).unwrap_or(best)
    }

    fn penalise(&self, logits: &mut [f32]) {
        let repetition = self.params.repetition_penalty;
        for (token, count) in &self.generated {
            let Some(logit) = logits.get_mut(*token as usize) else { continue };
            *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
            if *count > 0 {
                *logit -= self.params.frequency_penalty * *count as f32;
                *logit -= self.params.presence_penalty;
            }
        }
    }

    /// Draws by `weights` (the best token's is 1) after top-k, top-p and min-p, each of which keeps a prefix of the
    /// tokens in order of weight. `None` only if rounding left no mass.
    fn draw(&self, weights: &[f32], random: f64) -> Option<u32> {
        let min_p = self.params.min_p;
        let kept = |weight: f32| weight >= min_p;
        if self.params.top_k == 0 && self.params.top_p >= 1.0 {
            let all = || weights.iter().copied().enumerate().filter(|(_, weight)| kept(*weight));
            return pick(all().map(|(token, weight)| (token as u32, weight)), random);
        }
        let mut candidates = self.candidates(weights);
        candidates.truncate(candidates.partition_point(|(_, weight)| kept(*weight)));
        pick(candidates.iter().copied(), random)
    }

    /// What top-k and top-p leave, best first.
    fn candidates(&self, weights: &[f32]) -> Vec<(u32, f32)> {
        let top_p = f64::from(self.params.top_p);
        let (mut candidates, total) = match self.params.top_k as usize {
            0 => {
                let total = sum(weights.iter().map(|weight| f64::from(*weight)));
                // All tokens below this floor together have less mass than top-p gives up, so none of them is kept.
                let floor = (1.0 - top_p) * total / weights.len() as f64;
                (at_least(weights, floor), total)
            }
            k => {
                let heaviest = heaviest(weights, k);
                let total = sum(heaviest.iter().map(|(_, weight)| f64::from(*weight)));
                (heaviest, total)
            }
        };
        if top_p < 1.0 {
            let mut mass = 0.0;
            let nucleus = candidates.iter().take_while(|(_, weight)| {
                let is_wanted = mass == 0.0 || mass < top_p * total;
                mass += f64::from(*weight);
                is_wanted
            });
            let kept = nucleus.count();
            candidates.truncate(kept);
        }
        candidates
    }
}

fn at_least(weights: &[f32], floor: f64) -> Vec<(u32, f32)> {
    let indexed = weights.iter().enumerate().map(|(token, weight)| (token as u32, *weight));
    let mut kept: Vec<_> = indexed.filter(|(_, weight)| f64::from(*weight) >= floor).collect();
    kept.sort_unstable_by(by_weight);
    kept
}

fn heaviest(weights: &[f32], count: usize) -> Vec<(u32, f32)> {
    let indexed = weights.iter().enumerate().map(|(token, weight)| (token as u32, *weight));
    let mut kept: Vec<_> = indexed.collect();
    if count < kept.len() {
        kept.select_nth_unstable_by(count - 1, by_weight);
        kept.truncate(count);
    }
    kept.sort_unstable_by(by_weight);
    kept
}

/// Heavier first, then the lower id: a total order, so no sort or selection can choose otherwise.
fn by_weight(left: &(u32, f32), right: &(u32, f32)) -> Ordering {
    right.1.total_cmp(&left.1).then(left.0.cmp(&right.0))
}

fn pick(weighted: impl Iterator<Item = (u32, f32)> + Clone, random: f64) -> Option<u32> {
    let mut left = random * sum(weighted.clone().map(|(_, weight)| f64::from(weight)));
    let mut last = None;
    for (token, weight) in weighted.filter(|(_, weight)| *weight > 0.0) {
        last = Some(token);
        left -= f64::from(weight);
        if left < 0.0 {
            break;
        }
    }
    last
}

/// Highest value, the lowest index of equals; 0 if all are minus infinity.
fn argmax(values: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (index, value) in values.iter().enumerate() {
        if *value > best.1 {
            best = (index, *value);
        }
    }
    best.0 as u32
}

fn rank_of(token: u32, logits: &[f32]) -> u32 {
    let own = logits[token as usize];
    let before =
        |(index, logit): (usize, &f32)| *logit > own || (*logit == own && index < token as usize);
    1 + logits.iter().enumerate().filter(|entry| before(*entry)).count() as u32
}

fn best_tokens(logits: &[f32], count: usize) -> impl Iterator<Item = u32> + use<> {
    let count = count.min(logits.len());
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    for (token, logit) in logits.iter().enumerate() {
        let entry = (token as u32, *logit);
        if best.len() == count && best.last().is_none_or(|worst| worst.1 >= *logit) {
            continue;
        }
        let at = best.partition_point(|other| by_weight(other, &entry) == Ordering::Less);
        best.insert(at, entry);
        best.truncate(count);
    }
    best.into_iter().map(|(token, _)| token)
}

/// `ln(sum(exp(logits)))`; the highest logit itself if that is infinite.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let highest = f64::from(logits[argmax(logits) as usize]);
    if !highest.is_finite() {
        return highest;
    }
    highest + ln(sum(logits.iter().map(|logit| exp(f64::from(*logit) - highest))))
}

/// Finite always: what has no probability gets the lowest number, as JSON knows no infinity.
fn log_probability(logits: &[f32], token: u32, log_sum: f64) -> f32 {
    let logprob = (f64::from(logits[token as usize]) - log_sum) as f32;
    if logprob.is_nan() { 0.0 } else { logprob.max(f32::MIN) }
}

/// Eight running sums, added in one order.
fn sum(values: impl Iterator<Item = f64>) -> f64 {
    let mut lanes = [0.0; 8];
    values.enumerate().for_each(|(index, value)| lanes[index % 8] += value);
    lanes.iter().sum()
}

/// `e^x` for `x <= 0` within 2 units in the last place, and the same bits on every machine (libm's differ).
fn exp(x: f64) -> f64 {
    const LN2_HIGH: f64 = 6.931_471_803_691_238e-1;
    const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    /// 1/13!, 1/12!, … 1/0!
    const TAYLOR: [f64; 14] = [
        1.605_904_383_682_161_3e-10,
        2.087_675_698_786_81e-9,
        2.505_210_838_544_172e-8,
        2.755_731_922_398_589_3e-7,
        2.755_731_922_398_589e-6,
        2.480_158_730_158_73e-5,
        1.984_126_984_126_984e-4,
        1.388_888_888_888_889e-3,
        8.333_333_333_333_333e-3,
        4.166_666_666_666_666_4e-2,
        1.666_666_666_666_666_6e-1,
        0.5,
        1.0,
        1.0,
    ];
    if x < -708.0 {
        return 0.0;
    }
    let power = (x * std::f64::consts::LOG2_E + 0.5).floor();
    let rest = (x - power * LN2_HIGH) - power * LN2_LOW;
    let value = TAYLOR.iter().fold(0.0, |value, coefficient| value * rest + coefficient);
    value * f64::from_bits(((power as i64 + 1023) as u64) << 52)
}

/// `ln(x)` for finite `x >= 1`: Newton's steps on [`exp`], so it has no more libm than that.
fn ln(x: f64) -> f64 {
    let exponent = ((x.to_bits() >> 52) as i64 - 1023) as f64;
    let mantissa = f64::from_bits((x.to_bits() & ((1 << 52) - 1)) | (1023 << 52));
    let mut value = (mantissa - 1.0) * std::f64::consts::LN_2;
    for _ in 0..6 {
        // `exp` takes what is not positive: e^-value times the mantissa is near 1.
        value += 2.0 * (mantissa * exp(-value) - 1.0) / (mantissa * exp(-value) + 1.0);
    }
    exponent * std::f64::consts::LN_2 + value
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Draws `count` tokens by the same logits, one an output position.
    fn draws(params: &SamplingParams, logits: &[f32], count: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(params, &[0], 1);
        let mut out = StepOut::default();
        (0..count).for_each(|_| sampler.sample(Slot(0), &mut logits.to_vec(), &mut out));
        out.samples.iter().map(|sampled| sampled.token).collect()
    }

    fn drawn_set(params: &SamplingParams, logits: &[f32]) -> Vec<u32> {
        let mut set = draws(params, logits, 2_000);
        set.sort_unstable();
        set.dedup();
        set
    }

    fn logits_of(probabilities: &[f32]) -> Vec<f32> {
        probabilities.iter().map(|p| p.ln() + 3.0).collect()
    }

    #[test]
    fn own_exp_and_ln_are_within_rounding_of_the_exact_ones() {
        for step in 0..70_000 {
            let x = f64::from(step) * -0.01;
            assert!((exp(x) - x.exp()).abs() <= x.exp() * 5e-16, "exp({x})");
            let y = 1.0 + f64::from(step) * 0.73;
            assert!((ln(y) - y.ln()).abs() <= 1e-15 * (1.0 + y.ln()), "ln({y})");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f64::NEG_INFINITY), 0.0);
        assert_eq!(ln(1.0), 0.0);
    }

    #[test]
    fn greedy_takes_the_lowest_of_equal_ids_and_never_what_is_not_a_number() {
        let greedy = SamplingParams::greedy();
        assert_eq!(draws(&greedy, &[1.0, 5.0, 5.0, f32::NAN], 1), [1]);
        assert_eq!(draws(&greedy, &[f32::NAN, f32::NEG_INFINITY, -1e30], 1), [2]);
        assert_eq!(draws(&SamplingParams::default(), &[0.0, f32::INFINITY, 2.0], 1), [1]);
        assert_eq!(draws(&SamplingParams::default(), &[f32::NAN; 3], 1), [0]);
    }

    #[test]
    fn frequencies_follow_the_probabilities_at_temperature_one_and_their_square_at_one_half() {
        let probabilities = [0.5, 0.25, 0.125, 0.125];
        for (temperature, expected) in
            [(1.0, [0.5, 0.25, 0.125, 0.125]), (0.5, [0.727, 0.182, 0.0455, 0.0455])]
        {
            let params = SamplingParams { temperature, seed: 3, ..SamplingParams::default() };
            let tokens = draws(&params, &logits_of(&probabilities), 20_000);
            for (token, wanted) in expected.iter().enumerate() {
                let count = tokens.iter().filter(|drawn| **drawn == token as u32).count();
                let share = count as f64 / 20_000.0;
                assert!((share - wanted).abs() < 0.015, "{temperature}: {token} {share}");
            }
        }
    }

    #[test]
    fn a_choice_depends_on_seed_and_position_only_so_a_second_worker_goes_on_alike() {
        let params =
            SamplingParams { temperature: 0.8, top_p: 0.9, seed: 11, ..SamplingParams::default() };
        let logits = logits_of(&[0.1; 10]);
        let one_worker = draws(&params, &logits, 20);
        let mut second = Sampler::new(&params, &[&[0], &one_worker[..7]].concat(), 1);
        let mut out = StepOut::default();
        second.sample(Slot(3), &mut logits.clone(), &mut out);
        assert_eq!(out.samples[0].token, one_worker[7]);
        assert_ne!(draws(&SamplingParams { seed: 12, ..params }, &logits, 20), one_worker);
    }

    #[test]
    fn a_choice_continues_with_penalties_on_a_second_worker() {
        let params = SamplingParams {
            frequency_penalty: 0.7,
            presence_penalty: 0.3,
            repetition_penalty: 1.2,
            seed: 5,
            ..SamplingParams::default()
        };
        let logits: Vec<f32> = (0..16).map(|token| (token % 5) as f32 - 1.0).collect();
        let one_worker = draws(&params, &logits, 12);
        for split in 1..12 {
            let history = [&[0], &one_worker[..split]].concat();
            let mut second = Sampler::new(&params, &history, 1);
            let mut out = StepOut::default();
            second.sample(Slot(0), &mut logits.clone(), &mut out);
            assert_eq!(out.samples[0].token, one_worker[split], "split at {split}");
        }
    }

    #[test]
    fn top_k_keeps_the_k_best_and_one_is_greedy() {
        let logits = logits_of(&[0.1, 0.4, 0.2, 0.3]);
        let top = |top_k| SamplingParams { top_k, ..SamplingParams::default() };
        assert_eq!(drawn_set(&top(1), &logits), [1]);
        assert_eq!(drawn_set(&top(2), &logits), [1, 3]);
        assert_eq!(drawn_set(&top(9), &logits), [0, 1, 2, 3]);
    }

    #[test]
    fn top_p_keeps_the_smallest_set_with_that_mass_and_always_one_token() {
        let logits = logits_of(&[0.5, 0.2, 0.2, 0.1]);
        let top = |top_p| SamplingParams { top_p, ..SamplingParams::default() };
        assert_eq!(drawn_set(&top(0.0), &logits), [0]);
        assert_eq!(drawn_set(&top(0.49), &logits), [0]);
        assert_eq!(drawn_set(&top(0.6), &logits), [0, 1]);
        assert_eq!(drawn_set(&top(0.89), &logits), [0, 1, 2]);
        assert_eq!(drawn_set(&top(0.95), &logits), [0, 1, 2, 3]);
    }

    #[test]
    fn top_p_counts_the_mass_that_top_k_left() {
        let logits = logits_of(&[0.4, 0.3, 0.2, 0.1]);
        let params = SamplingParams { top_k: 2, top_p: 0.56, ..SamplingParams::default() };
        assert_eq!(drawn_set(&params, &logits), [0]);
        assert_eq!(drawn_set(&SamplingParams { top_p: 0.58, ..params }, &logits), [0, 1]);
    }

    #[test]
    fn min_p_drops_what_is_below_its_share_of_the_best() {
        let logits = logits_of(&[0.5, 0.3, 0.15, 0.05]);
        let min = |min_p| SamplingParams { min_p, ..SamplingParams::default() };
        assert_eq!(drawn_set(&min(1.0), &logits), [0]);
        assert_eq!(drawn_set(&min(0.5), &logits), [0, 1]);
        assert_eq!(drawn_set(&min(0.2), &logits), [0, 1, 2]);
        let both = SamplingParams { top_p: 0.99, ..min(0.5) };
        assert_eq!(drawn_set(&both, &logits), [0, 1]);
    }

    #[test]
    fn a_floor_for_top_p_drops_nothing_that_a_full_sort_keeps() {
        let weights: Vec<f32> = (0..5_000_u64)
            .map(|token| exp(-20.0 * philox::uniform(1, token)) as f32)
            .chain([1.0])
            .collect();
        for top_p in [0.1, 0.5, 0.9, 0.999] {
            let params = SamplingParams { top_p, ..SamplingParams::default() };
            let few = Sampler::new(&params, &[0], 1).candidates(&weights);
            let every = SamplingParams { top_k: 5_001, ..params };
            let all = Sampler::new(&every, &[0], 1).candidates(&weights);
            assert!(few.len().abs_diff(all.len()) <= 1, "{top_p}: {} {}", few.len(), all.len());
        }
    }

    #[test]
    fn repetition_reaches_prompt_and_output_but_the_others_only_output() {
        let greedy = SamplingParams::greedy();
        let logits = [2.0, 1.9, -1.0];
        let choose = |params: &SamplingParams, history: &[u32], prompt_len| {
            let mut out = StepOut::default();
            Sampler::new(params, history, prompt_len).sample(
                Slot(0),
                &mut logits.to_vec(),
                &mut out,
            );
            out.samples[0].token
        };
        let repetition = SamplingParams { repetition_penalty: 1.5, ..greedy.clone() };
        assert_eq!(choose(&repetition, &[0], 1), 1);
        let presence = SamplingParams { presence_penalty: 0.5, ..greedy.clone() };
        assert_eq!(choose(&presence, &[0], 1), 0);
        assert_eq!(choose(&presence, &[5, 0], 1), 1);
        let frequency = SamplingParams { frequency_penalty: 0.06, ..greedy };
        assert_eq!(choose(&frequency, &[5, 0], 1), 0);
        assert_eq!(choose(&frequency, &[5, 0, 0], 1), 1);
    }

    #[test]
    fn a_negative_logit_is_multiplied_by_the_repetition_penalty() {
        let params = SamplingParams { repetition_penalty: 2.0, ..SamplingParams::greedy() };
        let mut out = StepOut::default();
        Sampler::new(&params, &[0], 1).sample(Slot(0), &mut [-1.0, -1.5], &mut out);
        assert_eq!(out.samples[0].token, 1);
    }

    #[test]
    fn log_probabilities_are_the_models_before_penalties_and_temperature() {
        let params = SamplingParams {
            temperature: 0.3,
            top_k: 1,
            presence_penalty: 2.0,
            logprobs: Some(2),
            ..SamplingParams::default()
        };
        let mut out = StepOut::default();
        let mut logits = logits_of(&[0.5, 0.3, 0.2]);
        Sampler::new(&params, &[9, 0], 1).sample(Slot(4), &mut logits, &mut out);
        let sampled = &out.samples[0];
        assert_eq!((sampled.slot, sampled.token, sampled.rank), (Slot(4), 1, 2));
        assert!((sampled.logprob - 0.3_f32.ln()).abs() < 1e-6);
        let top = &out.top[sampled.top.start as usize..sampled.top.end as usize];
        assert_eq!(top.iter().map(|(token, _)| *token).collect::<Vec<_>>(), [0, 1]);
        assert!((top[0].1 - 0.5_f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn log_probabilities_of_what_cannot_happen_are_finite() {
        let params = SamplingParams { logprobs: Some(9), ..SamplingParams::greedy() };
        let mut out = StepOut::default();
        let mut logits = [0.0, f32::NEG_INFINITY, f32::NAN];
        Sampler::new(&params, &[0], 1).sample(Slot(0), &mut logits, &mut out);
        assert_eq!(out.top.len(), 3);
        assert!(out.top.iter().all(|(_, logprob)| logprob.is_finite()));
        assert_eq!(out.samples[0].logprob, 0.0);
    }
}
