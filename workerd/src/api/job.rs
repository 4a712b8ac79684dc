//! A request that was found servable: its prompt in tokens, its length within what this worker holds.

use std::sync::Arc;

use baton_shared::wire::error::ErrorCode;

use super::answer::{AnswerRules, EndRules};
use super::error::ApiError;
use super::generate::off_the_loop;
use super::request::{Endpoint, Part, PromptSource, Request};
use super::worker::{Limits, Worker};
use crate::engine::StopRule;
use crate::text::Texts;

/// Tokens of a completion that names no limit, as OpenAI has it.
const DEFAULT_COMPLETION: u32 = 16;
/// Longer texts are tokenised off the threads that serve connections.
const LONG_TEXT: usize = 4096;

/// A request with its prompt in tokens.
#[derive(Debug)]
pub struct Job {
    /// The request; its prompt has moved.
    pub request: Request,
    /// Token ids, at least one, all in the vocabulary.
    pub prompt: Vec<u32>,
    /// Generated tokens at most, at least 1.
    pub max_tokens: u32,
}

impl Job {
    /// Tokenises and checks.
    ///
    /// # Errors
    /// What the client has to change.
    pub async fn prepare(worker: &Worker, mut request: Request) -> Result<Self, ApiError> {
        let member = request.prompt.member();
        let source = std::mem::replace(&mut request.prompt, PromptSource::Ids(Vec::new()));
        let prompt = tokens(&worker.texts, source).await?;
        if prompt.is_empty() {
            return Err(ApiError::member(member, "must not be empty"));
        }
        for (name, ids) in [(member, &prompt), ("stop_token_ids", &request.stop_token_ids)] {
            if let Some(id) = ids.iter().find(|id| **id >= worker.texts.vocab()) {
                let rule = format!("holds `{id}`, token ids are below {}", worker.texts.vocab());
                return Err(ApiError::member(name, rule));
            }
        }
        let length = u32::try_from(prompt.len()).unwrap_or(u32::MAX);
        let max_tokens = output_limit(&worker.limits, &request, member, length)?;
        Ok(Self { request, prompt, max_tokens })
    }

    /// Tokens of the prompt.
    pub fn prompt_tokens(&self) -> u32 {
        u32::try_from(self.prompt.len()).unwrap_or(u32::MAX)
    }

    /// What ends the answer and shapes its pieces.
    pub fn answer_rules(&self, worker: &Worker) -> AnswerRules {
        let eos =
            if self.request.ignore_eos { Vec::new() } else { worker.texts.eos_ids().to_vec() };
        AnswerRules {
            stop: self.request.stop.clone(),
            ids: EndRules { eos, stop: self.request.stop_token_ids.clone() },
            skip_special: self.request.skip_special,
            wants_scores: self.request.sampling.logprobs.is_some(),
        }
    }

    /// What ends the sequence in the engine.
    pub fn stop_rule(&self, rules: &AnswerRules) -> StopRule {
        StopRule { max_tokens: self.max_tokens, stop_ids: rules.ids.all() }
    }
}

async fn tokens(texts: &Arc<dyn Texts>, source: PromptSource) -> Result<Vec<u32>, ApiError> {
    let length = match &source {
        PromptSource::Ids(_) => 0,
        PromptSource::Text { text, .. } => text.len(),
        PromptSource::Chat(chat) => {
            let messages = chat.messages.as_deref().unwrap_or_default();
            messages.iter().filter_map(|message| message.content.as_ref()).map(|c| c.0.len()).sum()
        }
    };
    if length < LONG_TEXT {
        return tokenise(texts.as_ref(), source);
    }
    let texts = Arc::clone(texts);
    off_the_loop(move || tokenise(texts.as_ref(), source)).await
}

