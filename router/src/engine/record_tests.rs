//! What becomes of a record, and of the request, when the worker that was to read it fails.

use baton_shared::config::units::Seconds;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

use super::Outcome;
use super::testing::*;
use crate::config::{DialectChoice, RouterConfig};
use crate::health;

fn ask(stream: bool) -> Value {
    json!({"model": "M", "prompt": "hello", "max_tokens": 4, "stream": stream})
}

fn keep(_: &mut RouterConfig) {}

/// The head of an answer and a part of what it announces.
const PART: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 900\r\n\r\n{\"choices\":";
/// Nothing, and not all of a head.
const BEFORE: [&str; 2] = ["", "HTTP/1.1 200 OK\r\ncontent-ty"];

fn says(text: &'static str) -> impl Fn(usize, &Ask) -> Act + Send + Sync {
    move |_, _| Act::Raw(text.to_owned())
}

#[tokio::test]
async fn an_answer_that_breaks_after_its_head_costs_a_new_pass_and_no_doomed_try() {
    let bad_chunk =
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\nx";
    let empty = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 0\r\n\r\n";
    for (stream, text) in [
        (false, PART),
        (false, STREAM),
        (true, STREAM),
        (true, PART),
        (true, bad_chunk),
        (true, empty),
    ] {
        let (mut context, good) = (Scripted::context().await, Scripted::generation().await);
        let bad = Scripted::start(says(text)).await;
        let scene = scene(&[&context], &[&bad, &good], keep).await;
        assert_eq!(scene.ask(&ask(stream)).await.status, 200, "{text:?}");
        assert_eq!((bad.asks().len(), good.asks().len()), (1, 1), "{text:?}");
        let [first, second] = &context.asks()[..] else { panic!("not two passes: {text:?}") };
        assert_ne!(first.id(), second.id());
        assert_eq!((bad.asks()[0].id(), good.asks()[0].id()), (first.id(), second.id()));
        assert_eq!(context.released().await, first.id());
    }
}

#[tokio::test]
async fn a_worker_that_fails_before_a_good_head_leaves_the_record_to_one_more() {
    for text in BEFORE {
        let (mut context, good) = (Scripted::context().await, Scripted::generation().await);
        let bad = Scripted::start(says(text)).await;
        let first = scene(&[&context], &[&bad, &good], keep).await;
        assert_eq!(first.ask(&ask(true)).await.status, 200, "{text:?}");
        assert_eq!(good.asks()[0].id(), bad.asks()[0].id(), "the same record");
        assert_eq!(context.asks().len(), 1);
        let once = |fault: Act| {
            Scripted::start(move |number, ask| match number {
                0 => fault.clone(),
                _ => served(ask),
            })
        };
        let breaks = once(Act::Raw(text.to_owned())).await;
        let refuses = once(Act::Answer(500, json!({}))).await;
        let second = scene(&[&context], &[&breaks, &refuses], keep).await;
        assert_eq!(second.ask(&ask(false)).await.status, 200, "{text:?}");
        let ids: Vec<u64> = context.asks().iter().map(Ask::id).collect();
        let mut read: Vec<u64> = breaks.asks().iter().chain(&refuses.asks()).map(Ask::id).collect();
        read.sort_unstable();
        assert_eq!(read, [ids[1], ids[1], ids[2]], "two had the second record");
        assert_eq!(context.released().await, ids[1]);
    }
}

#[tokio::test]
async fn a_record_of_tensorrt_llm_is_not_shown_again_to_find_out_whether_it_is_gone() {
    for text in BEFORE {
        let (context, good) = (Scripted::context().await, Scripted::generation().await);
        let bad = Scripted::start(says(text)).await;
        let trtllm = |config: &mut RouterConfig| {
            config.context.servers[0].dialect = DialectChoice::TrtllmMain;
        };
        let scene = scene(&[&context], &[&bad, &good], trtllm).await;
        assert_eq!(scene.ask(&ask(true)).await.status, 200, "{text:?}");
        assert_eq!(context.asks().len(), 2);
        assert_ne!(good.asks()[0].id(), bad.asks()[0].id());
        scene.router.drained().await;
        assert_eq!(scene.count("baton_router_orphaned_kv_total"), "1", "perhaps it was not read");
    }
}

#[tokio::test]
async fn a_worker_that_stays_silent_is_left_for_another_in_each_state_of_its_answer() {
    let quick = |config: &mut RouterConfig| {
        config.routing.first_token_timeout = Seconds::millis(150);
    };
    for (text, passes) in [("", 1), (STREAM, 2)] {
        let (context, good) = (Scripted::context().await, Scripted::generation().await);
        let mut silent = Scripted::start(move |_, _| Act::Stall(text.to_owned())).await;
        let scene = scene(&[&context], &[&silent, &good], quick).await;
        assert_eq!(scene.ask(&ask(true)).await.status, 200, "{text:?}");
        silent.cancelled().await;
        assert_eq!((context.asks().len(), good.asks().len()), (passes, 1), "{text:?}");
    }
}

#[tokio::test]
async fn a_request_whose_tries_are_used_up_ends_with_the_reason() {
    let mut context = Scripted::context().await;
    let bad = Scripted::start(says(STREAM)).await;
    let scene = scene(&[&context], &[&bad], keep).await;
    let read = scene.ask(&ask(true)).await;
    assert_eq!((read.status, read.code()), (502, "generation_failed".to_owned()));
    assert_eq!((context.asks().len(), bad.asks().len()), (3, 3), "`routing.attempts`");
    let mut released =
        [context.released().await, context.released().await, context.released().await];
    released.sort_unstable();
    let mut ids: Vec<u64> = context.asks().iter().map(Ask::id).collect();
    ids.sort_unstable();
    assert_eq!(&released[..], ids);
}

#[tokio::test]
async fn servers_that_do_not_run_cost_no_try_while_one_does() {
    let dead = [Scripted::dead().await, Scripted::dead().await, Scripted::dead().await];
    let (context, generation) = (Scripted::context().await, Scripted::generation().await);
    for phase in 0..2 {
        let mut pools = [vec![&context], vec![&generation]];
        pools[phase].splice(0..0, &dead);
        let scene = scene(&pools[0], &pools[1], |config| config.routing.attempts = 1).await;
        assert_eq!(scene.ask(&ask(false)).await.status, 200);
    }
    let read = scene(&[&context], &dead.each_ref(), keep).await.ask(&ask(false)).await;
    assert_eq!((read.status, read.code()), (503, "no_workers".to_owned()));
}

#[tokio::test]
async fn a_client_that_left_before_its_request_failed_is_not_told_and_counted_as_gone() {
    let (context, generation) = (Scripted::context().await, Scripted::generation().await);
    let mut scene = scene(&[&context], &[&generation], |config| {
        config.routing.queue_timeout = Seconds::millis(0);
    })
    .await;
    let table = scene.router.table();
    table.report(&table.snapshot_full().context[0], health::Outcome::Refused);
    let request = completion(&ask(false));
    let (most, last) = request.split_at(request.len() - 1);
    let mut client = scene.connect().await;
    client.write_all(most).await.unwrap();
    // It leaves with its last byte: the request is whole, and nobody waits for what comes of it.
    client.try_write(last).unwrap();
    drop(client);
    assert_eq!(scene.outcome().await, Some(Outcome::ClientGone));
}
