//! A scripted worker: speaks the TensorRT-LLM main dialect (and Baton's release call) over real HTTP, remembers what it
//! was sent, and misbehaves when told to.

mod answers;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::BodyExt;
use http_body_util::combinators::BoxBody;
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};

use self::answers::{Pieces, context, cut, half, json_answer, usage, whole, words};
use crate::ledger::{Ledger, Missing};

/// What the worker does with the next requests.
#[derive(Clone, Debug)]
pub enum Behaviour {
    /// Answers as it should: a context pass with first token `A`, a generation with `words` more.
    Serve,
    /// The first token ends the text: `finish_reason` `stop`.
    EarlyStop,
    /// This status and body, whatever was asked.
    Refuse(u16, Value),
    /// The connection is closed without an answer.
    Close,
    /// No answer to an inference request, ever.
    Hang,
    /// No answer to anything, health included.
    Freeze,
    /// Half of a whole answer, then the connection is reset.
    Reset,
    /// The head of a good answer, then the connection is reset.
    Headed,
    /// What a context worker holds is read, then the connection is closed without an answer.
    Swallow,
    /// What this says of the request.
    By(Script),
    /// Each so many-th inference request is treated so, the others are served.
    Every(usize, Box<Behaviour>),
    /// A generation answer breaks off after this many events.
    BreakAfter(usize),
    /// A generation answer has this long between two events.
    Pace(Duration),
}

/// Says what is done with a request.
#[derive(Clone)]
pub struct Script(Arc<dyn Fn(&Seen) -> Behaviour + Send + Sync>);

impl Behaviour {
    /// What `script` says of each request.
    pub fn by(script: impl Fn(&Seen) -> Self + Send + Sync + 'static) -> Self {
        Self::By(Script(Arc::new(script)))
    }
}

impl std::fmt::Debug for Script {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Script")
    }
}

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Seen {
    /// `/v1/completions`, …
    pub path: String,
    /// Head.
    pub headers: HeaderMap,
    /// Body.
    pub body: Value,
}

impl Seen {
    /// `disaggregated_params.KEY`.
    pub fn param(&self, key: &str) -> &Value {
        &self.body["disaggregated_params"][key]
    }
}

/// A running mock; ends when dropped.
#[derive(Debug)]
pub struct MockWorker {
    /// Where it listens.
    pub address: SocketAddr,
    state: Arc<State>,
    accepting: Vec<AbortHandle>,
}

#[derive(Debug)]
struct State {
    baton: bool,
    words: usize,
    address: SocketAddr,
    ledger: Option<Ledger>,
    behaviour: Mutex<Behaviour>,
    asked: AtomicUsize,
    seen: Mutex<Vec<Seen>>,
    cancelled: AtomicUsize,
}

type Body = BoxBody<Bytes, std::io::Error>;

impl MockWorker {
    /// A worker that calls itself Baton's (`baton`) or TensorRT-LLM's, and generates `words` tokens after the first.
    ///
    /// # Errors
    /// If it cannot listen.
    pub async fn start(baton: bool, words: usize) -> Result<Self> {
        Self::start_with(baton, words, None).await
    }

    /// The same, keeping books: a context pass is issued, a generation takes what was issued to be read.
    ///
    /// # Errors
    /// If it cannot listen.
    pub async fn start_with(baton: bool, words: usize, ledger: Option<Ledger>) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let state = Arc::new(State {
            baton,
            words,
            address,
            ledger,
            behaviour: Mutex::new(Behaviour::Serve),
            asked: AtomicUsize::new(0),
            seen: Mutex::default(),
            cancelled: AtomicUsize::new(0),
        });
        let shared = Arc::clone(&state);
        let accepting = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((tcp, _)) = listener.accept().await {
                let state = Arc::clone(&shared);
                connections.spawn(serve_tcp(state, tcp));
            }
        });
        Ok(Self { address, state, accepting: vec![accepting.abort_handle()] })
    }

    /// Lets it listen at a Unix socket too.
    ///
    /// # Errors
    /// If it cannot.
    pub fn listen_at(&mut self, path: &Path) -> Result<()> {
        let listener = UnixListener::bind(path)?;
        let shared = Arc::clone(&self.state);
        let accepting = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((wire, _)) = listener.accept().await {
                connections.spawn(serve(Arc::clone(&shared), Arc::default(), wire));
            }
        });
        self.accepting.push(accepting.abort_handle());
        Ok(())
    }

    /// From the next request on.
    pub fn behave(&self, behaviour: Behaviour) {
        *lock(&self.state.behaviour) = behaviour;
    }

    /// All inference requests so far.
    pub fn requests(&self) -> Vec<Seen> {
        self.seen(|path| path.ends_with("completions"))
    }

    /// The ids that were released so far.
    pub fn released(&self) -> Vec<u64> {
        let calls = self.seen(|path| path == "/v1/disagg/release");
        calls.iter().filter_map(|call| call.body["disagg_request_id"].as_u64()).collect()
    }

    /// Requests whose client left before the answer was whole.
    pub fn cancelled(&self) -> usize {
        self.state.cancelled.load(Ordering::SeqCst)
    }

    fn seen(&self, wanted: impl Fn(&str) -> bool) -> Vec<Seen> {
        lock(&self.state.seen).iter().filter(|seen| wanted(&seen.path)).cloned().collect()
    }
}

