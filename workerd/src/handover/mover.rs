//! The one thread that talks to a transport. It owns two agents: `serve`, whose address we hand out and whose
//! notifications end leases, and `move`, which posts our reads; so a long post never keeps a peer waiting.
//!
//! [`MoverHandle`] is the way in (it never blocks), a sink of [`MoverEvent`]s the way out. What a pull does when is
//! decided in [`pulls`], apart from threads and clocks. Of every accepted pull the sink hears `Pulled` or
//! `PullFailed` once, and `Settled` once if it failed unsettled, whatever happens to transports or to this thread.

mod octets;
mod peers;
mod pull;
mod pulls;
mod route;

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use baton_shared::id::{Incarnation, LeaseId};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use super::{MoverEvent, PeerAddress, PullId, PullJob, Transport, TransportError};
use crate::failpoint::{self, Point};
use crate::kv::region::Region;
pub use peers::PeersSeen;
use pulls::Pulls;

/// Makes a transport on the mover thread.
pub type OpenTransport = Box<dyn FnOnce() -> Result<Box<dyn Transport>, TransportError> + Send>;

/// Hears what happened; called on the mover thread, must not wait for it.
pub type Sink = Box<dyn Fn(MoverEvent) + Send>;

/// What the two agents register.
#[derive(Clone, Debug)]
pub struct MoverRegions {
    /// The KV pool: peers read it, our reads are written to it.
    pub pool: Region,
    /// The lease epochs: peers read them.
    pub epochs: Region,
}

/// Limits and patience.
#[derive(Clone, Copy, Debug)]
pub struct MoverSettings {
    /// Most bytes of one request.
    pub max_request: u64,
    /// Most requests in flight towards one peer.
    pub window: usize,
    /// Most pulls under way or waiting; more are handed back to the caller.
    pub max_pulls: usize,
    /// How long an abandoned pull's requests may go on before the `move` agent is rebuilt.
    pub settle_timeout: Duration,
    /// How long healthy requests may take to end before a rebuild ends them (they are posted again).
    pub rebuild_pause: Duration,
    /// How seldom notifications are looked for at most, when nothing has moved for a while.
    pub idle_poll: Duration,
    /// How long the agents may take to come up, and the thread to end.
    pub start_stop_timeout: Duration,
}

impl Default for MoverSettings {
    fn default() -> Self {
        Self {
            max_request: super::pull::MAX_DESCRIPTOR,
            window: 3,
            max_pulls: 1024,
            settle_timeout: Duration::from_secs(30),
            rebuild_pause: Duration::from_secs(1),
            idle_poll: Duration::from_millis(50),
            start_stop_timeout: Duration::from_secs(30),
        }
    }
}

/// Why there is no mover.
#[derive(Debug, thiserror::Error)]
pub enum MoverError {
    /// A transport did not come up.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// No thread or memory.
    #[error("cannot start the mover thread: {0}")]
    System(#[from] std::io::Error),
    /// The agents took too long.
    #[error("the hand-over transport did not come up within {0:?}")]
    Timeout(Duration),
}

enum Command {
    Pull(Box<PullJob>),
    Cancel(PullId),
    Stop,
}

/// What handle and thread share.
#[derive(Debug)]
struct Shared {
    /// Held while a pull is sent, so that none slips in behind the last look into the channel.
    accepting: Mutex<bool>,
    /// Pulls accepted and not ended yet, settling included.
    unfinished: AtomicUsize,
    rebuilds: AtomicU64,
    seen: Mutex<PeersSeen>,
    connected: Mutex<HashSet<Incarnation>>,
}

impl Shared {
    fn new() -> Self {
        Self {
            accepting: Mutex::new(true),
            unfinished: AtomicUsize::new(0),
            rebuilds: AtomicU64::new(0),
            seen: Mutex::new(PeersSeen::default()),
            connected: Mutex::new(HashSet::new()),
        }
    }
}

/// Neither lock guards anything that a panic could leave half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a mover counts, since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MoverFigures {
    /// How often the `move` agent was rebuilt because transfers did not end.
    pub rebuilds: u64,
    /// Peers by the way their bytes come.
    pub peers: PeersSeen,
}

