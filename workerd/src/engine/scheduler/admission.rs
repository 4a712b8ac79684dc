//! Who leaves the queue: slots and blocks for those who wait, oldest first.
//!
//! Blocks the prefix cache has are taken as they are, so that only the rest is computed or pulled. The last token of a
//! prompt is always computed (its logits give the next one), and so is the block it is in.

use std::time::Instant;

use super::super::sequence::{Kind, Place, Sequence, Source};
use super::super::sequences::SeqId;
use super::Scheduler;
use crate::kv::pool::{BlockState, Blocks};

/// Who left the queue; its memory is used again.
#[derive(Debug, Default)]
pub(in super::super) struct Admission {
    /// Run from now on, for the first time, without a pull; with the tokens found in the prefix cache.
    pub started: Vec<(SeqId, u32)>,
    /// Have target blocks and wait for their content.
    pub pulls: Vec<(SeqId, Source)>,
    /// Waited too long for blocks; still in the queue.
    pub overdue: Vec<SeqId>,
}

/// What an earlier one in the queue waits for, so that later ones wait too.
#[derive(Debug, Default)]
struct Held {
    by_pool: bool,
    /// Context passes only.
    by_leases: bool,
}

/// What became of one in the queue.
enum Turn {
    In,
    Waits,
    WaitsForBlocks,
}

impl Admission {
    fn clear(&mut self) {
        let Self { started, pulls, overdue } = self;
        started.clear();
        pulls.clear();
        overdue.clear();
    }
}

impl Scheduler {
    /// Gives slots and blocks to those who wait, oldest first; who got them is in `admission`.
    pub(in super::super) fn admit(&mut self, now: Instant, admission: &mut Admission) {
        admission.clear();
        let mut held = Held::default();
        let mut at = 0;
        while let Some(id) = self.queue.get(at) {
            match self.take_turn(id, &mut held, admission) {
                Turn::In => {}
                Turn::Waits => at += 1,
                Turn::WaitsForBlocks => {
                    at += 1;
                    let sequence = self.sequences.get(id);
                    let deadline = sequence.and_then(|sequence| sequence.deadline);
                    let is_overdue = deadline.is_some_and(|deadline| deadline <= now);
                    admission.overdue.extend(is_overdue.then_some(id));
                }
            }
        }
    }

    fn take_turn(&mut self, id: SeqId, held: &mut Held, admission: &mut Admission) -> Turn {
        let Some(sequence) = self.sequences.get(id) else { return Turn::Waits };
        if sequence.place == Place::Ready {
            return if self.run(id) { Turn::In } else { Turn::Waits };
        }
        let is_context = matches!(sequence.kind, Kind::Context(_));
        if held.by_pool || (is_context && held.by_leases) {
            return Turn::WaitsForBlocks;
        }
        // A preempted sequence goes first again, but not before its last sample was read back.
        if sequence.pending > 0 {
            held.by_pool = true;
            return Turn::Waits;
        }
        // Those who wait for a slot hold back no pull.
        if sequence.source.is_none() && self.free_slots.is_empty() {
            return Turn::Waits;
        }
        self.look_up(id);
        if is_context && self.exceeds_lease_bound(id) {
            held.by_leases = true;
            return Turn::WaitsForBlocks;
        }
        match self.claim(id) {
            Some(blocks) => {
                self.start(id, blocks, admission);
                Turn::In
            }
            None => {
                held.by_pool = true;
                Turn::WaitsForBlocks
            }
        }
    }

    /// Looks for a sequence's blocks in the prefix cache, into `found`.
    fn look_up(&mut self, id: SeqId) {
        self.found.clear();
        let Some(sequence) = self.sequences.get_mut(id) else { return };
        let most = sequence.reusable_blocks(self.limits.block_tokens);
        sequence.chain.restart();
        self.pool.find(&mut sequence.chain, &sequence.tokens, most, &mut self.found);
    }

    /// Whether leases would hold more than they may, once this context pass and those before it are over.
    fn exceeds_lease_bound(&self, id: SeqId) -> bool {
        let Some(sequence) = self.sequences.get(id) else { return true };
        let new = self.missing_blocks(sequence) + self.pool.unpledged(&self.found);
        self.pool.pledged() + new > self.limits.max_leased_blocks
    }

    /// Blocks it must get that were not found.
    fn missing_blocks(&self, sequence: &Sequence) -> u32 {
        sequence.admission_blocks(self.limits.block_tokens) - self.found.len() as u32
    }

    /// What was found and what is missing.
    fn claim(&self, id: SeqId) -> Option<Blocks> {
        let sequence = self.sequences.get(id)?;
        let is_context = matches!(sequence.kind, Kind::Context(_));
        let (missing, grows) = (self.missing_blocks(sequence), !is_context || self.has_growing());
        let has_room = self.running.is_empty() || missing == 0 || !grows;
        let spare = if has_room { 0 } else { self.limits.watermark };
        let state = if is_context { BlockState::Pledged } else { BlockState::Used };
        let capacity = sequence.longest(self.limits.max_len).div_ceil(self.limits.block_tokens);
        self.pool.claim(&self.found, missing, spare, state, capacity)
    }

    fn start(&mut self, id: SeqId, blocks: Blocks, admission: &mut Admission) {
        let Some(sequence) = self.sequences.get_mut(id) else { return };
        let block_tokens = self.limits.block_tokens;
        let found = self.found.len() as u32;
        self.missed_blocks += u64::from(sequence.reusable_blocks(block_tokens) - found);
        sequence.blocks = blocks;
        sequence.found = found;
        sequence.deadline = None;
        let is_first = sequence.queued.take().is_some();
        match sequence.source.take() {
            None => {
                sequence.computed = found * block_tokens;
                self.run(id);
                admission.started.extend(is_first.then_some((id, found * block_tokens)));
            }
            Some(source) => {
                sequence.place = Place::Pulling;
                self.queue.remove(id);
                admission.pulls.push((id, source));
            }
        }
    }
}
