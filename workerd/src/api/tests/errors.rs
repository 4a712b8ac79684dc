//! What cannot be answered says so, in OpenAI's shape and with the right status.

use baton_shared::wire::auth::{DISAGG_HEADER, RELEASE_HEADER};

use super::*;

const PATH: &str = "/v1/completions";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_requests_name_what_is_wrong() {
    let worker = Running::start(&LocalNet::new()).await;
    for (body, status, code, param) in [
        (json!({"prompt": "a"}), 400, "invalid_request", "model"),
        (json!({"model": "M"}), 400, "invalid_request", "prompt"),
        (completion(json!({"prompt": ""})), 400, "invalid_request", "prompt"),
        (completion(json!({"prompt": []})), 400, "invalid_request", "prompt"),
        (completion(json!({"prompt": [999]})), 400, "invalid_request", "prompt"),
        (completion(json!({"prompt": ["a", "b"]})), 400, "invalid_request", "prompt"),
        (completion(json!({"n": 2})), 400, "invalid_request", "n"),
        (completion(json!({"temperature": "hot"})), 400, "invalid_request", "temperature"),
        (completion(json!({"stop_token_ids": [999]})), 400, "invalid_request", "stop_token_ids"),
        (completion(json!({"prompt": "x".repeat(200)})), 400, "context_length_exceeded", "prompt"),
        (completion(json!({"max_tokens": 190})), 400, "context_length_exceeded", "max_tokens"),
        (completion(json!({"model": "other"})), 404, "model_not_found", "model"),
    ] {
        let answer = worker.post(PATH, &body).await;
        assert_eq!(answer.error(), (status, code.to_owned()), "{body}");
        let answer = answer.json();
        assert_eq!(answer["error"]["param"], param, "{answer}");
        assert_eq!(answer["error"]["type"], "invalid_request_error");
    }
    let broken = worker.send("POST", PATH, b"{\"model\":".to_vec(), &[]).await;
    assert_eq!(broken.error(), (400, "invalid_request".to_owned()));
    let headers = [("content-encoding", "gzip")];
    let packed = worker.send("POST", PATH, b"x".to_vec(), &headers).await;
    assert_eq!(packed.error(), (415, "unsupported_encoding".to_owned()));
    let headers = [("x-trtllm-msgpack", "1")];
    let packed = worker.send("POST", PATH, b"x".to_vec(), &headers).await;
    assert_eq!(packed.error(), (415, "unsupported_encoding".to_owned()));
    assert_eq!(worker.get("/nowhere").await.error(), (404, "not_found".to_owned()));
    assert_eq!(worker.get(PATH).await.error(), (405, "method_not_allowed".to_owned()));
    worker.until_all_free().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_bodies_are_read_and_too_long_ones_refused() {
    let worker = Running::start(&LocalNet::new()).await;
    let long = completion(json!({"max_tokens": 2, "user": "x".repeat(1 << 20)}));
    assert_eq!(worker.post(PATH, &long).await.status, 200);
    let answer = worker.send("POST", PATH, vec![b' '; (32 << 20) + 1], &[]).await;
    assert_eq!(answer.error(), (413, "body_too_large".to_owned()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_describes_itself_and_hides_how_its_memory_is_reached() {
    let worker = Running::start(&LocalNet::new()).await;
    assert_eq!(worker.get("/health").await.status, 200);
    assert_eq!(worker.get("/v1/models").await.json()["data"][0]["id"], "M");
    assert!(worker.get("/version").await.json()["version"].is_string());
    let info = worker.get("/server_info").await;
    assert_eq!(info.json()["baton"]["incarnation"], worker.worker.incarnation.to_string());
    assert_eq!(info.json()["tokens_per_block"], BLOCK_TOKENS);
    assert!(!info.body.contains("serve"), "no agent: {}", info.body);
    let metrics = worker.get("/prometheus/metrics").await.body;
    assert!(metrics.contains(&format!("baton_worker_kv_blocks{{state=\"free\"}} {BLOCKS}")));
    let events = worker.post("/kv_cache_events", &json!({})).await.json();
    assert_eq!(
        (events.as_array().map(Vec::len), &events[0]["data"]["type"]),
        (Some(1), &json!("created"))
    );
    worker.post(PATH, &completion(json!({"max_tokens": 3}))).await;
    let steps = worker.get("/metrics").await.json();
    assert!(steps[0]["iter"].as_u64().unwrap() > 0);
    let metrics = worker.get("/prometheus/metrics").await.body;
    let counted =
        "baton_worker_requests_total{endpoint=\"completions\",phase=\"whole\",outcome=\"ok\"} 1";
    assert!(metrics.contains(counted), "{metrics}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_of_others_are_refused_and_the_right_one_still_works() {
    let net = LocalNet::new();
    let (from, to) = (Running::start(&net).await, Running::start(&net).await);
    let shape = Shape { fingerprint: [2; 32], ..Shape::default() };
    let other = Running::shaped(&net, shape).await;
    let request = completion(json!({"max_tokens": 8, "ignore_eos": true}));
    let answer = from.post(PATH, &context(&request, 1 << 41)).await.json();
    let good = follow_up(&request, &answer);
    let changed = |path: &[&str], value: Value| {
        let mut request = good.clone();
        *path.iter().fold(&mut request, |part, name| &mut part[*name]) = value;
        request
    };
    let state = good["disaggregated_params"]["encoded_opaque_state"].as_str().unwrap();
    let invalid = (400, "kv_state_invalid".to_owned());
    for request in [
        changed(&["disaggregated_params", "encoded_opaque_state"], Value::Null),
        changed(&["disaggregated_params", "encoded_opaque_state"], json!("x")),
        changed(&["disaggregated_params", "encoded_opaque_state"], json!(state[4..])),
        changed(&["disaggregated_params", "disagg_request_id"], json!(1)),
        changed(&["disaggregated_params", "first_gen_tokens"], json!([999])),
        changed(&["disaggregated_params", "first_gen_tokens"], json!([])),
        changed(&["prompt"], json!([1, 2, 3])),
    ] {
        assert_eq!(to.post(PATH, &request).await.error(), invalid, "{request}");
    }
    let incompatible = other.post(PATH, &good).await;
    assert_eq!(incompatible.error(), (409, "kv_incompatible".to_owned()));
    assert!(incompatible.body.contains(&from.worker.address));
    assert_eq!(to.post(PATH, &good).await.status, 200);
    from.until("the lease has ended", |status| status.leases == 0).await;
    assert_eq!(to.post(PATH, &good).await.error(), (503, "kv_lease_gone".to_owned()));
    for worker in [&from, &to, &other] {
        worker.until_all_free().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_of_a_worker_that_is_gone_are_not_fetched() {
    let net = LocalNet::new();
    let (mut from, to) = (Running::start(&net).await, Running::start(&net).await);
    let request = completion(json!({"max_tokens": 8, "ignore_eos": true}));
    let answer = from.post(PATH, &context(&request, 1 << 41)).await.json();
    from.shutdown.take();
    from.ended.abort();
    drop(from.ended.await);
    let answer = to.post(PATH, &follow_up(&request, &answer)).await;
    assert_eq!(answer.error(), (503, "kv_peer_unreachable".to_owned()));
    to.until_all_free().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_a_key_peers_must_show_theirs() {
    let net = LocalNet::new();
    let keys = Keys::single("0123456789abcdef");
    let shape = Shape { keys: keys.clone(), ..Shape::default() };
    let worker = Running::shaped(&net, shape).await;
    let request = completion(json!({"max_tokens": 4, "ignore_eos": true}));
    let answer = worker.post(PATH, &context(&request, 1 << 41)).await.json();
    let follow = follow_up(&request, &answer);
    let unauthorized = (401, "unauthorized".to_owned());
    assert_eq!(worker.post(PATH, &follow).await.error(), unauthorized);
    let release = json!({"disagg_request_id": 1}).to_string();
    let path = "/v1/disagg/release";
    let refused = worker.send("POST", path, release.clone().into_bytes(), &[]).await;
    assert_eq!(refused.error(), unauthorized);
    let header = keys.sign_release(release.as_bytes());
    let headers = [(RELEASE_HEADER, header.as_str())];
    assert_eq!(worker.send("POST", path, release.into_bytes(), &headers).await.status, 200);
    let state = follow["disaggregated_params"]["encoded_opaque_state"].as_str();
    let header = keys.sign_disagg(None, state).unwrap();
    let headers = [(DISAGG_HEADER, header.as_str())];
    let answer = worker.send("POST", PATH, follow.to_string().into_bytes(), &headers).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    worker.until_all_free().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_device_answers_everybody_and_ends_the_worker() {
    let worker = Running::start(&LocalNet::new()).await;
    worker.script.fail_at(3);
    let request = completion(json!({"max_tokens": 50, "ignore_eos": true}));
    let answer = worker.post(PATH, &request).await;
    assert_eq!(answer.error(), (500, "internal_error".to_owned()));
    let end = tokio::time::timeout(PATIENCE, worker.ended).await.unwrap().unwrap();
    assert!(matches!(end, EngineEnd::Failed(_)), "{end:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failure_within_a_stream_is_an_event_and_there_is_no_done() {
    let worker = Running::start(&LocalNet::new()).await;
    worker.script.fail_at(5);
    let more = json!({"max_tokens": 50, "ignore_eos": true, "stream": true, "prompt": [65]});
    let answer = worker.post(PATH, &completion(more)).await;
    assert_eq!(answer.status, 200);
    assert!(!answer.body.contains("[DONE]"), "{}", answer.body);
    let last = answer.body.trim_end().rsplit("\n\n").next().unwrap();
    assert!(last.starts_with("data: {\"error\":{"), "{last}");
}
