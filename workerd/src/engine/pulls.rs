//! Generation passes on their way in: blocks that are fetched, and what the mover says of them.
//!
//! Target blocks belong to the pull, not to the sequence, and stay with it until the mover said that nothing can be
//! written to them any more, whatever became of the sequence. What the prefix cache has of a prompt is not fetched.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use baton_shared::kv::record::Record;
use baton_shared::wire::error::ErrorCode;

use super::Puller;
use super::output::OutputEvent;
use super::run::Engine;
use super::sequence::Source;
use super::sequences::SeqId;
use crate::failpoint::{self, Point};
use crate::handover::mover::MoverHandle;
use crate::handover::{self, MoverEvent, PullId, PullJob};
use crate::kv::lease::LeaseEnd;
use crate::kv::pool::{BlockState, Blocks};

/// Pulls whose target blocks may still be written.
#[derive(Debug, Default)]
pub(super) struct Pulls {
    running: HashMap<PullId, Pull>,
    next: u64,
}

#[derive(Debug)]
struct Pull {
    /// Who waits; nobody if it was cancelled or answered.
    sequence: Option<SeqId>,
    /// The beginning of the prompt, which the prefix cache had.
    found: Blocks,
    /// Of all other tokens known; those of the prompt are written.
    target: Blocks,
}

impl Puller for MoverHandle {
    fn pull(&mut self, job: PullJob) -> Result<(), PullJob> {
        MoverHandle::pull(self, job)
    }

    fn cancel(&mut self, id: PullId) {
        MoverHandle::cancel(self, id);
    }
}

impl Pulls {
    /// Nobody waits for this sequence's pull any more; which that was, and what of it is free of it.
    pub(super) fn abandon(&mut self, id: SeqId) -> Option<(PullId, Blocks)> {
        let (pull, entry) = self.running.iter_mut().find(|(_, pull)| pull.sequence == Some(id))?;
        entry.sequence = None;
        let found = entry.found.split_off(0);
        Some((*pull, found))
    }

    fn next_id(&mut self) -> PullId {
        self.next += 1;
        PullId(self.next)
    }
}

impl Engine {
    /// Gives room to those who wait; false if nobody moved.
    pub(super) fn admit(&mut self, now: Instant) -> bool {
        let mut admission = std::mem::take(&mut self.admission);
        self.scheduler.admit(now, &mut admission);
        let has_moved = !(admission.pulls.is_empty() && admission.overdue.is_empty());
        for (id, cached_tokens) in admission.started.drain(..) {
            let waited = self.count_admission(id, now);
            self.totals.prompt_prefix += u64::from(cached_tokens);
            self.tell(id, OutputEvent::Started { cached_tokens, waited });
        }
        for (id, source) in admission.pulls.drain(..) {
            self.count_admission(id, now);
            match source {
                Source::Local(record) => self.adopt(id, &record),
                Source::Remote(record) => self.pull(id, &record, now),
            }
        }
        for id in admission.overdue.drain(..) {
            let waited = self.config.queue_timeout;
            let message = format!("no room in the KV pool for {waited:?}");
            self.fail(id, ErrorCode::PoolExhausted, message);
        }
        self.admission = admission;
        has_moved
    }

    /// How long it has waited.
    fn count_admission(&mut self, id: SeqId, now: Instant) -> Duration {
        let Some(sequence) = self.scheduler.get_mut(id) else { return Duration::ZERO };
        sequence.waited = now.saturating_duration_since(sequence.arrived);
        self.since.admitted += 1;
        self.since.waited += sequence.waited;
        sequence.waited
    }

    /// Moves the blocks of our own lease into the sequence: once, like any reader.
    fn adopt(&mut self, id: SeqId, record: &Record) {
        let leased = record.lease.as_ref().map(|leased| leased.lease);
        let lease = leased.filter(|lease| self.leases.blocks(record.request, *lease).is_some());
        let blocks = lease.and_then(|lease| self.leases.take(lease, LeaseEnd::Pulled));
        let Some(mut blocks) = blocks else {
            return self.fail(id, ErrorCode::KvLeaseGone, "the blocks are leased no longer");
        };
        let more = self.scheduler.take_blocks(id);
        blocks.append(more);
        self.arrive(id, blocks, 0);
    }

