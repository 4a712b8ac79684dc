//! One exchange after its request was sent: the answer's head, then its body whole or piece by piece.
//!
//! Holds: bytes are given out in order, each once; the connection goes back to the pool only after the answer was
//! read to its end, the request was written to its end, and nothing came behind the answer.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use super::head::{AnswerHead, ContentType, Framing};
use super::stream::Stream;
use super::{Address, Answer, ClientError, pool};

/// Room offered to each read: more than usually comes, so that a short read empties the socket.
const READ_ROOM: usize = 16 << 10;
/// What a stream's pieces are kept in is used again and again, unless a burst made it longer than this, in bytes.
const KEPT_ROOM: usize = 4 << 10;
/// Longest head of an answer, in bytes.
const MAX_HEAD: usize = 64 << 10;
/// Longest line that announces a chunk, or trailer, in bytes.
const MAX_CHUNK_LINE: usize = 4 << 10;

thread_local! {
    /// Where bytes of unknown number are read to before each exchange gets as many as came: a stream that waits for its
    /// next token has no room of its own.
    static ROOM: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_ROOM].into());
}

/// A request that was sent, and its answer as far as it was read.
#[derive(Debug)]
pub struct Exchange {
    stream: Stream,
    address: Address,
    buffer: BytesMut,
    head: AnswerHead,
    rest: Rest,
    /// Whether anything came back.
    touched: bool,
    /// Whether the request was cut short, so that the connection cannot be used again.
    spoiled: bool,
}

/// What of the body is still to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    Length(u64),
    UntilClose,
    ChunkLine,
    Chunk(u64),
    ChunkEnd,
    Trailer,
    Done,
}

impl Exchange {
    pub(super) fn new(stream: Stream, address: Address) -> Self {
        let head = AnswerHead {
            status: 0,
            framing: Framing::UntilClose,
            keep_alive: false,
            content_type: ContentType::Missing,
            retry_after: None,
        };
        let buffer = BytesMut::new();
        Self { stream, address, buffer, head, rest: Rest::Done, touched: false, spoiled: false }
    }

    /// The answer's head.
    pub fn head(&self) -> &AnswerHead {
        &self.head
    }

    /// Whether the body was given out to its end.
    pub fn is_done(&self) -> bool {
        self.rest == Rest::Done
    }

    /// Whether nothing came back.
    pub(super) fn is_untouched(&self) -> bool {
        !self.touched
    }

    /// The connection will not be used again.
    pub(super) fn spoil(&mut self) {
        self.spoiled = true;
    }

