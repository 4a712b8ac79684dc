//! Context plus generation answers exactly as one worker would (`docs`: hand-over): text, finish reason, usage and
//! log-probabilities, streamed or not, alone or in company.

use std::path::Path;

use baton_integration::client::Client;
use baton_integration::files;
use baton_integration::tiny_model::{TinyArchitecture, TinyRope};
use serde_json::{Value, json};

use crate::support::{Outcome, Running, complete, start, token_ids};
use crate::tiny;

/// A request's variants: what is asked beside the prompt.
fn variants() -> Vec<(&'static str, Value)> {
    vec![
        ("greedy", json!({"max_tokens": 12, "temperature": 0})),
        (
            "seeded sampling with penalties",
            json!({"max_tokens": 12, "temperature": 0.8, "top_p": 0.9, "seed": 7,
                "frequency_penalty": 0.5, "presence_penalty": 0.3, "repetition_penalty": 1.1}),
        ),
        ("log-probabilities", json!({"max_tokens": 6, "temperature": 0, "logprobs": 3})),
        ("one token", json!({"max_tokens": 1, "temperature": 0, "logprobs": 3})),
        ("two tokens", json!({"max_tokens": 2, "temperature": 0, "logprobs": 3})),
        ("past EOS", json!({"max_tokens": 12, "temperature": 0, "ignore_eos": true})),
    ]
}

fn request(model: &str, prompt: &Value, variant: &Value) -> Value {
    let mut request = variant.clone();
    request["model"] = json!(model);
    request["prompt"] = prompt.clone();
    request
}

/// Asks one worker and the pair, streamed and not: all four must agree.
async fn agree(running: &Running, name: &str, request: &Value) -> Outcome {
    let alone = running.cluster.workers.last().unwrap().client();
    let pair = running.cluster.client();
    let expected = complete(alone, request, false).await;
    assert_eq!(complete(alone, request, true).await, expected, "{name}: one worker, streamed");
    assert_eq!(complete(pair, request, false).await, expected, "{name}: two workers");
    assert_eq!(complete(pair, request, true).await, expected, "{name}: two workers, streamed");
    expected
}

async fn matrix(model: &Path, served: &str, vocab: u64, lengths: &[usize]) {
    let running = start(model, 1, 1, toml::Table::new()).await;
    for &length in lengths {
        let prompt = json!(token_ids(length as u64, length, vocab));
        for (name, variant) in variants() {
            let name = format!("{name}, {length} prompt tokens");
            let outcome = agree(&running, &name, &request(served, &prompt, &variant)).await;
            assert_eq!(outcome.usage[0], length as u64, "{name}");
            assert!(outcome.usage[1] >= 1, "{name}");
        }
    }
    running.stop();
}

#[tokio::test]
async fn two_workers_answer_as_one_on_the_tiny_model() {
    let model = tiny::model(4);
    matrix(&model.path, &model.name, model.vocab, &[1, 31, 32, 33, 500, 2000]).await;
}

#[tokio::test]
async fn two_workers_answer_as_one_on_a_qwen2_folder() {
    let model = tiny::of(TinyArchitecture::Qwen2, TinyRope::Plain, "tiny-qwen2");
    matrix(&model.path, &model.name, model.vocab, &[33, 500]).await;
}

#[tokio::test]
async fn two_workers_answer_as_one_on_a_qwen3_file() {
    let model = tiny::of(TinyArchitecture::Qwen3, TinyRope::Plain, "tiny-qwen3.gguf");
    matrix(&model.path, &model.name, model.vocab, &[33, 500]).await;
}

#[tokio::test]
async fn two_workers_answer_as_one_on_a_llama_with_scaled_positions() {
    let model = tiny::of(TinyArchitecture::Llama, TinyRope::Llama3, "tiny-llama3.gguf");
    matrix(&model.path, &model.name, model.vocab, &[33, 500]).await;
}

#[tokio::test]
async fn two_workers_answer_as_one_on_the_demo_model() {
    let model = files::demo_model().unwrap();
    matrix(&model, "SmolLM2-135M-Instruct", 49_152, &[33, 500]).await;
}

#[tokio::test]
async fn answers_do_not_depend_on_company() {
    let model = tiny::model(8);
    let running = start(&model.path, 1, 1, toml::Table::new()).await;
    let pair = running.cluster.client();
    let variants = variants();
    let requests: Vec<Value> = (0..8)
        .map(|index| {
            let prompt = json!(token_ids(index, 20 + 37 * index as usize, model.vocab));
            request(&model.name, &prompt, &variants[index as usize % variants.len()].1)
        })
        .collect();
    let mut alone = Vec::new();
    for request in &requests {
        alone.push(complete(pair, request, false).await);
    }
    let mut together = tokio::task::JoinSet::new();
    for (index, request) in requests.into_iter().enumerate() {
        together.spawn(async move { (index, complete(pair, &request, index % 2 == 0).await) });
    }
    while let Some(done) = together.join_next().await {
        let (index, outcome) = done.unwrap();
        assert_eq!(outcome, alone[index], "request {index}");
    }
    running.stop();
}

