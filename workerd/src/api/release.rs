//! `POST /v1/disagg/release`: a router will not have a request's blocks read.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::Request;
use axum::response::{IntoResponse, Response};
use baton_shared::id::DisaggRequestId;
use baton_shared::wire::auth::RELEASE_HEADER;
use baton_shared::wire::error::ErrorCode;
use serde::Deserialize;

use super::error::ApiError;
use super::generate::read_body;
use super::worker::Worker;
use crate::failpoint::{self, Point};

#[derive(Deserialize)]
struct Release {
    disagg_request_id: DisaggRequestId,
}

/// Ends whatever has that id; saying so twice, or for an id nobody knows, is right too.
pub async fn release(State(worker): State<Arc<Worker>>, request: Request<Body>) -> Response {
    match accept(&worker, request).await {
        Ok(id) => {
            failpoint::arrive(Point::Release).await;
            tracing::debug!(request = %id, "a router releases the blocks");
            worker.engine.release(id);
            Json(serde_json::json!({ "disagg_request_id": id })).into_response()
        }
        Err(error) => error.into_response(),
    }
}

async fn accept(worker: &Worker, request: Request<Body>) -> Result<DisaggRequestId, ApiError> {
    let (head, body) = request.into_parts();
    let body = read_body(&head.headers, body).await?;
    let header = head.headers.get(RELEASE_HEADER).and_then(|value| value.to_str().ok());
    if !worker.keys.verify_release(&body, header) {
        let message = format!("`{RELEASE_HEADER}` is missing or wrong");
        return Err(ApiError::new(ErrorCode::Unauthorized, message));
    }
    let release: Release = serde_json::from_slice(&body)
        .map_err(|_| ApiError::member("disagg_request_id", "must be a whole number"))?;
    Ok(release.disagg_request_id)
}
