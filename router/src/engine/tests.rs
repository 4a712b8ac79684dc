//! The engine between a real client connection and scripted workers.

use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::testing::*;
use super::*;
use crate::table::worker::Worker;

fn plain() -> serde_json::Value {
    json!({"model": "M", "prompt": "hello", "max_tokens": 4})
}

fn streamed() -> serde_json::Value {
    json!({"model": "M", "prompt": "hello", "max_tokens": 4, "stream": true})
}

fn keep(_: &mut crate::config::RouterConfig) {}

#[tokio::test]
async fn a_request_passes_both_workers_and_the_answer_comes_whole() {
    let (mut context, generation) = (Scripted::context().await, Scripted::generation().await);
    let mut scene = scene(&[&context], &[&generation], keep).await;
    let read = scene.ask(&plain()).await;
    assert_eq!((read.status, &read.json()["choices"][0]["text"]), (200, &json!("A B")));
    assert!(read.head.contains("\r\nx-request-id: test-7"), "{}", read.head);
    assert!(read.head.contains("\r\ncontent-length: "), "{}", read.head);
    assert_eq!(scene.outcome().await, Some(Outcome::Answered(200)));
    let (asked, told) = (&context.asks()[0], &generation.asks()[0]);
    assert_eq!(asked.body["disaggregated_params"]["request_type"], "context_only");
    assert_eq!(told.body["disaggregated_params"]["request_type"], "generation_only");
    assert_eq!((asked.id(), &told.body["prompt"]), (told.id(), &json!([1, 2, 3])));
    for ask in [asked, told] {
        assert!(ask.head.contains("\r\nx-request-id: test-7\r\ntraceparent: 00-"), "{}", ask.head);
    }
    assert!(!asked.head.contains("x-trtllm-disagg-auth"));
    assert!(told.head.contains("\r\nx-trtllm-disagg-auth: sha256="), "{}", told.head);
    scene.router.drained().await;
    assert!(!context.has_releases(), "a lease that was pulled needs no release");
}

#[tokio::test]
async fn a_stream_is_forwarded_as_it_is() {
    let (context, generation) = (Scripted::context().await, Scripted::generation().await);
    let mut scene = scene(&[&context], &[&generation], keep).await;
    let read = scene.ask(&streamed()).await;
    assert!(read.head.contains("content-type: text/event-stream"), "{}", read.head);
    assert!(read.rest.ends_with("data: [DONE]\n\n\r\n0\r\n\r\n"), "{:?}", read.rest);
    assert!(read.rest.contains("data: 1\n\ndata: 2\n\n"), "{:?}", read.rest);
    assert_eq!(scene.outcome().await, Some(Outcome::Answered(200)));
}

#[tokio::test]
async fn an_old_client_gets_a_stream_that_ends_with_the_connection() {
    let (context, generation) = (Scripted::context().await, Scripted::generation().await);
    let scene = scene(&[&context], &[&generation], keep).await;
    let body = streamed().to_string();
    let request =
        format!("POST /v1/completions HTTP/1.0\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let read = scene.raw(request.as_bytes()).await;
    assert_eq!(read.rest, "data: 1\n\ndata: 2\n\ndata: [DONE]\n\n");
}

#[tokio::test]
async fn a_failing_context_worker_is_replaced_and_every_send_has_its_own_id() {
    for fault in
        [Act::Raw(String::new()), refusal(500, "internal_error"), Act::Raw("x\r\n\r\n".into())]
    {
        let bad = Scripted::start(move |_, _| fault.clone()).await;
        let (good, generation) = (Scripted::context().await, Scripted::generation().await);
        let scene = scene(&[&bad, &good], &[&generation], keep).await;
        for _ in 0..2 {
            assert_eq!(scene.ask(&plain()).await.status, 200);
        }
        let mut ids: Vec<u64> = [bad.asks(), good.asks()].concat().iter().map(Ask::id).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), bad.asks().len() + 2);
    }
}

