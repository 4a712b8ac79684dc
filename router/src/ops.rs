//! Life of the process: signals, drain, and what a service manager hears of it.
//!
//! SIGTERM, SIGINT and SIGQUIT drain: the port is closed, what has reached it is served within `drain_timeout`, exit 0;
//! a later one ends at once. SIGHUP reads the configuration again. Pingora alone would sleep its whole grace period and then cut
//! every stream, so the drain ends the process itself.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use baton_shared::notify::Notifier;
use pingora_core::server::{ShutdownSignal, ShutdownSignalWatch, ShutdownWatch};
use pingora_core::services::background::BackgroundService;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Mutex;

use crate::builder::Shared;
use crate::table::reload::{Reloader, Source};

/// The process's signals, caught from the moment this is made.
pub struct Signals {
    ending: Mutex<Ending>,
    hang_up: Mutex<Signal>,
}

struct Ending {
    terminate: Signal,
    interrupt: Signal,
    quit: Signal,
}

impl Signals {
    /// Catches them; to be called before anything is started, so that an early SIGTERM is not lost.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn install() -> std::io::Result<Self> {
        // Only the installation needs this runtime: later any runtime's driver passes signals on.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let _inside = runtime.enter();
        let ending = Ending {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            quit: signal(SignalKind::quit())?,
        };
        let hang_up = signal(SignalKind::hangup())?;
        Ok(Self { ending: Mutex::new(ending), hang_up: Mutex::new(hang_up) })
    }
}

impl Signals {
    /// Waits for a signal that ends the process.
    async fn ending(&self) {
        let mut ending = self.ending.lock().await;
        let Ending { terminate, interrupt, quit } = &mut *ending;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = quit.recv() => {}
        }
    }

    /// Waits for SIGHUP; several at once are one.
    async fn hang_up(&self) {
        self.hang_up.lock().await.recv().await;
    }
}

/// [`Signals`] as Pingora asks for it, shared with [`Drain`].
pub struct SignalWatch(pub Arc<Signals>);

#[async_trait]
impl ShutdownSignalWatch for SignalWatch {
    async fn recv(&self) -> ShutdownSignal {
        self.0.ending().await;
        ShutdownSignal::GracefulTerminate
    }
}

/// Reads the configuration again at every SIGHUP.
pub struct HangUps {
    /// Reads it.
    pub reloader: Arc<Reloader>,
    /// Where SIGHUP comes from.
    pub signals: Arc<Signals>,
    /// Who started us.
    pub notifier: Arc<Notifier>,
}

#[async_trait]
impl BackgroundService for HangUps {
    async fn start(&self, _shutdown: ShutdownWatch) {
        loop {
            self.signals.hang_up().await;
            let now = baton_shared::os::monotonic_time().as_micros();
            self.notifier.say(&format!("RELOADING=1\nMONOTONIC_USEC={now}"));
            let reloader = Arc::clone(&self.reloader);
            let reload = tokio::task::spawn_blocking(move || reloader.reload(Source::Signal));
            // Told in the log too.
            let status = match reload.await {
                Ok(Ok(done)) => format!("serving, configuration version {}", done.version),
                Ok(Err(error)) => format!("serving, the last reload was refused: {error}"),
                Err(error) => format!("serving, the last reload failed: {error}"),
            };
            // A line each: what an error says has several.
            self.notifier.say(&format!("READY=1\nSTATUS={}", status.replace('\n', " ")));
        }
    }
}

/// Ends the process once nothing is in flight any more.
pub struct Drain {
    /// What is in flight.
    pub shared: Arc<Shared>,
    /// Where a second signal comes from.
    pub signals: Arc<Signals>,
    /// Who started us.
    pub notifier: Arc<Notifier>,
}

#[async_trait]
impl BackgroundService for Drain {
    async fn start(&self, mut shutdown: ShutdownWatch) {
        self.notifier.say("READY=1\nSTATUS=serving");
        // An error means that the server is gone, which is a shutdown too.
        drop(shutdown.wait_for(|begun| *begun).await);
        let limit = self.shared.table.snapshot().config.server.drain_timeout.0;
        let in_flight = self.shared.in_flight.count();
        self.notifier.say(&format!("STOPPING=1\nSTATUS=draining, {in_flight} requests in flight"));
        tracing::info!(in_flight, ?limit, "draining");
        let code = tokio::select! {
            () = self.drained(limit) => 0,
            () = self.second_signal() => {
                tracing::warn!("second signal, requests in flight are cut");
                1
            }
        };
        std::process::exit(code);
    }
}

/// Signals this close together are one wish: a terminal's Ctrl-C goes to a whole group, and its leader passes it on.
const ONE_WISH: Duration = Duration::from_millis(300);

impl Drain {
    async fn second_signal(&self) {
        let begun = Instant::now();
        loop {
            self.signals.ending().await;
            if begun.elapsed() > ONE_WISH {
                return;
            }
        }
    }

    async fn drained(&self, limit: Duration) {
        if tokio::time::timeout(limit, self.shared.drain()).await.is_err() {
            let in_flight = self.shared.in_flight.count();
            tracing::warn!(in_flight, "drain deadline passed, requests in flight are cut");
        }
    }
}
