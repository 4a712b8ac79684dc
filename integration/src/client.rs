//! HTTP and SSE client of the tests: one connection a request, so that dropping an answer is a client that leaves.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use http::{HeaderMap, Method, Request};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::task::JoinHandle;

use crate::at::At;

/// No answer takes longer, nor does a piece of a stream.
const PATIENCE: Duration = Duration::from_secs(120);

/// Talks to one address.
#[derive(Clone, Copy, Debug)]
pub struct Client {
    address: At,
    patience: Duration,
}

/// A whole answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// Head.
    pub headers: HeaderMap,
    /// Body.
    pub body: Bytes,
}

/// An answer whose body is still arriving. Dropping it closes the connection.
#[derive(Debug)]
pub struct Stream {
    /// HTTP status.
    pub status: u16,
    /// Head.
    pub headers: HeaderMap,
    body: Incoming,
    buffer: Vec<u8>,
    patience: Duration,
    connection: Connection,
}

/// Ends its connection when dropped.
#[derive(Debug)]
struct Connection(JoinHandle<()>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Client {
    /// To `address`.
    pub fn new(address: SocketAddr) -> Self {
        Self::at(address.into())
    }

    /// To an address of either kind.
    pub fn at(address: At) -> Self {
        Self { address, patience: PATIENCE }
    }

    /// The same, waiting this long for an answer or a piece of a stream.
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// GET.
    ///
    /// # Errors
    /// If no whole answer comes.
    pub async fn get(&self, path: &str) -> Result<Answer> {
        self.send(Method::GET, path, &[], Bytes::new()).await?.whole().await
    }

    /// POST of a JSON body; the whole answer.
    ///
    /// # Errors
    /// If no whole answer comes.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Answer> {
        self.stream(path, body).await?.whole().await
    }

    /// POST of a JSON body; the answer as soon as its head is there.
    ///
    /// # Errors
    /// If no head comes.
    pub async fn stream(&self, path: &str, body: &Value) -> Result<Stream> {
        self.send(Method::POST, path, &[], serde_json::to_vec(body)?.into()).await
    }

    /// Any request; JSON unless a header says otherwise.
    ///
    /// # Errors
    /// If no head comes.
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> Result<Stream> {
        let exchange = async {
            let wire = self.address.connect().await.context("connecting")?;
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(wire)).await?;
            let connection = Connection(tokio::spawn(async move { drop(connection.await) }));
            let mut request = Request::builder()
                .method(method)
                .uri(path)
                .header("host", self.address.to_string());
            let is_kind = |(name, _): &(&str, &str)| *name == "content-type";
            if !headers.iter().any(is_kind) {
                request = request.header("content-type", "application/json");
            }
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            let answer = sender.send_request(request.body(Full::new(body))?).await?;
            let (head, body) = answer.into_parts();
            let (status, headers) = (head.status.as_u16(), head.headers);
            let (buffer, patience) = (Vec::new(), self.patience);
            anyhow::Ok(Stream { status, headers, body, buffer, patience, connection })
        };
        let late = || format!("no answer from {} to {path} in {:?}", self.address, self.patience);
        tokio::time::timeout(self.patience, exchange).await.with_context(late)?
    }
}

impl Answer {
    /// The body as JSON.
    ///
    /// # Errors
    /// If it is something else.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_slice(&self.body)
            .with_context(|| format!("not JSON: {}", String::from_utf8_lossy(&self.body)))
    }

    /// The body of a 200 answer.
    ///
    /// # Errors
    /// If the status is another.
    pub fn ok(&self) -> Result<Value> {
        let text = String::from_utf8_lossy(&self.body);
        ensure!(self.status == 200, "status {}: {text}", self.status);
        self.json()
    }

    /// `error.code` of an OpenAI-shaped error body.
    ///
    /// # Errors
    /// If the body has another shape.
    pub fn error_code(&self) -> Result<String> {
        let body = self.json()?;
        let error = &body["error"];
        ensure!(error["message"].is_string() && error["type"].is_string(), "not an error: {body}");
        Ok(error["code"].as_str().context("`error.code`")?.to_owned())
    }
}

impl Stream {
    /// Reads the rest.
    ///
    /// # Errors
    /// If the body is cut off.
    pub async fn whole(self) -> Result<Answer> {
        let Self { status, headers, body, patience, connection, .. } = self;
        let body =
            tokio::time::timeout(patience, body.collect()).await.context("rest of body")??;
        drop(connection);
        Ok(Answer { status, headers, body: body.to_bytes() })
    }

    /// The next piece of the body as it arrives, for who does not care about events; `None` at its end.
    ///
    /// # Errors
    /// If the body is cut off.
    pub async fn piece(&mut self) -> Result<Option<Bytes>> {
        loop {
            let frame = tokio::time::timeout(self.patience, self.body.frame()).await;
            match frame.context("next event")? {
                Some(frame) => {
                    if let Ok(piece) = frame?.into_data() {
                        return Ok(Some(piece));
                    }
                }
                None => return Ok(None),
            }
        }
    }

    /// The next event's data; `None` at the end of the body.
    ///
    /// # Errors
    /// If the body is cut off, or is no stream of `data:` events.
    pub async fn event(&mut self) -> Result<Option<String>> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|two| two == b"\n\n") {
                let event: Vec<u8> = self.buffer.drain(..end + 2).collect();
                let text = String::from_utf8(event).context("an event is UTF-8")?;
                let data = text.strip_prefix("data: ").context("an event begins with `data: `")?;
                return Ok(Some(data.trim_end().to_owned()));
            }
            match self.piece().await? {
                Some(piece) => self.buffer.extend_from_slice(&piece),
                None if self.buffer.is_empty() => return Ok(None),
                None => bail!("half an event at the end"),
            }
        }
    }

    /// All events up to `[DONE]`, which must be the last.
    ///
    /// # Errors
    /// If it is not, or an event is not JSON.
    pub async fn events(mut self) -> Result<Vec<Value>> {
        ensure!(self.status == 200, "status {}", self.status);
        let kind = self.headers.get("content-type").context("a content type")?.to_str()?;
        ensure!(kind.starts_with("text/event-stream"), "content type `{kind}`");
        let mut events = Vec::new();
        while let Some(data) = self.event().await? {
            if data == "[DONE]" {
                ensure!(self.event().await?.is_none(), "an event after [DONE]");
                return Ok(events);
            }
            events.push(serde_json::from_str(&data).with_context(|| data.clone())?);
        }
        bail!("no [DONE] after {} events: {events:?}", events.len())
    }
}
