//! The scheduler without a back end, for benches: sequences that generate for ever, and ones that come and go.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use baton_shared::id::Incarnation;

use super::output::{OutputReceiver, channel};
use super::sampling::SamplingParams;
use super::scheduler::{Admission, Limits, PlannedStep, Scheduler};
use super::sequence::Sequence;
use super::sequences::SeqId;
use super::step::StepPlan;
use super::{Phase, QueuePlace, StopRule, Submission};
use crate::kv::pool::BlockPool;
use crate::kv::prefix::PrefixCache;

const BLOCK_TOKENS: u32 = 32;

/// A scheduler with its pool, and what its loop would hold.
pub struct Rehearsal {
    scheduler: Scheduler,
    plan: StepPlan,
    step: PlannedStep,
    admission: Admission,
    now: Instant,
    prompt: Vec<u32>,
    /// Nobody reads them, but a closed one would be a client that left.
    receivers: Vec<OutputReceiver>,
    newest: Option<SeqId>,
}

impl Rehearsal {
    /// `sequences` with prompts of `prompt` equal tokens, all computed; room for each to grow to `longest` tokens.
    pub fn new(sequences: u32, prompt: u32, longest: u32) -> Self {
        let blocks = (sequences + 1) * (longest.div_ceil(BLOCK_TOKENS) + 1);
        let limits = Limits {
            max_sequences: sequences + 1,
            max_batch_tokens: 2048.max(sequences + 1),
            max_len: longest,
            block_tokens: BLOCK_TOKENS,
            max_leased_blocks: blocks,
            watermark: 1,
        };
        let cache = PrefixCache::new(blocks, BLOCK_TOKENS, 1, None);
        let pool = BlockPool::with_cache(blocks, Some(cache));
        let mut rehearsal = Self {
            scheduler: Scheduler::new(limits, pool, None),
            plan: StepPlan::default(),
            step: PlannedStep::default(),
            admission: Admission::default(),
            now: Instant::now(),
            prompt: (0..prompt).collect(),
            receivers: Vec::new(),
            newest: None,
        };
        for _ in 0..sequences {
            rehearsal.enter();
            rehearsal.step();
        }
        rehearsal
    }

    /// One turn of the loop: whoever waits is admitted, a step is planned and its tokens are told. Sequences in it.
    pub fn step(&mut self) -> usize {
        self.scheduler.admit(self.now, &mut self.admission);
        if !self.scheduler.plan(&mut self.plan, &mut self.step) {
            return 0;
        }
        self.scheduler.collected(&self.step);
        for id in self.step.samplers() {
            if let Some(sequence) = self.scheduler.get_mut(id) {
                sequence.pending -= 1;
                sequence.tokens.push(7);
            }
        }
        self.plan.seqs.len()
    }

    /// The newest sequence leaves and one with the same prompt enters, to be admitted with the next step.
    pub fn turn_over(&mut self) {
        if let Some(newest) = self.newest.take() {
            self.scheduler.remove(newest);
            self.receivers.pop();
        }
        self.enter();
    }

    fn enter(&mut self) {
        let (output, receiver) = channel(1);
        let submission = Submission {
            prompt: self.prompt.clone(),
            salt: None,
            sampling: SamplingParams::greedy(),
            stop: StopRule { max_tokens: u32::MAX, stop_ids: Vec::new() },
            phase: Phase::Whole,
            output,
        };
        let place = QueuePlace(Arc::new(AtomicUsize::new(1)));
        let none = self.scheduler.pool.none();
        let own = Incarnation([0; 16]);
        let sequence = Sequence::new(submission, place, none, own, self.now, Duration::ZERO);
        self.newest = Some(self.scheduler.enqueue(sequence));
        self.receivers.push(receiver);
    }
}

impl std::fmt::Debug for Rehearsal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rehearsal").field("running", &self.scheduler.running()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sequence_takes_part_in_every_step_until_it_is_as_long_as_it_may_be() {
        let mut rehearsal = Rehearsal::new(5, 70, 80);
        assert_eq!(rehearsal.step(), 5);
        rehearsal.turn_over();
        assert_eq!(rehearsal.step(), 5);
        let turns = (0..100).take_while(|_| rehearsal.step() > 0).count();
        assert_eq!(turns, 9, "the one that came last has nine to go");
    }
}