/// What two tokens more look like, greedily.
async fn two_tokens(client: Client, model: &str, prompt: &Value) -> [String; 2] {
    let one = json!({"max_tokens": 1, "temperature": 0, "ignore_eos": true});
    let two = json!({"max_tokens": 2, "temperature": 0, "ignore_eos": true});
    let one = complete(client, &request(model, prompt, &one), false).await.text;
    let two = complete(client, &request(model, prompt, &two), false).await.text;
    [one, two]
}

#[tokio::test]
async fn a_stop_string_across_tokens_1_and_2_ends_the_text_before_it() {
    let model = files::demo_model().unwrap();
    let running = start(&model, 1, 1, toml::Table::new()).await;
    let served = "SmolLM2-135M-Instruct";
    let prompt = json!("NVIDIA is a great company because");
    let [one, two] = two_tokens(running.cluster.client(), served, &prompt).await;
    let second = two.strip_prefix(&one).unwrap();
    let stop = format!("{}{}", &one[one.len() - 1..], &second[..2]);
    let variant = json!({"max_tokens": 8, "temperature": 0, "stop": [stop]});
    let outcome = agree(&running, "stop string", &request(served, &prompt, &variant)).await;
    assert_eq!(outcome.text, one[..one.len() - 1], "the text ends before `{stop}`");
    assert_eq!(outcome.finish, "stop");
    // A stop string inside the first token: the context answer already ends the text.
    let variant = json!({"max_tokens": 8, "temperature": 0, "stop": &one[1..]});
    let outcome = agree(&running, "early stop", &request(served, &prompt, &variant)).await;
    assert_eq!((outcome.text.as_str(), outcome.finish.as_str()), (&one[..1], "stop"));
    running.stop();
}

#[tokio::test]
async fn an_emoji_across_tokens_1_and_2_arrives_whole() {
    let model = files::demo_model().unwrap();
    let running = start(&model, 1, 1, toml::Table::new()).await;
    let served = "SmolLM2-135M-Instruct";
    let prompt = json!("Repeat: 😂😂😂😂😂😂😂😂");
    let [one, _] = two_tokens(running.cluster.client(), served, &prompt).await;
    assert_eq!(one, "\u{fffd}", "token 1 is part of a character");
    let variant = json!({"max_tokens": 8, "temperature": 0, "logprobs": 3});
    let outcome = agree(&running, "emoji", &request(served, &prompt, &variant)).await;
    assert!(outcome.text.starts_with('😂'), "{:?}", outcome.text);
    running.stop();
}

#[tokio::test]
async fn eos_as_first_token_ends_the_text_without_a_hand_over() {
    let model = files::demo_model().unwrap();
    let running = start(&model, 1, 1, toml::Table::new()).await;
    let prompt = json!("<|im_start|>user\nSay nothing.<|im_end|>\n<|im_start|>assistant\nNothing.");
    let served = "SmolLM2-135M-Instruct";
    let variant = json!({"max_tokens": 8, "temperature": 0});
    let outcome = agree(&running, "EOS", &request(served, &prompt, &variant)).await;
    assert_eq!((outcome.text.as_str(), outcome.finish.as_str()), ("", "stop"));
    assert_eq!(outcome.usage[1], 1, "EOS counts as a token");
    let generation = crate::support::metrics(&running.cluster.workers[1]).await;
    assert_eq!(generation.sum("baton_worker_handover_bytes_total", &[]), 0.0);
    running.stop();
}

#[tokio::test]
#[ignore = "long: `make test-long`"]
async fn two_workers_answer_as_one_at_every_length_around_block_borders() {
    for kv_heads in [4, 8] {
        let model = tiny::model(kv_heads);
        let lengths: Vec<usize> =
            (1..=130).chain([255, 256, 257, 1000, 1023, 1024, 1025, 3000, 4000]).collect();
        matrix(&model.path, &model.name, model.vocab, &lengths).await;
    }
}

#[tokio::test]
#[ignore = "long: `make test-long`"]
async fn two_workers_answer_as_one_on_long_prompts_of_the_demo_model() {
    let model = files::demo_model().unwrap();
    matrix(&model, "SmolLM2-135M-Instruct", 49_152, &[1, 31, 32, 64, 65, 1000, 2000]).await;
}
