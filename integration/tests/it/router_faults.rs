//! What the router does when workers misbehave, by the table of the hand-over protocol.

use std::time::Duration;

use baton_integration::eventually::eventually;
use baton_integration::mock_worker::{Behaviour, MockWorker};
use baton_integration::scrape::Metrics;
use serde_json::{Value, json};
use toml::{Table, toml};

use crate::scripted::{Scene, ask, refusal, scene, text};
use crate::support::STOP;

#[tokio::test]
async fn both_hops_carry_what_the_protocol_says() {
    let scene = scene(1, 1, Table::new()).await;
    let mut request = ask();
    request["disaggregated_params"] =
        json!({"request_type": "generation_only", "ctx_request_id": 1});
    request["stream"] = json!(true);
    let events =
        scene.client().stream("/v1/completions", &request).await.unwrap().events().await.unwrap();
    let text: String =
        events.iter().map(|one| one["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(text, "A 0 1 2 3");
    let context = scene.contexts[0].requests().pop().unwrap();
    assert_eq!(
        context.param("request_type"),
        "context_only",
        "a client's own params never reach a worker"
    );
    assert_eq!(
        (&context.body["stream"], &context.body["stream_options"]),
        (&json!(false), &Value::Null)
    );
    assert_eq!(
        (&context.body["prompt"], &context.body["user"]),
        (&json!("hello"), &json!("someone"))
    );
    let id = context.param("disagg_request_id").as_u64().unwrap();
    assert!(id >= 1 << 40);
    let generation = scene.generations[0].requests().pop().unwrap();
    assert_eq!(generation.param("request_type"), "generation_only");
    assert_eq!(generation.param("disagg_request_id"), id);
    assert_eq!(generation.param("first_gen_tokens"), &json!([65]));
    assert_eq!(generation.param("ctx_usage")["prompt_tokens"], 3);
    assert_eq!(
        (&generation.body["prompt"], &generation.body["stream"]),
        (&json!([1, 2, 3]), &json!(true))
    );
    assert_eq!(context.headers["x-request-id"], generation.headers["x-request-id"]);
    let trace = |seen: &baton_integration::mock_worker::Seen| {
        seen.headers["traceparent"].to_str().unwrap()[..35].to_owned()
    };
    assert_eq!(trace(&context), trace(&generation), "one trace through both hops");
    assert!(scene.contexts[0].released().is_empty(), "a pulled lease needs no release");
    scene.stop();
}

#[tokio::test]
async fn chat_keeps_its_messages_and_gains_the_prompt_ids() {
    let scene = scene(1, 1, Table::new()).await;
    let messages = json!([{"role": "user", "content": "hi \"there\" \\ 😀"}]);
    let request = json!({"model": "mock", "messages": messages, "max_tokens": 5});
    let answer = scene.client().post("/v1/chat/completions", &request).await.unwrap().ok().unwrap();
    assert_eq!(answer["choices"][0]["message"]["content"], "A 0 1 2 3");
    let generation = scene.generations[0].requests().pop().unwrap();
    assert_eq!(generation.body["messages"], messages);
    assert_eq!(generation.body["prompt_token_ids"], json!([1, 2, 3]));
    scene.stop();
}

#[tokio::test]
async fn a_context_server_that_fails_is_replaced_and_gets_a_new_id() {
    let scene = scene(2, 1, Table::new()).await;
    for fault in [Behaviour::Close, refusal(500, "internal_error"), refusal(503, "pool_exhausted")]
    {
        scene.contexts[0].behave(fault);
        for _ in 0..4 {
            assert_eq!(text(scene.client()).await, "A 0 1 2 3");
        }
        scene.contexts[0].behave(Behaviour::Serve);
    }
    let mut ids: Vec<u64> = scene
        .contexts
        .iter()
        .flat_map(MockWorker::requests)
        .map(|seen| seen.param("disagg_request_id").as_u64().unwrap())
        .collect();
    let count = ids.len();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), count, "a fresh id for every send");
    scene.stop();
}

#[tokio::test]
async fn a_full_generation_server_leaves_the_record_to_another() {
    let scene = scene(1, 2, Table::new()).await;
    scene.generations[0].behave(refusal(503, "pool_exhausted"));
    for _ in 0..4 {
        assert_eq!(text(scene.client()).await, "A 0 1 2 3");
    }
    assert_eq!(scene.contexts[0].requests().len(), 4, "no second context pass");
    assert!(scene.contexts[0].released().is_empty());
    scene.stop();
}

