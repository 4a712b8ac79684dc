//! The engine thread: takes commands, plans, submits, collects, tells; its start and its end.
//!
//! Whatever ends the thread (a drain, a failed device, a panic), the door is shut and everybody who waits is answered.

use std::any::Any;
use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use baton_shared::id::Incarnation;
use baton_shared::wire::error::ErrorCode;

use super::intake::LiveRequests;
use super::output::{OutputEvent, OutputSender};
use super::pace::Pace;
use super::publish::{Flight, Since};
use super::pulls::Pulls;
use super::scheduler::{Admission, Limits, PlannedStep, Scheduler};
use super::status::Totals;
use super::step::{StepOut, StepPlan};
use super::{Command, Door, EngineConfig, EngineEnd, Puller};
use crate::backend::{Backend, BackendError};
use crate::failpoint;
use crate::handover::PeerAddress;
use crate::kv::events::EventLog;
use crate::kv::lease::LeaseTable;
use crate::kv::pool::{BlockPool, OnLost};
use crate::kv::prefix::PrefixCache;
use crate::kv::region::{EpochPage, KvRegion};

/// An idle engine looks up this often.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// So does one whose requests wait for blocks.
const QUEUE_CHECK: Duration = Duration::from_millis(10);

/// What the engine owns or speaks through.
pub struct Parts {
    /// Computes; its pool is what the block ids mean.
    pub backend: Box<dyn Backend>,
    /// Registered with the transport that serves reads. One word for each block is always enough.
    pub epochs: EpochPage,
    /// How readers reach the pool and the epoch page.
    pub serve: PeerAddress,
    /// This start of the process.
    pub incarnation: Incarnation,
    /// Fetches blocks.
    pub puller: Box<dyn Puller>,
}

/// An engine that has a handle but no thread yet.
pub struct EngineSeat {
    closing: Closing,
    config: EngineConfig,
}

impl EngineSeat {
    pub(super) fn new(door: Arc<Door>, config: EngineConfig) -> Self {
        let end = EngineEnd::Failed("the engine was never started".to_owned());
        Self { closing: Closing { door, end }, config }
    }

    /// Starts the thread.
    ///
    /// # Errors
    /// What the system says if there is no thread to be had.
    pub fn start(self, parts: Parts) -> io::Result<()> {
        let Self { mut closing, config } = self;
        let body = move || {
            let mut engine = Engine::new(Arc::clone(&closing.door), config, parts);
            let outcome = catch_unwind(AssertUnwindSafe(|| engine.run()));
            closing.end = match outcome {
                Ok(Ok(())) => EngineEnd::Drained,
                Ok(Err(error)) => EngineEnd::Failed(error.to_string()),
                Err(panic) => EngineEnd::Failed(format!("panic: {}", panic_text(&*panic))),
            };
            engine.answer_all();
            drop(closing);
        };
        std::thread::Builder::new().name("engine".to_owned()).spawn(body).map(drop)
    }
}

/// Shuts the door when it is dropped, and says why.
struct Closing {
    door: Arc<Door>,
    end: EngineEnd,
}

impl Drop for Closing {
    fn drop(&mut self) {
        self.door.is_draining.store(true, Ordering::Release);
        for command in self.door.inbox.shut() {
            if let Command::Submit(submission, _) = command {
                tell_failure(
                    &submission.output,
                    ErrorCode::Unavailable,
                    "the engine takes no new requests",
                );
            }
        }
        if let EngineEnd::Failed(reason) = &self.end {
            tracing::error!(reason, "engine ended");
        }
        self.door.board.write(Instant::now(), |status| status.is_alive = false);
        self.door.end.send_replace(Some(self.end.clone()));
    }
}

/// Everything the thread owns.
pub(super) struct Engine {
    pub door: Arc<Door>,
    pub config: EngineConfig,
    pub backend: Box<dyn Backend>,
    pub kv: KvRegion,
    pub serve: PeerAddress,
    pub incarnation: Incarnation,
    pub puller: Box<dyn Puller>,
    pub scheduler: Scheduler,
    pub leases: LeaseTable,
    pub live: LiveRequests,
    pub pulls: Pulls,
    pub flights: VecDeque<Flight>,
    pub totals: Totals,
    pub since: Since,
    pub plan: StepPlan,
    pub out: StepOut,
    /// Memory that is used again.
    pub admission: Admission,
    /// Memory that is used again.
    pub spare_steps: Vec<PlannedStep>,
    pub is_draining: bool,
    pub is_mover_lost: bool,
}

/// Why the loop cannot go on.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error("the thread that moves blocks met a bug")]
    Mover,
}

impl Engine {
    fn new(door: Arc<Door>, config: EngineConfig, parts: Parts) -> Self {
        let Parts { backend, epochs, serve, incarnation, puller } = parts;
        let kv = backend.pool().clone();
        let limits = limits(&config, &*backend, epochs.slots());
        let pool = BlockPool::with_cache(kv.layout.blocks, prefix_cache(&door, &config, &kv));
        if failpoint::is_enabled() {
            pool.on_lost(overwrite(&kv));
        }
        let pace = config.pace.map(|pace| Pace::new(pace.target, pace.row));
        Self {
            scheduler: Scheduler::new(limits, pool, pace),
            leases: LeaseTable::new(epochs),
            live: LiveRequests::default(),
            pulls: Pulls::default(),
            flights: VecDeque::new(),
            totals: Totals::default(),
            since: Since::default(),
            plan: StepPlan::default(),
            out: StepOut::default(),
            admission: Admission::default(),
            spare_steps: Vec::new(),
            is_draining: false,
            is_mover_lost: false,
            door,
            config,
            backend,
            kv,
            serve,
            incarnation,
            puller,
        }
    }

