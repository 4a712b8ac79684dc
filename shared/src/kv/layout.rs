//! How a pool of cached keys and values lies in memory, and what of two pools lies alike.
//!
//! `address(block, layer, head, kv, token) = base + block·S_b + layer·S_l + head·S_h + kv·S_kv + token·head_dim·element`,
//! layer and head counted from the start of the rank's range. All strides are data that peers exchange: nothing
//! may assume an order. The default is block-major, `[block][layer][kv_head][K|V][token][head_dim]`, so one block
//! of all layers is one contiguous range. Offsets here are bytes from the pool's base; addresses are the callers'.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::id::BlockIndex;

/// Element type of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvDtype {
    /// Two bytes, the upper half of an f32.
    Bf16,
}

impl KvDtype {
    /// Bytes of one element.
    pub fn bytes(self) -> u64 {
        match self {
            Self::Bf16 => 2,
        }
    }

    /// The name used in messages and hashes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
        }
    }
}

/// Strides in bytes and ranges of one rank's pool. Layers and heads are numbered over the whole model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvLayout {
    /// Element type.
    pub dtype: KvDtype,
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Elements of one head's vector.
    pub head_dim: u32,
    /// Blocks in the pool.
    pub blocks: u32,
    /// Layers this rank holds.
    pub layers: Range<u32>,
    /// KV heads this rank holds.
    pub heads: Range<u32>,
    /// Bytes from one block to the next.
    pub stride_block: u64,
    /// Bytes from one layer to the next.
    pub stride_layer: u64,
    /// Bytes from one head to the next.
    pub stride_head: u64,
    /// Bytes from K to V.
    pub stride_kv: u64,
}

/// `len` bytes at `source` (offset in the peer's pool) to `target` (offset in ours).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyRun {
    /// Offset in the pool that is read.
    pub source: u64,
    /// Offset in the pool that is written.
    pub target: u64,
    /// Bytes.
    pub len: u64,
}

/// A layout that cannot be: some number is zero, overflows, or two elements would share a byte.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidLayout {
    /// A dimension without elements.
    #[error("kv layout has no `{0}`")]
    Empty(&'static str),
    /// More bytes than an address space has.
    #[error("kv layout spans more than 2^62 bytes")]
    TooLarge,
    /// Two elements at one place.
    #[error("kv layout overlaps: `{dimension}` steps by {stride} bytes over {extent} bytes")]
    Overlap {
        /// Which stride.
        dimension: &'static str,
        /// Its bytes.
        stride: u64,
        /// Bytes of what is stepped over.
        extent: u64,
    },
}

/// Why nothing can be copied from one pool to another. `theirs` is the source.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutMismatch {
    /// Element types differ.
    #[error("kv dtype is {theirs} there and {ours} here")]
    Dtype {
        /// The source's.
        theirs: &'static str,
        /// The target's.
        ours: &'static str,
    },
    /// A dimension differs.
    #[error("`{dimension}` is {theirs} there and {ours} here")]
    Dimension {
        /// Which.
        dimension: &'static str,
        /// The source's.
        theirs: u32,
        /// The target's.
        ours: u32,
    },
    /// One of the layouts cannot be.
    #[error(transparent)]
    Invalid(#[from] InvalidLayout),
    /// A block id outside its pool.
    #[error("block {block} is outside a pool of {blocks} blocks")]
    NoSuchBlock {
        /// The id.
        block: u32,
        /// Blocks in that pool.
        blocks: u32,
    },
    /// As many blocks must be read as written.
    #[error("{theirs} blocks there for {ours} here")]
    BlockCount {
        /// Source blocks.
        theirs: u64,
        /// Target blocks.
        ours: u64,
    },
}

impl KvLayout {
    /// The default order, `[block][layer][kv_head][K|V][token][head_dim]`, without gaps.
    pub fn block_major(
        dtype: KvDtype,
        block_tokens: u32,
        head_dim: u32,
        blocks: u32,
        layers: Range<u32>,
        heads: Range<u32>,
    ) -> Self {
        let stride_kv = u64::from(block_tokens) * u64::from(head_dim) * dtype.bytes();
        let stride_head = stride_kv.saturating_mul(2);
        let stride_layer = stride_head.saturating_mul(u64::from(count(&heads)));
        let stride_block = stride_layer.saturating_mul(u64::from(count(&layers)));
        Self {
            dtype,
            block_tokens,
            head_dim,
            blocks,
            layers,
            heads,
            stride_block,
            stride_layer,
            stride_head,
            stride_kv,
        }
    }

