//! One suite for all back ends: what a step must compute, whatever computes it.
//!
//! Every check compares a back end with itself: alone or batched, whole or in chunks, from its own blocks or from
//! another's. Whether the numbers are the model's is for the back end's own tests.
//!
//! What has to be equal is a matter of the back end ([`Numbers`]). One that adds in the same order whatever runs beside
//! a row gives the same bits. A GPU's products of few and of many rows, and its attention in more or fewer parts, add in
//! different orders, and round activations to bf16 in between: there log-probabilities agree within a bound, and tokens
//! as long as no two are that close.

use std::cell::Cell;

use baton_shared::id::BlockIndex;

use super::{Backend, BackendError};
use crate::engine::sampling::SamplingParams;
use crate::engine::step::{Input, Slot, SlotOpen, StepOut, StepPlan, StepSeq};

/// Tokens generated for each comparison.
const OUTPUT: usize = 6;

/// In what a sequence computed in two ways may differ.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Numbers {
    /// In nothing.
    Exact,
    /// In log-probabilities, by so much; and so in tokens, where two are about as good.
    Within(f32),
}

/// Runs all checks. `make` gives equal back ends with at least 4 slots, 64 tokens a step and a pool of 32 blocks of 8.
///
/// # Panics
/// If a check fails.
pub fn suite(make: &dyn Fn() -> Box<dyn Backend>, numbers: Numbers) {
    let make = &Maker { make, numbers, compared: Cell::new(0), parted: Cell::new(0) };
    chunks_do_not_matter(make);
    neighbours_do_not_matter(make);
    the_order_of_blocks_does_not_matter(make);
    the_last_sample_is_the_same_as_its_token(make);
    steps_may_be_submitted_ahead(make);
    an_opened_slot_forgets(make);
    a_sequence_continues_from_copied_blocks(make);
    a_sequence_continues_from_another_pools_blocks(make);
    log_probabilities_come_only_where_asked_for(make);
    broken_plans_are_refused(make);
    let (compared, parted) = (make.compared.get(), make.parted.get());
    assert!(
        parted * 10 <= compared,
        "{parted} of {compared} sequences part where tokens are close"
    );
}

/// What makes back ends, and how what they give is compared.
struct Maker<'a> {
    make: &'a dyn Fn() -> Box<dyn Backend>,
    numbers: Numbers,
    compared: Cell<usize>,
    /// Comparisons that ended at two tokens about as good.
    parted: Cell<usize>,
}

impl Maker<'_> {
    fn backend(&self) -> Box<dyn Backend> {
        (self.make)()
    }

    fn driver(&self) -> Driver {
        Driver { backend: self.backend(), plan: StepPlan::default() }
    }

    /// What a lane gave is what it has to give.
    fn compare(&self, lane: &Lane, wanted: &[Observed], what: &str) {
        let Numbers::Within(bound) = self.numbers else {
            return assert_eq!(lane.seen, wanted, "{what}");
        };
        assert_eq!(lane.seen.len(), wanted.len(), "{what}");
        self.compared.set(self.compared.get() + 1);
        for (position, (left, right)) in lane.seen.iter().zip(wanted).enumerate() {
            let apart =
                |left: u32, right: u32| (f32::from_bits(left) - f32::from_bits(right)).abs();
            assert_eq!(left.3.len(), right.3.len(), "{what}: alternatives at {position}");
            for (left, right) in left.3.iter().zip(&right.3) {
                let far = apart(left.1, right.1);
                assert!(far <= bound, "{what}: {far} apart at {position}");
            }
            if left.0 != right.0 {
                // The best one changes only where the second is close; what is drawn at random may at any place.
                let best = left.3.len() < 2 || apart(left.3[0].1, left.3[1].1) <= 2.0 * bound;
                let is_greedy = lane.sampling.temperature == 0.0;
                assert!(best || !is_greedy, "{what}: tokens at {position} are not close");
                self.parted.set(self.parted.get() + 1);
                return;
            }
            let far = apart(left.1, right.1);
            assert!(far <= bound, "{what}: {far} apart at {position}");
        }
    }
}

/// Makes a plan wrong in one way.
type Break = fn(&mut StepPlan, &dyn Backend);

/// One token with its log-probability's bits, rank and alternatives.
type Observed = (u32, u32, u32, Vec<(u32, u32)>);

struct Driver {
    backend: Box<dyn Backend>,
    plan: StepPlan,
}

/// One sequence as a check drives it.
#[derive(Clone)]
struct Lane {
    slot: Slot,
    sampling: SamplingParams,
    tokens: Vec<u32>,
    prompt_len: usize,
    computed: usize,
    table: Vec<BlockIndex>,
    is_open: bool,
    seen: Vec<Observed>,
}

