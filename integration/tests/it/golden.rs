//! Log-probabilities of the demo model: the oracle against recorded figures, and the worker against the oracle.

use std::path::Path;
use std::sync::LazyLock;

use baton_integration::oracle::{KvRounding, Oracle};
use serde::Deserialize;

use baton_integration::files::demo_model;

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    prompt: String,
    ids: Vec<u32>,
    f32: Figures,
    f32_bf16_kv: Figures,
}

#[derive(Deserialize)]
struct Figures {
    /// Id and natural-log probability, best first.
    top: Vec<(u32, f32)>,
    /// Id and distance of the runner-up.
    #[serde(default)]
    greedy_and_gap: Vec<(u32, f32)>,
}

static ORACLE: LazyLock<Oracle> =
    LazyLock::new(|| Oracle::from_gguf(&demo_model().unwrap()).unwrap());

fn golden() -> Golden {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/smollm2-logprobs.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn largest_error(case: &Case, figures: &Figures, rounding: KvRounding) -> f32 {
    let got = ORACLE.logprobs(&case.ids, rounding);
    let error = |(id, expected): &(u32, f32)| (got[*id as usize] - expected).abs();
    let largest = figures.top.iter().map(error).fold(0.0, f32::max);
    println!("{largest:.5} {:?}", case.prompt);
    largest
}

#[test]
fn the_oracle_reproduces_the_recorded_f32_figures() {
    for case in golden().cases {
        assert!(largest_error(&case, &case.f32, KvRounding::F32) <= 1e-3, "{:?}", case.prompt);
    }
}

#[test]
fn the_oracle_reproduces_the_recorded_figures_with_a_bf16_cache() {
    for case in golden().cases {
        let error = largest_error(&case, &case.f32_bf16_kv, KvRounding::Bf16);
        assert!(error <= 5e-3, "{:?}: {error}", case.prompt);
    }
}

#[test]
fn the_oracle_reproduces_recorded_greedy_texts() {
    for case in golden().cases.iter().step_by(5) {
        let recorded = &case.f32.greedy_and_gap;
        let got = ORACLE.greedy(&case.ids, recorded.len(), KvRounding::F32);
        for (i, (step, (id, gap))) in got.iter().zip(recorded).enumerate() {
            assert_eq!(step.id, *id, "{:?} step {i}", case.prompt);
            assert!((step.gap - gap).abs() < 2e-3, "{:?} step {i}: {step:?}", case.prompt);
        }
    }
}
