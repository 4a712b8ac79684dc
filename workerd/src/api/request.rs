//! What a client or router asks for, whichever endpoint it came by: read, checked, and in one shape.
//!
//! What needs the tokenizer, the engine or a key is not decided here.

use baton_shared::wire::chat::ChatRequest;
use baton_shared::wire::completion::{CompletionRequest, Prompt};
use baton_shared::wire::disagg::DisaggregatedParams;
use baton_shared::wire::error::ErrorCode;
use baton_shared::wire::request::{InvalidRequest, SamplingFields};
use baton_shared::wire::token_ids;

use super::error::ApiError;
use crate::engine::sampling::SamplingParams;

/// Which kind of answer is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/completions`
    Completions,
    /// `/v1/chat/completions`
    Chat,
}

/// One request.
#[derive(Clone, Debug)]
pub struct Request {
    /// How it came, and how it is answered.
    pub endpoint: Endpoint,
    /// The name it uses for the model.
    pub model: String,
    /// What to continue.
    pub prompt: PromptSource,
    /// `cache_salt`.
    pub salt: Option<String>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Strings that end the text.
    pub stop: Vec<String>,
    /// Ids that end the text besides the model's own.
    pub stop_token_ids: Vec<u32>,
    /// Whether the model's own end is passed over.
    pub ignore_eos: bool,
    /// Whether special tokens have no text.
    pub skip_special: bool,
    /// Generated tokens at most, if given.
    pub max_tokens: Option<u32>,
    /// Whole answer or pieces.
    pub delivery: Delivery,
    /// Which part is done here.
    pub part: Part,
}

/// What to continue.
#[derive(Clone, Debug)]
pub enum PromptSource {
    /// To be tokenised, with or without the special tokens a text begins with.
    Text {
        /// The text.
        text: String,
        /// Whether special tokens are added.
        special: bool,
    },
    /// Token ids.
    Ids(Vec<u32>),
    /// To be rendered, then tokenised.
    Chat(Box<ChatRequest>),
}

/// How the answer is delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// At once.
    Whole,
    /// As a stream of events.
    Stream(StreamUsage),
}

/// Where a stream carries token counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamUsage {
    /// Nowhere.
    Never,
    /// In a chunk of its own at the end.
    Last,
    /// In every chunk, and at the end.
    Every,
}

/// Which part of a request is done here.
#[derive(Clone, Debug)]
pub enum Part {
    /// All of it.
    Whole,
    /// The prompt and the first token.
    Context {
        /// The id both parts share; `None` from routers that send none.
        request: Option<u64>,
        /// Whether the prompt's ids are wanted in base64.
        ids_in_base64: bool,
    },
    /// What follows a context part.
    Generation(Box<DisaggregatedParams>),
}

impl Endpoint {
    /// For labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Completions => "completions",
            Self::Chat => "chat",
        }
    }
}

impl Part {
    /// For labels.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::Context { .. } => "context",
            Self::Generation(_) => "generation",
        }
    }
}

impl PromptSource {
    /// The member it came by, for errors.
    pub fn member(&self) -> &'static str {
        match self {
            Self::Text { .. } | Self::Ids(_) => "prompt",
            Self::Chat(_) => "messages",
        }
    }
}

impl Request {
    /// Reads a body. `random` is the seed of a request without one.
    ///
    /// # Errors
    /// The first member that is wrong.
    pub fn parse(endpoint: Endpoint, body: &[u8], random: u64) -> Result<Self, ApiError> {
        match endpoint {
            Endpoint::Completions => Self::completion(body, random),
            Endpoint::Chat => Self::chat(body, random),
        }
    }

    fn completion(body: &[u8], random: u64) -> Result<Self, ApiError> {
        let request = CompletionRequest::parse(body)?;
        request.check()?;
        let ids = ids(request.prompt_token_ids, request.prompt_token_ids_b64.as_deref())?;
        let prompt = match (ids, request.prompt) {
            (Some(ids), _) | (None, Some(Prompt::Ids(ids))) => PromptSource::Ids(ids),
            (None, Some(Prompt::Text(text))) => {
                PromptSource::Text { text, special: request.add_special_tokens.unwrap_or(true) }
            }
            (None, None) => return Err(ApiError::member("prompt", "is missing")),
        };
        Self::build(
            Endpoint::Completions,
            request.model,
            prompt,
            &request.sampling,
            sampling(&request.sampling, request.logprobs, random),
            request.disaggregated_params,
        )
    }

