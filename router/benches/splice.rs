//! What both hops' bodies cost in the router, against reading and writing them as JSON values.
//!
//! Prints microseconds for prompts of three sizes, and how many times longer `serde_json` takes for the same.

#![expect(clippy::print_stdout, reason = "a bench prints its table")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use baton_router::dialect::Api;
use baton_router::dialect::era::Era;
use baton_router::dialect::trtllm::{ClientRequest, ContextAnswer};
use baton_shared::id::DisaggRequestId;
use bytes::Bytes;
use serde_json::{Value, json};

const ID: DisaggRequestId = DisaggRequestId(1 << 62);

fn main() {
    println!("{:>10} {:>12} {:>14} {:>12}", "prompt", "hop", "splice µs", "serde ×");
    for (name, bytes) in [("1 KiB", 1 << 10), ("32 KiB", 32 << 10), ("1 MiB", 1 << 20)] {
        let prompt: String =
            "It was a dark\n night, \"he\" said. ".chars().cycle().take(bytes).collect();
        let body = Bytes::from(
            json!({"model": "M", "prompt": prompt, "max_tokens": 16, "stream": true}).to_string(),
        );
        let answer = Bytes::from(context_answer(bytes / 4).to_string());
        let request =
            ClientRequest::parse(Api::Completions, body.clone()).expect("it is an object");
        let ours = measure(|| {
            let request = ClientRequest::parse(Api::Completions, body.clone());
            request.expect("it is an object").context(ID, Era::Main)
        });
        row(name, "context", ours, measure(|| values_context(&body)));
        let ours = measure(|| {
            let answer = ContextAnswer::parse(answer.clone(), ID).expect("it hands over");
            request.generation(&answer, Era::Main)
        });
        row(name, "generation", ours, measure(|| values_generation(&body, &answer)));
    }
}

fn row(prompt: &str, hop: &str, ours: Duration, values: Duration) {
    let micros = ours.as_secs_f64() * 1e6;
    let ratio = values.as_secs_f64() / ours.as_secs_f64();
    println!("{prompt:>10} {hop:>12} {micros:>14.2} {ratio:>12.1}");
}

/// Best of several batches: what the machine does beside only ever adds.
fn measure<T>(mut work: impl FnMut() -> T) -> Duration {
    let once = Instant::now();
    black_box(work());
    let rounds =
        (Duration::from_millis(10).as_nanos() / once.elapsed().as_nanos().max(1)).clamp(1, 100_000);
    let rounds = u32::try_from(rounds).expect("at most 100,000");
    let batch = |_| {
        let start = Instant::now();
        (0..rounds).for_each(|_| drop(black_box(work())));
        start.elapsed() / rounds
    };
    (0..20).map(batch).min().expect("there are 20 batches")
}

fn context_answer(tokens: usize) -> Value {
    let ids: Vec<usize> = (0..tokens).map(|token| token * 7919 % 49_152).collect();
    json!({
        "id": "cmpl-1", "object": "text_completion", "created": 1, "model": "M",
        "prompt_token_ids": ids,
        "choices": [{"index": 0, "text": " a", "logprobs": null, "finish_reason": "length",
            "disaggregated_params": {
                "request_type": "context_only", "first_gen_tokens": [263], "ctx_request_id": 5,
                "encoded_opaque_state": "QUJD".repeat(500), "disagg_request_id": 5,
                "schedule_style": 0, "ctx_usage": null}}],
        "usage": {"prompt_tokens": tokens, "completion_tokens": 1, "total_tokens": tokens + 1},
    })
}

fn values_context(body: &Bytes) -> Vec<u8> {
    let mut body: Value = serde_json::from_slice(body).expect("it is JSON");
    body["stream"] = json!(false);
    body["stream_options"] = Value::Null;
    body["disaggregated_params"] =
        json!({"request_type": "context_only", "disagg_request_id": ID.0, "schedule_style": 0});
    serde_json::to_vec(&body).expect("a value can be written")
}

fn values_generation(body: &Bytes, answer: &Bytes) -> Vec<u8> {
    let mut body: Value = serde_json::from_slice(body).expect("it is JSON");
    let mut answer: Value = serde_json::from_slice(answer).expect("it is JSON");
    body["prompt"] = answer["prompt_token_ids"].take();
    let mut params = answer["choices"][0]["disaggregated_params"].take();
    params["request_type"] = json!("generation_only");
    params["ctx_usage"] = answer["usage"].take();
    body["disaggregated_params"] = params;
    serde_json::to_vec(&body).expect("a value can be written")
}
