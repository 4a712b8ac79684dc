//! What a worker is for, and which phase a request asks for.

use serde::{Deserialize, Serialize};

/// What a worker is for: a default for routing and admission. Every worker serves every request type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Prefill.
    Context,
    /// Decode.
    Generation,
    /// Either.
    Both,
}

impl Role {
    /// `context`, `generation` or `both`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Context => "context",
            Self::Generation => "generation",
            Self::Both => "both",
        }
    }
}

/// `disaggregated_params.request_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RequestType {
    /// Prefill, sample one token, keep the blocks for a reader.
    ContextOnly,
    /// Take over from a context pass.
    GenerationOnly,
    /// The whole request on one worker.
    ContextAndGeneration,
}
