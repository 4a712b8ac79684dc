//! The engine: the only way in is [`EngineHandle`]; one thread an instance owns scheduler, block tables and back end.

mod inbox;
mod intake;
pub mod iterations;
pub mod output;
mod pace;
pub(crate) mod philox;
mod publish;
mod pulls;
pub mod rehearsal;
mod run;
pub mod sampling;
mod scheduler;
mod sequence;
mod sequences;
mod softmax;
pub mod status;
pub mod step;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use baton_shared::id::{DisaggRequestId, LeaseId};
use baton_shared::kv::block_hash::{CacheSalt, EventHashAlgorithm};
use baton_shared::kv::record::Record;
use baton_shared::wire::error::ErrorCode;
use tokio::sync::watch;

use crate::handover::{MoverEvent, PullId, PullJob};
use crate::kv::events::{EventLog, KvEvent};
use inbox::Inbox;
use iterations::{Iteration, IterationLog};
use output::{OnClose, OutputSender};
use sampling::SamplingParams;
use status::{EngineStatus, StatusBoard};

pub use run::{EngineSeat, Parts};

/// One request, as the engine sees it: tokens in, tokens out. Text is the caller's business.
#[derive(Debug)]
pub struct Submission {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// Only requests of the same salt share blocks of the prefix cache.
    pub salt: Option<CacheSalt>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// When the engine ends the sequence by itself.
    pub stop: StopRule,
    /// Which part of the request is done here.
    pub phase: Phase,
    /// Where tokens go. Dropping its receiver cancels the request.
    pub output: OutputSender,
}

/// Ends that need no text. (Stop strings are matched by the receiver, which then drops its end.)
#[derive(Clone, Debug)]
pub struct StopRule {
    /// Generated tokens at most, first token of a context pass included. At least 1.
    pub max_tokens: u32,
    /// Tokens that end the text: the model's EOS ids (none with `ignore_eos`) and `stop_token_ids`.
    pub stop_ids: Vec<u32>,
}

/// Which part of a request runs here.
#[derive(Debug)]
pub enum Phase {
    /// All of it.
    Whole,
    /// Prefill and one token; the blocks stay leased for a reader under this id.
    Context(DisaggRequestId),
    /// Blocks come from a context worker, then decode. `first` are the tokens it sampled (at least one); the
    /// receiver already has them, the engine sends what follows. The record was checked and has a lease.
    Generation {
        /// The id both phases share.
        request: DisaggRequestId,
        /// Tokens already generated.
        first: Vec<u32>,
        /// Where the blocks are.
        record: Box<Record>,
    },
}

/// What the engine may use and how long it waits.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Requests that may wait; more are refused.
    pub max_queue: usize,
    /// Sequences in one step at most; the back end may allow fewer.
    pub max_sequences: u32,
    /// Input tokens of one step at most; the back end may allow fewer.
    pub max_batch_tokens: u32,
    /// Longest sequence, prompt and output together; the pool may allow less.
    pub max_len: u32,
    /// Share of the pool that leases may hold, in `(0, 1]`.
    pub max_leased_fraction: f64,
    /// How long blocks are kept for their reader.
    pub lease_timeout: Duration,
    /// How long one pull may take.
    pub pull_timeout: Duration,
    /// How long a request may wait for blocks before it is answered `pool_exhausted`.
    pub queue_timeout: Duration,
    /// Whether free blocks keep what they hold and are found by it.
    pub prefix_cache: bool,
    /// Events of the prefix cache that are kept for whoever asks; 0 = none.
    pub event_buffer: usize,
    /// How these name blocks.
    pub event_hash: EventHashAlgorithm,
    /// Sizes prefill chunks by time, within `max_batch_tokens`; `None` = by that alone.
    pub pace: Option<StepPace>,
}

/// How long a step should take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepPace {
    /// One with a prefill.
    pub target: Duration,
    /// A guess, to begin with, of what one token of a prompt takes.
    pub row: Duration,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_queue: 1024,
            max_sequences: 64,
            max_batch_tokens: 8192,
            max_len: u32::MAX,
            max_leased_fraction: 0.5,
            lease_timeout: Duration::from_secs(60),
            pull_timeout: Duration::from_secs(10),
            queue_timeout: Duration::from_secs(5),
            prefix_cache: true,
            event_buffer: 0,
            event_hash: EventHashAlgorithm::default(),
            pace: None,
        }
    }
}

/// Why a request did not get into the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// Too many wait.
    #[error("{limit} requests are waiting already")]
    QueueFull {
        /// `max_queue`.
        limit: usize,
    },
    /// It is stopping, or has ended.
    #[error("the engine takes no new requests")]
    Unavailable,
}

impl SubmitError {
    /// What the client is told.
    pub fn code(self) -> ErrorCode {
        match self {
            Self::QueueFull { .. } => ErrorCode::QueueFull,
            Self::Unavailable => ErrorCode::Unavailable,
        }
    }
}

/// How the engine thread ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineEnd {
    /// After a drain: nothing runs, nothing is leased.
    Drained,
    /// A panic or a failed device; everything in flight was answered. The process should end with code 1.
    Failed(String),
}

/// Fetches blocks; the mover thread, seen from the engine. Neither call may block.
pub trait Puller: Send {
    /// Takes a job, whose end comes back as a [`MoverEvent`]; gives it back if there is no room or no mover.
    fn pull(&mut self, job: PullJob) -> Result<(), PullJob>;
    /// Nobody wants this pull any more: it may end early, without telling the lease's owner. Its end is still reported.
    fn cancel(&mut self, id: PullId);
}

/// The only way in. Cloning shares the engine; it goes on without any handle.
#[derive(Clone, Debug)]
pub struct EngineHandle {
    door: Arc<Door>,
}

