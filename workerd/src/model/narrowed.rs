//! Weights made smaller as they are read (`engine.cpu_weights`): decode reads all of them for each token, so bytes are time.
//!
//! Only what is wider becomes narrower. `q8_0` leaves all that is quantised as it is; `q4_1` is what a Q4_1 GGUF file
//! has: the matrices of the blocks in 4 bits, the embedding and the head in 8. A model so changed is another model to
//! its peers, unless `model_revision` says otherwise: its content hash takes the change in.

use std::str::FromStr;
use std::sync::Arc;

use half::f16;
use sha2::{Digest, Sha256};

use super::parallel::each_row;
use super::{Layer, ModelError, ModelSpec, Scales, Source, Weight, WeightType, dequantize};

/// How weights are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CpuWeights {
    /// As the file has them.
    #[default]
    AsIs,
    /// In 8 bits at most.
    Q8_0,
    /// In 4 bits at most, the embedding and the head in 8.
    Q4_1,
}

/// No such [`CpuWeights`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be `as-is`, `q8_0` or `q4_1`")]
pub struct UnknownCpuWeights;

impl FromStr for CpuWeights {
    type Err = UnknownCpuWeights;

    fn from_str(name: &str) -> Result<Self, UnknownCpuWeights> {
        match name {
            "as-is" => Ok(Self::AsIs),
            "q8_0" => Ok(Self::Q8_0),
            "q4_1" => Ok(Self::Q4_1),
            _ => Err(UnknownCpuWeights),
        }
    }
}

impl CpuWeights {
    /// Of a model kept so, from that of its files.
    pub fn content_hash(self, files: [u8; 32]) -> [u8; 32] {
        let name = match self {
            Self::AsIs => return files,
            Self::Q8_0 => "q8_0",
            Self::Q4_1 => "q4_1",
        };
        Sha256::new_with_prefix(files).chain_update(name).finalize().into()
    }

    /// The widest type of the blocks' matrices.
    fn inner(self) -> Option<WeightType> {
        match self {
            Self::AsIs => None,
            Self::Q8_0 => Some(WeightType::Q8_0),
            Self::Q4_1 => Some(WeightType::Q4_1),
        }
    }

    /// The widest type of the embedding and the head.
    fn outer(self) -> Option<WeightType> {
        self.inner().map(|_| WeightType::Q8_0)
    }
}

/// A model whose weights are no wider than wanted.
#[derive(Debug)]
pub struct Narrowed<'a, S> {
    source: &'a mut S,
    wanted: CpuWeights,
}

impl<'a, S: Source> Narrowed<'a, S> {
    /// What `source` has, narrowed part by part.
    pub fn new(source: &'a mut S, wanted: CpuWeights) -> Self {
        Self { source, wanted }
    }
}

impl<S: Source> Source for Narrowed<'_, S> {
    fn spec(&self) -> &ModelSpec {
        self.source.spec()
    }

    fn embedding(&mut self) -> Result<Weight, ModelError> {
        let embedding = self.source.embedding()?;
        narrow(embedding, self.wanted.outer(), || "the embedding".into())
    }

    fn layer(&mut self, index: u32) -> Result<Layer, ModelError> {
        let layer = self.source.layer(index)?;
        let inner = self.wanted.inner();
        let narrow = |weight, name| narrow(weight, inner, || format!("{name} of block {index}"));
        Ok(Layer {
            q: narrow(layer.q, "q")?,
            k: narrow(layer.k, "k")?,
            v: narrow(layer.v, "v")?,
            o: narrow(layer.o, "o")?,
            gate: narrow(layer.gate, "gate")?,
            up: narrow(layer.up, "up")?,
            down: narrow(layer.down, "down")?,
            ..layer
        })
    }

    fn final_norm(&mut self) -> Result<Vec<f32>, ModelError> {
        self.source.final_norm()
    }

    fn head(&mut self) -> Result<Option<Weight>, ModelError> {
        let outer = self.wanted.outer();
        let head = self.source.head()?;
        head.map(|head| narrow(head, outer, || "the head".into())).transpose()
    }
}

