//! What a worker says about itself: to routers, to clients that look around, to monitoring.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use baton_shared::telemetry::BUILD;
use baton_shared::wire::error::ErrorCode;
use baton_shared::wire::models::ModelList;
use serde_json::{Value, json};

use super::error::ApiError;
use super::worker::Worker;

/// `GET /health`: 200 when work would be accepted.
pub async fn health(State(worker): State<Arc<Worker>>) -> Response {
    let status = worker.engine.status();
    let reason = if status.is_draining {
        "this worker is stopping"
    } else if !status.is_alive {
        "the engine has ended"
    } else {
        return StatusCode::OK.into_response();
    };
    ApiError::new(ErrorCode::Unavailable, reason).into_response()
}

/// `GET /version`
pub async fn version() -> Json<Value> {
    Json(json!({ "version": BUILD.version, "commit": BUILD.commit }))
}

/// `GET /v1/models`
pub async fn models(State(worker): State<Arc<Worker>>) -> Json<ModelList> {
    Json(ModelList::new(worker.names.iter().map(String::as_str), worker.started))
}

/// `GET /server_info`: what a router learns our dialect by, and a peer which start of us this is. Nothing here lets
/// anybody reach the pool.
pub async fn server_info(State(worker): State<Arc<Worker>>) -> Json<Value> {
    Json(json!({
        "disaggregated_params": null,
        "kv_cache_hash_algo": worker.event_hash.as_str(),
        "tokens_per_block": worker.limits.block_tokens,
        "max_seq_len": worker.limits.max_len,
        "baton": {
            "version": BUILD.version,
            "role": worker.role,
            "incarnation": worker.incarnation.to_string(),
            "worker": worker.id.as_str(),
        },
    }))
}

/// `GET /prometheus/metrics`
pub async fn prometheus(State(worker): State<Arc<Worker>>) -> Response {
    let text = worker.metrics.render(&worker.engine.status(), worker.mover.figures());
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}
