//! Heads: ours pre-rendered for each worker, theirs parsed into the few facts that matter.

use std::mem::MaybeUninit;

use super::ClientError;

/// Most header lines of an answer.
const MAX_LINES: usize = 64;

/// Where a request goes on a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// `POST /v1/completions`
    Completions,
    /// `POST /v1/chat/completions`
    Chat,
    /// `POST /v1/disagg/release`
    Release,
    /// `GET /v1/models`
    Models,
}

/// Request heads of one worker, up to and including `content-length: `.
#[derive(Clone, Debug)]
pub struct Heads {
    completions: Box<[u8]>,
    chat: Box<[u8]>,
    release: Box<[u8]>,
    models: Box<[u8]>,
}

impl Heads {
    /// Heads with this `Host`, which must not contain control characters.
    pub fn new(authority: &str) -> Self {
        Self {
            completions: render("POST", "/v1/completions", authority),
            chat: render("POST", "/v1/chat/completions", authority),
            release: render("POST", "/v1/disagg/release", authority),
            models: render("GET", "/v1/models", authority),
        }
    }

    /// The head for `target`.
    pub fn get(&self, target: Target) -> &[u8] {
        match target {
            Target::Completions => &self.completions,
            Target::Chat => &self.chat,
            Target::Release => &self.release,
            Target::Models => &self.models,
        }
    }
}

/// A head up to and including `content-length: `.
pub fn render(method: &str, path: &str, authority: &str) -> Box<[u8]> {
    format!(
        "{method} {path} HTTP/1.1\r\nhost: {authority}\r\naccept: */*\r\n\
         content-type: application/json\r\ncontent-length: "
    )
    .into_bytes()
    .into()
}

/// How the end of an answer's body is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// `Content-Length`, in bytes.
    Length(u64),
    /// `Transfer-Encoding: chunked`.
    Chunked,
    /// The connection closes.
    UntilClose,
}

/// What kind of body the answer says it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ContentType {
    /// `application/json`, with or without parameters.
    Json,
    /// `text/event-stream`, with or without parameters.
    EventStream,
    /// Something else, as written.
    Other(Box<str>),
    /// No header.
    Missing,
}

/// Status and the headers that a router looks at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AnswerHead {
    /// Status code, 200 or above.
    pub status: u16,
    /// How the body ends.
    pub framing: Framing,
    /// Whether the connection may carry another exchange.
    pub keep_alive: bool,
    /// Kind of body.
    pub content_type: ContentType,
    /// `Retry-After` in seconds.
    pub retry_after: Option<u32>,
}

impl AnswerHead {
    /// Reads a head from the front of `bytes`; with it comes its length. `None` = not whole yet. Interim answers
    /// (1xx) have status below 200.
    ///
    /// # Errors
    /// [`ClientError::Malformed`].
    pub(super) fn parse(bytes: &[u8]) -> Result<Option<(Self, usize)>, ClientError> {
        let mut lines = [const { MaybeUninit::uninit() }; MAX_LINES];
        let mut answer = httparse::Response::new(&mut []);
        let parsed = httparse::ParserConfig::default()
            .parse_response_with_uninit_headers(&mut answer, bytes, &mut lines)
            .map_err(|_| ClientError::Malformed("the head is not HTTP"))?;
        let httparse::Status::Complete(len) = parsed else { return Ok(None) };
        let status = answer.code.ok_or(ClientError::Malformed("no status"))?;
        let mut head = Self {
            status,
            framing: Framing::UntilClose,
            keep_alive: answer.version == Some(1),
            content_type: ContentType::Missing,
            retry_after: None,
        };
        let mut length = None;
        let mut chunked = false;
        for line in answer.headers.iter() {
            head.read_line(line, &mut length, &mut chunked)?;
        }
        head.framing = match (status, chunked, length) {
            (..200 | 204 | 304, _, _) => Framing::Length(0),
            (_, true, None) => Framing::Chunked,
            (_, true, Some(_)) => {
                return Err(ClientError::Malformed("both Content-Length and Transfer-Encoding"));
            }
            (_, false, Some(length)) => Framing::Length(length),
            (_, false, None) => Framing::UntilClose,
        };
        head.keep_alive &= head.framing != Framing::UntilClose;
        Ok(Some((head, len)))
    }

