//! What both endpoints' requests have in common: how a body is read, and the members that say how to sample.
//!
//! Members nobody here knows are ignored, as OpenAI's clients expect. Members that would change the answer and
//! that no worker honours yet are refused by [`SamplingFields::check`], never ignored.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{self, DeserializeOwned, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::expected;

/// A request that cannot be served as it is: HTTP 400.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct InvalidRequest {
    /// The member at fault, if it is one.
    pub param: Option<String>,
    /// What must hold.
    pub message: String,
}

impl InvalidRequest {
    /// A mistake in the member `param`.
    pub fn member(param: &str, rule: impl fmt::Display) -> Self {
        Self { param: Some(param.to_owned()), message: format!("`{param}` {rule}") }
    }

    fn whole(message: String) -> Self {
        Self { param: None, message }
    }
}

/// Reads `body` as a JSON object of type `T`; an error names the member at fault.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, InvalidRequest> {
    let is_list = body.trim_ascii_start().starts_with(b"[");
    match serde_json::from_slice(body) {
        // serde would read a list as the members in order.
        Ok(_) if is_list => Err(InvalidRequest::whole(NO_OBJECT.to_owned())),
        Ok(parsed) => Ok(parsed),
        Err(error) => Err(explain::<T>(body, &error)),
    }
}

const NO_OBJECT: &str = "the body must be a JSON object";

/// Finds the member that does not fit by reading each alone. Only after a failure, and linear in the body.
fn explain<T: DeserializeOwned>(body: &[u8], error: &serde_json::Error) -> InvalidRequest {
    if !error.is_data() {
        return InvalidRequest::whole(format!("the body is not JSON: {error}"));
    }
    let Ok(members) = serde_json::from_slice::<BTreeMap<String, &RawValue>>(body) else {
        return InvalidRequest::whole(NO_OBJECT.to_owned());
    };
    for (name, value) in members {
        let alone = BTreeMap::from([(&name, value)]);
        let refused = serde_json::to_string(&alone).map(|text| serde_json::from_str::<T>(&text));
        if let Ok(Err(error)) = refused {
            return InvalidRequest::member(&name, expected::rule(&message_of(&error), "an object"));
        }
    }
    InvalidRequest::whole(format!("the body does not fit: {}", message_of(error)))
}

/// The error without its position, which means little in a body nobody typed.
fn message_of(error: &serde_json::Error) -> String {
    let message = error.to_string();
    match message.rfind(" at line ") {
        Some(end) => message[..end].to_owned(),
        None => message,
    }
}

/// Members of both endpoints that say how to sample and when to stop.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct SamplingFields {
    /// Most tokens to generate.
    pub max_tokens: Option<u32>,
    /// The same, by its newer name; wins.
    pub max_completion_tokens: Option<u32>,
    /// 0 = greedy.
    pub temperature: Option<f32>,
    /// Mass of the smallest set of most probable tokens to keep.
    pub top_p: Option<f32>,
    /// Most probable tokens kept; 0 or -1 = all.
    pub top_k: Option<i32>,
    /// Share of the best token's probability below which a token is dropped.
    pub min_p: Option<f32>,
    /// Makes sampling repeatable.
    pub seed: Option<i64>,
    /// Choices wanted.
    pub n: Option<u32>,
    /// Candidates the choices are taken from.
    pub best_of: Option<u32>,
    /// Texts that end the answer.
    pub stop: Option<StopStrings>,
    /// Ids that end the answer, beside the model's own.
    pub stop_token_ids: Option<Vec<u32>>,
    /// Whether the end-of-sequence ids are like any other.
    pub ignore_eos: Option<bool>,
    /// Subtracted once from the logit of each generated token.
    pub presence_penalty: Option<f32>,
    /// Subtracted from a token's logit for each time it was generated.
    pub frequency_penalty: Option<f32>,
    /// Divides or multiplies the logits of tokens seen.
    pub repetition_penalty: Option<f32>,
    /// Whether special tokens are left out of the text; the default.
    pub skip_special_tokens: Option<bool>,
    /// Whether to answer as a stream of events.
    pub stream: Option<bool>,
    /// What else a stream carries.
    pub stream_options: Option<StreamOptions>,
    /// Only requests of the same salt share cached keys and values.
    pub cache_salt: Option<String>,
    /// Not honoured yet.
    pub logit_bias: Option<BTreeMap<String, f32>>,
    /// Not honoured yet.
    pub min_tokens: Option<u32>,
    /// Not honoured yet.
    pub use_beam_search: Option<bool>,
    /// Not honoured yet, other than plain text.
    pub response_format: Option<Value>,
    /// Not honoured yet.
    pub truncate_prompt_tokens: Option<i64>,
    /// Not honoured yet.
    pub include_stop_str_in_output: Option<bool>,
    /// Not honoured yet.
    pub lora_request: Option<Value>,
}

