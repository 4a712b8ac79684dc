//! What operators ask and order, on a port of its own: it answers also when the public one is busy.
//!
//! `/metrics`, `/healthz` and `/readyz` are open; `/admin/*` wants the token where there is one. Nothing that a browser
//! sends on behalf of some page is obeyed: pages may not, but could, reach a loopback port.

pub mod token;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use baton_shared::wire::error::ErrorCode;
use http::{HeaderValue, Method, Response, header};
use pingora_core::apps::http_app::ServeHttp;
use pingora_core::protocols::http::ServerSession;
use serde_json::{Value, json};

use self::token::Token;
use crate::builder::Shared;
use crate::engine::Outcome;
use crate::engine::recent::Past;
use crate::table::reload::{Change, ReloadError, Reloaded};
use crate::table::worker::Worker;

/// Longest body of an order, in bytes: as long as a configuration file may be.
const MAX_BODY: usize = 4 << 20;
/// How long an order's body may take.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// The admin port of one router.
#[derive(Debug)]
pub struct Admin {
    shared: Arc<Shared>,
    token: Option<Token>,
}

/// What is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Page<'a> {
    Metrics,
    Healthz,
    Readyz,
    Workers,
    Requests,
    Drain { worker: &'a str, drained: bool },
    Table,
    Rollback,
    LogLevel,
}

impl<'a> Page<'a> {
    fn of_path(path: &'a str) -> Option<Self> {
        let of_worker = path.strip_prefix("/admin/workers/").and_then(|rest| {
            // A worker's name may hold slashes; no character of it needs escaping.
            let (worker, order) = rest.rsplit_once('/')?;
            match order {
                "drain" => Some(Self::Drain { worker, drained: true }),
                "undrain" => Some(Self::Drain { worker, drained: false }),
                _ => None,
            }
        });
        Some(match path {
            "/metrics" => Self::Metrics,
            "/healthz" => Self::Healthz,
            "/readyz" => Self::Readyz,
            "/admin/workers" => Self::Workers,
            "/admin/requests" => Self::Requests,
            "/admin/table" => Self::Table,
            "/admin/table/rollback" => Self::Rollback,
            "/admin/log-level" => Self::LogLevel,
            _ => return of_worker,
        })
    }

    fn is_open(self) -> bool {
        matches!(self, Self::Metrics | Self::Healthz | Self::Readyz)
    }

    /// For the `Allow` header.
    fn methods(self) -> &'static str {
        match self {
            Self::Metrics | Self::Healthz | Self::Readyz | Self::Workers | Self::Requests => {
                "GET, HEAD"
            }
            Self::Table | Self::LogLevel => "GET, HEAD, PUT",
            Self::Drain { .. } | Self::Rollback => "POST",
        }
    }
}

impl Admin {
    /// The admin port of one router; without a `token` whoever reaches it may use all of it.
    pub fn new(shared: Arc<Shared>, token: Option<Token>) -> Self {
        Self { shared, token }
    }

