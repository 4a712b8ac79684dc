//! What a scripted worker answers: bodies, whole or broken off.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use http::{Response, StatusCode};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Frame;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::Body;

/// The head of a whole answer, the first half of its body, and an error.
pub(super) async fn half(answer: Response<Body>) -> Result<Response<Body>, std::io::Error> {
    let (mut head, body) = answer.into_parts();
    let mut bytes = body.collect().await?.to_bytes();
    head.headers.insert("content-length", bytes.len().into());
    bytes.truncate(bytes.len() / 2);
    Ok(cut(head, bytes))
}

/// An answer that ends with an error after these bytes.
pub(super) fn cut(head: http::response::Parts, bytes: Bytes) -> Response<Body> {
    let (pieces, body) = mpsc::channel(1);
    tokio::spawn(async move {
        if !bytes.is_empty() {
            let _ = pieces.send(Ok(Frame::data(bytes))).await;
        }
        // What was sent before is to be on its way: an error at once would take it along.
        let _ = tokio::time::timeout(Duration::from_millis(20), pieces.closed()).await;
        let _ = pieces.send(Err(std::io::Error::other("reset as scripted"))).await;
    });
    let body = BoxBody::new(http_body_util::StreamBody::new(Pieces(body)));
    Response::from_parts(head, body)
}

/// What a context request is answered.
pub(super) fn context(path: &str, body: &Value, early: bool) -> Value {
    let id = &body["disaggregated_params"]["disagg_request_id"];
    let chat = path.ends_with("chat/completions");
    let params = json!({
        "request_type": "context_only", "first_gen_tokens": [65], "first_gen_log_probs": null,
        "first_gen_logits": null, "ctx_request_id": id, "encoded_opaque_state": "QmF0b24=",
        "draft_tokens": null, "disagg_request_id": id, "ctx_dp_rank": 0, "ctx_info_endpoint": null,
        "schedule_style": 0, "ctx_usage": null, "return_prompt_token_ids_b64": false,
        "resolved_thinking": null,
    });
    let mut choice = json!({
        "index": 0, "logprobs": null, "finish_reason": if early { "stop" } else { "length" },
        "stop_reason": null, "disaggregated_params": params,
    });
    if chat {
        choice["message"] = json!({"role": "assistant", "content": "A"});
    } else {
        choice["text"] = json!("A");
    }
    json!({
        "id": "cmpl-mock", "object": if chat { "chat.completion" } else { "text_completion" },
        "created": 1, "model": body["model"], "prompt_token_ids": [1, 2, 3], "choices": [choice],
        "usage": usage(1),
    })
}

/// Of an answer of so many tokens.
pub(super) fn usage(completion: usize) -> Value {
    json!({
        "prompt_tokens": 3, "completion_tokens": completion, "total_tokens": 3 + completion,
        "prompt_tokens_details": {"cached_tokens": 0},
    })
}

/// The tokens of a generation answer: ` 0`, ` 1`, … after the first, `A`.
pub(super) fn words(count: usize) -> impl Iterator<Item = String> {
    std::iter::once("A".to_owned()).chain((0..count).map(|word| format!(" {word}")))
}

/// A channel as a stream.
pub(super) struct Pieces(pub(super) mpsc::Receiver<Result<Frame<Bytes>, std::io::Error>>);

impl futures_util::Stream for Pieces {
    type Item = Result<Frame<Bytes>, std::io::Error>;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        self.0.poll_recv(context)
    }
}

/// With a JSON body.
pub(super) fn json_answer(status: u16, body: &Value) -> Response<Body> {
    let mut answer = whole(status, body.to_string().into());
    let kind = http::HeaderValue::from_static("application/json");
    answer.headers_mut().insert("content-type", kind);
    answer
}

/// With a body of known length.
pub(super) fn whole(status: u16, body: Bytes) -> Response<Body> {
    let never = |never: Infallible| match never {};
    let mut answer = Response::new(BoxBody::new(Full::new(body).map_err(never)));
    *answer.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::IM_A_TEAPOT);
    answer
}
