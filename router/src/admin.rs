//! What operators ask, on a port of its own: it answers also when the public one is busy. Read-only so far.

use std::sync::Arc;

use async_trait::async_trait;
use baton_shared::wire::error::ErrorCode;
use http::{Method, Response, header};
use pingora_core::apps::http_app::ServeHttp;
use pingora_core::protocols::http::ServerSession;
use serde_json::{Value, json};

use crate::builder::Shared;
use crate::table::worker::Worker;

/// `/metrics`, `/healthz`, `/readyz`, `/admin/workers`.
#[derive(Debug)]
pub struct Admin {
    shared: Arc<Shared>,
}

impl Admin {
    /// The admin port of one router.
    pub fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    fn answer(&self, method: &Method, path: &str) -> Response<Vec<u8>> {
        if !matches!(path, "/metrics" | "/healthz" | "/readyz" | "/admin/workers") {
            return error(ErrorCode::NotFound, &format!("no such path `{path}`"));
        }
        if !matches!(*method, Method::GET | Method::HEAD) {
            return error(ErrorCode::MethodNotAllowed, "only GET is answered here");
        }
        match path {
            "/metrics" => whole(200, METRICS_TYPE, self.shared.render_metrics()),
            "/admin/workers" => whole(200, JSON_TYPE, self.workers().to_string()),
            // Being alive is to answer at all.
            "/healthz" => whole(200, TEXT_TYPE, "ok\n".to_owned()),
            _ if self.shared.is_ready() => whole(200, TEXT_TYPE, "ok\n".to_owned()),
            _ => whole(503, TEXT_TYPE, "not ready\n".to_owned()),
        }
    }

    fn workers(&self) -> Value {
        let table = self.shared.table.snapshot_full();
        let now = self.shared.table.now();
        let describe = |worker: &Arc<Worker>| {
            json!({
                "id": worker.id,
                "url": worker.endpoint,
                "role": worker.role,
                "weight": worker.weight,
                "dialect": worker.dialect().as_str(),
                "condition": worker.health.condition(now).as_str(),
                "in_flight": worker.in_flight(),
                "queued_tokens": worker.queued_tokens(),
            })
        };
        json!({
            "table_version": table.version,
            "workers": table.workers().map(describe).collect::<Vec<_>>(),
        })
    }
}

/// `Content-Type` of Prometheus' text form.
pub const METRICS_TYPE: &str = "text/plain; version=0.0.4";
const JSON_TYPE: &str = "application/json";
const TEXT_TYPE: &str = "text/plain";

#[async_trait]
impl ServeHttp for Admin {
    async fn response(&self, session: &mut ServerSession) -> Response<Vec<u8>> {
        let head = session.req_header();
        let mut answer = self.answer(&head.method, head.uri.path());
        if head.method == Method::HEAD {
            answer.body_mut().clear();
        }
        answer
    }
}

fn whole(status: u16, content_type: &'static str, body: String) -> Response<Vec<u8>> {
    let mut answer = Response::new(body.into_bytes());
    *answer.status_mut() = http::StatusCode::from_u16(status).expect("a constant status is valid");
    let length = answer.body().len();
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    headers.insert(header::CONTENT_LENGTH, length.into());
    answer
}

fn error(code: ErrorCode, message: &str) -> Response<Vec<u8>> {
    let body = json!(code.body(message, None)).to_string();
    let mut answer = whole(code.status(), JSON_TYPE, body);
    if code == ErrorCode::MethodNotAllowed {
        answer.headers_mut().insert(header::ALLOW, http::HeaderValue::from_static("GET, HEAD"));
    }
    answer
}
