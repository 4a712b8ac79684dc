//! The API over real connections: workers with the engine on a fake back end and the transport inside this process.

mod equality;
mod errors;
mod leaving;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use baton_shared::id::{IdMint, Incarnation, WorkerId};
use baton_shared::kv::block_hash::EventHashAlgorithm;
use baton_shared::role::Role;
use baton_shared::wire::auth::Keys;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::fake_texts::{EOS, FakeTexts};
use super::server;
use super::worker::{Limits, Worker};
use crate::backend::Caps;
use crate::backend::fake::{FakeBackend, FakeConfig, FakeScript};
use crate::engine::status::EngineStatus;
use crate::engine::{EngineConfig, EngineEnd, EngineHandle, Parts, engine};
use crate::handover::local::{LocalNet, LocalTransport};
use crate::handover::mover::{Mover, MoverRegions, MoverSettings, OpenTransport};
use crate::handover::{PeerAddress, Transport};
use crate::kv::region::{EpochPage, KvRegion};
use crate::metrics::Metrics;

const BLOCKS: u32 = 64;
const BLOCK_TOKENS: u32 = 4;
/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// A worker that serves.
struct Running {
    address: SocketAddr,
    worker: Arc<Worker>,
    script: Arc<FakeScript>,
    shutdown: Option<oneshot::Sender<()>>,
    ended: JoinHandle<EngineEnd>,
}

/// What an HTTP exchange gave.
#[derive(Debug)]
struct Answer {
    status: u16,
    kind: String,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("not JSON: {}", self.body))
    }

    fn error(&self) -> (u16, String) {
        let body = self.json();
        (self.status, body["error"]["code"].as_str().unwrap().to_owned())
    }

    /// Events of a stream; the last must be `[DONE]`.
    fn events(&self) -> Vec<Value> {
        assert_eq!((self.status, self.kind.as_str()), (200, "text/event-stream"), "{}", self.body);
        let mut events: Vec<&str> =
            self.body.split_terminator("\n\n").map(|e| e.strip_prefix("data: ").unwrap()).collect();
        assert_eq!(events.pop(), Some("[DONE]"), "{}", self.body);
        events.into_iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

/// How a worker differs from the others.
#[derive(Clone)]
struct Shape {
    engine: EngineConfig,
    keys: Keys,
    fingerprint: [u8; 32],
}

impl Default for Shape {
    fn default() -> Self {
        let default = EngineConfig::default();
        let engine = EngineConfig { max_leased_fraction: 0.5, event_buffer: 64, ..default };
        Self { engine, keys: Keys::none(), fingerprint: [1; 32] }
    }
}

impl Running {
    async fn start(net: &LocalNet) -> Self {
        Self::shaped(net, Shape::default()).await
    }

    async fn shaped(net: &LocalNet, shape: Shape) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let caps = Caps { max_sequences: 16, max_batch_tokens: 64, vocab: EOS + 1, lag: 1 };
        let backend =
            FakeBackend::new(FakeConfig { blocks: BLOCKS, block_tokens: BLOCK_TOKENS, caps });
        let backend = backend.unwrap();
        let script = backend.script();
        let (handle, seat) = engine(shape.engine.clone());
        let epochs = EpochPage::new(BLOCKS as usize).unwrap();
        let kv = crate::backend::Backend::pool(&backend).clone();
        let (mover, serve) = start_mover(net, &address.to_string(), &kv, &epochs, &handle);
        let incarnation = Incarnation::random();
        seat.start(Parts {
            backend: Box::new(backend),
            epochs,
            serve,
            incarnation,
            puller: Box::new(mover.clone()),
        })
        .unwrap();
        let worker = Arc::new(Worker {
            engine: handle,
            texts: Arc::new(FakeTexts),
            names: vec!["M".to_owned()],
            role: Role::Both,
            id: address.to_string().parse::<WorkerId>().unwrap(),
            address: address.to_string(),
            incarnation,
            keys: shape.keys,
            fingerprint: shape.fingerprint,
            limits: Limits {
                max_len: 200,
                pool_tokens: BLOCKS * BLOCK_TOKENS,
                leasable_tokens: BLOCKS / 2 * BLOCK_TOKENS,
                block_tokens: BLOCK_TOKENS,
            },
            metrics: Arc::new(Metrics::new(Role::Both, "M")),
            mover,
            mint: IdMint::new(1, 1),
            started: 7,
            event_hash: EventHashAlgorithm::default(),
        });
        let (shutdown, stopping) = oneshot::channel();
        let served = server::run(listener, Arc::clone(&worker), PATIENCE, async {
            if stopping.await.is_err() {
                std::future::pending::<()>().await;
            }
        });
        let ended = tokio::spawn(served);
        let running = Self { address, worker, script, shutdown: Some(shutdown), ended };
        running.until("the engine runs", |status| status.is_alive).await;
        running
    }

    /// Waits for a state of the engine.
    async fn until(&self, what: &str, holds: impl Fn(&EngineStatus) -> bool) {
        let reached = async {
            while !holds(&self.worker.engine.status()) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        if tokio::time::timeout(PATIENCE, reached).await.is_err() {
            panic!("{what}: never; {:?}", self.worker.engine.status());
        }
    }

    async fn until_all_free(&self) {
        self.until("all blocks are free", |status| {
            status.blocks.free == BLOCKS && status.running == 0 && status.waiting == 0
        })
        .await;
    }

    async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send("POST", path, body.to_string().into_bytes(), &[]).await
    }

    async fn get(&self, path: &str) -> Answer {
        self.send("GET", path, Vec::new(), &[]).await
    }

    async fn send(
        &self,
        method: &str,
        path: &str,
        body: Vec<u8>,
        headers: &[(&str, &str)],
    ) -> Answer {
        let exchange = exchange(self.address, method, path, body, headers);
        tokio::time::timeout(PATIENCE, exchange).await.expect("an answer in time")
    }

    /// Drains and waits for the end.
    async fn stop(mut self) -> EngineEnd {
        self.shutdown.take().unwrap().send(()).unwrap();
        tokio::time::timeout(PATIENCE, self.ended).await.expect("an end in time").unwrap()
    }
}

