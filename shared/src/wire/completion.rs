//! `/v1/completions`: request, answer and stream chunk, as OpenAI and TensorRT-LLM shape them.

use std::fmt;

use serde::de::{self, DeserializeSeed, Deserializer, SeqAccess, Visitor};
use serde::ser::{SerializeMap, Serializer};
use serde::{Deserialize, Serialize};

use super::disagg::DisaggregatedParams;
use super::request::{self, InvalidRequest, SamplingFields};
use super::usage::Usage;

/// A request as it came; every member may be missing.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct CompletionRequest {
    /// Served name.
    pub model: Option<String>,
    /// What to continue.
    pub prompt: Option<Prompt>,
    /// The prompt's ids, where a router has them already; wins over `prompt`.
    pub prompt_token_ids: Option<Vec<u32>>,
    /// The same in base64 ([`super::token_ids`]); wins over both.
    pub prompt_token_ids_b64: Option<String>,
    /// Alternatives reported for each token; 0 = only the token's own log-probability.
    pub logprobs: Option<u32>,
    /// Whether the answer starts with the prompt.
    pub echo: Option<bool>,
    /// Text after the gap to fill; not honoured yet.
    pub suffix: Option<String>,
    /// Whether the model's start token, if it has one, is put before a text prompt; the default.
    pub add_special_tokens: Option<bool>,
    /// Which phase this is, and what the other one left.
    pub disaggregated_params: Option<DisaggregatedParams>,
    /// How to sample and when to stop; members of the same object.
    #[serde(skip)]
    pub sampling: SamplingFields,
}

/// One prompt. On the wire it may also be a list of exactly one of these.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// Text, to be tokenised.
    Text(String),
    /// Token ids; may be empty, which is the worker's to refuse.
    Ids(Vec<u32>),
}

impl CompletionRequest {
    /// Reads a body; an error names the member at fault.
    pub fn parse(body: &[u8]) -> Result<Self, InvalidRequest> {
        let own: Self = request::parse(body)?;
        Ok(Self { sampling: request::parse(body)?, ..own })
    }

    /// Refuses values out of range and what no worker honours yet.
    pub fn check(&self) -> Result<(), InvalidRequest> {
        const MOST: u32 = 20;
        if self.logprobs.is_some_and(|count| count > MOST) {
            return Err(InvalidRequest::member("logprobs", format!("must be at most {MOST}")));
        }
        if self.echo == Some(true) {
            return Err(InvalidRequest::member("echo", "is not available yet"));
        }
        if self.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty()) {
            return Err(InvalidRequest::member("suffix", "is not available yet"));
        }
        self.sampling.check()
    }
}

/// What an object on the wire is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ObjectKind {
    /// Answer and chunk of `/v1/completions`.
    #[serde(rename = "text_completion")]
    TextCompletion,
    /// Answer of `/v1/chat/completions`.
    #[serde(rename = "chat.completion")]
    ChatCompletion,
    /// Chunk of it.
    #[serde(rename = "chat.completion.chunk")]
    ChatCompletionChunk,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// An end-of-sequence id, a stop id or a stop text.
    Stop,
    /// `max_tokens`, or the model's longest sequence.
    Length,
}

/// What a stop was, where it was not the model's own end: upstream's `stop_reason`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum StopReason {
    /// One of `stop_token_ids`.
    Token(u32),
    /// One of `stop`.
    Text(String),
}

/// A whole answer; also a chunk of a stream, whose choices carry a piece of text each.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CompletionResponse {
    /// `cmpl-…`, the same in every chunk.
    pub id: String,
    /// Always [`ObjectKind::TextCompletion`].
    pub object: ObjectKind,
    /// Unix seconds.
    pub created: u64,
    /// As served.
    pub model: String,
    /// Context passes only: the prompt's ids, for the generation worker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
    /// Exactly one; none in a stream's last chunk, which carries only `usage`.
    pub choices: Vec<CompletionChoice>,
    /// Token counts; `None` in a stream but for its last chunk, and there only if asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

/// One continuation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CompletionChoice {
    /// 0.
    pub index: u32,
    /// Generated text, or the next piece of it.
    pub text: String,
    /// One entry a token of `text`.
    #[serde(default)]
    pub logprobs: Option<CompletionLogprobs>,
    /// `None` until the last piece.
    pub finish_reason: Option<FinishReason>,
    /// Which stop it was.
    #[serde(default)]
    pub stop_reason: Option<StopReason>,
    /// Context passes only: what the generation worker needs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disaggregated_params: Option<DisaggregatedParams>,
}

