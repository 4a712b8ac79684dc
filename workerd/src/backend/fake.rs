//! A back end that computes nothing: its "keys and values" are the token ids themselves, its logits a hash of the
//! history it reads back from the blocks.
//!
//! So a wrong block table, a block reused too early or a position skipped changes the tokens, and is refused as well:
//! every slot knows what its blocks must hold. Steps run as late as the contract allows, when they are collected.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use baton_shared::id::BlockIndex;
use baton_shared::kv::layout::{KvDtype, KvLayout};

use super::{Backend, BackendError, Caps, StepTicket};
use crate::engine::sampling::Sampler;
use crate::engine::step::{Input, Slot, SlotOpen, StepOut, StepPlan, StepSeq};
use crate::kv::host_memory::HostMemory;
use crate::kv::region::{KvRegion, Region};

/// A held fake is let go after this, so that a failed test ends.
const HOLD_LIMIT: Duration = Duration::from_secs(60);

/// Shape of a fake.
#[derive(Clone, Debug)]
pub struct FakeConfig {
    /// Blocks of the pool.
    pub blocks: u32,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// What it claims.
    pub caps: Caps,
}

impl Default for FakeConfig {
    fn default() -> Self {
        let caps = Caps { max_sequences: 16, max_batch_tokens: 64, vocab: 97, lag: 0 };
        Self { blocks: 64, block_tokens: 4, caps }
    }
}

/// What a test makes a fake do.
#[derive(Debug, Default)]
pub struct FakeScript {
    state: Mutex<ScriptState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct ScriptState {
    is_held: bool,
    steps: u64,
    fail_at: Option<u64>,
    panic_at: Option<u64>,
}

impl FakeScript {
    /// Collecting waits from now on.
    pub fn hold(&self) {
        self.lock().is_held = true;
    }

    /// Collecting goes on.
    pub fn let_go(&self) {
        self.lock().is_held = false;
        self.changed.notify_all();
    }

    /// The device fails in step number `step` (the first is 0).
    pub fn fail_at(&self, step: u64) {
        self.lock().fail_at = Some(step);
    }

    /// The driver panics in step number `step` (the first is 0).
    pub fn panic_at(&self, step: u64) {
        self.lock().panic_at = Some(step);
    }

    /// Steps run.
    pub fn steps(&self) -> u64 {
        self.lock().steps
    }

    fn begin_step(&self) -> Result<(), BackendError> {
        let state = self.lock();
        let waited = self.changed.wait_timeout_while(state, HOLD_LIMIT, |state| state.is_held);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        let step = state.steps;
        state.steps += 1;
        let (fails, panics) = (state.fail_at == Some(step), state.panic_at == Some(step));
        drop(state);
        assert!(!panics, "fake panics in step {step} as it was told");
        if fails {
            Err(BackendError::Device(format!("told to fail in step {step}")))
        } else {
            Ok(())
        }
    }

    fn lock(&self) -> MutexGuard<'_, ScriptState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The fake. See the module.
#[derive(Debug)]
pub struct FakeBackend {
    caps: Caps,
    kv: KvRegion,
    memory: HostMemory,
    slots: HashMap<Slot, FakeSlot>,
    submitted: VecDeque<(StepTicket, StepPlan)>,
    ran: VecDeque<(StepTicket, Result<StepOut, BackendError>)>,
    tickets: u64,
    script: Arc<FakeScript>,
}

#[derive(Debug)]
struct FakeSlot {
    sampler: Sampler,
    history: Vec<u32>,
}

impl FakeBackend {
    /// A fake with an empty pool.
    ///
    /// # Errors
    /// What the system says when there is no memory.
    pub fn new(config: FakeConfig) -> std::io::Result<Self> {
        let FakeConfig { blocks, block_tokens, caps } = config;
        // Two bf16 elements are the four bytes of a token id.
        let layout = KvLayout::block_major(KvDtype::Bf16, block_tokens, 2, blocks, 0..1, 0..1);
        let bytes = usize::try_from(layout.bytes()).map_err(std::io::Error::other)?;
        let memory = HostMemory::zeroed(bytes)?;
        Ok(Self {
            caps,
            kv: KvRegion { region: Region::Host(memory.clone()), layout },
            memory,
            slots: HashMap::new(),
            submitted: VecDeque::new(),
            ran: VecDeque::new(),
            tickets: 0,
            script: Arc::new(FakeScript::default()),
        })
    }

    /// How a test steers it.
    pub fn script(&self) -> Arc<FakeScript> {
        Arc::clone(&self.script)
    }