    async fn answer(&self, session: &mut ServerSession) -> Result<Response<Vec<u8>>, Refusal> {
        let head = session.req_header();
        let (method, path) = (head.method.clone(), head.uri.path().to_owned());
        let not_found = || Refusal::new(ErrorCode::NotFound, format!("no such path `{path}`"));
        let page = Page::of_path(&path).ok_or_else(not_found)?;
        let authorization = head.headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes);
        if let Some(token) = self.token.as_ref().filter(|_| !page.is_open())
            && !token.is_in(authorization)
        {
            let message = "`Authorization: Bearer TOKEN` with the token of `server.admin_token_file` is needed";
            return Err(Refusal::new(ErrorCode::Unauthorized, message));
        }
        let mut methods = page.methods().split(", ");
        if !methods.any(|allowed| allowed == method.as_str()) {
            let message = format!("only {} is answered here", page.methods());
            let allow = Some(page.methods());
            return Err(Refusal { allow, ..Refusal::new(ErrorCode::MethodNotAllowed, message) });
        }
        if matches!(method, Method::GET | Method::HEAD) {
            return self.show(page);
        }
        if head.headers.contains_key(header::ORIGIN) {
            let message = "a web page may not order this: leave out `Origin`";
            return Err(Refusal::new(ErrorCode::Unauthorized, message));
        }
        let is_json = head
            .headers
            .get(header::CONTENT_TYPE)
            .is_some_and(|kind| kind.as_bytes().starts_with(JSON_TYPE.as_bytes()));
        let body = body(session).await?;
        self.obey(page, body, is_json)
    }

    fn show(&self, page: Page<'_>) -> Result<Response<Vec<u8>>, Refusal> {
        let text = |status, text: &str| whole(status, TEXT_TYPE, text.to_owned());
        Ok(match page {
            Page::Metrics => whole(200, METRICS_TYPE, self.shared.render_metrics()),
            // Being alive is to answer at all.
            Page::Healthz => text(200, "ok\n"),
            Page::Readyz if self.shared.is_ready() => text(200, "ok\n"),
            Page::Readyz => text(503, "not ready\n"),
            Page::Workers => page_json(&self.workers()),
            Page::Requests => page_json(&self.requests()),
            Page::Table => page_json(&self.table()?),
            Page::LogLevel => {
                let level = self.shared.reloader.log_level().ok_or_else(no_logs)?;
                page_json(&json!({ "level": level }))
            }
            Page::Drain { .. } | Page::Rollback => page_json(&Value::Null),
        })
    }

    fn obey(
        &self,
        page: Page<'_>,
        body: String,
        is_json: bool,
    ) -> Result<Response<Vec<u8>>, Refusal> {
        let reloader = &self.shared.reloader;
        match page {
            Page::Table => {
                let text = if is_json { as_toml(&body)? } else { body };
                let done = reloader.put(text).map_err(|error| match error {
                    // Lines of a text that was made from the given one say nothing.
                    ReloadError::Config(mut error) if is_json => {
                        error.line = None;
                        ReloadError::Config(error)
                    }
                    other => other,
                });
                done.map(|done| reloaded(&done)).map_err(Refusal::invalid)
            }
            Page::Rollback => {
                reloader.rollback().map(|done| reloaded(&done)).map_err(Refusal::invalid)
            }
            Page::LogLevel => {
                let level = body.trim();
                reloader.set_log_level(level).ok_or_else(no_logs)?.map_err(Refusal::invalid)?;
                Ok(page_json(&json!({ "level": level })))
            }
            Page::Drain { worker, drained } => {
                let changed = self.shared.table.set_drained(worker, drained).ok_or_else(|| {
                    Refusal::new(ErrorCode::NotFound, format!("no worker is called `{worker}`"))
                })?;
                Ok(page_json(&json!({"id": worker, "drained": drained, "changed": changed})))
            }
            Page::Metrics | Page::Healthz | Page::Readyz | Page::Workers | Page::Requests => {
                self.show(page)
            }
        }
    }

    fn workers(&self) -> Value {
        let table = self.shared.table.snapshot_full();
        let now = self.shared.table.now();
        let describe = |worker: &Arc<Worker>, removed: bool| {
            let history: Vec<_> = worker
                .history()
                .iter()
                .map(|past| {
                    let change = past.change;
                    json!({
                        "at_ms": unix_ms(past.at),
                        "from": change.from.as_str(),
                        "to": change.to.as_str(),
                        "event": format!("{:?}", change.event),
                    })
                })
                .collect();
            json!({
                "id": worker.id,
                "url": worker.endpoint,
                "role": worker.role,
                "weight": worker.weight,
                "dialect": worker.dialect().as_str(),
                "condition": worker.health.condition(now).as_str(),
                "drained": worker.is_drained(),
                "removed": removed,
                "in_flight": worker.in_flight(),
                "queued_tokens": worker.queued_tokens(),
                "history": history,
            })
        };
        let leaving = self.shared.table.leaving();
        let listed = table.workers().map(|worker| describe(worker, false));
        let workers: Vec<_> =
            listed.chain(leaving.iter().map(|worker| describe(worker, true))).collect();
        json!({"table_version": table.version, "workers": workers})
    }

    /// The latest first.
    fn requests(&self) -> Value {
        let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let describe = |past: Past| {
            let (outcome, status) = Outcome::describe(past.outcome);
            json!({
                "ended_ms": unix_ms(past.ended),
                "path": past.api.path(),
                "request_id": past.request_id,
                "outcome": outcome,
                "status": status,
                "body_bytes": past.body_bytes,
                "context": past.context.map(|worker| worker.id.clone()),
                "generation": past.generation.map(|worker| worker.id.clone()),
                "passes": past.passes,
                "first_byte_ms": past.first_byte.map(milliseconds),
                "took_ms": milliseconds(past.took),
            })
        };
        let requests: Vec<_> =
            self.shared.router.recent().list().into_iter().map(describe).collect();
        json!({ "requests": requests })
    }

    fn table(&self) -> Result<Value, Refusal> {
        let table = self.shared.table.snapshot_full();
        let (origin, earlier) = (self.shared.reloader.origin(), self.shared.reloader.earlier());
        let config = serde_json::to_value(table.config.as_ref().clone().spelled_out())
            .map_err(|error| Refusal::new(ErrorCode::Internal, error.to_string()))?;
        Ok(json!({
            "version": table.version,
            "source": origin.source.as_str(),
            "since_ms": unix_ms(origin.since),
            "file": self.shared.reloader.file(),
            "earlier": earlier,
            "table": config,
        }))
    }
}

