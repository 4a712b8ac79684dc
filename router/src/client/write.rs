//! Writing a request: head and small body joined into one write, big bodies in vectored writes.
//!
//! A worker may answer without reading our body (a 503 under load). Then writing would block or fail although the
//! answer is there: so while writing we also read, and after a failed write we still look for an answer.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::task::{Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};

use super::{ClientError, Exchange, Request};

/// Bodies up to this many bytes are copied behind the head, so that both leave in one write.
const JOIN_UP_TO: usize = 8 << 10;
/// How long an answer may take to show after a write failed.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// Most slices in one vectored write.
const SLICES: usize = 16;

/// What is still to be written; no piece is empty.
pub(super) struct Outgoing {
    pieces: Vec<Bytes>,
    next: usize,
}

impl Outgoing {
    pub(super) fn new(request: Request<'_>) -> Self {
        let Request { head, lines, pieces } = request;
        let len: usize = pieces.iter().map(Bytes::len).sum();
        let joined = if len <= JOIN_UP_TO { len } else { 0 };
        let mut first = Vec::with_capacity(head.len() + lines.len() + joined + 24);
        first.extend_from_slice(head);
        push_decimal(&mut first, len);
        first.extend_from_slice(b"\r\n");
        first.extend_from_slice(lines);
        first.extend_from_slice(b"\r\n");
        let mut all = Vec::with_capacity(1 + pieces.len());
        if joined == len {
            pieces.iter().for_each(|piece| first.extend_from_slice(piece));
            all.push(Bytes::from(first));
        } else {
            all.push(Bytes::from(first));
            all.extend(pieces.iter().filter(|piece| !piece.is_empty()).cloned());
        }
        Self { pieces: all, next: 0 }
    }

    fn is_done(&self) -> bool {
        self.next == self.pieces.len()
    }

    fn slices(&self) -> ([IoSlice<'_>; SLICES], usize) {
        let mut slices = [IoSlice::new(&[]); SLICES];
        let rest = &self.pieces[self.next..];
        let count = rest.len().min(SLICES);
        for (slice, piece) in slices.iter_mut().zip(rest) {
            *slice = IoSlice::new(piece);
        }
        (slices, count)
    }

    fn advance(&mut self, mut written: usize) {
        while written > 0 {
            let piece = &mut self.pieces[self.next];
            let part = written.min(piece.len());
            piece.advance(part);
            written -= part;
            if piece.is_empty() {
                self.next += 1;
            }
        }
    }
}

/// Writes everything, or stops when an answer begins to arrive; the connection is then not used again.
pub(super) async fn send(exchange: &mut Exchange, mut out: Outgoing) -> Result<(), ClientError> {
    let written = poll_fn(|cx| {
        while !out.is_done() {
            let (slices, count) = out.slices();
            match exchange.poll_write(cx, &slices[..count]) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(count)) => out.advance(count),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    let read = ready!(exchange.poll_fill(cx))?;
                    exchange.spoil();
                    if read == 0 {
                        return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
                    }
                    return Poll::Ready(Ok(()));
                }
            }
        }
        Poll::Ready(Ok(()))
    })
    .await;
    let Err(error) = written else { return Ok(()) };
    exchange.spoil();
    let last_words = poll_fn(|cx| exchange.poll_fill(cx));
    match tokio::time::timeout(LAST_WORDS, last_words).await {
        Ok(Ok(count)) if count > 0 => Ok(()),
        Ok(Ok(_) | Err(_)) | Err(_) => Err(ClientError::Io(error)),
    }
}

fn push_decimal(out: &mut Vec<u8>, mut number: usize) {
    let mut digits = [0; 20];
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b"0123456789"[number % 10];
        number /= 10;
        if number == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[at..]);
}
