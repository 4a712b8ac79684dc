//! What the router reads of others: a client's request, a context worker's answer, an operator's file.

use baton_router::config::Loaded;
use baton_router::dialect::Api;
use baton_router::dialect::early;
use baton_router::dialect::era::Era;
use baton_router::dialect::trtllm::{ClientRequest, ContextAnswer};
use baton_shared::id::DisaggRequestId;
use bytes::Bytes;
use serde_json::{Map, Value};

use super::Folder;

const ID: DisaggRequestId = DisaggRequestId(1 << 41);
const ERAS: [Era; 3] = [Era::V12, Era::V13, Era::Main];

/// A client's request: what a context worker gets of it is, to a strict parser, the same with other disaggregation
/// parameters and not streamed.
pub fn request(bytes: &[u8]) {
    for api in [Api::Completions, Api::Chat] {
        let Ok(request) = ClientRequest::parse(api, Bytes::copy_from_slice(bytes)) else { return };
        request.wants_usage();
        let Some(asked) = strict(bytes) else { continue };
        let asked = others(asked);
        for era in ERAS {
            let sent = strict(&request.context(ID, era).concat());
            let sent = sent.expect("what is sent is JSON as much as what came");
            assert_eq!(sent["stream"], Value::Bool(false));
            assert_eq!(sent["disaggregated_params"]["request_type"], "context_only");
            assert_eq!(asked, others(sent));
        }
    }
}

/// Without what is set for a context worker.
fn others(mut members: Map<String, Value>) -> Map<String, Value> {
    for name in ["stream", "stream_options", "disaggregated_params"] {
        members.remove(name);
    }
    members
}

/// A context worker's answer: what a generation worker gets of it, and what a client gets of it when it ended the text,
/// is JSON where the answer was.
pub fn answer(bytes: &[u8]) {
    let Ok(answer) = ContextAnswer::parse(Bytes::copy_from_slice(bytes), ID) else { return };
    let is_json = strict(bytes).is_some();
    for (api, asked) in [
        (Api::Completions, &br#"{"model":"m","prompt":"a","disaggregated_params":null}"#[..]),
        (Api::Chat, &br#"{"model":"m","messages":[]}"#[..]),
    ] {
        let asked = ClientRequest::parse(api, Bytes::from_static(asked)).expect("a request");
        for era in ERAS {
            let sent = asked.generation(&answer, era).concat();
            assert!(!is_json || strict(&sent).is_some(), "{}", String::from_utf8_lossy(&sent));
        }
        if answer.is_finished() {
            let whole = early::whole(&answer).concat();
            assert!(!is_json || strict(&whole).is_some(), "{}", String::from_utf8_lossy(&whole));
            for usage in [false, true] {
                let events = early::events(&answer, api, usage);
                assert!(!is_json || are_events(&events), "{}", String::from_utf8_lossy(&events));
            }
        }
    }
}

/// Events of one JSON object each, and `[DONE]` at the end.
fn are_events(stream: &[u8]) -> bool {
    let Ok(stream) = std::str::from_utf8(stream) else { return false };
    let Some(events) = stream.strip_suffix("data: [DONE]\n\n") else { return false };
    let mut events = events.split_terminator("\n\n");
    events.all(|event| {
        event.strip_prefix("data: ").is_some_and(|data| strict(data.as_bytes()).is_some())
    })
}

fn strict(text: &[u8]) -> Option<Map<String, Value>> {
    serde_json::from_slice(text).ok()
}

/// A configuration: our own, and `disagg_config.yaml` of TensorRT-LLM.
pub fn config(bytes: &[u8], folder: &Folder) {
    for name in ["router.toml", "disagg_config.yaml"] {
        let _ = Loaded::read(&folder.write(name, bytes));
    }
}
