//! Asks a context worker whether it is still the start of a process that a record speaks of.
//!
//! Metadata of a dead process may point at a port that another process owns by now, and a read there can end that
//! process. So metadata of a worker that is not connected yet reaches the transport only after this.

use std::convert::Infallible;
use std::time::Duration;

use axum::http::{Request, header};
use baton_shared::kv::record::Record;
use baton_shared::wire::error::ErrorCode;
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::TcpStream;

use super::error::ApiError;

/// How long a worker may take to answer.
const PATIENCE: Duration = Duration::from_secs(1);
/// Longest answer read.
const MAX_ANSWER: usize = 64 << 10;

/// The part of `/server_info` that says which start it is.
#[derive(Deserialize)]
struct ServerInfo {
    baton: Option<Identity>,
}

#[derive(Deserialize)]
struct Identity {
    incarnation: String,
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Whether the worker of `record` still is the one that wrote it.
///
/// # Errors
/// [`ErrorCode::KvLeaseGone`] if another process answers, [`ErrorCode::KvPeerUnreachable`] if none does.
pub async fn confirm(record: &Record) -> Result<(), ApiError> {
    let unreachable = |reason: &str| {
        let message = format!(
            "context worker `{}` at {} cannot be reached: {reason}",
            record.worker, record.address
        );
        ApiError::new(ErrorCode::KvPeerUnreachable, message)
    };
    match tokio::time::timeout(PATIENCE, incarnation_at(&record.address)).await {
        Err(_) => Err(unreachable("no answer within 1 s")),
        Ok(Err(error)) => Err(unreachable(&error.to_string())),
        Ok(Ok(found)) if found.as_deref() == Some(&*record.incarnation.to_string()) => Ok(()),
        Ok(Ok(_)) => {
            let message = format!(
                "context worker `{}` at {} has been restarted: its blocks are gone",
                record.worker, record.address
            );
            Err(ApiError::new(ErrorCode::KvLeaseGone, message))
        }
    }
}

/// The incarnation that answers at `address`; `None` if what answers is no worker of ours.
async fn incarnation_at(address: &str) -> Result<Option<String>, Failure> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::get("/server_info")
        .header(header::HOST, address)
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())?;
    let exchange = async {
        let response = sender.send_request(request).await?;
        let is_good = response.status().is_success();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await?.to_bytes();
        Ok::<_, Failure>((is_good, body))
    };
    // The connection lives no longer than the exchange, which sees for itself when it breaks.
    let driven = async {
        drop(connection.await);
        std::future::pending::<Infallible>().await
    };
    let (is_good, body) = tokio::select! {
        exchanged = exchange => exchanged?,
        never = driven => match never {},
    };
    if !is_good {
        return Ok(None);
    }
    let info: Option<ServerInfo> = serde_json::from_slice(&body).ok();
    Ok(info.and_then(|info| info.baton).map(|identity| identity.incarnation))
}

#[cfg(test)]
mod tests {
    use axum::Json;
    use axum::routing::get;
    use baton_shared::id::{DisaggRequestId, Incarnation};
    use serde_json::{Value, json};
    use tokio::net::TcpListener;

    use super::*;

    fn record(address: String, incarnation: Incarnation) -> Record {
        Record {
            worker: "ctx".parse().unwrap(),
            address,
            incarnation,
            request: DisaggRequestId(1),
            prompt_hash: [0; 32],
            fingerprint: [0; 32],
            prompt_tokens: 1,
            lease: None,
        }
    }

    /// Serves `info` on a free port.
    async fn peer(info: Value) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let router = axum::Router::new().route("/server_info", get(|| async { Json(info) }));
        tokio::spawn(async move { axum::serve(listener, router).await });
        address
    }

    #[tokio::test]
    async fn the_same_start_is_confirmed_and_another_is_not() {
        let (old, new) = (Incarnation::random(), Incarnation::random());
        let address = peer(json!({"baton": {"incarnation": new.to_string()}})).await;
        assert_eq!(confirm(&record(address.clone(), new)).await, Ok(()));
        let error = confirm(&record(address, old)).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::KvLeaseGone);
    }

    #[tokio::test]
    async fn something_else_at_the_address_means_the_blocks_are_gone() {
        let address = peer(json!({})).await;
        let error = confirm(&record(address, Incarnation::random())).await.unwrap_err();
        assert_eq!(error.code, ErrorCode::KvLeaseGone);
    }

    #[tokio::test]
    async fn nobody_there_and_nobody_answering_is_unreachable() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let silent = confirm(&record(address.clone(), Incarnation::random())).await.unwrap_err();
        assert_eq!(silent.code, ErrorCode::KvPeerUnreachable);
        drop(listener);
        let closed = confirm(&record(address, Incarnation::random())).await.unwrap_err();
        assert_eq!(closed.code, ErrorCode::KvPeerUnreachable);
    }
}
