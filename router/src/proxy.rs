//! The ready-made `ProxyHttp`: finds the route, hands completions to the engine, answers the rest itself.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use baton_shared::config::net::Endpoint;
use baton_shared::wire::error::ErrorCode;
use http::Method;
use pingora_core::modules::http::HttpModules;
use pingora_core::upstreams::peer::HttpPeer;
use pingora_error::{Error, ErrorType, Result};
use pingora_http::RequestHeader;
use pingora_proxy::{FailToProxy, ProxyHttp, Session};
use serde_json::{Value, json};

use crate::arrivals::{request_came, request_ended};
use crate::builder::Shared;
use crate::engine::downstream::{BodyError, is_clearly_framed};
use crate::engine::{Outcome, Reply, Router, RouterCtx, early};
use crate::limits::Admitted;
use crate::table::Phase;
use crate::table::worker::Worker;

/// How long an HTTP/2 connection has to write the end of an answer that broke off.
const LAST_WORDS: Duration = Duration::from_millis(20);

/// What an embedder may add; the defaults do nothing.
pub trait Hooks: Send + Sync + 'static {
    /// Whether a request is served at all; `Err` is the answer it gets instead.
    fn authorize(&self, head: &RequestHeader) -> std::result::Result<(), Reply> {
        let _ = head;
        Ok(())
    }

    /// A request has ended; the watchdog's own are left out.
    fn access(&self, head: &RequestHeader, cx: &RouterCtx) {
        let _ = (head, cx);
    }
}

impl Hooks for () {}

/// Serves one router's public port.
#[derive(Debug)]
pub struct RouterProxy<H: Hooks = ()> {
    shared: Arc<Shared>,
    hooks: H,
}

/// State of one request.
#[derive(Debug)]
pub struct Cx {
    /// The engine's.
    pub router: RouterCtx,
    /// Held until the connection has the whole answer, so that a drain does not end before.
    _visit: Option<Admitted>,
}

/// Paths beside the completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page {
    Models,
    Health,
    Version,
    ClusterInfo,
    Metrics,
}

impl Page {
    fn of_path(path: &str) -> Option<Self> {
        Some(match path {
            "/v1/models" => Self::Models,
            "/health" => Self::Health,
            "/version" => Self::Version,
            "/cluster_info" => Self::ClusterInfo,
            "/prometheus/metrics" => Self::Metrics,
            _ => return None,
        })
    }
}

impl<H: Hooks> RouterProxy<H> {
    /// A proxy in front of `shared`'s workers.
    pub fn new(shared: Arc<Shared>, hooks: H) -> Self {
        Self { shared, hooks }
    }

    async fn route(&self, session: &mut Session, cx: &mut RouterCtx) -> Result<Outcome> {
        let router = &self.shared.router;
        if self.shared.is_draining() {
            // Served, but not asked again on this connection.
            session.set_keepalive(None);
        }
        if !is_clearly_framed(session.as_downstream()) {
            let reply = Reply::error(ErrorCode::InvalidRequest, &BodyError::Ambiguous.to_string());
            return router.reply(session, cx, Reply { keep_alive: false, ..reply }).await;
        }
        if let Err(reply) = self.hooks.authorize(session.req_header()) {
            return router.reply(session, cx, reply).await;
        }
        let path = session.req_header().uri.path();
        if Router::matches(path) {
            return Box::pin(router.handle(session, cx)).await;
        }
        let Some(page) = Page::of_path(path) else {
            let message = format!("no such path `{}`", path.chars().take(200).collect::<String>());
            return router.reply_error(session, cx, ErrorCode::NotFound, &message).await;
        };
        let method = session.req_header().method.clone();
        if !matches!(method, Method::GET | Method::HEAD) {
            let mut reply = Reply::error(ErrorCode::MethodNotAllowed, "only GET is allowed here");
            reply.allow = "GET, HEAD";
            return router.reply(session, cx, reply).await;
        }
        let mut reply = match page {
            Page::Models => return Box::pin(router.models(session, cx)).await,
            Page::Health if self.shared.is_ready() => Reply::json(200, Vec::new()),
            Page::Health => self.why_not_ready(),
            Page::Version => page_json(&json!({"version": env!("CARGO_PKG_VERSION")})),
            Page::ClusterInfo => page_json(&self.cluster_info()),
            Page::Metrics => {
                let text = self.shared.render_metrics().into();
                Reply {
                    content_type: crate::admin::METRICS_TYPE.into(),
                    ..Reply::json(200, vec![text])
                }
            }
        };
        if method == Method::HEAD {
            reply.body.clear();
        }
        router.reply(session, cx, reply).await
    }

    fn why_not_ready(&self) -> Reply {
        let (table, now) = (self.shared.table.snapshot_full(), self.shared.table.now());
        let missing = Phase::ALL.into_iter().find(|phase| table.usable(*phase, now) == 0);
        let message = match missing {
            Some(phase) => format!("no usable {} server", phase.as_str()),
            None => "not ready".to_owned(),
        };
        Reply::error(ErrorCode::NoWorkers, &message)
    }