/// Bits of an element in 256ths, as the CPU keeps it: F8_E4M3 as bf16.
fn width(dtype: WeightType) -> u64 {
    let kept = if dtype == WeightType::F8E4M3 { WeightType::Bf16 } else { dtype };
    let (elements, bytes) = kept.block();
    bytes * 8 * 256 / elements
}

/// `weight`, or the same in `dtype` if that is narrower.
fn narrow(
    weight: Weight,
    dtype: Option<WeightType>,
    name: impl Fn() -> String,
) -> Result<Weight, ModelError> {
    let Some(dtype) = dtype.filter(|dtype| width(weight.dtype) > width(*dtype)) else {
        return Ok(weight);
    };
    let refuse = |rule| Err(ModelError::Narrow { matrix: name(), dtype: dtype.name(), rule });
    let (rows, cols) = (weight.rows, weight.cols);
    let (block, block_bytes) = dtype.block();
    if !cols.is_multiple_of(block as usize) {
        return refuse("its rows are not whole blocks of 32");
    }
    let row_bytes = dtype.row_bytes(cols);
    let mut bytes = vec![0; rows * row_bytes];
    each_row(&mut bytes, row_bytes, |row, to| {
        let numbers = dequantize(&weight, row);
        let blocks = to.chunks_exact_mut(block_bytes as usize);
        for (to, numbers) in blocks.zip(numbers.as_chunks::<32>().0) {
            match dtype {
                WeightType::Q8_0 => put_q8_0(numbers, to),
                _ => put_q4_1(numbers, to),
            }
        }
    });
    let finite =
        |at: usize, block: &[u8]| f16::from_le_bytes([block[at], block[at + 1]]).is_finite();
    let halves = if dtype == WeightType::Q8_0 { 1 } else { 2 };
    let mut blocks = bytes.chunks_exact(block_bytes as usize);
    if !blocks.all(|block| (0..halves).all(|at| finite(2 * at, block))) {
        return refuse("its numbers are too large, or not numbers");
    }
    Ok(Weight { dtype, rows, cols, bytes: Arc::new(bytes), scales: Scales::One })
}

fn put_q8_0(numbers: &[f32; 32], to: &mut [u8]) {
    let largest = numbers
        .iter()
        .fold(0.0, |largest: f32, x| if x.abs() <= largest { largest } else { x.abs() });
    let scale = f16::from_f32(largest / 127.0);
    let inverse = inverse(scale);
    to[..2].copy_from_slice(&scale.to_le_bytes());
    for (to, x) in to[2..].iter_mut().zip(numbers) {
        *to = ((x * inverse).round().clamp(-127.0, 127.0) as i8).cast_unsigned();
    }
}

fn put_q4_1(numbers: &[f32; 32], to: &mut [u8]) {
    let (mut least, mut largest) = (numbers[0], numbers[0]);
    for x in numbers {
        // Not `min` and `max`, which pass over what is no number.
        least = if *x >= least { least } else { *x };
        largest = if *x <= largest { largest } else { *x };
    }
    let minimum = f16::from_f32(least);
    let scale = f16::from_f32((largest - minimum.to_f32()) / 15.0);
    let inverse = inverse(scale);
    let code = |x: f32| ((x - minimum.to_f32()) * inverse).round().clamp(0.0, 15.0) as u8;
    to[..2].copy_from_slice(&scale.to_le_bytes());
    to[2..4].copy_from_slice(&minimum.to_le_bytes());
    for (i, to) in to[4..].iter_mut().enumerate() {
        *to = code(numbers[i]) | code(numbers[i + 16]) << 4;
    }
}

