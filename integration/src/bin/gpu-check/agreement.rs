//! Whether the GPU computes what the CPU computes: the same tokens are given to both, and the log-probabilities of the
//! most probable next ones are compared, whole prompts, chunks, and many sequences at once.

use anyhow::{Context, Result, ensure};
use baton_shared::id::BlockIndex;
use baton_workerd::backend::Backend;
use baton_workerd::engine::sampling::SamplingParams;
use baton_workerd::engine::step::{Input, Slot, SlotOpen, StepOut, StepPlan, StepSeq};

/// Tokens generated for each comparison.
pub const OUTPUT: usize = 12;
/// Alternatives compared.
const TOP: u32 = 5;

/// What a sequence's token was, with its log-probability and alternatives.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    pub token: u32,
    pub logprob: f32,
    pub top: Vec<(u32, f32)>,
}

/// A sequence: its prompt, and what follows where that is given.
#[derive(Clone, Debug)]
pub struct Lane {
    pub prompt: Vec<u32>,
    pub forced: Vec<u32>,
}

/// Largest difference of a log-probability, the root of the mean square of all, and how many tokens were other ones.
#[derive(Clone, Copy, Debug, Default)]
pub struct Difference {
    pub logprob: f32,
    pub typical: f64,
    pub tokens: usize,
    pub compared: usize,
}

struct Runner<'a> {
    backend: &'a mut dyn Backend,
    lanes: &'a [Lane],
    computed: Vec<usize>,
    seen: Vec<Vec<Seen>>,
}

/// Runs lanes greedily side by side, prompts in chunks of `chunk`; a lane's forced tokens are its inputs.
pub fn run(backend: &mut dyn Backend, lanes: &[Lane], chunk: usize) -> Result<Vec<Vec<Seen>>> {
    let seen = vec![Vec::new(); lanes.len()];
    let mut runner = Runner { backend, lanes, computed: vec![0; lanes.len()], seen };
    let mut is_first = true;
    while runner.seen.iter().any(|seen| seen.len() < OUTPUT) {
        runner.step(chunk, is_first).context("a step")?;
        is_first = false;
    }
    Ok(runner.seen)
}

impl Runner<'_> {
    fn tokens(&self, lane: usize) -> Vec<u32> {
        let Lane { prompt, forced } = &self.lanes[lane];
        let own = self.seen[lane].iter().map(|seen| seen.token);
        let count = self.seen[lane].len();
        let follow: Vec<u32> =
            if forced.is_empty() { own.collect() } else { forced[..count].to_vec() };
        [prompt.as_slice(), &follow].concat()
    }

    fn step(&mut self, chunk: usize, is_first: bool) -> Result<()> {
        let layout = self.backend.pool().layout.clone();
        let per_lane = layout.blocks / self.lanes.len() as u32;
        let mut plan = StepPlan::default();
        let mut budget = self.backend.caps().max_batch_tokens as usize;
        // Decodes stand before prefills.
        let mut order: Vec<usize> = (0..self.lanes.len()).collect();
        order.sort_by_key(|lane| self.tokens(*lane).len() - self.computed[*lane] > 1);
        for (slot, lane) in self.lanes.iter().enumerate().filter(|_| is_first) {
            plan.opens.push(SlotOpen {
                slot: Slot(slot as u32),
                sampling: SamplingParams { logprobs: Some(TOP), ..SamplingParams::greedy() },
                history: lane.prompt.clone(),
                prompt_len: lane.prompt.len() as u32,
            });
        }
        for lane in order {
            let (all, from) = (self.tokens(lane), self.computed[lane]);
            let count = (all.len() - from).min(chunk).min(budget);
            if self.seen[lane].len() >= OUTPUT || count == 0 {
                continue;
            }
            budget -= count;
            let first = plan.tokens.len() as u32;
            plan.tokens.extend_from_slice(&all[from..from + count]);
            let table = plan.tables.len() as u32;
            let blocks = (from + count).div_ceil(layout.block_tokens as usize) as u32;
            ensure!(blocks <= per_lane, "a pool of {} blocks is too small", layout.blocks);
            // Not in order, and never another lane's.
            let own = (0..blocks).map(|at| lane as u32 * per_lane + (at * 7 + 3) % per_lane);
            ensure!(per_lane % 7 != 0);
            plan.tables.extend(own.map(BlockIndex));
            plan.seqs.push(StepSeq {
                slot: Slot(lane as u32),
                start: from as u32,
                input: Input::Tokens(first..first + count as u32),
                table: table..table + blocks,
                sample: from + count == all.len(),
            });
            self.computed[lane] += count;
        }
        let ticket = self.backend.submit(&plan)?;
        let mut out = StepOut::default();
        self.backend.collect(ticket, &mut out)?;
        for sampled in &out.samples {
            let top = &out.top[sampled.top.start as usize..sampled.top.end as usize];
            let (token, logprob) = (sampled.token, sampled.logprob);
            self.seen[sampled.slot.0 as usize].push(Seen { token, logprob, top: top.to_vec() });
        }
        Ok(())
    }
}

