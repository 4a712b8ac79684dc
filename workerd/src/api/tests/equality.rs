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

/// Token counts, but for what the prefix cache had: that depends on what was asked before.
fn counts(usage: &Value) -> Value {
    let mut usage = usage.clone();
    usage["prompt_tokens_details"]["cached_tokens"].take();
    usage
}

/// The parts of a whole answer, or of a stream's chunks put together.
fn outcome(choices: &[&Value], usage: &Value) -> Outcome {
    let mut all = Outcome {
        text: String::new(),
        finish: Value::Null,
        stop: Value::Null,
        logprobs: Vec::new(),
        usage: counts(usage),
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn usage_says_what_the_prefix_cache_had_and_salts_share_nothing() {
    let net = LocalNet::new();
    let (from, to) = (Running::start(&net).await, Running::start(&net).await);
    let prompt = "0123456789abcdefghij0123456789";
    let ask = |more: Value| with(completion(json!({"prompt": prompt, "max_tokens": 4})), more);
    let cached = |answer: &Value| answer["usage"]["prompt_tokens_details"]["cached_tokens"].clone();
    let mut id = 1 << 43;
    for salt in [Value::Null, json!("a"), json!("b")] {
        let request = ask(json!({"cache_salt": salt}));
        let first = from.post(PATHS[0], &request).await.json();
        let again = from.post(PATHS[0], &request).await.json();
        // All full blocks of four but that of the last token.
        assert_eq!((cached(&first), cached(&again)), (json!(0), json!(28)), "{salt}");
        assert_eq!(first["choices"], again["choices"]);
        id += 1;
        let context = from.post(PATHS[0], &super::context(&request, id)).await.json();
        assert_eq!(cached(&context), json!(28));
        // What the client is told is what the context worker found.
        let answer = to.post(PATHS[0], &follow_up(&request, &context)).await.json();
        assert_eq!((cached(&answer), &answer["choices"]), (json!(28), &first["choices"]));
    }
    let pulled = to.worker.engine.status().totals;
    assert_eq!((pulled.prompt_pulled, pulled.prompt_prefix), (90, 0));
    // The generation worker has the beginning now: only the rest is fetched.
    let longer = ask(json!({"prompt": format!("{prompt}klm")}));
    let one = from.post(PATHS[0], &longer).await.json();
    let context = from.post(PATHS[0], &super::context(&longer, id + 1)).await.json();
    let two = to.post(PATHS[0], &follow_up(&longer, &context)).await.json();
    assert_eq!(one["choices"], two["choices"]);
    let after = to.worker.engine.status().totals;
    assert_eq!((after.prompt_pulled - 90, after.prompt_prefix), (5, 28));
    let block = to.worker.limits.block_tokens;
    let bytes = (after.pulled_bytes - pulled.pulled_bytes) / (pulled.pulled_bytes / 24);
    assert_eq!(bytes, 2, "of nine blocks of {block}");
    let error = from.post(PATHS[0], &ask(json!({"cache_salt": " "}))).await;
    assert_eq!((error.status, error.json()["error"]["param"].clone()), (400, json!("cache_salt")));
    // A record of one salt is no record of another.
    let context =
        from.post(PATHS[0], &super::context(&ask(json!({"cache_salt": "a"})), id + 2)).await;
    let stolen = follow_up(&ask(json!({"cache_salt": "b"})), &context.json());
    assert_eq!(to.post(PATHS[0], &stolen).await.json()["error"]["code"], "kv_state_invalid");
    from.worker.engine.release(baton_shared::id::DisaggRequestId(id + 2));
    from.until_all_free().await;
    to.until_all_free().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_enters_the_prefix_cache_and_what_steps_did_can_be_asked_for_once() {
    let worker = Running::start(&LocalNet::new()).await;
    let request = completion(json!({"prompt": "0123456789", "max_tokens": 3, "temperature": 0}));
    worker.post(PATHS[0], &request).await;
    worker.until_all_free().await;
    let events = worker.send("POST", "/kv_cache_events", Vec::new(), &[]).await.json();
    let kinds: Vec<_> = events.as_array().unwrap().iter().map(|event| &event["data"]).collect();
    assert_eq!(kinds[0]["type"], "created");
    assert_eq!(kinds[0]["num_blocks_per_cache_level"], json!([BLOCKS, 0]));
    let stored: Vec<u64> = kinds[1..]
        .iter()
        .flat_map(|data| data["blocks"].as_array().unwrap())
        .flat_map(|block| block["tokens"].as_array().unwrap())
        .map(|token| token["token_id"].as_u64().unwrap())
        .collect();
    // Two blocks of the prompt, and one it fills with the answer.
    assert_eq!(stored[..10], b"0123456789".map(u64::from));
    assert_eq!(stored.len(), 12);
    assert_eq!(worker.get("/kv_cache_events").await.json(), json!([]));
    let steps = worker.get("/metrics").await.json();
    let steps = steps.as_array().unwrap().clone();
    assert_eq!(steps.len(), 3, "{steps:?}");
    let [prefill, decode, _] = &steps[..] else { panic!("three steps") };
    let (first, second) = (&prefill["inflightBatchingStats"], &decode["inflightBatchingStats"]);
    assert_eq!((&first["numContextRequests"], &first["numCtxTokens"]), (&json!(1), &json!(10)));
    assert_eq!((&second["numContextRequests"], &second["numGenRequests"]), (&json!(0), &json!(1)));
    assert_eq!((&prefill["numNewActiveRequests"], &prefill["iter"]), (&json!(1), &json!(1)));
    assert_eq!(prefill["kvCacheStats"]["missedBlocks"], 2);
    assert_eq!(worker.get("/metrics").await.json(), json!([]));
    // Asked again, the same blocks are found: nothing enters.
    worker.post(PATHS[0], &request).await;
    let steps = worker.get("/metrics").await.json();
    assert_eq!(steps[0]["kvCacheStats"]["reusedBlocks"], 2);
    assert_eq!(steps[0]["inflightBatchingStats"]["numCtxTokens"], 2);
    assert_eq!(worker.get("/kv_cache_events").await.json(), json!([]));
}