/// Log-probabilities of `/v1/completions`; the lists have one entry a token.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CompletionLogprobs {
    /// Where each token starts in the generated text, in characters.
    pub text_offset: Vec<u32>,
    /// Natural logarithms, finite.
    pub token_logprobs: Vec<Option<f32>>,
    /// The tokens as text.
    pub tokens: Vec<String>,
    /// The best alternatives, the token itself among them; `None` where none were asked for.
    pub top_logprobs: Option<Vec<TopLogprobs>>,
}

/// Text and log-probability of alternatives, best first; an object on the wire.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TopLogprobs(pub Vec<(String, f32)>);

/// A fresh id for an answer: `cmpl-` or `chatcmpl-` and 32 hexadecimal digits.
pub fn response_id(kind: ObjectKind) -> String {
    let prefix = match kind {
        ObjectKind::TextCompletion => "cmpl",
        ObjectKind::ChatCompletion | ObjectKind::ChatCompletionChunk => "chatcmpl",
    };
    format!("{prefix}-{:032x}", rand::random::<u128>())
}

impl Serialize for TopLogprobs {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let mut map = to.serialize_map(Some(self.0.len()))?;
        // Two ids may have the same text; the better one speaks for both.
        for (at, (text, logprob)) in self.0.iter().enumerate() {
            if !self.0[..at].iter().any(|(earlier, _)| earlier == text) {
                map.serialize_entry(text, logprob)?;
            }
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for TopLogprobs {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = TopLogprobs;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of log-probabilities")
            }

            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<TopLogprobs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(TopLogprobs(pairs))
            }
        }
        from.deserialize_map(Pairs)
    }
}

impl Serialize for Prompt {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Text(text) => text.serialize(to),
            Self::Ids(ids) => ids.serialize(to),
        }
    }
}

impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(PromptVisitor { depth: 0 })
    }
}

/// Reads a prompt. `depth` 0 is the member itself, 1 an element of it.
struct PromptVisitor {
    depth: u8,
}

/// An element of a list.
enum Element {
    Id(u32),
    Whole(Prompt),
}

struct ElementSeed;

const SHAPE: &str = "a string, a list of token ids, or a list of one of these";

impl<'de> DeserializeSeed<'de> for ElementSeed {
    type Value = Element;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Element, D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ElementSeed {
    type Value = Element;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(SHAPE)
    }

    fn visit_u64<E: de::Error>(self, id: u64) -> Result<Element, E> {
        let too_large = |_| E::custom("holds a token id above 4294967295");
        u32::try_from(id).map(Element::Id).map_err(too_large)
    }

