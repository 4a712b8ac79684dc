//! The CUDA back end: a step is a row of kernel launches in one stream, asked for in `submit` and waited for in `collect`.
//!
//! Tokens are chosen on the device, so a step can be submitted before the one before it was read. Steps that only decode
//! are graphs, one for each bucket of batch sizes; all others are launched kernel by kernel. A sequence's numbers depend,
//! within rounding, on how many rows are computed beside it: products of few and of many rows add in different orders.

#[cfg(test)]
pub mod emulated;
pub mod flights;
pub mod forward;
pub mod inputs;
pub mod pool;
pub mod sys;
pub mod weights;

use std::collections::BTreeMap;
use std::sync::Arc;

use baton_shared::id::BlockIndex;
use baton_shared::kv::layout::{InvalidLayout, KvLayout};

use self::flights::Flights;
use self::forward::{Arena, MOST_ALTERNATIVES, Work, splits};
use self::inputs::{Inputs, Places, write_opens};
use self::pool::PoolMemory;
use self::sys::buffer::Buffer;
use self::sys::launch::Kernels;
use self::sys::queue::Graph;
use self::sys::{Gpu, GpuError};
use self::weights::Weights;
use super::{Backend, BackendError, Caps, StepTicket, check, pool_layout};
use crate::engine::step::{Slot, StepOut, StepPlan};
use crate::kv::region::{KvRegion, Region};
use crate::model::{ModelError, ModelSpec, Source};

/// Batch sizes that have a graph.
const BUCKETS: [u32; 13] = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256];

/// How large the pool is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PoolSize {
    /// So many blocks.
    Blocks(u32),
    /// This share of the memory that is free once everything else is there, but no more than so many blocks.
    Share {
        /// Above 0, at most 1.
        fraction: f64,
        /// Blocks.
        most: u32,
    },
}

/// Sizes of a CUDA back end.
#[derive(Clone, Debug)]
pub struct CudaOptions {
    /// Most sequences in one step.
    pub max_sequences: u32,
    /// Most input tokens in one step.
    pub max_batch_tokens: u32,
    /// Tokens of the longest sequence.
    pub max_len: u32,
    /// The pool.
    pub pool: PoolSize,
    /// Tokens of a block; a power of two.
    pub block_tokens: u32,
    /// Whether decode steps are graphs.
    pub graphs: bool,
}

