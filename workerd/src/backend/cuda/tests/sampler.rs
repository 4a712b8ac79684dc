//! The device's sampler against its rules in f64: the same random numbers as the host's (`engine/sampling.rs`), drawn in
//! order of ids from what top-k, top-p and min-p leave.

use super::super::inputs::write_opens;
use super::super::sys::buffer::Buffer;
use super::super::sys::launch::{CHOSEN_BYTES, Dims, SLOT_BYTES};
use super::kernels::{Bench, floats_of};
use crate::backend::cpu::tests::Random;
use crate::engine::philox;
use crate::engine::sampling::SamplingParams;
use crate::engine::step::{Slot, SlotOpen};

const NOBODY: u32 = u32::MAX;
/// Alternatives of a row that there is room for.
const MOST: usize = 8;
/// Closer to a border than this share of all mass, either side will do: weights are f32.
const CLOSE: f64 = 1e-5;

/// The rules.
struct Rules<'a> {
    params: &'a SamplingParams,
    history: Vec<u32>,
    prompt_len: usize,
}

/// A number whose order is that of logits: what is not a number comes last.
fn number(logit: f32) -> f64 {
    if logit.is_nan() { f64::NEG_INFINITY } else { f64::from(logit) }
}

/// Ids, best first.
fn ordered(values: &[f64]) -> Vec<usize> {
    let mut ids: Vec<usize> = (0..values.len()).collect();
    ids.sort_by(|left, right| values[*right].total_cmp(&values[*left]).then(left.cmp(right)));
    ids
}

impl Rules<'_> {
    fn penalised(&self, logits: &[f32]) -> Vec<f64> {
        let (prompt, output) = self.history.split_at(self.prompt_len);
        let SamplingParams { repetition_penalty, frequency_penalty, presence_penalty, .. } =
            self.params;
        let each = logits.iter().enumerate().map(|(id, logit)| {
            let count = output.iter().filter(|token| **token as usize == id).count();
            let mut value = *logit;
            if count > 0 || prompt.contains(&(id as u32)) {
                value = if value > 0.0 {
                    value / repetition_penalty
                } else {
                    value * repetition_penalty
                };
            }
            if count > 0 {
                value = value - frequency_penalty * count as f32 - presence_penalty;
            }
            number(value)
        });
        each.collect()
    }

    /// Tokens that may come, nearly always one.
    fn tokens(&self, logits: &[f32]) -> Vec<u32> {
        let values = self.penalised(logits);
        let order = ordered(&values);
        let highest = values[order[0]];
        let SamplingParams { temperature, top_k, top_p, min_p, seed, .. } = *self.params;
        if temperature == 0.0 || !highest.is_finite() || top_k == 1 {
            return vec![order[0] as u32];
        }
        let weights: Vec<f64> =
            values.iter().map(|v| ((v - highest) / f64::from(temperature)).exp()).collect();
        let mut floor = f64::from(min_p);
        let mut total: f64 = weights.iter().sum();
        if top_k > 0 && (top_k as usize) < weights.len() {
            let least = weights[order[top_k as usize - 1]];
            floor = floor.max(least);
            total = weights.iter().filter(|weight| **weight >= least).sum();
        }
        let mut is_close = false;
        if top_p < 1.0 {
            let wanted = f64::from(top_p) * total;
            let mut mass = 0.0;
            for id in &order {
                mass += weights[*id];
                is_close |= (mass - wanted).abs() < CLOSE * total;
                if mass >= wanted {
                    floor = floor.max(weights[*id]);
                    break;
                }
            }
        }
        let kept: Vec<usize> = (0..weights.len()).filter(|id| weights[*id] >= floor).collect();
        let all: f64 = kept.iter().map(|id| weights[*id]).sum();
        let position = self.history.len() - self.prompt_len;
        let target = philox::uniform(seed, position as u64) * all;
        let mut below = 0.0;
        let mut tokens = Vec::new();
        for id in kept {
            let above = below + weights[id];
            let slack = CLOSE * all * if is_close { 1e4 } else { 1.0 };
            if below - slack <= target && target < above + slack && weights[id] > 0.0 {
                tokens.push(id as u32);
            }
            below = above;
        }
        tokens
    }
}

