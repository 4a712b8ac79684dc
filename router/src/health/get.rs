//! A small GET for probes and lists: always a fresh connection, because a probe must see whether a *new* one
//! works; one deadline; a bounded answer.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, timeout_at};

use crate::client::head::render;
use crate::client::{Address, ClientError, Connection, Request};
use crate::table::worker::Worker;

/// Longest answer that is read, in bytes.
const MAX_ANSWER: usize = 1 << 20;

/// A whole answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// HTTP status.
    pub status: u16,
    /// Whole body.
    pub body: Bytes,
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
    let addresses = worker.addresses().to_vec();
    let connection = connect(&addresses, deadline).await?;
    let head = render("GET", path, &worker.authority);
    let work = async {
        let request = Request { head: &head, lines: b"", pieces: &[] };
        let mut exchange = connection.exchange(request).await?;
        let status = exchange.head().status;
        let body = exchange.whole(MAX_ANSWER).await?;
        Ok::<_, ClientError>(Reply { status, body })
    };
    match timeout_at(deadline, work).await {
        Ok(reply) => reply.map_err(|error| GetError::Broken(error.to_string())),
        Err(_) => Err(GetError::Late),
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
async fn connect(addresses: &[Address], deadline: Instant) -> Result<Connection, GetError> {
    let mut last = "the name has no address".to_owned();
    for address in addresses {
        match timeout_at(deadline, Connection::open(address)).await {
            Ok(Ok(connection)) => return Ok(connection),
            Ok(Err(error)) => last = error.to_string(),
            Err(_) => last = "timed out".to_owned(),
        }
    }
    Err(GetError::Unreachable(last))
}
