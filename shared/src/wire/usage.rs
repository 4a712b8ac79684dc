//! Token counts of an answer.

use serde::{Deserialize, Serialize};

/// OpenAI's `usage`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Prompt plus generated.
    pub total_tokens: u32,
    /// Generated tokens.
    pub completion_tokens: u32,
    /// Where the prompt's tokens came from.
    pub prompt_tokens_details: Option<PromptTokensDetails>,
}

/// Part of [`Usage`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PromptTokensDetails {
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: u32,
}

impl Usage {
    /// Counts of a prompt of `prompt` tokens, `cached` of them from the prefix cache, with `completion` generated.
    pub fn new(prompt: u32, cached: u32, completion: u32) -> Self {
        Self {
            prompt_tokens: prompt,
            total_tokens: prompt + completion,
            completion_tokens: completion,
            prompt_tokens_details: Some(PromptTokensDetails { cached_tokens: cached }),
        }
    }
}
