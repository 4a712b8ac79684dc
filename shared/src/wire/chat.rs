//! `/v1/chat/completions`: request, answer and stream chunk, as OpenAI and TensorRT-LLM shape them.

use std::fmt;

use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value};

use super::completion::{FinishReason, ObjectKind, StopReason};
use super::disagg::DisaggregatedParams;
use super::request::{self, InvalidRequest, SamplingFields};
use super::usage::Usage;

/// A request as it came; every member may be missing.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct ChatRequest {
    /// Served name.
    pub model: Option<String>,
    /// The conversation so far.
    pub messages: Option<Vec<ChatMessage>>,
    /// The rendered prompt's ids, where a router has them already; then the messages are not rendered.
    pub prompt_token_ids: Option<Vec<u32>>,
    /// The same in base64 ([`super::token_ids`]); wins.
    pub prompt_token_ids_b64: Option<String>,
    /// Whether to report log-probabilities.
    pub logprobs: Option<bool>,
    /// Alternatives reported for each token; needs `logprobs`.
    pub top_logprobs: Option<u32>,
    /// Functions the model may call; handed to the template.
    pub tools: Option<Vec<Value>>,
    /// Which of them it must call; only `auto` and `none` are honoured yet.
    pub tool_choice: Option<Value>,
    /// Whether the template ends with the start of an answer; the default.
    pub add_generation_prompt: Option<bool>,
    /// A template of the client's own; refused.
    pub chat_template: Option<String>,
    /// More variables for the template.
    pub chat_template_kwargs: Option<Map<String, Value>>,
    /// Which phase this is, and what the other one left.
    pub disaggregated_params: Option<DisaggregatedParams>,
    /// How to sample and when to stop; members of the same object.
    #[serde(skip)]
    pub sampling: SamplingFields,
}

/// One message; members other than role and content are kept for the template.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant`, `tool`, …: what the template knows.
    pub role: String,
    /// `None` where an assistant only called tools.
    #[serde(default)]
    pub content: Option<Content>,
    /// `name`, `tool_calls`, `tool_call_id`, …
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// A message's text. On the wire also a list of parts `{"type":"text","text":…}`, joined by line ends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Content(pub String);

impl ChatRequest {
    /// Reads a body; an error names the member at fault.
    pub fn parse(body: &[u8]) -> Result<Self, InvalidRequest> {
        let own: Self = request::parse(body)?;
        Ok(Self { sampling: request::parse(body)?, ..own })
    }

    /// Refuses values out of range and what no worker honours yet.
    pub fn check(&self) -> Result<(), InvalidRequest> {
        const MOST: u32 = 20;
        if self.messages.as_ref().is_none_or(Vec::is_empty) {
            return Err(InvalidRequest::member("messages", "must hold at least one message"));
        }
        if self.top_logprobs.is_some_and(|count| count > MOST) {
            return Err(InvalidRequest::member("top_logprobs", format!("must be at most {MOST}")));
        }
        if self.top_logprobs.is_some_and(|count| count > 0) && self.logprobs != Some(true) {
            return Err(InvalidRequest::member("top_logprobs", "needs `logprobs` to be true"));
        }
        let is_soft = |choice: &Value| choice == "auto" || choice == "none";
        if self.tool_choice.as_ref().is_some_and(|choice| !is_soft(choice)) {
            let rule = "other than `auto` and `none` is not available yet";
            return Err(InvalidRequest::member("tool_choice", rule));
        }
        if self.chat_template.is_some() {
            let rule = "is not accepted from a request, the model's own is used";
            return Err(InvalidRequest::member("chat_template", rule));
        }
        self.sampling.check()
    }

    /// Alternatives to report for each token; `None` = no log-probabilities.
    pub fn wanted_logprobs(&self) -> Option<u32> {
        (self.logprobs == Some(true)).then(|| self.top_logprobs.unwrap_or(0))
    }
}

/// A whole answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ChatResponse {
    /// `chatcmpl-…`.
    pub id: String,
    /// Always [`ObjectKind::ChatCompletion`].
    pub object: ObjectKind,
    /// Unix seconds.
    pub created: u64,
    /// As served.
    pub model: String,
    /// Context passes only: the rendered prompt's ids, for the generation worker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
    /// The same in base64, where the request asked for that instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids_b64: Option<String>,
    /// Exactly one.
    pub choices: Vec<ChatChoice>,
    /// Token counts.
    pub usage: Usage,
}