    /// Bytes of one block's keys and values, all layers and heads of this rank; gaps not counted.
    pub fn block_bytes(&self) -> u64 {
        let vectors = u64::from(count(&self.layers)) * u64::from(count(&self.heads));
        vectors.saturating_mul(2).saturating_mul(self.plane_bytes())
    }

    /// Bytes from the pool's base to the end of its last element.
    pub fn bytes(&self) -> u64 {
        self.dimensions().iter().fold(self.plane_bytes(), |bytes, &(_, count, stride)| {
            bytes.saturating_add(u64::from(count).saturating_sub(1).saturating_mul(stride))
        })
    }

    /// Offset of the first token's vector of a layer and head (model numbers), K (0) or V (1).
    pub fn offset(&self, block: BlockIndex, layer: u32, head: u32, kv: u32) -> u64 {
        u64::from(block.0) * self.stride_block
            + u64::from(layer - self.layers.start) * self.stride_layer
            + u64::from(head - self.heads.start) * self.stride_head
            + u64::from(kv) * self.stride_kv
    }

    /// Whether every element has a place of its own below 2^62.
    ///
    /// # Errors
    /// [`InvalidLayout`].
    pub fn validate(&self) -> Result<(), InvalidLayout> {
        for (name, count) in [
            ("block_tokens", self.block_tokens),
            ("head_dim", self.head_dim),
            ("blocks", self.blocks),
            ("layers", count(&self.layers)),
            ("heads", count(&self.heads)),
        ] {
            if count == 0 {
                return Err(InvalidLayout::Empty(name));
            }
        }
        if self.bytes() > 1 << 62 {
            return Err(InvalidLayout::TooLarge);
        }
        // Ordered by stride, each dimension must step over the whole extent of the smaller ones.
        let mut dimensions = self.dimensions();
        dimensions.sort_by_key(|&(_, _, stride)| stride);
        let mut extent = self.plane_bytes();
        for (dimension, count, stride) in dimensions {
            if count > 1 {
                if stride < extent {
                    return Err(InvalidLayout::Overlap { dimension, stride, extent });
                }
                extent += stride * u64::from(count - 1);
            }
        }
        Ok(())
    }

    /// Bytes of the tokens of one head, K or V: the largest piece that is always contiguous.
    fn plane_bytes(&self) -> u64 {
        (u64::from(self.block_tokens) * u64::from(self.head_dim)).saturating_mul(self.dtype.bytes())
    }