impl Drop for MockWorker {
    fn drop(&mut self) {
        if let Some(ledger) = &self.state.ledger {
            ledger.died(self.address);
        }
        self.accepting.iter().for_each(AbortHandle::abort);
    }
}

/// One TCP connection to its end.
async fn serve_tcp(state: Arc<State>, tcp: TcpStream) {
    // A second descriptor outlives the connection, so that it can be reset.
    let Ok(tcp) = tcp.into_std() else { return };
    let (Ok(second), Ok(tcp)) = (tcp.try_clone(), TcpStream::from_std(tcp)) else { return };
    let reset = Arc::new(AtomicBool::new(false));
    serve(state, Arc::clone(&reset), tcp).await;
    if reset.load(Ordering::SeqCst)
        && let Ok(second) = TcpStream::from_std(second)
    {
        // Without it the connection would be ended instead.
        drop(second.set_zero_linger());
    }
}

/// Requests of one connection; `reset` is set when it is to be reset.
async fn serve<W>(state: Arc<State>, reset: Arc<AtomicBool>, wire: W)
where
    W: AsyncRead + AsyncWrite + Unpin + 'static,
{
    let service = service_fn(|request| answer(Arc::clone(&state), Arc::clone(&reset), request));
    let builder = hyper::server::conn::http1::Builder::new();
    drop(builder.serve_connection(TokioIo::new(wire), service).await);
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts a request as cancelled unless it was defused.
struct Unfinished(Arc<State>, bool);

impl Unfinished {
    /// The answer is whole, or cut by the script.
    fn finish(&mut self) {
        self.1 = false;
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if self.1 {
            self.0.cancelled.fetch_add(1, Ordering::SeqCst);
        }
    }
}

impl State {
    /// What the next request is to meet.
    fn next_behaviour(&self, inference: bool, seen: &Seen) -> Behaviour {
        let behaviour = lock(&self.behaviour).clone();
        match behaviour {
            Behaviour::By(script) if inference => script.0(seen),
            Behaviour::By(_) => Behaviour::Serve,
            Behaviour::Every(nth, what) if inference => {
                let asked = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
                if asked.is_multiple_of(nth) { *what } else { Behaviour::Serve }
            }
            Behaviour::Every(..) => Behaviour::Serve,
            other => other,
        }
    }

    /// Takes what a context worker holds, as the real one does before its first step; else the error's code.
    fn pull(&self, body: &Value) -> Result<(), &'static str> {
        let id = body["disaggregated_params"]["ctx_request_id"].as_u64();
        let (Some(ledger), Some(id)) = (&self.ledger, id) else { return Ok(()) };
        ledger.pull(id).map_err(|missing| match missing {
            Missing::LeaseGone => "kv_lease_gone",
            Missing::PeerUnreachable => "kv_peer_unreachable",
        })
    }
}

