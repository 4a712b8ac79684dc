//! One function a kernel: checks that everything it will touch is there, and starts it.
//!
//! What is on the device cannot be checked here: token ids, slots, positions and block tables come from a checked step
//! plan. Sizes are elements unless said otherwise; the kernels' sources say what they compute.
#![expect(unsafe_code, reason = "kernels get addresses")]

use std::sync::Arc;

use baton_shared::kv::layout::KvLayout;

use super::buffer::View;
use super::kernel::{Args, Kernel, Shape, decode_shared};
use super::products::{Format, Matrix};
use super::{Gpu, GpuError};

/// Numbers of a model that kernels need.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dims {
    /// Width of the residual stream.
    pub hidden: u32,
    /// Width of the feed-forward layer.
    pub ffn: u32,
    /// Query heads.
    pub heads: u32,
    /// KV heads.
    pub kv_heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// Vocabulary.
    pub vocab: u32,
    /// RMSNorm's.
    pub epsilon: f32,
}

/// What a step's rows are, on the device: `u32`s, one a row. A row's block table is `tables` from its `starts` on.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// How many.
    pub count: u32,
    /// Token ids; `u32::MAX` = the slot's newest.
    pub tokens: View<'a>,
    /// Slots.
    pub slots: View<'a>,
    /// Positions; `u32::MAX` = nobody's row.
    pub positions: View<'a>,
    /// Where tables begin.
    pub starts: View<'a>,
    /// Block ids.
    pub tables: View<'a>,
}

/// The pool, and which layer of it.
#[derive(Clone, Copy, Debug)]
pub struct PoolLayer<'a> {
    /// Its memory.
    pub memory: View<'a>,
    /// How it lies.
    pub layout: &'a KvLayout,
    /// Counted from the pool's first.
    pub layer: u32,
}

/// Rows of a tile of prefill attention.
pub const TILE_ROWS: u32 = 128;
/// Bytes of a slot's state, of what opens one, and of a chosen token.
pub const SLOT_BYTES: usize = 64;
/// See [`SLOT_BYTES`].
pub const OPEN_BYTES: usize = 80;
/// See [`SLOT_BYTES`].
pub const CHOSEN_BYTES: usize = 16;
/// Largest parts a sequence is cut into for decode attention.
pub const MOST_SPLITS: u32 = 16;

/// All kernels of one device.
#[derive(Debug)]
pub struct Kernels {
    gpu: Arc<dyn Gpu>,
    all: Vec<Kernel>,
}

pub(super) fn holds(what: &str, view: View<'_>, elements: u64, size: u64) {
    let wanted = elements * size;
    assert!(view.bytes() as u64 >= wanted, "{what}: {} bytes, {wanted} are needed", view.bytes());
}

impl Kernels {
    /// Of a device.
    pub fn new(gpu: &Arc<dyn Gpu>) -> Self {
        Self { gpu: Arc::clone(gpu), all: Kernel::all().collect() }
    }

    /// Whose they are.
    pub fn gpu(&self) -> &Arc<dyn Gpu> {
        &self.gpu
    }

    pub(super) fn start(
        &self,
        name: &str,
        grid: [u32; 3],
        threads: u32,
        shared: u32,
        args: &Args,
    ) -> Result<(), GpuError> {
        if grid.contains(&0) {
            return Ok(());
        }
        let kernel = self.all.iter().find(|kernel| kernel.name == name);
        let kernel = *kernel.expect("the name is of a kernel");
        assert!(shared <= kernel.shared, "{name}: {shared} bytes of shared memory");
        assert!(grid[1] <= 65_535 && grid[2] <= 65_535 && threads <= 1024, "{name}: {grid:?}");
        // SAFETY: the callers below pass what the kernel's source takes, and have checked that it is there.
        unsafe { self.gpu.launch(kernel, Shape { grid, threads, shared }, args) }
    }

    /// Embeddings of all rows into `stream` (f32) and the angles of their positions.
    ///
    /// # Errors
    /// What the device says; so for all of them.
    #[expect(clippy::too_many_arguments, reason = "a kernel's")]
    pub fn embed(
        &self,
        dims: &Dims,
        table: &Matrix,
        rows: &Rows<'_>,
        slots: View<'_>,
        frequencies: View<'_>,
        stream: View<'_>,
        angles: View<'_>,
    ) -> Result<(), GpuError> {
        let (count, pairs) = (u64::from(rows.count), dims.head_dim / 2);
        assert_eq!((table.n, table.k), (dims.vocab, dims.hidden));
        assert!(matches!(table.format, Format::Bf16), "embeddings are bf16");
        holds("tokens", rows.tokens, count, 4);
        holds("slots of rows", rows.slots, count, 4);
        holds("positions", rows.positions, count, 4);
        holds("frequencies", frequencies, u64::from(pairs), 8);
        holds("stream", stream, count * u64::from(dims.hidden), 4);
        holds("angles", angles, count * u64::from(pairs), 8);
        let args = Args::default()
            .u64(table.buffer.address())
            .u64(rows.tokens.address())
            .u64(rows.slots.address())
            .u64(slots.address())
            .u64(rows.positions.address())
            .u64(frequencies.address())
            .u64(stream.address())
            .u64(angles.address())
            .u32(dims.hidden)
            .u32(pairs);
        self.start("embed", [rows.count, 1, 1], 256, 0, &args)
    }

