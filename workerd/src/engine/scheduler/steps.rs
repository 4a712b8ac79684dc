//! One step: a token of each decoding sequence, then prefill chunks, within the step's tokens and time.
//!
//! Decodes are never held back by time; a prefill gets at least a few tokens in every step, so that neither waits for
//! ever for the other. Nothing here needs new memory once the plan has been as large before.

use super::super::pace::Work;
use super::super::sequence::{Kind, Place};
use super::super::sequences::SeqId;
use super::super::step::{Input, SlotOpen, StepPlan, StepSeq};
use super::Scheduler;

/// A chunk that is cut for want of time has a multiple of so many tokens (kernels like that), and no fewer.
const GRANULE: u32 = 16;

/// What the loop must know of a planned step; its memory is used again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in super::super) struct PlannedStep {
    pub number: u64,
    /// Who takes part, in the plan's order.
    pub parts: Vec<Part>,
    /// Prompt tokens it computes (tokens of preempted sequences included).
    pub prompt_tokens: u64,
    /// Sequences that prompt tokens are computed of.
    pub prefills: u32,
    /// Sequences that lost their blocks to it.
    pub preempted: u32,
    pub work: Work,
}

/// One sequence's part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct Part {
    pub id: SeqId,
    /// Its positions below this are computed when the step is over.
    pub end: u32,
    /// Whether a token comes back.
    pub sample: bool,
}

impl PlannedStep {
    /// Whose samples come back, in order.
    pub(in super::super) fn samplers(&self) -> impl Iterator<Item = SeqId> {
        self.parts.iter().filter(|part| part.sample).map(|part| part.id)
    }

    fn begin(&mut self, number: u64) {
        self.parts.clear();
        *self = Self { number, parts: std::mem::take(&mut self.parts), ..Self::default() };
    }
}

impl Scheduler {
    /// Fills `plan` and `step` with the next step; false if nobody can take part.
    pub(in super::super) fn plan(&mut self, plan: &mut StepPlan, step: &mut PlannedStep) -> bool {
        plan.clear();
        step.begin(self.submitted + 1);
        let preemptions = self.preemptions;
        self.plan_decodes(plan, step);
        self.plan_chunks(plan, step);
        step.preempted = (self.preemptions - preemptions) as u32;
        if plan.seqs.is_empty() {
            return false;
        }
        self.submitted = step.number;
        true
    }

    fn plan_decodes(&mut self, plan: &mut StepPlan, step: &mut PlannedStep) {
        let mut at = 0;
        while let Some(id) = self.running.get(at) {
            if self.can_step(id, true) && self.make_room(id) {
                self.push(id, 1, plan, step);
            }
            // It may have been preempted to make room.
            at += usize::from(self.running.get(at) == Some(id));
        }
    }

    fn plan_chunks(&mut self, plan: &mut StepPlan, step: &mut PlannedStep) {
        let mut at = 0;
        while let Some(id) = self.running.get(at) {
            at += 1;
            if self.can_step(id, false) {
                match self.chunk(id, step) {
                    0 => break,
                    most => self.push(id, most, plan, step),
                }
            }
        }
    }

    /// Whether it has something to compute: its newest token, or (part of) its prompt.
    fn can_step(&self, id: SeqId, is_decode: bool) -> bool {
        self.sequences.get(id).is_some_and(|sequence| {
            sequence.last_step <= self.submitted
                && sequence.is_decoding() == is_decode
                && sequence.inputs() > 0
                && sequence.wants_sample(self.limits.max_len)
        })
    }

    /// Tokens its prefill may have in this step, which may have others already.
    fn chunk(&self, id: SeqId, step: &PlannedStep) -> u32 {
        let Some(sequence) = self.sequences.get(id) else { return 0 };
        let room = self.limits.max_batch_tokens - step.work.rows;
        let wanted = sequence.inputs().min(room);
        let Some(pace) = &self.pace else { return wanted };
        let fits = pace.chunk(step.work, sequence.computed, wanted, GRANULE);
        let least = if step.prefills == 0 { GRANULE } else { 0 };
        fits.max(least.min(wanted))
    }

    /// Whether the next token's position has a block, which may be taken from the youngest. Blocks of steps under way
    /// come back soon: then it sits this step out.
    fn make_room(&mut self, id: SeqId) -> bool {
        loop {
            let Some(sequence) = self.sequences.get_mut(id) else { return false };
            let covered = sequence.blocks.count() * self.limits.block_tokens;
            if sequence.len() <= covered || sequence.blocks.grow(1) {
                return true;
            }
            if !self.retired.is_empty() {
                return false;
            }
            match self.youngest() {
                Some(youngest) if youngest != id => self.preempt(youngest),
                _ => {
                    self.preempt(id);
                    return false;
                }
            }
        }
    }

    /// The youngest that has blocks to give.
    fn youngest(&self) -> Option<SeqId> {
        // A context pass whose token is on its way needs its blocks for the lease, and leaves at once.
        let holds = |id: &SeqId| {
            self.sequences.get(*id).is_some_and(|sequence| {
                let is_leaving = matches!(sequence.kind, Kind::Context(_)) && sequence.pending > 0;
                matches!(sequence.place, Place::Ready | Place::Running(_)) && !is_leaving
            })
        };
        let youngest_of = |list: &super::ByArrival| list.iter().rev().find(holds);
        youngest_of(&self.running).max(youngest_of(&self.queue))
    }

    /// Adds up to `most` inputs of a sequence to the plan.
    fn push(&mut self, id: SeqId, most: u32, plan: &mut StepPlan, step: &mut PlannedStep) {
        let Some(sequence) = self.sequences.get_mut(id) else { return };
        let Place::Running(slot) = sequence.place else { return };
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
        let end = start + sequence.inputs().min(most);
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
        sequence.pending += u32::from(sample);
        step.parts.push(Part { id, end, sample });
        step.prefills += u32::from(start < sequence.prefill_end);
        step.prompt_tokens += u64::from(end.min(sequence.prefill_end).saturating_sub(start));
        step.work.add(start, end - start);
    }
}