/// The way to the mover thread. Cloning shares it; no call waits for the thread but [`Self::shutdown`].
#[derive(Clone, Debug)]
pub struct MoverHandle {
    commands: Sender<Command>,
    ended: Receiver<()>,
    shared: Arc<Shared>,
    settings: MoverSettings,
}

/// Starts movers.
#[derive(Debug)]
pub struct Mover;

impl Mover {
    /// Opens both transports on a new thread and registers memory; the address is the `serve` agent's.
    ///
    /// # Errors
    /// [`MoverError`]; nothing is left running, unless the transport itself never returned.
    pub fn start(
        serve: OpenTransport,
        move_: OpenTransport,
        regions: MoverRegions,
        sink: Sink,
        settings: MoverSettings,
    ) -> Result<(MoverHandle, PeerAddress), MoverError> {
        let (commands, inbox) = crossbeam_channel::unbounded();
        let (ready_to, ready) = crossbeam_channel::bounded(1);
        let (ended_to, ended) = crossbeam_channel::bounded(0);
        let shared = Arc::new(Shared::new());
        let theirs = shared.clone();
        let body = move || {
            // Dropped when the thread ends, however it ends: that is what `shutdown` waits for.
            let _ended_to = ended_to;
            match open(serve, move_, &regions, settings) {
                Err(error) => {
                    // A caller that stopped waiting has its own error.
                    ready_to.send(Err(error)).ok();
                }
                Ok((serve, pulls, address)) => {
                    if ready_to.send(Ok(address)).is_ok() {
                        Thread { pulls, serve, inbox, sink, shared: theirs, settings }.live();
                    }
                }
            }
        };
        std::thread::Builder::new().name("mover".to_owned()).spawn(body)?;
        match ready.recv_timeout(settings.start_stop_timeout) {
            Ok(Ok(address)) => Ok((MoverHandle { commands, ended, shared, settings }, address)),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(MoverError::Timeout(settings.start_stop_timeout)),
        }
    }
}

impl MoverHandle {
    /// Accepts a pull.
    ///
    /// # Errors
    /// The job itself, when [`MoverSettings::max_pulls`] are under way or the mover has ended.
    pub fn pull(&self, job: PullJob) -> Result<(), PullJob> {
        let accepting = lock(&self.shared.accepting);
        let unfinished = &self.shared.unfinished;
        if !*accepting || unfinished.load(Ordering::Relaxed) >= self.settings.max_pulls {
            return Err(job);
        }
        unfinished.fetch_add(1, Ordering::Relaxed);
        let sent = self.commands.send(Command::Pull(Box::new(job)));
        sent.expect("the thread closes the door before it drops its end");
        Ok(())
    }

    /// Ends a pull whose answer nobody wants: no notification, `PullFailed` with code `ClientGone`. One that has
    /// ended already is left as it is.
    pub fn cancel(&self, id: PullId) {
        // A mover that has ended has reported every pull.
        self.commands.send(Command::Cancel(id)).ok();
    }

    /// Whether every agent of this incarnation is connected: then its metadata need not be confirmed again.
    pub fn is_connected(&self, incarnation: &Incarnation) -> bool {
        lock(&self.shared.connected).contains(incarnation)
    }

    /// What is counted, for metrics.
    pub fn figures(&self) -> MoverFigures {
        MoverFigures {
            rebuilds: self.shared.rebuilds.load(Ordering::Relaxed),
            peers: self.peers_seen(),
        }
    }

    /// Peers by the way their bytes come, since the start: found out with a peer's second request.
    pub fn peers_seen(&self) -> PeersSeen {
        *lock(&self.shared.seen)
    }