    fn dimensions(&self) -> [(&'static str, u32, u64); 4] {
        [
            ("stride_kv", 2, self.stride_kv),
            ("stride_head", count(&self.heads), self.stride_head),
            ("stride_layer", count(&self.layers), self.stride_layer),
            ("stride_block", self.blocks, self.stride_block),
        ]
    }
}

/// What to copy so that block `i` of `source_blocks` arrives in block `i` of `target_blocks`: the layers and heads
/// both ranks hold, ordered by source, with neighbours (on both sides) merged.
///
/// # Errors
/// [`LayoutMismatch`]: element type, tokens a block and head size must be equal, every block must exist.
pub fn intersect(
    source: &KvLayout,
    source_blocks: &[Range<u32>],
    target: &KvLayout,
    target_blocks: &[BlockIndex],
) -> Result<Vec<CopyRun>, LayoutMismatch> {
    same_shape(source, target)?;
    let theirs = source_blocks.iter().map(|run| u64::from(count(run))).sum();
    let ours = target_blocks.len() as u64;
    if theirs != ours {
        return Err(LayoutMismatch::BlockCount { theirs, ours });
    }
    for run in source_blocks.iter().filter(|run| !run.is_empty()) {
        within(run.end - 1, source)?;
    }
    for block in target_blocks {
        within(block.0, target)?;
    }
    let pieces = pieces_of_a_block(source, target);
    let mut runs = Vec::with_capacity(pieces.len() * target_blocks.len());
    for (from, &BlockIndex(to)) in source_blocks.iter().cloned().flatten().zip(target_blocks) {
        let (from, to) =
            (u64::from(from) * source.stride_block, u64::from(to) * target.stride_block);
        runs.extend(pieces.iter().map(|piece| CopyRun {
            source: from + piece.source,
            target: to + piece.target,
            len: piece.len,
        }));
    }
    Ok(merged(runs))
}

/// Whether blocks of one pool can be blocks of another.
///
/// # Errors
/// [`LayoutMismatch`].
pub fn same_shape(source: &KvLayout, target: &KvLayout) -> Result<(), LayoutMismatch> {
    source.validate()?;
    target.validate()?;
    if source.dtype != target.dtype {
        return Err(LayoutMismatch::Dtype {
            theirs: source.dtype.name(),
            ours: target.dtype.name(),
        });
    }
    for (dimension, theirs, ours) in [
        ("block_tokens", source.block_tokens, target.block_tokens),
        ("head_dim", source.head_dim, target.head_dim),
    ] {
        if theirs != ours {
            return Err(LayoutMismatch::Dimension { dimension, theirs, ours });
        }
    }
    Ok(())
}

/// Runs inside block 0 of both, merged.
fn pieces_of_a_block(source: &KvLayout, target: &KvLayout) -> Vec<CopyRun> {
    let block = BlockIndex(0);
    let mut pieces = Vec::new();
    for layer in common(&source.layers, &target.layers) {
        for head in common(&source.heads, &target.heads) {
            for kv in 0..2 {
                pieces.push(CopyRun {
                    source: source.offset(block, layer, head, kv),
                    target: target.offset(block, layer, head, kv),
                    len: source.plane_bytes(),
                });
            }
        }
    }
    merged(pieces)
}

fn merged(mut runs: Vec<CopyRun>) -> Vec<CopyRun> {
    runs.sort_by_key(|run| run.source);
    runs.dedup_by(|next, run| {
        let neighbours = run.source + run.len == next.source && run.target + run.len == next.target;
        if neighbours {
            run.len += next.len;
        }
        neighbours
    });
    runs
}

fn within(block: u32, layout: &KvLayout) -> Result<(), LayoutMismatch> {
    if block < layout.blocks {
        Ok(())
    } else {
        Err(LayoutMismatch::NoSuchBlock { block, blocks: layout.blocks })
    }
}

fn common(a: &Range<u32>, b: &Range<u32>) -> Range<u32> {
    a.start.max(b.start)..a.end.min(b.end)
}

fn count(range: &Range<u32>) -> u32 {
    range.end.saturating_sub(range.start)
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "a list of one run of blocks")]
mod tests {
    use super::*;

    fn block_major(blocks: u32) -> KvLayout {
        KvLayout::block_major(KvDtype::Bf16, 32, 64, blocks, 0..30, 0..3)
    }

    fn layer_major(blocks: u32) -> KvLayout {
        let plane = 32 * 64 * 2;
        KvLayout {
            stride_kv: plane,
            stride_head: 2 * plane,
            stride_block: 6 * plane,
            stride_layer: 6 * plane * u64::from(blocks),
            ..block_major(blocks)
        }
    }

    fn ids(blocks: &[u32]) -> Vec<BlockIndex> {
        blocks.iter().copied().map(BlockIndex).collect()
    }

    /// Copies by the definition of an address, element by element.
    fn expected(
        source: &KvLayout,
        from: &[u32],
        target: &KvLayout,
        to: &[u32],
    ) -> std::collections::BTreeMap<u64, u64> {
        let mut map = std::collections::BTreeMap::new();
        for (&from, &to) in from.iter().zip(to) {
            for layer in common(&source.layers, &target.layers) {
                for head in common(&source.heads, &target.heads) {
                    for kv in 0..2 {
                        for byte in (0..source.plane_bytes()).step_by(512) {
                            map.insert(
                                target.offset(BlockIndex(to), layer, head, kv) + byte,
                                source.offset(BlockIndex(from), layer, head, kv) + byte,
                            );
                        }
                    }
                }
            }
        }
        map
    }

    fn by_512_bytes(runs: &[CopyRun]) -> std::collections::BTreeMap<u64, u64> {
        runs.iter()
            .flat_map(|run| {
                (0..run.len).step_by(512).map(move |byte| (run.target + byte, run.source + byte))
            })
            .collect()
    }

