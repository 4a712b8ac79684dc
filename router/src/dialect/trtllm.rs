//! TensorRT-LLM (and Baton): a client's request as context and as generation request, a context answer read.
//!
//! A request keeps its bytes: only the members that the protocol changes are cut and set, at every place they
//! occur. What a client sends as `disaggregated_params` is always overwritten.

use std::ops::Range;

use baton_shared::id::DisaggRequestId;
use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::era::Era;
use super::{Api, early};
use crate::splice::edit::{Members, join, splice};
use crate::splice::scan::{Cursor, ScanError};

/// Where one member's values lie; almost always none or one.
type Places = Vec<Range<usize>>;

/// Why a client's body is refused here, before any worker saw it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRequest {
    /// Not one JSON object.
    #[error("the request body is not a JSON object: {0}")]
    NotJson(#[from] ScanError),
    /// `stream` decides how the answer is framed, so it has to be understood here.
    #[error("`stream` is neither true nor false")]
    Stream,
}

/// A client's request: its bytes and where the members lie that routing reads or changes.
#[derive(Clone, Debug)]
pub struct ClientRequest {
    /// Which endpoint it came to.
    pub api: Api,
    /// Whether the answer is to be streamed.
    pub stream: bool,
    /// Length of the prompt (or all messages) as JSON, in bytes.
    pub prompt_bytes: usize,
    /// Whether the prompt is a list of token ids.
    pub prompt_is_ids: bool,
    body: Bytes,
    /// Where the prompt (or all messages) lies.
    content: Range<usize>,
    open: usize,
    empty: bool,
    places: RequestPlaces,
}

#[derive(Clone, Debug, Default)]
struct RequestPlaces {
    prompt: Places,
    prompt_token_ids: Places,
    stream: Places,
    stream_options: Places,
    disaggregated_params: Places,
    conversation_params: Places,
    cache_salt: Places,
}

impl ClientRequest {
    /// Scans the top level of `body` once.
    ///
    /// # Errors
    /// [`BadRequest`], to be answered with 400.
    pub fn parse(api: Api, body: Bytes) -> Result<Self, BadRequest> {
        let mut places = RequestPlaces::default();
        let (mut empty, mut messages) = (true, 0..0);
        let mut cursor = Cursor::new(&body);
        cursor.object(|cursor, name| {
            empty = false;
            let value = cursor.skip()?;
            match name {
                b"prompt" => places.prompt.push(value),
                b"messages" => messages = value,
                b"prompt_token_ids" => places.prompt_token_ids.push(value),
                b"stream" => places.stream.push(value),
                b"stream_options" => places.stream_options.push(value),
                b"disaggregated_params" => places.disaggregated_params.push(value),
                b"conversation_params" => places.conversation_params.push(value),
                b"cache_salt" => places.cache_salt.push(value),
                _ => {}
            }
            Ok::<(), ScanError>(())
        })?;
        cursor.end()?;
        let stream = match places.stream.last().map(|place| &body[place.clone()]) {
            Some(b"true") => true,
            Some(b"false" | b"null") | None => false,
            Some(_) => return Err(BadRequest::Stream),
        };
        let open = body.iter().position(|byte| *byte == b'{').unwrap_or_default();
        let (content, prompt_is_ids) = match (api, places.prompt.last()) {
            (Api::Completions, Some(place)) => (place.clone(), body[place.start] == b'['),
            (Api::Completions, None) => (0..0, false),
            (Api::Chat, _) => (messages, false),
        };
        let prompt_bytes = content.len();
        Ok(Self { api, stream, prompt_bytes, prompt_is_ids, body, content, open, empty, places })
    }

    /// The prompt (or all messages) as JSON.
    pub fn content(&self) -> &[u8] {
        &self.body[self.content.clone()]
    }

    /// `cache_salt` as JSON: requests of different salts share nothing in a worker's cache.
    pub fn cache_salt(&self) -> Option<&[u8]> {
        let salt = &self.body[self.places.cache_salt.last()?.clone()];
        (salt != b"null").then_some(salt)
    }

