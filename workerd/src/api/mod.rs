//! What a client sees: OpenAI's endpoints, and what routers and operators ask of a worker.
//!
//! A request's life: [`generate`] reads it ([`request`]), measures it ([`job`]), checks what a context pass left
//! ([`takeover`]) and starts a [`run`], whose pieces ([`answer`]) become one object or events ([`shape`],
//! [`events`]). A context pass goes through [`context`] instead. [`server`] owns the connections.

pub mod answer;
mod chat;
mod completions;
mod connection;
mod context;
mod counted;
mod error;
mod events;
mod failpoints;
#[cfg(test)]
mod fake_texts;
mod generate;
pub mod info;
mod iterations;
mod job;
mod kv_events;
pub mod peer;
mod release;
mod request;
mod run;
pub mod server;
mod shape;
mod takeover;
#[cfg(test)]
mod tests;
mod trace;
pub mod worker;

use std::sync::Arc;

use axum::Router;
use axum::http::{Method, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use baton_shared::wire::error::ErrorCode;

use error::ApiError;
use worker::Worker;

use crate::failpoint;

/// All paths of a worker.
pub fn router(worker: Arc<Worker>) -> Router {
    let tests = if failpoint::is_enabled() { failpoints::routes() } else { Router::new() };
    let events = get(kv_events::kv_cache_events).post(kv_events::kv_cache_events);
    Router::new()
        .route("/v1/completions", post(generate::completions))
        .route("/v1/chat/completions", post(generate::chat))
        .route("/v1/models", get(info::models))
        .route("/v1/disagg/release", post(release::release))
        .route("/health", get(info::health))
        .route("/version", get(info::version))
        .route("/server_info", get(info::server_info))
        .route("/metrics", get(iterations::iterations))
        .route("/prometheus/metrics", get(info::prometheus))
        .route("/kv_cache_events", events)
        .merge(tests)
        .fallback(unknown_path)
        .method_not_allowed_fallback(unknown_method)
        .layer(axum::middleware::from_fn(trace::tie))
        .with_state(worker)
}

async fn unknown_path(uri: Uri) -> Response {
    let path: String = uri.path().chars().take(200).collect();
    ApiError::new(ErrorCode::NotFound, format!("there is no `{path}`")).into_response()
}

async fn unknown_method(method: Method, uri: Uri) -> Response {
    let message = format!("`{}` does not take {method}", uri.path());
    ApiError::new(ErrorCode::MethodNotAllowed, message).into_response()
}
