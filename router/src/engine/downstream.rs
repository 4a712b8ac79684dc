//! The client's side of a request, through Pingora: reading its body within limits, noticing that it left.
//!
//! Everything here works on Pingora's own session types; [`Downstream`] is what the engine asks of them, so that it
//! runs inside anybody's `ProxyHttp` (whose response modules then still see our answers) or on a bare session.

use std::future::Future;
use std::io::Read;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderName, Version, header};
use pingora_core::protocols::http::ServerSession;
use pingora_error::{ErrorType, Result};
use pingora_http::ResponseHeader;
use pingora_proxy::Session;

/// How long an idle connection may wait for its next request.
pub const KEEP_ALIVE: Duration = Duration::from_secs(75);
/// How long one write to a client may take.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long, and for how many bytes, we go on reading a body that is refused: a client that finds the connection
/// closed while it writes never sees the answer.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 16 << 20;

/// What the engine needs of a client's session.
pub trait Downstream: Send {
    /// The session below any modules.
    fn core(&mut self) -> &mut ServerSession;

    /// Sends the answer's head; `end` = there is no body.
    fn head(
        &mut self,
        head: Box<ResponseHeader>,
        end: bool,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Sends a piece of the body; `end` = it is the last.
    fn body(&mut self, piece: Bytes, end: bool) -> impl Future<Output = Result<()>> + Send;
}

impl Downstream for Session {
    fn core(&mut self) -> &mut ServerSession {
        self.as_downstream_mut()
    }

    async fn head(&mut self, head: Box<ResponseHeader>, end: bool) -> Result<()> {
        if self.is_process_shutting_down() {
            self.set_keepalive(None);
        }
        self.write_response_header(head, end).await
    }

    fn body(&mut self, piece: Bytes, end: bool) -> impl Future<Output = Result<()>> + Send {
        self.write_response_body(Some(piece), end)
    }
}

impl Downstream for ServerSession {
    fn core(&mut self) -> &mut ServerSession {
        self
    }

    async fn head(&mut self, head: Box<ResponseHeader>, end: bool) -> Result<()> {
        self.write_response_header(head).await?;
        if end { self.finish_body().await } else { Ok(()) }
    }

    fn body(&mut self, piece: Bytes, end: bool) -> impl Future<Output = Result<()>> + Send {
        self.write_response_body(piece, end)
    }
}

/// What every session needs before its request is looked at; to be called from `early_request_filter`.
///
/// Without pipelining, any byte that comes while we wait for a worker (the next request, a stray line end) would
/// count as an error of the client.
pub fn early(session: &mut ServerSession) {
    session.set_pipelining_enabled(true);
    session.set_write_timeout(Some(WRITE_TIMEOUT));
    session.set_total_drain_timeout(Some(LINGER));
    if session.get_keepalive().is_some() {
        session.set_keepalive(Some(KEEP_ALIVE.as_secs()));
    }
}

/// Whether the answer may be chunked (HTTP/1.1); otherwise it ends with the connection, or by HTTP/2's own means.
pub(super) fn may_chunk(session: &ServerSession) -> bool {
    !session.is_http2() && session.req_header().version == Version::HTTP_11
}

/// Whether only one end of the body can be read out of the head. Pingora takes a body for chunked where `chunked` comes
/// last, and drops a length beside it; who stands before us may have believed the length, or another coding.
pub(crate) fn is_clearly_framed(session: &ServerSession) -> bool {
    let Some(coding) = session.get_header(header::TRANSFER_ENCODING) else { return true };
    let length = header::CONTENT_LENGTH.as_str();
    let is_length = |line: &[u8]| {
        line.get(..length.len()).is_some_and(|name| name.eq_ignore_ascii_case(length.as_bytes()))
    };
    let has_length = |head: Bytes| head.split(|byte| *byte == b'\n').any(is_length);
    coding.as_bytes().eq_ignore_ascii_case(b"chunked")
        && session.req_header().headers.get_all(header::TRANSFER_ENCODING).iter().count() == 1
        && !session.as_http1().is_some_and(|http1| has_length(http1.get_headers_raw_bytes()))
}

/// A request header as text; `None` if it is missing or not ASCII.
pub(super) fn header(session: &ServerSession, name: HeaderName) -> Option<&str> {
    session.get_header(name)?.to_str().ok()
}

/// Resolves when the client has left; never, if it stays.
pub(super) async fn client_gone(session: &mut ServerSession) {
    while session.read_body_or_idle(true).await.is_ok() {}
}

/// Bounds of a request body.
#[derive(Clone, Copy, Debug)]
pub struct BodyLimits {
    /// Most bytes, as sent and as decoded.
    pub max: usize,
    /// For the whole body.
    pub timeout: Duration,
}

/// Why there is no body.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// More than [`BodyLimits::max`].
    #[error("the request body is longer than {0} bytes")]
    TooLarge(usize),
    /// Something else than gzip.
    #[error("content encoding `{0}` is not supported")]
    Encoding(String),
    /// Not gzip, or cut short.
    #[error("the request body is not valid gzip")]
    Gzip,
    /// Slower than [`BodyLimits::timeout`].
    #[error("the request body was not complete within {0:?}")]
    Late(Duration),
    /// Its framing is broken.
    #[error("the framing of the request body is broken")]
    Framing,
    /// Two readers may find its end at different places.
    #[error(
        "the request body needs one `Transfer-Encoding: chunked` or one `Content-Length`, not more"
    )]
    Ambiguous,
    /// The client left.
    #[error("the client left before its request was complete")]
    Gone,
}

