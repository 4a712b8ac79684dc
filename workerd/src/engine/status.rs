//! What others may know of a running engine: one snapshot, written by its thread once a step.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use baton_shared::wire::error::ErrorCode;

use crate::kv::lease::LeaseEnds;
use crate::kv::pool::{BlockCounts, CacheCounts};

/// Gauges and counters since start, as of the last step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EngineStatus {
    /// Whether the thread runs. False before its start and after its end.
    pub is_alive: bool,
    /// Whether new requests are refused for good.
    pub is_draining: bool,
    /// Since the thread last showed itself; it does so at least once a second while it is alive and not in a step.
    pub heartbeat_age: Duration,
    /// Requests with a slot.
    pub running: usize,
    /// Requests that wait for blocks or a slot, on their way to the thread included.
    pub waiting: usize,
    /// Requests whose blocks are being fetched, or were fetched and wait for a slot.
    pub pulling: usize,
    /// Leases held for a reader.
    pub leases: usize,
    /// Released requests that are remembered.
    pub tombstones: usize,
    /// Blocks by state.
    pub blocks: BlockCounts,
    /// The prefix cache.
    pub cache: CacheCounts,
    /// Events of the prefix cache that were dropped because nobody took them.
    pub events_dropped: u64,
    /// Counters.
    pub totals: Totals,
}

/// Counters since start.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Totals {
    /// Steps submitted.
    pub steps: u64,
    /// Prompt tokens computed here; tokens of a preempted sequence again.
    pub prompt_computed: u64,
    /// Prompt tokens found in the prefix cache.
    pub prompt_prefix: u64,
    /// Prompt tokens whose blocks came from a context worker (or a lease of our own).
    pub prompt_pulled: u64,
    /// Tokens sent to requests.
    pub generated: u64,
    /// Sequences whose blocks were taken away, to be computed again.
    pub preemptions: u64,
    /// Pulls that succeeded, local ones not counted.
    pub pulls: u64,
    /// Bytes moved by them.
    pub pulled_bytes: u64,
    /// Descriptors posted by them.
    pub pulled_descriptors: u64,
    /// Time of them, from job to end.
    pub pulled_time: Duration,
    /// Failed pulls by code, in order of first appearance.
    pub pull_failures: Vec<(ErrorCode, u64)>,
    /// Leases that were read, released (by call or by their request), and that expired.
    pub leases_ended: LeaseEnds,
}

impl Totals {
    /// Counts one failed pull.
    pub(super) fn count_failure(&mut self, code: ErrorCode) {
        match self.pull_failures.iter_mut().find(|(known, _)| *known == code) {
            Some((_, count)) => *count += 1,
            None => self.pull_failures.push((code, 1)),
        }
    }
}

/// Where the snapshot lies.
#[derive(Debug)]
pub(super) struct StatusBoard {
    snapshot: Mutex<(EngineStatus, Instant)>,
}

impl StatusBoard {
    pub(super) fn new() -> Self {
        Self { snapshot: Mutex::new((EngineStatus::default(), Instant::now())) }
    }

    /// Changes the snapshot; the heartbeat with it.
    pub(super) fn write(&self, now: Instant, change: impl FnOnce(&mut EngineStatus)) {
        let mut snapshot = self.lock();
        snapshot.1 = now;
        change(&mut snapshot.0);
    }

    pub(super) fn read(&self) -> EngineStatus {
        let snapshot = self.lock();
        EngineStatus { heartbeat_age: snapshot.1.elapsed(), ..snapshot.0.clone() }
    }

    fn lock(&self) -> MutexGuard<'_, (EngineStatus, Instant)> {
        self.snapshot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
