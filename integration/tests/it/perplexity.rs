//! How probable a fixed text is to the engine, against an f32 pass of the same weights (`tests/perplexity.py`).
//!
//! Log-probabilities of single tokens move with 8-bit activations; their mean over a text must not.

use std::path::Path;

use baton_integration::files;
use baton_shared::id::BlockIndex;
use baton_shared::text::gguf::Gguf;
use baton_shared::text::tokenizer::Tokenizer;
use baton_workerd::backend::Backend;
use baton_workerd::backend::cpu::{CpuBackend, CpuOptions, Simd};
use baton_workerd::engine::sampling::SamplingParams;
use baton_workerd::engine::step::{Input, Slot, SlotOpen, StepOut, StepPlan, StepSeq};
use baton_workerd::model;
use serde::Deserialize;

use crate::support::{note, skipped};

const BLOCK_TOKENS: u32 = 32;
const TEXT: &str = include_str!("../fixtures/perplexity.txt");

#[derive(Deserialize)]
struct Recorded {
    model: String,
    window: usize,
    /// Of each window: the sum over its tokens but the first.
    logprobs: Vec<f64>,
    /// Of the text, by llama.cpp's tokenizer.
    ids: Vec<u32>,
}

fn recorded(text: &str) -> Recorded {
    serde_json::from_str(text).unwrap()
}

/// The sums of log-probabilities of some windows, read side by side.
fn logprobs(path: &Path, windows: &[&[u32]]) -> Vec<f64> {
    let steps = windows.iter().map(|window| window.len()).max().unwrap() as u32;
    let count = windows.len() as u32;
    let blocks = steps.div_ceil(BLOCK_TOKENS);
    let options = CpuOptions {
        threads: 2,
        max_sequences: count,
        max_batch_tokens: count,
        blocks: count * blocks,
        block_tokens: BLOCK_TOKENS,
        simd: Simd::Auto,
    };
    let mut backend = CpuBackend::new(&model::load(path).unwrap(), &options).unwrap();
    let sampling =
        SamplingParams { logprobs: Some(backend.caps().vocab), ..SamplingParams::greedy() };
    let mut sums = vec![0.0; windows.len()];
    let (mut plan, mut out) = (StepPlan::default(), StepOut::default());
    // What comes last has no token after it.
    for at in 0..steps - 1 {
        plan.clear();
        let reading = |slot: &u32| windows[*slot as usize].len() as u32 > at + 1;
        for slot in (0..count).filter(reading) {
            let token = windows[slot as usize][at as usize];
            if at == 0 {
                let (sampling, history) = (sampling.clone(), vec![token]);
                plan.opens.push(SlotOpen { slot: Slot(slot), sampling, history, prompt_len: 1 });
            }
            let input = Input::Tokens(plan.tokens.len() as u32..plan.tokens.len() as u32 + 1);
            plan.tokens.push(token);
            let table = plan.tables.len() as u32;
            let own = slot * blocks..slot * blocks + (at + 1).div_ceil(BLOCK_TOKENS);
            plan.tables.extend(own.map(BlockIndex));
            let table = table..plan.tables.len() as u32;
            plan.seqs.push(StepSeq { slot: Slot(slot), start: at, input, table, sample: true });
        }
        let ticket = backend.submit(&plan).unwrap();
        backend.collect(ticket, &mut out).unwrap();
        for sampled in &out.samples {
            let slot = sampled.slot.0 as usize;
            let next = windows[slot][at as usize + 1];
            let all = &out.top[sampled.top.start as usize..sampled.top.end as usize];
            let (_, logprob) = all.iter().find(|(id, _)| *id == next).unwrap();
            sums[slot] += f64::from(*logprob);
        }
    }
    sums
}

/// How much the engine's perplexity of the first `most` windows is above the recorded pass's, as a part of it.
fn excess(recorded: &Recorded, path: &Path, most: usize) -> f64 {
    let windows: Vec<&[u32]> = recorded.ids.chunks(recorded.window).take(most).collect();
    let tokens: usize = windows.iter().map(|window| window.len() - 1).sum();
    let ours = logprobs(path, &windows);
    for (i, (ours, theirs)) in ours.iter().zip(&recorded.logprobs).enumerate() {
        note(format_args!("window {i}: {ours:.3}, recorded {theirs:.3}"));
    }
    let mean = |sums: &[f64]| -sums.iter().sum::<f64>() / tokens as f64;
    let (ours, theirs) = (mean(&ours), mean(&recorded.logprobs[..windows.len()]));
    note(format_args!("perplexity {:.4}, recorded {:.4}", ours.exp(), theirs.exp()));
    (ours - theirs).exp() - 1.0
}

fn demo() -> Recorded {
    recorded(include_str!("../fixtures/smollm2-perplexity.json"))
}

fn qwen() -> Recorded {
    recorded(include_str!("../fixtures/qwen2.5-coder-perplexity.json"))
}

#[test]
fn the_demo_models_perplexity_is_an_f32_passes_within_half_a_percent() {
    let excess = excess(&demo(), &files::demo_model().unwrap(), 2);
    assert!(excess.abs() <= 0.005, "{excess}");
}

#[test]
#[ignore = "long: reads the whole text, a token at a time"]
fn the_demo_models_perplexity_of_a_whole_text_is_an_f32_passes_within_half_a_percent() {
    let excess = excess(&demo(), &files::demo_model().unwrap(), usize::MAX);
    assert!(excess.abs() <= 0.005, "{excess}");
}

#[test]
#[ignore = "long: reads the whole text, a token at a time"]
fn qwens_perplexity_of_a_whole_text_is_an_f32_passes_within_half_a_percent() {
    let name = "qwens_perplexity_of_a_whole_text_is_an_f32_passes_within_half_a_percent";
    let recorded = qwen();
    let Ok(path) = files::dep(&format!("models/{}", recorded.model)) else {
        return skipped(name, &format!("`{}` is not in .deps/models", recorded.model));
    };
    let excess = excess(&recorded, &path, usize::MAX);
    assert!(excess.abs() <= 0.005, "{excess}");
}

#[test]
fn a_whole_text_has_llama_cpps_ids() {
    let name = "a_whole_text_has_llama_cpps_ids";
    for recorded in [demo(), qwen()] {
        let Ok(path) = files::dep(&format!("models/{}", recorded.model)) else {
            skipped(name, &format!("`{}` is not in .deps/models", recorded.model));
            continue;
        };
        let tokenizer = Tokenizer::from_gguf(&Gguf::open(&path).unwrap()).unwrap();
        assert_eq!(tokenizer.encode(TEXT, true).unwrap(), recorded.ids, "{}", recorded.model);
    }
}