/// One answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ChatChoice {
    /// 0.
    pub index: u32,
    /// What the model said.
    pub message: AnswerMessage,
    /// One entry a token.
    #[serde(default)]
    pub logprobs: Option<ChatLogprobs>,
    /// Why it ended.
    pub finish_reason: Option<FinishReason>,
    /// Which stop it was.
    #[serde(default)]
    pub stop_reason: Option<StopReason>,
    /// Context passes only: what the generation worker needs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disaggregated_params: Option<DisaggregatedParams>,
}

/// What the model said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnswerMessage {
    /// Who speaks.
    pub role: Assistant,
    /// What it said.
    pub content: String,
}

/// The only role that answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Assistant {
    /// The model.
    Assistant,
}

/// One event of a stream.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ChatChunk {
    /// The same in every chunk.
    pub id: String,
    /// Always [`ObjectKind::ChatCompletionChunk`].
    pub object: ObjectKind,
    /// Unix seconds, the same in every chunk.
    pub created: u64,
    /// As served.
    pub model: String,
    /// Exactly one; none in the last chunk, which carries only `usage`.
    pub choices: Vec<ChunkChoice>,
    /// Token counts; in the last chunk, if asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
}

/// A piece of one answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ChunkChoice {
    /// 0.
    pub index: u32,
    /// What is new.
    pub delta: Delta,
    /// One entry a token of the piece.
    #[serde(default)]
    pub logprobs: Option<ChatLogprobs>,
    /// `None` until the last piece.
    pub finish_reason: Option<FinishReason>,
    /// Which stop it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<StopReason>,
}

/// What is new in a chunk: the role in the first, text in the following, nothing in the last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delta {
    /// Who speaks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<Assistant>,
    /// The next piece of text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}

/// Log-probabilities of `/v1/chat/completions`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ChatLogprobs {
    /// One entry a token.
    pub content: Vec<ChatTokenLogprob>,
}

/// A token with its alternatives.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChatTokenLogprob {
    /// As text; broken characters are replaced.
    pub token: String,
    /// Natural logarithm, finite.
    pub logprob: f32,
    /// As bytes, whole.
    pub bytes: Option<Vec<u8>>,
    /// Best first; empty where none were asked for.
    pub top_logprobs: Vec<ChatTopLogprob>,
}

/// One alternative.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChatTopLogprob {
    /// As text; broken characters are replaced.
    pub token: String,
    /// Natural logarithm, finite.
    pub logprob: f32,
    /// As bytes, whole.
    pub bytes: Option<Vec<u8>>,
}

/// One part of a content list.
#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    text: Option<String>,
}

impl Serialize for Content {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(ContentVisitor)
    }
}

struct ContentVisitor;

impl<'de> Visitor<'de> for ContentVisitor {
    type Value = Content;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("messages whose content is a string or a list of text parts")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Content, E> {
        Ok(Content(text.to_owned()))
    }

