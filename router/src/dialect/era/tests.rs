//! Bodies of both hops, judged by the request models of each age as far as they were read: an unknown member is a
//! 400 there, a missing or mistyped one too.

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};

use super::*;
use crate::dialect::Api;
use crate::dialect::trtllm::{ClientRequest, ContextAnswer};

const ID: DisaggRequestId = DisaggRequestId(1 << 62);

/// A `disaggregated_params` of one age.
macro_rules! params {
    ($name:ident { $($field:ident: $kind:ty,)* }) => {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        #[expect(dead_code, reason = "only that they can be read matters")]
        struct $name { request_type: String, $($field: Option<$kind>,)* }

        impl $name {
            const MEMBERS: &[&str] = &["request_type", $(stringify!($field)),*];
        }
    };
}

params!(Params12 {
    first_gen_tokens: Vec<u32>,
    ctx_request_id: u64,
    encoded_opaque_state: String,
    draft_tokens: Vec<u32>,
});
params!(Params13Early {
    first_gen_tokens: Vec<u32>,
    ctx_request_id: u64,
    encoded_opaque_state: String,
    draft_tokens: Vec<u32>,
    disagg_request_id: u64,
    ctx_dp_rank: u32,
    ctx_info_endpoint: String,
    schedule_style: u8,
});
params!(Params13Mid {
    first_gen_tokens: Vec<u32>,
    ctx_request_id: u64,
    encoded_opaque_state: String,
    draft_tokens: Vec<u32>,
    disagg_request_id: u64,
    ctx_dp_rank: u32,
    ctx_info_endpoint: String,
    schedule_style: u8,
    first_gen_log_probs: Value,
    first_gen_logits: Value,
    conversation_id: String,
    ctx_usage: Value,
});
params!(ParamsMain {
    first_gen_tokens: Vec<u32>,
    ctx_request_id: u64,
    encoded_opaque_state: String,
    draft_tokens: Vec<u32>,
    disagg_request_id: u64,
    ctx_dp_rank: u32,
    ctx_info_endpoint: String,
    schedule_style: u8,
    first_gen_log_probs: Value,
    first_gen_logits: Value,
    ctx_usage: Value,
    return_prompt_token_ids_b64: bool,
    resolved_thinking: Value,
});

/// A request; what a client may send beside these is not what is tested here.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "only that they can be read matters")]
struct Request<P> {
    model: String,
    prompt: Option<Value>,
    messages: Option<Vec<Value>>,
    prompt_token_ids: Option<Vec<u32>>,
    max_tokens: u32,
    stream: bool,
    stream_options: Option<Value>,
    disaggregated_params: P,
}

/// A worker of one age.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Age {
    V12,
    V13Early,
    V13Mid,
    Main,
}

impl Age {
    const ALL: [Self; 4] = [Self::V12, Self::V13Early, Self::V13Mid, Self::Main];

    fn era(self) -> Era {
        match self {
            Self::V12 => Era::V12,
            Self::V13Early | Self::V13Mid => Era::V13,
            Self::Main => Era::Main,
        }
    }

    /// 200 or 400, and why.
    fn judge(self, body: &[Bytes]) -> Result<(), String> {
        fn read<P: for<'a> Deserialize<'a>>(body: &[u8]) -> Result<(), String> {
            serde_json::from_slice::<Request<P>>(body).map(drop).map_err(|error| error.to_string())
        }
        let body = body.concat();
        match self {
            Self::V12 => read::<Params12>(&body),
            Self::V13Early => read::<Params13Early>(&body),
            Self::V13Mid => read::<Params13Mid>(&body),
            Self::Main => read::<ParamsMain>(&body),
        }
    }

    /// Its answer to a context request: every member of its model, nulls included.
    fn answer(self) -> ContextAnswer {
        let members = match self {
            Self::V12 => Params12::MEMBERS,
            Self::V13Early => Params13Early::MEMBERS,
            Self::V13Mid => Params13Mid::MEMBERS,
            Self::Main => ParamsMain::MEMBERS,
        };
        let mut params: Value =
            members.iter().map(|name| ((*name).to_owned(), Value::Null)).collect();
        let known = json!({"request_type": "context_only", "first_gen_tokens": [263],
            "ctx_request_id": ID.0, "encoded_opaque_state": "QQ=="});
        for (name, value) in known.as_object().unwrap() {
            params[name] = value.clone();
        }
        if self != Self::V12 {
            params["disagg_request_id"] = json!(ID.0);
            params["schedule_style"] = json!(0);
        }
        let answer = json!({
            "id": "cmpl-1", "prompt_token_ids": [1, 2], "usage": {"prompt_tokens": 2},
            "choices": [{"index": 0, "text": "a", "finish_reason": "length", "disaggregated_params": params}],
        });
        ContextAnswer::parse(answer.to_string().into(), ID).unwrap()
    }
}

