//! Errors on the wire: OpenAI's body, our codes, their HTTP status, and what a router may do about each.
//! This is the only such table (`docs/inside/hand-over.md` explains it).

use serde::{Deserialize, Serialize};

/// OpenAI's error body: `{"error": {"message", "type", "param", "code"}}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The only member.
    pub error: ErrorDetail,
}

/// What went wrong, for people (`message`) and for programs (`code`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorDetail {
    /// Lower case, no full stop, names the thing and the limit.
    pub message: String,
    /// OpenAI's class: `invalid_request_error`, `server_error`, …
    #[serde(rename = "type")]
    pub kind: String,
    /// The request member at fault.
    #[serde(default)]
    pub param: Option<String>,
    /// [`ErrorCode::code`], or what another server says.
    #[serde(default)]
    pub code: Option<String>,
}

/// Everything a Baton daemon can answer other than success.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorCode {
    // The client's mistakes.
    /// Malformed or unsupported request.
    InvalidRequest,
    /// Prompt (plus `max_tokens`) longer than the model or the pool can hold.
    ContextLengthExceeded,
    /// No such model here.
    ModelNotFound,
    /// No such path.
    NotFound,
    /// Path exists, method does not.
    MethodNotAllowed,
    /// Body above the limit.
    BodyTooLarge,
    /// Unknown `Content-Encoding`.
    UnsupportedEncoding,
    /// Body not complete within the deadline.
    BodyTimeout,
    /// Missing or wrong internal authentication.
    Unauthorized,
    // Load.
    /// Too many requests waiting or in flight.
    QueueFull,
    /// The daemon is starting, stopping or unhealthy.
    Unavailable,
    /// Router: no usable worker.
    NoWorkers,
    // Hand-over (`handover.md` 4).
    /// The blocks are no longer there: expired, released, already pulled, or another incarnation.
    KvLeaseGone,
    /// The context worker cannot be reached, is suspect, or died while being read.
    KvPeerUnreachable,
    /// The pull did not end within `handover.pull_timeout`.
    KvTransferTimeout,
    /// No room in the KV pool now.
    PoolExhausted,
    /// Fingerprint, dtype or layout do not fit.
    KvIncompatible,
    /// The record is garbage, altered, or of another request.
    KvStateInvalid,
    /// A live request has the same `disagg_request_id`.
    DuplicateRequest,
    // Router: every attempt failed.
    /// No context server answered usefully.
    ContextFailed,
    /// The last context attempt timed out.
    ContextTimeout,
    /// No generation server answered usefully.
    GenerationFailed,
    /// The last generation attempt timed out.
    GenerationTimeout,
    /// The answer broke off after it had begun (streams only).
    GenerationAborted,
    /// A bug or a failed device.
    Internal,
    /// The client left; only in logs and metrics.
    ClientGone,
}

/// What a router does with a worker's error before anything reached its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// Hand the worker's answer to the client unchanged.
    PassThrough,
    /// New context pass, anywhere; nobody is to blame.
    NewContextPass,
    /// New context pass, on another context server if there is one; the *context* server is to blame.
    NewContextPassElsewhere,
    /// Same phase, another server; only its load is to blame. A generation try keeps its record.
    AnotherServer,
    /// Same phase, another server; this server is to blame.
    AnotherServerBlame,
    /// A deployment mistake: 502 with the worker's text.
    GiveUp,
}

impl ErrorCode {
    /// All of them, for tables and tests.
    pub const ALL: [Self; 26] = [
        Self::InvalidRequest,
        Self::ContextLengthExceeded,
        Self::ModelNotFound,
        Self::NotFound,
        Self::MethodNotAllowed,
        Self::BodyTooLarge,
        Self::UnsupportedEncoding,
        Self::BodyTimeout,
        Self::Unauthorized,
        Self::QueueFull,
        Self::Unavailable,
        Self::NoWorkers,
        Self::KvLeaseGone,
        Self::KvPeerUnreachable,
        Self::KvTransferTimeout,
        Self::PoolExhausted,
        Self::KvIncompatible,
        Self::KvStateInvalid,
        Self::DuplicateRequest,
        Self::ContextFailed,
        Self::ContextTimeout,
        Self::GenerationFailed,
        Self::GenerationTimeout,
        Self::GenerationAborted,
        Self::Internal,
        Self::ClientGone,
    ];

