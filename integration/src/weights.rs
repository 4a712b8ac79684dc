//! Weights as f32 out of a GGUF file or a Hugging Face folder, for the oracle and for re-writing checkpoints.
//!
//! On purpose shares nothing with the worker's loader but the GGUF header reader: it is what that loader is
//! checked against. Whole files are read; errors are for a person at a test's output.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use baton_shared::text::gguf::Gguf;
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// A matrix or, with one row, a vector.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// `rows * cols`, row-major.
    pub values: Vec<f32>,
}

type Read = fn(&[u8]) -> Vec<f32>;

/// A GGUF file in memory.
#[derive(Debug)]
pub struct GgufFile {
    /// Its header.
    pub header: Gguf,
    bytes: Vec<u8>,
}

impl Matrix {
    /// Row `i`.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.values[i * self.cols..(i + 1) * self.cols]
    }
}

impl GgufFile {
    /// Reads the whole file.
    ///
    /// # Errors
    /// When it cannot be read or is no GGUF.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
        Ok(Self { header: Gguf::parse(&bytes)?, bytes })
    }

    /// A tensor of type F32, F16, BF16, Q8_0, Q4_1, Q5_0, Q4_K or Q6_K.
    ///
    /// # Errors
    /// When it is missing, of another type or cut.
    pub fn matrix(&self, name: &str) -> Result<Matrix> {
        let info = self.header.tensors.iter().find(|t| t.name == name);
        let info = info.with_context(|| format!("no tensor `{name}`"))?;
        let cols = info.dims[0] as usize;
        let rows = info.dims[1..].iter().product::<u64>() as usize;
        let n = rows * cols;
        let (len, read): (usize, Read) = match info.kind {
            0 => (n * 4, f32s),
            1 => (n * 2, f16s),
            3 => (n / 32 * 20, q4_1s),
            6 => (n / 32 * 22, q5_0s),
            8 => (n / 32 * 34, q8_0s),
            12 => (n / 256 * 144, q4_ks),
            14 => (n / 256 * 210, q6_ks),
            30 => (n * 2, bf16s),
            other => bail!("tensor `{name}` has ggml type {other}"),
        };
        let start = (self.header.data_offset + info.offset) as usize;
        let bytes = self.bytes.get(start..start + len);
        let values = read(bytes.with_context(|| format!("tensor `{name}` is cut"))?);
        Ok(Matrix { rows, cols, values })
    }

    /// `llama`, `qwen2`, `qwen3`.
    pub fn architecture(&self) -> &str {
        self.header.string("general.architecture").unwrap_or_default()
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture())
    }

    /// A setting of the architecture, as a whole number.
    ///
    /// # Errors
    /// When it is missing.
    pub fn number(&self, name: &str) -> Result<usize> {
        let value = self.header.u64(&self.key(name));
        Ok(value.with_context(|| format!("no `{}`", self.key(name)))? as usize)
    }

    /// A setting of the architecture, as a floating-point number.
    ///
    /// # Errors
    /// When it is missing.
    pub fn float(&self, name: &str) -> Result<f32> {
        let value = self.header.f64(&self.key(name));
        Ok(value.with_context(|| format!("no `{}`", self.key(name)))? as f32)
    }

    /// Elements of a head.
    ///
    /// # Errors
    /// When a setting is missing.
    pub fn head_dim(&self) -> Result<usize> {
        let width = self.number("embedding_length")? / self.number("attention.head_count")?;
        Ok(self.number("attention.key_length").unwrap_or(width))
    }
}

/// All tensors of all `*.safetensors` of a folder; what has a `weight_scale` or `weight_scale_inv` is
/// multiplied by it, element by element, row by row or block by block.
///
/// # Errors
/// When a file cannot be read, or a tensor is not of type F32, F16, BF16 or F8_E4M3 or has more than two dimensions.
pub fn read_folder(folder: &Path) -> Result<BTreeMap<String, Matrix>> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.extension().is_none_or(|e| e != "safetensors") {
            continue;
        }
        let bytes = std::fs::read(&path)?;
        for (name, view) in SafeTensors::deserialize(&bytes)?.iter() {
            let values = match view.dtype() {
                Dtype::F32 => f32s(view.data()),
                Dtype::F16 => f16s(view.data()),
                Dtype::BF16 => bf16s(view.data()),
                Dtype::F8_E4M3 => view.data().iter().copied().map(from_e4m3).collect(),
                other => bail!("tensor `{name}` has type {other}"),
            };
            let (rows, cols) = match view.shape() {
                [] => (1, 1),
                [cols] => (1, *cols),
                [rows, cols] => (*rows, *cols),
                shape => bail!("tensor `{name}` has shape {shape:?}"),
            };
            all.insert(name.to_owned(), Matrix { rows, cols, values });
        }
    }
    ensure!(!all.is_empty(), "no `*.safetensors` in `{}`", folder.display());
    let block = block_size(folder)?;
    let scaled = |name: &String| {
        let of = name.strip_suffix("_scale").or_else(|| name.strip_suffix("_scale_inv"))?;
        of.ends_with(".weight").then(|| (of.to_owned(), name.clone()))
    };
    for (name, scales) in all.keys().filter_map(scaled).collect::<Vec<_>>() {
        let scales = all[&scales].clone();
        let matrix = all.get_mut(&name).with_context(|| format!("no tensor `{name}`"))?;
        let (rows, cols) = (matrix.rows, matrix.cols);
        let [height, width] = match (scales.values.len(), block) {
            (1, _) => [rows, cols],
            (n, _) if n == rows => [1, cols],
            (n, Some([height, width])) if n == rows.div_ceil(height) * cols.div_ceil(width) => {
                [height, width]
            }
            (n, _) => bail!("{n} scales of `{name}`"),
        };
        for (at, x) in matrix.values.iter_mut().enumerate() {
            let (down, across) = (at / cols / height, at % cols / width);
            *x *= scales.values[down * cols.div_ceil(width) + across];
        }
    }
    Ok(all)
}