/// What an order did.
fn reloaded(done: &Reloaded) -> Response<Vec<u8>> {
    let changes: Vec<_> = done.changes.iter().map(Change::to_string).collect();
    page_json(&json!({"version": done.version, "changes": changes}))
}

/// A table in JSON, as [`Admin::table`] shows it, as TOML.
fn as_toml(body: &str) -> Result<String, Refusal> {
    let table: toml::Table = serde_json::from_str(body)
        .map_err(|error| Refusal::invalid(format!("the body is not a table in JSON: {error}")))?;
    toml::to_string(&table).map_err(Refusal::invalid)
}

/// The whole body of an order, which must be text.
async fn body(session: &mut ServerSession) -> Result<String, Refusal> {
    let read = async {
        let mut body = Vec::new();
        loop {
            match session.read_request_body().await {
                Ok(None) => return Ok(body),
                Ok(Some(piece)) if body.len() + piece.len() <= MAX_BODY => {
                    body.extend_from_slice(&piece);
                }
                Ok(Some(_)) => {
                    let message = format!("at most {MAX_BODY} bytes are read");
                    return Err(Refusal::new(ErrorCode::BodyTooLarge, message));
                }
                Err(_) => return Err(Refusal::invalid("the body broke off")),
            }
        }
    };
    let late = |_| Refusal::new(ErrorCode::BodyTimeout, format!("no body in {BODY_TIMEOUT:?}"));
    let body = tokio::time::timeout(BODY_TIMEOUT, read).await.map_err(late)??;
    String::from_utf8(body).map_err(|_| Refusal::invalid("the body is not UTF-8 text"))
}

fn no_logs() -> Refusal {
    Refusal::new(ErrorCode::NotFound, "logs of this process are not the router's")
}

fn unix_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// `Content-Type` of Prometheus' text form.
pub const METRICS_TYPE: &str = "text/plain; version=0.0.4";
const JSON_TYPE: &str = "application/json";
const TEXT_TYPE: &str = "text/plain";

#[async_trait]
impl ServeHttp for Admin {
    async fn response(&self, session: &mut ServerSession) -> Response<Vec<u8>> {
        let is_head = session.req_header().method == Method::HEAD;
        let mut answer = match self.answer(session).await {
            Ok(answer) => answer,
            Err(refusal) => {
                // What is left of the body is not worth reading.
                session.set_keepalive(None);
                refusal.into()
            }
        };
        if is_head {
            answer.body_mut().clear();
        }
        answer
    }
}

/// Why an order or a question is refused.
#[derive(Debug)]
struct Refusal {
    code: ErrorCode,
    message: String,
    allow: Option<&'static str>,
}

impl Refusal {
    fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), allow: None }
    }

    fn invalid(why: impl std::fmt::Display) -> Self {
        Self::new(ErrorCode::InvalidRequest, why.to_string())
    }
}

impl From<Refusal> for Response<Vec<u8>> {
    fn from(refusal: Refusal) -> Self {
        let Refusal { code, message, allow } = refusal;
        let mut answer =
            whole(code.status(), JSON_TYPE, json!(code.body(message, None)).to_string());
        let headers = answer.headers_mut();
        if let Some(allow) = allow {
            headers.insert(header::ALLOW, HeaderValue::from_static(allow));
        }
        if code == ErrorCode::Unauthorized {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        answer
    }
}

fn page_json(page: &Value) -> Response<Vec<u8>> {
    whole(200, JSON_TYPE, page.to_string())
}

fn whole(status: u16, content_type: &'static str, body: String) -> Response<Vec<u8>> {
    let mut answer = Response::new(body.into_bytes());
    *answer.status_mut() = http::StatusCode::from_u16(status).expect("a constant status is valid");
    let length = answer.body().len();
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(header::CONTENT_LENGTH, length.into());
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workers_name_may_hold_slashes() {
        let page = Page::of_path("/admin/workers/unix:/run/a.sock/drain");
        assert_eq!(page, Some(Page::Drain { worker: "unix:/run/a.sock", drained: true }));
        let page = Page::of_path("/admin/workers/[::1]:8001/undrain");
        assert_eq!(page, Some(Page::Drain { worker: "[::1]:8001", drained: false }));
        for none in ["/admin/workers/", "/admin/workers/a/b", "/admin", "/admin/table/"] {
            assert_eq!(Page::of_path(none), None, "{none}");
        }
    }

    #[test]
    fn a_table_in_json_is_taken_as_it_is_shown() {
        let text = as_toml(r#"{"context":{"servers":[{"url":"a:1","weight":2}]}}"#).unwrap();
        let table: toml::Table = toml::from_str(&text).unwrap();
        assert_eq!(table["context"]["servers"][0]["weight"].as_integer(), Some(2));
        assert!(as_toml("[context]").unwrap_err().message.contains("not a table in JSON"));
    }
}
