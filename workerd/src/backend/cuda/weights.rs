//! A model's weights in device memory: FP8 as it is stored, all else as bf16; queries, keys and values in one matrix,
//! gates and ups in one, 8 rows of either in turn (see `kernels/skinny.cu`).

use std::sync::Arc;

use super::CudaError;
use super::sys::buffer::Buffer;
use super::sys::launch::Dims;
use super::sys::products::{Format, Matrix};
use super::sys::{Gpu, GpuError};
use crate::backend::check;
use crate::model::dequantize::put_bf16;
use crate::model::{ModelSpec, Scales, Source, Weight, WeightType, parallel};

/// Columns that kernels take of weights of one byte at a time.
const NARROW_SLICE: usize = 64;
/// Rows of gates, then of ups, that take turns.
const TURN: usize = 8;
/// Head widths that attention kernels are there for.
pub const HEAD_DIMS: [u32; 3] = [32, 64, 128];

/// All of a model's.
#[derive(Debug)]
pub struct Weights {
    /// Numbers of the model.
    pub dims: Dims,
    /// `[vocab][hidden]`.
    pub embedding: Matrix,
    /// `None`: the embedding.
    pub head: Option<Matrix>,
    /// `[hidden]` f32; so are all norms and biases.
    pub final_norm: Buffer,
    /// In order.
    pub blocks: Vec<Block>,
    /// f64, angle of each pair of a head at position 1.
    pub frequencies: Buffer,
}

/// One transformer block's.
#[derive(Debug)]
pub struct Block {
    /// `[hidden]`.
    pub attention_norm: Buffer,
    /// `[queries, keys, values][hidden]`.
    pub qkv: Matrix,
    /// Of queries, keys and values.
    pub bias: Option<Buffer>,
    /// Of a query's head and of a key's.
    pub norms: Option<[Buffer; 2]>,
    /// `[hidden][queries]`.
    pub output: Matrix,
    /// `[hidden]`.
    pub ffn_norm: Buffer,
    /// `[2 ffn][hidden]`.
    pub gate_up: Matrix,
    /// `[hidden][ffn]`.
    pub down: Matrix,
}

/// Whether the kernels can run a model of these numbers.
///
/// # Errors
/// Says which number is wrong.
pub fn check_spec(spec: &ModelSpec) -> Result<(), String> {
    check::spec(spec)?;
    if !HEAD_DIMS.contains(&spec.head_dim) {
        return Err(format!("`head_dim` is {}, the kernels have {HEAD_DIMS:?}", spec.head_dim));
    }
    for (name, value) in
        [("hidden", spec.hidden), ("ffn", spec.ffn), ("heads * head_dim", spec.query_width())]
    {
        if !value.is_multiple_of(32) {
            return Err(format!("`{name}` is {value}, not a multiple of 32"));
        }
    }
    if !spec.vocab.is_multiple_of(2) {
        return Err(format!("`vocab` is {}, which is odd", spec.vocab));
    }
    Ok(())
}

impl Weights {
    /// Uploads a model part by part.
    ///
    /// # Errors
    /// [`CudaError`].
    pub fn load(gpu: &Arc<dyn Gpu>, source: &mut impl Source) -> Result<Self, CudaError> {
        let spec = &source.spec().clone();
        check_spec(spec).map_err(CudaError::Model)?;
        let (embedding, final_norm) = (source.embedding()?, source.final_norm()?);
        let head = source.head()?;
        check::ends(spec, &embedding, &final_norm, head.as_ref()).map_err(CudaError::Model)?;
        let frequencies: Vec<u8> =
            spec.rope_frequencies().iter().flat_map(|frequency| frequency.to_le_bytes()).collect();
        let mut weights = Self {
            dims: Dims {
                hidden: spec.hidden,
                ffn: spec.ffn,
                heads: spec.heads,
                kv_heads: spec.kv_heads,
                head_dim: spec.head_dim,
                vocab: spec.vocab,
                epsilon: spec.rms_eps,
            },
            embedding: wide_matrix(gpu, &embedding)?,
            head: head.map(|head| matrix(gpu, &[&head])).transpose()?,
            final_norm: floats(gpu, &final_norm)?,
            blocks: Vec::new(),
            frequencies: Buffer::with(gpu, "frequencies", &frequencies)?,
        };
        for index in 0..spec.layers {
            let layer = source.layer(index)?;
            check::layer(spec, &layer).map_err(CudaError::Model)?;
            let norms = layer.qk_norm.as_ref();
            let norms = norms.map(|[query, key]| Ok([floats(gpu, query)?, floats(gpu, key)?]));
            weights.blocks.push(Block {
                attention_norm: floats(gpu, &layer.attn_norm)?,
                qkv: matrix(gpu, &[&layer.q, &layer.k, &layer.v])?,
                bias: layer.qkv_bias.as_deref().map(|bias| floats(gpu, bias)).transpose()?,
                norms: norms.transpose().map_err(|error: GpuError| error)?,
                output: matrix(gpu, &[&layer.o])?,
                ffn_norm: floats(gpu, &layer.ffn_norm)?,
                gate_up: in_turn(gpu, &layer.gate, &layer.up)?,
                down: matrix(gpu, &[&layer.down])?,
            });
        }
        Ok(weights)
    }

