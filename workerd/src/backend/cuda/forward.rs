//! A Llama block after another on the device: the launches of one step, from token ids to chosen tokens.
//!
//! Everything is asked for in order in one stream; nothing here waits. Which step it is, and where its inputs lie, is
//! given; so the same calls can be captured as a graph.

use std::sync::Arc;

use baton_shared::kv::layout::KvLayout;

use super::inputs::Places;
use super::sys::buffer::{Buffer, View};
use super::sys::launch::{CHOSEN_BYTES, Dims, Kernels, MOST_SPLITS, PoolLayer, Rows, SLOT_BYTES};
use super::sys::products::{Mode, Spare};
use super::sys::{Gpu, GpuError};
use super::weights::Weights;

/// Alternatives of a sampled token that can be told.
pub const MOST_ALTERNATIVES: u32 = 128;

/// Activations and sampler state, for the largest step.
#[derive(Debug)]
pub struct Arena {
    /// A step's inputs ([`Places`]).
    pub inputs: Buffer,
    /// [`SLOT_BYTES`] a slot.
    pub slots: Buffer,
    /// `[slot][vocab]` `u32`.
    pub counts: Buffer,
    /// [`CHOSEN_BYTES`] a sampled row.
    pub chosen: Buffer,
    /// [`MOST_ALTERNATIVES`] pairs a sampled row.
    pub alternatives: Buffer,
    /// f32 `[row][hidden]`: the residual stream.
    stream: Buffer,
    /// bf16 `[row][hidden]`.
    normed: Buffer,
    angles: Buffer,
    qkv: Buffer,
    queries: Buffer,
    attended: Buffer,
    /// bf16 `[row][2 ffn]`, where the vendor's library multiplies.
    gate_up: Buffer,
    /// bf16, the largest matrix of one byte.
    wide: Buffer,
    activated: Buffer,
    sums: Buffer,
    states: Buffer,
    ended: Buffer,
    logits: Buffer,
    weights: Buffer,
}

/// What of a step the launches depend on.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// Where its inputs lie.
    pub places: Places,
    /// Sequences at the front with one row each.
    pub decodes: u32,
    /// Parts that each of them is cut into.
    pub splits: u32,
}

/// How many parts the attention of so many sequences is cut into: at most two blocks for each multiprocessor, which is
/// what it holds at a time.
pub fn splits(dims: &Dims, multiprocessors: u32, decodes: u32) -> u32 {
    let blocks = decodes.max(1) * dims.kv_heads * (dims.heads / dims.kv_heads).div_ceil(16);
    (2 * multiprocessors / blocks).clamp(1, MOST_SPLITS)
}

impl Arena {
    /// For steps of at most `rows` rows of `sequences` sequences, whose block tables have `table` blocks at most; the
    /// largest matrix of weights of one byte has `wide` elements.
    ///
    /// # Errors
    /// [`GpuError`].
    pub fn new(
        gpu: &Arc<dyn Gpu>,
        dims: &Dims,
        rows: u32,
        sequences: u32,
        table: u32,
        wide: usize,
    ) -> Result<Self, GpuError> {
        let (r, s) = (rows as usize, sequences as usize);
        let [hidden, ffn, vocab] = [dims.hidden, dims.ffn, dims.vocab].map(|n| n as usize);
        let [size, heads, kv_heads] =
            [dims.head_dim, dims.heads, dims.kv_heads].map(|n| n as usize);
        let processors = gpu.facts().multiprocessors;
        let parts = (1..=sequences).map(|count| count * splits(dims, processors, count)).max();
        let parts = parts.unwrap_or(1) as usize * heads;
        let buffer = |bytes: usize| Buffer::new(gpu, "activations", bytes);
        // Tiles of at least one row each: as many as there are sequences more than full ones.
        let largest = Places { rows, sampled: sequences, tiles: rows.div_ceil(128) + sequences };
        let inputs = 4 * (largest.tables() + s * table as usize);
        let arena = Self {
            inputs: buffer(inputs)?,
            slots: buffer(s * SLOT_BYTES)?,
            counts: buffer(s * vocab * 4)?,
            chosen: buffer(s * CHOSEN_BYTES)?,
            alternatives: buffer(s * MOST_ALTERNATIVES as usize * 8)?,
            stream: buffer(r * hidden * 4)?,
            normed: buffer(r.max(s) * hidden * 2)?,
            angles: buffer(r * size * 4)?,
            qkv: buffer(r * (heads + 2 * kv_heads) * size * 2)?,
            queries: buffer(r * heads * size * 2)?,
            attended: buffer(r * heads * size * 2)?,
            gate_up: buffer(if gpu.has_blas() { r * ffn * 4 } else { 0 })?,
            wide: buffer(wide * 2)?,
            activated: buffer(r * ffn * 2)?,
            sums: buffer(parts * size * 4)?,
            states: buffer(parts * 8)?,
            ended: buffer(s * heads * 4)?,
            logits: buffer(s * vocab * 4)?,
            weights: buffer(s * vocab * 4)?,
        };
        // Rows of nobody are computed with whatever is there: let it be numbers.
        arena.ended.fill(0)?;
        for buffer in [&arena.slots, &arena.queries, &arena.attended, &arena.qkv, &arena.stream] {
            buffer.fill(0)?;
        }
        Ok(arena)
    }