fn requests() -> [ClientRequest; 2] {
    let parse = |api, body: Value| ClientRequest::parse(api, body.to_string().into()).unwrap();
    [
        parse(
            Api::Completions,
            json!({"model": "M", "prompt": "p", "max_tokens": 4, "stream": false}),
        ),
        parse(
            Api::Chat,
            json!({"model": "M", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4,
                "stream": true, "stream_options": {"include_usage": true}}),
        ),
    ]
}

#[test]
fn a_context_request_is_understood_by_workers_of_its_age() {
    for request in requests() {
        for age in Age::ALL {
            age.judge(&request.context(ID, age.era())).unwrap_or_else(|e| panic!("{age:?}: {e}"));
        }
        let too_new = Age::V12.judge(&request.context(ID, Era::Main)).unwrap_err();
        assert!(too_new.contains("unknown field `disagg_request_id`"), "{too_new}");
    }
}

#[test]
fn a_generation_request_is_understood_by_workers_of_its_age_whoever_computed_the_prompt() {
    for request in requests() {
        for context in Age::ALL {
            for generation in Age::ALL {
                // Both are 1.3, and what the newer one knows more cannot be told from a version.
                if generation == Age::V13Early && matches!(context, Age::V13Mid | Age::Main) {
                    continue;
                }
                let body = request.generation(&context.answer(), generation.era());
                let judged = generation.judge(&body);
                judged.unwrap_or_else(|e| panic!("{context:?} to {generation:?}: {e}"));
            }
        }
        let too_new = request.generation(&Age::Main.answer(), Era::Main);
        assert!(Age::V12.judge(&too_new).is_err() && Age::V13Mid.judge(&too_new).is_err());
    }
}

#[test]
fn what_a_generation_worker_needs_comes_through_in_each_age() {
    for request in requests() {
        for age in Age::ALL {
            let body = request.generation(&age.answer(), age.era()).concat();
            let body: Value = serde_json::from_slice(&body).unwrap();
            let params = &body["disaggregated_params"];
            assert_eq!(params["request_type"], "generation_only");
            assert_eq!(params["first_gen_tokens"], json!([263]));
            assert_eq!(
                (&params["ctx_request_id"], &params["encoded_opaque_state"]),
                (&json!(ID.0), &json!("QQ=="))
            );
            let id = params.get("disagg_request_id");
            assert_eq!(id, (age != Age::V12).then_some(&json!(ID.0)), "{age:?}");
            let usage = params.get("ctx_usage");
            let counts = json!({"prompt_tokens": 2});
            let tells = matches!(age, Age::V13Mid | Age::Main);
            assert_eq!(usage, tells.then_some(&counts), "{age:?}");
            let ids = if body["messages"].is_null() { "prompt" } else { "prompt_token_ids" };
            assert_eq!(body[ids], json!([1, 2]));
        }
    }
}

#[test]
fn main_is_not_sent_the_conversation_that_it_no_longer_knows() {
    let [request, _] = requests();
    let body = request.generation(&Age::V13Mid.answer(), Era::Main).concat();
    let body: Value = serde_json::from_slice(&body).unwrap();
    let params = body["disaggregated_params"].as_object().unwrap();
    assert!(!params.contains_key("conversation_id"));
    assert_eq!(
        (&params["schedule_style"], &params["ctx_usage"]),
        (&json!(0), &json!({"prompt_tokens": 2}))
    );
}

#[test]
fn a_version_tells_the_dialect() {
    for (version, dialect) in [
        ("0.21.0", Dialect::Trtllm12),
        ("1.0.0", Dialect::Trtllm12),
        ("1.2.0rc6", Dialect::Trtllm12),
        ("1.2.1", Dialect::Trtllm12),
        ("1.3.0rc0", Dialect::Trtllm13),
        ("1.3.0rc5.post1", Dialect::Trtllm13),
        ("1.3.0rc23", Dialect::Trtllm13),
        ("1.3.0rc24", Dialect::TrtllmMain),
        ("1.3.0", Dialect::TrtllmMain),
        ("1.4.0rc1", Dialect::TrtllmMain),
        ("2.0.0", Dialect::TrtllmMain),
        ("main", Dialect::TrtllmMain),
        ("", Dialect::TrtllmMain),
    ] {
        assert_eq!(of_version(version), dialect, "{version}");
    }
}