    fn chat(body: &[u8], random: u64) -> Result<Self, ApiError> {
        let mut request = ChatRequest::parse(body)?;
        request.check()?;
        if request.tools.as_ref().is_some_and(|tools| !tools.is_empty()) {
            return Err(ApiError::member("tools", "is not available yet"));
        }
        let model = request.model.take();
        let disagg = request.disaggregated_params.take();
        let fields = std::mem::take(&mut request.sampling);
        let sampling = sampling(&fields, request.wanted_logprobs(), random);
        let ids =
            ids(request.prompt_token_ids.take(), request.prompt_token_ids_b64.take().as_deref())?;
        let prompt = match ids {
            Some(ids) => PromptSource::Ids(ids),
            None => PromptSource::Chat(Box::new(request)),
        };
        Self::build(Endpoint::Chat, model, prompt, &fields, sampling, disagg)
    }

    fn build(
        endpoint: Endpoint,
        model: Option<String>,
        prompt: PromptSource,
        fields: &SamplingFields,
        sampling: SamplingParams,
        disagg: Option<DisaggregatedParams>,
    ) -> Result<Self, ApiError> {
        let part = part(disagg)?;
        let delivery = match (fields.is_stream(), &part) {
            (true, Part::Context { .. }) => {
                return Err(ApiError::member("stream", "must be `false` for a context pass"));
            }
            (true, Part::Whole | Part::Generation(_)) if fields.wants_usage_in_every_chunk() => {
                Delivery::Stream(StreamUsage::Every)
            }
            (true, Part::Whole | Part::Generation(_)) if fields.wants_usage() => {
                Delivery::Stream(StreamUsage::Last)
            }
            (true, Part::Whole | Part::Generation(_)) => Delivery::Stream(StreamUsage::Never),
            (false, _) => Delivery::Whole,
        };
        Ok(Self {
            endpoint,
            model: model.ok_or_else(|| ApiError::member("model", "is missing"))?,
            prompt,
            salt: fields.cache_salt.clone(),
            sampling,
            stop: fields.stop.clone().unwrap_or_default().0,
            stop_token_ids: fields.stop_token_ids.clone().unwrap_or_default(),
            ignore_eos: fields.ignore_eos.unwrap_or(false),
            skip_special: fields.skip_special_tokens.unwrap_or(true),
            max_tokens: fields.output_limit(),
            delivery,
            part,
        })
    }
}

impl From<InvalidRequest> for ApiError {
    fn from(error: InvalidRequest) -> Self {
        let InvalidRequest { param, message } = error;
        Self { code: ErrorCode::InvalidRequest, message, param }
    }
}

/// The prompt's ids, if a router has tokenised already; base64 wins.
fn ids(plain: Option<Vec<u32>>, base64: Option<&str>) -> Result<Option<Vec<u32>>, ApiError> {
    match base64.map(token_ids::decode) {
        Some(Ok(ids)) => Ok(Some(ids)),
        Some(Err(error)) => Err(ApiError::member("prompt_token_ids_b64", error)),
        None => Ok(plain),
    }
}

fn sampling(fields: &SamplingFields, logprobs: Option<u32>, random: u64) -> SamplingParams {
    let default = SamplingParams::default();
    SamplingParams {
        temperature: fields.temperature.unwrap_or(default.temperature),
        top_p: fields.top_p.unwrap_or(default.top_p),
        top_k: fields.top_k.and_then(|top_k| u32::try_from(top_k).ok()).unwrap_or(default.top_k),
        min_p: fields.min_p.unwrap_or(default.min_p),
        seed: fields.seed.map_or(random, i64::cast_unsigned),
        frequency_penalty: fields.frequency_penalty.unwrap_or(default.frequency_penalty),
        presence_penalty: fields.presence_penalty.unwrap_or(default.presence_penalty),
        repetition_penalty: fields.repetition_penalty.unwrap_or(default.repetition_penalty),
        logprobs,
    }
}

