//! A small GET for probes and lists: a fresh connection, one deadline, a bounded answer.
//!
//! Deliberately not the request path's client: a probe must see whether a *new* connection works.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, timeout_at};

use crate::table::worker::Worker;
use baton_shared::config::net::Endpoint;

/// Longest answer that is read.
const MAX_ANSWER: usize = 1 << 20;

/// A whole answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// HTTP status.
    pub status: u16,
    /// Unchunked.
    pub body: Vec<u8>,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GetError {
    /// No connection.
    #[error("cannot connect: {0}")]
    Unreachable(String),
    /// Connected, but what came is not an answer.
    #[error("bad answer: {0}")]
    Broken(String),
    /// Connected, but no whole answer in time.
    #[error("no answer in time")]
    Late,
}

/// `GET path` from `worker`, within `limit`.
pub async fn get(worker: &Worker, path: &str, limit: Duration) -> Result<Reply, GetError> {
    let deadline = Instant::now() + limit;
    let request = format!(
        "GET {path} HTTP/1.1\r\nhost: {}\r\naccept: */*\r\nconnection: close\r\n\r\n",
        worker.authority
    );
    match &worker.endpoint {
        Endpoint::Tcp(_) => {
            let addresses = worker.addresses().to_vec();
            let stream = connect(&addresses, deadline).await?;
            exchange(stream, &request, deadline).await
        }
        Endpoint::Unix(path) => {
            let stream = match timeout_at(deadline, UnixStream::connect(path)).await {
                Ok(stream) => stream.map_err(|error| GetError::Unreachable(error.to_string()))?,
                Err(_) => return Err(GetError::Unreachable("timed out".to_owned())),
            };
            exchange(stream, &request, deadline).await
        }
    }
}

/// The addresses of `host`, IPv4 first: workers that bind one family mostly bind that one.
pub async fn resolve(host: &str, port: u16, limit: Duration) -> std::io::Result<Vec<SocketAddr>> {
    let found = tokio::time::timeout(limit, tokio::net::lookup_host((host, port))).await??;
    let mut addresses: Vec<SocketAddr> = found.collect();
    addresses.sort_by_key(SocketAddr::is_ipv6);
    addresses.dedup();
    Ok(addresses)
}

/// The first address that accepts.
async fn connect(addresses: &[SocketAddr], deadline: Instant) -> Result<TcpStream, GetError> {
    let mut last = "the name has no address".to_owned();
    for address in addresses {
        match timeout_at(deadline, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => last = error.to_string(),
            Err(_) => last = "timed out".to_owned(),
        }
    }
    Err(GetError::Unreachable(last))
}

async fn exchange(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    request: &str,
    deadline: Instant,
) -> Result<Reply, GetError> {
    let work = async {
        let broken = |error: std::io::Error| GetError::Broken(error.to_string());
        stream.write_all(request.as_bytes()).await.map_err(broken)?;
        let mut bytes = Vec::new();
        loop {
            if let Some(reply) = parse(&bytes, false)? {
                return Ok(reply);
            }
            if bytes.len() > MAX_ANSWER {
                return Err(GetError::Broken(format!("longer than {MAX_ANSWER} bytes")));
            }
            if stream.read_buf(&mut bytes).await.map_err(broken)? == 0 {
                let ended = || GetError::Broken("it ended early".to_owned());
                return parse(&bytes, true)?.ok_or_else(ended);
            }
        }
    };
    timeout_at(deadline, work).await.unwrap_or(Err(GetError::Late))
}

/// The answer in `bytes`, if it is whole; `ended` = nothing more will come.
fn parse(bytes: &[u8], ended: bool) -> Result<Option<Reply>, GetError> {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut head = httparse::Response::new(&mut headers);
    let broken = |error: httparse::Error| GetError::Broken(error.to_string());
    let httparse::Status::Complete(start) = head.parse(bytes).map_err(broken)? else {
        return Ok(None);
    };
    let status = head.code.unwrap_or_default();
    let rest = bytes.get(start..).unwrap_or_default();
    if (100..200).contains(&status) {
        return parse(rest, ended);
    }
    let header = |name: &str| {
        head.headers.iter().find(|h| h.name.eq_ignore_ascii_case(name)).map(|h| h.value)
    };
    let chunked = header("transfer-encoding").is_some();
    let length = header("content-length").and_then(|v| std::str::from_utf8(v).ok()?.parse().ok());
    let body = match (chunked, length) {
        (true, _) => unchunk(rest)?,
        (false, Some(length)) => rest.get(..length).map(<[u8]>::to_vec),
        (false, None) if status == 204 => Some(Vec::new()),
        (false, None) => ended.then(|| rest.to_vec()),
    };
    Ok(body.map(|body| Reply { status, body }))
}

/// A chunked body, if it is whole.
fn unchunk(mut rest: &[u8]) -> Result<Option<Vec<u8>>, GetError> {
    let mut body = Vec::new();
    loop {
        let size = httparse::parse_chunk_size(rest);
        let size = size.map_err(|_| GetError::Broken("bad chunk size".to_owned()))?;
        let httparse::Status::Complete((start, length)) = size else { return Ok(None) };
        if length == 0 {
            return Ok(Some(body));
        }
        let end = usize::try_from(length).ok().and_then(|length| start.checked_add(length));
        let Some(chunk) = end.and_then(|end| rest.get(start..end)) else { return Ok(None) };
        body.extend_from_slice(chunk);
        rest = rest.get(start + chunk.len() + 2..).unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_whole_by_length_by_chunks_or_by_its_end() {
        let whole = |text: &str, ended| parse(text.as_bytes(), ended).unwrap().map(|r| r.body);
        assert_eq!(whole("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nab", false), None);
        assert_eq!(
            whole("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", false).unwrap(),
            b"abc"
        );
        let chunked =
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n";
        assert_eq!(whole(chunked, false).unwrap(), b"abc");
        assert_eq!(whole(&chunked[..chunked.len() - 8], true), None);
        assert_eq!(whole("HTTP/1.0 200 OK\r\n\r\nabc", false), None);
        assert_eq!(whole("HTTP/1.0 200 OK\r\n\r\nabc", true).unwrap(), b"abc");
        assert_eq!(
            whole("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No\r\n\r\n", false).unwrap(),
            b""
        );
        assert!(parse(b"garbage\r\n\r\n", true).is_err());
    }
}
