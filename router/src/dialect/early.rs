//! The early stop: the context worker's first token ended the text, so its answer is the client's answer.
//!
//! Not streamed: that answer without what only routers need. Streamed: the events that a worker would have sent,
//! role (chat), content, end, token counts if asked for, `[DONE]`.

use std::ops::Range;

use bytes::{Bytes, BytesMut};

use super::Api;
use super::trtllm::ContextAnswer;
use crate::splice::edit::join;
use crate::splice::scan::{Cursor, ScanError};

/// Whether a finished answer can be taken apart: what is inside of its members was not looked at when it was scanned.
///
/// # Errors
/// Where it is no JSON.
pub(super) fn check(answer: &ContextAnswer) -> Result<(), ScanError> {
    rebuilt(answer)?;
    delta(answer)?;
    Ok(())
}

/// The answer to a client that did not ask for a stream.
pub fn whole(answer: &ContextAnswer) -> Vec<Bytes> {
    join(rebuilt(answer).expect("checked when it was parsed"))
}

fn rebuilt(answer: &ContextAnswer) -> Result<Vec<Bytes>, ScanError> {
    let text = &answer.body;
    let mut out = Vec::with_capacity(32);
    rebuild(text, 0..text.len(), &mut out, |name, value, out| match name {
        b"prompt_token_ids" | b"prompt_token_ids_b64" => Ok(false),
        b"choices" => choices(text, value, out).map(|()| true),
        _ => {
            out.push(text.slice(value));
            Ok(true)
        }
    })?;
    Ok(out)
}

/// The events for a client that asked for a stream, the last one included; `usage` = it asked for token counts.
pub fn events(answer: &ContextAnswer, api: Api, usage: bool) -> Bytes {
    let found = &answer.found;
    let get = |place: &Option<Range<usize>>, otherwise: &'static [u8]| match place {
        Some(place) => answer.slice(place),
        None => Bytes::from_static(otherwise),
    };
    let (id, created) = (get(&found.id, b"\"\""), get(&found.created, b"0"));
    let model = get(&found.model, b"\"\"");
    let object: &[u8] = match api {
        Api::Completions => b"text_completion",
        Api::Chat => b"chat.completion.chunk",
    };
    let mut out = BytesMut::with_capacity(1024);
    let mut event = |rest: &[&[u8]]| {
        let head: [&[u8]; 8] = [
            b"data: {\"id\":",
            &id,
            b",\"object\":\"",
            object,
            b"\",\"created\":",
            &created,
            b",\"model\":",
            &model,
        ];
        // A line ends a `data:`, and in JSON it can only stand where a space can.
        let bytes = head.iter().chain(rest).flat_map(|part| part.iter());
        out.extend(bytes.map(|byte| if matches!(byte, b'\n' | b'\r') { b' ' } else { *byte }));
        out.extend_from_slice(b"}\n\n");
    };
    let logprobs = get(&found.logprobs, b"null");
    let (reason, stop) = (get(&found.finish_reason, b"null"), get(&found.stop_reason, b"null"));
    let end: [&[u8]; 5] = [b",\"finish_reason\":", &reason, b",\"stop_reason\":", &stop, b"}]"];
    match api {
        Api::Completions => {
            let text = get(&found.text, b"\"\"");
            const CHOICE: &[u8] = b",\"choices\":[{\"index\":0,\"text\":";
            if text.as_ref() != b"\"\"" || found.logprobs.is_some() {
                event(&[CHOICE, &text, b",\"logprobs\":", &logprobs, b",\"finish_reason\":null}]"]);
            }
            event(&[&[CHOICE, b"\"\",\"logprobs\":null"], &end[..]].concat());
        }
        Api::Chat => {
            const CHOICE: &[u8] = b",\"choices\":[{\"index\":0,\"delta\":";
            const ROLE: &[u8] = b"{\"role\":\"assistant\",\"content\":\"\"}";
            event(&[CHOICE, ROLE, b",\"logprobs\":null,\"finish_reason\":null}]"]);
            let delta = delta(answer).expect("checked when it was parsed");
            if !delta.is_empty() || found.logprobs.is_some() {
                event(&[
                    CHOICE,
                    b"{",
                    &delta,
                    b"},\"logprobs\":",
                    &logprobs,
                    b",\"finish_reason\":null}]",
                ]);
            }
            event(&[&[CHOICE, b"{},\"logprobs\":null"], &end[..]].concat());
        }
    }
    if usage {
        event(&[b",\"choices\":[],\"usage\":", &get(&found.usage, b"null")]);
    }
    out.extend_from_slice(b"data: [DONE]\n\n");
    out.freeze()
}

