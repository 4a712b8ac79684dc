mod prefix;

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use baton_shared::id::{DisaggRequestId, Incarnation};
use baton_shared::kv::block_hash::CacheSalt;

use super::super::output;
use super::super::sampling::SamplingParams;
use super::super::step::{Input, StepPlan};
use super::super::{Phase, QueuePlace, StopRule, Submission};
use super::*;
use crate::kv::prefix::PrefixCache;

const LIMITS: Limits = Limits {
    max_sequences: 4,
    max_batch_tokens: 8,
    max_len: 1_000,
    block_tokens: 4,
    max_leased_blocks: 10,
    watermark: 2,
};

/// `(start, inputs, sampled)` of one sequence in a step.
type Part = (u32, u32, bool);

struct Bench {
    scheduler: Scheduler,
    plan: StepPlan,
    admission: Admission,
    now: Instant,
    /// Begins each prompt, so that none is like another.
    next_token: u32,
}

impl Bench {
    fn new(limits: Limits, blocks: u32) -> Self {
        let cache = PrefixCache::new(blocks, limits.block_tokens, 1, None);
        let pool = BlockPool::with_cache(blocks, Some(cache));
        Self {
            scheduler: Scheduler::new(limits, pool, None),
            plan: StepPlan::default(),
            admission: Admission::default(),
            now: Instant::now(),
            next_token: 0,
        }
    }

    fn add(&mut self, prompt_len: u32, max_tokens: u32, phase: Phase) -> SeqId {
        self.next_token += 1_000;
        let prompt = (self.next_token..).take(prompt_len as usize).collect();
        self.ask(prompt, None, max_tokens, phase)
    }

    fn ask(
        &mut self,
        prompt: Vec<u32>,
        salt: Option<&str>,
        max_tokens: u32,
        phase: Phase,
    ) -> SeqId {
        // Nothing here listens: the scheduler does not speak.
        let (output, _) = output::channel(1);
        let submission = Submission {
            prompt,
            salt: salt.map(CacheSalt::of),
            sampling: SamplingParams::greedy(),
            stop: StopRule { max_tokens, stop_ids: Vec::new() },
            phase,
            output,
        };
        let place = QueuePlace::take(&Arc::new(AtomicUsize::new(0)), 1).unwrap();
        let none = self.scheduler.pool.none();
        let timeout = Duration::from_secs(5);
        let own = Incarnation([0; 16]);
        self.scheduler.enqueue(Sequence::new(submission, place, none, own, self.now, timeout))
    }

    fn whole(&mut self, prompt_len: u32) -> SeqId {
        self.add(prompt_len, 100, Phase::Whole)
    }

    /// Of a prompt that others share.
    fn known(&mut self, prompt: &[u32]) -> SeqId {
        self.ask(prompt.to_vec(), None, 100, Phase::Whole)
    }

    fn context(&mut self, prompt_len: u32, request: u64) -> SeqId {
        self.add(prompt_len, 100, Phase::Context(DisaggRequestId(request)))
    }

    fn admit(&mut self) -> Vec<SeqId> {
        self.scheduler.admit(self.now, &mut self.admission);
        self.admission.started.iter().map(|(id, _)| *id).collect()
    }

    fn overdue(&mut self) -> Vec<SeqId> {
        self.scheduler.admit(self.now, &mut self.admission);
        self.admission.overdue.clone()
    }

    fn plan(&mut self) -> Option<(PlannedStep, Vec<Part>)> {
        let mut step = PlannedStep::default();
        if !self.scheduler.plan(&mut self.plan, &mut step) {
            return None;
        }
        let seqs = self.plan.seqs.iter();
        Some((step, seqs.map(|seq| (seq.start, seq.input.len(), seq.sample)).collect()))
    }

    fn collect(&mut self, step: &PlannedStep) {
        self.scheduler.collected(step);
        for id in step.samplers() {
            if let Some(sequence) = self.scheduler.get_mut(id) {
                sequence.pending -= 1;
                sequence.tokens.push(7);
            }
        }
    }

    fn step(&mut self) -> Vec<Part> {
        let (step, seqs) = self.plan().unwrap();
        self.collect(&step);
        seqs
    }

    fn place(&self, id: SeqId) -> Place {
        self.sequence(id).place
    }

    fn sequence(&self, id: SeqId) -> &Sequence {
        self.scheduler.sequences().get(id).unwrap()
    }

    /// Runs one to its first token and takes it out: its full blocks are free and can be found.
    fn remember(&mut self, prompt: &[u32]) {
        let id = self.known(prompt);
        assert_eq!(self.admit(), [id]);
        while self.sequence(id).computed < prompt.len() as u32 {
            self.step();
        }
        self.scheduler.remove(id);
    }
}

