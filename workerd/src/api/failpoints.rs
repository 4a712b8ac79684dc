//! `/test/failpoints`: how a test arms failpoints in a running worker, and sees who is held there. Not there otherwise.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use baton_shared::wire::error::ErrorCode;
use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::worker::Worker;
use crate::failpoint;

/// `GET`: every point, its action, how often it was reached and how many are held. `PUT {"NAME": "ACTION", …}`.
pub fn routes() -> Router<Arc<Worker>> {
    Router::new().route("/test/failpoints", get(show).put(arm))
}

async fn show() -> Json<Map<String, Value>> {
    let describe = |(name, standing): (&str, failpoint::Standing)| {
        let failpoint::Standing { action, reached, held } = standing;
        let value = json!({"action": action.to_string(), "reached": reached, "held": held});
        (name.to_owned(), value)
    };
    Json(failpoint::standings().map(describe).collect())
}

async fn arm(Json(wanted): Json<BTreeMap<String, String>>) -> Response {
    for (name, action) in &wanted {
        if let Err(error) = failpoint::arm(name, action) {
            return ApiError::new(ErrorCode::InvalidRequest, error.to_string()).into_response();
        }
    }
    show().await.into_response()
}
