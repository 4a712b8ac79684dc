//! The smallest generation request for a record that nobody wants any more: one token, so that its blocks are read and
//! with that free. For context workers without a release call.

use bytes::Bytes;

use super::era::Era;
use super::trtllm::{ClientRequest, ContextAnswer};
use crate::splice::edit::{Members, splice};
use crate::splice::scan::{Cursor, ScanError};

/// The body of a generation request that goes on from `context` for one token, not streamed.
pub fn body(request: &ClientRequest, context: &ContextAnswer, era: Era) -> Vec<Bytes> {
    let whole = Bytes::from(request.generation(context, era).concat());
    let (mut limits, mut others) = (Vec::new(), Vec::new());
    let mut cursor = Cursor::new(&whole);
    let read = cursor.object(|cursor, name| {
        let place = cursor.skip()?;
        match name {
            b"max_tokens" | b"max_completion_tokens" => limits.push(place),
            b"min_tokens" => others.push((place, "0")),
            b"stream" => others.push((place, "false")),
            b"stream_options" => others.push((place, "null")),
            _ => {}
        }
        Ok::<(), ScanError>(())
    });
    debug_assert!(read.is_ok(), "it was made of what was scanned before");
    let open = whole.iter().position(|byte| *byte == b'{').unwrap_or_default();
    let mut members = Members::of(open, false);
    let literal = |text: &'static str| vec![Bytes::from_static(text.as_bytes())];
    members.set("\"max_tokens\":", &limits, literal("1"));
    for (place, value) in others {
        members.set("", &[place], literal(value));
    }
    splice(&whole, 0..whole.len(), members.into_edits())
}

#[cfg(test)]
mod tests {
    use baton_shared::id::DisaggRequestId;
    use serde_json::{Value, json};

    use super::*;
    use crate::dialect::Api;

    /// The request for one token that comes of a client's `request`.
    fn pulled(api: Api, request: &Value, era: Era) -> Value {
        let id: DisaggRequestId = serde_json::from_value(json!(1u64 << 41)).unwrap();
        let params = json!({"request_type": "context_only", "ctx_request_id": 7, "encoded_opaque_state": "QQ=="});
        let choice = json!({"finish_reason": "length", "disaggregated_params": params});
        let answer = json!({"prompt_token_ids": [1, 2], "choices": [choice]}).to_string();
        let answer = ContextAnswer::parse(answer.into(), id).unwrap();
        let request = ClientRequest::parse(api, request.to_string().into()).unwrap();
        serde_json::from_slice(&body(&request, &answer, era).concat()).unwrap()
    }

    #[test]
    fn whatever_the_client_asked_for_it_is_one_token_of_the_same_prompt_in_one_piece() {
        let long = json!({"model": "M", "prompt": "hi", "max_tokens": 900, "min_tokens": 5, "stream": true,
            "stream_options": {"include_usage": true}, "temperature": 0.5});
        let body = pulled(Api::Completions, &long, Era::Main);
        assert_eq!((&body["max_tokens"], &body["min_tokens"]), (&json!(1), &json!(0)));
        assert_eq!((&body["stream"], &body["stream_options"]), (&json!(false), &Value::Null));
        assert_eq!((&body["prompt"], &body["temperature"]), (&json!([1, 2]), &json!(0.5)));
        assert_eq!(body["disaggregated_params"]["request_type"], "generation_only");
        assert_eq!(body["disaggregated_params"]["ctx_request_id"], 7);
    }

    #[test]
    fn a_limit_that_the_client_left_out_or_named_otherwise_is_one_too() {
        let messages = json!([{"role": "user", "content": "hi"}]);
        let bare = json!({"model": "M", "messages": messages});
        for era in [Era::V12, Era::V13, Era::Main] {
            let body = pulled(Api::Chat, &bare, era);
            assert_eq!((&body["max_tokens"], &body["messages"]), (&json!(1), &messages));
            assert!(body.get("min_tokens").is_none() && body.get("stream").is_none(), "{body}");
        }
        let named = json!({"model": "M", "messages": messages, "max_completion_tokens": 50});
        let body = pulled(Api::Chat, &named, Era::Main);
        assert_eq!(body["max_completion_tokens"], 1);
        assert!(body.get("max_tokens").is_none(), "{body}");
    }
}