#[tokio::test]
async fn a_lost_lease_is_computed_again_and_the_old_one_released() {
    let scene = scene(2, 2, Table::new()).await;
    scene.generations[0].behave(refusal(503, "kv_lease_gone"));
    scene.generations[1].behave(refusal(503, "kv_peer_unreachable"));
    let answer = scene.client().post("/v1/completions", &ask()).await.unwrap();
    assert_eq!(answer.status, 502);
    let passes: usize = scene.contexts.iter().map(|one| one.requests().len()).sum();
    assert_eq!(passes, 3, "at most `attempts` context passes");
    eventually(Duration::from_secs(2), "every record left behind is released", || async {
        let released: usize = scene.contexts.iter().map(|one| one.released().len()).sum();
        (released == 3).then_some(())
    })
    .await;
    scene.stop();
}

#[tokio::test]
async fn a_deployment_mistake_is_a_502_with_the_workers_words() {
    let scene = scene(2, 2, Table::new()).await;
    for (passes, (status, code)) in
        [(409, "kv_incompatible"), (400, "kv_state_invalid"), (401, "unauthorized")]
            .into_iter()
            .enumerate()
    {
        scene.generations.iter().for_each(|one| one.behave(refusal(status, code)));
        let answer = scene.client().post("/v1/completions", &ask()).await.unwrap();
        assert_eq!(answer.status, 502, "{code}");
        assert!(String::from_utf8_lossy(&answer.body).contains("scripted"), "{code}");
        let seen: usize = scene.contexts.iter().map(|one| one.requests().len()).sum();
        assert_eq!(seen, passes + 1, "nothing is repeated: {code}");
        eventually(Duration::from_secs(2), "the record left behind is released", || async {
            let released: usize = scene.contexts.iter().map(|one| one.released().len()).sum();
            (released == seen).then_some(())
        })
        .await;
    }
    scene.stop();
}

#[tokio::test]
async fn a_workers_4xx_reaches_the_client_unchanged() {
    let scene = scene(2, 1, Table::new()).await;
    let body = json!({"object": "error", "message": "bad temperature", "code": 400});
    scene.contexts.iter().for_each(|one| one.behave(Behaviour::Refuse(400, body.clone())));
    let answer = scene.client().post("/v1/completions", &ask()).await.unwrap();
    assert_eq!((answer.status, answer.json().unwrap()), (400, body));
    scene.stop();
}