    /// Pulls under way, those that are settling included.
    pub fn unfinished(&self) -> usize {
        self.shared.unfinished.load(Ordering::Relaxed)
    }

    /// Ends the thread and both agents; what was under way is reported as failed and settled. Waits at most
    /// [`MoverSettings::start_stop_timeout`]; false = it has not ended by then.
    pub fn shutdown(&self) -> bool {
        // One that has ended needs no telling.
        self.commands.send(Command::Stop).ok();
        let waited = self.ended.recv_timeout(self.settings.start_stop_timeout);
        matches!(waited, Err(RecvTimeoutError::Disconnected))
    }
}

type Opened = (Box<dyn Transport>, Pulls, PeerAddress);

/// Pool before address, and memory that outlives both agents.
fn open(
    serve: OpenTransport,
    move_: OpenTransport,
    regions: &MoverRegions,
    settings: MoverSettings,
) -> Result<Opened, MoverError> {
    // A transport looks for devices when it is opened, and at memory when that is registered: on this thread.
    regions.pool.make_current().map_err(|reason| TransportError::Broken {
        call: "making the pool's device current",
        reason,
    })?;
    let mut serve = serve()?;
    serve.register(&regions.pool)?;
    serve.register(&regions.epochs)?;
    let address = serve.address()?;
    let mut move_ = move_()?;
    move_.register(&regions.pool)?;
    Ok((serve, Pulls::new(move_, regions.pool.place(), settings)?, address))
}

/// State of the thread.
struct Thread {
    pulls: Pulls,
    serve: Box<dyn Transport>,
    inbox: Receiver<Command>,
    sink: Sink,
    shared: Arc<Shared>,
    settings: MoverSettings,
}

impl Thread {
    /// How often notifications are looked for while blocks move.
    const BUSY_POLL: Duration = Duration::from_millis(1);

    /// Runs until told to stop or until all handles are gone, then reports what is left.
    fn live(mut self) {
        let is_lost = catch_unwind(AssertUnwindSafe(|| self.run())).is_err();
        *lock(&self.shared.accepting) = false;
        let Self { pulls, serve, inbox, sink, shared, .. } = self;
        let waiting = inbox.try_iter().filter_map(|command| match command {
            Command::Pull(job) => Some(job.id),
            Command::Cancel(_) | Command::Stop => None,
        });
        let events = pulls.end(waiting);
        lock(&shared.connected).clear();
        drop(serve);
        deliver(&shared, &sink, events);
        if is_lost {
            sink(MoverEvent::Lost);
        }
    }

