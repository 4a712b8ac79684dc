//! Tokens to the pieces of an answer: text, log-probabilities, and where it ends.
//!
//! The one place that does so, for whole answers, streams, context and generation passes alike: that is why all of
//! them say the same. It sees tokens only, never where they come from.

use std::sync::Arc;

use baton_shared::wire::completion::{FinishReason, StopReason};

use crate::engine::output::{self, TokenOut};
use crate::text::Texts;
use crate::text::stop::{Released, StopStrings};
use crate::text::stream::TextStream;

/// Lowest log-probability on the wire, which knows no infinity.
pub const LOWEST: f32 = -9999.0;

type Decode = Box<dyn Fn(&[u32]) -> String + Send>;

/// Puts one answer together.
pub struct Assembler {
    texts: Arc<dyn Texts>,
    stream: TextStream<Decode>,
    stops: StopStrings,
    rules: EndRules,
    /// Tokens whose log-probabilities are out with the text they belong to.
    pending: Vec<ScoredToken>,
    wants_scores: bool,
    /// Characters of text so far, held back ones included.
    characters: u32,
    tokens: u32,
}

/// Ids that end a text.
#[derive(Clone, Debug, Default)]
pub struct EndRules {
    /// The model's own; none if they are to be passed over.
    pub eos: Vec<u32>,
    /// The request's.
    pub stop: Vec<u32>,
}

/// What is new in an answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Piece {
    /// Text that may go out.
    pub text: String,
    /// Tokens of this text, if log-probabilities are wanted.
    pub tokens: Vec<ScoredToken>,
    /// Set in the last piece.
    pub end: Option<End>,
}

/// A token with its log-probabilities.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoredToken {
    /// Itself.
    pub bytes: Vec<u8>,
    /// Natural logarithm, finite.
    pub logprob: f32,
    /// Alternatives, best first.
    pub top: Vec<(Vec<u8>, f32)>,
    /// Characters of text before it.
    pub offset: u32,
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// OpenAI's word.
    pub reason: FinishReason,
    /// Which stop of the request it was.
    pub stop: Option<StopReason>,
}

/// What an answer needs of its request.
#[derive(Clone, Debug)]
pub struct AnswerRules {
    /// Strings that end the text.
    pub stop: Vec<String>,
    /// Ids that end it.
    pub ids: EndRules,
    /// Whether special tokens have no text.
    pub skip_special: bool,
    /// Whether log-probabilities are wanted.
    pub wants_scores: bool,
}

impl EndRules {
    /// All of them, for the engine.
    pub fn all(&self) -> Vec<u32> {
        self.eos.iter().chain(&self.stop).copied().collect()
    }

    /// How a text ends that has just got this token, if it does.
    fn end_of(&self, token: u32) -> Option<End> {
        let stop = if self.stop.contains(&token) {
            Some(StopReason::Token(token))
        } else if self.eos.contains(&token) {
            None
        } else {
            return None;
        };
        Some(End { reason: FinishReason::Stop, stop })
    }
}

impl Piece {
    /// Whether a client has anything of it.
    pub fn is_empty(&self) -> bool {
        self.text.is_empty() && self.tokens.is_empty() && self.end.is_none()
    }

    /// Appends what follows.
    pub fn extend(&mut self, next: Self) {
        let Self { text, tokens, end } = next;
        self.text.push_str(&text);
        self.tokens.extend(tokens);
        self.end = end;
    }
}

impl Assembler {
    /// No token yet.
    pub fn new(texts: Arc<dyn Texts>, rules: AnswerRules) -> Self {
        let AnswerRules { stop, ids, skip_special, wants_scores } = rules;
        let decoder = Arc::clone(&texts);
        let decode: Decode = Box::new(move |ids| decoder.decode(ids, skip_special));
        Self {
            texts,
            stream: TextStream::new(decode),
            stops: StopStrings::new(stop),
            rules: ids,
            pending: Vec::new(),
            wants_scores,
            characters: 0,
            tokens: 0,
        }
    }

    /// Tokens so far.
    pub fn tokens(&self) -> u32 {
        self.tokens
    }

    /// Takes the next token. A piece with an end is the last.
    pub fn token(&mut self, token: &TokenOut) -> Piece {
        self.tokens += 1;
        if self.wants_scores {
            self.pending.push(self.scored(token));
        }
        if let Some(end) = self.rules.end_of(token.id) {
            return self.close(end);
        }
        let text = self.stream.push(token.id);
        self.release(&text)
    }

    /// The engine has ended the sequence; its last token was seen already.
    pub fn end(&mut self, reason: output::FinishReason) -> Piece {
        let reason = match reason {
            output::FinishReason::Stop => FinishReason::Stop,
            output::FinishReason::Length => FinishReason::Length,
        };
        self.close(End { reason, stop: None })
    }

    /// What is held back comes out, unless a stop string ends it.
    fn close(&mut self, end: End) -> Piece {
        let text = self.stream.finish();
        let mut piece = self.release(&text);
        if piece.end.is_none() {
            piece.text.push_str(&self.stops.finish());
            piece.tokens.append(&mut self.pending);
            piece.end = Some(end);
        }
        piece
    }

