//! Who runs in the next step: admission, chunks, preemption. No I/O, no clock: time is an argument.
//!
//! Oldest first in everything. A step takes one token of each decoding sequence, then prefill chunks ([`steps`]). A
//! request is admitted when all its known tokens fit, less those whose blocks the prefix cache has ([`admission`]); a
//! decode that finds no block takes those of the youngest, which is computed again later. Nobody overtakes a request
//! that waits for blocks, except that context requests held back by the lease bound hold back only their like: else two
//! workers that read from each other could wait for each other.
//! Blocks of a sequence that left stay held until every submitted step that touches them was collected; full ones can be
//! found by others once the step that computed them was.

pub(super) mod admission;
pub(super) mod steps;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use baton_shared::id::BlockIndex;

use super::pace::Pace;
use super::sequence::{Kind, Place, Sequence};
use super::sequences::{ByArrival, SeqId, Sequences};
use super::step::Slot;
use crate::kv::pool::{BlockPool, BlockState, Blocks};

pub(super) use admission::Admission;
pub(super) use steps::PlannedStep;

/// What bounds the scheduler.
#[derive(Clone, Debug)]
pub(super) struct Limits {
    pub max_sequences: u32,
    pub max_batch_tokens: u32,
    /// Longest sequence that the model, the configuration and the empty pool allow.
    pub max_len: u32,
    pub block_tokens: u32,
    pub max_leased_blocks: u32,
    /// Blocks left free by an admission while sequences that grow run, for them to grow into.
    pub watermark: u32,
}

/// All sequences and blocks of one instance.
#[derive(Debug)]
pub(super) struct Scheduler {
    pub limits: Limits,
    pub pool: BlockPool,
    /// Sizes prefill chunks by time; `None` = by tokens alone.
    pub pace: Option<Pace>,
    pub preemptions: u64,
    /// Full blocks of prompts that were looked for in the prefix cache and not found.
    pub missed_blocks: u64,
    sequences: Sequences,
    /// Waiting and ready ones.
    queue: ByArrival,
    running: ByArrival,
    free_slots: Vec<Slot>,
    /// Of sequences that left, until the step is collected.
    retired: VecDeque<(u64, Blocks)>,
    submitted: u64,
    collected: u64,
    /// Memory for one look into the prefix cache.
    found: Vec<BlockIndex>,
}

impl Scheduler {
    pub(super) fn new(limits: Limits, pool: BlockPool, pace: Option<Pace>) -> Self {
        Self {
            free_slots: (0..limits.max_sequences).rev().map(Slot).collect(),
            limits,
            pool,
            pace,
            preemptions: 0,
            missed_blocks: 0,
            sequences: Sequences::default(),
            queue: ByArrival::default(),
            running: ByArrival::default(),
            retired: VecDeque::new(),
            submitted: 0,
            collected: 0,
            found: Vec::new(),
        }
    }

    /// Puts a sequence at the end of the queue.
    pub(super) fn enqueue(&mut self, mut sequence: Sequence) -> SeqId {
        let known = sequence.tokens.len();
        let longest = sequence.longest(self.limits.max_len) as usize;
        sequence.tokens.reserve_exact(longest.saturating_sub(known));
        let id = self.sequences.add(sequence);
        self.queue.insert(id);
        id
    }

    pub(super) fn get_mut(&mut self, id: SeqId) -> Option<&mut Sequence> {
        self.sequences.get_mut(id)
    }

    pub(super) fn sequences(&self) -> &Sequences {
        &self.sequences
    }

    pub(super) fn running(&self) -> usize {
        self.running.len()
    }

    /// Sequences whose blocks are on their way or wait for a slot.
    pub(super) fn pulling(&self) -> usize {
        let is_pulling = |place| matches!(place, Place::Pulling | Place::Ready);
        self.sequences.iter().filter(|(_, sequence)| is_pulling(sequence.place)).count()
    }

