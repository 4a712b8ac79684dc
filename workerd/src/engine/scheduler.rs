//! Who runs in the next step: admission, chunks, preemption. No I/O, no clock: time is an argument.
//!
//! Oldest first in everything. A step takes one token of each decoding sequence, then prefill chunks. A request is
//! admitted when all its known tokens fit; a decode that finds no block takes those of the youngest, which is computed
//! again later. Nobody overtakes a request that waits for blocks, except that context requests held back by the lease
//! bound hold back only their like: else two workers that read from each other could wait for each other.
//! Blocks of a sequence that left stay held until every submitted step that touches them was collected.

use std::collections::{BTreeSet, VecDeque};
use std::time::Instant;

use super::sequence::{Kind, Place, SeqId, Sequence, Sequences, Source};
use super::step::{Input, Slot, SlotOpen, StepPlan, StepSeq};
use crate::kv::pool::{BlockPool, Blocks};

/// What bounds the scheduler.
#[derive(Clone, Debug)]
pub(super) struct Limits {
    pub max_sequences: u32,
    pub max_batch_tokens: u32,
    /// Longest sequence that the model, the configuration and the empty pool allow.
    pub max_len: u32,
    pub block_tokens: u32,
    pub max_leased_blocks: u32,
    /// Blocks left free by an admission while others run, for them to grow into.
    pub watermark: u32,
}

/// Who left the queue.
#[derive(Debug, Default)]
pub(super) struct Admission {
    /// Run from now on, for the first time, without a pull.
    pub started: Vec<SeqId>,
    /// Have target blocks and wait for their content.
    pub pulls: Vec<(SeqId, Source)>,
    /// Waited too long for blocks; still in the queue.
    pub overdue: Vec<SeqId>,
}

/// What the loop must know of a planned step.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct PlannedStep {
    pub number: u64,
    /// Whose samples come back, in order.
    pub samplers: Vec<SeqId>,
    /// Prompt tokens it computes (tokens of preempted sequences included).
    pub prompt_tokens: u64,
}

/// All sequences and blocks of one instance.
#[derive(Debug)]
pub(super) struct Scheduler {
    pub limits: Limits,
    pub pool: BlockPool,
    pub preemptions: u64,
    sequences: Sequences,
    /// Waiting and ready ones.
    queue: BTreeSet<SeqId>,
    running: BTreeSet<SeqId>,
    free_slots: Vec<Slot>,
    /// Of sequences that left, until the step is collected.
    retired: VecDeque<(u64, Blocks)>,
    submitted: u64,
    collected: u64,
    next_id: u64,
}

impl Scheduler {
    pub(super) fn new(limits: Limits, pool: BlockPool) -> Self {
        Self {
            free_slots: (0..limits.max_sequences).rev().map(Slot).collect(),
            limits,
            pool,
            preemptions: 0,
            sequences: Sequences::new(),
            queue: BTreeSet::new(),
            running: BTreeSet::new(),
            retired: VecDeque::new(),
            submitted: 0,
            collected: 0,
            next_id: 0,
        }
    }

    /// Puts a sequence at the end of the queue.
    pub(super) fn enqueue(&mut self, sequence: Sequence) -> SeqId {
        let id = SeqId(self.next_id);
        self.next_id += 1;
        self.sequences.insert(id, sequence);
        self.queue.insert(id);
        id
    }

    pub(super) fn get_mut(&mut self, id: SeqId) -> Option<&mut Sequence> {
        self.sequences.get_mut(&id)
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
        self.sequences.values().filter(|sequence| is_pulling(sequence.place)).count()
    }

    /// Whether somebody waits for room.
    pub(super) fn has_queue(&self) -> bool {
        !self.queue.is_empty()
    }

    /// A sequence's blocks, now the caller's. No step under way may touch them.
    pub(super) fn take_blocks(&mut self, id: SeqId) -> Blocks {
        let none = self.pool.none();
        self.sequences.get_mut(&id).map_or_else(
            || self.pool.none(),
            |sequence| std::mem::replace(&mut sequence.blocks, none),
        )
    }