    fn release(&mut self, text: &str) -> Piece {
        let characters = u32::try_from(text.chars().count()).unwrap_or(u32::MAX);
        self.characters = self.characters.saturating_add(characters);
        let (text, end) = match self.stops.push(text) {
            Released::Text(text) => (text, None),
            Released::Stopped { text, stop } => {
                let stop = Some(StopReason::Text(stop));
                (text, Some(End { reason: FinishReason::Stop, stop }))
            }
        };
        let is_due = !text.is_empty() || end.is_some();
        let tokens = if is_due { std::mem::take(&mut self.pending) } else { Vec::new() };
        Piece { text, tokens, end }
    }

    fn scored(&self, token: &TokenOut) -> ScoredToken {
        let top = token
            .top
            .iter()
            .map(|(id, logprob)| (self.texts.token_bytes(*id), logprob.max(LOWEST)));
        ScoredToken {
            bytes: self.texts.token_bytes(token.id),
            logprob: token.logprob.max(LOWEST),
            top: top.collect(),
            offset: self.characters,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::fake_texts::{EOS, FakeTexts};

    fn assembler(stop: &[&str], stop_ids: &[u32]) -> Assembler {
        let rules = AnswerRules {
            stop: stop.iter().map(|stop| (*stop).to_owned()).collect(),
            ids: EndRules { eos: vec![EOS], stop: stop_ids.to_vec() },
            skip_special: true,
            wants_scores: true,
        };
        Assembler::new(Arc::new(FakeTexts), rules)
    }

    fn token(id: u32) -> TokenOut {
        TokenOut { id, logprob: -0.5, rank: 1, top: vec![(id, -0.5), (EOS, f32::NEG_INFINITY)] }
    }

    /// All pieces of `tokens`, joined, and how many had text or an end.
    fn whole(assembler: &mut Assembler, tokens: &[u32]) -> (Piece, usize) {
        let mut answer = Piece::default();
        let mut count = 0;
        for id in tokens {
            let piece = assembler.token(&token(*id));
            count += usize::from(!piece.is_empty());
            answer.extend(piece);
            if answer.end.is_some() {
                return (answer, count);
            }
        }
        answer.extend(assembler.end(output::FinishReason::Length));
        (answer, count + 1)
    }

    fn ids(text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    #[test]
    fn every_token_is_scored_once_and_comes_with_its_text() {
        let (answer, pieces) = whole(&mut assembler(&[], &[]), &ids("aé"));
        assert_eq!((answer.text.as_str(), pieces), ("aé", 3));
        let offsets: Vec<_> = answer.tokens.iter().map(|token| token.offset).collect();
        assert_eq!(offsets, [0, 1, 1]);
        assert_eq!(answer.tokens[1].bytes, [0xc3]);
        assert_eq!(answer.tokens[0].top[1].1, LOWEST);
        assert_eq!(answer.end, Some(End { reason: FinishReason::Length, stop: None }));
    }

    #[test]
    fn the_models_end_is_counted_and_has_no_text() {
        let mut assembler = assembler(&[], &[]);
        let (answer, _) = whole(&mut assembler, &[ids("a"), vec![EOS]].concat());
        assert_eq!((answer.text.as_str(), assembler.tokens()), ("a", 2));
        assert_eq!(answer.end, Some(End { reason: FinishReason::Stop, stop: None }));
        assert_eq!(answer.tokens.len(), 2);
    }

    #[test]
    fn a_stop_id_of_the_request_has_no_text_and_is_named() {
        let (answer, _) = whole(&mut assembler(&[], &[u32::from(b'x')]), &ids("abxc"));
        assert_eq!(answer.text, "ab");
        let stop = Some(StopReason::Token(u32::from(b'x')));
        assert_eq!(answer.end, Some(End { reason: FinishReason::Stop, stop }));
    }

    #[test]
    fn a_stop_string_over_several_tokens_ends_the_answer_before_it() {
        let mut assembler = assembler(&["xyz"], &[]);
        let (answer, _) = whole(&mut assembler, &ids("abxyzd"));
        assert_eq!((answer.text.as_str(), assembler.tokens()), ("ab", 5));
        let stop = Some(StopReason::Text("xyz".to_owned()));
        assert_eq!(answer.end, Some(End { reason: FinishReason::Stop, stop }));
        assert_eq!(answer.tokens.len(), 5);
    }

    #[test]
    fn what_might_have_become_a_stop_string_comes_out_at_the_end() {
        let (answer, _) = whole(&mut assembler(&["xyz"], &[]), &ids("abxy"));
        assert_eq!(answer.text, "abxy");
        let (answer, _) = whole(&mut assembler(&["xyz"], &[]), &[ids("xy"), vec![EOS]].concat());
        assert_eq!(answer.text, "xy");
    }

    #[test]
    fn an_incomplete_character_at_the_end_can_complete_a_stop_string() {
        let (answer, _) = whole(&mut assembler(&["\u{fffd}"], &[]), &[u32::from(b'a'), 0xe2]);
        assert_eq!(answer.text, "a");
        assert_eq!(answer.end.unwrap().reason, FinishReason::Stop);
    }
}