/// Rows and columns of a block that has an FP8 scale of its own, as `config.json` says.
fn block_size(folder: &Path) -> Result<Option<[usize; 2]>> {
    let path = folder.join("config.json");
    let text = std::fs::read(&path).with_context(|| path.display().to_string())?;
    let config: Value = serde_json::from_slice(&text)?;
    let size = &config["quantization_config"]["weight_block_size"];
    Ok(serde_json::from_value(size.clone())?)
}

/// What a byte of F8_E4M3 means; 0x7f and 0xff mean no number.
pub(crate) fn from_e4m3(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let magnitude = match exponent {
        _ if byte & 0x7f == 0x7f => f32::NAN,
        0 => mantissa * 2_f32.powi(-9),
        _ => (8.0 + mantissa) * 2_f32.powi(exponent - 10),
    };
    if byte < 0x80 { magnitude } else { -magnitude }
}

fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

fn f16s(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
}

fn bf16s(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
}

fn q8_0s(bytes: &[u8]) -> Vec<f32> {
    let mut out = Vec::with_capacity(bytes.len() / 34 * 32);
    for block in bytes.chunks_exact(34) {
        let scale = f16s(&block[..2])[0];
        for &q in &block[2..] {
            out.push(f32::from(q.cast_signed()) * scale);
        }
    }
    out
}

fn q4_1s(bytes: &[u8]) -> Vec<f32> {
    let mut out = Vec::with_capacity(bytes.len() / 20 * 32);
    for block in bytes.chunks_exact(20) {
        let head = f16s(&block[..4]);
        for shift in [0, 4] {
            for q in &block[4..] {
                out.push(f32::from((q >> shift) & 0xf) * head[0] + head[1]);
            }
        }
    }
    out
}

fn q5_0s(bytes: &[u8]) -> Vec<f32> {
    let mut out = Vec::with_capacity(bytes.len() / 22 * 32);
    for block in bytes.chunks_exact(22) {
        let scale = f16s(&block[..2])[0];
        let high = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
        for i in 0..32 {
            let low = (block[6 + i % 16] >> (i / 16 * 4)) & 0xf;
            let q = u32::from(low) | (high >> i & 1) << 4;
            out.push((q as f32 - 16.0) * scale);
        }
    }
    out
}

fn q4_ks(bytes: &[u8]) -> Vec<f32> {
    let mut out = Vec::with_capacity(bytes.len() / 144 * 256);
    for block in bytes.chunks_exact(144) {
        let head = f16s(&block[..4]);
        let (packed, quants) = block[4..].split_at(12);
        // Eight scales and eight minima of six bits each.
        let six = |i: usize| match i {
            0..4 => (packed[i] & 63, packed[i + 4] & 63),
            _ => (
                packed[i + 4] & 0xf | packed[i - 4] >> 6 << 4,
                packed[i + 4] >> 4 | packed[i] >> 6 << 4,
            ),
        };
        for group in 0..8 {
            let (scale, least) = six(group);
            for q in &quants[group / 2 * 32..][..32] {
                let q = q >> (group % 2 * 4) & 0xf;
                out.push(head[0] * f32::from(scale) * f32::from(q) - head[1] * f32::from(least));
            }
        }
    }
    out
}

fn q6_ks(bytes: &[u8]) -> Vec<f32> {
    let mut out = Vec::with_capacity(bytes.len() / 210 * 256);
    for block in bytes.chunks_exact(210) {
        let scale = f16s(&block[208..])[0];
        for i in 0..256 {
            // Halves of 128, each of four rows of 32.
            let (half, row, at) = (i / 128, i % 128 / 32, i % 32);
            let low = block[half * 64 + row % 2 * 32 + at] >> (row / 2 * 4) & 0xf;
            let high = block[128 + half * 32 + at] >> (2 * row) & 3;
            let q = f32::from(low | high << 4) - 32.0;
            out.push(scale * f32::from(block[192 + i / 16].cast_signed()) * q);
        }
    }
    out
}
