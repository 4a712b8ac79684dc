//! `disaggregated_params` of TensorRT-LLM main (`openai_protocol.py`, `DisaggregatedParams`).

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::usage::Usage;

/// Every field of the main era; all are written, nulls included, as upstream's workers do.
///
/// Unknown members are ignored when read: a newer peer may send more than we know.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct DisaggregatedParams {
    /// `context_only`, `generation_only`, `context_and_generation`, in any case; checked by the worker.
    pub request_type: String,
    /// First generated tokens, one a beam; replayed by the generation worker.
    pub first_gen_tokens: Option<Vec<u32>>,
    /// Per position the log-probabilities of the first token: list of `{token_id, logprob, rank}`.
    pub first_gen_log_probs: Option<Vec<FirstLogProbs>>,
    /// Logits of the first step; relayed, never read.
    pub first_gen_logits: Option<Box<RawValue>>,
    /// The context engine's id of the request; equal to `disagg_request_id` since 1.3.
    pub ctx_request_id: Option<u64>,
    /// Base64 of the hand-over record (`kv::record`); opaque to everybody but workers.
    pub encoded_opaque_state: Option<String>,
    /// Speculative tokens; relayed.
    pub draft_tokens: Option<Vec<u32>>,
    /// The id both phases share, minted by the router.
    pub disagg_request_id: Option<u64>,
    /// Attention data-parallel rank that holds the cache.
    pub ctx_dp_rank: Option<u32>,
    /// Address of a Python transceiver; upstream's `/server_info` may give a list. Relayed.
    pub ctx_info_endpoint: Option<serde_json::Value>,
    /// 0 = context first, 1 = generation first.
    pub schedule_style: Option<u8>,
    /// Usage of the context answer, for the generation worker to report.
    pub ctx_usage: Option<Usage>,
    /// Whether a chat context answer should carry `prompt_token_ids_b64`.
    pub return_prompt_token_ids_b64: bool,
    /// Reasoning mode of the rendered prompt; relayed.
    pub resolved_thinking: Option<bool>,
}

/// Log-probabilities at one position: upstream writes the full list, or a bare float when only the
/// sampled token's was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum FirstLogProbs {
    /// The sampled token first, then the alternatives asked for, best first.
    List(Vec<TokenLogProb>),
    /// The sampled token's.
    Bare(f32),
}

/// One token with its natural-log probability.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLogProb {
    /// Vocabulary id.
    pub token_id: u32,
    /// Natural logarithm of the probability.
    pub logprob: f32,
    /// Position among all tokens, 1 = most probable.
    pub rank: Option<u32>,
}
