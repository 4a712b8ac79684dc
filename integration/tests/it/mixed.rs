//! Two precisions of one model: a quantised GGUF file computes the prompt, a bf16 Hugging Face folder generates.

use std::time::Duration;

use baton_integration::cluster::{Cluster, Plan, set};
use baton_integration::files;
use baton_integration::tiny_model::dequantise_gguf;
use baton_shared::text::gguf::Gguf;
use baton_shared::text::tokenizer::Tokenizer;
use serde_json::{Value, json};
use toml::toml;

use crate::support::{READY, STOP, all_free, complete};

/// Where the reference's two best tokens are nearer than this, either may be chosen.
const NEAR_TIE: f64 = 0.5;

#[tokio::test]
async fn a_gguf_context_worker_hands_over_to_a_bf16_generation_worker() {
    let folder = tempfile::tempdir().unwrap();
    let gguf = files::demo_model().unwrap();
    let bf16 = folder.path().join("SmolLM2-135M-Instruct");
    dequantise_gguf(&gguf, &bf16).unwrap();
    let worker = toml! { model_revision = "smollm2-135m-instruct" };
    let mut plan = Plan::local(&gguf, 1, 1, &worker).unwrap();
    set(&mut plan.workers[1].1, &["model"], bf16.to_str().unwrap());
    let cluster = Cluster::start(&plan, folder.path(), READY).await.unwrap();

    let bytes = std::fs::read(&gguf).unwrap();
    let tokenizer = Tokenizer::from_gguf(&Gguf::parse(&bytes).unwrap()).unwrap();
    let recorded = include_str!("../fixtures/smollm2-logprobs.json");
    let recorded: Value = serde_json::from_str(recorded).unwrap();
    let cases = recorded["cases"].as_array().unwrap();
    let mut same = 0;
    for case in cases.iter().take(8) {
        let steps = case["f32"]["greedy_and_gap"].as_array().unwrap();
        let request = json!({"model": "SmolLM2-135M-Instruct", "prompt": case["ids"],
            "max_tokens": steps.len(), "temperature": 0, "ignore_eos": true});
        let ours = complete(cluster.client(), &request, false).await.text;
        let ids: Vec<u32> = steps.iter().map(|step| step[0].as_u64().unwrap() as u32).collect();
        let text = |count: usize| tokenizer.decode(&ids[..count], true);
        let agreed = (0..=ids.len()).rev().find(|count| ours.starts_with(&text(*count))).unwrap();
        same += agreed;
        if let Some(step) = steps.get(agreed) {
            let gap = step[1].as_f64().unwrap();
            assert!(gap < NEAR_TIE, "{}: differs at step {agreed}, gap {gap}", case["prompt"]);
        }
    }
    assert!(same > 40, "only {same} tokens in common");
    all_free(&cluster, Duration::from_secs(2)).await;
    cluster.stop(STOP).unwrap();
}