fn part(params: Option<DisaggregatedParams>) -> Result<Part, ApiError> {
    let Some(params) = params else { return Ok(Part::Whole) };
    let refuse = |rule: &str| Err(ApiError::member("disaggregated_params", rule));
    match params.schedule_style {
        None | Some(0) => {}
        Some(1) => {
            return refuse("with `schedule_style` 1 (generation first) is not available yet");
        }
        Some(_) => return refuse("must have `schedule_style` 0"),
    }
    match params.request_type.to_ascii_lowercase().as_str() {
        "context_only" => Ok(Part::Context {
            request: params.disagg_request_id,
            ids_in_base64: params.return_prompt_token_ids_b64,
        }),
        "generation_only" => Ok(Part::Generation(Box::new(params))),
        "context_and_generation" => Ok(Part::Whole),
        _ => refuse(
            "must have a `request_type` of `context_only`, `generation_only` or `context_and_generation`",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn completion(more: &str) -> Result<Request, ApiError> {
        let body = format!("{{\"model\":\"M\",\"prompt\":\"a\"{more}}}");
        Request::parse(Endpoint::Completions, body.as_bytes(), 42)
    }

    fn chat(more: &str) -> Result<Request, ApiError> {
        let body = format!(
            "{{\"model\":\"M\",\"messages\":[{{\"role\":\"user\",\"content\":\"a\"}}]{more}}}"
        );
        Request::parse(Endpoint::Chat, body.as_bytes(), 42)
    }

    /// The member a request is refused for.
    fn blamed(result: Result<Request, ApiError>) -> String {
        let error = result.unwrap_err();
        assert_eq!(error.code, ErrorCode::InvalidRequest);
        error.param.unwrap()
    }

    #[test]
    fn a_plain_request_has_openais_defaults_and_the_seed_that_was_drawn() {
        let request = completion("").unwrap();
        let expected = SamplingParams { seed: 42, ..SamplingParams::default() };
        assert_eq!(request.sampling, expected);
        assert_eq!((request.max_tokens, request.delivery), (None, Delivery::Whole));
        assert!(matches!(request.part, Part::Whole));
        assert!(request.skip_special && !request.ignore_eos);
    }

    #[test]
    fn the_seed_and_log_probabilities_are_taken_over() {
        let request = completion(",\"seed\":-1,\"logprobs\":3,\"top_k\":-1").unwrap();
        let sampling = request.sampling;
        assert_eq!((sampling.seed, sampling.logprobs, sampling.top_k), (u64::MAX, Some(3), 0));
        let logprobs = |more| chat(more).unwrap().sampling.logprobs;
        assert_eq!(logprobs(",\"logprobs\":true,\"top_logprobs\":2"), Some(2));
        assert_eq!(logprobs(",\"logprobs\":true"), Some(0));
        assert_eq!(logprobs(""), None);
    }

    #[test]
    fn ids_of_a_router_win_over_text_and_messages() {
        let request = completion(",\"prompt_token_ids\":[1,2]").unwrap();
        assert!(matches!(request.prompt, PromptSource::Ids(ids) if ids == [1, 2]));
        let request = chat(",\"prompt_token_ids_b64\":\"AQAAAJUBAAA=\"").unwrap();
        assert!(matches!(request.prompt, PromptSource::Ids(ids) if ids == [1, 405]));
        assert_eq!(blamed(chat(",\"prompt_token_ids_b64\":\"x\"")), "prompt_token_ids_b64");
    }

    #[test]
    fn what_is_missing_or_not_built_is_named() {
        let missing = Request::parse(Endpoint::Completions, b"{\"model\":\"M\"}", 0);
        assert_eq!(blamed(missing), "prompt");
        let missing = Request::parse(Endpoint::Completions, b"{\"prompt\":\"a\"}", 0);
        assert_eq!(blamed(missing), "model");
        assert_eq!(blamed(chat(",\"tools\":[{}]")), "tools");
        assert!(chat(",\"tools\":[]").is_ok());
        assert_eq!(blamed(completion(",\"n\":2")), "n");
    }

    #[test]
    fn a_stream_says_where_it_carries_usage() {
        let delivery = |more| completion(more).unwrap().delivery;
        assert_eq!(delivery(",\"stream\":true"), Delivery::Stream(StreamUsage::Never));
        assert_eq!(
            delivery(",\"stream\":true,\"stream_options\":{\"include_usage\":true}"),
            Delivery::Stream(StreamUsage::Last)
        );
    }

    #[test]
    fn request_types_are_read_in_any_case_and_others_refused() {
        let with = |params: &str| completion(&format!(",\"disaggregated_params\":{params}"));
        let context = with(r#"{"request_type":"CONTEXT_ONLY","disagg_request_id":7}"#).unwrap();
        assert!(matches!(context.part, Part::Context { request: Some(7), ids_in_base64: false }));
        let whole = with(r#"{"request_type":"context_and_generation"}"#).unwrap();
        assert!(matches!(whole.part, Part::Whole));
        for params in [
            "{}",
            r#"{"request_type":"decode"}"#,
            r#"{"request_type":"context_only","schedule_style":1}"#,
            "[]",
        ] {
            assert_eq!(blamed(with(params)), "disaggregated_params", "{params}");
        }
        let streaming = completion(
            ",\"stream\":true,\"disaggregated_params\":{\"request_type\":\"context_only\"}",
        );
        assert_eq!(blamed(streaming), "stream");
    }
}
