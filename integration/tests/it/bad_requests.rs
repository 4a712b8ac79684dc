//! Requests that a worker cannot serve are refused with a clear error, through the router too, and leave nothing.

use std::time::Duration;

use baton_integration::tiny_model::{MISTRAL_WINDOW, TinyArchitecture, TinyRope};
use serde_json::{Value, json};
use toml::toml;

use crate::support::{all_free, complete, start, token_ids};
use crate::tiny;

#[tokio::test]
async fn what_cannot_be_served_is_a_4xx_that_names_the_member() {
    let model = tiny::model(4);
    // 64 blocks of 32 tokens; 2 x 3 layers x 4 heads x 16 elements x 2 bytes x 32 tokens each.
    let running = start(
        &model.path,
        1,
        1,
        toml! { [kv]
        pool = "1536KiB" },
    )
    .await;
    let client = running.cluster.client();
    let base = json!({"model": model.name, "prompt": "hello", "max_tokens": 2});
    let with = |key: &str, value: Value| {
        let mut request = base.clone();
        request[key] = value;
        request
    };
    let long = |count| json!(token_ids(1, count, model.vocab));
    for (request, status, code, param) in [
        (with("prompt", json!("")), 400, "invalid_request", Some("prompt")),
        (with("prompt", json!([])), 400, "invalid_request", Some("prompt")),
        (with("prompt", json!(["a", "b"])), 400, "invalid_request", Some("prompt")),
        (with("prompt", json!({"a": 1})), 400, "invalid_request", Some("prompt")),
        (with("prompt", json!([1, 2, 1_000_000])), 400, "invalid_request", Some("prompt")),
        (with("prompt", long(5000)), 400, "context_length_exceeded", Some("prompt")),
        (with("prompt", long(3000)), 400, "context_length_exceeded", Some("prompt")),
        (with("max_tokens", json!(0)), 400, "invalid_request", Some("max_tokens")),
        (with("max_tokens", json!("many")), 400, "invalid_request", Some("max_tokens")),
        (with("temperature", json!(-1)), 400, "invalid_request", Some("temperature")),
        (with("top_p", json!(0)), 400, "invalid_request", Some("top_p")),
        (with("n", json!(2)), 400, "invalid_request", Some("n")),
        (with("best_of", json!(2)), 400, "invalid_request", Some("best_of")),
        (with("stop", json!(7)), 400, "invalid_request", Some("stop")),
        (with("logprobs", json!(1000)), 400, "invalid_request", Some("logprobs")),
        (with("model", json!("other")), 404, "model_not_found", Some("model")),
    ] {
        for client in [client, running.cluster.workers[1].client()] {
            let answer = client.post("/v1/completions", &request).await.unwrap();
            let body = String::from_utf8_lossy(&answer.body).into_owned();
            let short: String = request.to_string().chars().take(120).collect();
            assert_eq!(answer.status, status, "{short}: {body}");
            assert_eq!(answer.error_code().unwrap(), code, "{short}: {body}");
            assert_eq!(answer.json().unwrap()["error"]["param"].as_str(), param, "{short}: {body}");
        }
    }
    let unknown = with("a_member_of_tomorrow", json!({"x": [1, 2]}));
    assert_eq!(complete(client, &unknown, false).await.usage[1], 2, "unknown members are ignored");
    all_free(&running.cluster, Duration::from_secs(2)).await;
    running.stop();
}

#[tokio::test]
async fn a_text_longer_than_a_models_window_is_refused_and_one_that_fills_it_is_served() {
    let model = tiny::of(TinyArchitecture::Mistral, TinyRope::Plain, "tiny-mistral");
    let running = start(&model.path, 1, 1, toml::Table::new()).await;
    let ask = |length: usize| {
        let prompt = token_ids(1, length, model.vocab);
        json!({"model": model.name, "prompt": prompt, "max_tokens": 2, "ignore_eos": true})
    };
    let window = MISTRAL_WINDOW as usize;
    let client = running.cluster.client();
    assert_eq!(complete(client, &ask(window - 2), false).await.usage[1], 2);
    let answer = client.post("/v1/completions", &ask(window + 1)).await.unwrap();
    assert_eq!(answer.status, 400);
    assert_eq!(answer.error_code().unwrap(), "context_length_exceeded");
    let body = String::from_utf8_lossy(&answer.body).into_owned();
    assert!(body.contains(&format!("at most {}", window - 1)), "{body}");
    running.stop();
}