/// What handles and thread share.
#[derive(Debug)]
struct Door {
    inbox: Inbox,
    board: StatusBoard,
    queued: Arc<AtomicUsize>,
    max_queue: usize,
    is_draining: AtomicBool,
    /// Set when the thread starts, if there are any.
    events: OnceLock<EventLog>,
    iterations: IterationLog,
    end: watch::Sender<Option<EngineEnd>>,
}

impl Door {
    fn waiting(&self) -> u32 {
        u32::try_from(self.queued.load(Ordering::Acquire)).unwrap_or(u32::MAX)
    }
}

/// A place among the waiting requests, given back on drop.
#[derive(Debug)]
struct QueuePlace(Arc<AtomicUsize>);

/// What the engine thread is told.
#[derive(Debug)]
enum Command {
    /// A new request.
    Submit(Box<Submission>, QueuePlace),
    /// A receiver was dropped: look for closed outputs now rather than at the next step.
    Sweep,
    /// Ends whatever has this id and leaves a tombstone.
    Release(DisaggRequestId),
    /// A lease that will not be read.
    EndLease(LeaseId),
    /// News from the mover thread.
    Mover(MoverEvent),
    /// Refuse new requests, finish running ones, keep leases until read or expired, then end the thread.
    Drain,
}

/// A handle, and the seat that starts the thread once the parts are there (the mover needs the handle's
/// [`EngineHandle::mover_sink`], the engine needs the mover). Requests submitted meanwhile wait.
pub fn engine(config: EngineConfig) -> (EngineHandle, EngineSeat) {
    let door = Arc::new(Door {
        inbox: Inbox::default(),
        board: StatusBoard::new(),
        queued: Arc::new(AtomicUsize::new(0)),
        max_queue: config.max_queue,
        is_draining: AtomicBool::new(false),
        events: OnceLock::new(),
        iterations: IterationLog::default(),
        end: watch::Sender::new(None),
    });
    (EngineHandle { door: Arc::clone(&door) }, EngineSeat::new(door, config))
}

impl EngineHandle {
    /// Queues a request. Everything after this, good or bad, comes through its output.
    ///
    /// # Errors
    /// [`SubmitError`]; the output then says nothing of use.
    pub fn submit(&self, submission: Submission) -> Result<(), SubmitError> {
        if self.door.is_draining.load(Ordering::Acquire) {
            return Err(SubmitError::Unavailable);
        }
        let limit = self.door.max_queue;
        let place =
            QueuePlace::take(&self.door.queued, limit).ok_or(SubmitError::QueueFull { limit })?;
        submission.output.on_close(self.on_close());
        let command = Command::Submit(Box::new(submission), place);
        self.door.inbox.send(command).map_err(|_| SubmitError::Unavailable)
    }

    /// `POST /v1/disagg/release`: ends whatever has this id (queued, computing or leased) and leaves a tombstone.
    pub fn release(&self, request: DisaggRequestId) {
        self.tell(Command::Release(request));
    }

    /// Ends a lease that will not be read: its answer could not be written, or a stop string ended the text.
    pub fn end_lease(&self, lease: LeaseId) {
        self.tell(Command::EndLease(lease));
    }

    /// Refuses new requests from now on, finishes running ones, keeps leases until read or expired, then ends.
    pub fn drain(&self) {
        self.door.is_draining.store(true, Ordering::Release);
        self.tell(Command::Drain);
    }

    /// Where the mover reports to.
    pub fn mover_sink(&self) -> Box<dyn Fn(MoverEvent) + Send> {
        let handle = self.clone();
        Box::new(move |event| handle.tell(Command::Mover(event)))
    }

    /// Gauges and counters, as of the last step.
    pub fn status(&self) -> EngineStatus {
        EngineStatus {
            is_draining: self.door.is_draining.load(Ordering::Acquire),
            waiting: self.door.queued.load(Ordering::Acquire),
            events_dropped: self.door.events.get().map_or(0, EventLog::dropped),
            ..self.door.board.read()
        }
    }

    /// What entered and left the prefix cache since the last call; each event is given out once.
    pub fn take_events(&self) -> Vec<KvEvent> {
        self.door.events.get().map(EventLog::take).unwrap_or_default()
    }

    /// Tells `listener` of every step that was collected, on the engine's thread. The first call counts.
    pub fn on_step(&self, listener: impl Fn(&Iteration) + Send + Sync + 'static) {
        self.door.iterations.listen(Box::new(listener));
    }

    /// What the last steps did; each is given out once.
    pub fn take_iterations(&self) -> Vec<Iteration> {
        self.door.iterations.take()
    }

    /// Waits for the thread's end.
    pub async fn ended(&self) -> EngineEnd {
        let mut end = self.door.end.subscribe();
        let end = end.wait_for(Option::is_some).await.map(|end| end.clone());
        end.ok().flatten().unwrap_or(EngineEnd::Drained)
    }

    /// What a dropped receiver runs.
    fn on_close(&self) -> OnClose {
        let door = Arc::downgrade(&self.door);
        Arc::new(move |leases| {
            let Some(door) = door.upgrade() else { return };
            let handle = Self { door };
            leases.iter().for_each(|lease| handle.end_lease(*lease));
            handle.tell(Command::Sweep);
        })
    }

    /// After the engine's end there is nothing left to be told of.
    fn tell(&self, command: Command) {
        if let Err(command) = self.door.inbox.send(command) {
            tracing::debug!(?command, "the engine has ended");
        }
    }
}

impl QueuePlace {
    fn take(queued: &Arc<AtomicUsize>, limit: usize) -> Option<Self> {
        let more = |waiting| (waiting < limit).then_some(waiting + 1);
        queued.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).ok()?;
        Some(Self(Arc::clone(queued)))
    }
}

impl Drop for QueuePlace {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}
