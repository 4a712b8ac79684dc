//! Connections that have reached the port when a drain begins are served, and have their answers before it ends.
//!
//! Pingora alone stops accepting at once, lets the system reset what waits in the socket's queue, and closes
//! connections that have not sent a request yet. To a client with a kept connection that is nothing: it asks again.
//! On a new connection it looks like a server that fails. So the queue is emptied before the socket is closed, and a
//! new connection has [`PATIENCE`] to send its first request. How long one may take at other times is [`heads`]'s business.
//!
//! Over HTTP/2 an answer is written by the connection, not by whoever makes it, and requests may come until the client
//! has read that the router takes its leave. So a drain waits for these connections to end, too.

use std::cell::Cell;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use pingora_core::apps::ServerApp;
use pingora_core::protocols::Stream;
use pingora_core::server::ShutdownWatch;
use tokio::sync::watch;

use crate::heads::{self, HeadClock};
use crate::limits::{Admitted, InFlight};
use crate::listen::{Bound, ListenError};
use crate::table::Table;

/// How long after the beginning of a drain a new connection may take for its first request, and an HTTP/2 connection
/// for its leave once its requests are answered.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long an accepted connection may take to be counted: it begins on another thread.
const SETTLING: Duration = Duration::from_millis(50);

tokio::task_local! {
    static CONNECTION: Connection;
}

/// A connection to the public port.
struct Connection {
    /// Held until its first request.
    new: Cell<Option<Admitted>>,
    clock: HeadClock,
}

/// To be called when a request has come: its connection is not new any more.
pub fn request_came() {
    // Connections that another service accepted, and streams of HTTP/2, are not counted.
    let _ = CONNECTION.try_with(|connection| {
        connection.new.take();
        connection.clock.came();
    });
}

/// To be called when a request has ended: its connection may bring another.
pub fn request_ended() {
    let _ = CONNECTION.try_with(|connection| connection.clock.ended());
}

/// Counts what may still bring a request, or has not sent its last answer, though nothing is in flight.
#[derive(Clone, Debug, Default)]
pub struct Arrivals {
    ports: InFlight,
    counts: Counts,
}

/// Open connections.
#[derive(Clone, Debug, Default)]
struct Counts {
    /// Those that have not asked yet.
    new: InFlight,
    /// Those of HTTP/2.
    http2: InFlight,
}

impl Arrivals {
    /// Resolves when every port is closed and has given its last connections time to ask.
    pub async fn ended(&self) {
        self.ports.idle().await;
    }

    /// Resolves when every HTTP/2 connection has ended; `false` = some stay open although they had time.
    pub async fn parted(&self) -> bool {
        tokio::time::timeout(PATIENCE, self.counts.http2.idle()).await.is_ok()
    }

    /// Wraps what serves the connections of `socket`.
    ///
    /// # Errors
    /// If the process may not have another descriptor.
    pub fn port<A>(
        &self,
        app: A,
        socket: &Bound,
        table: Arc<Table>,
    ) -> Result<Port<A>, ListenError> {
        let open = Open { socket: socket.try_clone()?, port: self.ports.admit(usize::MAX) };
        let service = Service { app: Arc::new(app), counts: self.counts.clone(), table };
        Ok(Port { service, open: Mutex::new(Some(open)) })
    }
}

/// An app whose last connections are served.
#[derive(Debug)]
pub struct Port<A> {
    service: Service<A>,
    open: Mutex<Option<Open>>,
}

#[derive(Debug)]
struct Service<A> {
    app: Arc<A>,
    counts: Counts,
    /// Says how long a head may take.
    table: Arc<Table>,
}

#[derive(Debug)]
struct Open {
    socket: Bound,
    port: Option<Admitted>,
}

impl<A> Clone for Service<A> {
    fn clone(&self) -> Self {
        let Self { app, counts, table } = self;
        Self { app: Arc::clone(app), counts: counts.clone(), table: Arc::clone(table) }
    }
}

impl<A: ServerApp + Send + Sync + 'static> Service<A> {
    fn connection(&self) -> Connection {
        let limit = self.table.snapshot().config.limits.head_timeout.duration();
        let new = Cell::new(self.counts.new.admit(usize::MAX));
        Connection { new, clock: HeadClock::new(limit) }
    }

    /// Serves one connection to its end.
    async fn serve(
        &self,
        mut stream: Stream,
        connection: Connection,
        shutdown: &ShutdownWatch,
    ) -> Option<Stream> {
        let mut timer = pin!(heads::timer(&connection.clock));
        let is_http2 = heads::is_http2(&mut stream, timer.as_mut()).await?;
        if is_http2 {
            let _open = self.counts.http2.admit(usize::MAX);
            drop(connection);
            // Its streams are tasks of their own; one without any is closed by Pingora.
            return self.app.process_new(stream, shutdown).await;
        }
        let serving = self.app.process_new(stream, shutdown);
        let due = || CONNECTION.with(|own| own.clock.due());
        CONNECTION.scope(connection, heads::watched(serving, due, timer)).await
    }
}

impl<A: ServerApp + Send + Sync + 'static> Port<A> {
    /// Empties the socket's queue.
    fn accept_rest(&self, socket: &Bound) {
        let (sender, mut shutdown) = watch::channel(true);
        // To HTTP/2 a shutdown is a change: with it the connection takes its leave while it serves.
        shutdown.mark_changed();
        let sender = Arc::new(sender);
        while let Ok(stream) = socket.accept() {
            let (service, shutdown, sender) =
                (self.service.clone(), shutdown.clone(), Arc::clone(&sender));
            let connection = self.service.connection();
            tokio::spawn(async move {
                service.serve(stream, connection, &shutdown).await;
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
        let (service, shutdown) = (self.service.clone(), shutdown.clone());
        let connection = service.connection();
        tokio::spawn(async move {
            service.serve(stream, connection, &shutdown).await;
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
        let new = &self.service.counts.new;
        if tokio::time::timeout(PATIENCE, new.idle()).await.is_err() {
            tracing::debug!(connections = new.count(), "closed without a request");
        }
        self.service.app.cleanup().await;
        drop(port);
    }
}
