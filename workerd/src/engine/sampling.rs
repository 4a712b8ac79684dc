//! How a token is chosen: parameters, and the host sampler that every back end without one of its own uses.
//!
//! A choice is a pure function of (parameters, history, logits): the random number belongs to (seed, output
//! position), and [`softmax`] gives the same bits everywhere. So it is the same alone or batched, on one worker or two.
//! A logit that is not a number counts as minus infinity.

use std::collections::HashMap;

use super::philox;
use super::softmax::{self, argmax};
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

    /// Whether a choice depends on the tokens before it.
    pub fn has_penalties(&self) -> bool {
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
        let (token, logprob, rank, top) = match self.params.logprobs {
            None => (self.choose(logits), 0.0, 0, out.top.len()..out.top.len()),
            Some(alternatives) => {
                let raw = logits.to_vec();
                let log_sum = softmax::log_sum_exp(&raw);
                let token = self.choose(logits);
                let rank = rank_of(token, &raw);
                let from = out.top.len();
                let best = softmax::best(&raw, alternatives as usize).into_iter();
                out.top.extend(best.map(|(token, logit)| (token, log_probability(logit, log_sum))));
                let logprob = log_probability(raw[token as usize], log_sum);
                (token, logprob, rank, from..out.top.len())
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
        softmax::to_weights(logits, highest, self.params.temperature);
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
    /// tokens in order of weight. `None` only if rounding put `random` past all of the mass.
    fn draw(&self, weights: &[f32], random: f64) -> Option<u32> {
        let min_p = self.params.min_p;
        if self.params.top_k == 0 && self.params.top_p >= 1.0 {
            return pick_any(weights, min_p, random * softmax::sum(weights, min_p));
        }
        let mut candidates = self.candidates(weights);
        candidates.truncate(candidates.partition_point(|(_, weight)| *weight >= min_p));
        let mass = mass(&candidates);
        pick(candidates.into_iter(), random * mass)
    }

    /// What top-k and top-p leave, best first.
    fn candidates(&self, weights: &[f32]) -> Vec<(u32, f32)> {
        let top_p = f64::from(self.params.top_p);
        let (mut candidates, total) = match self.params.top_k as usize {
            0 => {
                let total = softmax::sum(weights, 0.0);
                // All tokens below this floor together have less mass than top-p gives up, so none of them is kept.
                let floor = (1.0 - top_p) * total / weights.len() as f64;
                (softmax::at_least(weights, floor as f32), total)
            }
            k => {
                let best = softmax::best(weights, k);
                let total = mass(&best);
                (best, total)
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

fn mass(candidates: &[(u32, f32)]) -> f64 {
    candidates.iter().map(|(_, weight)| f64::from(*weight)).sum()
}

/// [`pick`] in order of ids among the weights that are at least `floor`; whole pieces are passed over at once.
fn pick_any(weights: &[f32], floor: f32, target: f64) -> Option<u32> {
    const PIECE: usize = 256;
    let mut left = target;
    for (piece, weights) in weights.chunks(PIECE).enumerate() {
        let mass = softmax::sum(weights, floor);
        if left < mass {
            let ids = (piece * PIECE) as u32..;
            let kept = ids.zip(weights.iter().copied()).filter(|(_, weight)| *weight >= floor);
            return pick(kept, left);
        }
        left -= mass;
    }
    None
}

/// The token at which the running sum of weights exceeds `target`; the last one if rounding keeps it below.
fn pick(weighted: impl Iterator<Item = (u32, f32)>, target: f64) -> Option<u32> {
    let mut left = target;
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

fn rank_of(token: u32, logits: &[f32]) -> u32 {
    let own = logits[token as usize];
    let (before, after) = logits.split_at(token as usize);
    let better = before.iter().filter(|logit| **logit >= own).count();
    1 + (better + after.iter().filter(|logit| **logit > own).count()) as u32
}

/// Finite always: what has no probability gets the lowest number, as JSON knows no infinity.
fn log_probability(logit: f32, log_sum: f64) -> f32 {
    match (f64::from(logit) - log_sum) as f32 {
        logprob if logprob.is_nan() && log_sum.is_infinite() => 0.0,
        logprob => logprob.max(f32::MIN),
    }
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
            .map(|token| (-20.0 * philox::uniform(1, token)).exp() as f32)
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

    #[test]
    fn passing_over_pieces_draws_what_a_walk_over_all_draws() {
        let uniform = |position| philox::uniform(2, position) as f32;
        let weights: Vec<f32> = (0..1_000).map(uniform).collect();
        for floor in [0.0, 0.5, 0.99] {
            let all = (0..).zip(weights.iter().copied()).filter(|(_, weight)| *weight >= floor);
            let total = softmax::sum(&weights, floor);
            for position in 0..500 {
                let target = philox::uniform(3, position) * total;
                assert_eq!(pick_any(&weights, floor, target), pick(all.clone(), target));
            }
        }
        assert_eq!(pick_any(&weights, 0.0, 1e9), None);
    }
}