    fn place(&self, table: &[BlockIndex], position: u32, kv: u32) -> usize {
        let block_tokens = self.kv.layout.block_tokens;
        let block = table[(position / block_tokens) as usize];
        let offset =
            self.kv.layout.offset(block, 0, 0, kv) + u64::from(position % block_tokens * 4);
        usize::try_from(offset).expect("the pool is in memory")
    }

    fn write(&self, table: &[BlockIndex], position: u32, token: u32) {
        self.memory.write(self.place(table, position, 0), &token.to_le_bytes());
        self.memory.write(self.place(table, position, 1), &(!token).to_le_bytes());
    }

    /// The token at a position, unless K and V do not belong together.
    fn read(&self, table: &[BlockIndex], position: u32) -> Option<u32> {
        let word = |kv| {
            let mut bytes = [0; 4];
            self.memory.read(self.place(table, position, kv), &mut bytes);
            u32::from_le_bytes(bytes)
        };
        (word(0) == !word(1)).then(|| word(0))
    }

    fn run(&mut self, plan: &StepPlan) -> Result<StepOut, BackendError> {
        self.script.begin_step()?;
        for SlotOpen { slot, sampling, history, prompt_len } in &plan.opens {
            let sampler = Sampler::new(sampling, history, *prompt_len);
            self.slots.insert(*slot, FakeSlot { sampler, history: history.clone() });
        }
        let mut out = StepOut::default();
        for seq in &plan.seqs {
            let mut slot = self.slots.remove(&seq.slot).ok_or_else(|| not_open(seq.slot))?;
            self.run_sequence(plan, seq, &mut slot, &mut out)?;
            self.slots.insert(seq.slot, slot);
        }
        Ok(out)
    }

    fn run_sequence(
        &self,
        plan: &StepPlan,
        seq: &StepSeq,
        slot: &mut FakeSlot,
        out: &mut StepOut,
    ) -> Result<(), BackendError> {
        let table = &plan.tables[seq.table.start as usize..seq.table.end as usize];
        let last: Vec<u32> = slot.sampler.last().into_iter().collect();
        let input = match &seq.input {
            Input::Tokens(range) => &plan.tokens[range.start as usize..range.end as usize],
            Input::Last => &last,
        };
        let end = seq.start + input.len() as u32;
        let known = slot.history.get(seq.start as usize..end as usize);
        if known != Some(input) {
            let message = format!("{:?} gets {input:?} at {}, not {known:?}", seq.slot, seq.start);
            return Err(BackendError::InvalidPlan(message));
        }
        (seq.start..).zip(input).for_each(|(position, token)| self.write(table, position, *token));
        let mut hash = 0;
        for (position, known) in (0..end).zip(&slot.history) {
            let token = self.read(table, position);
            if token != Some(*known) {
                let message = format!("{:?} reads {token:?} at {position}, not {known}", seq.slot);
                return Err(BackendError::InvalidPlan(message));
            }
            hash = mixed(hash ^ u64::from(*known));
        }
        if seq.sample {
            let mut logits: Vec<f32> = (0..self.caps.vocab).map(|id| logit(hash, id)).collect();
            slot.sampler.sample(seq.slot, &mut logits, out);
            slot.history.extend(slot.sampler.last());
        }
        Ok(())
    }

    fn run_submitted(&mut self) {
        while let Some((ticket, plan)) = self.submitted.pop_front() {
            let outcome = self.run(&plan);
            self.ran.push_back((ticket, outcome));
        }
    }
}

impl Backend for FakeBackend {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn pool(&self) -> &KvRegion {
        &self.kv
    }

    fn submit(&mut self, step: &StepPlan) -> Result<StepTicket, BackendError> {
        check(step, &self.caps, &self.kv.layout).map_err(BackendError::InvalidPlan)?;
        if self.submitted.len() + self.ran.len() > self.caps.lag as usize {
            let message = format!("more than {} steps wait to be collected", self.caps.lag);
            return Err(BackendError::InvalidPlan(message));
        }
        self.tickets += 1;
        let ticket = StepTicket(self.tickets);
        self.submitted.push_back((ticket, step.clone()));
        Ok(ticket)
    }

    fn collect(&mut self, ticket: StepTicket, out: &mut StepOut) -> Result<(), BackendError> {
        if self.ran.is_empty()
            && let Some((ticket, plan)) = self.submitted.pop_front()
        {
            let outcome = self.run(&plan);
            self.ran.push_back((ticket, outcome));
        }
        match self.ran.pop_front() {
            Some((oldest, outcome)) if oldest == ticket => {
                *out = outcome?;
                Ok(())
            }
            Some(_) | None => {
                Err(BackendError::InvalidPlan(format!("{ticket:?} is not the oldest step")))
            }
        }
    }

