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

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use baton_shared::config::net::Listen;
    use tokio::sync::Notify;

    use super::*;
    use crate::config::{RouterConfig, ServerEntry};
    use crate::heads::PREFACE;
    use crate::listen::Inherited;

    /// Serves each connection until it is told to go on.
    #[derive(Debug, Default)]
    struct App {
        serves: Notify,
        go_on: Notify,
        served: AtomicUsize,
    }

    #[async_trait]
    impl ServerApp for App {
        async fn process_new(self: &Arc<Self>, _: Stream, _: &ShutdownWatch) -> Option<Stream> {
            self.serves.notify_one();
            self.go_on.notified().await;
            self.served.fetch_add(1, Ordering::SeqCst);
            None
        }
    }

    /// A port, and a connection to it that has brought these bytes.
    fn scene(bytes: &[u8]) -> (Arc<Port<App>>, Stream, Arrivals, std::net::TcpStream) {
        let socket = Bound::bind(&Listen::loopback(0), &mut Inherited::default()).unwrap();
        let arrivals = Arrivals::default();
        let mut config = RouterConfig::default();
        config.context.servers = vec![ServerEntry::new("127.0.0.1:1".parse().unwrap())];
        config.generation.servers = config.context.servers.clone();
        let table = Arc::new(Table::new(config).unwrap());
        let port = Arc::new(arrivals.port(App::default(), &socket, table).unwrap());
        let mut client = std::net::TcpStream::connect(socket.address.to_string()).unwrap();
        client.write_all(bytes).unwrap();
        (port, socket.accept().unwrap(), arrivals, client)
    }

    #[tokio::test]
    async fn a_connection_counts_as_new_until_it_asks_and_one_of_http2_until_it_ends() {
        let request = b"GET /version HTTP/1.1\r\nhost: r\r\n\r\n";
        for (bytes, new, http2) in [(request.as_slice(), 1, 0), (PREFACE, 0, 1)] {
            let (port, stream, arrivals, _client) = scene(bytes);
            let (service, counts) = (port.service.clone(), &arrivals.counts);
            let app = Arc::clone(&service.app);
            let serving = tokio::spawn(async move {
                let connection = service.connection();
                service.serve(stream, connection, &watch::channel(false).1).await;
            });
            app.serves.notified().await;
            assert_eq!((counts.new.count(), counts.http2.count()), (new, http2));
            app.go_on.notify_one();
            serving.await.unwrap();
            assert_eq!((counts.new.count(), counts.http2.count()), (0, 0));
            assert!(arrivals.parted().await);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_brings_nothing_is_closed_in_the_end() {
        for bytes in [b"".as_slice(), b"GET"] {
            let (port, stream, arrivals, _client) = scene(bytes);
            let begun = tokio::time::Instant::now();
            let service = &port.service;
            let limit = service.table.snapshot().config.limits.head_timeout.duration();
            service.serve(stream, service.connection(), &watch::channel(false).1).await;
            assert!(begun.elapsed() >= limit);
            assert_eq!(service.app.served.load(Ordering::SeqCst), 0);
            assert_eq!(arrivals.counts.new.count(), 0);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_does_not_wait_for_ever_for_connections_that_stay() {
        let arrivals = Arrivals::default();
        let _stays = arrivals.counts.http2.admit(1);
        assert!(!arrivals.parted().await);
    }
}