fn start_mover(
    net: &LocalNet,
    name: &str,
    kv: &KvRegion,
    epochs: &EpochPage,
    engine: &EngineHandle,
) -> (crate::handover::mover::MoverHandle, PeerAddress) {
    let open = |role: &str| -> OpenTransport {
        let (net, name) = (net.clone(), format!("{name}/{role}"));
        Box::new(move || Ok(Box::new(LocalTransport::new(&net, &name)?) as Box<dyn Transport>))
    };
    let regions = MoverRegions { pool: kv.region.clone(), epochs: epochs.region().clone() };
    let sink = engine.mover_sink();
    Mover::start(open("serve"), open("move"), regions, sink, MoverSettings::default()).unwrap()
}

async fn exchange(
    address: SocketAddr,
    method: &str,
    path: &str,
    body: Vec<u8>,
    headers: &[(&str, &str)],
) -> Answer {
    let stream = TcpStream::connect(address).await.unwrap();
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    let driven = tokio::spawn(connection);
    let mut request = hyper::Request::builder().method(method).uri(path).header("host", "worker");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let response = sender.send_request(request.body(Full::<Bytes>::from(body)).unwrap()).await;
    let response = response.unwrap();
    let status = response.status().as_u16();
    let kind = response.headers().get("content-type").map_or("", |kind| kind.to_str().unwrap());
    let kind = kind.to_owned();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    driven.abort();
    Answer { status, kind, body: String::from_utf8(body.to_vec()).unwrap() }
}

fn completion(more: Value) -> Value {
    with(json!({"model": "M", "prompt": "hello world", "seed": 5}), more)
}

fn with(mut body: Value, more: Value) -> Value {
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

/// The generation request a router makes of a context answer.
fn follow_up(request: &Value, answer: &Value) -> Value {
    let mut params = answer["choices"][0]["disaggregated_params"].clone();
    params["request_type"] = json!("generation_only");
    params["ctx_usage"] = answer["usage"].clone();
    let ids = answer["prompt_token_ids"].clone();
    let is_chat = request.get("messages").is_some();
    let name = if is_chat { "prompt_token_ids" } else { "prompt" };
    with(request.clone(), json!({name: ids, "disaggregated_params": params}))
}

fn context(request: &Value, id: u64) -> Value {
    let params = json!({"request_type": "context_only", "disagg_request_id": id});
    let more = json!({"disaggregated_params": params, "stream": false, "stream_options": null});
    with(request.clone(), more)
}

/// A task's result, for tests that must not hang.
async fn in_time<T>(task: JoinHandle<Result<T, Infallible>>) -> T {
    match tokio::time::timeout(PATIENCE, task).await.expect("in time").unwrap() {
        Ok(value) => value,
        Err(never) => match never {},
    }
}