/// Why a CUDA back end cannot start.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// The model's shape.
    #[error("the cuda back end cannot run this model: {0}")]
    Model(String),
    /// The model's files.
    #[error(transparent)]
    Load(#[from] ModelError),
    /// The pool's shape.
    #[error("the pool cannot be: {0}")]
    Layout(#[from] InvalidLayout),
    /// Sizes that cannot be.
    #[error("{0}")]
    Options(String),
    /// The device.
    #[error(transparent)]
    Gpu(#[from] GpuError),
}

/// What the host knows of a slot.
#[derive(Clone, Copy, Debug)]
struct SlotView {
    /// Whether it has a newest token.
    has_last: bool,
    /// Alternatives told of each of its tokens.
    alternatives: u32,
}

/// A model on one GPU. See [`Backend`].
#[derive(Debug)]
pub struct CudaBackend {
    // Graphs name memory of what follows, so they go first.
    graphs: BTreeMap<u32, Graph>,
    flights: Flights,
    caps: Caps,
    pool: KvRegion,
    memory: Arc<PoolMemory>,
    weights: Weights,
    arena: Arena,
    /// What opens slots: records and histories. Grows.
    opens: [Buffer; 2],
    open_bytes: [Vec<u8>; 2],
    kernels: Kernels,
    inputs: Inputs,
    seen: check::Seen,
    slots: Vec<Option<SlotView>>,
    next_ticket: u64,
}

fn device(error: GpuError) -> BackendError {
    BackendError::Device(error.to_string())
}

impl CudaBackend {
    /// Uploads the model's weights, part by part, makes an empty pool and the graphs.
    ///
    /// # Errors
    /// [`CudaError`].
    pub fn load(
        gpu: &Arc<dyn Gpu>,
        source: &mut impl Source,
        options: &CudaOptions,
    ) -> Result<Self, CudaError> {
        if !options.block_tokens.is_power_of_two() {
            let rule = format!("{} tokens a block: not a power of two", options.block_tokens);
            return Err(CudaError::Options(rule));
        }
        let spec = source.spec().clone();
        let weights = Weights::load(gpu, source)?;
        let (rows, sequences) = (options.max_batch_tokens, options.max_sequences);
        let table = options.max_len.div_ceil(options.block_tokens);
        let arena = Arena::new(
            gpu,
            &weights.dims,
            rows.max(sequences),
            sequences,
            table,
            weights.widest(),
        )?;
        let layout = layout(gpu, &spec, options)?;
        let memory = Arc::new(PoolMemory::new(gpu, layout.bytes() as usize)?);
        let open = || Buffer::new(gpu, "slots", 1 << 16);
        let mut backend = Self {
            graphs: BTreeMap::new(),
            flights: Flights::new(gpu, arena.inputs.bytes(), sequences),
            caps: Caps {
                max_sequences: sequences,
                max_batch_tokens: rows,
                vocab: spec.vocab,
                lag: 1,
            },
            seen: check::Seen::new(sequences, layout.blocks),
            pool: KvRegion { region: Region::device(Arc::clone(&memory) as Arc<_>), layout },
            memory,
            weights,
            arena,
            opens: [open()?, open()?],
            open_bytes: [Vec::new(), Vec::new()],
            kernels: Kernels::new(gpu),
            inputs: Inputs::default(),
            slots: vec![None; sequences as usize],
            next_ticket: 0,
        };
        if options.graphs {
            backend.make_graphs()?;
        }
        gpu.synchronise()?;
        Ok(backend)
    }

    /// Its device.
    pub fn gpu(&self) -> &Arc<dyn Gpu> {
        self.kernels.gpu()
    }

    /// Largest first. Each is run as single launches before, so that all that is made at a first use is made.
    fn make_graphs(&mut self) -> Result<(), GpuError> {
        let sequences = self.caps.max_sequences;
        let mut buckets: Vec<u32> = BUCKETS.into_iter().filter(|size| *size <= sequences).collect();
        if buckets.last().is_some_and(|largest| *largest < sequences.min(256)) {
            buckets.push(sequences.min(256));
        }
        let mut flight = self.flights.take(StepTicket(0))?;
        for bucket in buckets.into_iter().rev() {
            let work = self.decode_work(bucket);
            let words = self.inputs_of_nobody(work.places, flight.inputs.bytes_mut());
            flight.inputs.copy_to(self.arena.inputs.view(), words * 4)?;
            self.run(&work)?;
            self.gpu().synchronise()?;
            let graph = Graph::capture(self.gpu(), || self.run(&work))?;
            self.graphs.insert(bucket, graph);
        }
        Ok(())
    }

    fn inputs_of_nobody(&self, places: Places, out: &mut [u8]) -> usize {
        Inputs::default().write(&StepPlan::default(), places, out)
    }

    fn decode_work(&self, rows: u32) -> Work {
        let places = Places { rows, sampled: rows, tiles: 0 };
        let processors = self.gpu().facts().multiprocessors;
        Work { places, decodes: rows, splits: splits(&self.weights.dims, processors, rows) }
    }

    fn run(&self, work: &Work) -> Result<(), GpuError> {
        let pool = (self.memory.buffer().view(), &self.pool.layout);
        forward::run(&self.kernels, &self.weights, &self.arena, pool, work)
    }

    /// Tells the device of slots that begin.
    fn open(&mut self, step: &StepPlan) -> Result<(), GpuError> {
        for open in &step.opens {
            self.slots[open.slot.0 as usize] = Some(SlotView {
                has_last: !open.history.is_empty(),
                alternatives: open.sampling.logprobs.unwrap_or(0).min(MOST_ALTERNATIVES),
            });
        }
        if step.opens.is_empty() {
            return Ok(());
        }
        let [records, history] = &mut self.open_bytes;
        write_opens(&step.opens, records, history);
        for (buffer, bytes) in self.opens.iter_mut().zip(&self.open_bytes) {
            if buffer.bytes() < bytes.len() {
                *buffer = Buffer::new(self.kernels.gpu(), "slots", 2 * bytes.len())?;
            }
            // Waits for the stream: a sequence begins once, and what it brings lies in no pinned memory.
            buffer.write(0, bytes)?;
        }
        let [records, history] = &self.opens;
        self.kernels.open_slots(
            &self.weights.dims,
            records.view(),
            step.opens.len() as u32,
            history.view(),
            self.arena.slots.view(),
            self.arena.counts.view(),
        )
    }

    fn start(&mut self, step: &StepPlan, ticket: StepTicket) -> Result<(), GpuError> {
        self.open(step)?;
        self.inputs.look(step);
        let bucket = self.inputs.is_decode().then(|| self.graphs.range(self.inputs.rows..).next());
        let bucket = bucket.flatten().map(|(size, _)| *size);
        let work = match bucket {
            Some(bucket) => self.decode_work(bucket),
            None => {
                let decodes = self.inputs.decodes;
                let splits = self.decode_work(decodes.max(1)).splits;
                Work { places: self.inputs.places(), decodes, splits }
            }
        };
        let mut flight = self.flights.take(ticket)?;
        let words = self.inputs.write(step, work.places, flight.inputs.bytes_mut());
        flight.inputs.copy_to(self.arena.inputs.view(), words * 4)?;
        match bucket.and_then(|bucket| self.graphs.get(&bucket)) {
            Some(graph) => graph.launch()?,
            None => self.run(&work)?,
        }
        for seq in step.seqs.iter().filter(|seq| seq.sample) {
            if let Some(slot) = &mut self.slots[seq.slot.0 as usize] {
                slot.has_last = true;
            }
        }
        let slots = &self.slots;
        let alternatives = |slot: Slot| slots[slot.0 as usize].map_or(0, |slot| slot.alternatives);
        self.flights.depart(flight, step, &self.arena, alternatives)
    }
}

impl Backend for CudaBackend {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn pool(&self) -> &KvRegion {
        &self.pool
    }

    fn submit(&mut self, step: &StepPlan) -> Result<StepTicket, BackendError> {
        // A token that only the device knows is some token of the vocabulary.
        let last = |slot: Slot| self.slots[slot.0 as usize].map(|slot| slot.has_last.then_some(0));
        check::plan(step, &self.caps, &self.pool.layout, &mut self.seen, last)?;
        let ticket = StepTicket(self.next_ticket);
        self.start(step, ticket).map_err(device)?;
        self.next_ticket += 1;
        Ok(ticket)
    }

    fn collect(&mut self, ticket: StepTicket, out: &mut StepOut) -> Result<(), BackendError> {
        let landed = self.flights.land(ticket, out).map_err(device)?;
        landed.map_err(|oldest| check::not_oldest(ticket, oldest))
    }

    fn copy_blocks(&mut self, pairs: &[(BlockIndex, BlockIndex)]) -> Result<(), BackendError> {
        let layout = &self.pool.layout;
        check::copies(pairs, layout)?;
        let (stride, len) = (layout.stride_block as usize, layout.block_bytes() as usize);
        for (from, to) in pairs.iter().filter(|(from, to)| from != to) {
            let (from, to) = (from.0 as usize * stride, to.0 as usize * stride);
            self.memory.buffer().copy_within(from, to, len).map_err(device)?;
        }
        Ok(())
    }
}

/// How many blocks, and how they lie.
fn layout(
    gpu: &Arc<dyn Gpu>,
    spec: &ModelSpec,
    options: &CudaOptions,
) -> Result<KvLayout, CudaError> {
    let of = |blocks| pool_layout(spec, options.block_tokens, blocks);
    let blocks = match options.pool {
        PoolSize::Blocks(blocks) => blocks,
        PoolSize::Share { fraction, most } => {
            let (free, block) = (gpu.free_memory()?, of(1).block_bytes());
            let blocks = (free as f64 * fraction / block as f64) as u64;
            if blocks == 0 {
                return Err(CudaError::Gpu(GpuError::OutOfMemory {
                    what: format!(
                        "one block of the pool, of a share of {fraction} of what is free,"
                    ),
                    bytes: block,
                    free,
                    total: gpu.facts().memory,
                }));
            }
            u32::try_from(blocks).unwrap_or(u32::MAX).min(most)
        }
    };
    let layout = of(blocks);
    layout.validate()?;
    Ok(layout)
}

#[cfg(test)]
pub mod tests;