    /// RMSNorm of `count` rows of `stream`: of the first, or of those that `rows` names.
    ///
    /// # Errors
    /// What the device says.
    pub fn rms_norm(
        &self,
        dims: &Dims,
        stream: View<'_>,
        weight: View<'_>,
        rows: Option<View<'_>>,
        count: u32,
        out: View<'_>,
    ) -> Result<(), GpuError> {
        let hidden = u64::from(dims.hidden);
        holds("norm", weight, hidden, 4);
        holds("normalised", out, u64::from(count) * hidden, 2);
        match rows {
            Some(rows) => holds("rows", rows, u64::from(count), 4),
            None => holds("stream", stream, u64::from(count) * hidden, 4),
        }
        // Few rows: as quick as can be. Many: as many at a time as can be.
        let most = if count > 256 { 256 } else { 1024 };
        let threads = (dims.hidden / 4).next_multiple_of(32).clamp(32, most);
        let args = Args::default()
            .u64(stream.address())
            .u64(weight.address())
            .u64(rows.map_or(0, View::address))
            .u64(out.address())
            .u32(dims.hidden)
            .f32(dims.epsilon);
        self.start("rms_norm", [count, 1, 1], threads, 128, &args)
    }

    /// Bias, norms and positions of queries, keys and values; keys and values go into the pool.
    ///
    /// # Errors
    /// What the device says.
    #[expect(clippy::too_many_arguments, reason = "a kernel's")]
    pub fn turn_and_store(
        &self,
        dims: &Dims,
        qkv: View<'_>,
        bias: Option<View<'_>>,
        norms: Option<(View<'_>, View<'_>)>,
        angles: View<'_>,
        rows: &Rows<'_>,
        pool: &PoolLayer<'_>,
        queries: View<'_>,
    ) -> Result<(), GpuError> {
        let (count, size) = (u64::from(rows.count), u64::from(dims.head_dim));
        let all = dims.heads + 2 * dims.kv_heads;
        holds("qkv", qkv, count * u64::from(all) * size, 2);
        holds("angles", angles, count * size / 2, 8);
        holds("queries", queries, count * u64::from(dims.heads) * size, 2);
        if let Some(bias) = bias {
            holds("bias", bias, u64::from(all) * size, 4);
        }
        for norm in norms.iter().flat_map(|(query, key)| [query, key]) {
            holds("head norm", *norm, size, 4);
        }
        let args = Args::default()
            .u64(qkv.address())
            .u64(bias.map_or(0, View::address))
            .u64(norms.map_or(0, |norms| norms.0.address()))
            .u64(norms.map_or(0, |norms| norms.1.address()))
            .u64(angles.address())
            .u64(rows.positions.address())
            .u64(rows.starts.address())
            .u64(rows.tables.address())
            .words(&pool_words(dims, rows, pool))
            .u32(pool.layer)
            .u64(queries.address())
            .u32(dims.heads)
            .u32(dims.kv_heads)
            .f32(dims.epsilon);
        self.start("turn_and_store", [rows.count, all.div_ceil(8), 1], 256, 0, &args)
    }