impl Lane {
    fn new(backend: &dyn Backend, slot: u32, seed: u32, prompt_len: usize) -> Self {
        let vocab = backend.caps().vocab;
        let token = |position: u32| (seed * 31 + position * 7 + position * position) % vocab;
        let blocks = backend.pool().layout.blocks / 4;
        Self {
            slot: Slot(slot),
            sampling: sampling(seed),
            tokens: (0..prompt_len as u32).map(token).collect(),
            prompt_len,
            computed: 0,
            table: (0..blocks).map(|block| BlockIndex(slot % 4 * blocks + block)).collect(),
            is_open: false,
            seen: Vec::new(),
        }
    }

    fn inputs(&self) -> usize {
        self.tokens.len() - self.computed
    }

    fn is_done(&self) -> bool {
        self.seen.len() >= OUTPUT
    }
}

/// Greedy for seed 0, else sampled with everything on.
fn sampling(seed: u32) -> SamplingParams {
    if seed == 0 {
        return SamplingParams { logprobs: Some(3), ..SamplingParams::greedy() };
    }
    SamplingParams {
        temperature: 0.8,
        top_p: 0.9,
        seed: u64::from(seed),
        frequency_penalty: 0.2,
        presence_penalty: 0.1,
        repetition_penalty: 1.1,
        logprobs: Some(2),
        ..SamplingParams::default()
    }
}

impl Driver {
    fn lane(&self, slot: u32, seed: u32, prompt_len: usize) -> Lane {
        Lane::new(&*self.backend, slot, seed, prompt_len)
    }

    fn block_tokens(&self) -> usize {
        self.backend.pool().layout.block_tokens as usize
    }

    /// Puts up to `limit` inputs of a lane into the plan.
    fn add(&mut self, lane: &mut Lane, limit: usize, use_last: bool) {
        let block_tokens = self.block_tokens();
        let plan = &mut self.plan;
        if !lane.is_open {
            plan.opens.push(SlotOpen {
                slot: lane.slot,
                sampling: lane.sampling.clone(),
                history: lane.tokens.clone(),
                prompt_len: lane.prompt_len as u32,
            });
            lane.is_open = true;
        }
        let count = lane.inputs().min(limit);
        let end = lane.computed + count;
        let input = if use_last && count == 1 && !lane.seen.is_empty() {
            Input::Last
        } else {
            let from = plan.tokens.len() as u32;
            plan.tokens.extend_from_slice(&lane.tokens[lane.computed..end]);
            Input::Tokens(from..plan.tokens.len() as u32)
        };
        let table_from = plan.tables.len() as u32;
        plan.tables.extend_from_slice(&lane.table[..end.div_ceil(block_tokens)]);
        plan.seqs.push(StepSeq {
            slot: lane.slot,
            start: lane.computed as u32,
            input,
            table: table_from..plan.tables.len() as u32,
            sample: end == lane.tokens.len(),
        });
        lane.computed = end;
    }

    /// Runs the plan; samples go to their lanes.
    fn step(&mut self, lanes: &mut [&mut Lane]) {
        let samplers: Vec<Slot> =
            self.plan.seqs.iter().filter(|seq| seq.sample).map(|seq| seq.slot).collect();
        let mut out = StepOut::default();
        let ticket = self.backend.submit(&self.plan).expect("the plan is right");
        self.plan.clear();
        self.backend.collect(ticket, &mut out).expect("the step works");
        let slots: Vec<Slot> = out.samples.iter().map(|sampled| sampled.slot).collect();
        assert_eq!(slots, samplers, "samples come in the plan's order");
        observe(&out, lanes);
    }

    /// Prefill in chunks of `chunk`, then decode, to the end.
    fn finish(&mut self, lane: &mut Lane, chunk: usize) {
        while !lane.is_done() {
            self.add(lane, chunk, false);
            self.step(&mut [lane]);
        }
    }
}

fn observe(out: &StepOut, lanes: &mut [&mut Lane]) {
    for sampled in &out.samples {
        let lane = lanes.iter_mut().find(|lane| lane.slot == sampled.slot);
        let lane = lane.expect("a sample is of a lane");
        let top = &out.top[sampled.top.start as usize..sampled.top.end as usize];
        let top = top.iter().map(|(token, logprob)| (*token, logprob.to_bits())).collect();
        lane.seen.push((sampled.token, sampled.logprob.to_bits(), sampled.rank, top));
        lane.tokens.push(sampled.token);
    }
}