/// Compares what two back ends saw of the same inputs.
pub fn compare(left: &[Vec<Seen>], right: &[Vec<Seen>]) -> Difference {
    let mut difference = Difference::default();
    let (mut squares, mut count) = (0.0, 0);
    for (left, right) in left.iter().flatten().zip(right.iter().flatten()) {
        difference.compared += 1;
        difference.tokens += usize::from(left.token != right.token);
        for (token, logprob) in &left.top {
            // A token that is not among the other's best is no more probable than the last of them.
            let other = right.top.iter().find(|(other, _)| other == token);
            let other = other.or(right.top.last()).map_or(f32::NAN, |(_, logprob)| *logprob);
            let apart = (logprob - other).abs();
            let is_further = apart > difference.logprob || apart.is_nan();
            difference.logprob = if is_further { apart } else { difference.logprob };
            squares += f64::from(apart).powi(2);
            count += 1;
        }
    }
    difference.typical = (squares / f64::from(count.max(1))).sqrt();
    difference
}

/// A greedy sequence fed by its own last samples, as many steps ahead as the back end allows.
pub fn ahead(backend: &mut dyn Backend, prompt: &[u32], count: usize) -> Result<Vec<u32>> {
    let block_tokens = backend.pool().layout.block_tokens as usize;
    let lag = backend.caps().lag as usize;
    let mut tickets = std::collections::VecDeque::new();
    let (mut tokens, mut submitted) = (Vec::new(), 0);
    let mut plan = StepPlan::default();
    while tokens.len() < count {
        if submitted < count {
            plan.clear();
            let (start, input) = if submitted == 0 {
                plan.opens.push(SlotOpen {
                    slot: Slot(0),
                    sampling: SamplingParams::greedy(),
                    history: prompt.to_vec(),
                    prompt_len: prompt.len() as u32,
                });
                plan.tokens.extend_from_slice(prompt);
                (0, Input::Tokens(0..prompt.len() as u32))
            } else {
                (prompt.len() + submitted - 1, Input::Last)
            };
            let blocks = (start + input.len() as usize).div_ceil(block_tokens) as u32;
            plan.tables.extend((0..blocks).map(BlockIndex));
            let start = start as u32;
            plan.seqs.push(StepSeq { slot: Slot(0), start, input, table: 0..blocks, sample: true });
            tickets.push_back(backend.submit(&plan)?);
            submitted += 1;
        }
        if tickets.len() > lag || submitted == count {
            let mut out = StepOut::default();
            let ticket = tickets.pop_front().context("a step is under way")?;
            backend.collect(ticket, &mut out)?;
            tokens.extend(out.samples.iter().map(|sampled| sampled.token));
        }
    }
    Ok(tokens)
}
