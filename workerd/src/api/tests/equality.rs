//! One worker, two workers, whole or streamed: the same answer.

use serde_json::{Value, json};

use super::*;

const PATHS: [&str; 2] = ["/v1/completions", "/v1/chat/completions"];

/// What a client can tell two answers apart by.
#[derive(Debug, PartialEq)]
struct Outcome {
    text: String,
    finish: Value,
    stop: Value,
    logprobs: Vec<Value>,
    usage: Value,
}

fn request(path: &str, more: &Value) -> Value {
    let body = if path == PATHS[0] {
        completion(json!({}))
    } else {
        json!({"model": "M", "messages": [{"role": "user", "content": "hello"}], "seed": 5})
    };
    with(body, more.clone())
}

/// The parts of a whole answer, or of a stream's chunks put together.
fn outcome(choices: &[&Value], usage: &Value) -> Outcome {
    let mut all = Outcome {
        text: String::new(),
        finish: Value::Null,
        stop: Value::Null,
        logprobs: Vec::new(),
        usage: usage.clone(),
    };
    for choice in choices {
        assert!(all.finish.is_null(), "nothing follows the end: {choice}");
        let place = [&choice["text"], &choice["message"]["content"], &choice["delta"]["content"]];
        all.text.extend(place.iter().filter_map(|text| text.as_str()));
        all.finish = choice["finish_reason"].clone();
        all.stop = choice.get("stop_reason").cloned().unwrap_or_default();
        let logprobs = &choice["logprobs"];
        if let Some(content) = logprobs["content"].as_array() {
            all.logprobs.extend(content.iter().cloned());
        }
        for index in 0..logprobs["tokens"].as_array().map_or(0, Vec::len) {
            let entry = |name: &str| logprobs[name][index].clone();
            let names = ["tokens", "token_logprobs", "top_logprobs", "text_offset"];
            all.logprobs.push(names.map(entry).into());
        }
    }
    all
}

async fn whole(worker: &Running, path: &str, request: &Value) -> Outcome {
    let answer = worker.post(path, request).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let answer = answer.json();
    outcome(&[&answer["choices"][0]], &answer["usage"])
}

async fn streamed(worker: &Running, path: &str, request: &Value) -> Outcome {
    let more = json!({"stream": true, "stream_options": {"include_usage": true}});
    let answer = worker.post(path, &with(request.clone(), more)).await;
    let mut events = answer.events();
    let last = events.pop().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert!(events.iter().all(|event| event["id"] == last["id"]));
    let choices: Vec<_> = events.iter().map(|event| &event["choices"][0]).collect();
    if path == PATHS[1] {
        assert_eq!(choices[0]["delta"], json!({"role": "assistant", "content": ""}));
    }
    outcome(&choices, &last["usage"])
}

