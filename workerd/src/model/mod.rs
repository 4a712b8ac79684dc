//! A model on disk: what shape it has ([`spec`]), and its tensors, loaded into one form.
//!
//! [`open()`] is the way in. [`gguf`], and [`config_json`] with [`safetensors`], read one format each into a
//! [`ModelSpec`] and a table of [`tensors`]; `quantization` and `scales` say which FP8 folders can be read and find their
//! scales; [`dequantize`](dequantize()) says what stored bytes mean, and [`narrowed`] makes weights smaller.

pub mod architecture;
pub mod config_json;
pub mod dequantize;
pub mod error;
pub mod gguf;
pub mod hub;
pub mod load;
mod members;
pub mod narrowed;
pub mod parallel;
pub mod progress;
mod quantization;
pub mod rope;
pub mod safetensors;
mod scales;
pub mod spec;
pub mod tensors;
#[cfg(test)]
mod tests;

use std::sync::Arc;

pub use architecture::Architecture;
pub use dequantize::dequantize;
pub use error::ModelError;
pub use load::{ModelFiles, load, open};

/// Shape and constants of a Llama-like model; every number was checked to be usable.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// Which switches its blocks have.
    pub architecture: Architecture,
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
    /// What the frequency of each pair of a head is divided by; empty = 1.
    pub rope_factors: Vec<f32>,
    /// RMSNorm epsilon.
    pub rms_eps: f32,
    /// Longest sequence the model was made for.
    pub max_len: u32,
    /// Tokens some of its layers look back at most, their own included. Longer sequences are not computed here.
    pub window: Option<u32>,
    /// Ids that end a text, by the model's files.
    pub eos_ids: Vec<u32>,
}

/// Element type of stored weights. Types named Q are GGUF's blocks along a row; [`dequantize`](dequantize()) says what
/// bytes mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WeightType {
    /// 4 bytes.
    F32,
    /// 2 bytes.
    F16,
    /// 2 bytes.
    Bf16,
    /// 8 bits, a scale each 32.
    Q8_0,
    /// 4 bits less 8, a scale each 32.
    Q4_0,
    /// 4 bits, a scale and a minimum each 32.
    Q4_1,
    /// 5 bits less 16, a scale each 32.
    Q5_0,
    /// 5 bits, a scale and a minimum each 32.
    Q5_1,
    /// 4 bits, a 6-bit scale and a 6-bit minimum each 32, a scale of either each 256.
    Q4K,
    /// 5 bits, else as [`WeightType::Q4K`].
    Q5K,
    /// 6 bits less 32, an 8-bit scale each 16, a scale of these each 256.
    Q6K,
    /// 1 byte: sign, 4 bits of exponent, 3 of mantissa, no infinities; times the weight's [`Scales`].
    F8E4M3,
}

/// What the elements of a weight are multiplied by, beside what its type itself says.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Scales {
    /// Nothing.
    #[default]
    One,
    /// All by one number.
    Tensor(f32),
    /// Each row by its own; as many as the weight has rows.
    Rows(Arc<Vec<f32>>),
    /// Each block by its own.
    Blocks(Blocks),
}

/// Scales of blocks, which begin at the matrix's first element; those at its end may be cut short.
#[derive(Clone, Debug, PartialEq)]
pub struct Blocks {
    /// Rows and columns of a block.
    pub shape: [usize; 2],
    /// Row-major.
    pub scales: Arc<Vec<f32>>,
}

impl Blocks {
    /// Scales of a matrix of this shape, down and across.
    pub fn grid(shape: [usize; 2], rows: usize, cols: usize) -> [usize; 2] {
        [rows.div_ceil(shape[0]), cols.div_ceil(shape[1])]
    }
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
    /// Of the elements; [`Scales::One`] unless the type is [`WeightType::F8E4M3`].
    pub scales: Scales,
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
    /// Added to queries, keys and values, in this order: `[(heads + 2 * kv_heads) * head_dim]`.
    pub qkv_bias: Option<Vec<f32>>,
    /// RMSNorm of each head of queries and of keys before RoPE: `[head_dim]` each.
    pub qk_norm: Option<[Vec<f32>; 2]>,
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

/// A model's weights, one part after another: whoever turns them into another form need not have all of them in both.
pub trait Source {
    /// Its shape, which was checked.
    fn spec(&self) -> &ModelSpec;

    /// See [`Model::embedding`].
    ///
    /// # Errors
    /// [`ModelError`]; so for all parts.
    fn embedding(&mut self) -> Result<Weight, ModelError>;

    /// Block `index`, which is below the spec's `layers`.
    ///
    /// # Errors
    /// [`ModelError`].
    fn layer(&mut self, index: u32) -> Result<Layer, ModelError>;

    /// See [`Model::final_norm`].
    ///
    /// # Errors
    /// [`ModelError`].
    fn final_norm(&mut self) -> Result<Vec<f32>, ModelError>;

    /// See [`Model::head`].
    ///
    /// # Errors
    /// [`ModelError`].
    fn head(&mut self) -> Result<Option<Weight>, ModelError>;
}

impl Source for &Model {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn embedding(&mut self) -> Result<Weight, ModelError> {
        Ok(self.embedding.clone())
    }

    fn layer(&mut self, index: u32) -> Result<Layer, ModelError> {
        Ok(self.layers[index as usize].clone())
    }

    fn final_norm(&mut self) -> Result<Vec<f32>, ModelError> {
        Ok(self.final_norm.clone())
    }

    fn head(&mut self) -> Result<Option<Weight>, ModelError> {
        Ok(self.head.clone())
    }
}

impl Scales {
    /// Multiplies the elements of a row.
    ///
    /// # Panics
    /// When there are scales of rows or blocks, but none of this one.
    pub fn apply(&self, row: usize, values: &mut [f32]) {
        let by = |values: &mut [f32], scale: f32| values.iter_mut().for_each(|x| *x *= scale);
        match self {
            Self::One => {}
            Self::Tensor(scale) => by(values, *scale),
            Self::Rows(scales) => by(values, scales[row]),
            Self::Blocks(Blocks { shape: [height, width], scales }) => {
                let across = values.len().div_ceil(*width);
                let scales = &scales[row / height * across..][..across];
                values.chunks_mut(*width).zip(scales).for_each(|(part, scale)| by(part, *scale));
            }
        }
    }
}

impl WeightType {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
        Self::F8E4M3,
    ];

    /// As formats write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q8_0 => "Q8_0",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q5_0 => "Q5_0",
            Self::Q5_1 => "Q5_1",
            Self::Q4K => "Q4_K",
            Self::Q5K => "Q5_K",
            Self::Q6K => "Q6_K",
            Self::F8E4M3 => "F8_E4M3",
        }
    }

    /// Elements of the smallest piece of a row, and its bytes.
    pub fn block(self) -> (u64, u64) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::F8E4M3 => (1, 1),
            Self::Q8_0 => (32, 34),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q5_0 => (32, 22),
            Self::Q5_1 => (32, 24),
            Self::Q4K => (256, 144),
            Self::Q5K => (256, 176),
            Self::Q6K => (256, 210),
        }
    }

    /// Bytes of a row of `cols` elements, whole blocks.
    pub fn row_bytes(self, cols: usize) -> usize {
        let (elements, bytes) = self.block();
        cols / elements as usize * bytes as usize
    }
}