fn params() -> Vec<SamplingParams> {
    let plain = SamplingParams { seed: 9, ..SamplingParams::default() };
    let all = SamplingParams {
        temperature: 0.7,
        top_p: 0.8,
        top_k: 40,
        min_p: 0.02,
        seed: (1 << 40) | 5,
        frequency_penalty: 0.4,
        presence_penalty: 0.3,
        repetition_penalty: 1.3,
        logprobs: Some(MOST as u32),
    };
    vec![
        SamplingParams { logprobs: Some(3), ..SamplingParams::greedy() },
        SamplingParams {
            repetition_penalty: 1.5,
            presence_penalty: 4.0,
            ..SamplingParams::greedy()
        },
        plain.clone(),
        SamplingParams { temperature: 1.7, logprobs: Some(0), ..plain.clone() },
        SamplingParams { top_k: 5, ..plain.clone() },
        SamplingParams { top_p: 0.6, ..plain.clone() },
        SamplingParams { top_p: 1e-6, ..plain.clone() },
        SamplingParams { min_p: 0.3, ..plain.clone() },
        SamplingParams { top_k: 1, ..plain },
        all,
    ]
}

/// Token, log-probability, rank and alternatives of a row.
type Drawn = (u32, f64, u32, Vec<(u32, f64)>);

/// A device with a slot for each of some parameters.
struct Samplers {
    dims: Dims,
    slots: Buffer,
    counts: Buffer,
}

impl Samplers {
    fn open(bench: &Bench, vocab: usize, opens: &[SlotOpen]) -> Self {
        let (mut records, mut history) = (Vec::new(), Vec::new());
        write_opens(opens, &mut records, &mut history);
        let words = |bytes: &[u8]| {
            let (words, _) = bytes.as_chunks::<4>();
            bench.words(&words.iter().map(|word| u32::from_le_bytes(*word)).collect::<Vec<u32>>())
        };
        let (records, history) = (words(&records), words(&history));
        let dims = Dims {
            hidden: 32,
            ffn: 32,
            heads: 1,
            kv_heads: 1,
            head_dim: 32,
            vocab: vocab as u32,
            epsilon: 1e-5,
        };
        let slots = bench.empty(opens.len() * SLOT_BYTES);
        let counts = bench.empty(opens.len() * vocab * 4);
        let count = opens.len() as u32;
        let (records, history) = (records.view(), history.view());
        bench
            .kernels
            .open_slots(&dims, records, count, history, slots.view(), counts.view())
            .unwrap();
        bench.written_once(&slots, opens.len() * SLOT_BYTES);
        Self { dims, slots, counts }
    }

    /// Samples rows of `logits`; `sampled` names their slots.
    fn sample(&self, bench: &Bench, logits: &[f32], sampled: &[u32]) -> Vec<Drawn> {
        let count = sampled.len();
        let (logits, sampled_there) = (bench.floats(logits), bench.words(sampled));
        let weights = bench.empty(logits.bytes());
        let chosen = bench.empty(count * CHOSEN_BYTES);
        let alternatives = bench.empty(count * MOST * 8);
        bench
            .kernels
            .sample(
                &self.dims,
                logits.view(),
                weights.view(),
                sampled_there.view(),
                count as u32,
                self.slots.view(),
                self.counts.view(),
                (chosen.view(), alternatives.view()),
                MOST as u32,
            )
            .unwrap();
        bench.gpu.synchronise().unwrap();
        for (row, slot) in sampled.iter().enumerate() {
            let at = chosen.address() + (row * CHOSEN_BYTES) as u64;
            let times = u32::from(*slot != NOBODY);
            assert_eq!(bench.emulator.writes(at, CHOSEN_BYTES), (times, times), "row {row}");
        }
        let (mut rows, mut pairs) = (vec![0; chosen.bytes()], vec![0; alternatives.bytes()]);
        chosen.read(0, &mut rows).unwrap();
        alternatives.read(0, &mut pairs).unwrap();
        let word = |bytes: &[u8]| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let row = |(row, pairs): (&[u8], &[u8])| {
            let pairs = pairs.chunks(8).map(|pair| (word(pair), floats_of(&pair[4..])[0]));
            (word(row), floats_of(&row[4..8])[0], word(&row[8..]), pairs.collect())
        };
        rows.chunks(CHOSEN_BYTES).zip(pairs.chunks(MOST * 8)).take(count).map(row).collect()
    }
}