    /// Fetches what the prefix cache does not have. Even if it has all, the lease is read, so that it ends.
    fn pull(&mut self, id: SeqId, record: &Record, now: Instant) {
        let mut found = self.scheduler.take_blocks(id);
        let Some(leased) = &record.lease else {
            return self.fail(id, ErrorCode::KvStateInvalid, "the record has no lease");
        };
        let skip = self.scheduler.get_mut(id).map_or(0, |sequence| sequence.found);
        let mut target = found.split_off(skip);
        let written = record.prompt_tokens.div_ceil(self.kv.layout.block_tokens) - skip;
        let written = &target.ids()[..target.ids().len().min(written as usize)];
        let ranks = match handover::pull::copy_runs(leased, &self.kv, skip as usize, written) {
            Ok(ranks) => ranks,
            Err(error) => {
                return self.fail(id, ErrorCode::KvIncompatible, error.to_string());
            }
        };
        let job = PullJob {
            id: self.pulls.next_id(),
            worker: record.worker.clone(),
            incarnation: record.incarnation,
            lease: leased.lease,
            ranks,
            deadline: now + self.config.pull_timeout,
        };
        let pull = job.id;
        target.become_state(BlockState::InFlight);
        if self.puller.pull(job).is_err() {
            return self.fail(id, ErrorCode::PoolExhausted, "too many pulls are under way");
        }
        self.pulls.running.insert(pull, Pull { sequence: Some(id), found, target });
    }

    /// What the mover says.
    pub(super) fn hear(&mut self, event: MoverEvent) {
        match event {
            MoverEvent::Pulled { id, bytes, descriptors, elapsed } => {
                self.totals.pulls += 1;
                self.totals.pulled_bytes += bytes;
                self.totals.pulled_descriptors += descriptors;
                self.totals.pulled_time += elapsed;
                let Some(Pull { sequence, found: mut blocks, target }) =
                    self.pulls.running.remove(&id)
                else {
                    return;
                };
                let found = blocks.count();
                blocks.append(target);
                failpoint::reach(Point::GenerationPulled);
                if let Some(id) = sequence {
                    self.log(id, || {
                        tracing::debug!(bytes, descriptors, ?elapsed, "blocks fetched")
                    });
                    self.arrive(id, blocks, found);
                }
            }
            MoverEvent::PullFailed { id, code, message, settled } => {
                self.fail_pull(id, code, message, settled);
            }
            MoverEvent::Settled { id } => drop(self.pulls.running.remove(&id)),
            MoverEvent::LeaseRead(lease) => {
                self.leases.end(lease, LeaseEnd::Pulled);
            }
            MoverEvent::Lost => self.is_mover_lost = true,
        }
    }

    /// Says something of a request, in its name.
    fn log(&mut self, id: SeqId, line: impl FnOnce()) {
        if let Some(sequence) = self.scheduler.get_mut(id) {
            sequence.output.span().in_scope(line);
        }
    }

    fn fail_pull(&mut self, id: PullId, code: ErrorCode, message: String, is_settled: bool) {
        let Some(pull) = self.pulls.running.get_mut(&id) else { return };
        let sequence = pull.sequence.take();
        if is_settled {
            self.pulls.running.remove(&id);
        } else {
            drop(pull.found.split_off(0));
            pull.target.become_state(BlockState::Quarantined);
        }
        // What its client had left already did not fail for anybody.
        if let Some(id) = sequence {
            self.totals.count_failure(code);
            self.log(id, || tracing::warn!(code = code.code(), why = message, "hand-over failed"));
            self.fail(id, code, message);
        }
    }

    /// The sequence's blocks are there, the first `found` from the prefix cache: it may run. No step before this one
    /// was given them, so that a device needs no waiting for the transport: whatever reads them is submitted later.
    fn arrive(&mut self, id: SeqId, blocks: Blocks, found: u32) {
        let Some(sequence) = self.scheduler.get_mut(id) else { return };
        let cached_tokens = found * self.kv.layout.block_tokens;
        let waited = sequence.waited;
        sequence.output.push(OutputEvent::Started { cached_tokens, waited });
        self.totals.prompt_prefix += u64::from(cached_tokens);
        self.totals.prompt_pulled += u64::from(sequence.prompt_len - cached_tokens);
        self.scheduler.ready(id, blocks);
    }
}