    fn visit_i64<E: de::Error>(self, _: i64) -> Result<Element, E> {
        Err(E::custom("holds a negative token id"))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Element, E> {
        Ok(Element::Whole(Prompt::Text(text.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Element, A::Error> {
        PromptVisitor { depth: 1 }.visit_seq(list).map(Element::Whole)
    }
}

impl<'de> Visitor<'de> for PromptVisitor {
    type Value = Prompt;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(SHAPE)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Prompt, E> {
        Ok(Prompt::Text(text.to_owned()))
    }

    fn visit_string<E: de::Error>(self, text: String) -> Result<Prompt, E> {
        Ok(Prompt::Text(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Prompt, A::Error> {
        let several = || de::Error::custom("holds several prompts, send one a request");
        let mut ids = Vec::new();
        let mut whole = None;
        while let Some(element) = list.next_element_seed(ElementSeed)? {
            match element {
                Element::Id(id) if whole.is_none() => ids.push(id),
                Element::Whole(prompt) if self.depth == 0 && ids.is_empty() && whole.is_none() => {
                    whole = Some(prompt);
                }
                Element::Whole(_) if self.depth == 0 && ids.is_empty() => return Err(several()),
                Element::Id(_) | Element::Whole(_) => {
                    return Err(de::Error::custom(format!("must be {SHAPE}")));
                }
            }
        }
        Ok(whole.unwrap_or(Prompt::Ids(ids)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(json: &str) -> Result<Prompt, InvalidRequest> {
        let body = format!("{{\"prompt\":{json}}}");
        CompletionRequest::parse(body.as_bytes()).map(|request| request.prompt.unwrap())
    }

    #[test]
    fn a_prompt_is_one_text_or_one_list_of_ids() {
        let text = Prompt::Text("a\u{1f600}".to_owned());
        assert_eq!(prompt(r#""a\ud83d\ude00""#), Ok(text.clone()));
        assert_eq!(prompt(r#"["a\ud83d\ude00"]"#), Ok(text));
        assert_eq!(prompt("[1,2]"), Ok(Prompt::Ids(vec![1, 2])));
        assert_eq!(prompt("[[1,2]]"), Ok(Prompt::Ids(vec![1, 2])));
        assert_eq!(prompt("[]"), Ok(Prompt::Ids(vec![])));
    }

    #[test]
    fn other_prompts_are_refused_in_words() {
        let shape = "must be a string, a list of token ids, or a list of one of these";
        let several = "holds several prompts, send one a request";
        for (json, rule) in [
            ("5", shape),
            ("{}", shape),
            ("[1.5]", shape),
            ("[1,\"a\"]", shape),
            ("[\"a\",1]", shape),
            ("[[[1]]]", shape),
            ("[[\"a\"]]", shape),
            ("[\"a\",\"b\"]", several),
            ("[[1],[2]]", several),
            ("[-1]", "holds a negative token id"),
            ("[4294967296]", "holds a token id above 4294967295"),
        ] {
            let error = prompt(json).unwrap_err();
            assert_eq!(error.param.as_deref(), Some("prompt"));
            assert_eq!(error.message, format!("`prompt` {rule}"), "{json}");
        }
    }

    #[test]
    fn a_generation_request_of_upstream_is_read() {
        let body = br#"{"model":"M","prompt":[1,405],"max_tokens":16,"stream":true,"future":1,
            "disaggregated_params":{"request_type":"generation_only","first_gen_tokens":[263],
            "ctx_request_id":4611686018427387904,"encoded_opaque_state":"AA==","draft_tokens":null,
            "first_gen_logits":null,"first_gen_log_probs":[[{"token_id":263,"logprob":-0.5,"rank":1}]],
            "schedule_style":0,"unknown":{},"ctx_usage":{"prompt_tokens":2,"total_tokens":3,"completion_tokens":1}}}"#;
        let request = CompletionRequest::parse(body).unwrap();
        assert!(request.check().is_ok() && request.sampling.is_stream());
        let params = request.disaggregated_params.unwrap();
        assert_eq!(params.ctx_request_id, Some(1 << 62));
        assert_eq!(params.ctx_usage.unwrap().prompt_tokens, 2);
    }

    fn answer() -> CompletionResponse {
        CompletionResponse {
            id: "cmpl-1".to_owned(),
            object: ObjectKind::TextCompletion,
            created: 5,
            model: "M".to_owned(),
            prompt_token_ids: None,
            choices: vec![CompletionChoice {
                index: 0,
                text: " a".to_owned(),
                logprobs: None,
                finish_reason: Some(FinishReason::Length),
                stop_reason: None,
                disaggregated_params: None,
            }],
            usage: Some(Usage::new(3, 0, 1)),
        }
    }

    #[test]
    fn a_plain_answer_is_openais() {
        assert_eq!(
            serde_json::to_string(&answer()).unwrap(),
            concat!(
                r#"{"id":"cmpl-1","object":"text_completion","created":5,"model":"M","choices":"#,
                r#"[{"index":0,"text":" a","logprobs":null,"finish_reason":"length","stop_reason":null}],"#,
                r#""usage":{"prompt_tokens":3,"total_tokens":4,"completion_tokens":1,"#,
                r#""prompt_tokens_details":{"cached_tokens":0}}}"#
            )
        );
    }

    #[test]
    fn a_context_answer_carries_ids_and_every_disaggregated_field() {
        let mut answer = answer();
        answer.prompt_token_ids = Some(vec![1, 2]);
        answer.choices[0].disaggregated_params = Some(DisaggregatedParams::default());
        let json = serde_json::to_value(&answer).unwrap();
        assert_eq!(json["prompt_token_ids"], serde_json::json!([1, 2]));
        let params = json["choices"][0]["disaggregated_params"].as_object().unwrap();
        let names: Vec<&str> = params.keys().map(String::as_str).collect();
        assert_eq!(
            names,
            [
                "request_type",
                "first_gen_tokens",
                "first_gen_log_probs",
                "first_gen_logits",
                "ctx_request_id",
                "encoded_opaque_state",
                "draft_tokens",
                "disagg_request_id",
                "ctx_dp_rank",
                "ctx_info_endpoint",
                "schedule_style",
                "ctx_usage",
                "return_prompt_token_ids_b64",
                "resolved_thinking"
            ]
        );
        let text = serde_json::to_string(&answer).unwrap();
        let back: CompletionResponse = serde_json::from_str(&text).unwrap();
        assert_eq!(back.prompt_token_ids, answer.prompt_token_ids);
    }

    #[test]
    fn alternatives_are_an_object_best_first() {
        let top = TopLogprobs(vec![("b".into(), -0.1), ("a".into(), -2.5), ("b".into(), -3.0)]);
        let text = serde_json::to_string(&top).unwrap();
        assert_eq!(text, r#"{"b":-0.1,"a":-2.5}"#);
        assert_eq!(serde_json::from_str::<TopLogprobs>(&text).unwrap().0, top.0[..2]);
    }
}
