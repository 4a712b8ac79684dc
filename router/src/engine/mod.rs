//! One request from head to done: the handle that a proxy, ours or a foreign one, calls.
//!
//! [`Router::handle`] reads the body, lets `route` drive both hops while the client is watched, and writes the
//! answer. Point of no return = the answer's head has been handed to the client: before it every failure may move
//! to another worker, after it nothing is repeated.

mod ctx;
pub mod downstream;
mod features;
mod hop;
mod lease;
mod orphan;
pub mod plan;
pub mod recent;
pub mod reply;
mod route;
mod stream;

use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Duration;

use baton_shared::id::{DisaggRequestId, IdMint};
use baton_shared::wire::error::ErrorCode;
use http::Method;
use pingora_core::protocols::http::ServerSession;
use pingora_error::{Error, ErrorType, Result};

pub use self::ctx::{Outcome, RouterCtx, Trail};
use self::downstream::{BodyError, BodyLimits};
pub use self::downstream::{Downstream, KEEP_ALIVE, early};
use self::lease::Releaser;
use self::recent::Recent;
pub use self::reply::Reply;
use self::route::{Route, Routed};
use self::stream::{End, Patience};
use crate::client::{self, Request, Target};
use crate::dialect::Api;
use crate::dialect::trtllm::ClientRequest;
use crate::health;
use crate::limits::{Admitted, InFlight};
use crate::metrics::{Endpoint, HopOutcome, Metrics, RequestOutcome};
use crate::policy::{Features, Tried};
use crate::table::keys::LiveKeys;
use crate::table::{Phase, Table};

/// How long a worker may take to say which models it has.
const MODELS_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest list of models, in bytes.
const MAX_MODELS: usize = 1 << 20;

/// What a [`Router`] is made of.
#[derive(Debug)]
pub struct Parts {
    /// Which workers there are.
    pub table: Arc<Table>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Keys shared with the workers.
    pub keys: LiveKeys,
    /// Requests being served.
    pub in_flight: InFlight,
    /// Ids of context requests; its node and process numbers should differ between routers.
    pub mint: IdMint,
}

/// The engine: routes single requests. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Router(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    table: Arc<Table>,
    metrics: Arc<Metrics>,
    keys: LiveKeys,
    in_flight: InFlight,
    mint: IdMint,
    releaser: Arc<Releaser>,
    recent: Recent,
}

/// What is left of a request once it has been routed.
enum Served {
    /// Nothing.
    Answered(Outcome),
    /// A stream to forward; the request counts as in flight meanwhile.
    Streams(Box<route::Stream>, Patience, Admitted),
}

impl Shared {
    fn mint_id(&self) -> DisaggRequestId {
        let now_ms = u64::try_from(self.table.now().as_millis()).unwrap_or(u64::MAX);
        self.mint.next(now_ms)
    }
}

impl Router {
    /// A router of these parts.
    pub fn new(parts: Parts) -> Self {
        let Parts { table, metrics, keys, in_flight, mint } = parts;
        let releaser = Releaser::new(Arc::clone(&table), keys.clone(), Arc::clone(&metrics));
        let releaser = Arc::new(releaser);
        let recent = Recent::default();
        Self(Arc::new(Shared { table, metrics, keys, in_flight, mint, releaser, recent }))
    }

    /// Whether [`Self::handle`] is for this path.
    pub fn matches(path: &str) -> bool {
        Api::of_path(path).is_some()
    }

    /// The table it routes by.
    pub fn table(&self) -> &Arc<Table> {
        &self.0.table
    }

