//! Answers to the client: whole ones in our own form, so that an error keeps the connection open where it can.

use std::borrow::Cow;

use baton_shared::wire::error::ErrorCode;
use bytes::Bytes;
use http::{HeaderName, HeaderValue, header};
use pingora_error::Result;
use pingora_http::ResponseHeader;

use super::downstream::{self, Downstream};
use crate::client::head::ContentType;

pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// A whole answer.
#[derive(Clone, Debug)]
pub struct Reply {
    /// HTTP status.
    pub status: u16,
    /// `Content-Type`.
    pub content_type: Cow<'static, str>,
    /// The body in pieces.
    pub body: Vec<Bytes>,
    /// `Retry-After` in seconds.
    pub retry_after: Option<u32>,
    /// Whether the connection may carry another request.
    pub keep_alive: bool,
    /// `Allow` of a 405.
    pub allow: &'static str,
}

impl Reply {
    /// JSON with this status.
    pub fn json(status: u16, body: Vec<Bytes>) -> Self {
        let content_type = Cow::Borrowed("application/json");
        Self { status, content_type, body, retry_after: None, keep_alive: true, allow: "POST" }
    }

    /// An error in OpenAI's form.
    pub fn error(code: ErrorCode, message: &str) -> Self {
        let body = serde_json::to_vec(&code.body(message, None)).unwrap_or_default();
        let retry_after = code.has_retry_after().then_some(1);
        let keep_alive = !matches!(
            code,
            ErrorCode::BodyTooLarge | ErrorCode::UnsupportedEncoding | ErrorCode::BodyTimeout
        );
        let reply = Self::json(code.status(), vec![body.into()]);
        Self { retry_after, keep_alive, ..reply }
    }

    /// What a worker said, unchanged.
    pub(super) fn forwarded(status: u16, content_type: &ContentType, body: Bytes) -> Self {
        let content_type = match content_type {
            ContentType::Json | ContentType::Missing => Cow::Borrowed("application/json"),
            ContentType::EventStream => Cow::Borrowed("text/event-stream"),
            ContentType::Other(other) => Cow::Owned(other.to_string()),
        };
        Self { content_type, ..Self::json(status, vec![body]) }
    }

    /// Sends the answer, `request_id` in its head.
    ///
    /// # Errors
    /// Pingora's: the client is gone or too slow.
    pub async fn send(self, downstream: &mut impl Downstream, request_id: &str) -> Result<()> {
        let length: usize = self.body.iter().map(Bytes::len).sum();
        let mut head = ResponseHeader::build_no_case(self.status, Some(6))?;
        head.insert_header(header::CONTENT_TYPE, value(&self.content_type))?;
        head.insert_header(header::CONTENT_LENGTH, length)?;
        head.insert_header(REQUEST_ID, value(request_id))?;
        if let Some(seconds) = self.retry_after {
            head.insert_header(header::RETRY_AFTER, seconds)?;
        }
        if self.status == 405 {
            head.insert_header(header::ALLOW, self.allow)?;
        }
        if !self.keep_alive {
            downstream.core().set_keepalive(None);
        }
        downstream.head(Box::new(head), length == 0).await?;
        let last = self.body.iter().rposition(|piece| !piece.is_empty());
        for (index, piece) in self.body.into_iter().enumerate() {
            if !piece.is_empty() {
                downstream.body(piece, last == Some(index)).await?;
            }
        }
        Ok(())
    }
}

/// Sends the head of an event stream.
pub(super) async fn send_stream_head(
    downstream: &mut impl Downstream,
    request_id: &str,
) -> Result<()> {
    let mut head = ResponseHeader::build_no_case(200, Some(6))?;
    head.insert_header(header::CONTENT_TYPE, "text/event-stream")?;
    head.insert_header(header::CACHE_CONTROL, "no-cache")?;
    head.insert_header(REQUEST_ID, value(request_id))?;
    if downstream::may_chunk(downstream.core()) {
        head.insert_header(header::TRANSFER_ENCODING, "chunked")?;
    }
    downstream.head(Box::new(head), false).await
}

/// A header value; what cannot be one becomes empty.
fn value(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).unwrap_or_else(|_| HeaderValue::from_static(""))
}
