//! A client that speaks HTTP/2 in the clear: many requests on one connection, and for one that is not answered whether
//! it may be sent again (RFC 9113, 8.7: what the server has not looked at may; anything else is lost).

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use h2::client::SendRequest;
use h2::{Reason, RecvStream};
use http::{HeaderMap, Request};
use serde_json::Value;
use tokio::task::JoinHandle;

use crate::at::At;
use crate::client::Answer;

/// No answer takes longer.
const PATIENCE: Duration = Duration::from_secs(60);

/// One connection.
#[derive(Debug)]
pub struct Http2 {
    sender: SendRequest<Bytes>,
    connection: JoinHandle<Result<(), h2::Error>>,
}

/// Why there is no answer.
#[derive(Debug)]
pub enum Unanswered {
    /// The server has not looked at the request: it may be sent again, on another connection.
    Again(anyhow::Error),
    /// The server may have.
    Lost(anyhow::Error),
}

/// An answer whose body is still arriving.
#[derive(Debug)]
pub struct Stream {
    /// HTTP status.
    pub status: u16,
    /// Head.
    pub headers: HeaderMap,
    body: RecvStream,
}

impl From<h2::Error> for Unanswered {
    fn from(error: h2::Error) -> Self {
        let told =
            error.is_remote() && error.is_go_away() && error.reason() == Some(Reason::NO_ERROR);
        let refused = error.is_reset() && error.reason() == Some(Reason::REFUSED_STREAM);
        if told || refused { Self::Again(error.into()) } else { Self::Lost(error.into()) }
    }
}

impl Http2 {
    /// Connects to `address`.
    ///
    /// # Errors
    /// If nobody listens.
    pub async fn connect(address: impl Into<At>) -> Result<Self> {
        let wire = address.into().connect().await.context("connecting")?;
        let (sender, connection) = h2::client::handshake(wire).await.context("preface")?;
        Ok(Self { sender, connection: tokio::spawn(connection) })
    }

    /// POST of a JSON body; written when this returns, the answer's head comes by the future that it gives.
    ///
    /// # Errors
    /// If the connection takes no more requests.
    pub async fn post(
        &self,
        path: &str,
        body: &Value,
    ) -> Result<impl Future<Output = Result<Stream, Unanswered>> + Send + use<>, Unanswered> {
        let again = |error: h2::Error| Unanswered::Again(error.into());
        let mut sender = self.sender.clone().ready().await.map_err(again)?;
        let request = Request::post(format!("http://localhost{path}"))
            .header("content-type", "application/json")
            .body(())
            .map_err(|error| Unanswered::Lost(error.into()))?;
        let (answer, mut sending) = sender.send_request(request, false).map_err(again)?;
        sending.send_data(body.to_string().into(), true)?;
        Ok(async move {
            let answer = tokio::time::timeout(PATIENCE, answer).await;
            let late = |_| Unanswered::Lost(anyhow::anyhow!("no answer in {PATIENCE:?}"));
            let (head, body) = answer.map_err(late)??.into_parts();
            Ok(Stream { status: head.status.as_u16(), headers: head.headers, body })
        })
    }

    /// Waits until the server has closed the connection.
    ///
    /// # Errors
    /// If it did so in another way than by taking leave.
    pub async fn ended(self) -> Result<()> {
        drop(self.sender);
        let ended = tokio::time::timeout(PATIENCE, self.connection).await;
        Ok(ended.context("the connection stays")???)
    }
}

impl Stream {
    /// The next piece of the body; `None` at its end.
    ///
    /// # Errors
    /// If the body is cut off.
    pub async fn piece(&mut self) -> Result<Option<Bytes>> {
        let piece = tokio::time::timeout(PATIENCE, self.body.data()).await;
        let Some(piece) = piece.context("next piece")?.transpose()? else { return Ok(None) };
        self.body.flow_control().release_capacity(piece.len())?;
        Ok(Some(piece))
    }

    /// Reads the rest.
    ///
    /// # Errors
    /// If the body is cut off.
    pub async fn whole(mut self) -> Result<Answer> {
        let mut body = Vec::new();
        while let Some(piece) = self.piece().await? {
            body.extend_from_slice(&piece);
        }
        Ok(Answer { status: self.status, headers: self.headers, body: body.into() })
    }

    /// All events up to `[DONE]`, which must be the last.
    ///
    /// # Errors
    /// If it is not, or an event is not JSON.
    pub async fn events(self) -> Result<Vec<Value>> {
        let answer = self.whole().await?;
        ensure!(answer.status == 200, "status {}", answer.status);
        let text = String::from_utf8(answer.body.to_vec()).context("events are UTF-8")?;
        let events = text.strip_suffix("data: [DONE]\n\n").context("`[DONE]` comes last")?;
        let event = |event: &str| {
            let data = event.strip_prefix("data: ").context("an event begins with `data: `")?;
            serde_json::from_str(data).with_context(|| data.to_owned())
        };
        events.split_terminator("\n\n").map(event).collect()
    }
}
