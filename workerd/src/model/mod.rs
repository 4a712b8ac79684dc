//! A model on disk: what shape it has ([`spec`]), and its tensors, loaded into one form.
//!
//! [`load()`] is the way in. [`gguf`], and [`config_json`] with [`safetensors`], read one format each into a
//! [`ModelSpec`] and a table of [`tensors`]; [`dequantize`](dequantize()) says what stored bytes mean.

pub mod config_json;
pub mod dequantize;
pub mod error;
pub mod gguf;
pub mod load;
pub mod safetensors;
pub mod spec;
pub mod tensors;
#[cfg(test)]
mod tests;

use std::sync::Arc;

pub use dequantize::dequantize;
pub use error::ModelError;
pub use load::load;

/// Shape and constants of a Llama-like model; every number was checked to be usable.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// `llama`, …: as the file says.
    pub architecture: String,
    /// Transformer blocks.
    pub layers: u32,
    /// Width of the residual stream.
    pub hidden: u32,
    /// Width of the feed-forward layer.
    pub ffn: u32,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads; divides `heads`.
    pub kv_heads: u32,
    /// Elements of a head; even.
    pub head_dim: u32,
    /// Ids are `0..vocab`.
    pub vocab: u32,
    /// RoPE base.
    pub rope_theta: f32,
    /// RMSNorm epsilon.
    pub rms_eps: f32,
    /// Longest sequence the model was made for.
    pub max_len: u32,
    /// Ids that end a text, by the model's files.
    pub eos_ids: Vec<u32>,
}

/// Element type of stored weights. Quantised types are GGUF's blocks of 32 along a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightType {
    /// 4 bytes.
    F32,
    /// 2 bytes.
    F16,
    /// 2 bytes.
    Bf16,
    /// 34 bytes a 32: f16 scale, 32 × i8.
    Q8_0,
    /// 20 bytes a 32: f16 scale, f16 minimum, 16 × two nibbles (low nibbles first half).
    Q4_1,
}

/// A matrix as stored: `rows` outputs, each of `cols` inputs, row-major.
#[derive(Clone, Debug)]
pub struct Weight {
    /// Element type.
    pub dtype: WeightType,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// `rows * dtype.row_bytes(cols)` bytes.
    pub bytes: Arc<Vec<u8>>,
}

/// One transformer block.
#[derive(Clone, Debug)]
pub struct Layer {
    /// `[hidden]`.
    pub attn_norm: Vec<f32>,
    /// `[heads * head_dim, hidden]`, rows in NEOX order (halves, not interleaved pairs).
    pub q: Weight,
    /// `[kv_heads * head_dim, hidden]`, rows in NEOX order.
    pub k: Weight,
    /// `[kv_heads * head_dim, hidden]`.
    pub v: Weight,
    /// `[hidden, heads * head_dim]`.
    pub o: Weight,
    /// `[hidden]`.
    pub ffn_norm: Vec<f32>,
    /// `[ffn, hidden]`.
    pub gate: Weight,
    /// `[ffn, hidden]`.
    pub up: Weight,
    /// `[hidden, ffn]`.
    pub down: Weight,
}

/// All weights of a model.
#[derive(Clone, Debug)]
pub struct Model {
    /// Shape.
    pub spec: ModelSpec,
    /// `[vocab, hidden]`.
    pub embedding: Weight,
    /// In order.
    pub layers: Vec<Layer>,
    /// `[hidden]`.
    pub final_norm: Vec<f32>,
    /// `[vocab, hidden]`; `None` = the embedding is the head too.
    pub head: Option<Weight>,
    /// SHA-256 over the tensor table and the first and last 64 KiB of each tensor: the default `model_revision`.
    pub content_hash: [u8; 32],
}

impl WeightType {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::F32, Self::F16, Self::Bf16, Self::Q8_0, Self::Q4_1];

    /// As formats write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_1 => "Q4_1",
        }
    }

    /// Elements of the smallest piece of a row, and its bytes.
    pub fn block(self) -> (u64, u64) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q8_0 => (32, 34),
            Self::Q4_1 => (32, 20),
        }
    }

    /// Bytes of a row of `cols` elements; `cols` is a multiple of 32 for quantised types.
    pub fn row_bytes(self, cols: usize) -> usize {
        match self {
            Self::F32 => cols * 4,
            Self::F16 | Self::Bf16 => cols * 2,
            Self::Q8_0 => cols / 32 * 34,
            Self::Q4_1 => cols / 32 * 20,
        }
    }
}
