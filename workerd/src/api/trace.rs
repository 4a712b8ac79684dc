//! Ties a worker's log lines to the request they belong to, as routers and clients call it.

use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;
use baton_shared::telemetry::{RequestId, TraceParent};
use tracing::Instrument;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TRACE_PARENT: HeaderName = HeaderName::from_static("traceparent");

/// Logs within the request carry its id, and the answer names it.
pub async fn tie(request: Request, next: Next) -> Response {
    let text = |headers: &HeaderMap, name| {
        headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
    };
    let id = RequestId::accept_or_mint(text(request.headers(), REQUEST_ID).as_deref());
    let parent = text(request.headers(), TRACE_PARENT).and_then(|text| TraceParent::parse(&text));
    // Whatever level is logged, a line says whose it is.
    let span =
        tracing::error_span!("request", request_id = id.as_str(), trace = tracing::field::Empty);
    if let Some(parent) = parent {
        span.record("trace", tracing::field::display(format_args!("{:032x}", parent.trace_id)));
    }
    let path = request.uri().path().to_owned();
    let answer = async move {
        let response = next.run(request).await;
        tracing::debug!(path, status = response.status().as_u16(), "answered");
        response
    };
    let mut response = answer.instrument(span).await;
    if let Ok(id) = HeaderValue::from_str(id.as_str()) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}