fn inverse(scale: f16) -> f32 {
    if scale == f16::ZERO { 0.0 } else { 1.0 / scale.to_f32() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floats(numbers: &[f32]) -> Weight {
        let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        let (cols, bytes) = (numbers.len(), Arc::new(bytes));
        Weight { dtype: WeightType::F32, rows: 1, cols, bytes, scales: Scales::One }
    }

    #[test]
    fn a_narrower_weight_is_off_by_little_more_than_half_a_step() {
        let numbers: Vec<f32> = (0..256).map(|i| ((i * 37 % 101) as f32 - 40.0) * 0.01).collect();
        for dtype in [WeightType::Q8_0, WeightType::Q4_1] {
            let weight = narrow(floats(&numbers), Some(dtype), String::new).unwrap();
            assert_eq!(weight.bytes.len(), dtype.row_bytes(256));
            for (got, numbers) in dequantize(&weight, 0).chunks(32).zip(numbers.chunks(32)) {
                let least = numbers.iter().fold(f32::INFINITY, |a, b| a.min(*b));
                let most = numbers.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
                let step = match dtype {
                    WeightType::Q8_0 => most.max(-least) / 127.0,
                    _ => (most - least) / 15.0,
                };
                for (got, x) in got.iter().zip(numbers) {
                    // Scale and minimum have 11 bits.
                    assert!((got - x).abs() <= step * 0.51 + 0.001 * x.abs(), "{got} {x} {step}");
                }
            }
        }
    }

    #[test]
    fn f8_is_narrowed_as_the_numbers_it_stands_for() {
        let (rows, cols, bytes) = (2, 32, Arc::new([vec![0x38; 32], vec![0xc0; 32]].concat()));
        let scales = Scales::Rows(Arc::new(vec![0.5, 0.25]));
        let weight = Weight { dtype: WeightType::F8E4M3, rows, cols, bytes, scales };
        for dtype in [WeightType::Q8_0, WeightType::Q4_1] {
            let weight = narrow(weight.clone(), Some(dtype), String::new).unwrap();
            assert_eq!((weight.dtype, &weight.scales), (dtype, &Scales::One));
            for (row, expected) in [0.5, -0.5].into_iter().enumerate() {
                let got = dequantize(&weight, row);
                assert!(got.iter().all(|x| (x - expected).abs() < 1e-3), "{dtype:?}: {got:?}");
            }
        }
    }

    #[test]
    fn what_is_narrow_already_stays_as_it_is() {
        let weight = narrow(floats(&[0.5; 64]), Some(WeightType::Q4_1), String::new).unwrap();
        for dtype in [None, Some(WeightType::Q8_0), Some(WeightType::Q4_1)] {
            let same = narrow(weight.clone(), dtype, String::new).unwrap();
            assert!(Arc::ptr_eq(&same.bytes, &weight.bytes));
        }
        assert_eq!(dequantize(&weight, 0), [0.5; 64]);
    }

    #[test]
    fn rows_that_are_not_whole_blocks_and_numbers_too_large_are_refused() {
        for (numbers, rule) in [
            (vec![1.0; 48], "whole blocks"),
            (vec![1e9; 32], "too large"),
            ([&[1.0; 31][..], &[f32::NAN]].concat(), "not numbers"),
        ] {
            for dtype in [WeightType::Q8_0, WeightType::Q4_1] {
                let narrowed = narrow(floats(&numbers), Some(dtype), || "q of block 3".into());
                let error = narrowed.unwrap_err().to_string();
                let expected = format!("q of block 3 cannot be kept as {}", dtype.name());
                assert!(error.contains(&expected) && error.contains(rule), "{error}");
            }
        }
    }

    #[test]
    fn names_are_those_of_the_configuration() {
        assert_eq!("as-is".parse(), Ok(CpuWeights::AsIs));
        assert_eq!("q8_0".parse(), Ok(CpuWeights::Q8_0));
        assert_eq!("q4_1".parse(), Ok(CpuWeights::Q4_1));
        assert_eq!("q4_0".parse::<CpuWeights>(), Err(UnknownCpuWeights));
    }
}
