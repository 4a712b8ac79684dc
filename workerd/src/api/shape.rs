//! An answer's outer form: one JSON object, or the events of a stream, as its endpoint has it.

use baton_shared::wire::completion::{ObjectKind, response_id};
use baton_shared::wire::disagg::DisaggregatedParams;
use baton_shared::wire::error::ErrorCode;
use baton_shared::wire::usage::Usage;
use serde::Serialize;

use super::answer::{Piece, ScoredToken};
use super::error::ApiError;
use super::request::Endpoint;
use super::worker::unix_seconds;
use super::{chat, completions};

/// What every object of one answer has in common.
#[derive(Clone, Debug)]
pub struct Envelope {
    /// Where it goes.
    pub endpoint: Endpoint,
    /// `cmpl-…` or `chatcmpl-…`.
    pub id: String,
    /// Unix seconds.
    pub created: u64,
    /// As the request named it.
    pub model: String,
}

/// The prompt in a context answer.
#[derive(Clone, Debug)]
pub enum PromptIds {
    /// As numbers.
    Plain(Vec<u32>),
    /// In base64, where the request asked for it.
    Base64(String),
}

impl Envelope {
    /// A new answer.
    pub fn new(endpoint: Endpoint, model: String) -> Self {
        let kind = match endpoint {
            Endpoint::Completions => ObjectKind::TextCompletion,
            Endpoint::Chat => ObjectKind::ChatCompletion,
        };
        Self { endpoint, id: response_id(kind), created: unix_seconds(), model }
    }

    /// The whole answer.
    ///
    /// # Errors
    /// Never for what an answer holds.
    pub fn whole(self, answer: Piece, usage: Usage) -> Result<Vec<u8>, ApiError> {
        match self.endpoint {
            Endpoint::Completions => json(&completions::whole(self, answer, usage)),
            Endpoint::Chat => json(&chat::whole(self, answer, usage)),
        }
    }

    /// The answer of a context pass.
    ///
    /// # Errors
    /// As [`Self::whole`].
    pub fn context(
        self,
        answer: Piece,
        usage: Usage,
        ids: PromptIds,
        params: DisaggregatedParams,
    ) -> Result<Vec<u8>, ApiError> {
        match self.endpoint {
            Endpoint::Completions => {
                let mut response = completions::whole(self, answer, usage);
                // Upstream has no base64 here.
                response.prompt_token_ids = Some(match ids {
                    PromptIds::Plain(ids) => ids,
                    PromptIds::Base64(text) => {
                        baton_shared::wire::token_ids::decode(&text).unwrap_or_default()
                    }
                });
                response.choices.iter_mut().for_each(|choice| {
                    choice.disaggregated_params = Some(params.clone());
                });
                json(&response)
            }
            Endpoint::Chat => {
                let mut response = chat::whole(self, answer, usage);
                match ids {
                    PromptIds::Plain(ids) => response.prompt_token_ids = Some(ids),
                    PromptIds::Base64(text) => response.prompt_token_ids_b64 = Some(text),
                }
                response.choices.iter_mut().for_each(|choice| {
                    choice.disaggregated_params = Some(params.clone());
                });
                json(&response)
            }
        }
    }

    /// Events before the first piece.
    ///
    /// # Errors
    /// As [`Self::whole`].
    pub fn opening(&self, into: &mut Vec<u8>) -> Result<(), ApiError> {
        match self.endpoint {
            Endpoint::Completions => Ok(()),
            Endpoint::Chat => event(&chat::opening(self), into),
        }
    }

    /// Events of a piece; `usage` if each carries it.
    ///
    /// # Errors
    /// As [`Self::whole`].
    pub fn piece(
        &self,
        piece: Piece,
        usage: Option<Usage>,
        into: &mut Vec<u8>,
    ) -> Result<(), ApiError> {
        match self.endpoint {
            Endpoint::Completions => event(&completions::chunk(self, piece, usage), into),
            Endpoint::Chat => {
                chat::chunks(self, piece, usage).iter().try_for_each(|chunk| event(chunk, into))
            }
        }
    }

    /// The event that carries only usage.
    ///
    /// # Errors
    /// As [`Self::whole`].
    pub fn usage(&self, usage: Usage, into: &mut Vec<u8>) -> Result<(), ApiError> {
        match self.endpoint {
            Endpoint::Completions => event(&completions::usage_chunk(self, usage), into),
            Endpoint::Chat => event(&chat::usage_chunk(self, usage), into),
        }
    }
}

/// Appends one server-sent event.
///
/// # Errors
/// As [`Envelope::whole`].
pub fn event(value: &impl Serialize, into: &mut Vec<u8>) -> Result<(), ApiError> {
    into.extend_from_slice(b"data: ");
    serde_json::to_writer(&mut *into, value).map_err(unwritable)?;
    into.extend_from_slice(b"\n\n");
    Ok(())
}

fn json(value: &impl Serialize) -> Result<Vec<u8>, ApiError> {
    serde_json::to_vec(value).map_err(unwritable)
}

fn unwritable(error: serde_json::Error) -> ApiError {
    ApiError::new(ErrorCode::Internal, format!("the answer cannot be written: {error}"))
}

/// A token as text; broken characters are replaced.
pub fn text_of(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Whether alternatives were asked for.
pub fn has_alternatives(tokens: &[ScoredToken]) -> bool {
    tokens.iter().any(|token| !token.top.is_empty())
}
