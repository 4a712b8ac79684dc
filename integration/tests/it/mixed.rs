//! Two precisions of one model work together where the operator says that they are one: a quantised GGUF file computes the
//! prompt and a bf16 folder generates; bf16 and FP8 either way.

use std::path::{Path, PathBuf};
use std::time::Duration;

use baton_integration::cluster::{Cluster, Plan, set};
use baton_integration::files;
use baton_integration::tiny_fp8::TinyFp8;
use baton_integration::tiny_model::{TinyModel, dequantise_gguf};
use baton_shared::text::gguf::Gguf;
use baton_shared::text::tokenizer::Tokenizer;
use serde_json::{Value, json};
use toml::{Table, toml};

use crate::handover::{PATH, generation_request};
use crate::support::{READY, Running, STOP, all_free, complete, start_plan, token_ids};

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

/// One tiny model twice: in bf16, and as Model Optimizer makes it FP8.
fn bf16_and_fp8(folder: &Path) -> [PathBuf; 2] {
    let [bf16, fp8] = ["bf16", "fp8"].map(|name| folder.join(name));
    TinyModel::default().write(&bf16).unwrap();
    TinyModel::default().write_fp8(&fp8, TinyFp8::ModelOptimizer).unwrap();
    [bf16, fp8]
}

/// A context worker of one folder and a generation worker of another, said to be one model.
async fn pair(context: &Path, generation: &Path, revision: Table) -> Running {
    let mut worker = revision;
    set(&mut worker, &["served_model_names"], vec!["tiny"]);
    start_plan(|| {
        let mut plan = Plan::local(context, 1, 1, &worker).unwrap();
        set(&mut plan.workers[1].1, &["model"], generation.to_str().unwrap());
        plan
    })
    .await
}

fn request() -> Value {
    json!({"model": "tiny", "prompt": token_ids(1, 70, 512), "max_tokens": 24, "temperature": 0,
        "ignore_eos": true, "logprobs": 1})
}

#[tokio::test]
async fn bf16_and_fp8_workers_of_one_model_revision_hand_over_both_ways() {
    let folder = tempfile::tempdir().unwrap();
    let [bf16, fp8] = &bf16_and_fp8(folder.path());
    let mut outcomes = Vec::new();
    for (context, generation) in [(bf16, bf16), (bf16, fp8), (fp8, bf16), (fp8, fp8)] {
        let running = pair(context, generation, toml! { model_revision = "tiny" }).await;
        let outcome = complete(running.cluster.client(), &request(), false).await;
        assert_eq!((outcome.usage, outcome.tokens.len()), ([70, 24, 94], 24));
        outcomes.push(outcome);
        all_free(&running.cluster, Duration::from_secs(2)).await;
        running.stop();
    }
    // The first token is the context worker's, whatever worker goes on.
    for (one, other) in [(0, 1), (2, 3)] {
        let [one, other] = [one, other].map(|at: usize| &outcomes[at]);
        assert_eq!(one.tokens[0], other.tokens[0]);
        assert_eq!(one.token_logprobs[0], other.token_logprobs[0]);
    }
    assert_ne!(outcomes[0].token_logprobs[0], outcomes[2].token_logprobs[0], "two precisions");
    assert_ne!(outcomes[0].token_logprobs, outcomes[1].token_logprobs, "two precisions");
}

#[tokio::test]
async fn without_one_model_revision_a_bf16_and_an_fp8_worker_are_incompatible() {
    let folder = tempfile::tempdir().unwrap();
    let [bf16, fp8] = &bf16_and_fp8(folder.path());
    for (context, generation) in [(bf16, fp8), (fp8, bf16)] {
        let running = pair(context, generation, Table::new()).await;
        let [context, generation] = [0, 1].map(|at| running.cluster.workers[at].client());
        let id = json!({"disagg_request_id": 1_u64 << 41});
        let mut first = request();
        first["disaggregated_params"] = id.clone();
        first["disaggregated_params"]["request_type"] = json!("context_only");
        let answer = context.post(PATH, &first).await.unwrap().ok().unwrap();
        let refused = generation.post(PATH, &generation_request(&first, &answer)).await.unwrap();
        let code = refused.error_code().unwrap();
        assert_eq!((refused.status, code), (409, "kv_incompatible".into()));
        assert_eq!(context.post("/v1/disagg/release", &id).await.unwrap().status, 200);
        let answer = running.cluster.client().post(PATH, &request()).await.unwrap();
        let body = String::from_utf8_lossy(&answer.body);
        assert!(answer.status == 502 && body.contains("`model_revision`"), "{body}");
        all_free(&running.cluster, Duration::from_secs(5)).await;
        running.stop();
    }
}