/// The members of the message that say something, as JSON without the braces.
fn delta(answer: &ContextAnswer) -> Result<Vec<u8>, ScanError> {
    let Some(message) = &answer.found.message else { return Ok(Vec::new()) };
    let text = &answer.body;
    let mut out = Vec::new();
    rebuild(text, message.clone(), &mut out, |name, value, out| {
        let empty = matches!(&text[value.clone()], b"null" | b"\"\"" | b"[]");
        if name == b"role" || empty {
            return Ok(false);
        }
        out.push(text.slice(value));
        Ok(true)
    })?;
    let object = out.concat();
    Ok(object.get(1..object.len().saturating_sub(1)).unwrap_or_default().to_vec())
}

/// All choices, each without its record.
fn choices(text: &Bytes, place: Range<usize>, out: &mut Vec<Bytes>) -> Result<(), ScanError> {
    let mut cursor = Cursor::new(&text[place.clone()]);
    out.push(Bytes::from_static(b"["));
    cursor.array(|cursor, index| {
        if index > 0 {
            out.push(Bytes::from_static(b","));
        }
        let choice = cursor.skip()?;
        let choice = place.start + choice.start..place.start + choice.end;
        rebuild(text, choice, out, |name, value, out| {
            let keep = name != b"disaggregated_params";
            if keep {
                out.push(text.slice(value));
            }
            Ok(keep)
        })
    })?;
    out.push(Bytes::from_static(b"]"));
    Ok(())
}