    /// TensorRT-LLM's shape; workers are those that would be used now.
    fn cluster_info(&self) -> Value {
        let (table, now) = (self.shared.table.snapshot_full(), self.shared.table.now());
        let list = |phase: Phase| {
            let usable = table.pool(phase).iter().filter(|worker| worker.usable(now));
            usable.map(|worker| describe(worker, phase)).collect::<Vec<_>>()
        };
        json!({
            "is_ready": self.shared.is_ready(),
            "current_workers": {
                "context_servers": list(Phase::Context),
                "generation_servers": list(Phase::Generation),
            },
            "minimal_instances": {"context_servers": 1, "generation_servers": 1},
        })
    }

    fn log_access(&self, session: &Session, cx: &RouterCtx) {
        let head = session.req_header();
        if self.shared.heartbeat.is_on(head) {
            return;
        }
        self.hooks.access(head, cx);
        if !self.shared.table.snapshot().config.log.access {
            return;
        }
        let (outcome, status) = Outcome::describe(cx.outcome);
        let name =
            |worker: &Option<Arc<Worker>>| worker.as_ref().map(|worker| worker.id.to_string());
        tracing::info!(
            target: "baton_router::access",
            method = %head.method,
            path = head.uri.path(),
            request_id = %cx.request_id,
            outcome,
            status,
            body_bytes = cx.body_bytes,
            context = name(&cx.trail.context),
            generation = name(&cx.trail.generation),
            passes = cx.trail.passes,
            first_byte_ms = cx.first_byte.map(|time| time.as_millis() as u64),
            took_ms = cx.started.elapsed().as_millis() as u64,
            "request"
        );
    }
}

fn page_json(page: &Value) -> Reply {
    Reply::json(200, vec![page.to_string().into()])
}

/// Roles are numbered as upstream does: 0 = context, 1 = generation.
fn describe(worker: &Worker, phase: Phase) -> Value {
    let (host, port) = match &worker.endpoint {
        Endpoint::Tcp(at) => (at.host.clone(), at.port),
        Endpoint::Unix(_) => (worker.endpoint.to_string(), 0),
    };
    json!({"worker_id": worker.id, "host": host, "port": port, "role": phase as u8})
}

#[async_trait]
impl<H: Hooks> ProxyHttp for RouterProxy<H> {
    type CTX = Cx;

    fn new_ctx(&self) -> Cx {
        Cx { router: RouterCtx::default(), _visit: self.shared.visits.admit(usize::MAX) }
    }

    fn init_downstream_modules(&self, _modules: &mut HttpModules) {
        // None: the default would put every answer through a compressor that is switched off.
    }

    async fn early_request_filter(&self, session: &mut Session, _cx: &mut Cx) -> Result<()> {
        request_came();
        early(session.as_downstream_mut());
        Ok(())
    }

    async fn request_filter(&self, session: &mut Session, cx: &mut Cx) -> Result<bool> {
        cx.router.begin(session.as_downstream());
        self.route(session, &mut cx.router).await.map(|_| true)
    }

    async fn upstream_peer(&self, _session: &mut Session, _cx: &mut Cx) -> Result<Box<HttpPeer>> {
        Error::e_explain(ErrorType::InternalError, "every request is answered by the filter")
    }

    async fn fail_to_proxy(&self, session: &mut Session, _e: &Error, cx: &mut Cx) -> FailToProxy {
        fail(session, &cx.router).await
    }

    fn suppress_error_log(&self, _session: &Session, _cx: &Cx, _error: &Error) -> bool {
        // Counted, and logged where it happened.
        true
    }

    async fn logging(&self, session: &mut Session, _e: Option<&Error>, cx: &mut Cx) {
        self.log_access(session, &cx.router);
        request_ended();
    }
}

/// What `fail_to_proxy` must do for a request that the engine has had: close an answer that is not whole without
/// ending its framing, else the client would take it for whole.
pub async fn fail(session: &mut Session, cx: &RouterCtx) -> FailToProxy {
    session.set_keepalive(None);
    let untouched = session.response_written().is_none();
    let error_code = match cx.outcome {
        None if untouched => {
            let reply = Reply::error(ErrorCode::Internal, "the router failed");
            // The connection is closed either way.
            let _sent = reply.send(session, cx.request_id.as_str()).await;
            ErrorCode::Internal.status()
        }
        _ => {
            if session.as_downstream().is_http2() {
                // A reset would overtake what was said before.
                tokio::time::sleep(LAST_WORDS).await;
            }
            // HTTP/2: RST_STREAM with an error; just dropped, it would look like the client's own doing.
            session.as_downstream_mut().shutdown().await;
            0
        }
    };
    FailToProxy { error_code, can_reuse_downstream: false }
}