    #[test]
    fn a_block_of_the_default_layout_is_one_contiguous_range() {
        let layout = block_major(8);
        assert_eq!(layout.block_bytes(), 30 * 3 * 2 * 32 * 64 * 2);
        assert_eq!(layout.stride_block, layout.block_bytes());
        assert_eq!(layout.bytes(), 8 * layout.block_bytes());
        assert_eq!(layout.validate(), Ok(()));
        let runs = intersect(&layout, &[3..4], &layout, &ids(&[5])).unwrap();
        let block = layout.block_bytes();
        assert_eq!(runs, [CopyRun { source: 3 * block, target: 5 * block, len: block }]);
    }

    #[test]
    fn neighbours_on_both_sides_are_one_run_and_others_are_not() {
        let layout = block_major(16);
        let block = layout.block_bytes();
        let runs = intersect(&layout, &[0..4, 8..9], &layout, &ids(&[2, 3, 7, 8, 9])).unwrap();
        assert_eq!(
            runs,
            [
                CopyRun { source: 0, target: 2 * block, len: 2 * block },
                CopyRun { source: 2 * block, target: 7 * block, len: 2 * block },
                CopyRun { source: 8 * block, target: 9 * block, len: block },
            ]
        );
        // Descending on both sides: still neighbours.
        let runs = intersect(&layout, &[5..6, 4..5], &layout, &ids(&[9, 8])).unwrap();
        assert_eq!(runs, [CopyRun { source: 4 * block, target: 8 * block, len: 2 * block }]);
    }

    #[test]
    fn any_strides_and_ranges_copy_what_the_address_formula_says() {
        let narrow = KvLayout::block_major(KvDtype::Bf16, 32, 64, 16, 10..20, 1..3);
        let head_first = KvLayout {
            stride_kv: 30 * 3 * 4096,
            stride_head: 30 * 4096,
            stride_layer: 4096,
            ..block_major(16)
        };
        let pools = [block_major(16), layer_major(16), narrow, head_first];
        let (from, to) = ([1, 2, 3, 7, 0], [4, 5, 9, 15, 3]);
        for source in &pools {
            for target in &pools {
                assert_eq!(source.validate(), Ok(()));
                let runs = intersect(source, &[1..4, 7..8, 0..1], target, &ids(&to)).unwrap();
                assert_eq!(by_512_bytes(&runs), expected(source, &from, target, &to));
                for (run, next) in runs.iter().zip(&runs[1..]) {
                    let (source_end, target_end) = (run.source + run.len, run.target + run.len);
                    assert!(source_end != next.source || target_end != next.target, "not merged");
                }
            }
        }
        let layer_runs =
            intersect(&layer_major(16), &[1..4], &layer_major(16), &ids(&[4, 5, 6])).unwrap();
        assert_eq!(layer_runs.len(), 30, "one run a layer");
    }

    #[test]
    fn pools_that_differ_in_shape_are_refused_by_name() {
        let ours = block_major(8);
        let theirs = KvLayout::block_major(KvDtype::Bf16, 16, 64, 8, 0..30, 0..3);
        assert_eq!(
            intersect(&theirs, &[], &ours, &[]).unwrap_err().to_string(),
            "`block_tokens` is 16 there and 32 here"
        );
        let no_block = intersect(&ours, &[7..9], &ours, &ids(&[0, 1]));
        assert_eq!(no_block, Err(LayoutMismatch::NoSuchBlock { block: 8, blocks: 8 }));
        let no_block = intersect(&ours, &[0..1], &ours, &ids(&[8]));
        assert_eq!(no_block, Err(LayoutMismatch::NoSuchBlock { block: 8, blocks: 8 }));
        let uneven = intersect(&ours, &[0..2], &ours, &ids(&[1]));
        assert_eq!(uneven, Err(LayoutMismatch::BlockCount { theirs: 2, ours: 1 }));
    }

    #[test]
    fn layouts_without_elements_or_with_shared_bytes_or_beyond_memory_are_invalid() {
        let good = block_major(8);
        let empty = KvLayout { layers: 4..4, ..good.clone() };
        assert_eq!(empty.validate(), Err(InvalidLayout::Empty("layers")));
        let huge = KvLayout { stride_block: u64::MAX / 2, ..good.clone() };
        assert_eq!(huge.validate(), Err(InvalidLayout::TooLarge));
        let shared = KvLayout { stride_layer: good.stride_head, ..good };
        assert!(matches!(shared.validate(), Err(InvalidLayout::Overlap { .. })));
    }
}