    /// `conversation_params.conversation_id`, as JSON text.
    pub fn conversation_id(&self) -> Option<&str> {
        #[derive(Deserialize)]
        struct Params<'a> {
            #[serde(borrow)]
            conversation_id: Option<&'a RawValue>,
        }
        let place = self.places.conversation_params.last()?;
        let params: Option<Params<'_>> = serde_json::from_slice(&self.body[place.clone()]).ok()?;
        let id = params?.conversation_id?.get();
        // What is no text, or says nothing, is no id.
        (id.starts_with('"') && id.len() > 2).then_some(id)
    }

    /// Whether a streamed answer is to end with the token counts.
    pub fn wants_usage(&self) -> bool {
        #[derive(Deserialize)]
        struct Options {
            #[serde(default)]
            include_usage: bool,
        }
        self.places.stream_options.last().is_some_and(|place| {
            serde_json::from_slice::<Option<Options>>(&self.body[place.clone()])
                .is_ok_and(|options| options.is_some_and(|options| options.include_usage))
        })
    }

    /// The body for a worker that does both phases.
    pub fn whole(&self) -> Vec<Bytes> {
        let mut members = Members::of(self.open, self.empty);
        if !self.places.disaggregated_params.is_empty() {
            let null = vec![Bytes::from_static(b"null")];
            members.set(DISAGGREGATED_PARAMS, &self.places.disaggregated_params, null);
        }
        join(splice(&self.body, 0..self.body.len(), members.into_edits()))
    }

    /// The body of a context request with this id for a worker of this age.
    pub fn context(&self, id: DisaggRequestId, era: Era) -> Vec<Bytes> {
        let params = era.context_params(id);
        let mut members = Members::of(self.open, self.empty);
        let places = &self.places;
        members.set(DISAGGREGATED_PARAMS, &places.disaggregated_params, vec![params.into()]);
        members.set("\"stream\":", &places.stream, vec![Bytes::from_static(b"false")]);
        members.set(
            "\"stream_options\":",
            &places.stream_options,
            vec![Bytes::from_static(b"null")],
        );
        join(splice(&self.body, 0..self.body.len(), members.into_edits()))
    }

    /// The body of the generation request that goes on from `context`, for a worker of this age.
    pub fn generation(&self, context: &ContextAnswer, era: Era) -> Vec<Bytes> {
        let mut members = Members::of(self.open, self.empty);
        let places = &self.places;
        let params = context.generation_params(era);
        members.set(DISAGGREGATED_PARAMS, &places.disaggregated_params, params);
        match (self.api, &context.prompt_token_ids, &context.prompt_token_ids_b64) {
            (Api::Completions, Some(ids), _) => {
                members.set("\"prompt\":", &places.prompt, vec![context.slice(ids)]);
            }
            (Api::Chat, _, Some(base64)) => {
                members.set("\"prompt_token_ids_b64\":", &[], vec![context.slice(base64)]);
            }
            (Api::Chat, Some(ids), None) => {
                let ids = vec![context.slice(ids)];
                members.set("\"prompt_token_ids\":", &places.prompt_token_ids, ids);
            }
            // Without ids the generation worker reads the prompt itself; the record is bound to what it finds.
            (Api::Completions | Api::Chat, None, _) => {}
        }
        join(splice(&self.body, 0..self.body.len(), members.into_edits()))
    }
}

const DISAGGREGATED_PARAMS: &str = "\"disaggregated_params\":";

/// Why a context worker's 2xx answer cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadContextAnswer {
    /// Not one JSON object.
    #[error("it is not a JSON object: {0}")]
    NotJson(#[from] ScanError),
    /// `choices` is missing or empty.
    #[error("it has no choice")]
    NoChoice,
    /// The first choice says nothing of why it ended.
    #[error("`finish_reason` is missing")]
    NoFinishReason,
    /// Neither finished nor handed over.
    #[error("`disaggregated_params` or its `ctx_request_id` is missing, `finish_reason` is {0}")]
    NoParams(String),
}

/// A context worker's answer: its bytes and where things lie in them. Token ids and records are never parsed.
#[derive(Clone, Debug)]
pub struct ContextAnswer {
    /// The id in force: the answer's, else the one that was sent.
    pub id: DisaggRequestId,
    pub(super) body: Bytes,
    pub(super) found: Found,
    prompt_token_ids: Option<Range<usize>>,
    prompt_token_ids_b64: Option<Range<usize>>,
}

/// Where the members of an answer lie; JSON `null` counts as missing.
#[derive(Clone, Debug, Default)]
pub(super) struct Found {
    pub(super) id: Option<Range<usize>>,
    pub(super) created: Option<Range<usize>>,
    pub(super) model: Option<Range<usize>>,
    pub(super) usage: Option<Range<usize>>,
    pub(super) choices: Option<Range<usize>>,
    pub(super) finish_reason: Option<Range<usize>>,
    pub(super) stop_reason: Option<Range<usize>>,
    pub(super) text: Option<Range<usize>>,
    pub(super) message: Option<Range<usize>>,
    pub(super) logprobs: Option<Range<usize>>,
    params: Option<Params>,
}