fn tokenise(texts: &dyn Texts, source: PromptSource) -> Result<Vec<u32>, ApiError> {
    let refuse = |member| move |rule: String| ApiError::member(member, rule);
    match source {
        PromptSource::Ids(ids) => Ok(ids),
        PromptSource::Text { text, special } => {
            texts.encode(&text, special).map_err(refuse("prompt"))
        }
        PromptSource::Chat(chat) => {
            let text = texts.render(&chat).map_err(refuse("messages"))?;
            // The template writes the special tokens a conversation begins with itself.
            texts.encode(&text, false).map_err(refuse("messages"))
        }
    }
}

/// Tokens that may be generated after a prompt of `length`.
fn output_limit(
    limits: &Limits,
    request: &Request,
    member: &str,
    length: u32,
) -> Result<u32, ApiError> {
    let exceeded = |member: &str, rule| {
        Err(ApiError::member(member, rule).with_code(ErrorCode::ContextLengthExceeded))
    };
    let room = match request.part {
        Part::Context { .. } => limits.max_len,
        Part::Whole | Part::Generation(_) => limits.max_len.min(limits.pool_tokens),
    };
    if length >= room {
        let rule = format!(
            "has {length} tokens, at most {} leave room for an answer",
            room.saturating_sub(1)
        );
        return exceeded(member, rule);
    }
    if matches!(request.part, Part::Context { .. }) && length > limits.leasable_tokens {
        let most = limits.leasable_tokens;
        return exceeded(
            member,
            format!("has {length} tokens, this worker hands over at most {most}"),
        );
    }
    let left = room - length;
    match (request.max_tokens, request.endpoint) {
        (Some(wanted), _) if wanted > left => {
            let rule = format!(
                "= {wanted} is too much: with the prompt's {length} tokens at most {left} fit into {room}"
            );
            exceeded("max_tokens", rule)
        }
        (Some(wanted), _) => Ok(wanted),
        (None, Endpoint::Completions) => Ok(left.min(DEFAULT_COMPLETION)),
        (None, Endpoint::Chat) => Ok(left),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits =
        Limits { max_len: 100, pool_tokens: 64, leasable_tokens: 32, block_tokens: 32 };

    fn limit(endpoint: Endpoint, more: &str, length: u32) -> Result<u32, ApiError> {
        let body = match endpoint {
            Endpoint::Completions => format!("{{\"model\":\"M\",\"prompt\":\"a\"{more}}}"),
            Endpoint::Chat => {
                format!("{{\"model\":\"M\",\"messages\":[{{\"role\":\"user\"}}]{more}}}")
            }
        };
        let request = Request::parse(endpoint, body.as_bytes(), 0).unwrap();
        output_limit(&LIMITS, &request, "prompt", length)
    }

    const CONTEXT: &str = ",\"disaggregated_params\":{\"request_type\":\"context_only\"}";

    #[test]
    fn without_a_limit_a_completion_has_sixteen_tokens_and_a_chat_the_rest_of_the_window() {
        assert_eq!(limit(Endpoint::Completions, "", 10), Ok(16));
        assert_eq!(limit(Endpoint::Completions, "", 60), Ok(4));
        assert_eq!(limit(Endpoint::Chat, "", 10), Ok(54));
    }

    #[test]
    fn what_can_never_fit_is_refused() {
        for (more, length, member) in [
            ("", 64, "prompt"),
            (",\"max_tokens\":55", 10, "max_tokens"),
            (CONTEXT, 33, "prompt"),
            (CONTEXT, 100, "prompt"),
        ] {
            let error = limit(Endpoint::Completions, more, length).unwrap_err();
            assert_eq!(error.code, ErrorCode::ContextLengthExceeded);
            assert_eq!(error.param.as_deref(), Some(member), "{error}");
        }
        assert_eq!(limit(Endpoint::Completions, ",\"max_tokens\":54", 10), Ok(54));
    }

    #[test]
    fn a_context_pass_needs_no_room_for_the_answer_in_its_own_pool() {
        let more = format!(",\"max_tokens\":80{CONTEXT}");
        assert_eq!(limit(Endpoint::Completions, &more, 20), Ok(80));
    }
}