#[tokio::test]
async fn when_every_context_pass_fails_the_client_is_told_and_nothing_is_left_behind() {
    let mut bad = Scripted::start(|_, _| Act::Raw("HTTP/1.1 200 OK\r\n\r\n{}".into())).await;
    let generation = Scripted::generation().await;
    let scene = scene(&[&bad], &[&generation], keep).await;
    let read = scene.ask(&plain()).await;
    assert_eq!((read.status, read.code()), (502, "context_failed".to_owned()));
    let mut sent: Vec<u64> = bad.asks().iter().map(Ask::id).collect();
    assert_eq!(sent.len(), 3, "`attempts` passes");
    let mut released = [bad.released().await, bad.released().await, bad.released().await];
    sent.sort_unstable();
    released.sort_unstable();
    assert_eq!(sent, released);
    assert!(generation.asks().is_empty());
}

#[tokio::test]
async fn a_connection_closed_while_idle_costs_no_attempt() {
    // Answers once on each connection and closes, although it promised to keep the connection.
    let context = Scripted::start(|_, ask| {
        let body = handed_over(ask).to_string();
        Act::Raw(format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len()))
    })
    .await;
    let generation = Scripted::generation().await;
    let scene = scene(&[&context], &[&generation], |config| config.routing.attempts = 1).await;
    for _ in 0..3 {
        assert_eq!(scene.ask(&plain()).await.status, 200);
    }
    assert_eq!(context.asks().len(), 3);
}

#[tokio::test]
async fn what_a_worker_may_hold_of_a_request_that_was_sent_again_is_released() {
    // The second request is read from a kept connection, which then breaks.
    let mut context = Scripted::start(|number, ask| match number {
        1 => Act::Raw(String::new()),
        _ => Act::Answer(200, handed_over(ask)),
    })
    .await;
    let generation = Scripted::generation().await;
    let scene = scene(&[&context], &[&generation], |config| config.routing.attempts = 1).await;
    for _ in 0..2 {
        assert_eq!(scene.ask(&plain()).await.status, 200);
    }
    assert_eq!(context.asks().len(), 3);
    assert_eq!(context.released().await, context.asks()[1].id());
    scene.router.drained().await;
    assert!(!context.has_releases());
}

#[tokio::test]
async fn a_full_generation_worker_leaves_the_record_to_another() {
    let mut context = Scripted::context().await;
    let full = Scripted::start(|_, _| refusal(503, "pool_exhausted")).await;
    let free = Scripted::generation().await;
    let scene = scene(&[&context], &[&full, &free], keep).await;
    for _ in 0..2 {
        assert_eq!(scene.ask(&plain()).await.status, 200);
    }
    assert_eq!(context.asks().len(), 2, "no second context pass");
    scene.router.drained().await;
    assert!(!context.has_releases());
}

#[tokio::test]
async fn when_all_are_full_the_request_waits_and_then_says_when_to_come_back() {
    let mut context = Scripted::context().await;
    let later = Scripted::start(|number, ask| match number {
        0 => refusal(429, "queue_full"),
        _ => served(ask),
    })
    .await;
    let first = scene(&[&context], &[&later], keep).await;
    assert_eq!(first.ask(&plain()).await.status, 200, "room came in time");
    let full = Scripted::start(|_, _| refusal(503, "pool_exhausted")).await;
    let second = scene(&[&context], &[&full], keep).await;
    let read = second.ask(&plain()).await;
    assert_eq!((read.status, read.code()), (503, "no_workers".to_owned()));
    assert!(read.head.contains("\r\nretry-after: 1"), "{}", read.head);
    assert!(full.asks().len() > 1);
    let last = context.asks().last().unwrap().id();
    assert_eq!(context.released().await, last, "the record is left behind");
}

#[tokio::test]
async fn a_lost_lease_is_computed_again_and_the_old_one_released() {
    let mut context = Scripted::context().await;
    let forgetful = Scripted::start(|number, ask| match number {
        0 => refusal(503, "kv_lease_gone"),
        1 => refusal(504, "kv_transfer_timeout"),
        _ => served(ask),
    })
    .await;
    let scene = scene(&[&context], &[&forgetful], keep).await;
    assert_eq!(scene.ask(&plain()).await.status, 200);
    let ids: Vec<u64> = context.asks().iter().map(Ask::id).collect();
    assert_eq!(ids.len(), 3);
    let mut released = [context.released().await, context.released().await];
    released.sort_unstable();
    assert_eq!(released, ids[..2]);
    scene.router.drained().await;
    assert!(!context.has_releases());
}

