//! What a client is told when it gets no answer: one of our codes, in OpenAI's shape.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use baton_shared::wire::error::{ErrorBody, ErrorCode};

/// A refusal or failure of one request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Which.
    pub code: ErrorCode,
    /// In words.
    pub message: String,
    /// The request member at fault.
    pub param: Option<String>,
}

impl ApiError {
    /// Nobody's member is at fault.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), param: None }
    }

    /// A request member that breaks `rule`: the message is `` `param` rule ``.
    pub fn member(param: &str, rule: impl std::fmt::Display) -> Self {
        Self {
            code: ErrorCode::InvalidRequest,
            message: format!("`{param}` {rule}"),
            param: Some(param.to_owned()),
        }
    }

    /// The same with another code.
    pub fn with_code(self, code: ErrorCode) -> Self {
        Self { code, ..self }
    }

    /// OpenAI's body.
    pub fn body(&self) -> ErrorBody {
        self.code.body(self.message.clone(), self.param.as_deref())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status =
            StatusCode::from_u16(self.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, axum::Json(self.body())).into_response();
        if self.code.has_retry_after() {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_worker_says_when_to_come_back() {
        let response = ApiError::new(ErrorCode::PoolExhausted, "no room").into_response();
        assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(response.headers()[header::RETRY_AFTER], "1");
        let response = ApiError::member("seed", "must be a whole number").into_response();
        assert_eq!(response.status(), StatusCode::BAD_REQUEST);
        assert!(!response.headers().contains_key(header::RETRY_AFTER));
    }
}