    fn visit_string<E: de::Error>(self, text: String) -> Result<Content, E> {
        Ok(Content(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Content, A::Error> {
        let mut texts = Vec::new();
        while let Some(part) = list.next_element::<Part>()? {
            match (part.kind.as_str(), part.text) {
                ("text", Some(text)) => texts.push(text),
                ("text", None) => {
                    return Err(de::Error::custom("holds a text part without `text`"));
                }
                (kind, _) => {
                    let kind: String = kind.chars().take(40).collect();
                    let rule =
                        format!("holds a part of type `{kind}`, only `text` is available yet");
                    return Err(de::Error::custom(rule));
                }
            }
        }
        Ok(Content(texts.join("\n")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(json: &str) -> Result<ChatRequest, InvalidRequest> {
        let request = ChatRequest::parse(json.as_bytes())?;
        request.check().map(|()| request)
    }

    #[test]
    fn content_is_a_text_or_text_parts() {
        let request = chat(
            r#"{"messages":[{"role":"system","content":"s"},
            {"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b","x":1}],"name":"n"},
            {"role":"assistant","content":null,"tool_calls":[{"id":"1"}]},
            {"role":"tool"}]}"#,
        );
        let messages = request.unwrap().messages.unwrap();
        let texts: Vec<_> =
            messages.iter().map(|m| m.content.as_ref().map(|c| c.0.as_str())).collect();
        assert_eq!(texts, [Some("s"), Some("a\nb"), None, None]);
        assert_eq!(messages[1].other["name"], "n");
        assert_eq!(messages[2].other["tool_calls"][0]["id"], "1");
    }

    #[test]
    fn other_messages_are_refused_in_words() {
        for (messages, rule) in [
            ("[]", "must hold at least one message"),
            ("null", "must hold at least one message"),
            ("5", "must be a list"),
            ("[{\"content\":\"a\"}]", "missing field `role`"),
            (
                "[{\"role\":\"user\",\"content\":5}]",
                "must be messages whose content is a string or a list of text parts",
            ),
            (
                "[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\",\"image_url\":{}}]}]",
                "holds a part of type `image_url`, only `text` is available yet",
            ),
        ] {
            let error = chat(&format!("{{\"messages\":{messages}}}")).unwrap_err();
            assert_eq!(error.param.as_deref(), Some("messages"));
            assert_eq!(error.message, format!("`messages` {rule}"));
        }
    }

    #[test]
    fn alternatives_need_log_probabilities() {
        let with = |more: &str| chat(&format!(r#"{{"messages":[{{"role":"user"}}]{more}}}"#));
        assert!(with(r#","top_logprobs":3"#).is_err());
        assert!(with(r#","logprobs":true,"top_logprobs":21"#).is_err());
        assert_eq!(
            with(r#","logprobs":true,"top_logprobs":3"#).unwrap().wanted_logprobs(),
            Some(3)
        );
        assert_eq!(with(r#","logprobs":true"#).unwrap().wanted_logprobs(), Some(0));
        assert_eq!(with(r#","logprobs":false,"top_logprobs":0"#).unwrap().wanted_logprobs(), None);
    }

    #[test]
    fn a_plain_chunk_is_openais() {
        let chunk = ChatChunk {
            id: "chatcmpl-1".to_owned(),
            object: ObjectKind::ChatCompletionChunk,
            created: 5,
            model: "M".to_owned(),
            choices: vec![ChunkChoice {
                index: 0,
                delta: Delta { role: None, content: Some("a".to_owned()) },
                logprobs: None,
                finish_reason: None,
                stop_reason: None,
            }],
            usage: None,
        };
        assert_eq!(
            serde_json::to_string(&chunk).unwrap(),
            concat!(
                r#"{"id":"chatcmpl-1","object":"chat.completion.chunk","created":5,"model":"M","#,
                r#""choices":[{"index":0,"delta":{"content":"a"},"logprobs":null,"finish_reason":null}]}"#
            )
        );
    }

    #[test]
    fn a_plain_answer_is_openais() {
        let answer = ChatResponse {
            id: "chatcmpl-1".to_owned(),
            object: ObjectKind::ChatCompletion,
            created: 5,
            model: "M".to_owned(),
            prompt_token_ids: None,
            prompt_token_ids_b64: None,
            choices: vec![ChatChoice {
                index: 0,
                message: AnswerMessage { role: Assistant::Assistant, content: "a".to_owned() },
                logprobs: Some(ChatLogprobs {
                    content: vec![ChatTokenLogprob {
                        token: "a".to_owned(),
                        logprob: -0.5,
                        bytes: Some(vec![97]),
                        top_logprobs: vec![],
                    }],
                }),
                finish_reason: Some(FinishReason::Stop),
                stop_reason: Some(StopReason::Text("b".to_owned())),
                disaggregated_params: None,
            }],
            usage: Usage::new(3, 0, 1),
        };
        let text = serde_json::to_string(&answer).unwrap();
        assert!(text.contains(concat!(
            r#""choices":[{"index":0,"message":{"role":"assistant","content":"a"},"#,
            r#""logprobs":{"content":[{"token":"a","logprob":-0.5,"bytes":[97],"top_logprobs":[]}]},"#,
            r#""finish_reason":"stop","stop_reason":"b"}]"#
        )));
        let back: ChatResponse = serde_json::from_str(&text).unwrap();
        assert_eq!(back.choices[0].message.content, "a");
    }
}