/// Writes the object at `place` again, member by member; `value` appends a member's value, or says to leave it out.
fn rebuild(
    text: &Bytes,
    place: Range<usize>,
    out: &mut Vec<Bytes>,
    mut value: impl FnMut(&[u8], Range<usize>, &mut Vec<Bytes>) -> Result<bool, ScanError>,
) -> Result<(), ScanError> {
    let mut cursor = Cursor::new(&text[place.clone()]);
    out.push(Bytes::from_static(b"{"));
    let mut first = true;
    cursor.object(|cursor, name| {
        let at = cursor.skip()?;
        let before = out.len();
        let comma = if first { "" } else { "," };
        let name_text = String::from_utf8_lossy(name);
        out.push(Bytes::from(format!("{comma}\"{name_text}\":")));
        if value(name, place.start + at.start..place.start + at.end, out)? {
            first = false;
        } else {
            out.truncate(before);
        }
        Ok(())
    })?;
    out.push(Bytes::from_static(b"}"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::trtllm::BadContextAnswer;
    use super::*;
    use baton_shared::id::DisaggRequestId;
    use serde_json::{Value, json};

    fn answer(body: &Value) -> ContextAnswer {
        ContextAnswer::parse(body.to_string().into(), DisaggRequestId(7)).unwrap()
    }

    fn chat(content: &Value, logprobs: &Value) -> Value {
        json!({
            "id": "chatcmpl-1", "object": "chat.completion", "created": 5, "model": "M\"x",
            "prompt_token_ids": [1, 2, 3], "prompt_token_ids_b64": null,
            "choices": [{
                "index": 0,
                "message": {"role": "assistant", "content": content, "tool_calls": []},
                "logprobs": logprobs, "finish_reason": "stop", "stop_reason": null,
                "disaggregated_params": {"request_type": "context_only"},
            }],
            "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
        })
    }

    fn parse(events: &Bytes) -> Vec<Value> {
        let text = std::str::from_utf8(events).unwrap();
        let mut events: Vec<&str> =
            text.split_terminator("\n\n").map(|e| e.strip_prefix("data: ").unwrap()).collect();
        assert_eq!(events.pop(), Some("[DONE]"));
        events.iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }

    #[test]
    fn a_whole_answer_loses_only_what_routers_need() {
        for body in [chat(&json!("Hi"), &Value::Null), {
            let mut body = chat(&json!("Hi"), &Value::Null);
            body["choices"] = json!([{"disaggregated_params": {}, "finish_reason": "stop"}]);
            body
        }] {
            let got: Value = serde_json::from_slice(&whole(&answer(&body)).concat()).unwrap();
            let mut expected = body;
            let members = expected.as_object_mut().unwrap();
            members.remove("prompt_token_ids");
            members.remove("prompt_token_ids_b64");
            expected["choices"][0].as_object_mut().unwrap().remove("disaggregated_params");
            assert_eq!(got, expected);
        }
    }

    #[test]
    fn a_streamed_chat_answer_has_role_content_end_and_usage() {
        let logprobs = json!({"content": [{"token": "Hi", "logprob": -0.25}]});
        let answer = answer(&chat(&json!("Hi\n\"x\""), &logprobs));
        let events = parse(&events(&answer, Api::Chat, true));
        let deltas: Vec<&Value> = events.iter().map(|e| &e["choices"][0]["delta"]).collect();
        assert_eq!(*deltas[0], json!({"role": "assistant", "content": ""}));
        assert_eq!(*deltas[1], json!({"content": "Hi\n\"x\""}));
        assert_eq!(events[1]["choices"][0]["logprobs"], logprobs);
        assert_eq!(events[2]["choices"][0]["finish_reason"], "stop");
        assert_eq!(events[3]["choices"], json!([]));
        assert_eq!(events[3]["usage"]["prompt_tokens"], 3);
        assert_eq!(events.len(), 4);
        for event in &events {
            assert_eq!(event["id"], "chatcmpl-1");
            assert_eq!(event["object"], "chat.completion.chunk");
            assert_eq!((&event["created"], &event["model"]), (&json!(5), &json!("M\"x")));
        }
    }

    #[test]
    fn an_empty_first_token_makes_no_content_event() {
        let answer = answer(&chat(&json!(""), &Value::Null));
        assert_eq!(parse(&events(&answer, Api::Chat, false)).len(), 2);
    }

    #[test]
    fn a_streamed_completion_has_text_and_end() {
        let body = json!({
            "id": "cmpl-1", "object": "text_completion", "created": 5, "model": "M",
            "choices": [{"index": 0, "text": " x", "finish_reason": "stop", "stop_reason": 13}],
        });
        let events = parse(&events(&answer(&body), Api::Completions, false));
        assert_eq!(events.len(), 2);
        assert_eq!(events[0]["choices"][0]["text"], " x");
        assert_eq!(events[0]["choices"][0]["finish_reason"], Value::Null);
        assert_eq!(events[1]["choices"][0]["finish_reason"], "stop");
        assert_eq!(events[1]["choices"][0]["stop_reason"], 13);
    }

    #[test]
    fn a_finished_answer_that_is_no_json_inside_is_refused() {
        let body = chat(&json!("a"), &json!(null)).to_string();
        let broken = body.replace("\"content\":", "\"content\"");
        assert_ne!(body, broken);
        let parsed = ContextAnswer::parse(broken.into(), DisaggRequestId(7));
        assert!(matches!(parsed, Err(BadContextAnswer::NotJson(_))));
    }

    #[test]
    fn events_of_an_answer_in_many_lines_are_a_line_each() {
        let body = chat(&json!("a\nb"), &json!({"content": []}));
        let pretty = serde_json::to_string_pretty(&body).unwrap().replace('\n', "\r\n");
        let pretty = ContextAnswer::parse(pretty.into(), DisaggRequestId(7)).unwrap();
        let (pretty, plain) =
            (events(&pretty, Api::Chat, true), events(&answer(&body), Api::Chat, true));
        assert_eq!(parse(&pretty), parse(&plain));
    }
}