/// Reads a request's whole body. Says `100 Continue` to a client that waits for it, unless the body would be refused.
///
/// # Errors
/// [`BodyError`]; after [`BodyError::TooLarge`] the answer should be followed by [`linger`].
pub(super) async fn read_body(
    session: &mut ServerSession,
    limits: BodyLimits,
) -> Result<Bytes, BodyError> {
    if !is_clearly_framed(session) {
        return Err(BodyError::Ambiguous);
    }
    let announced =
        header(session, header::CONTENT_LENGTH).and_then(|text| text.parse::<usize>().ok());
    if announced.is_some_and(|length| length > limits.max) {
        return Err(BodyError::TooLarge(limits.max));
    }
    let gzip = is_gzip(session)?;
    if expects_continue(session) && session.write_continue_response().await.is_err() {
        return Err(BodyError::Gone);
    }
    let reading = read_pieces(session, limits.max, announced);
    let body = match tokio::time::timeout(limits.timeout, reading).await {
        Ok(body) => body?,
        Err(_) => return Err(BodyError::Late(limits.timeout)),
    };
    if !gzip {
        return Ok(body);
    }
    // Inflating up to the limit takes long enough to stall every other request of this thread.
    let decoded = tokio::task::spawn_blocking(move || inflate(&body, limits.max)).await;
    decoded.unwrap_or(Err(BodyError::Gzip))
}

/// Reads on for a while after a refusal, so that the client can read it. Not for a client that waits for
/// `100 Continue`: it sends nothing.
pub(super) async fn linger(session: &mut ServerSession) {
    if expects_continue(session) {
        return;
    }
    let reading = async {
        let mut read = 0;
        while let Ok(Some(piece)) = session.read_request_body().await {
            read += piece.len();
            if read > LINGER_BYTES {
                break;
            }
        }
    };
    // However it ends, the connection is closed next.
    let _ = tokio::time::timeout(LINGER, reading).await;
}

/// Whether the client waits for `100 Continue` before it sends its body.
fn expects_continue(session: &ServerSession) -> bool {
    header(session, header::EXPECT).is_some_and(|value| value.eq_ignore_ascii_case("100-continue"))
}

fn is_gzip(session: &ServerSession) -> Result<bool, BodyError> {
    match header(session, header::CONTENT_ENCODING) {
        None => Ok(false),
        Some(name) if name.is_empty() || name.eq_ignore_ascii_case("identity") => Ok(false),
        Some(name) if name.eq_ignore_ascii_case("gzip") || name.eq_ignore_ascii_case("x-gzip") => {
            Ok(true)
        }
        Some(name) => Err(BodyError::Encoding(name.chars().take(64).collect())),
    }
}

/// One piece is used as it is; more are joined.
async fn read_pieces(
    session: &mut ServerSession,
    max: usize,
    announced: Option<usize>,
) -> Result<Bytes, BodyError> {
    let mut first = Bytes::new();
    let mut joined = BytesMut::new();
    loop {
        let piece = match session.read_request_body().await {
            Ok(Some(piece)) => piece,
            Ok(None) if joined.is_empty() => return Ok(first),
            Ok(None) => return Ok(joined.freeze()),
            Err(error) => {
                return Err(match error.etype() {
                    ErrorType::CustomCode(..)
                    | ErrorType::Custom("InvalidChunk" | "InvalidTrailerEnd") => BodyError::Framing,
                    _ => BodyError::Gone,
                });
            }
        };
        if first.len().max(joined.len()) + piece.len() > max {
            return Err(BodyError::TooLarge(max));
        }
        if joined.is_empty() {
            if first.is_empty() {
                first = piece;
                continue;
            }
            joined.reserve(announced.unwrap_or(first.len() * 2).max(first.len() + piece.len()));
            joined.extend_from_slice(&first);
        }
        joined.extend_from_slice(&piece);
    }
}

fn inflate(body: &[u8], max: usize) -> Result<Bytes, BodyError> {
    let mut decoded = Vec::new();
    let limit = u64::try_from(max).unwrap_or(u64::MAX).saturating_add(1);
    let mut decoder = flate2::read::MultiGzDecoder::new(body).take(limit);
    decoder.read_to_end(&mut decoded).map_err(|_| BodyError::Gzip)?;
    if decoded.len() > max {
        return Err(BodyError::TooLarge(max));
    }
    Ok(decoded.into())
}

#[cfg(test)]
mod tests;