    fn words(&self, at: usize, count: u32) -> View<'_> {
        self.inputs.view().part(4 * at, 4 * count as usize)
    }

    fn spare(&self) -> Spare<'_> {
        Spare { gate_up: self.gate_up.view(), wide: self.wide.view() }
    }

    /// The rows of a step whose inputs lie at `places`.
    pub fn rows(&self, places: Places) -> Rows<'_> {
        let tables = 4 * places.tables();
        Rows {
            count: places.rows,
            tokens: self.words(places.tokens(), places.rows),
            slots: self.words(places.slots(), places.rows),
            positions: self.words(places.positions(), places.rows),
            starts: self.words(places.starts(), places.rows),
            tables: self.inputs.view().part(tables, self.inputs.bytes() - tables),
        }
    }
}

/// Asks for a whole step.
///
/// # Errors
/// What the device says.
pub fn run(
    kernels: &Kernels,
    weights: &Weights,
    arena: &Arena,
    (memory, layout): (View<'_>, &KvLayout),
    work: &Work,
) -> Result<(), GpuError> {
    let Work { places, .. } = *work;
    let (dims, rows) = (&weights.dims, arena.rows(places));
    let (stream, normed, spare) = (arena.stream.view(), arena.normed.view(), arena.spare());
    kernels.embed(
        dims,
        &weights.embedding,
        &rows,
        arena.slots.view(),
        weights.frequencies.view(),
        stream,
        arena.angles.view(),
    )?;
    for (layer, block) in (0..).zip(&weights.blocks) {
        kernels.rms_norm(dims, stream, block.attention_norm.view(), None, rows.count, normed)?;
        let qkv = arena.qkv.view();
        kernels.multiply(Mode::Bf16, &block.qkv, normed, rows.count, qkv, spare)?;
        let pool = PoolLayer { memory, layout, layer };
        kernels.turn_and_store(
            dims,
            qkv,
            block.bias.as_ref().map(Buffer::view),
            block.norms.as_ref().map(|[query, key]| (query.view(), key.view())),
            arena.angles.view(),
            &rows,
            &pool,
            arena.queries.view(),
        )?;
        attend(kernels, dims, arena, &rows, &pool, work)?;
        let attended = arena.attended.view();
        kernels.multiply(Mode::Add, &block.output, attended, rows.count, stream, spare)?;
        kernels.rms_norm(dims, stream, block.ffn_norm.view(), None, rows.count, normed)?;
        let activated = arena.activated.view();
        kernels.multiply(Mode::Swiglu, &block.gate_up, normed, rows.count, activated, spare)?;
        kernels.multiply(Mode::Add, &block.down, activated, rows.count, stream, spare)?;
    }
    choose(kernels, weights, arena, places)
}

fn attend(
    kernels: &Kernels,
    dims: &Dims,
    arena: &Arena,
    rows: &Rows<'_>,
    pool: &PoolLayer<'_>,
    work: &Work,
) -> Result<(), GpuError> {
    let (queries, attended) = (arena.queries.view(), arena.attended.view());
    if work.decodes > 0 {
        let parts = [arena.sums.view(), arena.states.view(), arena.ended.view()];
        let (count, splits) = (work.decodes, work.splits);
        kernels.decode_attention(dims, queries, rows, count, splits, pool, parts, attended)?;
    }
    let tiles = arena.words(work.places.tile_words(), 4 * work.places.tiles);
    kernels.prefill_attention(dims, queries, rows, tiles, work.places.tiles, pool, attended)
}

/// Logits of the rows that sample, and their tokens.
fn choose(
    kernels: &Kernels,
    weights: &Weights,
    arena: &Arena,
    places: Places,
) -> Result<(), GpuError> {
    let (dims, count) = (&weights.dims, places.sampled);
    if count == 0 {
        return Ok(());
    }
    let (normed, logits) = (arena.normed.view(), arena.logits.view());
    let rows = arena.words(places.sampled_rows(), count);
    let norm = weights.final_norm.view();
    kernels.rms_norm(dims, arena.stream.view(), norm, Some(rows), count, normed)?;
    kernels.multiply(Mode::F32, weights.head(), normed, count, logits, arena.spare())?;
    kernels.sample(
        dims,
        logits,
        arena.weights.view(),
        arena.words(places.sampled_slots(), count),
        count,
        arena.slots.view(),
        arena.counts.view(),
        (arena.chosen.view(), arena.alternatives.view()),
        MOST_ALTERNATIVES,
    )
}