    /// Attention of the first `count` rows, one of each sequence, cut into `splits` parts that meet in `sums` and
    /// `states` (f32 and pairs of f32); `ended` counts them, and is 0 before and after.
    ///
    /// # Errors
    /// What the device says.
    #[expect(clippy::too_many_arguments, reason = "a kernel's")]
    pub fn decode_attention(
        &self,
        dims: &Dims,
        queries: View<'_>,
        rows: &Rows<'_>,
        count: u32,
        splits: u32,
        pool: &PoolLayer<'_>,
        [sums, states, ended]: [View<'_>; 3],
        out: View<'_>,
    ) -> Result<(), GpuError> {
        let size = dims.head_dim;
        let heads = u64::from(count) * u64::from(dims.heads);
        assert!(count <= rows.count && (1..=MOST_SPLITS).contains(&splits));
        holds("queries", queries, heads * u64::from(size), 2);
        holds("attended", out, heads * u64::from(size), 2);
        if splits > 1 {
            holds("sums", sums, heads * u64::from(splits) * u64::from(size), 4);
            holds("states", states, heads * u64::from(splits), 8);
        }
        let group = dims.heads / dims.kv_heads;
        let args = Args::default()
            .u64(queries.address())
            .words(&pool_words(dims, rows, pool))
            .u32(pool.layer)
            .u64(rows.positions.address())
            .u64(rows.starts.address())
            .u64(rows.tables.address())
            .u32(dims.heads)
            .u32(dims.kv_heads)
            .f32(scale(size))
            .u64(out.address())
            .u64(sums.address())
            .u64(states.address())
            .u64(ended.address());
        let grid = [splits, dims.kv_heads * group.div_ceil(16), count];
        let blocks = u64::from(count) * u64::from(grid[1]);
        holds("ended parts", ended, if splits > 1 { blocks } else { 0 }, 4);
        self.start(&format!("decode_{size}"), grid, 128, decode_shared(size), &args)
    }

    /// Attention of tiles of rows: `u32`s `[tile][first row, rows, position, start of table]`.
    ///
    /// # Errors
    /// What the device says.
    #[expect(clippy::too_many_arguments, reason = "a kernel's")]
    pub fn prefill_attention(
        &self,
        dims: &Dims,
        queries: View<'_>,
        rows: &Rows<'_>,
        tiles: View<'_>,
        count: u32,
        pool: &PoolLayer<'_>,
        out: View<'_>,
    ) -> Result<(), GpuError> {
        let size = dims.head_dim;
        let elements = u64::from(rows.count) * u64::from(dims.heads) * u64::from(size);
        holds("queries", queries, elements, 2);
        holds("attended", out, elements, 2);
        holds("tiles", tiles, u64::from(count), 16);
        let args = Args::default()
            .u64(queries.address())
            .words(&pool_words(dims, rows, pool))
            .u32(pool.layer)
            .u64(tiles.address())
            .u64(rows.tables.address())
            .u32(dims.heads)
            .u32(dims.kv_heads)
            .f32(scale(size))
            .u64(out.address());
        let shared = (128 + 256) * size * 2;
        self.start(&format!("prefill_{size}"), [dims.heads, count, 1], 128, shared, &args)
    }

    /// Begins `count` slots: [`OPEN_BYTES`] each.
    ///
    /// # Errors
    /// What the device says.
    pub fn open_slots(
        &self,
        dims: &Dims,
        opens: View<'_>,
        count: u32,
        history: View<'_>,
        slots: View<'_>,
        counts: View<'_>,
    ) -> Result<(), GpuError> {
        holds("opens", opens, u64::from(count), OPEN_BYTES as u64);
        let args = Args::default()
            .u64(opens.address())
            .u64(history.address())
            .u64(slots.address())
            .u64(counts.address())
            .u32(dims.vocab);
        self.start("open_slots", [count, 1, 1], 1024, 0, &args)
    }

    /// A token for each of `count` rows of `logits`; `sampled` names their slots. `weights` is as large as the logits,
    /// `chosen` has [`CHOSEN_BYTES`] a row, `alternatives` `most` pairs.
    ///
    /// # Errors
    /// What the device says.
    #[expect(clippy::too_many_arguments, reason = "a kernel's")]
    pub fn sample(
        &self,
        dims: &Dims,
        logits: View<'_>,
        weights: View<'_>,
        sampled: View<'_>,
        count: u32,
        slots: View<'_>,
        counts: View<'_>,
        (chosen, alternatives): (View<'_>, View<'_>),
        most: u32,
    ) -> Result<(), GpuError> {
        let all = u64::from(count) * u64::from(dims.vocab);
        holds("logits", logits, all, 4);
        holds("weights", weights, all, 4);
        holds("sampled", sampled, u64::from(count), 4);
        holds("chosen", chosen, u64::from(count), CHOSEN_BYTES as u64);
        holds("alternatives", alternatives, u64::from(count) * u64::from(most), 8);
        let args = Args::default()
            .u64(logits.address())
            .u64(weights.address())
            .u64(sampled.address())
            .u64(slots.address())
            .u64(counts.address())
            .u64(chosen.address())
            .u64(alternatives.address())
            .u32(dims.vocab)
            .u32(most);
        self.start("sample", [count, 1, 1], 1024, (34 + 2048) * 8, &args)
    }
}

/// What scores are multiplied by so that their powers of two are the softmax's.
fn scale(head_dim: u32) -> f32 {
    std::f32::consts::LOG2_E / (head_dim as f32).sqrt()
}

/// `struct Pool` of `kernels/prelude.cuh`.
fn pool_words(dims: &Dims, rows: &Rows<'_>, pool: &PoolLayer<'_>) -> [u64; 6] {
    let PoolLayer { memory, layout, layer } = pool;
    holds("positions", rows.positions, u64::from(rows.count), 4);
    holds("starts", rows.starts, u64::from(rows.count), 4);
    holds("pool", *memory, layout.bytes(), 1);
    assert!(layout.block_tokens.is_power_of_two() && layout.head_dim == dims.head_dim);
    assert!(*layer < layout.layers.end - layout.layers.start);
    assert_eq!(layout.heads.end - layout.heads.start, dims.kv_heads);
    let shift = layout.block_tokens.trailing_zeros();
    [
        memory.address(),
        layout.stride_block,
        layout.stride_layer,
        layout.stride_head,
        layout.stride_kv,
        u64::from(shift) | u64::from(layout.head_dim) << 32,
    ]
}
