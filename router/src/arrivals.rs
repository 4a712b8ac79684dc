//! Connections that have reached the port when a drain begins are served.
//!
//! Pingora alone stops accepting at once, lets the system reset what waits in the socket's queue, and closes
//! connections that have not sent a request yet. To a client with a kept connection that is nothing: it asks again.
//! On a new connection it looks like a server that fails. So the queue is emptied before the socket is closed, and a
//! new connection has [`PATIENCE`] to send its first request.

use std::cell::Cell;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use pingora_core::apps::ServerApp;
use pingora_core::protocols::Stream;
use pingora_core::server::ShutdownWatch;
use tokio::sync::watch;

use crate::limits::{Admitted, InFlight};
use crate::listen::{Bound, ListenError};

/// How long after the beginning of a drain a new connection may take for its first request.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long an accepted connection may take to be counted: it begins on another thread.
const SETTLING: Duration = Duration::from_millis(50);

tokio::task_local! {
    /// Of a connection, held until its first request.
    static NEW: Cell<Option<Admitted>>;
}

/// To be called when a request has come: its connection is not new any more.
pub fn request_came() {
    // Connections that another service accepted are not counted.
    let _ = NEW.try_with(Cell::take);
}

/// Counts what may still bring a request though nothing is in flight.
#[derive(Clone, Debug, Default)]
pub struct Arrivals {
    ports: InFlight,
    new: InFlight,
}

impl Arrivals {
    /// Resolves when every port is closed and has given its last connections time to ask.
    pub async fn ended(&self) {
        self.ports.idle().await;
    }

    /// Wraps what serves the connections of `socket`.
    ///
    /// # Errors
    /// If the process may not have another descriptor.
    pub fn port<A>(&self, app: A, socket: &Bound) -> Result<Port<A>, ListenError> {
        let open = Open { socket: socket.try_clone()?, port: self.ports.admit(usize::MAX) };
        Ok(Port { app: Arc::new(app), new: self.new.clone(), open: Mutex::new(Some(open)) })
    }
}

/// An app whose last connections are served.
#[derive(Debug)]
pub struct Port<A> {
    app: Arc<A>,
    new: InFlight,
    open: Mutex<Option<Open>>,
}

#[derive(Debug)]
struct Open {
    socket: Bound,
    port: Option<Admitted>,
}

impl<A: ServerApp + Send + Sync + 'static> Port<A> {
    /// Empties the socket's queue.
    fn accept_rest(&self, socket: &Bound) {
        // Shutting down since before they came.
        let (sender, shutdown) = watch::channel(true);
        let sender = Arc::new(sender);
        while let Ok(stream) = socket.accept() {
            let (app, shutdown, sender) =
                (Arc::clone(&self.app), shutdown.clone(), Arc::clone(&sender));
            let new = Cell::new(self.new.admit(usize::MAX));
            tokio::spawn(async move {
                NEW.scope(new, app.process_new(stream, &shutdown)).await;
                drop(sender);
            });
        }
    }
}

#[async_trait]
impl<A: ServerApp + Send + Sync + 'static> ServerApp for Port<A> {
    async fn process_new(
        self: &Arc<Self>,
        stream: Stream,
        shutdown: &ShutdownWatch,
    ) -> Option<Stream> {
        // In a task of its own: the one in which Pingora hands a connection over has room for a TLS handshake, 9 KiB that
        // every stream would hold.
        let (app, shutdown) = (Arc::clone(&self.app), shutdown.clone());
        let new = Cell::new(self.new.admit(usize::MAX));
        tokio::spawn(async move {
            NEW.scope(new, app.process_new(stream, &shutdown)).await;
        });
        None
    }

    /// Pingora has stopped accepting; the app's own cleanup closes idle connections.
    async fn cleanup(&self) {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Open { socket, port }) = open else { return };
        self.accept_rest(&socket);
        drop(socket);
        tokio::time::sleep(SETTLING).await;
        if tokio::time::timeout(PATIENCE, self.new.idle()).await.is_err() {
            tracing::debug!(connections = self.new.count(), "closed without a request");
        }
        self.app.cleanup().await;
        drop(port);
    }
}