#[test]
fn a_step_takes_decodes_first_and_fills_up_with_chunks() {
    let mut bench = Bench::new(LIMITS, 64);
    bench.whole(3);
    bench.whole(20);
    bench.admit();
    assert_eq!(bench.step(), [(0, 3, true), (0, 5, false)]);
    assert_eq!(bench.step(), [(3, 1, true), (5, 7, false)]);
    assert_eq!(bench.step(), [(4, 1, true), (12, 7, false)]);
    assert_eq!(bench.step(), [(5, 1, true), (19, 1, true)]);
    assert_eq!(bench.step(), [(6, 1, true), (20, 1, true)]);
}

#[test]
fn a_step_ahead_takes_the_last_sample_and_never_more_than_the_request_wants() {
    let mut bench = Bench::new(LIMITS, 64);
    bench.add(3, 3, Phase::Whole);
    bench.admit();
    let (first, _) = bench.plan().unwrap();
    let (second, seqs) = bench.plan().unwrap();
    assert_eq!(seqs, [(3, 1, true)]);
    assert!(matches!(bench.plan.seqs[0].input, Input::Last));
    bench.collect(&first);
    let (third, seqs) = bench.plan().unwrap();
    assert_eq!(seqs, [(4, 1, true)]);
    bench.collect(&second);
    assert!(bench.plan().is_none());
    bench.collect(&third);
    assert!(bench.plan().is_none());
}

#[test]
fn each_slot_is_opened_once_with_all_that_is_known() {
    let mut bench = Bench::new(LIMITS, 64);
    bench.whole(3);
    bench.admit();
    bench.step();
    let open = &bench.plan.opens[0];
    assert_eq!((open.history.len(), open.prompt_len, bench.plan.opens.len()), (3, 3, 1));
    bench.step();
    assert!(bench.plan.opens.is_empty());
}

#[test]
fn nobody_overtakes_a_request_that_waits_for_blocks() {
    let mut bench = Bench::new(LIMITS, 10);
    let first = bench.whole(16);
    assert_eq!(bench.admit(), [first]);
    let large = bench.whole(20);
    let small = bench.whole(1);
    // Six blocks are free, five are wanted, two shall stay free.
    assert!(bench.admit().is_empty());
    bench.scheduler.remove(first);
    assert_eq!(bench.admit(), [large, small]);
}

#[test]
fn a_lone_request_may_have_the_whole_pool() {
    let mut bench = Bench::new(LIMITS, 4);
    let only = bench.whole(16);
    assert_eq!(bench.admit(), [only]);
}

#[test]
fn no_more_run_than_there_are_slots() {
    let mut bench = Bench::new(LIMITS, 64);
    let all: Vec<SeqId> = (0..6).map(|_| bench.whole(1)).collect();
    assert_eq!(bench.admit(), all[..4]);
    bench.scheduler.remove(all[1]);
    assert_eq!(bench.admit(), all[4..5]);
    let slots: std::collections::BTreeSet<Slot> = all
        .iter()
        .filter_map(|id| match bench.scheduler.sequences().get(*id)?.place {
            Place::Running(slot) => Some(slot),
            Place::Waiting | Place::Ready | Place::Pulling => None,
        })
        .collect();
    assert_eq!(slots.len(), 4);
}

#[test]
fn a_decode_without_a_block_takes_the_youngests() {
    let limits = Limits { watermark: 0, ..LIMITS };
    let mut bench = Bench::new(limits, 3);
    let (old, young) = (bench.whole(4), bench.whole(5));
    assert_eq!(bench.admit(), [old, young]);
    bench.step();
    assert_eq!(bench.step(), [(4, 1, true), (0, 5, false)].split_at(1).0);
    assert_eq!(bench.place(young), Place::Waiting);
    assert_eq!(bench.scheduler.preemptions, 1);
    let sequence = bench.sequence(young);
    assert_eq!((sequence.computed, sequence.blocks.count()), (0, 0));
    // What it had computed is computed again, and counted.
    bench.scheduler.remove(old);
    assert!(bench.admit().is_empty(), "it started before");
    let known = bench.sequence(young).len();
    let (step, seqs) = bench.plan().unwrap();
    // Its full block was not needed by anybody.
    assert_eq!(seqs, [(4, known - 4, true)]);
    assert_eq!(step.prompt_tokens, 1);
}

#[test]
fn blocks_of_a_sequence_that_left_are_free_when_its_last_step_was_collected() {
    let mut bench = Bench::new(LIMITS, 10);
    let id = bench.whole(4);
    bench.admit();
    let (first, _) = bench.plan().unwrap();
    let (second, _) = bench.plan().unwrap();
    bench.collect(&first);
    bench.scheduler.remove(id);
    assert_eq!(bench.scheduler.pool.free(), 8);
    bench.collect(&second);
    assert_eq!(bench.scheduler.pool.free(), 10);
}

