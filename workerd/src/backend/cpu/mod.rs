//! The CPU back end: a step runs inside `submit`, on the caller's thread and the compute threads.
//!
//! Exact by construction: a sequence's logits and the bytes in the pool depend on its tokens and positions only, never
//! on what runs beside it, on chunks, on the number of threads or on the tier of kernels.

pub mod arena;
pub mod attention;
pub mod cache;
pub mod forward;
pub mod kernels;
pub mod linear;
pub mod pieces;
pub mod places;
pub mod repack;
pub mod rope;
pub mod switches;
pub mod threads;

use std::collections::VecDeque;

use baton_shared::id::BlockIndex;
use baton_shared::kv::layout::InvalidLayout;

use self::cache::Cache;
use self::forward::{Batch, Weights, Workspace};
use self::kernels::Kernels;
use self::linear::{Scratch, Team};
use self::threads::Threads;
use super::{Backend, BackendError, Caps, StepTicket, check, pool_layout};
use crate::engine::sampling::Sampler;
use crate::engine::step::{Input, Slot, StepOut, StepPlan};
use crate::kv::host_memory::HostMemory;
use crate::kv::region::{KvRegion, Region};
use crate::model::{Model, ModelError, Source};

/// Which kernels run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Simd {
    /// The best this CPU has.
    #[default]
    Auto,
    /// Those of this name ([`Kernels::tiers`]): the same bits at another speed.
    Named(&'static str),
}

/// Sizes of a CPU back end.
#[derive(Clone, Debug)]
pub struct CpuOptions {
    /// Compute threads, the caller's included; 0 counts as 1.
    pub threads: usize,
    /// Most sequences in one step.
    pub max_sequences: u32,
    /// Most input tokens in one step.
    pub max_batch_tokens: u32,
    /// Blocks of the pool.
    pub blocks: u32,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Which kernels run.
    pub simd: Simd,
}