#[tokio::test]
async fn a_worker_whose_blocks_could_not_be_read_is_asked_again_before_one_that_failed_itself() {
    for good_first in [true, false] {
        let good = Scripted::context().await;
        let broken = Scripted::start(|_, _| Act::Raw(String::new())).await;
        let generation = Scripted::start(|number, ask| match number {
            0 => refusal(504, "kv_transfer_timeout"),
            _ => served(ask),
        })
        .await;
        let order = if good_first { [&good, &broken] } else { [&broken, &good] };
        let quick = |config: &mut crate::config::RouterConfig| {
            config.health.eject_time = baton_shared::config::units::Seconds::millis(100);
        };
        let scene = scene(&order, &[&generation], quick).await;
        assert_eq!(scene.ask(&plain()).await.status, 200, "good first: {good_first}");
        assert_eq!(good.asks().len(), 2);
        assert!(broken.asks().len() <= 1);
    }
}

#[tokio::test]
async fn a_deployment_mistake_is_a_502_with_the_workers_words_and_releases() {
    for code in ["kv_incompatible", "kv_state_invalid"] {
        let mut context = Scripted::context().await;
        let other = Scripted::start(move |_, _| refusal(409, code)).await;
        let scene = scene(&[&context], &[&other], keep).await;
        let read = scene.ask(&plain()).await;
        assert_eq!((read.status, other.asks().len()), (502, 1));
        assert!(read.rest.contains("scripted"), "{}", read.rest);
        assert_eq!(context.released().await, context.asks()[0].id());
    }
}

#[tokio::test]
async fn what_a_worker_without_a_release_call_keeps_is_counted() {
    let mut context = Scripted::context().await;
    let other = Scripted::start(|_, _| refusal(409, "kv_incompatible")).await;
    let trtllm = |config: &mut crate::config::RouterConfig| {
        config.context.servers[0].dialect = crate::config::DialectChoice::TrtllmMain;
    };
    let scene = scene(&[&context], &[&other], trtllm).await;
    assert_eq!(scene.ask(&plain()).await.status, 502);
    scene.router.drained().await;
    assert!(!context.has_releases());
    assert_eq!(scene.count("baton_router_orphaned_kv_total"), "1");
}

#[tokio::test]
async fn a_workers_4xx_is_the_clients_and_the_connection_stays_usable() {
    let body = json!({"object": "error", "message": "bad temperature", "code": 400});
    let said = body.clone();
    let context = Scripted::start(move |_, _| Act::Answer(422, said.clone())).await;
    let generation = Scripted::generation().await;
    let mut scene = scene(&[&context], &[&generation], keep).await;
    let one = String::from_utf8(completion(&plain())).unwrap();
    let kept = one.replace("connection: close\r\n", "");
    let read = scene.raw(format!("{kept}{one}").as_bytes()).await;
    assert_eq!(read.status, 422);
    assert_eq!(read.rest.matches("HTTP/1.1 422").count(), 1, "the second answer follows");
    assert!(read.rest.starts_with(&body.to_string()), "{}", read.rest);
    assert_eq!(context.asks().len(), 2, "each was sent once");
    for _ in 0..2 {
        assert_eq!(scene.outcome().await, Some(Outcome::Answered(422)));
    }
}

#[tokio::test]
async fn a_generation_workers_4xx_is_the_clients_and_the_record_is_released() {
    let mut context = Scripted::context().await;
    let picky =
        Scripted::start(|_, _| Act::Answer(404, json!({"error": {"message": "who?"}}))).await;
    let scene = scene(&[&context], &[&picky], keep).await;
    let read = scene.ask(&streamed()).await;
    assert_eq!((read.status, &read.json()["error"]["message"]), (404, &json!("who?")));
    assert_eq!((context.asks().len(), picky.asks().len()), (1, 1));
    assert_eq!(context.released().await, context.asks()[0].id());
}

#[tokio::test]
async fn a_stream_is_not_answered_with_a_whole_answer_nor_the_other_way_round() {
    let (context, good) = (Scripted::context().await, Scripted::generation().await);
    let wrong = Scripted::start(|_, ask| {
        let mut other = ask.clone();
        other.body["stream"] = json!(ask.body["stream"] != true);
        served(&other)
    })
    .await;
    for body in [plain(), streamed()] {
        let scene = scene(&[&context], &[&wrong, &good], keep).await;
        let read = scene.ask(&body).await;
        assert_eq!(read.status, 200);
        assert_eq!(read.rest.contains("[DONE]"), body["stream"] == true);
    }
    assert_eq!((wrong.asks().len(), good.asks().len()), (2, 2));
}