    fn copy_blocks(&mut self, pairs: &[(BlockIndex, BlockIndex)]) -> Result<(), BackendError> {
        self.run_submitted();
        let bytes = usize::try_from(self.kv.layout.stride_block).expect("the pool is in memory");
        let mut block = vec![0; bytes];
        for (from, to) in pairs {
            self.memory.read(from.0 as usize * bytes, &mut block);
            self.memory.write(to.0 as usize * bytes, &block);
        }
        Ok(())
    }
}

/// Whether a plan keeps the contract, as far as that can be seen before it runs.
fn check(plan: &StepPlan, caps: &Caps, layout: &KvLayout) -> Result<(), String> {
    if plan.seqs.is_empty() || plan.rows() > caps.max_batch_tokens as usize {
        let rows = plan.rows();
        return Err(format!("{rows} rows, may be 1 to {}", caps.max_batch_tokens));
    }
    if let Some(token) = plan.tokens.iter().find(|token| **token >= caps.vocab) {
        return Err(format!("token {token} is outside a vocabulary of {}", caps.vocab));
    }
    let mut slots = HashSet::new();
    for seq in &plan.seqs {
        if seq.slot.0 >= caps.max_sequences || !slots.insert(seq.slot) {
            return Err(format!("{:?} does not exist or comes twice", seq.slot));
        }
        check_sequence(plan, seq, layout)?;
    }
    // Blocks may be shared, but one that is written belongs to its writer.
    let table = |seq: &StepSeq| &plan.tables[seq.table.start as usize..seq.table.end as usize];
    let mut writers: HashMap<BlockIndex, Slot> = HashMap::new();
    for seq in &plan.seqs {
        let written = &table(seq)[(seq.start / layout.block_tokens) as usize..];
        writers.extend(written.iter().map(|block| (*block, seq.slot)));
    }
    for seq in &plan.seqs {
        for block in table(seq) {
            if let Some(writer) = writers.get(block).filter(|writer| **writer != seq.slot) {
                return Err(format!("{block:?} of {:?} is written by {writer:?}", seq.slot));
            }
        }
    }
    Ok(())
}

fn check_sequence(plan: &StepPlan, seq: &StepSeq, layout: &KvLayout) -> Result<(), String> {
    if let Input::Tokens(range) = &seq.input
        && !is_within(range, plan.tokens.len())
    {
        return Err(format!("{:?} has its input at {range:?}", seq.slot));
    }
    if !is_within(&seq.table, plan.tables.len()) {
        return Err(format!("{:?} has its table at {:?}", seq.slot, seq.table));
    }
    let table = &plan.tables[seq.table.start as usize..seq.table.end as usize];
    let wanted = (seq.start + seq.input.len()).div_ceil(layout.block_tokens);
    if table.len() != wanted as usize || table.iter().any(|block| block.0 >= layout.blocks) {
        return Err(format!("{:?} has table {table:?}, needs {wanted} blocks", seq.slot));
    }
    Ok(())
}

fn is_within(range: &Range<u32>, len: usize) -> bool {
    range.start < range.end && range.end as usize <= len
}

fn not_open(slot: Slot) -> BackendError {
    BackendError::InvalidPlan(format!("{slot:?} was never opened"))
}

/// SplitMix64's finaliser.
fn mixed(value: u64) -> u64 {
    let value = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

/// In `[-4, 4)`, in steps of 1/32: equal logits occur.
fn logit(hash: u64, id: u32) -> f32 {
    (mixed(hash.wrapping_add(u64::from(id))) >> 56) as f32 / 32.0 - 4.0
}

#[cfg(test)]
mod tests {
    use super::super::conformance::{self, Numbers};
    use super::*;

    fn fake(lag: u32) -> Box<dyn Backend> {
        let caps = Caps { lag, ..FakeConfig::default().caps };
        Box::new(FakeBackend::new(FakeConfig { caps, ..FakeConfig::default() }).unwrap())
    }

    #[test]
    fn it_conforms_when_it_answers_at_once() {
        conformance::suite(&|| fake(0), Numbers::Exact);
    }

    #[test]
    fn it_conforms_when_it_answers_one_step_late() {
        conformance::suite(&|| fake(1), Numbers::Exact);
    }
}