    fn run(&mut self) -> Result<(), Failure> {
        let mut commands = Vec::new();
        let mut patience = Duration::ZERO;
        loop {
            self.door.inbox.take(&mut commands, patience);
            commands.drain(..).for_each(|command| self.obey(command));
            if self.is_mover_lost {
                return Err(Failure::Mover);
            }
            let has_worked = self.turn(Instant::now())?;
            if self.is_over() {
                return Ok(());
            }
            patience = if has_worked { Duration::ZERO } else { self.patience(Instant::now()) };
        }
    }

    /// One step forward; false if there was nothing to do.
    fn turn(&mut self, now: Instant) -> Result<bool, BackendError> {
        self.leases.expire(now);
        let has_admitted = self.admit(now);
        self.show();
        let has_submitted = self.submit()?;
        let is_deep = self.flights.len() > self.backend.caps().lag as usize;
        let must_collect = is_deep || (!has_submitted && !self.flights.is_empty());
        if must_collect {
            self.collect()?;
        }
        Ok(has_admitted || has_submitted || must_collect)
    }

    fn is_over(&self) -> bool {
        self.is_draining
            && self.scheduler.sequences().is_empty()
            && self.flights.is_empty()
            && self.leases.count() == 0
    }

    /// How long nothing will happen by itself.
    fn patience(&self, now: Instant) -> Duration {
        let expiry = self.leases.next_expiry().map(|at| at.saturating_duration_since(now));
        let queue = self.scheduler.has_queue().then_some(QUEUE_CHECK);
        HEARTBEAT.min(expiry.unwrap_or(HEARTBEAT)).min(queue.unwrap_or(HEARTBEAT))
    }

    fn show(&mut self) {
        self.totals.preemptions = self.scheduler.preemptions;
        self.totals.leases_ended = self.leases.ends();
        self.door.board.write(Instant::now(), |status| {
            status.is_alive = true;
            status.running = self.scheduler.running();
            status.pulling = self.scheduler.pulling();
            status.leases = self.leases.count();
            status.tombstones = self.leases.tombstones();
            status.blocks = self.scheduler.pool.counts();
            status.cache = self.scheduler.pool.cache_counts();
            status.totals.clone_from(&self.totals);
        });
    }

    /// Tells everybody that the engine failed; nobody is left after a drain.
    fn answer_all(&mut self) {
        for (_, sequence) in self.scheduler.sequences().iter() {
            let message = "the engine failed and gave the request up";
            tell_failure(&sequence.output, ErrorCode::Internal, message);
        }
    }
}

/// The prefix cache that the configuration wants, and the events of it.
fn prefix_cache(door: &Door, config: &EngineConfig, kv: &KvRegion) -> Option<PrefixCache> {
    let (blocks, block_tokens) = (kv.layout.blocks, kv.layout.block_tokens);
    if !config.prefix_cache {
        return None;
    }
    let events = (config.event_buffer > 0)
        .then(|| EventLog::new(config.event_buffer, block_tokens, config.event_hash));
    if let Some(events) = &events {
        door.events.get_or_init(|| events.clone());
    }
    Some(PrefixCache::new(blocks, block_tokens, rand::random(), events))
}

/// Fills blocks that lost their content with what is no number: whoever reads one too late cannot mistake it for the
/// real thing. (Free blocks of the prefix cache keep theirs until they are used for something else.)
fn overwrite(kv: &KvRegion) -> OnLost {
    let bytes = usize::try_from(kv.layout.block_bytes()).expect("a block fits into memory");
    let (region, nothing) = (kv.region.clone(), vec![0xff; bytes]);
    Box::new(move |block| {
        if let Err(error) = region.write(block.0 as usize * bytes, &nothing) {
            tracing::error!(block = block.0, %error, "a block that lost its content keeps it");
        }
    })
}

/// Ends an output by an error.
pub(super) fn tell_failure(output: &OutputSender, code: ErrorCode, message: impl Into<String>) {
    output.push(OutputEvent::Failed { code, message: message.into() });
}

fn limits(config: &EngineConfig, backend: &dyn Backend, epoch_slots: usize) -> Limits {
    let caps = backend.caps();
    let layout = &backend.pool().layout;
    let capacity = layout.blocks.saturating_mul(layout.block_tokens);
    let max_batch_tokens = config.max_batch_tokens.min(caps.max_batch_tokens).max(1);
    let leasable = (f64::from(layout.blocks) * config.max_leased_fraction) as u32;
    Limits {
        // Each decode takes a token of the step, and a prefill must get one too.
        max_sequences: config.max_sequences.min(caps.max_sequences).min(max_batch_tokens).max(1),
        max_batch_tokens,
        max_len: config.max_len.min(capacity),
        block_tokens: layout.block_tokens,
        max_leased_blocks: leasable.min(u32::try_from(epoch_slots).unwrap_or(u32::MAX)),
        watermark: (layout.blocks / 100).max(1),
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("not a text")
}