    /// Takes a sequence out, wherever it is. What blocks it still has are retired.
    pub(super) fn remove(&mut self, id: SeqId) -> Option<Sequence> {
        let mut sequence = self.sequences.remove(&id)?;
        self.queue.remove(&id);
        self.running.remove(&id);
        if let Place::Running(slot) = sequence.place {
            self.free_slots.push(slot);
        }
        let blocks = std::mem::replace(&mut sequence.blocks, self.pool.none());
        self.retire(blocks, sequence.last_step);
        Some(sequence)
    }

    /// A sequence whose blocks have arrived: it runs as soon as there is a slot.
    pub(super) fn ready(&mut self, id: SeqId, blocks: Blocks) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        sequence.blocks = blocks;
        sequence.computed = sequence.prompt_len;
        sequence.place = Place::Ready;
        self.queue.insert(id);
    }

    /// Gives slots and blocks to those who wait, oldest first.
    pub(super) fn admit(&mut self, now: Instant) -> Admission {
        let mut admission = Admission::default();
        let mut reserved = self.reserved_for_leases();
        let mut is_lease_bound = false;
        let mut is_pool_bound = false;
        let queue: Vec<SeqId> = self.queue.iter().copied().collect();
        for id in queue {
            let sequence = &self.sequences[&id];
            let need = sequence.admission_blocks(self.limits.block_tokens);
            let is_context = matches!(sequence.kind, Kind::Context(_));
            let is_overdue = sequence.deadline.is_some_and(|deadline| deadline <= now);
            if sequence.place == Place::Ready {
                self.run(id);
                continue;
            }
            is_lease_bound |= is_context && reserved + need > self.limits.max_leased_blocks;
            if is_pool_bound || (is_context && is_lease_bound) {
                admission.overdue.extend(is_overdue.then_some(id));
                continue;
            }
            // A preempted sequence goes first again, but not before its last sample was read back.
            is_pool_bound |= sequence.pending > 0;
            let needs_slot = sequence.source.is_none();
            if is_pool_bound || (needs_slot && self.free_slots.is_empty()) {
                continue;
            }
            if let Some(blocks) = self.allocate(need) {
                reserved += if is_context { need } else { 0 };
                self.start(id, blocks, &mut admission);
            } else {
                is_pool_bound = true;
                admission.overdue.extend(is_overdue.then_some(id));
            }
        }
        admission
    }

    fn start(&mut self, id: SeqId, blocks: Blocks, admission: &mut Admission) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        sequence.blocks = blocks;
        sequence.deadline = None;
        let is_first = sequence.queued.take().is_some();
        match sequence.source.take() {
            None => {
                self.run(id);
                admission.started.extend(is_first.then_some(id));
            }
            Some(source) => {
                sequence.place = Place::Pulling;
                self.queue.remove(&id);
                admission.pulls.push((id, source));
            }
        }
    }

    fn run(&mut self, id: SeqId) {
        let Some(slot) = self.free_slots.pop() else { return };
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        sequence.place = Place::Running(slot);
        sequence.is_open = false;
        self.queue.remove(&id);
        self.running.insert(id);
    }

    /// Blocks that leases hold, and that running context passes will hand to leases.
    fn reserved_for_leases(&self) -> u32 {
        let running = self.running.iter().filter_map(|id| self.sequences.get(id));
        let contexts = running.filter(|sequence| matches!(sequence.kind, Kind::Context(_)));
        self.pool.counts().leased + contexts.map(|sequence| sequence.blocks.count()).sum::<u32>()
    }

    fn allocate(&self, need: u32) -> Option<Blocks> {
        let is_idle = self.running.is_empty();
        let spare = if is_idle || need == 0 { 0 } else { self.limits.watermark };
        if self.pool.free() < need.saturating_add(spare) {
            return None;
        }
        self.pool.allocate(need)
    }

    /// Fills `plan` with the next step; `None` if nobody can take part.
    pub(super) fn plan(&mut self, plan: &mut StepPlan) -> Option<PlannedStep> {
        plan.clear();
        let number = self.submitted + 1;
        let mut step = PlannedStep { number, samplers: Vec::new(), prompt_tokens: 0 };
        let mut budget = self.limits.max_batch_tokens;
        let running: Vec<SeqId> = self.running.iter().copied().collect();
        for is_decode in [true, false] {
            for id in &running {
                if budget > 0 && self.can_step(*id, is_decode) && self.make_room(*id) {
                    budget -= self.push(*id, budget, plan, &mut step);
                }
            }
        }
        if plan.seqs.is_empty() {
            return None;
        }
        self.submitted = number;
        Some(step)
    }

    /// Whether it runs (it may have been preempted since the plan was begun) and has something to compute.
    fn can_step(&self, id: SeqId, is_decode: bool) -> bool {
        let sequence = &self.sequences[&id];
        self.running.contains(&id)
            && sequence.last_step <= self.submitted
            && sequence.is_decoding() == is_decode
            && sequence.inputs() > 0
            && sequence.wants_sample(self.limits.max_len)
    }

    /// Whether the next token's position has a block, which may be taken from the youngest. Blocks of steps under way
    /// come back soon: then it sits this step out.
    fn make_room(&mut self, id: SeqId) -> bool {
        loop {
            let Some(sequence) = self.sequences.get_mut(&id) else { return false };
            let covered = sequence.blocks.count() * self.limits.block_tokens;
            if sequence.len() <= covered || sequence.blocks.grow(1) {
                return true;
            }
            if !self.retired.is_empty() {
                return false;
            }
            // A context pass whose token is on its way needs its blocks for the lease, and leaves at once.
            let holds = |other: &&SeqId| {
                let other = &self.sequences[*other];
                let is_leaving = matches!(other.kind, Kind::Context(_)) && other.pending > 0;
                matches!(other.place, Place::Ready | Place::Running(_)) && !is_leaving
            };
            let youngest = self.running.iter().chain(&self.queue).filter(holds).max().copied();
            match youngest {
                Some(youngest) if youngest != id => self.preempt(youngest),
                _ => {
                    self.preempt(id);
                    return false;
                }
            }
        }
    }

    /// Takes slot and blocks away; what was computed will be computed again.
    fn preempt(&mut self, id: SeqId) {
        let Some(sequence) = self.sequences.get_mut(&id) else { return };
        if let Place::Running(slot) = sequence.place {
            self.free_slots.push(slot);
        }
        sequence.place = Place::Waiting;
        sequence.prefill_end = sequence.prefill_end.max(sequence.computed);
        sequence.computed = 0;
        let blocks = std::mem::replace(&mut sequence.blocks, self.pool.none());
        let last_step = sequence.last_step;
        self.retire(blocks, last_step);
        self.running.remove(&id);
        self.queue.insert(id);
        self.preemptions += 1;
    }

    /// Adds up to `budget` inputs of a sequence to the plan; how many.
    fn push(&mut self, id: SeqId, budget: u32, plan: &mut StepPlan, step: &mut PlannedStep) -> u32 {
        let Some(sequence) = self.sequences.get_mut(&id) else { return 0 };
        let Place::Running(slot) = sequence.place else { return 0 };
        if !sequence.is_open {
            sequence.is_open = true;
            plan.opens.push(SlotOpen {
                slot,
                sampling: sequence.sampling.clone(),
                history: sequence.tokens.clone(),
                prompt_len: sequence.prompt_len,
            });
        }
        let start = sequence.computed;
        let count = sequence.inputs().min(budget);
        let end = start + count;
        let input = if sequence.pending > 0 {
            Input::Last
        } else {
            let from = plan.tokens.len() as u32;
            plan.tokens.extend_from_slice(&sequence.tokens[start as usize..end as usize]);
            Input::Tokens(from..plan.tokens.len() as u32)
        };
        let sample = end == sequence.len();
        let table_from = plan.tables.len() as u32;
        let covering = end.div_ceil(self.limits.block_tokens) as usize;
        plan.tables.extend_from_slice(&sequence.blocks.ids()[..covering]);
        let table = table_from..plan.tables.len() as u32;
        plan.seqs.push(StepSeq { slot, start, input, table, sample });
        sequence.computed = end;
        sequence.last_step = step.number;
        if sample {
            sequence.pending += 1;
            step.samplers.push(id);
        }
        step.prompt_tokens += u64::from(end.min(sequence.prefill_end).saturating_sub(start));
        count
    }

    /// A step was collected: what left before it is free.
    pub(super) fn collected(&mut self, number: u64) {
        self.collected = number;
        self.retired.retain(|(last_step, _)| *last_step > number);
    }

    fn retire(&mut self, blocks: Blocks, last_step: u64) {
        if last_step > self.collected && blocks.count() > 0 {
            self.retired.push_back((last_step, blocks));
        }
    }
}

#[cfg(test)]
mod tests;