#[tokio::test]
async fn an_early_stop_needs_no_generation_worker() {
    let mut context = Scripted::start(|_, ask| {
        let mut body = handed_over(ask);
        body["choices"][0]["finish_reason"] = json!("stop");
        Act::Answer(200, body)
    })
    .await;
    let generation = Scripted::generation().await;
    let scene = scene(&[&context], &[&generation], keep).await;
    let read = scene.ask(&plain()).await;
    assert_eq!(read.json()["choices"][0]["text"], "A");
    assert!(!read.rest.contains("disaggregated_params") && !read.rest.contains("token_ids"));
    let read = scene.ask(&streamed()).await;
    assert!(read.rest.ends_with("data: [DONE]\n\n\r\n0\r\n\r\n"), "{:?}", read.rest);
    scene.router.drained().await;
    assert!(generation.asks().is_empty() && !context.has_releases());
    let idle = |worker: &Arc<Worker>| worker.in_flight() == 0 && worker.queued_tokens() == 0;
    assert!(scene.router.table().snapshot_full().workers().all(idle), "nothing stays reserved");
}

#[tokio::test]
async fn a_failed_context_pass_reserves_nothing_any_more() {
    let context = Scripted::start(|_, _| Act::Answer(500, json!({}))).await;
    let generation = Scripted::generation().await;
    let scene = scene(&[&context], &[&generation], keep).await;
    assert_eq!(scene.ask(&plain()).await.status, 502);
    scene.router.drained().await;
    assert!(generation.asks().is_empty());
    let idle = |worker: &Arc<Worker>| worker.in_flight() == 0 && worker.queued_tokens() == 0;
    assert!(scene.router.table().snapshot_full().workers().all(idle));
}

#[tokio::test]
async fn a_client_that_leaves_in_the_context_phase_cancels_it_and_releases() {
    let mut context = Scripted::start(|_, _| Act::Stall(String::new())).await;
    let generation = Scripted::generation().await;
    let mut scene = scene(&[&context], &[&generation], keep).await;
    let mut client = scene.connect().await;
    client.write_all(&completion(&plain())).await.unwrap();
    while context.asks().is_empty() {
        tokio::task::yield_now().await;
    }
    drop(client);
    context.cancelled().await;
    assert_eq!(context.released().await, context.asks()[0].id());
    assert_eq!(scene.outcome().await, Some(Outcome::ClientGone));
}

#[tokio::test]
async fn a_client_that_leaves_before_the_first_token_cancels_both_and_releases() {
    let mut context = Scripted::context().await;
    // A head alone is not an answer yet.
    let mut generation = Scripted::start(|_, _| Act::Stall(STREAM.to_owned())).await;
    let mut scene = scene(&[&context], &[&generation], keep).await;
    let mut client = scene.connect().await;
    client.write_all(&completion(&streamed())).await.unwrap();
    while generation.asks().is_empty() {
        tokio::task::yield_now().await;
    }
    drop(client);
    generation.cancelled().await;
    assert_eq!(context.released().await, context.asks()[0].id());
    assert_eq!(scene.outcome().await, Some(Outcome::ClientGone));
}

#[tokio::test]
async fn a_client_that_leaves_in_mid_stream_cancels_the_generation() {
    let mut context = Scripted::context().await;
    let mut generation =
        Scripted::start(|_, _| Act::Stall(format!("{STREAM}{}", chunk("data: 1\n\n")))).await;
    let mut scene = scene(&[&context], &[&generation], keep).await;
    let mut client = scene.connect().await;
    client.write_all(&completion(&streamed())).await.unwrap();
    let mut seen = Vec::new();
    while !seen.ends_with(b"data: 1\n\n\r\n") {
        client.read_buf(&mut seen).await.unwrap();
    }
    drop(client);
    generation.cancelled().await;
    assert_eq!(scene.outcome().await, Some(Outcome::ClientGone));
    scene.router.drained().await;
    assert!(!context.has_releases());
}

