//! An answer as a stream of server-sent events.
//!
//! It begins after admission. A failure after that is an event of its own, and then no `[DONE]`: a client that
//! waits for it knows that the answer is not whole.

use std::convert::Infallible;

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream;

use super::counted::Counted;
use super::error::ApiError;
use super::request::StreamUsage;
use super::run::Run;
use super::shape::{Envelope, event};

/// A stream between two events.
struct State {
    run: Run,
    envelope: Envelope,
    usage: StreamUsage,
    counted: Counted,
    is_open: bool,
}

/// The answer to a streaming request.
pub fn respond(run: Run, envelope: Envelope, usage: StreamUsage, counted: Counted) -> Response {
    let state = State { run, envelope, usage, counted, is_open: false };
    let events = stream::unfold(Some(state), |state| async move {
        let (bytes, state) = state?.step().await;
        Some((Ok::<_, Infallible>(Bytes::from(bytes)), state))
    });
    let mut response = Response::new(Body::from_stream(events));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

impl State {
    /// The next events, and what follows them, if anything.
    async fn step(mut self) -> (Vec<u8>, Option<Self>) {
        let mut bytes = Vec::new();
        match self.write(&mut bytes).await {
            Ok(true) => (bytes, Some(self)),
            Ok(false) => {
                self.counted.succeeded();
                (bytes, None)
            }
            Err(error) => {
                self.counted.failed(error.code);
                // A half-written event would swallow the error's.
                bytes.clear();
                if event(&error.body(), &mut bytes).is_err() {
                    bytes.clear();
                }
                (bytes, None)
            }
        }
    }

    /// Writes the next piece, and the closing events after the last; whether there is more.
    async fn write(&mut self, bytes: &mut Vec<u8>) -> Result<bool, ApiError> {
        let piece = self.run.next().await?;
        if !std::mem::replace(&mut self.is_open, true) {
            self.envelope.opening(bytes)?;
        }
        let Some(piece) = piece else { return self.close(bytes) };
        let is_last = piece.end.is_some();
        let usage = match self.usage {
            StreamUsage::Every => Some(self.run.usage()),
            StreamUsage::Last | StreamUsage::Never => None,
        };
        self.envelope.piece(piece, usage, bytes)?;
        if is_last { self.close(bytes) } else { Ok(true) }
    }

    fn close(&self, bytes: &mut Vec<u8>) -> Result<bool, ApiError> {
        match self.usage {
            StreamUsage::Every | StreamUsage::Last => {
                self.envelope.usage(self.run.usage(), bytes)?;
            }
            StreamUsage::Never => {}
        }
        bytes.extend_from_slice(b"data: [DONE]\n\n");
        Ok(false)
    }
}
