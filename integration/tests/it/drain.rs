//! A router that is told to stop: nobody is failed by that.

use std::time::{Duration, Instant};

use baton_integration::client::{Client, Stream};
use baton_integration::eventually::eventually;
use baton_integration::kept::Kept;
use baton_integration::mock_worker::Behaviour;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use toml::Table;

use crate::scripted::{Scene, ask, ask_stream, scene, scene_of};
use crate::support::STOP;

const PATIENCE: Duration = Duration::from_secs(10);
const PATH: &str = "/v1/completions";
const TEXT: &str = "A 0 1 2 3";

async fn draining(scene: &Scene) {
    eventually(PATIENCE, "the drain has begun", || async {
        scene.router.process.log().contains("draining").then_some(())
    })
    .await;
}

fn ended_well(mut scene: Scene) {
    assert!(scene.router.process.wait(STOP).unwrap().success());
}

#[tokio::test]
async fn a_request_on_a_kept_connection_is_served_in_a_drain_and_told_to_close_it() {
    let mut scene = scene(1, 1, Table::new()).await;
    let mut kept = Kept::new(scene.router.address);
    let before = kept.post(PATH, &ask()).await.unwrap();
    assert_eq!((before.status, before.headers["connection"].as_bytes()), (200, &b"keep-alive"[..]));
    // One that has not asked yet is waited for, so that the drain goes on until it has.
    let mut new = Kept::new(scene.router.address);
    new.connect().await.unwrap();
    scene.router.process.signal("TERM").unwrap();
    draining(&scene).await;
    let answer = kept.post(PATH, &ask()).await.unwrap();
    assert_eq!(answer.ok().unwrap()["choices"][0]["text"], TEXT);
    assert_eq!(answer.headers["connection"], "close");
    assert_eq!(kept.repeated(), 0, "by the same connection");
    let answer = new.first(PATH, &ask()).await.unwrap();
    assert_eq!((answer.status, answer.headers["connection"].as_bytes()), (200, &b"close"[..]));
    assert!(Client::new(scene.router.address).get("/health").await.is_err(), "nobody listens");
    ended_well(scene);
}

#[tokio::test]
async fn a_stream_that_runs_when_a_drain_begins_comes_to_its_end() {
    let (scene, stream) = stopped_in_a_stream(&["TERM"]).await;
    assert_eq!(stream.events().await.unwrap().len(), 50);
    ended_well(scene);
}

/// A stream that has begun and goes on for a second, in front of a router that was told to stop by these signals.
async fn stopped_in_a_stream(signals: &[&str]) -> (Scene, Stream) {
    let mut scene = scene_of(1, 1, 50, Table::new()).await;
    scene.generations[0].behave(Behaviour::Pace(Duration::from_millis(20)));
    let mut stream = scene.client().stream(PATH, &ask_stream()).await.unwrap();
    stream.event().await.unwrap().unwrap();
    for signal in signals {
        scene.router.process.signal(signal).unwrap();
    }
    (scene, stream)
}

#[tokio::test]
async fn two_signals_at_once_are_one_as_a_terminal_and_a_supervisor_send_them() {
    let (scene, stream) = stopped_in_a_stream(&["INT", "TERM"]).await;
    assert_eq!(stream.events().await.unwrap().len(), 50);
    ended_well(scene);
}

#[tokio::test]
async fn a_later_signal_ends_a_drain_with_what_is_in_flight() {
    let (mut scene, _stream) = stopped_in_a_stream(&["TERM"]).await;
    let begun = Instant::now();
    while scene.router.process.ended().unwrap().is_none() {
        assert!(begun.elapsed() < PATIENCE, "it goes on");
        scene.router.process.signal("TERM").unwrap();
    }
    assert_eq!(scene.router.process.ended().unwrap().unwrap().code(), Some(1));
}

#[tokio::test]
async fn connections_that_wait_to_be_accepted_when_a_drain_begins_are_served() {
    let mut scene = scene(1, 1, Table::new()).await;
    // It stands still, so that nothing is accepted; the system lets clients connect and write.
    scene.router.process.signal("STOP").unwrap();
    let body = ask().to_string();
    let request = format!(
        "POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut waiting = Vec::new();
    for _ in 0..64 {
        let mut tcp = TcpStream::connect(scene.router.address).await.unwrap();
        tcp.write_all(request.as_bytes()).await.unwrap();
        waiting.push(tcp);
    }
    scene.router.process.signal("TERM").unwrap();
    scene.router.process.signal("CONT").unwrap();
    for mut tcp in waiting {
        let mut answer = String::new();
        tcp.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains(TEXT), "{answer:?}");
    }
    ended_well(scene);
}

#[tokio::test]
async fn an_idle_router_ends_at_once_and_closes_kept_connections() {
    let mut scene = scene(1, 1, Table::new()).await;
    let mut kept = Kept::new(scene.router.address);
    kept.post(PATH, &ask()).await.unwrap();
    scene.router.process.signal("TERM").unwrap();
    eventually(PATIENCE, "the kept connection is closed", || async {
        (!kept.is_connected()).then_some(())
    })
    .await;
    ended_well(scene);
}