/// As a router does it; an early stop is the context worker's answer.
async fn handed_over(
    from: &Running,
    to: &Running,
    path: &str,
    request: &Value,
    id: u64,
    stream: bool,
) -> Outcome {
    let answer = from.post(path, &context(request, id)).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let answer = answer.json();
    let choice = &answer["choices"][0];
    assert_eq!(choice["disaggregated_params"]["disagg_request_id"], json!(id));
    if choice["finish_reason"] != "length" {
        return outcome(&[choice], &answer["usage"]);
    }
    let request = follow_up(request, &answer);
    if stream { streamed(to, path, &request).await } else { whole(to, path, &request).await }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_workers_answer_as_one_does() {
    let net = LocalNet::new();
    let (from, to) = (Running::start(&net).await, Running::start(&net).await);
    let mut id = 1 << 41;
    for path in PATHS {
        let scores = if path == PATHS[0] {
            json!({"logprobs": 3})
        } else {
            json!({"logprobs": true, "top_logprobs": 3})
        };
        for more in [
            json!({"temperature": 0, "max_tokens": 20}),
            json!({"max_tokens": 24, "ignore_eos": true}),
            json!({"max_tokens": 1}),
            json!({"max_tokens": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.01}),
            json!({"max_tokens": 12, "frequency_penalty": 1.5, "presence_penalty": 0.5,
                "repetition_penalty": 1.3, "temperature": 0.8}),
        ] {
            for request in [request(path, &more), with(request(path, &more), scores.clone())] {
                let one = whole(&to, path, &request).await;
                assert_eq!(streamed(&to, path, &request).await, one, "{request}");
                for stream in [false, true] {
                    id += 1;
                    let two = handed_over(&from, &to, path, &request, id, stream).await;
                    assert_eq!(two, one, "{request}");
                }
            }
        }
    }
    for worker in [&from, &to] {
        worker.until_all_free().await;
    }
    let computed = to.worker.engine.status().totals.prompt_pulled;
    assert!(computed > 0, "blocks were fetched");
    assert_eq!(from.stop().await, EngineEnd::Drained);
    assert_eq!(to.stop().await, EngineEnd::Drained);
}

/// The text of twenty tokens, as bytes where it is no text.
async fn tokens(worker: &Running, request: &Value) -> Vec<Vec<u8>> {
    let more = json!({"messages": [{"role": "user", "content": "hello"}], "logprobs": true});
    let request = with(request.clone(), more);
    let answer = worker.post(PATHS[1], &request).await.json();
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    content.iter().map(|entry| serde_json::from_value(entry["bytes"].clone()).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stop_strings_and_ends_meet_the_boundary_between_two_workers() {
    let net = LocalNet::new();
    let (from, to) = (Running::start(&net).await, Running::start(&net).await);
    let mut id = 1 << 42;
    let mut seen = [0; 3];
    // Many seeds, so that first and second tokens are letters now and then.
    for seed in 0..200 {
        let base = json!({"model": "M", "seed": seed, "max_tokens": 6});
        let tokens = tokens(&to, &base).await;
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).ok().filter(|t| t.is_ascii());
        let chat = request(PATHS[1], &json!({"seed": seed, "max_tokens": 6}));
        let mut stops = Vec::new();
        if let Some(first) = text(&tokens[0]).filter(|text| text != "<end>") {
            stops.push((0, json!({"stop": first})));
            stops.push((0, json!({"stop_token_ids": [tokens[0][0]]})));
            if let Some(second) = tokens.get(1).and_then(|t| text(t)).filter(|t| t != "<end>") {
                stops.push((1, json!({"stop": [format!("{first}{second}"), "never"]})));
            }
        } else if tokens[0] == b"<end>" {
            stops.push((2, json!({})));
        }
        for (kind, more) in stops.into_iter().take(if seed < 40 { 3 } else { 1 }) {
            if kind < 2 && seed >= 40 {
                continue;
            }
            seen[kind] += 1;
            let request = with(chat.clone(), more);
            let one = whole(&to, PATHS[1], &request).await;
            assert_eq!((one.finish.as_str(), one.text.as_str()), (Some("stop"), ""), "{request}");
            assert_eq!(streamed(&to, PATHS[1], &request).await, one);
            id += 1;
            assert_eq!(handed_over(&from, &to, PATHS[1], &request, id, true).await, one);
        }
    }
    assert!(seen[0] > 0 && seen[1] > 0, "{seen:?}");
    for worker in [&from, &to] {
        worker.until_all_free().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_context_answer_has_what_a_router_needs() {
    let net = LocalNet::new();
    let worker = Running::start(&net).await;
    let request = context(&completion(json!({"logprobs": 2, "max_tokens": 8})), 1 << 41);
    let answer = worker.post(PATHS[0], &request).await.json();
    assert_eq!(answer["prompt_token_ids"], json!(b"hello world"));
    assert_eq!(answer["usage"]["completion_tokens"], 1);
    let params = answer["choices"][0]["disaggregated_params"].as_object().unwrap();
    assert_eq!(params.len(), 14, "every field, nulls included: {params:?}");
    assert_eq!(params["ctx_request_id"], json!(1u64 << 41));
    assert_eq!(params["first_gen_tokens"].as_array().unwrap().len(), 1);
    assert_eq!(params["first_gen_log_probs"][0].as_array().unwrap().len(), 3);
    assert_eq!(params["schedule_style"], 0);
    worker.until("a lease is held", |status| status.leases == 1).await;
    let release = json!({"disagg_request_id": 1u64 << 41});
    assert_eq!(worker.post("/v1/disagg/release", &release).await.status, 200);
    worker.until_all_free().await;
    let more = json!({"disaggregated_params": {"request_type": "context_only",
        "return_prompt_token_ids_b64": true}});
    let chat = with(super::equality::request(PATHS[1], &json!({})), more);
    let answer = worker.post(PATHS[1], &chat).await.json();
    assert!(answer["prompt_token_ids_b64"].is_string() && answer.get("prompt_token_ids").is_none());
    let minted = answer["choices"][0]["disaggregated_params"]["disagg_request_id"].as_u64();
    assert!(minted.unwrap() >= 1 << 40);
}
