//! Owns a worker's connections: accepts them, and ends them when the engine has ended.
//!
//! Stopping: the engine is told to drain; connections are still accepted, so that routers can ask for health and
//! release what is leased; when the engine has ended, open answers are finished within [`CLOSING`].

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::connection::WriteDeadline;
use super::worker::Worker;
use crate::engine::EngineEnd;

/// How long open answers may take once the engine has ended.
const CLOSING: Duration = Duration::from_secs(5);
/// A connection that sends no whole request head for this long is closed; routers keep idle ones for less.
const HEAD_TIMEOUT: Duration = Duration::from_secs(75);
/// Pause after the system refused a connection (out of file descriptors).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves until the engine ends: by itself, or after `shutdown` told it to drain.
pub async fn run(
    listener: TcpListener,
    worker: Arc<Worker>,
    write_timeout: Duration,
    shutdown: impl Future<Output = ()>,
) -> EngineEnd {
    let (closing, is_closing) = watch::channel(false);
    let router = super::router(Arc::clone(&worker));
    let mut connections = JoinSet::new();
    let mut shutdown = std::pin::pin!(shutdown);
    let mut is_draining = false;
    let mut ended = std::pin::pin!(worker.engine.ended());
    let end = loop {
        tokio::select! {
            end = &mut ended => break end,
            () = &mut shutdown, if !is_draining => {
                is_draining = true;
                worker.engine.drain();
            }
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let is_closing = is_closing.clone();
                    connections.spawn(serve(stream, router.clone(), write_timeout, is_closing));
                }
                Err(error) => pause(&error).await,
            },
        }
    };
    drop(listener);
    closing.send_replace(true);
    let all_closed = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(CLOSING, all_closed).await.is_err() {
        tracing::warn!(left = connections.len(), "connections were cut");
        connections.shutdown().await;
    }
    end
}

/// Serves one connection until its client or we are done.
async fn serve(
    stream: TcpStream,
    router: Router,
    write_timeout: Duration,
    mut is_closing: watch::Receiver<bool>,
) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "a connection was gone at once");
        return;
    }
    let io = TokioIo::new(WriteDeadline::new(stream, write_timeout));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(io, TowerToHyperService::new(router));
    let mut connection = std::pin::pin!(connection);
    let closes = async { drop(is_closing.wait_for(|closing| *closing).await) };
    let served = tokio::select! {
        served = &mut connection => served,
        () = closes => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = served {
        // Clients leave as they like, and idle connections time out.
        tracing::debug!(%error, "a connection ended early");
    }
}

async fn pause(error: &io::Error) {
    match error.kind() {
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset => {}
        _ => {
            tracing::warn!(%error, "cannot accept a connection");
            tokio::time::sleep(ACCEPT_PAUSE).await;
        }
    }
}
