//! A client that keeps its connection, as HTTP clients do: it asks again, on a new one, when a connection that it used
//! before is closed before any byte of an answer.

use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use serde_json::Value;

use crate::at::At;
use crate::client::Answer;

/// No answer takes longer.
const PATIENCE: Duration = Duration::from_secs(60);

/// One connection at a time to one address.
#[derive(Debug)]
pub struct Kept {
    address: At,
    connection: Option<SendRequest<Full<Bytes>>>,
    repeated: usize,
}

impl Kept {
    /// To `address`; connects when it is used.
    pub fn new(address: impl Into<At>) -> Self {
        Self { address: address.into(), connection: None, repeated: 0 }
    }

    /// Connects now, unless it has a connection.
    ///
    /// # Errors
    /// If nobody listens.
    pub async fn connect(&mut self) -> Result<()> {
        if self.connection.is_none() {
            let wire = self.address.connect().await.context("connecting")?;
            let (sender, connection) = handshake(TokioIo::new(wire)).await?;
            tokio::spawn(async move { drop(connection.await) });
            self.connection = Some(sender);
        }
        Ok(())
    }

    /// How often a request was sent again because a used connection had been closed.
    pub fn repeated(&self) -> usize {
        self.repeated
    }

    /// Whether the last answer left the connection open, as far as is known.
    pub fn is_connected(&self) -> bool {
        self.connection.as_ref().is_some_and(|sender| !sender.is_closed())
    }

    /// POST of a JSON body; the whole answer.
    ///
    /// # Errors
    /// If none comes, or a new connection is closed before it.
    pub async fn post(&mut self, path: &str, body: &Value) -> Result<Answer> {
        let exchange = async {
            if let Some(mut used) = self.connection.take() {
                let head = match used.ready().await {
                    Ok(()) => used.send_request(self.request(path, body)?).await,
                    Err(closed) => Err(closed),
                };
                if let Ok(head) = head {
                    return self.finish(used, head).await;
                }
                self.repeated += 1;
            }
            self.first(path, body).await
        };
        tokio::time::timeout(PATIENCE, exchange).await.context("no answer in time")?
    }

    /// The first request of a connection, which is made unless it is there: this one is not repeated.
    ///
    /// # Errors
    /// As [`Self::post`].
    pub async fn first(&mut self, path: &str, body: &Value) -> Result<Answer> {
        self.connect().await?;
        let mut sender = self.connection.take().context("a connection")?;
        let head = sender.send_request(self.request(path, body)?).await;
        self.finish(sender, head.context("on a new connection")?).await
    }

    fn request(&self, path: &str, body: &Value) -> Result<Request<Full<Bytes>>> {
        let request = Request::post(path)
            .header("host", self.address.to_string())
            .header("content-type", "application/json");
        Ok(request.body(Full::new(serde_json::to_vec(body)?.into()))?)
    }

    async fn finish(
        &mut self,
        sender: SendRequest<Full<Bytes>>,
        answer: http::Response<hyper::body::Incoming>,
    ) -> Result<Answer> {
        let (head, body) = answer.into_parts();
        let body = body.collect().await.context("the rest of the answer")?.to_bytes();
        let closes = head.headers.get("connection").is_some_and(|value| value == "close");
        self.connection = (!closes).then_some(sender);
        Ok(Answer { status: head.status.as_u16(), headers: head.headers, body })
    }
}
