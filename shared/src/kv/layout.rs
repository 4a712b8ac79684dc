//! How a pool of cached keys and values lies in memory, and what of two pools lies alike.
//!
//! `address(block, layer, head, kv, token) = base + block·S_b + layer·S_l + head·S_h + kv·S_kv + token·head_dim·element`.
//! All strides are data that peers exchange: nothing may assume an order. The default is block-major,
//! `[block][layer][kv_head][K|V][token][head_dim]`, so one block of all layers is one contiguous range.

use std::ops::Range;

use serde::{Deserialize, Serialize};

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
