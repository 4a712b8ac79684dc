//! The second real model, Qwen2.5-Coder-0.5B-Instruct (Q4_K_M): end to end, and against the oracle.

use std::path::PathBuf;

use baton_integration::oracle::{KvRounding, Oracle};
use baton_shared::text::gguf::Gguf;
use baton_shared::text::tokenizer::Tokenizer;
use baton_workerd::backend::cpu::Simd;
use baton_workerd::model::WeightType;
use serde_json::json;

use crate::engine_golden::Engine;
use crate::golden::quantile;
use crate::support::{complete, note, skipped, start};
use crate::tokenizers::optional;

const SERVED: &str = "Qwen2.5-Coder-0.5B-Instruct";

/// The file, if it was to be had and its types can be computed with.
fn model(test: &str) -> Option<PathBuf> {
    let path = optional(test, "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf")?;
    for needed in ["Q5_0", "Q8_0", "Q6_K", "Q4_K"] {
        if !WeightType::ALL.iter().any(|known| known.name() == needed) {
            skipped(test, &format!("weights of type {needed} are not supported"));
            return None;
        }
    }
    Some(path)
}

#[tokio::test]
async fn two_workers_answer_as_one_on_the_second_model_and_make_sense() {
    let test = "two_workers_answer_as_one_on_the_second_model_and_make_sense";
    let Some(path) = model(test) else { return };
    let running = start(&path, 1, 1, toml::Table::new()).await;
    let pair = running.cluster.client();
    let alone = running.cluster.workers[1].client();
    let prompt = "def fibonacci(n):\n    \"\"\"The n-th Fibonacci number.\"\"\"\n";
    let request = json!({"model": SERVED, "prompt": prompt, "max_tokens": 24, "temperature": 0,
        "logprobs": 2});
    let expected = complete(alone, &request, false).await;
    assert!(expected.text.contains("return"), "{}", expected.text);
    for stream in [false, true] {
        assert_eq!(complete(pair, &request, stream).await, expected, "streamed: {stream}");
    }
    let chat = json!({"model": SERVED, "max_tokens": 16, "temperature": 0, "messages": [
        {"role": "user", "content": "What is the capital of France? Answer with one word."}]});
    let answer = pair.post("/v1/chat/completions", &chat).await.unwrap().ok().unwrap();
    let choice = &answer["choices"][0];
    let text = choice["message"]["content"].as_str().unwrap();
    assert!(text.contains("Paris"), "{answer}");
    assert_eq!(choice["finish_reason"], "stop", "the end of the turn ends the text: {answer}");
    running.stop();
}

#[test]
fn int8_activations_move_the_second_models_log_probabilities_little() {
    let test = "int8_activations_move_the_second_models_log_probabilities_little";
    let Some(path) = model(test) else { return };
    let tokenizer = Tokenizer::from_gguf(&Gguf::open(&path).unwrap()).unwrap();
    let mut engine = Engine::new(&path, Simd::Auto);
    let oracle = Oracle::from_gguf(&path).unwrap();
    let mut all = Vec::new();
    for prompt in [
        "fn main() {",
        "The capital of France is",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "1, 1, 2, 3, 5, 8,",
    ] {
        let ids = tokenizer.encode(prompt, true).unwrap();
        let (got, expected) = (engine.begin(&ids), oracle.logprobs(&ids, KvRounding::Bf16));
        let mut order: Vec<usize> = (0..expected.len()).collect();
        order.sort_by(|a, b| expected[*b].total_cmp(&expected[*a]));
        all.extend(order[..5].iter().map(|id| (got[*id] - expected[*id]).abs()));
    }
    let [median, largest] = [0.5, 1.0].map(|part| quantile(&mut all, part));
    note(format!("median {median}, largest {largest}"));
    assert!(median <= 0.1 && largest <= 0.6, "{median} {largest}");
}