#[test]
fn a_decode_waits_for_blocks_of_steps_under_way_instead_of_taking_others() {
    let limits = Limits { watermark: 0, ..LIMITS };
    let mut bench = Bench::new(limits, 2);
    let (leaving, staying) = (bench.whole(1), bench.whole(4));
    assert_eq!(bench.admit(), [leaving, staying]);
    let (first, _) = bench.plan().unwrap();
    bench.scheduler.remove(leaving);
    assert!(bench.plan().is_none());
    assert_eq!(bench.scheduler.preemptions, 0);
    bench.collect(&first);
    assert_eq!(bench.step(), [(4, 1, true)]);
}

#[test]
fn context_passes_beyond_the_lease_bound_hold_back_only_their_like() {
    let mut bench = Bench::new(LIMITS, 64);
    let first = bench.context(32, 1);
    let second = bench.context(12, 2);
    let third = bench.context(4, 3);
    let whole = bench.whole(4);
    assert_eq!(bench.admit(), [first, whole]);
    bench.scheduler.remove(first);
    assert_eq!(bench.admit(), [second, third]);
}

#[test]
fn only_who_waits_for_blocks_is_overdue_and_only_if_another_worker_could_help() {
    let mut bench = Bench::new(LIMITS, 10);
    let running: Vec<SeqId> = (0..4).map(|_| bench.whole(4)).collect();
    assert_eq!(bench.admit(), running);
    let context = bench.context(4, 1);
    bench.now += Duration::from_secs(9);
    assert!(bench.overdue().is_empty(), "it waits for a slot");
    bench.scheduler.remove(running[0]);
    let whole = bench.whole(40);
    bench.scheduler.remove(context);
    let context = bench.context(4, 2);
    assert!(bench.overdue().is_empty(), "it has time");
    bench.now += Duration::from_secs(9);
    assert_eq!(bench.overdue(), [context]);
    assert_eq!(bench.place(whole), Place::Waiting);
}

#[test]
fn time_bounds_a_chunk_below_the_token_budget_and_a_prefill_goes_on_beside_any_decodes() {
    let limits = Limits { max_batch_tokens: 64, ..LIMITS };
    let mut bench = Bench::new(limits, 64);
    let pace = |milliseconds: f64| {
        let target = Duration::from_secs_f64(milliseconds / 1e3);
        Some(Pace::new(target, Duration::from_millis(1)))
    };
    bench.scheduler.pace = pace(21.5);
    bench.whole(3);
    bench.whole(100);
    bench.admit();
    assert_eq!(bench.step(), [(0, 3, true), (0, 16, false)]);
    assert_eq!(bench.step(), [(3, 1, true), (16, 16, false)]);
    // Steps are longer than they should be already.
    bench.scheduler.pace = pace(0.0);
    assert_eq!(bench.step(), [(4, 1, true), (32, 16, false)]);
    assert_eq!(bench.step(), [(5, 1, true), (48, 16, false)]);
}

#[test]
fn any_mix_of_requests_is_served_oldest_first_to_its_end_and_leaves_every_block_free() {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    for seed in 0..40 {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut bench = Bench::new(LIMITS, 24);
        let mut open = Vec::new();
        let mut waiting_steps = 0;
        for turn in 0..400 {
            if turn < 250 && random.random_bool(0.4) {
                let start = random.random_range(0..3) * 100;
                let len = random.random_range(1..40);
                let max = random.random_range(1..20);
                let phase = match random.random_range(0..4) {
                    0 => Phase::Context(DisaggRequestId(turn)),
                    _ => Phase::Whole,
                };
                let salt = [None, Some("x")][random.random_range(0..2)];
                open.push(bench.ask((start..start + len).collect(), salt, max, phase));
            }
            bench.now += Duration::from_millis(1);
            bench.scheduler.admit(bench.now, &mut bench.admission);
            let step = bench.plan().map(|(step, _)| step);
            if let Some(step) = &step {
                assert!(step.work.rows <= LIMITS.max_batch_tokens);
                bench.collect(step);
            }
            waiting_steps = if step.is_none() { waiting_steps + 1 } else { 0 };
            assert!(open.is_empty() || waiting_steps < 3, "seed {seed}: nobody runs");
            let max_len = bench.scheduler.limits.max_len;
            let scheduler = &mut bench.scheduler;
            open.retain(|id| {
                let sequence = scheduler.sequences().get(*id).unwrap();
                let is_over = sequence.pending == 0 && !sequence.wants_sample(max_len);
                let leaves = is_over || random.random_bool(0.01);
                if leaves {
                    scheduler.remove(*id);
                }
                !leaves
            });
        }
        assert!(open.is_empty(), "seed {seed}: {} never ended", open.len());
        assert_eq!(bench.scheduler.pool.free(), 24);
    }
}
