//! What a worker says about itself: to routers, to clients that look around, to monitoring.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

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
use crate::engine::status::EngineStatus;

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
        "kv_cache_hash_algo": "v1_block_key",
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

/// `GET /metrics`: upstream's iteration statistics, drained on read.
pub async fn iterations(State(worker): State<Arc<Worker>>) -> Json<Vec<Value>> {
    let status = worker.engine.status();
    Json(worker.iterations.unseen(&status, worker.limits.block_tokens).into_iter().collect())
}

/// `/kv_cache_events`: blocks that entered or left the prefix cache since the last call. There is no prefix cache.
pub async fn kv_cache_events() -> Json<[Value; 0]> {
    Json([])
}

/// Remembers which step was shown last.
#[derive(Debug, Default)]
pub struct IterationStats {
    shown: AtomicU64,
}

impl IterationStats {
    /// The newest step's figures, unless they were shown before.
    fn unseen(&self, status: &EngineStatus, block_tokens: u32) -> Option<Value> {
        let step = status.totals.steps;
        if self.shown.swap(step, Ordering::Relaxed) == step {
            return None;
        }
        let blocks = &status.blocks;
        let taken = blocks.used + blocks.leased + blocks.in_flight + blocks.quarantined;
        Some(json!({
            "iter": step,
            "numActiveRequests": status.running,
            "numQueuedRequests": status.waiting,
            "kvCacheStats": {
                "maxNumBlocks": blocks.free + taken,
                "freeNumBlocks": blocks.free,
                "usedNumBlocks": taken,
                "tokensPerBlock": block_tokens,
            },
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_shown_once() {
        let stats = IterationStats::default();
        let mut status = EngineStatus::default();
        assert_eq!(stats.unseen(&status, 32), None);
        status.totals.steps = 3;
        status.blocks.free = 5;
        status.blocks.leased = 2;
        let shown = stats.unseen(&status, 32).unwrap();
        assert_eq!(shown["iter"], 3);
        assert_eq!(shown["kvCacheStats"]["maxNumBlocks"], 7);
        assert_eq!(stats.unseen(&status, 32), None);
    }
}
