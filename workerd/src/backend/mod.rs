//! One rank's device. A [`StepPlan`] goes to every rank of an instance; block ids are equal on all ranks.

pub mod check;
pub mod conformance;
pub mod cpu;
pub mod cuda;
pub mod fake;
pub mod warm_up;

use crate::engine::step::{StepOut, StepPlan};
use crate::kv::region::KvRegion;
use crate::model::ModelSpec;
use baton_shared::id::BlockIndex;
use baton_shared::kv::layout::{KvDtype, KvLayout};

/// What a back end can do; fixed at start.
#[derive(Clone, Debug)]
pub struct Caps {
    /// Most sequences in one step; slots are `0..max_sequences`.
    pub max_sequences: u32,
    /// Most input tokens in one step.
    pub max_batch_tokens: u32,
    /// Ids are `0..vocab`.
    pub vocab: u32,
    /// How many further steps may be submitted before a step is collected: 0 on the CPU, 1 on a GPU.
    pub lag: u32,
}

/// Orders the outputs: `collect` takes tickets in the order `submit` gave them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepTicket(pub u64);

/// A device failed; nothing of the step may be used.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The plan breaks the contract: a bug of the caller.
    #[error("step plan is invalid: {0}")]
    InvalidPlan(String),
    /// The device failed.
    #[error("device failed: {0}")]
    Device(String),
}

/// One rank's device.
pub trait Backend: Send {
    /// What this back end can do.
    fn caps(&self) -> &Caps;
    /// The KV pool: what gets registered with a transport.
    fn pool(&self) -> &KvRegion;
    /// Starts a step: returns at once (GPU) or runs it (CPU).
    ///
    /// # Errors
    /// [`BackendError`]; the step did not happen.
    fn submit(&mut self, step: &StepPlan) -> Result<StepTicket, BackendError>;
    /// The oldest uncollected step's outputs; waits for it. `out` is overwritten. What the step wrote to the pool is
    /// there for peers to read afterwards, though further steps may be under way.
    ///
    /// # Errors
    /// [`BackendError`]; the step's outputs are lost.
    fn collect(&mut self, ticket: StepTicket, out: &mut StepOut) -> Result<(), BackendError>;
    /// Copies whole blocks `(from, to)` after all submitted steps.
    ///
    /// # Errors
    /// [`BackendError`].
    fn copy_blocks(&mut self, pairs: &[(BlockIndex, BlockIndex)]) -> Result<(), BackendError>;
}

/// How a back end's pool lies: block-major without gaps, so one block is one range.
pub fn pool_layout(spec: &ModelSpec, block_tokens: u32, blocks: u32) -> KvLayout {
    let (layers, heads) = (0..spec.layers, 0..spec.kv_heads);
    KvLayout::block_major(KvDtype::Bf16, block_tokens, spec.head_dim, blocks, layers, heads)
}
