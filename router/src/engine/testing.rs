//! A router on a real socket, without Pingora's server around it, and workers that do as they are told.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use baton_shared::id::IdMint;
use baton_shared::wire::auth::Keys;
use pingora_core::protocols::http::ServerSession;
use pingora_core::protocols::l4::stream::Stream;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use super::{Outcome, Parts, Router, RouterCtx, early};
use crate::client::testing::read_request;
use crate::config::{RouterConfig, ServerEntry};
use crate::health::Event;
use crate::limits::InFlight;
use crate::metrics::Metrics;
use crate::table::Table;

/// What a worker does with a request.
#[derive(Clone, Debug)]
pub enum Act {
    /// Status and JSON body.
    Answer(u16, Value),
    /// Exactly these bytes, then the connection is closed.
    Raw(String),
    /// These bytes, then nothing until the router closes.
    Stall(String),
}

/// A request as a worker saw it.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Request line and headers.
    pub head: String,
    /// Body.
    pub body: Value,
}

impl Ask {
    /// `disaggregated_params.disagg_request_id`, or of a release call `disagg_request_id`.
    pub fn id(&self) -> u64 {
        let params = &self.body["disaggregated_params"]["disagg_request_id"];
        params.as_u64().or(self.body["disagg_request_id"].as_u64()).unwrap()
    }

    fn is_release(&self) -> bool {
        self.head.starts_with("POST /v1/disagg/release ")
    }
}

/// A worker on a socket of its own.
pub struct Scripted {
    /// Where it listens.
    pub address: SocketAddr,
    asks: Arc<Mutex<Vec<Ask>>>,
    releases: mpsc::UnboundedReceiver<u64>,
    closed: mpsc::UnboundedReceiver<()>,
}

impl Scripted {
    /// Answers the request number `n` (from 0, release calls not counted) with `script(n, ask)`.
    pub async fn start(script: impl Fn(usize, &Ask) -> Act + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let asks = Arc::new(Mutex::new(Vec::new()));
        let (release, releases) = mpsc::unbounded_channel();
        let (close, closed) = mpsc::unbounded_channel();
        let (script, shared) = (Arc::new(script), Arc::clone(&asks));
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (script, asks) = (Arc::clone(&script), Arc::clone(&shared));
                let (release, close) = (release.clone(), close.clone());
                tokio::spawn(async move {
                    while let Some((head, body)) = read_request(&mut stream).await {
                        let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
                        let ask = Ask { head, body };
                        if ask.is_release() {
                            release.send(ask.id()).unwrap();
                            write(&mut stream, &answer(200, &json!({}))).await;
                            continue;
                        }
                        let number = {
                            let mut asks = asks.lock().unwrap();
                            asks.push(ask.clone());
                            asks.len() - 1
                        };
                        match script(number, &ask) {
                            Act::Answer(status, body) => {
                                write(&mut stream, &answer(status, &body)).await;
                            }
                            Act::Raw(text) => return write(&mut stream, &text).await,
                            Act::Stall(text) => {
                                write(&mut stream, &text).await;
                                // Ends when the router closes; nothing else is sent on a busy connection.
                                let _ = stream.read(&mut [0; 8]).await;
                                close.send(()).unwrap();
                                return;
                            }
                        }
                    }
                });
            }
        });
        Self { address, asks, releases, closed }
    }

    /// A context worker that always hands over.
    pub async fn context() -> Self {
        Self::start(|_, ask| Act::Answer(200, handed_over(ask))).await
    }

    /// A generation worker that answers with a whole text or a stream of three events, as asked.
    pub async fn generation() -> Self {
        Self::start(|_, ask| served(ask)).await
    }

    /// An address where nobody listens.
    pub async fn dead() -> Self {
        let address = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let (releases, closed) = (mpsc::unbounded_channel().1, mpsc::unbounded_channel().1);
        Self { address, asks: Arc::default(), releases, closed }
    }

    /// Requests so far.
    pub fn asks(&self) -> Vec<Ask> {
        self.asks.lock().unwrap().clone()
    }

    /// The next released id.
    pub async fn released(&mut self) -> u64 {
        let next = tokio::time::timeout(Duration::from_secs(5), self.releases.recv()).await;
        next.expect("a release call comes").unwrap()
    }

    /// Whether a release call came so far.
    pub fn has_releases(&mut self) -> bool {
        self.releases.try_recv().is_ok()
    }

    /// Resolves when the router closed a connection that was being answered.
    pub async fn cancelled(&mut self) {
        let next = tokio::time::timeout(Duration::from_secs(5), self.closed.recv()).await;
        next.expect("the request is cancelled").unwrap();
    }
}

async fn write(stream: &mut TcpStream, text: &str) {
    // The router may have left; the test sees that elsewhere.
    let _ = stream.write_all(text.as_bytes()).await;
}