    /// Elements of the largest matrix of one byte.
    pub fn widest(&self) -> usize {
        let blocks = self.blocks.iter();
        let all = blocks.flat_map(|b| [&b.qkv, &b.output, &b.gate_up, &b.down]).chain(&self.head);
        let narrow = all.filter(|matrix| matches!(matrix.format, Format::F8(_)));
        narrow.map(|matrix| matrix.n as usize * matrix.k as usize).max().unwrap_or(0)
    }

    /// The last product's.
    pub fn head(&self) -> &Matrix {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}

/// A matrix that rows are looked up in.
fn wide_matrix(gpu: &Arc<dyn Gpu>, weight: &Weight) -> Result<Matrix, GpuError> {
    let buffer = Buffer::with(gpu, "weights", &as_bf16(weight))?;
    let (n, k) = (weight.rows as u32, weight.cols as u32);
    Ok(Matrix { buffer, format: Format::Bf16, n, k })
}

fn floats(gpu: &Arc<dyn Gpu>, values: &[f32]) -> Result<Buffer, GpuError> {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Buffer::with(gpu, "weights", &bytes)
}

/// Matrices of equal width, one below the other.
fn matrix(gpu: &Arc<dyn Gpu>, parts: &[&Weight]) -> Result<Matrix, GpuError> {
    let format = format(gpu, parts, |scales| scales.concat())?;
    let (k, n) = (parts[0].cols, parts.iter().map(|part| part.rows).sum::<usize>());
    let buffer = Buffer::new(gpu, "weights", n * k * element_bytes(&format))?;
    let mut offset = 0;
    for part in parts {
        let bytes = as_kept(part, &format);
        buffer.write(offset, &bytes)?;
        offset += bytes.len();
    }
    Ok(Matrix { buffer, format, n: n as u32, k: k as u32 })
}

/// Two matrices of equal shape, [`TURN`] rows of either in turn.
fn in_turn(gpu: &Arc<dyn Gpu>, gate: &Weight, up: &Weight) -> Result<Matrix, GpuError> {
    let format = format(gpu, &[gate, up], |scales| {
        let turns = scales[0].chunks(TURN).zip(scales[1].chunks(TURN));
        turns.flat_map(|(gates, ups)| [gates, ups].concat()).collect()
    })?;
    let (gates, ups) = (as_kept(gate, &format), as_kept(up, &format));
    let turn = TURN * gate.cols * element_bytes(&format);
    let mut both = vec![0; 2 * gates.len()];
    parallel::each_row(&mut both, 2 * turn, |number, out| {
        let (left, right) = out.split_at_mut(turn);
        left.copy_from_slice(&gates[number * turn..][..turn]);
        right.copy_from_slice(&ups[number * turn..][..turn]);
    });
    let buffer = Buffer::with(gpu, "weights", &both)?;
    Ok(Matrix { buffer, format, n: 2 * gate.rows as u32, k: gate.cols as u32 })
}

/// One byte where all parts have it, with a scale for all or for each row, and rows are whole slices of the kernels'; with
/// a scale for each row in the order of rows that `arrange` makes of the parts'. Else bf16.
fn format(
    gpu: &Arc<dyn Gpu>,
    parts: &[&Weight],
    arrange: impl Fn(&[Vec<f32>]) -> Vec<f32>,
) -> Result<Format, GpuError> {
    let is_narrow =
        |part: &&Weight| part.dtype == WeightType::F8E4M3 && part.cols.is_multiple_of(NARROW_SLICE);
    let scales = |part: &&Weight| match &part.scales {
        Scales::One => Some(vec![1.0; part.rows]),
        Scales::Tensor(scale) => Some(vec![*scale; part.rows]),
        Scales::Rows(scales) => Some(scales.to_vec()),
        Scales::Blocks(_) => None,
    };
    let narrow: Option<Vec<_>> =
        parts.iter().map(|part| scales(part).filter(|_| is_narrow(part))).collect();
    match narrow {
        Some(scales) => Ok(Format::F8(floats(gpu, &arrange(&scales))?)),
        None => Ok(Format::Bf16),
    }
}

fn element_bytes(format: &Format) -> usize {
    match format {
        Format::Bf16 => 2,
        Format::F8(_) => 1,
    }
}

/// Row-major, as the device keeps it.
fn as_kept(weight: &Weight, format: &Format) -> Arc<Vec<u8>> {
    match format {
        Format::Bf16 => as_bf16(weight),
        Format::F8(_) => Arc::clone(&weight.bytes),
    }
}

/// Row-major bf16, rounded to nearest even.
fn as_bf16(weight: &Weight) -> Arc<Vec<u8>> {
    if weight.dtype == WeightType::Bf16 {
        return Arc::clone(&weight.bytes);
    }
    let row_bytes = weight.cols * 2;
    let mut bytes = vec![0; weight.rows * row_bytes];
    parallel::each_row(&mut bytes, row_bytes, |row, out| put_bf16(weight, row, out));
    Arc::new(bytes)
}
