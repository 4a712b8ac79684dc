//! A generation pass before it reaches the engine: is what the router brought ours, whole, of this request, and of a
//! model like ours?
//!
//! The record's tag is checked before anything of it is believed, and its content before anything reaches the
//! transport.

use baton_shared::id::DisaggRequestId;
use baton_shared::kv::record::{Record, prompt_hash};
use baton_shared::wire::disagg::{DisaggregatedParams, FirstLogProbs};
use baton_shared::wire::error::ErrorCode;
use baton_shared::wire::usage::Usage;
use serde_json::Value;

use super::error::ApiError;
use super::peer;
use super::worker::Worker;
use crate::engine::output::TokenOut;

/// What a context pass left.
#[derive(Debug)]
pub struct Takeover {
    /// The id both parts share.
    pub request: DisaggRequestId,
    /// Tokens it sampled, at least one.
    pub first: Vec<TokenOut>,
    /// Where the blocks are, if any are needed.
    pub record: Record,
    /// What it counted.
    pub usage: Option<Usage>,
}

impl Takeover {
    /// Checks everything. `authentication` is upstream's header.
    ///
    /// # Errors
    /// `unauthorized`, `kv_state_invalid` or `kv_incompatible`.
    pub fn check(
        worker: &Worker,
        params: &DisaggregatedParams,
        prompt: &[u32],
        salt: Option<&str>,
        wants_scores: bool,
        authentication: Option<&str>,
    ) -> Result<Self, ApiError> {
        let state = params.encoded_opaque_state.as_deref();
        let endpoint = endpoint_of(params.ctx_info_endpoint.as_ref());
        if !worker.keys.verify_disagg(endpoint, state, authentication) {
            let message = "invalid internal disaggregated request authentication";
            return Err(ApiError::new(ErrorCode::Unauthorized, message));
        }
        let state = state.ok_or_else(|| invalid("`encoded_opaque_state` is missing"))?;
        let record =
            Record::decode_text(state, &worker.keys).map_err(|error| invalid(error.to_string()))?;
        let request = same_request(params, prompt, salt, &record)?;
        if record.fingerprint != worker.fingerprint {
            return Err(incompatible(worker, &record));
        }
        let first = first_tokens(worker, params, wants_scores)?;
        Ok(Self { request, first, record, usage: params.ctx_usage })
    }

    /// Makes sure that the blocks' owner still is who it was, unless there are none, it is us, or it is connected.
    ///
    /// # Errors
    /// `kv_lease_gone` or `kv_peer_unreachable`.
    pub async fn confirm_peer(&self, worker: &Worker) -> Result<(), ApiError> {
        let owner = &self.record.incarnation;
        let is_known = *owner == worker.incarnation || worker.mover.is_connected(owner);
        if self.record.lease.is_none() || is_known {
            return Ok(());
        }
        peer::confirm(&self.record).await
    }
}

/// Whether the record is of this request.
fn same_request(
    params: &DisaggregatedParams,
    prompt: &[u32],
    salt: Option<&str>,
    record: &Record,
) -> Result<DisaggRequestId, ApiError> {
    let named = params.disagg_request_id.or(params.ctx_request_id);
    if named != Some(record.request.0) {
        return Err(invalid("the hand-over record is of another request"));
    }
    let same_length = u32::try_from(prompt.len()) == Ok(record.prompt_tokens);
    if !same_length || prompt_hash(prompt, salt) != record.prompt_hash {
        return Err(invalid("the hand-over record is of another prompt or cache salt"));
    }
    Ok(record.request)
}

/// Tokens of the context pass, with their log-probabilities where the client wants any.
fn first_tokens(
    worker: &Worker,
    params: &DisaggregatedParams,
    wants_scores: bool,
) -> Result<Vec<TokenOut>, ApiError> {
    let ids = params.first_gen_tokens.as_deref().unwrap_or_default();
    if ids.is_empty() {
        return Err(invalid("`first_gen_tokens` is missing"));
    }
    if let Some(id) = ids.iter().find(|id| **id >= worker.texts.vocab()) {
        return Err(invalid(format!("`first_gen_tokens` holds `{id}`, which is no token here")));
    }
    let scores = params.first_gen_log_probs.as_deref().unwrap_or_default();
    if wants_scores && scores.len() != ids.len() {
        return Err(invalid("`first_gen_log_probs` must have one entry a token"));
    }
    let token = |(position, id): (usize, &u32)| match scores.get(position) {
        Some(score) if wants_scores => scored(*id, score),
        Some(_) | None => Ok(TokenOut { id: *id, logprob: 0.0, rank: 0, top: Vec::new() }),
    };
    ids.iter().enumerate().map(token).collect()
}

fn scored(id: u32, score: &FirstLogProbs) -> Result<TokenOut, ApiError> {
    match score {
        FirstLogProbs::Bare(logprob) => {
            Ok(TokenOut { id, logprob: *logprob, rank: 0, top: Vec::new() })
        }
        FirstLogProbs::List(list) => match list.split_first() {
            Some((own, others)) if own.token_id == id => Ok(TokenOut {
                id,
                logprob: own.logprob,
                rank: own.rank.unwrap_or(0),
                top: others.iter().map(|other| (other.token_id, other.logprob)).collect(),
            }),
            Some(_) | None => {
                Err(invalid("`first_gen_log_probs` must begin with the sampled token's"))
            }
        },
    }
}

/// `ctx_info_endpoint` as upstream signs it: of a list its first element.
fn endpoint_of(value: Option<&Value>) -> Option<&str> {
    match value? {
        Value::Array(list) => list.first()?.as_str(),
        other => other.as_str(),
    }
}

fn invalid(message: impl Into<String>) -> ApiError {
    let message = message.into();
    let param = Some("disaggregated_params".to_owned());
    ApiError { code: ErrorCode::KvStateInvalid, message, param }
}

fn incompatible(worker: &Worker, record: &Record) -> ApiError {
    let short =
        |print: &[u8; 32]| print[..4].iter().map(|b| format!("{b:02x}")).collect::<String>();
    let message = format!(
        "context worker `{}` ({}, fingerprint {}) and this worker `{}` (fingerprint {}) differ in model, tokenizer, \
         KV dtype or `model_revision`",
        record.worker,
        record.address,
        short(&record.fingerprint),
        worker.id,
        short(&worker.fingerprint),
    );
    ApiError::new(ErrorCode::KvIncompatible, message)
}