/// The choice's `disaggregated_params` (the last ones, if there are several) and where their members lie.
#[derive(Clone, Debug, Default)]
struct Params {
    place: Range<usize>,
    /// Whether there is no member.
    empty: bool,
    /// Whether they name a conversation.
    conversation: bool,
    request_type: Places,
    disagg_request_id: Places,
    schedule_style: Places,
    ctx_usage: Places,
    ctx_request_id: Option<Range<usize>>,
    opaque_state: Option<Range<usize>>,
    info_endpoint: Option<Range<usize>>,
}

impl ContextAnswer {
    /// Finds its way through a whole 2xx answer; `sent` is the id of the request.
    ///
    /// # Errors
    /// [`BadContextAnswer`]: the worker is to blame.
    pub fn parse(body: Bytes, sent: DisaggRequestId) -> Result<Self, BadContextAnswer> {
        let mut answer = Self {
            id: sent,
            body: Bytes::new(),
            found: Found::default(),
            prompt_token_ids: None,
            prompt_token_ids_b64: None,
        };
        let mut cursor = Cursor::new(&body);
        cursor.object(|cursor, name| {
            let place = match name {
                b"choices" => {
                    let place = read_choices(cursor, &mut answer.found)?;
                    answer.found.choices = Some(place);
                    return Ok(());
                }
                b"id" => &mut answer.found.id,
                b"created" => &mut answer.found.created,
                b"model" => &mut answer.found.model,
                b"usage" => &mut answer.found.usage,
                b"prompt_token_ids" => &mut answer.prompt_token_ids,
                b"prompt_token_ids_b64" => &mut answer.prompt_token_ids_b64,
                _ => return cursor.skip().map(|_| ()),
            };
            *place = present(cursor)?;
            Ok::<(), ScanError>(())
        })?;
        cursor.end()?;
        answer.body = body;
        answer.check()?;
        if answer.is_finished() {
            early::check(&answer)?;
        }
        Ok(answer)
    }

    /// Whether the first token ended the text, so that there is no generation request.
    pub fn is_finished(&self) -> bool {
        !matches!(
            self.found.finish_reason.as_ref().map(|place| &self.body[place.clone()]),
            Some(b"\"length\"" | b"\"not_finished\"")
        )
    }

    /// What `x-trtllm-disagg-auth` signs: `ctx_info_endpoint` (of a list its first element), `encoded_opaque_state`.
    pub fn signed_state(&self) -> (Option<String>, Option<String>) {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Endpoint {
            One(String),
            Many(Vec<String>),
        }
        let Some(params) = &self.found.params else { return (None, None) };
        let endpoint =
            params.info_endpoint.as_ref().and_then(|place| {
                match serde_json::from_slice(&self.body[place.clone()]).ok()? {
                    Endpoint::One(endpoint) => Some(endpoint),
                    Endpoint::Many(all) => all.into_iter().next(),
                }
            });
        let state = params.opaque_state.as_ref();
        let state = state.and_then(|at| serde_json::from_slice(&self.body[at.clone()]).ok());
        (endpoint, state)
    }

    pub(super) fn slice(&self, place: &Range<usize>) -> Bytes {
        self.body.slice(place.clone())
    }

    fn check(&mut self) -> Result<(), BadContextAnswer> {
        if self.found.choices.is_none() {
            return Err(BadContextAnswer::NoChoice);
        }
        let Some(reason) = &self.found.finish_reason else {
            return Err(BadContextAnswer::NoFinishReason);
        };
        let params = self.found.params.as_ref();
        let usable = params.is_some_and(|params| params.ctx_request_id.is_some());
        if !self.is_finished() && !usable {
            let reason = String::from_utf8_lossy(&self.body[reason.clone()]).into_owned();
            return Err(BadContextAnswer::NoParams(reason));
        }
        if let Some(place) = params.and_then(|params| params.disagg_request_id.last())
            && let Ok(id) = serde_json::from_slice(&self.body[place.clone()])
        {
            self.id = id;
        }
        Ok(())
    }