    /// What it counts.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.0.metrics
    }

    /// The last requests.
    pub fn recent(&self) -> &Recent {
        &self.0.recent
    }

    /// Requests being served.
    pub fn in_flight(&self) -> &InFlight {
        &self.0.in_flight
    }

    /// Resolves when no request is being served and every lease left behind was given back or given up.
    pub async fn drained(&self) {
        self.0.in_flight.idle().await;
        self.0.releaser.idle().await;
    }

    /// Serves one request to a path that [`Self::matches`], answer included; `cx` should have begun.
    ///
    /// # Errors
    /// When the answer is not whole ([`Outcome::Aborted`], [`Outcome::ClientGone`]): the proxy must not end the
    /// answer's framing, and must close the connection (HTTP/1.1) or reset the stream (HTTP/2).
    pub async fn handle<D: Downstream>(
        &self,
        downstream: &mut D,
        cx: &mut RouterCtx,
    ) -> Result<Outcome> {
        let path = downstream.core().req_header().uri.path();
        let Some(api) = Api::of_path(path) else {
            return self.reply_error(downstream, cx, ErrorCode::NotFound, "no such path").await;
        };
        if downstream.core().req_header().method != Method::POST {
            let message = "only POST is allowed here";
            return self.reply_error(downstream, cx, ErrorCode::MethodNotAllowed, message).await;
        }
        let metrics = &self.0.metrics;
        metrics.request_started();
        let served = Box::pin(self.serve(downstream, cx, api)).await;
        let ended = match served {
            Ok(Served::Answered(outcome)) => Ok(outcome),
            // All that was needed until here is gone: streams last, and there are many.
            Ok(Served::Streams(stream, patience, _admitted)) => {
                Box::pin(self.forward(downstream, cx, endpoint(api), stream, patience)).await
            }
            Err(error) => Err(error),
        };
        let outcome = match cx.outcome {
            Some(Outcome::Answered(..400)) => RequestOutcome::Ok,
            Some(Outcome::Answered(400..500)) => RequestOutcome::ClientError,
            Some(Outcome::Answered(500..)) => RequestOutcome::ServerError,
            Some(Outcome::Aborted) => RequestOutcome::Aborted,
            Some(Outcome::ClientGone) | None => RequestOutcome::ClientGone,
        };
        metrics.request_ended(endpoint(api), outcome, cx.started.elapsed());
        self.0.recent.add(api, cx);
        ended
    }

    async fn serve<D: Downstream>(
        &self,
        downstream: &mut D,
        cx: &mut RouterCtx,
        api: Api,
    ) -> Result<Served> {
        let config = Arc::clone(&self.0.table.snapshot_full().config);
        let deadline = tokio::time::Instant::now() + config.routing.request_timeout.duration();
        let Some(admitted) = self.0.in_flight.admit(config.limits.max_in_flight) else {
            self.0.metrics.refused();
            let message = format!("already {} requests in flight", config.limits.max_in_flight);
            let refused = self.reply_error(downstream, cx, ErrorCode::QueueFull, &message).await;
            return refused.map(Served::Answered);
        };
        let limits = BodyLimits {
            max: config.limits.max_body.as_usize(),
            timeout: config.limits.body_timeout.duration(),
        };
        let body = match downstream::read_body(downstream.core(), limits).await {
            Ok(body) => body,
            Err(error) => {
                return self.refuse_body(downstream, cx, error).await.map(Served::Answered);
            }
        };
        cx.body_bytes = body.len();
        let request = match ClientRequest::parse(api, body) {
            Ok(request) => request,
            Err(error) => {
                let message = error.to_string();
                let code = ErrorCode::InvalidRequest;
                let refused = self.reply_error(downstream, cx, code, &message).await;
                return refused.map(Served::Answered);
            }
        };
        self.0.metrics.request_is(request.stream);
        let lines = cx.lines();
        let headers = &downstream.core().req_header().headers;
        let features = features::features(&request, headers, &config);
        let route =
            Route::new(&self.0, &config, &request, features, &lines, deadline, &mut cx.trail);
        let routed = tokio::select! {
            biased;
            routed = Box::pin(route.run()) => routed,
            () = downstream::client_gone(downstream.core()) => {
                return Err(cx.gone("the client left before its answer began"));
            }
        };
        drop(request);
        match routed {
            // Written to a client that has left it would pass for answered.
            Routed::Reply(reply) if reply.status >= 500 && is_gone(downstream.core()) => {
                Err(cx.gone("the client left before it was told of a failure"))
            }
            Routed::Reply(reply) => {
                self.count_first_byte(cx, endpoint(api), reply.status);
                self.reply(downstream, cx, reply).await.map(Served::Answered)
            }
            Routed::Events(events) => {
                self.count_first_byte(cx, endpoint(api), 200);
                let sent = async {
                    reply::send_stream_head(downstream, cx.request_id.as_str()).await?;
                    downstream.body(events, true).await
                };
                cx.sent(sent.await, 200).map(Served::Answered)
            }
            Routed::Stream(stream) => {
                let patience = Patience { idle: config.routing.idle_timeout.duration(), deadline };
                Ok(Served::Streams(stream, patience, admitted))
            }
        }
    }

    async fn forward<D: Downstream>(
        &self,
        downstream: &mut D,
        cx: &mut RouterCtx,
        endpoint: Endpoint,
        stream: Box<route::Stream>,
        patience: Patience,
    ) -> Result<Outcome> {
        let route::Stream { mut exchange, first, hop, worker } = *stream;
        if reply::send_stream_head(downstream, cx.request_id.as_str()).await.is_err() {
            return Err(cx.gone("the client left before its answer began"));
        }
        self.count_first_byte(cx, endpoint, 200);
        match stream::forward(downstream, &mut exchange, first, patience).await {
            End::Complete => {
                exchange.finish();
                hop.end(HopOutcome::Ok);
                cx.outcome = Some(Outcome::Answered(200));
                Ok(Outcome::Answered(200))
            }
            End::Broken(why) => {
                hop.end(HopOutcome::Failed);
                self.0.table.report(&worker, health::Outcome::Failed);
                tracing::warn!(worker = %worker.id, request_id = %cx.request_id, why, "answer broke off");
                cx.outcome = Some(Outcome::Aborted);
                Error::e_explain(ErrorType::ConnectionClosed, "the worker broke off its answer")
            }
            End::ClientGone => Err(cx.gone("the client left during its answer")),
        }
    }

    fn count_first_byte(&self, cx: &mut RouterCtx, endpoint: Endpoint, status: u16) {
        let after = cx.started.elapsed();
        cx.first_byte = Some(after);
        if status < 300 {
            self.0.metrics.first_token(endpoint, after);
        }
    }

    async fn refuse_body<D: Downstream>(
        &self,
        downstream: &mut D,
        cx: &mut RouterCtx,
        error: BodyError,
    ) -> Result<Outcome> {
        let code = match &error {
            BodyError::TooLarge(_) => ErrorCode::BodyTooLarge,
            BodyError::Encoding(_) => ErrorCode::UnsupportedEncoding,
            BodyError::Late(_) => ErrorCode::BodyTimeout,
            BodyError::Gzip | BodyError::Framing | BodyError::Ambiguous => {
                ErrorCode::InvalidRequest
            }
            BodyError::Gone => return Err(cx.gone("the client left while it sent its request")),
        };
        let mut reply = Reply::error(code, &error.to_string());
        reply.keep_alive &= !matches!(error, BodyError::Framing | BodyError::Ambiguous);
        let closes = !reply.keep_alive;
        let answered = self.reply(downstream, cx, reply).await?;
        if closes {
            downstream::linger(downstream.core()).await;
        }
        Ok(answered)
    }

    /// Serves `GET /v1/models`: what a usable worker says, a generation worker first.
    ///
    /// # Errors
    /// As [`Self::handle`].
    pub async fn models<D: Downstream>(
        &self,
        downstream: &mut D,
        cx: &mut RouterCtx,
    ) -> Result<Outcome> {
        let (features, table) = (Features::default(), &self.0.table);
        let mut tried = Tried::default();
        let mut why = "no worker is usable".to_owned();
        for phase in [Phase::Generation, Phase::Generation, Phase::Context] {
            let Some(worker) = table.pick(phase, &features, &tried) else { continue };
            tried.add(&worker);
            let lines = cx.lines();
            let head = worker.heads.get(Target::Models);
            let request = Request { head, lines: lines.as_bytes(), pieces: &[] };
            let addresses = hop::addresses(&worker);
            match client::call(&addresses, request, MODELS_TIMEOUT, MAX_MODELS).await {
                Ok(answer) if answer.head.status == 200 => {
                    let kind = &answer.head.content_type;
                    let reply = Reply::forwarded(200, kind, answer.body);
                    return self.reply(downstream, cx, reply).await;
                }
                Ok(answer) => {
                    why = format!("worker `{}`: status {}", worker.id, answer.head.status)
                }
                Err(error) => why = format!("worker `{}`: {error}", worker.id),
            }
        }
        self.reply_error(downstream, cx, ErrorCode::NoWorkers, &why).await
    }

    /// Sends a whole answer.
    ///
    /// # Errors
    /// The client left.
    pub async fn reply<D: Downstream>(
        &self,
        downstream: &mut D,
        cx: &mut RouterCtx,
        reply: Reply,
    ) -> Result<Outcome> {
        let status = reply.status;
        // Boxed, or the future of every stream would have room for this.
        let sent = Box::pin(reply.send(downstream, cx.request_id.as_str())).await;
        cx.sent(sent, status)
    }

    /// Sends an error in OpenAI's form.
    ///
    /// # Errors
    /// The client left.
    pub async fn reply_error<D: Downstream>(
        &self,
        downstream: &mut D,
        cx: &mut RouterCtx,
        code: ErrorCode,
        message: &str,
    ) -> Result<Outcome> {
        self.reply(downstream, cx, Reply::error(code, message)).await
    }
}

/// Whether the client has left, as far as is known now.
fn is_gone(session: &mut ServerSession) -> bool {
    let gone = pin!(downstream::client_gone(session));
    gone.poll(&mut Context::from_waker(Waker::noop())).is_ready()
}

fn endpoint(api: Api) -> Endpoint {
    match api {
        Api::Completions => Endpoint::Completions,
        Api::Chat => Endpoint::Chat,
    }
}

#[cfg(test)]
mod choice_tests;
#[cfg(test)]
mod record_tests;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