/// `stream_options`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StreamOptions {
    /// Whether the stream ends with a chunk of token counts.
    pub include_usage: Option<bool>,
    /// Whether every chunk carries them.
    pub continuous_usage_stats: Option<bool>,
}

/// `stop`: one text or a list of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopStrings(pub Vec<String>);

impl SamplingFields {
    /// `max_completion_tokens`, else `max_tokens`.
    pub fn output_limit(&self) -> Option<u32> {
        self.max_completion_tokens.or(self.max_tokens)
    }

    /// Whether to answer as a stream.
    pub fn is_stream(&self) -> bool {
        self.stream == Some(true)
    }

    /// Whether a stream ends with a chunk of token counts.
    pub fn wants_usage(&self) -> bool {
        self.stream_options.is_some_and(|options| options.include_usage == Some(true))
    }

    /// Whether every chunk of a stream carries token counts.
    pub fn wants_usage_in_every_chunk(&self) -> bool {
        self.stream_options.is_some_and(|options| options.continuous_usage_stats == Some(true))
    }

    /// Refuses values out of range and what no worker honours yet.
    pub fn check(&self) -> Result<(), InvalidRequest> {
        self.check_ranges()?;
        self.check_stops()?;
        if self.cache_salt.as_ref().is_some_and(|salt| salt.trim().is_empty()) {
            return Err(InvalidRequest::member("cache_salt", "must not be empty"));
        }
        self.check_available()
    }

    fn check_ranges(&self) -> Result<(), InvalidRequest> {
        let ranges = [
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_p", self.top_p, f32::MIN_POSITIVE, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("presence_penalty", self.presence_penalty, -2.0, 2.0),
            ("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
            ("repetition_penalty", self.repetition_penalty, f32::MIN_POSITIVE, 100.0),
        ];
        for (name, value, low, high) in ranges {
            if value.is_some_and(|value| !(low..=high).contains(&value)) {
                let low = if low == f32::MIN_POSITIVE {
                    "above 0".to_owned()
                } else {
                    format!("at least {low}")
                };
                return Err(InvalidRequest::member(
                    name,
                    format!("must be {low} and at most {high}"),
                ));
            }
        }
        if self.top_k.is_some_and(|top_k| top_k < -1) {
            return Err(InvalidRequest::member(
                "top_k",
                "must be at least 1, or 0 or -1 for all tokens",
            ));
        }
        for (name, limit) in
            [("max_tokens", self.max_tokens), ("max_completion_tokens", self.max_completion_tokens)]
        {
            if limit == Some(0) {
                return Err(InvalidRequest::member(name, "must be at least 1"));
            }
        }
        Ok(())
    }

    fn check_stops(&self) -> Result<(), InvalidRequest> {
        const MOST: usize = 64;
        const LONGEST: usize = 1024;
        let stops = self.stop.as_ref().map_or(&[][..], |stop| &stop.0);
        if stops.len() > MOST {
            return Err(InvalidRequest::member("stop", format!("may have at most {MOST} texts")));
        }
        if stops.iter().any(|stop| stop.is_empty() || stop.len() > LONGEST) {
            let rule = format!("texts must have 1 to {LONGEST} bytes");
            return Err(InvalidRequest::member("stop", rule));
        }
        if self.stop_token_ids.as_ref().is_some_and(|ids| ids.len() > MOST) {
            let rule = format!("may have at most {MOST} ids");
            return Err(InvalidRequest::member("stop_token_ids", rule));
        }
        if self.stream_options.is_some() && !self.is_stream() {
            return Err(InvalidRequest::member("stream_options", "needs `stream` to be true"));
        }
        Ok(())
    }

    fn check_available(&self) -> Result<(), InvalidRequest> {
        let not_yet = |name| Err(InvalidRequest::member(name, "is not available yet"));
        let is_plain_text = |format: &Value| format.get("type").is_some_and(|kind| kind == "text");
        for (name, count) in [("n", self.n), ("best_of", self.best_of)] {
            match count {
                None | Some(1) => {}
                Some(0) => return Err(InvalidRequest::member(name, "must be at least 1")),
                Some(_) => {
                    return Err(InvalidRequest::member(name, "above 1 is not available yet"));
                }
            }
        }
        if self.logit_bias.as_ref().is_some_and(|bias| !bias.is_empty()) {
            return not_yet("logit_bias");
        }
        if self.min_tokens.is_some_and(|least| least > 0) {
            return not_yet("min_tokens");
        }
        if self.use_beam_search == Some(true) {
            return not_yet("use_beam_search");
        }
        if self.response_format.as_ref().is_some_and(|format| !is_plain_text(format)) {
            return Err(InvalidRequest::member(
                "response_format",
                "other than text is not available yet",
            ));
        }
        if self.truncate_prompt_tokens.is_some() {
            return not_yet("truncate_prompt_tokens");
        }
        if self.include_stop_str_in_output == Some(true) {
            return not_yet("include_stop_str_in_output");
        }
        if self.lora_request.is_some() {
            return not_yet("lora_request");
        }
        Ok(())
    }
}

impl<'de> Deserialize<'de> for StopStrings {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(StopVisitor)
    }
}

