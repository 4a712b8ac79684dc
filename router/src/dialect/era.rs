//! What each age of TensorRT-LLM knows of the protocol. Its request models refuse unknown members with 400, so a
//! worker is sent only what its age knows.
//!
//! A worker's answer holds every member that its own model knows, nulls included. So where one age grew members
//! (1.3 did), what the context worker answered says which of them are known.

use baton_shared::id::DisaggRequestId;

use crate::table::worker::Dialect;

/// An age of the protocol, oldest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Era {
    /// Up to 1.2: no ids from the router.
    V12,
    /// 1.3 up to its release candidate 23: ids from the router, members still growing.
    V13,
    /// Later, and Baton.
    Main,
}

/// The release candidate of 1.3.0 from which on it speaks as main does.
const MAIN_FROM: u32 = 24;

impl Era {
    /// Of a worker; one that has not said yet what it speaks is spoken to as main.
    pub fn of(dialect: Dialect) -> Self {
        match dialect {
            Dialect::Trtllm12 => Self::V12,
            Dialect::Trtllm13 => Self::V13,
            Dialect::Unknown | Dialect::Baton | Dialect::TrtllmMain => Self::Main,
        }
    }

    /// A context request's `disaggregated_params`.
    pub fn context_params(self, id: DisaggRequestId) -> String {
        match self {
            Self::V12 => "{\"request_type\":\"context_only\"}".to_owned(),
            Self::V13 => {
                format!("{{\"request_type\":\"context_only\",\"disagg_request_id\":{id}}}")
            }
            Self::Main => format!(
                "{{\"request_type\":\"context_only\",\"disagg_request_id\":{id},\"schedule_style\":0}}"
            ),
        }
    }

    /// Whether a generation request's `disaggregated_params` may hold this member.
    pub fn knows(self, member: &[u8]) -> bool {
        match self {
            Self::V12 => V12.contains(&member),
            Self::V13 => V12.contains(&member) || V13.contains(&member),
            // Main had it for a while, took it out again, and does without it.
            Self::Main => member != b"conversation_id",
        }
    }
}

const V12: [&[u8]; 5] = [
    b"request_type",
    b"first_gen_tokens",
    b"ctx_request_id",
    b"encoded_opaque_state",
    b"draft_tokens",
];

const V13: [&[u8]; 8] = [
    b"disagg_request_id",
    b"ctx_dp_rank",
    b"ctx_info_endpoint",
    b"schedule_style",
    b"first_gen_log_probs",
    b"first_gen_logits",
    b"conversation_id",
    b"ctx_usage",
];

/// What a TensorRT-LLM worker speaks that calls itself `version` (`1.2.1`, `1.3.0rc5`); main if that says nothing.
pub fn of_version(version: &str) -> Dialect {
    let mut parts = version.splitn(3, '.');
    let mut number = || parts.next()?.parse::<u32>().ok();
    let (Some(major), Some(minor)) = (number(), number()) else { return Dialect::TrtllmMain };
    // Behind the candidate's number may stand a build: `0rc5.post1`, `0rc5+cu13`.
    let candidate = parts.next().and_then(|patch| patch.strip_prefix("0rc")).map(|rest| {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        rest[..digits].parse().unwrap_or(MAIN_FROM)
    });
    match ((major, minor), candidate) {
        ((0, _) | (1, ..=2), _) => Dialect::Trtllm12,
        ((1, 3), Some(..MAIN_FROM)) => Dialect::Trtllm13,
        _ => Dialect::TrtllmMain,
    }
}

#[cfg(test)]
mod tests;
