//! Routers that follow one another on one socket, under load: over TCP, and beside their clients and workers, where all
//! sockets are Unix sockets.

use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use baton_integration::at::At;
use baton_integration::client::Client;
use baton_integration::eventually::eventually;
use baton_integration::http2::{Http2, Unanswered};
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
    contexts: [Server; 2],
    generations: [Server; 2],
    socket: OwnedFd,
    at: At,
    folder: TempDir,
}

/// A scripted worker and its url.
struct Server {
    _mock: MockWorker,
    url: String,
}

impl Scene {
    async fn over_tcp() -> Self {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = async || {
            let mock = MockWorker::start(true, 4).await.unwrap();
            Server { url: mock.address.to_string(), _mock: mock }
        };
        Self {
            contexts: [server().await, server().await],
            generations: [server().await, server().await],
            at: socket.local_addr().unwrap().into(),
            socket: socket.into(),
            folder: tempfile::tempdir().unwrap(),
        }
    }

    async fn over_unix_sockets() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let front = folder.path().join("front.sock");
        let socket = UnixListener::bind(&front).unwrap();
        let server = async |name: &str| {
            let mut mock = MockWorker::start(true, 4).await.unwrap();
            let path = folder.path().join(name);
            mock.listen_at(&path).unwrap();
            Server { url: format!("unix:{}", path.display()), _mock: mock }
        };
        Self {
            contexts: [server("c0").await, server("c1").await],
            generations: [server("g0").await, server("g1").await],
            at: At::unix(front),
            socket: socket.into(),
            folder,
        }
    }

    /// Starts the router of this number.
    fn start(&self, number: usize) -> Process {
        let servers = |role: &str, servers: &[Server]| -> String {
            let one = |server: &Server| format!("[[{role}.servers]]\nurl = \"{}\"\n", server.url);
            servers.iter().map(one).collect()
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
        program.spawn_with_socket(self.folder.path(), "http", socket).unwrap()
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
async fn once_each(at: At, tally: Tally) {
    let client = Client::at(at);
    while tally.goes_on() {
        let answer = client.post(PATH, &ask(false)).await.unwrap().ok().unwrap();
        tally.one(text(&answer));
        let events = client.stream(PATH, &ask(true)).await.unwrap().events().await.unwrap();
        tally.one(&events.iter().map(text).collect::<String>());
    }
}

/// One connection as long as it lasts.
async fn kept(at: At, tally: Tally) {
    let mut client = Kept::new(at);
    while tally.goes_on() {
        let answer = client.post(PATH, &ask(false)).await.unwrap().ok().unwrap();
        tally.one(text(&answer));
    }
    tally.repeated.fetch_add(client.repeated(), Ordering::AcqRel);
}

/// Several requests at once on one HTTP/2 connection, as long as it lasts; every other answer is a stream.
async fn multiplexed(at: At, tally: Tally) {
    let mut client = Http2::connect(at).await.unwrap();
    while tally.goes_on() {
        let mut answers = Vec::new();
        for index in 0..4 {
            let stream = index % 2 == 1;
            answers.push(match client.post(PATH, &ask(stream)).await {
                Ok(answer) => (stream, answer),
                Err(Unanswered::Again(_)) => break,
                Err(lost) => panic!("{lost:?}"),
            });
        }
        let mut leaves = answers.len() < 4;
        for (stream, answer) in answers {
            let answer = match answer.await {
                Ok(answer) => answer,
                Err(Unanswered::Again(_)) => {
                    leaves = true;
                    continue;
                }
                Err(lost) => panic!("{lost:?}"),
            };
            let events = match stream {
                true => answer.events().await.unwrap(),
                false => vec![answer.whole().await.unwrap().ok().unwrap()],
            };
            tally.one(&events.iter().map(text).collect::<String>());
        }
        if leaves {
            tally.repeated.fetch_add(1, Ordering::AcqRel);
            client = Http2::connect(at).await.unwrap();
        }
    }
}

#[tokio::test]
async fn restarts_under_load_fail_no_request() {
    restarts(Scene::over_tcp().await).await;
}

#[tokio::test]
async fn restarts_between_unix_sockets_fail_no_request() {
    restarts(Scene::over_unix_sockets().await).await;
}

async fn restarts(scene: Scene) {
    let tally = Tally::default();
    let mut router = scene.start(0);
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        clients.spawn(once_each(scene.at, tally.clone()));
        clients.spawn(kept(scene.at, tally.clone()));
        clients.spawn(multiplexed(scene.at, tally.clone()));
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
        "{RESTARTS} restarts, {} requests served, {} connections left for another",
        tally.served.load(Ordering::Acquire),
        tally.repeated.load(Ordering::Acquire)
    ));
    let end = tokio::task::spawn_blocking(move || router.terminate(PATIENCE)).await;
    assert!(end.unwrap().unwrap().success());
}