fn answer(status: u16, body: &Value) -> String {
    let body = body.to_string();
    format!(
        "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// The context answer to `ask`.
pub fn handed_over(ask: &Ask) -> Value {
    json!({
        "id": "cmpl-1", "created": 1, "model": "M", "prompt_token_ids": [1, 2, 3],
        "choices": [{"index": 0, "text": "A", "finish_reason": "length", "disaggregated_params": {
            "request_type": "context_only", "ctx_request_id": ask.id(), "first_gen_tokens": [65],
            "encoded_opaque_state": "QQ==", "disagg_request_id": ask.id(),
        }}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
    })
}

/// A refusal with one of our codes.
pub fn refusal(status: u16, code: &str) -> Act {
    Act::Answer(status, json!({"error": {"message": "scripted", "code": code}}))
}

/// Head of an event stream.
pub const STREAM: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

/// One chunk of a chunked body.
pub fn chunk(text: &str) -> String {
    format!("{:x}\r\n{text}\r\n", text.len())
}

/// The generation answer to `ask`.
pub fn served(ask: &Ask) -> Act {
    if ask.body["stream"] != true {
        return Act::Answer(200, json!({"choices": [{"text": "A B"}]}));
    }
    let chunks: String =
        ["data: 1\n\n", "data: 2\n\n", "data: [DONE]\n\n", ""].iter().map(|e| chunk(e)).collect();
    Act::Raw(format!("{STREAM}{chunks}"))
}

/// A router before workers, listening.
pub struct Scene {
    /// Its engine.
    pub router: Router,
    /// How its requests ended, in order.
    pub outcomes: mpsc::UnboundedReceiver<Option<Outcome>>,
    address: SocketAddr,
}

/// A router with short deadlines before these workers; `change` has the last word on its configuration.
pub async fn scene(
    contexts: &[&Scripted],
    generations: &[&Scripted],
    change: impl FnOnce(&mut RouterConfig),
) -> Scene {
    let servers = |workers: &[&Scripted]| {
        let url = |worker: &&Scripted| worker.address.to_string().parse().unwrap();
        workers.iter().map(url).map(ServerEntry::new).collect()
    };
    let mut config = RouterConfig::default();
    config.context.servers = servers(contexts);
    config.generation.servers = servers(generations);
    config.context.policy = crate::config::PolicyName::RoundRobin;
    config.generation.policy = crate::config::PolicyName::RoundRobin;
    config.routing.queue_timeout = "300ms".parse().unwrap();
    config.health.min_usable = baton_shared::config::units::Percent::new(100.0).unwrap();
    change(&mut config);
    let table = Arc::new(Table::new(config).unwrap());
    for worker in table.snapshot_full().workers() {
        table.record(worker, Event::ProbeOk);
    }
    let router = Router::new(Parts {
        table,
        metrics: Arc::new(Metrics::new()),
        keys: Keys::single("0123456789abcdef").into(),
        in_flight: InFlight::default(),
        mint: IdMint::new(1, 1),
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (outcome, outcomes) = mpsc::unbounded_channel();
    let engine = router.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(serve(engine.clone(), stream, outcome.clone()));
        }
    });
    Scene { router, outcomes, address }
}

async fn serve(
    router: Router,
    stream: TcpStream,
    outcomes: mpsc::UnboundedSender<Option<Outcome>>,
) {
    let mut session = ServerSession::new_http1(Box::new(Stream::from(stream)));
    loop {
        if !session.read_request().await.unwrap_or(false) {
            return;
        }
        early(&mut session);
        let mut cx = RouterCtx::default();
        cx.begin(&session);
        let handled = router.handle(&mut session, &mut cx).await;
        // The test may have ended.
        let _ = outcomes.send(cx.outcome);
        if handled.is_err() {
            return;
        }
        let Ok(Some(reusable)) = session.finish().await else { return };
        let (stream, prefix) = reusable.into_parts();
        session = ServerSession::new_http1(stream);
        if let Some(prefix) = prefix {
            session.set_pipelined_prefix(prefix);
        }
    }
}

/// What a client read.
#[derive(Debug)]
pub struct Read {
    /// HTTP status.
    pub status: u16,
    /// Status line and headers, lower case.
    pub head: String,
    /// Everything behind the head, framing included.
    pub rest: String,
}

impl Read {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.rest).unwrap_or_else(|error| panic!("{error}: {}", self.rest))
    }

    /// `error.code`.
    pub fn code(&self) -> String {
        self.json()["error"]["code"].as_str().unwrap().to_owned()
    }
}

impl Scene {
    /// The line of a metric without labels.
    pub fn count(&self, name: &str) -> String {
        let (table, metrics) = (self.router.table(), self.router.metrics());
        let text = metrics.render(&table.snapshot(), table.now(), 0);
        let mut lines = text.lines().filter_map(|line| line.strip_prefix(name));
        lines.find_map(|rest| rest.strip_prefix(' ')).unwrap().to_owned()
    }

    /// Connects a client.
    pub async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// Sends bytes and reads until the router closes.
    pub async fn raw(&self, request: &[u8]) -> Read {
        let mut stream = self.connect().await;
        stream.write_all(request).await.unwrap();
        read_all(&mut stream).await
    }

    /// Asks for a completion and reads the whole answer.
    pub async fn ask(&self, body: &Value) -> Read {
        self.raw(&completion(body)).await
    }

    /// How the next request ended.
    pub async fn outcome(&mut self) -> Option<Outcome> {
        let next = tokio::time::timeout(Duration::from_secs(5), self.outcomes.recv()).await;
        next.expect("the request ends").unwrap()
    }
}

/// Reads until the router closes.
pub async fn read_all(stream: &mut TcpStream) -> Read {
    let mut bytes = Vec::new();
    let reading = stream.read_to_end(&mut bytes);
    let _ = tokio::time::timeout(Duration::from_secs(20), reading).await.expect("the answer ends");
    let text = String::from_utf8(bytes).unwrap();
    let (head, rest) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no head: {text:?}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Read { status, head: head.to_ascii_lowercase(), rest: rest.to_owned() }
}

/// A completion request on a connection that ends with it.
pub fn completion(body: &Value) -> Vec<u8> {
    let body = body.to_string();
    let length = body.len();
    format!(
        "POST /v1/completions HTTP/1.1\r\nhost: r\r\nconnection: close\r\n\
         x-request-id: test-7\r\ncontent-length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}