    /// The choice's `disaggregated_params`, turned into a generation request's.
    fn generation_params(&self, era: Era) -> Vec<Bytes> {
        let found = &self.found;
        let Some(params) = &found.params else { return vec![Bytes::from_static(b"null")] };
        if era < Era::Main || params.conversation {
            return self.known_params(&params.place, era);
        }
        let usage = match &found.usage {
            Some(place) => self.slice(place),
            None => Bytes::from_static(b"null"),
        };
        let mut members = Members::of(params.place.start, params.empty);
        let literal = |text: &'static str| vec![Bytes::from_static(text.as_bytes())];
        members.set("\"request_type\":", &params.request_type, literal("\"generation_only\""));
        let id = vec![Bytes::from(self.id.to_string())];
        members.set("\"disagg_request_id\":", &params.disagg_request_id, id);
        members.set("\"schedule_style\":", &params.schedule_style, literal("0"));
        members.set("\"ctx_usage\":", &params.ctx_usage, vec![usage]);
        splice(&self.body, params.place.clone(), members.into_edits())
    }

    /// The same, of the answer's members only those that the age knows.
    fn known_params(&self, params: &Range<usize>, era: Era) -> Vec<Bytes> {
        let fixed = Bytes::from_static;
        let usage = || self.found.usage.as_ref().map_or(fixed(b"null"), |at| self.slice(at));
        let mut pieces = vec![fixed(b"{\"request_type\":\"generation_only\"")];
        if era >= Era::V13 {
            pieces.push(format!(",\"disagg_request_id\":{}", self.id).into());
        }
        if era == Era::Main {
            pieces.extend([fixed(b",\"schedule_style\":0,\"ctx_usage\":"), usage()]);
        }
        let mut cursor = Cursor::new(&self.body[params.clone()]);
        let read = cursor.object(|cursor, name| {
            let value = cursor.skip()?;
            let value = params.start + value.start..params.start + value.end;
            let value = match name {
                b"request_type" | b"disagg_request_id" => return Ok(()),
                b"schedule_style" | b"ctx_usage" if era == Era::Main => return Ok(()),
                b"schedule_style" => fixed(b"0"),
                b"ctx_usage" => usage(),
                _ => self.slice(&value),
            };
            if era.knows(name) {
                let name = String::from_utf8_lossy(name);
                pieces.extend([format!(",\"{name}\":").into(), value]);
            }
            Ok::<(), ScanError>(())
        });
        debug_assert!(read.is_ok(), "the answer was scanned before");
        pieces.push(fixed(b"}"));
        pieces
    }
}

/// Consumes a value; `None` for `null`.
fn present(cursor: &mut Cursor<'_>) -> Result<Option<Range<usize>>, ScanError> {
    let place = cursor.skip()?;
    Ok((cursor.bytes(&place) != b"null").then_some(place))
}

/// Reads the first choice member by member and skips the others; gives the first choice's place.
fn read_choices(cursor: &mut Cursor<'_>, found: &mut Found) -> Result<Range<usize>, ScanError> {
    cursor.peek()?;
    let start = cursor.offset();
    cursor.array(|cursor, index| {
        if index > 0 {
            return cursor.skip().map(|_| ());
        }
        read_choice(cursor, found)
    })?;
    Ok(start..cursor.offset())
}

fn read_choice(cursor: &mut Cursor<'_>, found: &mut Found) -> Result<(), ScanError> {
    cursor.object(|cursor, name| {
        let place = match name {
            b"disaggregated_params" if cursor.peek()? == b'{' => {
                found.params = Some(read_params(cursor)?);
                return Ok(());
            }
            b"finish_reason" => &mut found.finish_reason,
            b"stop_reason" => &mut found.stop_reason,
            b"text" => &mut found.text,
            b"message" => &mut found.message,
            b"logprobs" => &mut found.logprobs,
            _ => return cursor.skip().map(|_| ()),
        };
        *place = present(cursor)?;
        Ok(())
    })
}

fn read_params(cursor: &mut Cursor<'_>) -> Result<Params, ScanError> {
    let start = cursor.offset();
    let mut found = Params { empty: true, ..Params::default() };
    cursor.object(|cursor, name| {
        found.empty = false;
        match name {
            b"request_type" => found.request_type.push(cursor.skip()?),
            b"disagg_request_id" => found.disagg_request_id.push(cursor.skip()?),
            b"schedule_style" => found.schedule_style.push(cursor.skip()?),
            b"ctx_usage" => found.ctx_usage.push(cursor.skip()?),
            b"ctx_request_id" => found.ctx_request_id = present(cursor)?,
            b"encoded_opaque_state" => found.opaque_state = present(cursor)?,
            b"ctx_info_endpoint" => found.info_endpoint = present(cursor)?,
            b"conversation_id" => {
                found.conversation = true;
                cursor.skip()?;
            }
            _ => return cursor.skip().map(|_| ()),
        }
        Ok::<(), ScanError>(())
    })?;
    found.place = start..cursor.offset();
    Ok(found)
}

#[cfg(test)]
mod tests;