struct StopVisitor;

impl<'de> Visitor<'de> for StopVisitor {
    type Value = StopStrings;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string or a list of strings")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<StopStrings, E> {
        Ok(StopStrings(vec![text.to_owned()]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<StopStrings, A::Error> {
        let mut stops = Vec::new();
        while let Some(stop) = list.next_element()? {
            stops.push(stop);
        }
        Ok(StopStrings(stops))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(json: &str) -> Result<SamplingFields, InvalidRequest> {
        let fields: SamplingFields = parse(json.as_bytes())?;
        fields.check().map(|()| fields)
    }

    #[test]
    fn a_member_of_the_wrong_type_is_named() {
        for (json, param, message) in [
            (
                r#"{"top_p":0.5,"max_tokens":"many"}"#,
                "max_tokens",
                "`max_tokens` must be a whole number from 0 to 4294967295",
            ),
            (r#"{"stream":1}"#, "stream", "`stream` must be `true` or `false`"),
            (r#"{"stop":5}"#, "stop", "`stop` must be a string or a list of strings"),
            (r#"{"stop":["a",5]}"#, "stop", "`stop` must be a string"),
            (r#"{"stream_options":"x"}"#, "stream_options", "`stream_options` must be an object"),
        ] {
            let error = fields(json).unwrap_err();
            assert_eq!((error.param.as_deref(), error.message.as_str()), (Some(param), message));
        }
    }

    #[test]
    fn a_body_that_is_no_json_object_is_refused_without_a_member() {
        for (json, start) in [
            ("", "the body is not JSON: EOF"),
            ("{\"n\":", "the body is not JSON: EOF"),
            ("{\"n\":1,}", "the body is not JSON: trailing comma"),
            ("[1]", "the body must be a JSON object"),
            ("\u{feff}{}", "the body is not JSON"),
            (r#"{"n":1,"n":1}"#, "the body does not fit: duplicate field `n`"),
        ] {
            let error = fields(json).unwrap_err();
            assert_eq!(error.param, None);
            assert!(error.message.starts_with(start), "{json}: {error}");
        }
        assert!(fields(&"[".repeat(10_000)).is_err());
    }

    #[test]
    fn values_out_of_range_are_refused_by_name() {
        for (json, param) in [
            (r#"{"temperature":-0.1}"#, "temperature"),
            (r#"{"temperature":1e300}"#, "temperature"),
            (r#"{"top_p":0}"#, "top_p"),
            (r#"{"top_p":1.1}"#, "top_p"),
            (r#"{"min_p":2}"#, "min_p"),
            (r#"{"presence_penalty":3}"#, "presence_penalty"),
            (r#"{"repetition_penalty":0}"#, "repetition_penalty"),
            (r#"{"top_k":-2}"#, "top_k"),
            (r#"{"max_tokens":0}"#, "max_tokens"),
            (r#"{"stop":[""]}"#, "stop"),
            (r#"{"stream_options":{}}"#, "stream_options"),
            (r#"{"n":0}"#, "n"),
        ] {
            assert_eq!(fields(json).unwrap_err().param.as_deref(), Some(param), "{json}");
        }
    }

    #[test]
    fn what_would_change_the_answer_and_is_not_built_is_refused() {
        for json in [
            r#"{"n":2}"#,
            r#"{"best_of":2}"#,
            r#"{"logit_bias":{"50256":-100}}"#,
            r#"{"response_format":{"type":"json_object"}}"#,
            r#"{"use_beam_search":true}"#,
            r#"{"min_tokens":5}"#,
        ] {
            assert!(fields(json).unwrap_err().message.contains("not available yet"), "{json}");
        }
        assert!(fields(r#"{"logit_bias":{},"response_format":{"type":"text"},"n":1}"#).is_ok());
    }

    #[test]
    fn nulls_and_unknown_members_are_like_members_left_out() {
        let given = fields(r#"{"stop":null,"n":null,"stream_options":null,"user":"u","x":[{}]}"#);
        assert_eq!(given.unwrap(), SamplingFields::default());
    }

    #[test]
    fn the_newer_name_of_the_limit_wins() {
        let given = fields(r#"{"max_tokens":5,"max_completion_tokens":7}"#).unwrap();
        assert_eq!(given.output_limit(), Some(7));
        assert_eq!(fields(r#"{"max_tokens":5}"#).unwrap().output_limit(), Some(5));
    }
}
