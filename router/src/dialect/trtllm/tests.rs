//! Bodies of both hops, read back with a strict parser.

use serde_json::{Value, json};

use super::*;

const ID: DisaggRequestId = DisaggRequestId(1 << 62);

fn client(api: Api, body: &str) -> ClientRequest {
    ClientRequest::parse(api, Bytes::copy_from_slice(body.as_bytes())).unwrap()
}

fn read(pieces: Vec<Bytes>) -> Value {
    let text = pieces.concat();
    serde_json::from_slice(&text)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&text)))
}

fn context_answer(params: &Value) -> Value {
    json!({
        "id": "cmpl-1", "object": "text_completion", "created": 1, "model": "M",
        "prompt_token_ids": [1, 405, 13044], "prompt_token_ids_b64": null,
        "choices": [{
            "index": 0, "text": " a", "logprobs": null, "finish_reason": "length",
            "disaggregated_params": params,
        }],
        "usage": {"prompt_tokens": 3, "total_tokens": 4, "completion_tokens": 1},
    })
}

fn params() -> Value {
    json!({
        "request_type": "context_only", "first_gen_tokens": [263], "ctx_request_id": 5,
        "encoded_opaque_state": "QQ==", "draft_tokens": null, "disagg_request_id": 99,
        "ctx_info_endpoint": ["tcp://a:1", "tcp://b:2"], "schedule_style": 1, "ctx_usage": null,
        "something_new": {"x": [1, {}]},
    })
}

fn parse(answer: &Value) -> ContextAnswer {
    ContextAnswer::parse(answer.to_string().into(), ID).unwrap()
}

#[test]
fn a_context_request_changes_three_members_and_nothing_else() {
    let body =
        r#" {"model":"M", "prompt":"a\"b\\","max_tokens":16,"x":{"stream":true},"temperature":0} "#;
    let request = client(Api::Completions, body);
    let text = request.context(ID, Era::Main).concat();
    let tail = &body[body.find("\"model\"").unwrap()..];
    assert!(String::from_utf8(text.clone()).unwrap().ends_with(tail), "the rest is untouched");
    let mut expected: Value = serde_json::from_str(body).unwrap();
    expected["stream"] = json!(false);
    expected["stream_options"] = Value::Null;
    expected["disaggregated_params"] =
        json!({"request_type": "context_only", "disagg_request_id": ID.0, "schedule_style": 0});
    assert_eq!(serde_json::from_slice::<Value>(&text).unwrap(), expected);
}

#[test]
fn what_a_client_says_of_the_protocol_is_overwritten_wherever_it_stands() {
    let body = r#"{"disaggregated_params":{"encoded_opaque_state":"evil"},"stream":true,
        "stream_options":{"include_usage":true},"stream":true,"disaggregated_params":7,"prompt":"p"}"#;
    let request = client(Api::Completions, body);
    assert!(request.stream && request.wants_usage());
    let text = String::from_utf8(request.context(ID, Era::Main).concat()).unwrap();
    assert!(!text.contains("evil") && !text.contains("true") && !text.contains(":7"), "{text}");
    let generation = request.generation(&parse(&context_answer(&params())), Era::Main);
    let text = String::from_utf8(generation.concat()).unwrap();
    assert!(!text.contains("evil") && !text.contains(":7"), "{text}");
    assert_eq!(text.matches("generation_only").count(), 2);
}

#[test]
fn an_empty_object_becomes_a_request_too() {
    for body in ["{}", " { } "] {
        let request = client(Api::Completions, body);
        assert_eq!(read(request.context(ID, Era::Main)).as_object().unwrap().len(), 3);
        let generation = read(request.generation(&parse(&context_answer(&params())), Era::Main));
        assert_eq!(generation["prompt"], json!([1, 405, 13044]));
    }
}

