//! Routers that follow one another on one socket, under load.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use baton_integration::client::Client;
use baton_integration::eventually::eventually;
use baton_integration::kept::Kept;
use baton_integration::mock_worker::MockWorker;
use baton_integration::process::{Process, Program, free_port};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinSet;

use crate::support::note;

const PATIENCE: Duration = Duration::from_secs(30);
const PATH: &str = "/v1/completions";
const TEXT: &str = "A 0 1 2 3";
const RESTARTS: usize = 5;
/// Of each kind.
const CLIENTS: usize = 4;

/// Scripted workers, and a socket that is handed from router to router.
struct Scene {
    contexts: [MockWorker; 2],
    generations: [MockWorker; 2],
    socket: TcpListener,
    folder: TempDir,
}

impl Scene {
    async fn new() -> Self {
        let mock = async || MockWorker::start(true, 4).await.unwrap();
        Self {
            contexts: [mock().await, mock().await],
            generations: [mock().await, mock().await],
            socket: TcpListener::bind("127.0.0.1:0").unwrap(),
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn address(&self) -> SocketAddr {
        self.socket.local_addr().unwrap()
    }

    /// Starts the router of this number.
    fn start(&self, number: usize) -> Process {
        let servers = |role: &str, mocks: &[MockWorker]| -> String {
            let one =
                |mock: &MockWorker| format!("[[{role}.servers]]\nurl = \"{}\"\n", mock.address);
            mocks.iter().map(one).collect()
        };
        let text = format!(
            "[server]\nlisten = \"systemd:http\"\nadmin_listen = \"127.0.0.1:{}\"\nthreads = 2\n{}{}",
            free_port().unwrap(),
            servers("context", &self.contexts),
            servers("generation", &self.generations),
        );
        let (name, file) = (format!("router-{number}"), format!("router-{number}.toml"));
        std::fs::write(self.folder.path().join(&file), text).unwrap();
        let program = Program::new("baton-router", name, ["--config", &file]);
        let socket = self.socket.try_clone().unwrap();
        program.spawn_with_socket(self.folder.path(), "http", socket.into()).unwrap()
    }
}

fn ask(stream: bool) -> Value {
    json!({"model": "mock", "prompt": "hello", "max_tokens": 5, "stream": stream})
}

fn text(piece: &Value) -> &str {
    piece["choices"][0]["text"].as_str().unwrap_or("?")
}

/// What all clients share.
#[derive(Clone, Debug, Default)]
struct Tally {
    done: Arc<AtomicBool>,
    served: Arc<AtomicUsize>,
    repeated: Arc<AtomicUsize>,
}

impl Tally {
    fn goes_on(&self) -> bool {
        !self.done.load(Ordering::Acquire)
    }

    fn one(&self, text: &str) {
        assert_eq!(text, TEXT);
        self.served.fetch_add(1, Ordering::AcqRel);
    }

    /// Waits for more answers.
    async fn more(&self, count: usize) {
        let before = self.served.load(Ordering::Acquire);
        eventually(PATIENCE, "more answers", || async {
            (self.served.load(Ordering::Acquire) >= before + count).then_some(())
        })
        .await;
    }
}

/// A connection a request; every other answer is a stream.
async fn once_each(address: SocketAddr, tally: Tally) {
    let client = Client::new(address);
    while tally.goes_on() {
        let answer = client.post(PATH, &ask(false)).await.unwrap().ok().unwrap();
        tally.one(text(&answer));
        let events = client.stream(PATH, &ask(true)).await.unwrap().events().await.unwrap();
        tally.one(&events.iter().map(text).collect::<String>());
    }
}

/// One connection as long as it lasts.
async fn kept(address: SocketAddr, tally: Tally) {
    let mut client = Kept::new(address);
    while tally.goes_on() {
        let answer = client.post(PATH, &ask(false)).await.unwrap().ok().unwrap();
        tally.one(text(&answer));
    }
    tally.repeated.fetch_add(client.repeated(), Ordering::AcqRel);
}

#[tokio::test]
async fn restarts_under_load_fail_no_request() {
    let scene = Scene::new().await;
    let tally = Tally::default();
    let mut router = scene.start(0);
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        clients.spawn(once_each(scene.address(), tally.clone()));
        clients.spawn(kept(scene.address(), tally.clone()));
    }
    tally.more(100).await;
    for number in 1..=RESTARTS {
        router.signal("TERM").unwrap();
        eventually(PATIENCE, "the drain has begun", || async {
            router.log().contains("draining").then_some(())
        })
        .await;
        let next = scene.start(number);
        let mut old = std::mem::replace(&mut router, next);
        // Not by waiting for it alone: workers and clients live in this thread.
        let end = tokio::task::spawn_blocking(move || old.wait(PATIENCE)).await;
        assert!(end.unwrap().unwrap().success());
        tally.more(100).await;
    }
    tally.done.store(true, Ordering::Release);
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
    note(format_args!(
        "{RESTARTS} restarts, {} requests served, {} repeated on a kept connection",
        tally.served.load(Ordering::Acquire),
        tally.repeated.load(Ordering::Acquire)
    ));
    let end = tokio::task::spawn_blocking(move || router.terminate(PATIENCE)).await;
    assert!(end.unwrap().unwrap().success());
}