    /// `error.code`.
    pub fn code(self) -> &'static str {
        self.row().0
    }

    /// HTTP status.
    pub fn status(self) -> u16 {
        self.row().1
    }

    /// `error.type`.
    pub fn kind(self) -> &'static str {
        self.row().2
    }

    /// Whether the answer carries `Retry-After`.
    pub fn has_retry_after(self) -> bool {
        matches!(self, Self::QueueFull | Self::Unavailable | Self::NoWorkers | Self::PoolExhausted)
    }

    /// The code a worker named, if it is one of ours.
    pub fn from_code(code: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.code() == code)
    }

    /// The body for `message`; `param` names the request member at fault.
    pub fn body(self, message: impl Into<String>, param: Option<&str>) -> ErrorBody {
        ErrorBody {
            error: ErrorDetail {
                message: message.into(),
                kind: self.kind().to_owned(),
                param: param.map(str::to_owned),
                code: Some(self.code().to_owned()),
            },
        }
    }

    fn row(self) -> (&'static str, u16, &'static str) {
        const REQUEST: &str = "invalid_request_error";
        const SERVER: &str = "server_error";
        match self {
            Self::InvalidRequest => ("invalid_request", 400, REQUEST),
            Self::ContextLengthExceeded => ("context_length_exceeded", 400, REQUEST),
            Self::ModelNotFound => ("model_not_found", 404, REQUEST),
            Self::NotFound => ("not_found", 404, REQUEST),
            Self::MethodNotAllowed => ("method_not_allowed", 405, REQUEST),
            Self::BodyTooLarge => ("body_too_large", 413, REQUEST),
            Self::UnsupportedEncoding => ("unsupported_encoding", 415, REQUEST),
            Self::BodyTimeout => ("body_timeout", 408, REQUEST),
            Self::Unauthorized => ("unauthorized", 401, "authentication_error"),
            Self::QueueFull => ("queue_full", 429, "rate_limit_error"),
            Self::Unavailable => ("unavailable", 503, SERVER),
            Self::NoWorkers => ("no_workers", 503, SERVER),
            Self::KvLeaseGone => ("kv_lease_gone", 503, SERVER),
            Self::KvPeerUnreachable => ("kv_peer_unreachable", 503, SERVER),
            Self::KvTransferTimeout => ("kv_transfer_timeout", 504, SERVER),
            Self::PoolExhausted => ("pool_exhausted", 503, SERVER),
            Self::KvIncompatible => ("kv_incompatible", 409, SERVER),
            Self::KvStateInvalid => ("kv_state_invalid", 400, REQUEST),
            Self::DuplicateRequest => ("duplicate_request", 409, REQUEST),
            Self::ContextFailed => ("context_failed", 502, SERVER),
            Self::ContextTimeout => ("context_timeout", 504, SERVER),
            Self::GenerationFailed => ("generation_failed", 502, SERVER),
            Self::GenerationTimeout => ("generation_timeout", 504, SERVER),
            Self::GenerationAborted => ("generation_aborted", 502, SERVER),
            Self::Internal => ("internal_error", 500, SERVER),
            Self::ClientGone => ("client_gone", 499, SERVER),
        }
    }
}

/// What to do with a worker's answer of `status` that is not 2xx, `code` being its `error.code` if it had one.
/// Our own codes come before the rule that a worker's 4xx is the client's business.
pub fn remedy(status: u16, code: Option<&str>) -> Remedy {
    match code.and_then(ErrorCode::from_code) {
        Some(ErrorCode::KvLeaseGone) => return Remedy::NewContextPass,
        Some(ErrorCode::KvPeerUnreachable | ErrorCode::KvTransferTimeout) => {
            return Remedy::NewContextPassElsewhere;
        }
        Some(
            ErrorCode::PoolExhausted
            | ErrorCode::QueueFull
            | ErrorCode::Unavailable
            | ErrorCode::DuplicateRequest,
        ) => return Remedy::AnotherServer,
        // `Unauthorized` is about the key between router and workers: no business of the client.
        Some(ErrorCode::KvIncompatible | ErrorCode::KvStateInvalid | ErrorCode::Unauthorized) => {
            return Remedy::GiveUp;
        }
        _ => {}
    }
    match status {
        408 | 429 | 503 => Remedy::AnotherServer,
        400..=499 => Remedy::PassThrough,
        _ => Remedy::AnotherServerBlame,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_found_again_by_its_name() {
        for code in ErrorCode::ALL {
            assert_eq!(ErrorCode::from_code(code.code()), Some(code));
        }
    }

    #[test]
    fn our_codes_win_over_the_status() {
        assert_eq!(remedy(503, Some("kv_lease_gone")), Remedy::NewContextPass);
        assert_eq!(remedy(409, Some("kv_incompatible")), Remedy::GiveUp);
        assert_eq!(remedy(400, Some("kv_state_invalid")), Remedy::GiveUp);
        assert_eq!(remedy(401, Some("unauthorized")), Remedy::GiveUp);
        assert_eq!(remedy(503, Some("pool_exhausted")), Remedy::AnotherServer);
    }

    #[test]
    fn a_foreign_4xx_goes_to_the_client_and_a_5xx_to_another_server() {
        assert_eq!(remedy(400, None), Remedy::PassThrough);
        assert_eq!(remedy(422, Some("something_else")), Remedy::PassThrough);
        assert_eq!(remedy(429, None), Remedy::AnotherServer);
        assert_eq!(remedy(500, None), Remedy::AnotherServerBlame);
    }
}