/// Why a CPU back end cannot start.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// The model's shape.
    #[error("the cpu back end cannot run this model: {0}")]
    Model(String),
    /// The model's files.
    #[error(transparent)]
    Load(#[from] ModelError),
    /// The pool's shape.
    #[error("the pool cannot be: {0}")]
    Layout(#[from] InvalidLayout),
    /// No such memory for the weights.
    #[error(transparent)]
    Weights(#[from] arena::OutOfMemory),
    /// No such memory for the pool.
    #[error("cannot get {bytes} bytes for the pool")]
    Memory {
        /// Bytes wanted.
        bytes: u64,
        /// What the system says.
        source: std::io::Error,
    },
    /// No such kernels.
    #[error("this CPU cannot run kernels named `{0}`")]
    Simd(&'static str),
    /// No such thread.
    #[error("cannot start {threads} compute threads")]
    Threads {
        /// Threads wanted.
        threads: usize,
        /// What the system says.
        source: std::io::Error,
    },
}

/// A model on the CPU. See [`Backend`].
#[derive(Debug)]
pub struct CpuBackend {
    caps: Caps,
    pool: KvRegion,
    /// The pool's, without the question where it is.
    memory: HostMemory,
    weights: Weights,
    team: Team,
    batch: Batch,
    workspace: Workspace,
    seen: check::Seen,
    /// Sampler of each slot that was ever opened.
    slots: Vec<Option<Sampler>>,
    next_ticket: u64,
    /// Outputs not yet collected, oldest first.
    done: VecDeque<(StepTicket, StepOut)>,
    /// Collected outputs, whose memory is used again.
    spare: Vec<StepOut>,
}

impl CpuBackend {
    /// As [`CpuBackend::load`], of a model in memory, which is not needed afterwards.
    ///
    /// # Errors
    /// [`CpuError`].
    pub fn new(mut model: &Model, options: &CpuOptions) -> Result<Self, CpuError> {
        check::model(model).map_err(CpuError::Model)?;
        Self::load(&mut model, options)
    }

    /// Repacks the model's weights, part by part, and makes an empty pool.
    ///
    /// # Errors
    /// [`CpuError`].
    pub fn load(source: &mut impl Source, options: &CpuOptions) -> Result<Self, CpuError> {
        let layout = pool_layout(source.spec(), options.block_tokens, options.blocks);
        layout.validate()?;
        let bytes = layout.bytes();
        let memory = usize::try_from(bytes).map_err(|_| std::io::ErrorKind::OutOfMemory.into());
        let memory = memory
            .and_then(HostMemory::zeroed)
            .map_err(|source| CpuError::Memory { bytes, source })?;
        let threads = Threads::new(options.threads)
            .map_err(|source| CpuError::Threads { threads: options.threads, source })?;
        let kernels = match options.simd {
            Simd::Auto => Kernels::detect(),
            Simd::Named(name) => Kernels::named(name).ok_or(CpuError::Simd(name))?,
        };
        let scratch = (0..threads.count()).map(|_| Scratch::default()).collect();
        Ok(Self {
            caps: Caps {
                max_sequences: options.max_sequences,
                max_batch_tokens: options.max_batch_tokens,
                vocab: source.spec().vocab,
                lag: 0,
            },
            pool: KvRegion { region: Region::Host(memory.clone()), layout },
            memory,
            weights: Weights::load(source)?,
            team: Team { kernels, threads, scratch },
            batch: Batch::default(),
            workspace: Workspace::default(),
            seen: check::Seen::new(options.max_sequences, options.blocks),
            slots: vec![None; options.max_sequences as usize],
            next_ticket: 0,
            done: VecDeque::new(),
            spare: Vec::new(),
        })
    }

    /// Which kernels run: `avx2`, `scalar`.
    pub fn simd(&self) -> &'static str {
        self.team.kernels.name
    }

    fn open(&mut self, step: &StepPlan) {
        for open in &step.opens {
            let sampler = Sampler::new(&open.sampling, &open.history, open.prompt_len);
            self.slots[open.slot.0 as usize] = Some(sampler);
        }
    }

    fn batch(&mut self, step: &StepPlan) {
        self.batch.clear();
        for seq in &step.seqs {
            let last;
            let input = match &seq.input {
                Input::Tokens(range) => &step.tokens[range.start as usize..range.end as usize],
                Input::Last => {
                    let sampler = self.slots[seq.slot.0 as usize].as_ref();
                    last = [sampler.and_then(Sampler::last).expect("the plan was checked")];
                    &last
                }
            };
            let table = seq.table.start as usize;
            let threads = self.team.threads.count();
            self.batch.push(&self.weights, input, seq.start, table, seq.sample, threads);
        }
    }

    fn sample(&mut self, step: &StepPlan, out: &mut StepOut) {
        let Self { team, weights, batch, pool, memory, workspace, slots, .. } = self;
        let cache = Cache { memory, layout: &pool.layout, layer: 0, tables: &step.tables };
        let logits = workspace.run(team, weights, batch, cache);
        let sampled = step.seqs.iter().filter(|seq| seq.sample);
        for (seq, logits) in sampled.zip(logits.chunks_exact_mut(weights.vocab())) {
            let sampler = slots[seq.slot.0 as usize].as_mut().expect("the plan was checked");
            sampler.sample(seq.slot, logits, out);
        }
    }
}

impl Backend for CpuBackend {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn pool(&self) -> &KvRegion {
        &self.pool
    }

    fn submit(&mut self, step: &StepPlan) -> Result<StepTicket, BackendError> {
        let last = |slot: Slot| self.slots[slot.0 as usize].as_ref().map(Sampler::last);
        check::plan(step, &self.caps, &self.pool.layout, &mut self.seen, last)?;
        self.open(step);
        let mut out = self.spare.pop().unwrap_or_default();
        out.clear();
        self.batch(step);
        self.sample(step, &mut out);
        let ticket = StepTicket(self.next_ticket);
        self.next_ticket += 1;
        self.done.push_back((ticket, out));
        Ok(ticket)
    }

    fn collect(&mut self, ticket: StepTicket, out: &mut StepOut) -> Result<(), BackendError> {
        match self.done.pop_front() {
            Some((oldest, mut done)) if oldest == ticket => {
                std::mem::swap(out, &mut done);
                self.spare.push(done);
                Ok(())
            }
            other => {
                let oldest = other.as_ref().map(|(oldest, _)| *oldest);
                self.done.extend(other);
                Err(check::not_oldest(ticket, oldest))
            }
        }
    }

    fn copy_blocks(&mut self, pairs: &[(BlockIndex, BlockIndex)]) -> Result<(), BackendError> {
        let layout = &self.pool.layout;
        check::copies(pairs, layout)?;
        let stride = layout.stride_block as usize;
        let len = layout.block_bytes() as usize;
        for (from, to) in pairs {
            let (from, to) = (from.0 as usize * stride, to.0 as usize * stride);
            self.memory.copy_within(from, to, len);
        }
        Ok(())
    }
}

#[cfg(test)]
pub mod tests;