async fn answer(
    state: Arc<State>,
    reset: Arc<AtomicBool>,
    request: Request<Incoming>,
) -> Result<Response<Body>, std::io::Error> {
    let (head, body) = request.into_parts();
    let path = head.uri.path().to_owned();
    if matches!(*lock(&state.behaviour), Behaviour::Freeze) {
        std::future::pending::<()>().await;
    }
    match path.as_str() {
        "/health" => return Ok(whole(200, Bytes::new())),
        "/version" => return Ok(json_answer(200, &json!({"version": "1.3.0"}))),
        "/server_info" if state.baton => {
            return Ok(json_answer(200, &json!({"baton": {"version": "0.1.0"}})));
        }
        "/server_info" => return Ok(json_answer(200, &json!({}))),
        "/v1/models" => {
            let model = json!({"id": "mock", "object": "model", "created": 0, "owned_by": "mock"});
            return Ok(json_answer(200, &json!({"object": "list", "data": [model]})));
        }
        _ => {}
    }
    let mut unfinished = Unfinished(Arc::clone(&state), true);
    let bytes = body.collect().await.map_err(std::io::Error::other)?.to_bytes();
    let body: Value = serde_json::from_slice(&bytes).unwrap_or(Value::Null);
    let seen = Seen { path: path.clone(), headers: head.headers, body: body.clone() };
    lock(&state.seen).push(seen.clone());
    if path == "/v1/disagg/release" {
        unfinished.finish();
        if let (Some(ledger), Some(id)) = (&state.ledger, body["disagg_request_id"].as_u64()) {
            ledger.release(id);
        }
        return Ok(json_answer(200, &json!({})));
    }
    let behaviour = state.next_behaviour(path.ends_with("completions"), &seen);
    match &behaviour {
        Behaviour::Refuse(status, body) => {
            unfinished.finish();
            return Ok(json_answer(*status, body));
        }
        Behaviour::Close => {
            unfinished.finish();
            return Err(std::io::Error::other("closed as scripted"));
        }
        Behaviour::Hang => std::future::pending().await,
        _ => {}
    }
    let answer = if body["disaggregated_params"]["request_type"] == "context_only" {
        unfinished.finish();
        let early = matches!(behaviour, Behaviour::EarlyStop);
        if let (Some(ledger), Some(id), false) =
            (&state.ledger, body["disaggregated_params"]["disagg_request_id"].as_u64(), early)
        {
            ledger.issue(id, state.address);
        }
        json_answer(200, &context(&path, &body, early))
    } else if let Err(code) = state.pull(&body) {
        unfinished.finish();
        let error =
            json!({"message": "not there", "type": "server_error", "param": null, "code": code});
        return Ok(json_answer(503, &json!({"error": error})));
    } else {
        if matches!(behaviour, Behaviour::Headed | Behaviour::Swallow) {
            unfinished.finish();
        }
        generation(&state, &path, &body, behaviour.clone(), unfinished)
    };
    match behaviour {
        Behaviour::Reset => {
            reset.store(true, Ordering::SeqCst);
            half(answer).await
        }
        Behaviour::Headed => {
            reset.store(true, Ordering::SeqCst);
            Ok(cut(answer.into_parts().0, Bytes::new()))
        }
        Behaviour::Swallow => Err(std::io::Error::other("swallowed as scripted")),
        _ => Ok(answer),
    }
}

fn generation(
    state: &Arc<State>,
    path: &str,
    body: &Value,
    behaviour: Behaviour,
    mut unfinished: Unfinished,
) -> Response<Body> {
    let chat = path.ends_with("chat/completions");
    let count = state.words;
    if body["stream"] != true {
        unfinished.finish();
        let text: String = words(count).collect();
        let choice = if chat {
            json!({"index": 0, "finish_reason": "length",
                "message": {"role": "assistant", "content": text}})
        } else {
            json!({"index": 0, "finish_reason": "length", "text": text})
        };
        let object = if chat { "chat.completion" } else { "text_completion" };
        let answer = json!({"id": "cmpl-mock", "object": object, "created": 1,
            "model": body["model"], "choices": [choice], "usage": usage(count + 1)});
        return json_answer(200, &answer);
    }
    let (pieces, body) = mpsc::channel(16);
    tokio::spawn(async move {
        for (index, word) in words(count).enumerate() {
            if let Behaviour::BreakAfter(events) = behaviour
                && index == events
            {
                unfinished.finish();
                // What was sent before is to be on its way: an error at once would take it along.
                let _ = tokio::time::timeout(Duration::from_millis(50), pieces.closed()).await;
                let _ = pieces.send(Err(std::io::Error::other("broken as scripted"))).await;
                return;
            }
            if let Behaviour::Pace(pause) = behaviour
                && index > 0
            {
                // Either the time has passed or the reader is gone.
                let _ = tokio::time::timeout(pause, pieces.closed()).await;
            }
            let choice = if chat {
                json!({"index": 0, "delta": {"content": word}, "finish_reason": null})
            } else {
                json!({"index": 0, "text": word, "finish_reason": null})
            };
            let event = format!("data: {}\n\n", json!({"id": "cmpl-mock", "choices": [choice]}));
            if pieces.send(Ok(Frame::data(event.into()))).await.is_err() {
                return;
            }
        }
        let done = Ok(Frame::data(Bytes::from_static(b"data: [DONE]\n\n")));
        if pieces.send(done).await.is_ok() {
            unfinished.finish();
        }
    });
    let body = BoxBody::new(http_body_util::StreamBody::new(Pieces(body)));
    let mut response = Response::new(body);
    let kind = http::HeaderValue::from_static("text/event-stream");
    response.headers_mut().insert("content-type", kind);
    response
}
