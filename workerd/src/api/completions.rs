//! Pieces of an answer in the form of `/v1/completions`.

use baton_shared::wire::completion::{
    CompletionChoice, CompletionLogprobs, CompletionResponse, ObjectKind, TopLogprobs,
};
use baton_shared::wire::usage::Usage;

use super::answer::{Piece, ScoredToken};
use super::shape::{Envelope, has_alternatives, text_of};

/// A whole answer.
pub fn whole(envelope: Envelope, answer: Piece, usage: Usage) -> CompletionResponse {
    CompletionResponse { usage: Some(usage), ..chunk(&envelope, answer, None) }
}

/// One event of a stream; the last carries why it ended.
pub fn chunk(envelope: &Envelope, piece: Piece, usage: Option<Usage>) -> CompletionResponse {
    let Piece { text, tokens, end } = piece;
    let (finish_reason, stop_reason) = end.map(|end| (end.reason, end.stop)).unzip();
    let choice = CompletionChoice {
        index: 0,
        text,
        logprobs: (!tokens.is_empty()).then(|| logprobs(&tokens)),
        finish_reason,
        stop_reason: stop_reason.flatten(),
        disaggregated_params: None,
    };
    CompletionResponse { choices: vec![choice], ..empty(envelope, usage) }
}

/// The event after the last piece, if usage was asked for.
pub fn usage_chunk(envelope: &Envelope, usage: Usage) -> CompletionResponse {
    empty(envelope, Some(usage))
}

fn empty(envelope: &Envelope, usage: Option<Usage>) -> CompletionResponse {
    CompletionResponse {
        id: envelope.id.clone(),
        object: ObjectKind::TextCompletion,
        created: envelope.created,
        model: envelope.model.clone(),
        prompt_token_ids: None,
        choices: Vec::new(),
        usage,
    }
}

fn logprobs(tokens: &[ScoredToken]) -> CompletionLogprobs {
    CompletionLogprobs {
        text_offset: tokens.iter().map(|token| token.offset).collect(),
        token_logprobs: tokens.iter().map(|token| Some(token.logprob)).collect(),
        tokens: tokens.iter().map(|token| text_of(&token.bytes)).collect(),
        top_logprobs: has_alternatives(tokens).then(|| tokens.iter().map(alternatives).collect()),
    }
}

/// The best tokens, and the sampled one if it is not among them.
fn alternatives(token: &ScoredToken) -> TopLogprobs {
    let mut all: Vec<_> =
        token.top.iter().map(|(bytes, logprob)| (text_of(bytes), *logprob)).collect();
    if !token.top.iter().any(|(bytes, _)| *bytes == token.bytes) {
        all.push((text_of(&token.bytes), token.logprob));
    }
    TopLogprobs(all)
}

#[cfg(test)]
mod tests {
    use baton_shared::wire::completion::FinishReason;

    use super::*;
    use crate::api::answer::End;
    use crate::api::request::Endpoint;

    #[test]
    fn the_sampled_token_is_always_among_its_alternatives() {
        let token = ScoredToken {
            bytes: b"x".to_vec(),
            logprob: -3.0,
            top: vec![(b"a".to_vec(), -0.5)],
            offset: 4,
        };
        let piece = Piece {
            text: "x".to_owned(),
            tokens: vec![token],
            end: Some(End { reason: FinishReason::Length, stop: None }),
        };
        let envelope = Envelope::new(Endpoint::Completions, "M".to_owned());
        let response = whole(envelope, piece, Usage::new(1, 0, 1));
        let choice = &response.choices[0];
        assert_eq!(choice.finish_reason, Some(FinishReason::Length));
        let logprobs = choice.logprobs.as_ref().unwrap();
        let top = logprobs.top_logprobs.as_ref().unwrap();
        assert_eq!(top[0].0, [("a".to_owned(), -0.5), ("x".to_owned(), -3.0)]);
        assert_eq!(logprobs.text_offset, [4]);
    }
}