/// What a prompt gives alone, in the largest chunks.
fn alone(make: &Maker<'_>, seed: u32, prompt_len: usize) -> Vec<Observed> {
    let mut driver = make.driver();
    let mut lane = driver.lane(0, seed, prompt_len);
    let chunk = driver.backend.caps().max_batch_tokens as usize;
    driver.finish(&mut lane, chunk);
    lane.seen
}

/// Prompts around a block's end, one of several steps.
fn prompt_lengths(backend: &dyn Backend) -> Vec<usize> {
    let block = backend.pool().layout.block_tokens as usize;
    let longest = block * (backend.pool().layout.blocks as usize / 4) - OUTPUT;
    [1, block - 1, block, block + 1, 2 * block + 3]
        .into_iter()
        .map(|len| len.clamp(1, longest))
        .collect()
}

fn chunks_do_not_matter(make: &Maker<'_>) {
    for len in prompt_lengths(&*make.backend()) {
        for seed in [0, 5] {
            let whole = alone(make, seed, len);
            assert_eq!(whole.len(), OUTPUT);
            for chunk in [1, 3, 7, 16] {
                let mut driver = make.driver();
                let mut lane = driver.lane(1, seed, len);
                driver.finish(&mut lane, chunk);
                make.compare(&lane, &whole, &format!("prompt of {len} in chunks of {chunk}"));
            }
        }
    }
}

fn neighbours_do_not_matter(make: &Maker<'_>) {
    let mut driver = make.driver();
    let lengths = prompt_lengths(&*driver.backend);
    let mut lanes: Vec<Lane> = (0..4)
        .map(|slot| driver.lane(slot, slot, lengths[slot as usize % lengths.len()]))
        .collect();
    while lanes.iter().any(|lane| !lane.is_done()) {
        let mut running: Vec<&mut Lane> = lanes.iter_mut().filter(|lane| !lane.is_done()).collect();
        // Decodes stand before prefills in a plan.
        running.sort_by_key(|lane| lane.inputs() > 1);
        for lane in &mut running {
            driver.add(lane, 4, false);
        }
        driver.step(&mut running);
    }
    for (seed, lane) in (0..).zip(&lanes) {
        make.compare(
            lane,
            &alone(make, seed, lane.prompt_len),
            &format!("lane {seed} among others"),
        );
    }
}

fn the_order_of_blocks_does_not_matter(make: &Maker<'_>) {
    let len = *prompt_lengths(&*make.backend()).last().expect("there are lengths");
    let mut driver = make.driver();
    let mut lane = driver.lane(0, 3, len);
    lane.table.reverse();
    driver.finish(&mut lane, 16);
    make.compare(&lane, &alone(make, 3, len), "blocks in falling order");
}

fn the_last_sample_is_the_same_as_its_token(make: &Maker<'_>) {
    let mut driver = make.driver();
    let mut lane = driver.lane(0, 2, 3);
    while !lane.is_done() {
        driver.add(&mut lane, 16, true);
        driver.step(&mut [&mut lane]);
    }
    make.compare(&lane, &alone(make, 2, 3), "inputs of the last sample");
}

/// As many steps as the lag allows wait to be collected; each takes the one before it as input, unseen.
fn steps_may_be_submitted_ahead(make: &Maker<'_>) {
    let mut driver = make.driver();
    let ahead = driver.backend.caps().lag as usize;
    let mut lane = driver.lane(0, 4, 3);
    let mut tickets = std::collections::VecDeque::new();
    let mut submitted = 0;
    while !lane.is_done() {
        if submitted < OUTPUT {
            if submitted == 0 {
                driver.add(&mut lane, 16, false);
            } else {
                let end = lane.prompt_len + submitted;
                driver.plan.tables.extend(&lane.table[..end.div_ceil(driver.block_tokens())]);
                let table = 0..driver.plan.tables.len() as u32;
                let start = end as u32 - 1;
                let input = Input::Last;
                let seq = StepSeq { slot: lane.slot, start, input, table, sample: true };
                driver.plan.seqs.push(seq);
            }
            submitted += 1;
            tickets.push_back(driver.backend.submit(&driver.plan).expect("the plan is right"));
            driver.plan.clear();
        }
        if tickets.len() > ahead || submitted == OUTPUT {
            let mut out = StepOut::default();
            let ticket = tickets.pop_front().expect("a step waits");
            driver.backend.collect(ticket, &mut out).expect("the step works");
            observe(&out, &mut [&mut lane]);
        }
    }
    make.compare(&lane, &alone(make, 4, 3), "steps submitted ahead");
}