#[test]
fn tokens_are_drawn_by_the_hosts_rules_and_told_with_their_log_probabilities() {
    let params = params();
    for (backward, vocab) in [(false, 100), (true, 100), (false, 1030), (true, 4101)] {
        let bench = Bench::new(backward);
        let mut random = Random::new(vocab as u64);
        let mut rules: Vec<Rules<'_>> = params
            .iter()
            .enumerate()
            .map(|(number, params)| Rules {
                params,
                history: (0..number + 4).map(|_| random.below(vocab) as u32).collect(),
                prompt_len: 4,
            })
            .collect();
        let opens: Vec<SlotOpen> = rules
            .iter()
            .enumerate()
            .map(|(slot, rules)| SlotOpen {
                slot: Slot(slot as u32),
                sampling: rules.params.clone(),
                history: rules.history.clone(),
                prompt_len: 4,
            })
            .collect();
        let samplers = Samplers::open(&bench, vocab, &opens);
        for turn in 0..3 {
            // Slots in falling order, nobody's row among them.
            let mut sampled: Vec<u32> = (0..params.len() as u32).rev().collect();
            sampled.insert(turn, NOBODY);
            let mut logits: Vec<f32> =
                (0..sampled.len() * vocab).map(|_| 2.5 * random.normal()).collect();
            // Ties, and what is not a number or has no probability.
            for row in logits.chunks_mut(vocab) {
                (row[3], row[7], row[8]) = (row[50], f32::NAN, f32::NEG_INFINITY);
            }
            let drawn = samplers.sample(&bench, &logits, &sampled);
            for (row, (token, logprob, rank, pairs)) in drawn.iter().enumerate() {
                if sampled[row] == NOBODY {
                    continue;
                }
                let rules = &mut rules[sampled[row] as usize];
                let logits = &logits[row * vocab..][..vocab];
                let may_be = rules.tokens(logits);
                let what = format!("{:?}, vocab {vocab}, turn {turn}", rules.params);
                assert!(may_be.contains(token), "{what}: {token} is none of {may_be:?}");
                rules.history.push(*token);
                let Some(wanted) = rules.params.logprobs else {
                    assert_eq!((*logprob, *rank), (0.0, 0), "{what}");
                    continue;
                };
                let values: Vec<f64> = logits.iter().map(|logit| number(*logit)).collect();
                let order = ordered(&values);
                let highest = values[order[0]];
                let all: f64 = values.iter().map(|value| (value - highest).exp()).sum();
                let log_sum = highest + all.ln();
                let close = |got: f64, id: usize| (got - (values[id] - log_sum)).abs() < 1e-4;
                let at = order.iter().position(|id| *id == *token as usize).unwrap();
                assert_eq!(*rank as usize, at + 1, "{what}");
                assert!(close(*logprob, *token as usize), "{what}: {logprob}");
                for ((id, logprob), wanted) in pairs.iter().zip(&order).take(wanted as usize) {
                    assert_eq!(*id as usize, *wanted, "{what}");
                    assert!(close(*logprob, *wanted), "{what}: {logprob}");
                }
            }
        }
    }
}

#[test]
fn where_no_logit_is_a_number_the_first_token_comes_with_a_finite_log_probability() {
    let bench = Bench::new(false);
    for params in [SamplingParams::default(), SamplingParams::greedy()] {
        let sampling = SamplingParams { logprobs: Some(2), ..params };
        let open = SlotOpen { slot: Slot(0), sampling, history: vec![1], prompt_len: 1 };
        let samplers = Samplers::open(&bench, 64, &[open]);
        for logit in [f32::NAN, f32::NEG_INFINITY] {
            let drawn = samplers.sample(&bench, &[logit; 64], &[0]);
            let (token, logprob, rank, pairs) = &drawn[0];
            assert_eq!((*token, *rank, pairs[0].0), (0, 1, 0));
            assert!(logprob.is_finite() && pairs[0].1.is_finite(), "{drawn:?}");
        }
    }
}
