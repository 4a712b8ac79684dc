//! Our HTTP/1.1 client towards workers: one request, one answer, as few system calls as TCP allows.
//!
//! Decides how a request is written (head and small body in one write), when an answer is taken although the
//! request was not read, and when a connection goes back to the pool. Leaves deadlines, retries and the meaning
//! of answers to the caller. Dropping an [`Exchange`] (or the future that makes one) closes the connection, which
//! is how a worker learns that the request is cancelled; [`Exchange::finish`] is the only way back to the pool.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

pub mod body;
pub mod head;
pub mod pool;
mod stream;
mod write;

pub use body::Exchange;
pub use head::{AnswerHead, Heads, Target};
use stream::Stream;
use write::Outgoing;

/// How long a connection may take to be made; longer means the host is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Where a worker listens, resolved.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// IP address and port.
    Tcp(SocketAddr),
    /// Path of a stream socket.
    Unix(Arc<Path>),
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No connection; the worker saw nothing of the request.
    #[error("cannot connect: {0}")]
    Connect(io::Error),
    /// A pooled connection turned out to be closed before anything of the answer came: worth one more try on a
    /// fresh connection, without counting it.
    #[error("the pooled connection was closed")]
    Stale,
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    /// The connection ended before the answer did.
    #[error("the connection was closed before the answer was complete")]
    Closed,
    /// Not an HTTP/1.1 answer we understand.
    #[error("malformed answer: {0}")]
    Malformed(&'static str),
    /// The answer is bigger than the limit, in bytes.
    #[error("the answer is bigger than {0} bytes")]
    TooBig(usize),
    /// The deadline given to [`call`] passed.
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
}

/// One request: a pre-rendered head, header lines of this request, and the body's pieces.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// From [`Heads`]: everything up to and including `content-length: `.
    pub head: &'a [u8],
    /// Further header lines, each with its CRLF.
    pub lines: &'a [u8],
    /// The body.
    pub pieces: &'a [Bytes],
}

/// A connection that carries no exchange now.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    address: Address,
    /// Whether it carried an exchange before, so that the worker may have closed it meanwhile.
    reused: bool,
}

impl Connection {
    /// A pooled connection of this thread, if there is a young one.
    pub fn pooled(address: &Address) -> Option<Self> {
        let stream = pool::take(address)?;
        Some(Self { stream, address: address.clone(), reused: true })
    }

    /// A new connection.
    ///
    /// # Errors
    /// [`ClientError::Connect`], also after two seconds.
    pub async fn open(address: &Address) -> Result<Self, ClientError> {
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, Stream::connect(address))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(ClientError::Connect)?;
        Ok(Self { stream, address: address.clone(), reused: false })
    }

    /// Sends `request` and reads the answer's head.
    ///
    /// # Errors
    /// [`ClientError::Stale`] only for a pooled connection of which nothing came back.
    pub async fn exchange(self, request: Request<'_>) -> Result<Exchange, ClientError> {
        let reused = self.reused;
        let mut exchange = Exchange::new(self.stream, self.address);
        let sent = write::send(&mut exchange, Outgoing::new(request)).await;
        let answered = match sent {
            Ok(()) => exchange.read_head().await,
            Err(error) => Err(error),
        };
        match answered {
            Ok(()) => Ok(exchange),
            Err(ClientError::Io(_) | ClientError::Closed) if reused && exchange.is_untouched() => {
                Err(ClientError::Stale)
            }
            Err(error) => Err(error),
        }
    }
}

/// A whole answer.
#[derive(Debug)]
pub struct Answer {
    /// Status and the headers we look at.
    pub head: AnswerHead,
    /// The whole body.
    pub body: Bytes,
}

/// Sends a request to the first of `addresses` that takes it, on a pooled connection if there is one, and reads the
/// answer's head. `body` makes the body anew for each send: a stale connection leads to a second one.
///
/// # Errors
/// Whatever went wrong last, never [`ClientError::Stale`]. After [`ClientError::Connect`] nothing was sent.
pub async fn send(
    addresses: &[Address],
    head: &[u8],
    lines: &[u8],
    mut body: impl FnMut() -> Vec<Bytes>,
) -> Result<Exchange, ClientError> {
    if let Some(connection) = addresses.iter().find_map(Connection::pooled) {
        let request = Request { head, lines, pieces: &body() };
        match connection.exchange(request).await {
            Err(ClientError::Stale) => {}
            other => return other,
        }
    }
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in addresses {
        match Connection::open(address).await {
            Ok(connection) => {
                let request = Request { head, lines, pieces: &body() };
                return connection.exchange(request).await;
            }
            Err(ClientError::Connect(error)) => last = error,
            Err(error) => return Err(error),
        }
    }
    Err(ClientError::Connect(last))
}

/// One request that may safely be sent twice, with its whole answer: release calls, `/v1/models`.
///
/// # Errors
/// Whatever went wrong last; [`ClientError::TimedOut`] when `limit` has passed.
pub async fn call(
    addresses: &[Address],
    request: Request<'_>,
    limit: Duration,
    max_body: usize,
) -> Result<Answer, ClientError> {
    let Request { head, lines, pieces } = request;
    let work = async {
        let exchange = send(addresses, head, lines, || pieces.to_vec()).await?;
        exchange.into_answer(max_body).await
    };
    tokio::time::timeout(limit, work).await.unwrap_or(Err(ClientError::TimedOut(limit)))
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