fn an_opened_slot_forgets(make: &Maker<'_>) {
    let mut driver = make.driver();
    let mut before = driver.lane(0, 1, 5);
    driver.finish(&mut before, 16);
    let mut after = driver.lane(0, 6, 4);
    driver.finish(&mut after, 16);
    make.compare(&after, &alone(make, 6, 4), "a slot used again");
}

fn a_sequence_continues_from_copied_blocks(make: &Maker<'_>) {
    let mut driver = make.driver();
    let len = driver.block_tokens() + 1;
    let mut lane = driver.lane(0, 7, len);
    driver.add(&mut lane, len, false);
    driver.step(&mut [&mut lane]);
    let mut copy = Lane { slot: Slot(2), is_open: false, ..lane.clone() };
    copy.table = driver.lane(2, 7, len).table;
    let pairs: Vec<_> =
        lane.table.iter().copied().zip(copy.table.iter().copied()).take(2).collect();
    driver.backend.copy_blocks(&pairs).expect("blocks can be copied");
    driver.finish(&mut copy, 16);
    make.compare(&copy, &alone(make, 7, len), "from copied blocks");
}

fn a_sequence_continues_from_another_pools_blocks(make: &Maker<'_>) {
    let (mut context, mut generation) = (make.driver(), make.driver());
    let len = context.block_tokens() + 1;
    let mut lane = context.lane(0, 8, len);
    context.add(&mut lane, len, false);
    context.step(&mut [&mut lane]);
    let mut pulled = Lane { slot: Slot(3), is_open: false, ..lane.clone() };
    pulled.table = generation.lane(3, 8, len).table;
    let (from, to) = (context.backend.pool().clone(), generation.backend.pool().clone());
    let bytes = usize::try_from(from.layout.stride_block).expect("a block is in memory");
    let mut block = vec![0; bytes];
    for (source, target) in lane.table.iter().zip(&pulled.table).take(2) {
        from.region.read(source.0 as usize * bytes, &mut block).expect("a block can be read");
        to.region.write(target.0 as usize * bytes, &block).expect("a block can be written");
    }
    generation.finish(&mut pulled, 16);
    make.compare(&pulled, &alone(make, 8, len), "from another pool's blocks");
}

fn log_probabilities_come_only_where_asked_for(make: &Maker<'_>) {
    let mut driver = make.driver();
    let mut quiet = driver.lane(0, 0, 3);
    quiet.sampling.logprobs = None;
    let mut asked = driver.lane(1, 0, 3);
    while !asked.is_done() {
        driver.add(&mut quiet, 8, false);
        driver.add(&mut asked, 8, false);
        driver.step(&mut [&mut quiet, &mut asked]);
    }
    for (quiet, asked) in quiet.seen.iter().zip(&asked.seen) {
        assert_eq!(*quiet, (asked.0, 0, 0, Vec::new()));
        let best: Vec<f32> = asked.3.iter().map(|(_, bits)| f32::from_bits(*bits)).collect();
        assert_eq!(best.len(), 3);
        assert!(best.is_sorted_by(|left, right| left >= right), "best first: {best:?}");
        assert_eq!((asked.2, asked.0, asked.1), (1, asked.3[0].0, asked.3[0].1), "greedy is best");
    }
}

fn broken_plans_are_refused(make: &Maker<'_>) {
    let breaks: [(&str, Break); 6] = [
        ("a slot twice", |plan, _| plan.seqs.push(plan.seqs[0].clone())),
        ("no such slot", |plan, backend| {
            plan.seqs[0].slot = Slot(backend.caps().max_sequences);
        }),
        ("no such token", |plan, backend| plan.tokens[0] = backend.caps().vocab),
        ("no such block", |plan, backend| {
            plan.tables[0] = BlockIndex(backend.pool().layout.blocks);
        }),
        ("short table", |plan, _| plan.seqs[0].table.end = plan.seqs[0].table.start),
        ("input out of bounds", |plan, _| plan.seqs[0].input = Input::Tokens(0..1_000)),
    ];
    for (what, break_it) in breaks {
        let mut driver = make.driver();
        let mut lane = driver.lane(0, 1, 3);
        driver.add(&mut lane, 8, false);
        break_it(&mut driver.plan, &*driver.backend);
        let refused = driver.backend.submit(&driver.plan);
        assert!(matches!(refused, Err(BackendError::InvalidPlan(_))), "{what}: {refused:?}");
        driver.plan.clear();
        let mut lane = driver.lane(0, 1, 3);
        driver.finish(&mut lane, 8);
        make.compare(&lane, &alone(make, 1, 3), &format!("after {what}"));
    }
}