    pub(super) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let stream = Pin::new(&mut self.stream);
        match slices {
            [one] => stream.poll_write(cx, one),
            many => stream.poll_write_vectored(cx, many),
        }
    }

    /// Reads what is there into the buffer; 0 = the worker closed its side.
    pub(super) fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let read = if self.buffer.capacity() - self.buffer.len() >= READ_ROOM {
            ready!(pin!(self.stream.read_buf(&mut self.buffer)).poll(cx))?
        } else {
            ready!(ROOM.with_borrow_mut(|room| {
                let mut room = ReadBuf::new(room);
                ready!(Pin::new(&mut self.stream).poll_read(cx, &mut room))?;
                self.buffer.extend_from_slice(room.filled());
                Poll::Ready(io::Result::Ok(room.filled().len()))
            }))?
        };
        self.touched |= read > 0;
        Poll::Ready(Ok(read))
    }

    /// Reads the head, past interim answers.
    pub(super) async fn read_head(&mut self) -> Result<(), ClientError> {
        loop {
            while let Some((head, len)) = AnswerHead::parse(&self.buffer)? {
                self.buffer.advance(len);
                if head.status == 101 {
                    return Err(ClientError::Malformed("status 101 without a request for it"));
                }
                if head.status >= 200 {
                    self.rest = match head.framing {
                        Framing::Length(0) => Rest::Done,
                        Framing::Length(length) => Rest::Length(length),
                        Framing::Chunked => Rest::ChunkLine,
                        Framing::UntilClose => Rest::UntilClose,
                    };
                    self.head = head;
                    return Ok(());
                }
            }
            if self.buffer.len() > MAX_HEAD {
                return Err(ClientError::Malformed("the head is too long"));
            }
            if poll_fn(|cx| self.poll_fill(cx)).await? == 0 {
                return Err(ClientError::Closed);
            }
        }
    }

    /// The next bytes of the body; `None` = its end. Safe to drop and call again.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, ClientError>> {
        loop {
            if !self.buffer.is_empty() {
                let bytes = self.take()?;
                if bytes.len() > KEPT_ROOM && self.buffer.is_empty() {
                    self.buffer = BytesMut::new();
                }
                if !bytes.is_empty() {
                    return Poll::Ready(Ok(Some(bytes)));
                }
            }
            if self.rest == Rest::Done {
                return Poll::Ready(Ok(None));
            }
            if ready!(self.poll_fill(cx))? == 0 {
                if self.rest != Rest::UntilClose {
                    return Poll::Ready(Err(ClientError::Closed));
                }
                self.rest = Rest::Done;
            }
        }
    }

    /// The whole body, `max` bytes at most.
    ///
    /// # Errors
    /// [`ClientError::TooBig`] as soon as the body is known to be bigger.
    pub async fn whole(&mut self, max: usize) -> Result<Bytes, ClientError> {
        if let Rest::Length(length) = self.rest {
            let length = usize::try_from(length).ok().filter(|length| *length <= max);
            return self.whole_of(length.ok_or(ClientError::TooBig(max))?).await;
        }
        let mut all = BytesMut::new();
        while let Some(bytes) = poll_fn(|cx| self.poll_next(cx)).await? {
            if all.len() + bytes.len() > max {
                return Err(ClientError::TooBig(max));
            }
            all.extend_from_slice(&bytes);
        }
        Ok(all.freeze())
    }

    /// A body of known length is read straight into one buffer and not copied.
    async fn whole_of(&mut self, length: usize) -> Result<Bytes, ClientError> {
        if self.buffer.len() < length {
            self.buffer.reserve(length - self.buffer.len() + READ_ROOM);
        }
        while self.buffer.len() < length {
            if poll_fn(|cx| self.poll_fill(cx)).await? == 0 {
                return Err(ClientError::Closed);
            }
        }
        self.rest = Rest::Done;
        Ok(self.buffer.split_to(length).freeze())
    }

    /// The whole answer, with a body of `max` bytes at most; the connection goes back.
    ///
    /// # Errors
    /// As [`Exchange::whole`].
    pub async fn into_answer(mut self, max: usize) -> Result<Answer, ClientError> {
        let body = self.whole(max).await?;
        let head = self.head.clone();
        self.finish();
        Ok(Answer { head, body })
    }

    /// Gives the connection back for the next exchange, if it is fit for one; else closes it.
    pub fn finish(self) {
        let clean = self.rest == Rest::Done && self.buffer.is_empty() && !self.spoiled;
        if clean && self.head.keep_alive {
            pool::put(self.address, self.stream);
        }
    }

    /// Takes from the buffer what is there of the body; several chunks are joined in place.
    fn take(&mut self) -> Result<Bytes, ClientError> {
        match &mut self.rest {
            Rest::Done => Ok(Bytes::new()),
            Rest::UntilClose => Ok(self.buffer.split().freeze()),
            Rest::Length(left) => {
                let part = self.buffer.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= part as u64;
                if *left == 0 {
                    self.rest = Rest::Done;
                }
                Ok(self.buffer.split_to(part).freeze())
            }
            Rest::ChunkLine | Rest::Chunk(_) | Rest::ChunkEnd | Rest::Trailer => self.take_chunks(),
        }
    }

    fn take_chunks(&mut self) -> Result<Bytes, ClientError> {
        // Payload found so far is `from..to`; `read` is where the next undecoded byte is.
        let (mut from, mut to, mut read) = (0, 0, 0);
        loop {
            let rest = &self.buffer[read..];
            match self.rest {
                Rest::ChunkLine => {
                    let Some(line) = line(rest)? else { break };
                    read += line.len() + 2;
                    self.rest = match chunk_size(line)? {
                        0 => Rest::Trailer,
                        size => Rest::Chunk(size),
                    };
                }
                Rest::Chunk(left) => {
                    let part = rest.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    if part == 0 {
                        break;
                    }
                    if from == to {
                        (from, to) = (read, read);
                    }
                    if to < read {
                        self.buffer.copy_within(read..read + part, to);
                    }
                    to += part;
                    read += part;
                    self.rest = match left - part as u64 {
                        0 => Rest::ChunkEnd,
                        left => Rest::Chunk(left),
                    };
                }
                Rest::ChunkEnd => match rest {
                    [b'\r', b'\n', ..] => {
                        read += 2;
                        self.rest = Rest::ChunkLine;
                    }
                    [] | [b'\r'] => break,
                    _ => {
                        return Err(ClientError::Malformed("a chunk does not end where it should"));
                    }
                },
                Rest::Trailer => {
                    let Some(line) = line(rest)? else { break };
                    read += line.len() + 2;
                    if line.is_empty() {
                        self.rest = Rest::Done;
                    }
                }
                Rest::Length(_) | Rest::UntilClose | Rest::Done => break,
            }
        }
        self.buffer.advance(from);
        let payload = self.buffer.split_to(to - from).freeze();
        self.buffer.advance(read - to);
        Ok(payload)
    }
}

/// The line at the front without its CRLF; `None` = not whole yet.
fn line(bytes: &[u8]) -> Result<Option<&[u8]>, ClientError> {
    // Almost always four bytes long: not worth a call of `memchr`.
    match bytes.iter().take(MAX_CHUNK_LINE + 1).position(|byte| *byte == b'\n') {
        Some(end) => match bytes[..end].strip_suffix(b"\r") {
            Some(line) => Ok(Some(line)),
            None => Err(ClientError::Malformed("a line ends without CR")),
        },
        None if bytes.len() <= MAX_CHUNK_LINE => Ok(None),
        None => Err(ClientError::Malformed("a chunk's line is too long")),
    }
}

fn chunk_size(line: &[u8]) -> Result<u64, ClientError> {
    let digits = line.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii_end();
    let size = digits.iter().try_fold(0u64, |size, byte| {
        let digit = char::from(*byte).to_digit(16)?;
        Some(size.checked_mul(16)? | u64::from(digit))
    });
    size.filter(|_| !digits.is_empty()).ok_or(ClientError::Malformed("bad chunk size"))
}
