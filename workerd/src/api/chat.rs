//! Pieces of an answer in the form of `/v1/chat/completions`.

use baton_shared::wire::chat::{
    AnswerMessage, Assistant, ChatChoice, ChatChunk, ChatLogprobs, ChatResponse, ChatTokenLogprob,
    ChatTopLogprob, ChunkChoice, Delta,
};
use baton_shared::wire::completion::ObjectKind;
use baton_shared::wire::usage::Usage;

use super::answer::{Piece, ScoredToken};
use super::shape::{Envelope, text_of};

/// A whole answer.
pub fn whole(envelope: Envelope, answer: Piece, usage: Usage) -> ChatResponse {
    let Piece { text, tokens, end } = answer;
    let (finish_reason, stop_reason) = end.map(|end| (end.reason, end.stop)).unzip();
    ChatResponse {
        id: envelope.id,
        object: ObjectKind::ChatCompletion,
        created: envelope.created,
        model: envelope.model,
        prompt_token_ids: None,
        prompt_token_ids_b64: None,
        choices: vec![ChatChoice {
            index: 0,
            message: AnswerMessage { role: Assistant::Assistant, content: text },
            logprobs: logprobs(&tokens),
            finish_reason,
            stop_reason: stop_reason.flatten(),
            disaggregated_params: None,
        }],
        usage,
    }
}

/// The first event: who speaks.
pub fn opening(envelope: &Envelope) -> ChatChunk {
    let delta = Delta { role: Some(Assistant::Assistant), content: Some(String::new()) };
    chunk(envelope, choice(delta, None), None)
}

/// Events of a piece: its text, then, after the last, why it ended.
pub fn chunks(envelope: &Envelope, piece: Piece, usage: Option<Usage>) -> Vec<ChatChunk> {
    let Piece { text, tokens, end } = piece;
    let mut logprobs = logprobs(&tokens);
    let mut all = Vec::new();
    if !text.is_empty() || end.is_none() {
        let delta = Delta { role: None, content: Some(text) };
        all.push(chunk(envelope, choice(delta, logprobs.take()), usage));
    }
    if let Some(end) = end {
        let last = ChunkChoice {
            finish_reason: Some(end.reason),
            stop_reason: end.stop,
            ..choice(Delta::default(), logprobs)
        };
        all.push(chunk(envelope, last, usage));
    }
    all
}

/// The event after the last piece, if usage was asked for.
pub fn usage_chunk(envelope: &Envelope, usage: Usage) -> ChatChunk {
    ChatChunk {
        choices: Vec::new(),
        ..chunk(envelope, choice(Delta::default(), None), Some(usage))
    }
}

fn chunk(envelope: &Envelope, choice: ChunkChoice, usage: Option<Usage>) -> ChatChunk {
    ChatChunk {
        id: envelope.id.clone(),
        object: ObjectKind::ChatCompletionChunk,
        created: envelope.created,
        model: envelope.model.clone(),
        choices: vec![choice],
        usage,
    }
}

fn choice(delta: Delta, logprobs: Option<ChatLogprobs>) -> ChunkChoice {
    ChunkChoice { index: 0, delta, logprobs, finish_reason: None, stop_reason: None }
}

fn logprobs(tokens: &[ScoredToken]) -> Option<ChatLogprobs> {
    let token = |token: &ScoredToken| ChatTokenLogprob {
        token: text_of(&token.bytes),
        logprob: token.logprob,
        bytes: Some(token.bytes.clone()),
        top_logprobs: token.top.iter().map(alternative).collect(),
    };
    let content = tokens.iter().map(token).collect();
    (!tokens.is_empty()).then_some(ChatLogprobs { content })
}

fn alternative((bytes, logprob): &(Vec<u8>, f32)) -> ChatTopLogprob {
    ChatTopLogprob { token: text_of(bytes), logprob: *logprob, bytes: Some(bytes.clone()) }
}

#[cfg(test)]
mod tests {
    use baton_shared::wire::completion::FinishReason;

    use super::*;
    use crate::api::answer::End;
    use crate::api::request::Endpoint;

    #[test]
    fn the_last_piece_becomes_its_text_and_then_its_end() {
        let envelope = Envelope::new(Endpoint::Chat, "M".to_owned());
        let end = Some(End { reason: FinishReason::Stop, stop: None });
        let piece = Piece { text: "a".to_owned(), tokens: Vec::new(), end };
        let all = chunks(&envelope, piece.clone(), None);
        assert_eq!(all.len(), 2);
        assert_eq!(all[0].choices[0].delta.content.as_deref(), Some("a"));
        assert_eq!(all[0].choices[0].finish_reason, None);
        assert_eq!(all[1].choices[0].delta, Delta::default());
        assert_eq!(all[1].choices[0].finish_reason, Some(FinishReason::Stop));
        assert_eq!(chunks(&envelope, Piece { text: String::new(), ..piece }, None).len(), 1);
    }
}