#[tokio::test]
async fn a_stream_that_breaks_ends_with_an_error_event_and_broken_framing() {
    for (sent, kept) in
        [("data: 1\n\n", "data: 1\n\n"), ("data: 1\n\ndata: {\"x", "data: {\"x\r\n")]
    {
        let context = Scripted::context().await;
        let text = format!("{STREAM}{}", chunk(sent));
        let generation = Scripted::start(move |_, _| Act::Raw(text.clone())).await;
        let mut scene = scene(&[&context], &[&generation], keep).await;
        let read = scene.ask(&streamed()).await;
        assert_eq!(read.status, 200);
        assert!(read.rest.contains(kept), "{:?}", read.rest);
        assert!(read.rest.contains("\n\ndata: {\"error\":") || kept == sent, "{:?}", read.rest);
        assert!(read.rest.contains("\"code\":\"generation_aborted\"}}\n\n"), "{:?}", read.rest);
        assert!(
            !read.rest.contains("[DONE]") && !read.rest.contains("0\r\n\r\n"),
            "{:?}",
            read.rest
        );
        assert_eq!(scene.outcome().await, Some(Outcome::Aborted));
    }
}

#[tokio::test]
async fn silent_workers_are_given_up_in_time_in_each_phase() {
    let limit = |config: &mut crate::config::RouterConfig| {
        config.routing.context_timeout = "150ms".parse().unwrap();
        config.routing.first_token_timeout = "150ms".parse().unwrap();
        config.routing.idle_timeout = "150ms".parse().unwrap();
        config.routing.attempts = 1;
    };
    let mut silent = Scripted::start(|_, _| Act::Stall(String::new())).await;
    let generation = Scripted::generation().await;
    let first = scene(&[&silent], &[&generation], limit).await;
    let read = first.ask(&plain()).await;
    assert_eq!((read.status, read.code()), (504, "context_timeout".to_owned()));
    assert_eq!(silent.released().await, silent.asks()[0].id());

    let mut context = Scripted::context().await;
    let second = scene(&[&context], &[&silent], limit).await;
    let read = second.ask(&streamed()).await;
    assert_eq!((read.status, read.code()), (504, "generation_timeout".to_owned()));
    assert_eq!(context.released().await, context.asks()[0].id());

    let pausing =
        Scripted::start(|_, _| Act::Stall(format!("{STREAM}{}", chunk("data: 1\n\n")))).await;
    let third = scene(&[&context], &[&pausing], limit).await;
    let read = third.ask(&streamed()).await;
    assert!(read.rest.contains("generation_aborted"), "{:?}", read.rest);
}

#[tokio::test]
async fn a_whole_answer_may_take_longer_than_the_first_token() {
    let context = Scripted::context().await;
    let slow = Scripted::start(|_, _| Act::Stall(String::new())).await;
    let scene = scene(&[&context], &[&slow], |config| {
        config.routing.first_token_timeout = "100ms".parse().unwrap();
        config.routing.request_timeout = "700ms".parse().unwrap();
    })
    .await;
    let before = std::time::Instant::now();
    let read = scene.ask(&plain()).await;
    assert_eq!((read.status, read.code()), (504, "generation_timeout".to_owned()));
    assert!(before.elapsed() >= Duration::from_millis(700));
    assert_eq!(slow.asks().len(), 1, "a worker whose probes are good is waited for");
}

#[tokio::test]
async fn without_a_usable_worker_the_client_is_told_when_to_come_back() {
    let (context, generation) = (Scripted::context().await, Scripted::generation().await);
    let scene = scene(&[&context], &[&generation], keep).await;
    let table = scene.router.table();
    table.report(&table.snapshot_full().context[0], health::Outcome::Refused);
    let read = scene.ask(&plain()).await;
    assert_eq!((read.status, read.code()), (503, "no_workers".to_owned()));
    assert!(read.head.contains("\r\nretry-after: 1"), "{}", read.head);
}

#[tokio::test]
async fn too_many_requests_at_once_are_refused_at_the_door() {
    let (context, generation) = (Scripted::context().await, Scripted::generation().await);
    let scene = scene(&[&context], &[&generation], |c| c.limits.max_in_flight = 0).await;
    let read = scene.ask(&plain()).await;
    assert_eq!((read.status, read.code()), (429, "queue_full".to_owned()));
}