    /// Whether somebody waits for room.
    pub(super) fn has_queue(&self) -> bool {
        !self.queue.is_empty()
    }

    /// A sequence's blocks, now the caller's. No step under way may touch them.
    pub(super) fn take_blocks(&mut self, id: SeqId) -> Blocks {
        let none = self.pool.none();
        match self.sequences.get_mut(id) {
            Some(sequence) => std::mem::replace(&mut sequence.blocks, none),
            None => none,
        }
    }

    /// Takes a sequence out, wherever it is. What blocks it still has are retired.
    pub(super) fn remove(&mut self, id: SeqId) -> Option<Sequence> {
        let mut sequence = self.sequences.remove(id)?;
        self.queue.remove(id);
        self.running.remove(id);
        if let Place::Running(slot) = sequence.place {
            self.free_slots.push(slot);
        }
        let blocks = std::mem::replace(&mut sequence.blocks, self.pool.none());
        self.retire(blocks, sequence.last_step);
        Some(sequence)
    }

    /// A sequence whose prompt's blocks have arrived and are good: it runs as soon as there is a slot, and others may
    /// find them.
    pub(super) fn ready(&mut self, id: SeqId, mut blocks: Blocks) {
        let Some(sequence) = self.sequences.get_mut(id) else { return };
        blocks.become_state(BlockState::Used);
        blocks.reserve(sequence.longest(self.limits.max_len).div_ceil(self.limits.block_tokens));
        blocks.cache(&mut sequence.chain, &sequence.tokens[..sequence.prompt_len as usize]);
        sequence.blocks = blocks;
        sequence.computed = sequence.prompt_len;
        sequence.place = Place::Ready;
        self.queue.insert(id);
    }

    /// A step was collected: what left before it is free, what it filled can be found.
    pub(super) fn collected(&mut self, step: &PlannedStep) {
        self.collected = step.number;
        for part in &step.parts {
            // One that was preempted meanwhile has other blocks by now.
            if let Some(sequence) = self.sequences.get_mut(part.id)
                && sequence.first_step <= step.number
            {
                let computed = &sequence.tokens[..part.end as usize];
                sequence.blocks.cache(&mut sequence.chain, computed);
            }
        }
        while self.retired.pop_front_if(|(last_step, _)| *last_step <= step.number).is_some() {}
    }

    /// Takes slot and blocks away; what was computed will be computed again, or found.
    fn preempt(&mut self, id: SeqId) {
        let Some(sequence) = self.sequences.get_mut(id) else { return };
        if let Place::Running(slot) = sequence.place {
            self.free_slots.push(slot);
        }
        sequence.place = Place::Waiting;
        sequence.prefill_end = sequence.prefill_end.max(sequence.computed);
        sequence.computed = 0;
        sequence.chain.restart();
        let blocks = std::mem::replace(&mut sequence.blocks, self.pool.none());
        let last_step = sequence.last_step;
        self.retire(blocks, last_step);
        self.running.remove(id);
        self.queue.insert(id);
        self.preemptions += 1;
    }

    fn retire(&mut self, blocks: Blocks, last_step: u64) {
        if last_step > self.collected && blocks.count() > 0 {
            self.retired.push_back((last_step, blocks));
        }
    }

    /// Moves one that has blocks from the queue to those who run; false if there is no slot.
    fn run(&mut self, id: SeqId) -> bool {
        let Some(sequence) = self.sequences.get_mut(id) else { return false };
        let Some(slot) = self.free_slots.pop() else { return false };
        sequence.place = Place::Running(slot);
        sequence.is_open = false;
        sequence.first_step = self.submitted + 1;
        self.queue.remove(id);
        self.running.insert(id);
        true
    }

    /// Whether a running sequence may want more blocks.
    fn has_growing(&self) -> bool {
        let mut running = self.running.iter().filter_map(|id| self.sequences.get(id));
        running.any(|sequence| !matches!(sequence.kind, Kind::Context(_)))
    }
}