#[tokio::test]
async fn an_early_stop_is_answered_from_the_context_answer() {
    let scene = scene(1, 1, Table::new()).await;
    scene.contexts[0].behave(Behaviour::EarlyStop);
    let answer = scene.client().post("/v1/completions", &ask()).await.unwrap().ok().unwrap();
    assert_eq!(answer["choices"][0]["text"], "A");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert!(answer["choices"][0].get("disaggregated_params").is_none(), "{answer}");
    assert!(answer.get("prompt_token_ids").is_none(), "{answer}");
    let chat = json!({"model": "mock", "messages": [{"role": "user", "content": "x"}], "stream": true,
        "stream_options": {"include_usage": true}});
    let events =
        scene.client().stream("/v1/chat/completions", &chat).await.unwrap().events().await.unwrap();
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    let text: String =
        events.iter().filter_map(|one| one["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, "A");
    assert!(events.iter().any(|one| one["choices"][0]["finish_reason"] == "stop"));
    assert_eq!(events.last().unwrap()["usage"]["completion_tokens"], 1);
    assert!(scene.generations[0].requests().is_empty());
    scene.stop();
}

#[tokio::test]
async fn a_stream_that_breaks_ends_with_an_error_event_and_without_done() {
    let scene = scene(1, 1, Table::new()).await;
    scene.generations[0].behave(Behaviour::BreakAfter(2));
    let mut request = ask();
    request["stream"] = json!(true);
    let mut stream = scene.client().stream("/v1/completions", &request).await.unwrap();
    let mut events = Vec::new();
    let broken = loop {
        match stream.event().await {
            Ok(Some(event)) => events.push(event),
            Ok(None) => break false,
            Err(_) => break true,
        }
    };
    assert!(broken, "the framing must not end well: {events:?}");
    assert!(!events.iter().any(|event| event == "[DONE]"), "{events:?}");
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "generation_aborted");
    scene.stop();
}

#[tokio::test]
async fn a_client_that_leaves_cancels_the_worker_and_releases_the_lease() {
    let scene = scene(1, 1, Table::new()).await;
    // In the context hop.
    scene.contexts[0].behave(Behaviour::Hang);
    let left = tokio::time::timeout(
        Duration::from_millis(200),
        scene.client().post("/v1/completions", &ask()),
    )
    .await;
    assert!(left.is_err());
    eventually(Duration::from_secs(2), "the context request is cancelled", || async {
        (scene.contexts[0].cancelled() == 1).then_some(())
    })
    .await;
    // Before the first token of the generation hop.
    scene.contexts[0].behave(Behaviour::Serve);
    scene.generations[0].behave(Behaviour::Hang);
    let left = tokio::time::timeout(
        Duration::from_millis(200),
        scene.client().post("/v1/completions", &ask()),
    )
    .await;
    assert!(left.is_err());
    eventually(Duration::from_secs(2), "the generation request is cancelled", || async {
        (scene.generations[0].cancelled() == 1).then_some(())
    })
    .await;
    eventually(Duration::from_secs(2), "the leases are released", || async {
        (!scene.contexts[0].released().is_empty()).then_some(())
    })
    .await;
    // In mid-stream.
    scene.generations[0].behave(Behaviour::Pace(Duration::from_secs(5)));
    let mut request = ask();
    request["stream"] = json!(true);
    let mut stream = scene.client().stream("/v1/completions", &request).await.unwrap();
    stream.event().await.unwrap().unwrap();
    drop(stream);
    eventually(Duration::from_secs(2), "the stream is cancelled", || async {
        (scene.generations[0].cancelled() == 2).then_some(())
    })
    .await;
    scene.stop();
}

#[tokio::test]
async fn without_usable_workers_it_says_so_in_time_and_recovers() {
    let scene = scene(1, 1, Table::new()).await;
    let Scene { contexts, generations, mut router, admin, folder: _folder, .. } = scene;
    drop(contexts);
    let answer = router.client().post("/v1/completions", &ask()).await.unwrap();
    assert!([502, 503].contains(&answer.status), "{}", answer.status);
    eventually(Duration::from_secs(3), "health says no", || async {
        (router.client().get("/health").await.unwrap().status == 503).then_some(())
    })
    .await;
    let answer = router.client().post("/v1/completions", &ask()).await.unwrap();
    assert_eq!((answer.status, answer.error_code().unwrap()), (503, "no_workers".into()));
    assert!(answer.headers.contains_key("retry-after"));
    let metrics = Metrics::of(admin, "/metrics").await.unwrap();
    assert!(metrics.sum("baton_router_hops_total", &[("role", "context")]) >= 1.0);
    drop(generations);
    router.stop(STOP).unwrap();
}

#[tokio::test]
async fn wrong_requests_are_refused_by_the_router_in_openais_form() {
    let scene = scene(
        1,
        1,
        toml! { [limits]
        max_body = "1KiB" },
    )
    .await;
    let client = scene.client();
    let post = |body: &'static str| async move {
        let stream = client.send(http::Method::POST, "/v1/completions", &[], body.into()).await;
        stream.unwrap().whole().await.unwrap()
    };
    for body in
        ["", "not json", "[1]", "{\"prompt\": \"x\"", "{\"a\":1} x", "{\"str\\u0065am\":true}"]
    {
        let answer = post(body).await;
        assert_eq!(
            (answer.status, answer.error_code().unwrap()),
            (400, "invalid_request".into()),
            "{body}"
        );
    }
    let long = json!({"model": "mock", "prompt": "x".repeat(5000)});
    let answer = client.post("/v1/completions", &long).await.unwrap();
    assert_eq!((answer.status, answer.error_code().unwrap()), (413, "body_too_large".into()));
    let answer = client.get("/v1/completions").await.unwrap();
    assert_eq!((answer.status, answer.error_code().unwrap()), (405, "method_not_allowed".into()));
    let answer = client.get("/nothing/here").await.unwrap();
    assert_eq!((answer.status, answer.error_code().unwrap()), (404, "not_found".into()));
    assert!(scene.contexts[0].requests().is_empty());
    scene.stop();
}
