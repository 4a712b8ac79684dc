//! Generation passes on their way in: blocks that are fetched, and what the mover says of them.
//!
//! Target blocks belong to the pull, not to the sequence, and stay with it until the mover said that nothing can be
//! written to them any more, whatever became of the sequence.

use std::collections::HashMap;
use std::time::Instant;

use baton_shared::kv::record::Record;
use baton_shared::wire::error::ErrorCode;

use super::Puller;
use super::output::OutputEvent;
use super::run::Engine;
use super::sequence::{SeqId, Source};
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
    /// Of all tokens known; those of the prompt are written.
    blocks: Blocks,
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
    /// Nobody waits for this sequence's pull any more; which that was.
    pub(super) fn abandon(&mut self, id: SeqId) -> Option<PullId> {
        let (pull, entry) = self.running.iter_mut().find(|(_, pull)| pull.sequence == Some(id))?;
        entry.sequence = None;
        Some(*pull)
    }

    fn next_id(&mut self) -> PullId {
        self.next += 1;
        PullId(self.next)
    }
}

impl Engine {
    /// Gives room to those who wait; false if nobody moved.
    pub(super) fn admit(&mut self, now: Instant) -> bool {
        let admission = self.scheduler.admit(now);
        let has_moved = !(admission.pulls.is_empty() && admission.overdue.is_empty());
        for id in admission.started {
            self.tell_start(id);
        }
        for (id, source) in admission.pulls {
            match source {
                Source::Local(record) => self.adopt(id, &record),
                Source::Remote(record) => self.pull(id, &record, now),
            }
        }
        for id in admission.overdue {
            let waited = self.config.queue_timeout;
            let message = format!("no room in the KV pool for {waited:?}");
            self.fail(id, ErrorCode::PoolExhausted, message);
        }
        has_moved
    }

    fn tell_start(&mut self, id: SeqId) {
        if let Some(sequence) = self.scheduler.get_mut(id) {
            sequence.output.push(OutputEvent::Started { cached_tokens: 0 });
        }
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
        self.arrive(id, blocks);
    }

    fn pull(&mut self, id: SeqId, record: &Record, now: Instant) {
        let mut blocks = self.scheduler.take_blocks(id);
        let Some(leased) = &record.lease else {
            return self.fail(id, ErrorCode::KvStateInvalid, "the record has no lease");
        };
        let written = record.prompt_tokens.div_ceil(self.kv.layout.block_tokens) as usize;
        let target = &blocks.ids()[..written.min(blocks.ids().len())];
        let ranks = match handover::pull::copy_runs(leased, &self.kv, 0, target) {
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
        blocks.become_state(BlockState::InFlight);
        if self.puller.pull(job).is_err() {
            return self.fail(id, ErrorCode::PoolExhausted, "too many pulls are under way");
        }
        self.pulls.running.insert(pull, Pull { sequence: Some(id), blocks });
    }

    /// What the mover says.
    pub(super) fn hear(&mut self, event: MoverEvent) {
        match event {
            MoverEvent::Pulled { id, bytes, descriptors, elapsed } => {
                self.totals.pulls += 1;
                self.totals.pulled_bytes += bytes;
                self.totals.pulled_descriptors += descriptors;
                self.totals.pulled_time += elapsed;
                let Some(Pull { sequence, mut blocks }) = self.pulls.running.remove(&id) else {
                    return;
                };
                blocks.become_state(BlockState::Used);
                failpoint::reach(Point::GenerationPulled);
                if let Some(id) = sequence {
                    self.arrive(id, blocks);
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

    fn fail_pull(&mut self, id: PullId, code: ErrorCode, message: String, is_settled: bool) {
        let Some(pull) = self.pulls.running.get_mut(&id) else { return };
        let sequence = pull.sequence.take();
        if is_settled {
            self.pulls.running.remove(&id);
        } else {
            pull.blocks.become_state(BlockState::Quarantined);
        }
        // What its client had left already did not fail for anybody.
        if let Some(id) = sequence {
            self.totals.count_failure(code);
            self.fail(id, code, message);
        }
    }

    /// The sequence's blocks are there: it may run.
    fn arrive(&mut self, id: SeqId, blocks: Blocks) {
        let Some(sequence) = self.scheduler.get_mut(id) else { return };
        sequence.output.push(OutputEvent::Started { cached_tokens: 0 });
        self.totals.prompt_pulled += u64::from(sequence.prompt_len);
        self.scheduler.ready(id, blocks);
    }
}