    fn read_line(
        &mut self,
        line: &httparse::Header<'_>,
        length: &mut Option<u64>,
        chunked: &mut bool,
    ) -> Result<(), ClientError> {
        let value = line.value.trim_ascii();
        let text = || std::str::from_utf8(value).unwrap_or_default();
        if line.name.eq_ignore_ascii_case("content-length") {
            let digits = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
            let number = text().parse().ok().filter(|_| digits);
            let number = number.ok_or(ClientError::Malformed("bad Content-Length"))?;
            if length.replace(number).is_some_and(|before| before != number) {
                return Err(ClientError::Malformed("two Content-Lengths"));
            }
        } else if line.name.eq_ignore_ascii_case("transfer-encoding") {
            if !value.eq_ignore_ascii_case(b"chunked") {
                return Err(ClientError::Malformed("unknown Transfer-Encoding"));
            }
            *chunked = true;
        } else if line.name.eq_ignore_ascii_case("connection") {
            for option in text().split(',').map(str::trim) {
                if option.eq_ignore_ascii_case("close") {
                    self.keep_alive = false;
                } else if option.eq_ignore_ascii_case("keep-alive") {
                    self.keep_alive = true;
                }
            }
        } else if line.name.eq_ignore_ascii_case("content-type") {
            self.content_type = content_type(text());
        } else if line.name.eq_ignore_ascii_case("retry-after") {
            self.retry_after = text().parse().ok();
        }
        Ok(())
    }
}

fn content_type(value: &str) -> ContentType {
    let essence = value.split(';').next().unwrap_or_default().trim();
    if essence.eq_ignore_ascii_case("application/json") {
        ContentType::Json
    } else if essence.eq_ignore_ascii_case("text/event-stream") {
        ContentType::EventStream
    } else {
        ContentType::Other(value.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(head: &str) -> Result<AnswerHead, ClientError> {
        AnswerHead::parse(head.as_bytes()).map(|parsed| parsed.unwrap().0)
    }

    #[test]
    fn a_head_is_read_only_when_it_is_whole() {
        let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: 5\r\n\r\n";
        for end in 0..head.len() {
            assert!(AnswerHead::parse(&head.as_bytes()[..end]).unwrap().is_none());
        }
        let (parsed, len) = AnswerHead::parse(format!("{head}abcde").as_bytes()).unwrap().unwrap();
        assert_eq!(len, head.len());
        assert_eq!((parsed.framing, parsed.keep_alive), (Framing::Length(5), true));
        assert_eq!(parsed.content_type, ContentType::Json);
    }

    #[test]
    fn an_answer_without_length_ends_with_the_connection() {
        let head = parse("HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n\r\n").unwrap();
        assert_eq!((head.framing, head.keep_alive), (Framing::UntilClose, false));
        let head = parse("HTTP/1.0 200 OK\r\ncontent-length: 0\r\n\r\n").unwrap();
        assert!(!head.keep_alive);
        let head = parse("HTTP/1.1 204 No Content\r\n\r\n").unwrap();
        assert_eq!((head.framing, head.keep_alive), (Framing::Length(0), true));
        let head =
            parse("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nConnection: Close\r\n\r\n");
        let head = head.unwrap();
        assert_eq!((head.framing, head.keep_alive), (Framing::Chunked, false));
    }

    #[test]
    fn ambiguous_lengths_are_refused() {
        for lines in [
            "content-length: 5\r\ncontent-length: 6\r\n",
            "content-length: +5\r\n",
            "content-length: 5, 5\r\n",
            "content-length: \r\n",
            "content-length: 5\r\ntransfer-encoding: chunked\r\n",
            "transfer-encoding: gzip, chunked\r\n",
        ] {
            assert!(parse(&format!("HTTP/1.1 200 OK\r\n{lines}\r\n")).is_err(), "{lines}");
        }
    }
}