#[test]
fn a_generation_completion_has_ids_for_a_prompt_and_the_choices_params() {
    let request =
        client(Api::Completions, r#"{"prompt":"NVIDIA is","max_tokens":16,"stream":true}"#);
    let generation = read(request.generation(&parse(&context_answer(&params())), Era::Main));
    let mut expected = params();
    expected["request_type"] = json!("generation_only");
    expected["schedule_style"] = json!(0);
    expected["ctx_usage"] = context_answer(&Value::Null)["usage"].clone();
    assert_eq!(
        generation,
        json!({"prompt": [1, 405, 13044], "max_tokens": 16, "stream": true,
            "disaggregated_params": expected})
    );
}

#[test]
fn a_generation_chat_keeps_its_messages_and_gets_ids_beside_them() {
    let body = r#"{"messages":[{"role":"user","content":"hi"}],"prompt_token_ids":[9]}"#;
    let request = client(Api::Chat, body);
    let generation = read(request.generation(&parse(&context_answer(&params())), Era::Main));
    assert_eq!(generation["messages"], json!([{"role": "user", "content": "hi"}]));
    assert_eq!(generation["prompt_token_ids"], json!([1, 405, 13044]));

    let mut answer = context_answer(&params());
    answer["prompt_token_ids"] = Value::Null;
    answer["prompt_token_ids_b64"] = json!("AQAAAA==");
    let request = client(Api::Chat, r#"{"messages":[]}"#);
    let generation = read(request.generation(&parse(&answer), Era::Main));
    assert_eq!(generation["prompt_token_ids_b64"], "AQAAAA==");
    assert!(generation.get("prompt_token_ids").is_none());
}

#[test]
fn big_prompts_and_records_are_passed_on_without_a_copy() {
    let body = format!(r#"{{"prompt":"{}","n":1}}"#, "x".repeat(100_000));
    let body = Bytes::from(body);
    let request = ClientRequest::parse(Api::Completions, body.clone()).unwrap();
    let range = body.as_ptr() as usize..body.as_ptr() as usize + body.len();
    let pieces = request.context(ID, Era::Main);
    assert!(pieces.iter().any(|p| p.len() > 90_000 && range.contains(&(p.as_ptr() as usize))));

    let mut params = params();
    params["encoded_opaque_state"] = json!("A".repeat(50_000));
    let answer = Bytes::from(context_answer(&params).to_string());
    let range = answer.as_ptr() as usize..answer.as_ptr() as usize + answer.len();
    let pieces = request.generation(&ContextAnswer::parse(answer, ID).unwrap(), Era::Main);
    assert!(pieces.iter().any(|p| p.len() > 50_000 && range.contains(&(p.as_ptr() as usize))));
    assert!(pieces.iter().map(Bytes::len).sum::<usize>() < 60_000, "the text prompt is left out");
}

#[test]
fn the_id_of_the_answer_wins_and_a_missing_one_is_ours() {
    let mut params = params();
    assert_eq!(parse(&context_answer(&params)).id, DisaggRequestId(99));
    params["disagg_request_id"] = Value::Null;
    let answer = parse(&context_answer(&params));
    assert_eq!(answer.id, ID);
    let generation = read(client(Api::Completions, "{}").generation(&answer, Era::Main));
    assert_eq!(generation["disaggregated_params"]["disagg_request_id"], json!(ID.0));
    params.as_object_mut().unwrap().remove("disagg_request_id");
    let generation = read(
        client(Api::Completions, "{}").generation(&parse(&context_answer(&params)), Era::Main),
    );
    assert_eq!(generation["disaggregated_params"]["disagg_request_id"], json!(ID.0));
}

#[test]
fn what_is_signed_is_the_state_and_the_first_endpoint() {
    let answer = parse(&context_answer(&params()));
    let signed = answer.signed_state();
    assert_eq!(signed, (Some("tcp://a:1".to_owned()), Some("QQ==".to_owned())));
    let mut other = params();
    (other["schedule_style"], other["ctx_dp_rank"]) = (json!(0), json!(3));
    other["ctx_info_endpoint"] = json!("tcp://a:1");
    assert_eq!(parse(&context_answer(&other)).signed_state(), signed, "nothing else is");
    for name in ["encoded_opaque_state", "ctx_info_endpoint"] {
        other[name] = Value::Null;
        let null = parse(&context_answer(&other)).signed_state();
        other.as_object_mut().unwrap().remove(name);
        assert_eq!(parse(&context_answer(&other)).signed_state(), null, "null is as if unset");
    }
    assert_eq!(parse(&context_answer(&other)).signed_state(), (None, None));
}

#[test]
fn only_length_and_not_finished_go_on() {
    for (reason, finished) in
        [("length", false), ("not_finished", false), ("stop", true), ("tool_calls", true)]
    {
        let mut answer = context_answer(&params());
        answer["choices"][0]["finish_reason"] = json!(reason);
        assert_eq!(parse(&answer).is_finished(), finished, "{reason}");
    }
}

#[test]
fn answers_that_lead_nowhere_are_refused() {
    let refused = |answer: Value| ContextAnswer::parse(answer.to_string().into(), ID).unwrap_err();
    assert!(matches!(refused(json!([])), BadContextAnswer::NotJson(_)));
    assert_eq!(refused(json!({})), BadContextAnswer::NoChoice);
    assert_eq!(refused(json!({"choices": []})), BadContextAnswer::NoFinishReason);
    assert_eq!(
        refused(context_answer(&Value::Null)),
        BadContextAnswer::NoParams("\"length\"".to_owned())
    );
    let mut without_id = params();
    without_id["ctx_request_id"] = Value::Null;
    let message = refused(context_answer(&without_id)).to_string();
    assert!(message.contains("`ctx_request_id` is missing"), "{message}");
    assert!(message.contains("`finish_reason` is \"length\""), "{message}");
    let mut early = context_answer(&Value::Null);
    early["choices"][0]["finish_reason"] = json!("stop");
    assert!(parse(&early).is_finished(), "an early stop needs no record");
}

#[test]
fn a_body_that_routing_cannot_understand_is_refused() {
    let refused =
        |body: &'static str| ClientRequest::parse(Api::Chat, Bytes::from_static(body.as_bytes()));
    assert_eq!(refused(r#"{"stream":1}"#).unwrap_err(), BadRequest::Stream);
    for body in ["", "[]", "{\"stream\":tru", "{\"str\\u0065am\":true}", "{} {}"] {
        assert!(matches!(refused(body), Err(BadRequest::NotJson(_))), "{body}");
    }
    assert!(!refused(r#"{"stream":null,"stream_options":3}"#).unwrap().wants_usage());
}

#[test]
fn a_request_for_one_worker_is_the_clients_without_its_params() {
    let body = r#"{"prompt":"p","stream":true,"disaggregated_params":{"request_type":"x"}}"#;
    assert_eq!(
        read(client(Api::Completions, body).whole()),
        json!({"prompt": "p", "stream": true, "disaggregated_params": null})
    );
    let body = r#"{"prompt":"p"}"#;
    assert_eq!(client(Api::Completions, body).whole().concat(), body.as_bytes());
}

#[test]
fn what_the_first_token_weighed_is_passed_on_to_the_byte() {
    // Numbers that a parser would round, spell otherwise or refuse.
    for weighed in [
        r#"[]"#,
        r#"[{"1":{"logprob":-0.10000000000000001,"rank":1}}]"#,
        r#"[{"1":{"logprob":-1e-7,"rank":null},"2":{"logprob":-12345678901234567890.5,"rank":2}}]"#,
        r#"[[{"1" : {"logprob":-0.0}}],"not a list"]"#,
    ] {
        let mut params = params();
        params["first_gen_log_probs"] = json!("LOGPROBS");
        params["first_gen_logits"] = json!("LOGITS");
        let answer = context_answer(&params).to_string();
        let answer = answer.replace("\"LOGPROBS\"", weighed).replace("\"LOGITS\"", weighed);
        let answer = ContextAnswer::parse(answer.into(), ID).unwrap();
        let request = client(Api::Completions, r#"{"prompt":"p"}"#);
        let sent = request.generation(&answer, Era::Main).concat();
        let sent = String::from_utf8(sent).unwrap();
        for name in ["first_gen_log_probs", "first_gen_logits"] {
            assert!(sent.contains(&format!("\"{name}\":{weighed}")), "{sent}");
        }
    }
}

#[test]
fn of_several_params_of_a_choice_the_last_count() {
    let first = r#"{"request_type":"context_only","ctx_request_id":1,"disagg_request_id":1,"schedule_style":7}"#;
    let last = r#"{"ctx_request_id":2,"encoded_opaque_state":"b"}"#;
    let body = format!(
        r#"{{"choices":[{{"finish_reason":"length","disaggregated_params":{first},"disaggregated_params":{last}}}]}}"#
    );
    let answer = ContextAnswer::parse(body.into(), DisaggRequestId(7)).unwrap();
    assert_eq!(answer.id, DisaggRequestId(7));
    let asked = ClientRequest::parse(Api::Completions, r#"{"prompt":"a"}"#.into()).unwrap();
    let sent: Value =
        serde_json::from_slice(&asked.generation(&answer, Era::Main).concat()).unwrap();
    assert_eq!(
        sent["disaggregated_params"],
        json!({
            "request_type": "generation_only", "disagg_request_id": 7, "schedule_style": 0,
            "ctx_usage": null, "ctx_request_id": 2, "encoded_opaque_state": "b",
        })
    );
}
