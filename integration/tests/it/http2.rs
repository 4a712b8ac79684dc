//! Clients that speak HTTP/2: streams that break or are given up, and a router that is told to stop: what it has begun, and
//! what crosses its leave, is answered.

use std::time::Duration;

use baton_integration::eventually::eventually;
use baton_integration::http2::{Http2, Stream, Unanswered};
use baton_integration::mock_worker::Behaviour;
use h2::Reason;
use tokio::task::JoinSet;
use toml::Table;

use crate::scripted::{Scene, ask, ask_stream, scene, scene_of};
use crate::support::STOP;

const PATIENCE: Duration = Duration::from_secs(10);
const PATH: &str = "/v1/completions";
const TEXT: &str = "A 0 1 2 3";

/// The router's end must be a good one.
async fn ended_well(scene: Scene) {
    let mut process = scene.router.process;
    // Not by waiting for it alone: workers and connections live in this thread.
    let status = tokio::task::spawn_blocking(move || process.wait(STOP)).await.unwrap();
    assert!(status.unwrap().success());
}

/// The text of a good answer.
async fn text(answer: impl Future<Output = Result<Stream, Unanswered>>) -> String {
    let answer = answer.await.unwrap().whole().await.unwrap().ok().unwrap();
    answer["choices"][0]["text"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_stream_that_breaks_is_reset_with_an_error_and_its_connection_goes_on() {
    let scene = scene(1, 1, Table::new()).await;
    scene.generations[0].behave(Behaviour::BreakAfter(2));
    let client = Http2::connect(scene.router.address).await.unwrap();
    let mut stream = client.post(PATH, &ask_stream()).await.unwrap().await.unwrap();
    let mut text = Vec::new();
    let error = loop {
        match stream.piece().await {
            Ok(piece) => text.extend(piece.expect("it must not end well")),
            Err(error) => break error.downcast::<h2::Error>().unwrap(),
        }
    };
    // Not CANCEL, which would look like the client's own doing.
    assert!(error.is_reset() && error.reason() == Some(Reason::INTERNAL_ERROR), "{error}");
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("generation_aborted") && !text.contains("[DONE]"), "{text}");
    scene.generations[0].behave(Behaviour::Serve);
    let answer = client.post(PATH, &ask()).await.unwrap().await.unwrap();
    let answer = answer.whole().await.unwrap().ok().unwrap();
    assert_eq!(answer["choices"][0]["text"], TEXT);
    scene.stop();
}

#[tokio::test]
async fn a_stream_that_its_client_gives_up_is_cancelled_and_the_others_go_on() {
    let scene = scene_of(1, 1, 50, Table::new()).await;
    scene.generations[0].behave(Behaviour::Pace(Duration::from_millis(20)));
    let client = Http2::connect(scene.router.address).await.unwrap();
    let stays = client.post(PATH, &ask_stream()).await.unwrap().await.unwrap();
    let leaves = client.post(PATH, &ask_stream()).await.unwrap().await.unwrap();
    drop(leaves);
    eventually(PATIENCE, "the worker hears of it", || async {
        (scene.generations[0].cancelled() == 1).then_some(())
    })
    .await;
    assert_eq!(stays.events().await.unwrap().len(), 51);
    assert_eq!(scene.settled().await.pulled, 2);
    scene.stop();
}

#[tokio::test]
async fn streams_of_one_connection_come_to_their_end_in_a_drain() {
    let mut scene = scene_of(1, 1, 50, Table::new()).await;
    scene.generations[0].behave(Behaviour::Pace(Duration::from_millis(20)));
    let client = Http2::connect(scene.router.address).await.unwrap();
    let mut streams = JoinSet::new();
    for _ in 0..8 {
        let stream = client.post(PATH, &ask_stream()).await.unwrap().await.unwrap();
        streams.spawn(stream.events());
    }
    scene.router.process.signal("TERM").unwrap();
    while let Some(events) = streams.join_next().await {
        assert_eq!(events.unwrap().unwrap().len(), 51);
    }
    client.ended().await.unwrap();
    ended_well(scene).await;
}

#[tokio::test]
async fn a_connection_whose_router_drains_takes_no_new_request_and_a_new_one_is_refused() {
    let mut scene = scene_of(1, 1, 50, Table::new()).await;
    scene.generations[0].behave(Behaviour::Pace(Duration::from_millis(20)));
    let client = Http2::connect(scene.router.address).await.unwrap();
    let running = client.post(PATH, &ask_stream()).await.unwrap().await.unwrap();
    scene.router.process.signal("TERM").unwrap();
    eventually(PATIENCE, "the router has taken its leave", || async {
        match client.post(PATH, &ask()).await {
            // Between signal and leave requests are served.
            Ok(answer) => {
                assert!(text(answer).await.starts_with(TEXT));
                None
            }
            Err(Unanswered::Again(_)) => Some(()),
            Err(lost) => panic!("{lost:?}"),
        }
    })
    .await;
    assert!(Http2::connect(scene.router.address).await.is_err(), "nobody listens");
    assert_eq!(running.events().await.unwrap().len(), 51);
    ended_well(scene).await;
}

#[tokio::test]
async fn requests_that_cross_the_leave_of_a_draining_router_are_answered() {
    let mut scene = scene(1, 1, Table::new()).await;
    let client = Http2::connect(scene.router.address).await.unwrap();
    let first = client.post(PATH, &ask()).await.unwrap().await.unwrap();
    assert_eq!(first.whole().await.unwrap().status, 200);
    // It stands still, so that it finds both the signal and the requests when it goes on.
    scene.router.process.signal("STOP").unwrap();
    let mut waiting = Vec::new();
    for _ in 0..32 {
        waiting.push(client.post(PATH, &ask()).await.unwrap());
    }
    scene.router.process.signal("TERM").unwrap();
    scene.router.process.signal("CONT").unwrap();
    for answer in waiting {
        assert_eq!(text(answer).await, TEXT);
    }
    client.ended().await.unwrap();
    ended_well(scene).await;
}

#[tokio::test]
async fn connections_that_wait_to_be_accepted_when_a_drain_begins_are_served_over_http2_too() {
    let mut scene = scene(1, 1, Table::new()).await;
    scene.router.process.signal("STOP").unwrap();
    let mut waiting = Vec::new();
    for _ in 0..32 {
        let client = Http2::connect(scene.router.address).await.unwrap();
        let answer = client.post(PATH, &ask()).await.unwrap();
        waiting.push((client, answer));
    }
    scene.router.process.signal("TERM").unwrap();
    scene.router.process.signal("CONT").unwrap();
    for (client, answer) in waiting {
        assert_eq!(text(answer).await, TEXT);
        client.ended().await.unwrap();
    }
    ended_well(scene).await;
}

#[tokio::test]
async fn an_idle_router_ends_at_once_and_takes_leave_of_its_connections() {
    let mut scene = scene(1, 1, Table::new()).await;
    let client = Http2::connect(scene.router.address).await.unwrap();
    let answer = client.post(PATH, &ask()).await.unwrap().await.unwrap();
    assert_eq!(answer.whole().await.unwrap().status, 200);
    scene.router.process.signal("TERM").unwrap();
    client.ended().await.unwrap();
    ended_well(scene).await;
}