    fn run(&mut self) {
        let mut waits = Waits::new(Instant::now(), self.settings.idle_poll);
        let mut listened = None;
        let mut ear = Ear::default();
        loop {
            let now = Instant::now();
            let mut progress = false;
            if listened.is_none_or(|at| now.duration_since(at) >= Self::BUSY_POLL) {
                progress |= self.listen(&mut ear);
                listened = Some(now);
            }
            progress |= self.pulls.step(now);
            progress |= self.publish();
            let patience = waits.next(now, self.pulls.is_idle(), progress);
            let mut command = match self.inbox.recv_timeout(patience) {
                Ok(command) => Some(command),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            while let Some(next) = command.take() {
                if self.obey(next).is_break() {
                    return;
                }
                command = self.inbox.try_recv().ok();
            }
        }
    }

    fn obey(&mut self, command: Command) -> ControlFlow<()> {
        let now = Instant::now();
        match command {
            Command::Pull(job) => {
                failpoint::reach(Point::PullAccepted);
                self.pulls.accept(*job, now);
            }
            Command::Cancel(id) => self.pulls.cancel(id, now),
            Command::Stop => return ControlFlow::Break(()),
        }
        ControlFlow::Continue(())
    }

    /// Passes on leases that were read; whether there was any.
    fn listen(&mut self, ear: &mut Ear) -> bool {
        ear.messages.clear();
        let taken = self.serve.notifications(&mut ear.messages);
        match (&taken, ear.deaf) {
            (Err(error), false) => {
                tracing::error!(%error, "no notifications arrive, leases end by time only");
            }
            (Ok(()), true) => tracing::info!("notifications arrive again"),
            (Err(_), true) | (Ok(()), false) => {}
        }
        ear.deaf = taken.is_err();
        for lease in ear.messages.iter().filter_map(|(_, message)| read_notice(message)) {
            failpoint::reach(Point::LeaseRead);
            (self.sink)(MoverEvent::LeaseRead(lease));
        }
        !ear.messages.is_empty()
    }

    /// Hands events out and keeps the shared figures; whether there were any.
    fn publish(&mut self) -> bool {
        self.shared.rebuilds.store(self.pulls.rebuilds(), Ordering::Relaxed);
        *lock(&self.shared.seen) = self.pulls.peers_seen();
        if let Some(connected) = self.pulls.connected_if_changed() {
            *lock(&self.shared.connected) = connected;
        }
        let events = self.pulls.take_events();
        let any = !events.is_empty();
        deliver(&self.shared, &self.sink, events);
        any
    }
}

/// What listening keeps between two times.
#[derive(Default)]
struct Ear {
    messages: Vec<(String, Vec<u8>)>,
    deaf: bool,
}

fn deliver(shared: &Shared, sink: &Sink, events: Vec<MoverEvent>) {
    for event in events {
        let ended = match event {
            MoverEvent::Pulled { .. } | MoverEvent::Settled { .. } => true,
            MoverEvent::PullFailed { settled, .. } => settled,
            MoverEvent::LeaseRead(_) | MoverEvent::Lost => false,
        };
        if ended {
            shared.unfinished.fetch_sub(1, Ordering::Relaxed);
        }
        sink(event);
    }
}

/// How long to wait for a command between two polls. While blocks move: not at all for 30 us after something ended
/// (spinning longer takes the core from the side that copies), then 10 us, doubling to 200 us. Otherwise 1 ms after the
/// last notice, doubling to the setting: a lease that ends a little later harms nobody.
struct Waits {
    moved: Instant,
    busy: Duration,
    idle: Duration,
    longest: Duration,
}

impl Waits {
    const SPIN: Duration = Duration::from_micros(30);
    const BUSY: [Duration; 2] = [Duration::from_micros(10), Duration::from_micros(200)];
    const IDLE: Duration = Duration::from_millis(1);

    fn new(now: Instant, longest: Duration) -> Self {
        Self { moved: now, busy: Self::BUSY[0], idle: Self::IDLE.min(longest), longest }
    }

    fn next(&mut self, now: Instant, is_idle: bool, progress: bool) -> Duration {
        if progress {
            *self = Self::new(now, self.longest);
        }
        let (wait, last) = if is_idle {
            (&mut self.idle, self.longest)
        } else if now.duration_since(self.moved) < Self::SPIN {
            return Duration::ZERO;
        } else {
            (&mut self.busy, Self::BUSY[1])
        };
        std::mem::replace(wait, (*wait * 2).min(last))
    }
}

/// First byte of a notification.
const NOTICE_VERSION: u8 = 1;

/// What a reader sends when it has read a lease: a version and the lease's id.
fn write_notice(lease: LeaseId) -> [u8; 17] {
    let mut message = [NOTICE_VERSION; 17];
    message[1..].copy_from_slice(&lease.0);
    message
}

/// The lease of a notification; whatever else arrives is nobody's.
fn read_notice(message: &[u8]) -> Option<LeaseId> {
    let (&version, lease) = message.split_first()?;
    let lease = lease.try_into().ok().filter(|_| version == NOTICE_VERSION)?;
    Some(LeaseId(lease))
}

#[cfg(test)]
mod tests;
