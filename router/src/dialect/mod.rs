//! What workers are told and what they answer, as bytes: the protocol of two hops without any I/O.
//!
//! Baton's worker and TensorRT-LLM main take the same bodies ([`trtllm`]); Baton's in addition takes release
//! calls and answers with codes of `baton_shared::wire::error`. What older workers do not know is in [`era`].

pub mod early;
pub mod era;
pub mod pull;
pub mod trtllm;

use bytes::Bytes;
use serde::Deserialize;

use crate::client::Target;
use crate::table::worker::Dialect;

/// Which of the two routed endpoints a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    /// `/v1/completions`
    Completions,
    /// `/v1/chat/completions`
    Chat,
}

impl Api {
    /// The endpoint of a path.
    pub fn of_path(path: &str) -> Option<Self> {
        match path {
            "/v1/completions" => Some(Self::Completions),
            "/v1/chat/completions" => Some(Self::Chat),
            _ => None,
        }
    }

    /// The path of the endpoint.
    pub fn path(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
        }
    }

    /// The same endpoint on a worker.
    pub fn target(self) -> Target {
        match self {
            Self::Completions => Target::Completions,
            Self::Chat => Target::Chat,
        }
    }
}

/// Whether a worker takes release calls.
pub fn takes_release(dialect: Dialect) -> bool {
    match dialect {
        Dialect::Baton => true,
        // A worker that has not said yet what it is may hold a lease; it answers 404 if it does not know the call.
        Dialect::Unknown => true,
        Dialect::Trtllm12 | Dialect::Trtllm13 | Dialect::TrtllmMain => false,
    }
}

/// Whether who reads a record of such a worker says that it is gone (`kv_lease_gone`), so that it does no harm to ask.
pub fn tells_what_is_gone(dialect: Dialect) -> bool {
    match dialect {
        // A record is read by workers of the kind that made it.
        Dialect::Baton | Dialect::Unknown => true,
        Dialect::Trtllm12 | Dialect::Trtllm13 | Dialect::TrtllmMain => false,
    }
}

/// What a worker's error body says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkerError {
    /// `error.code`, if it is text.
    pub code: Option<String>,
    /// The message, wherever this kind of worker puts it.
    pub message: Option<String>,
}

impl WorkerError {
    /// Reads OpenAI's `{"error": {…}}` or TensorRT-LLM's flat `{"object": "error", "message": …}`.
    pub fn parse(body: &Bytes) -> Self {
        #[derive(Deserialize)]
        struct Body {
            error: Option<serde_json::Value>,
            message: Option<String>,
        }
        let Ok(body) = serde_json::from_slice::<Body>(body) else { return Self::default() };
        let text = |value: Option<&serde_json::Value>| Some(value?.as_str()?.to_owned());
        match body.error {
            Some(serde_json::Value::String(message)) => Self { code: None, message: Some(message) },
            Some(error) => {
                Self { code: text(error.get("code")), message: text(error.get("message")) }
            }
            None => Self { code: None, message: body.message },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workers_code_and_message_are_found_in_each_kind_of_body() {
        let parse = |body: &'static str| {
            let error = WorkerError::parse(&Bytes::from_static(body.as_bytes()));
            (error.code, error.message)
        };
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(
            parse(r#"{"error":{"message":"gone","type":"x","param":null,"code":"kv_lease_gone"}}"#),
            (some("kv_lease_gone"), some("gone"))
        );
        assert_eq!(
            parse(r#"{"object":"error","message":"no","type":"BadRequestError","code":400}"#),
            (None, some("no"))
        );
        assert_eq!(parse(r#"{"error":"no"}"#), (None, some("no")));
        assert_eq!(parse("<html>"), (None, None));
    }
}
