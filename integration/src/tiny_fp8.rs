//! Tiny models as FP8 checkpoints: the weights of their bf16 folders, rounded to e4m3 times a scale, with the tensors
//! and settings of the tools that make such checkpoints.

use std::path::Path;

use anyhow::Result;
use half::bf16;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize_to_file};
use serde_json::{Value, json};

use crate::tiny_model::{TinyModel, is_vector};
use crate::weights::Matrix;

/// Largest number of e4m3.
const LARGEST: f32 = 448.0;

/// Whose checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TinyFp8 {
    /// NVIDIA Model Optimizer's: `hf_quant_config.json`, one scale a matrix, scales of activations and of an FP8 KV cache.
    ModelOptimizer,
    /// compressed-tensors': `quantization_config` in `config.json`, one bf16 scale a row.
    CompressedTensors,
    /// As DeepSeek and Qwen publish: `quantization_config` in `config.json`, `weight_scale_inv` with one f32 scale a block.
    Blocks,
}

impl TinyFp8 {
    /// Each.
    pub const ALL: [Self; 3] = [Self::ModelOptimizer, Self::CompressedTensors, Self::Blocks];
}

/// Rows and columns of a block: no matrix of a tiny model is made of whole ones.
const BLOCK: [usize; 2] = [24, 40];

struct Tensor {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl TinyModel {
    /// Writes the model as an FP8 checkpoint: the matrices of its blocks are e4m3, all else is bf16.
    ///
    /// # Errors
    /// As [`TinyModel::write`].
    pub fn write_fp8(&self, folder: &Path, kind: TinyFp8) -> Result<()> {
        self.write(folder)?;
        match kind {
            TinyFp8::ModelOptimizer => {
                let settings = json!({
                    "producer": { "name": "modelopt", "version": "0.33.0" },
                    "quantization": {
                        "quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"],
                    },
                });
                write_json(&folder.join("hf_quant_config.json"), &settings)?;
            }
            TinyFp8::CompressedTensors | TinyFp8::Blocks => {
                let path = folder.join("config.json");
                let mut config: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
                config["quantization_config"] = match kind {
                    TinyFp8::Blocks => json!({
                        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                        "weight_block_size": BLOCK,
                    }),
                    _ => compressed_tensors(),
                };
                write_json(&path, &config)?;
            }
        }
        let mut tensors = Vec::new();
        for (name, matrix) in self.tensors() {
            if name.contains("_proj.weight") {
                put_fp8(&mut tensors, &name, &matrix, kind);
            } else {
                let shape = match is_vector(&name) {
                    true => vec![matrix.cols],
                    false => vec![matrix.rows, matrix.cols],
                };
                let bytes = bf16s(&matrix.values);
                tensors.push(Tensor { name, dtype: Dtype::BF16, shape, bytes });
            }
        }
        let views = tensors.iter().map(|tensor| {
            let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes);
            view.map(|view| (tensor.name.clone(), view))
        });
        let views = views.collect::<Result<Vec<_>, _>>()?;
        serialize_to_file(views, None, &folder.join("model.safetensors"))?;
        Ok(())
    }
}

fn compressed_tensors() -> Value {
    json!({
        "quant_method": "compressed-tensors", "format": "float-quantized",
        "quantization_status": "compressed", "ignore": ["lm_head"], "kv_cache_scheme": null,
        "config_groups": { "group_0": {
            "targets": ["Linear"], "output_activations": null,
            "weights": { "type": "float", "num_bits": 8, "strategy": "channel", "symmetric": true,
                "dynamic": false, "group_size": null, "block_structure": null },
            "input_activations": { "type": "float", "num_bits": 8, "strategy": "token",
                "symmetric": true, "dynamic": true },
        } },
    })
}

/// `X.weight` and its scales.
fn put_fp8(tensors: &mut Vec<Tensor>, name: &str, matrix: &Matrix, kind: TinyFp8) {
    let module = name.trim_end_matches("weight");
    let mut put = |name: String, dtype, shape: &[usize], bytes| {
        tensors.push(Tensor { name, dtype, shape: shape.to_vec(), bytes });
    };
    let scale = |values: &[f32]| values.iter().fold(0.0_f32, |most, x| most.max(x.abs())) / LARGEST;
    // Of blocks of this shape.
    let [height, width] = match kind {
        TinyFp8::ModelOptimizer => [matrix.rows, matrix.cols],
        TinyFp8::CompressedTensors => [1, matrix.cols],
        TinyFp8::Blocks => BLOCK,
    };
    let grid = [matrix.rows.div_ceil(height), matrix.cols.div_ceil(width)];
    let of_block = |at: usize| {
        let (top, left) = (at / grid[1] * height, at % grid[1] * width);
        let rows = (top..matrix.rows.min(top + height)).map(|row| matrix.row(row));
        let values: Vec<f32> =
            rows.flat_map(|row| &row[left..matrix.cols.min(left + width)]).copied().collect();
        match kind {
            TinyFp8::CompressedTensors => bf16::from_f32(scale(&values)).to_f32(),
            TinyFp8::ModelOptimizer | TinyFp8::Blocks => scale(&values),
        }
    };
    let scales: Vec<f32> = (0..grid[0] * grid[1]).map(of_block).collect();
    let one = |x: f32| x.to_le_bytes().to_vec();
    match kind {
        TinyFp8::ModelOptimizer => {
            put(format!("{module}weight_scale"), Dtype::F32, &[], one(scales[0]));
            put(format!("{module}input_scale"), Dtype::F32, &[], one(0.02));
            for (part, name) in [("k_proj", "k_scale"), ("v_proj", "v_scale")] {
                if module.contains(part) {
                    put(format!("{module}{name}"), Dtype::F32, &[], one(1.0));
                }
            }
        }
        TinyFp8::CompressedTensors => {
            put(format!("{module}weight_scale"), Dtype::BF16, &grid, bf16s(&scales));
        }
        TinyFp8::Blocks => {
            let bytes = scales.iter().flat_map(|x| one(*x)).collect();
            put(format!("{module}weight_scale_inv"), Dtype::F32, &grid, bytes);
        }
    }
    let bytes = matrix.values.iter().enumerate().map(|(at, x)| {
        let (row, col) = (at / matrix.cols, at % matrix.cols);
        e4m3(x / scales[row / height * grid[1] + col / width])
    });
    put(name.to_owned(), Dtype::F8_E4M3, &[matrix.rows, matrix.cols], bytes.collect());
}

/// The nearest e4m3, ties to even; the largest where there is none so large.
fn e4m3(x: f32) -> u8 {
    let magnitude = x.abs().min(LARGEST);
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-6);
    let mantissa = (magnitude * 2_f32.powi(3 - exponent)).round_ties_even() as i32;
    // Of normal numbers 8 to 16, so that the next exponent follows by itself.
    let code = (exponent + 6) * 8 + mantissa;
    code.clamp(0, 0x7e) as u8 | u8::from(x.is_sign_negative()) << 7
}

fn bf16s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect()
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    Ok(std::fs::write(path, serde_json::to_vec_pretty(value)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::{from_e4m3, read_folder};

    #[test]
    fn every_number_of_e4m3_is_written_as_itself_and_others_as_the_nearest() {
        for code in (0..=0x7e).chain(0x80..=0xfe) {
            assert_eq!(e4m3(from_e4m3(code)), code, "{code:#x}");
        }
        for code in 0..0x7e_u8 {
            let (low, high) = (from_e4m3(code), from_e4m3(code + 1));
            let middle = (low + high) / 2.0;
            assert_eq!(e4m3(middle), code + code % 2, "{middle}");
            assert_eq!(e4m3(-(middle * 1.001)), 0x80 | (code + 1));
            assert_eq!(e4m3(middle * 0.999), code);
        }
        assert_eq!(e4m3(1e9), 0x7e);
    }

    #[test]
    fn all_kinds_have_the_numbers_of_the_bf16_folder_but_for_their_rounding() {
        let tiny = TinyModel::default();
        let folder = tempfile::tempdir().unwrap();
        tiny.write(folder.path()).unwrap();
        let expected = read_folder(folder.path()).unwrap();
        for kind in TinyFp8::ALL {
            let folder = tempfile::tempdir().unwrap();
            tiny.write_fp8(folder.path(), kind).unwrap();
            let got = read_folder(folder.path()).unwrap();
            for (name, matrix) in &expected {
                let most = matrix.values.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
                for (got, x) in got[name].values.iter().zip(&matrix.values) {
                    // Half a step of 3 bits, and of bf16; or of the smallest numbers.
                    let bound = x.abs() * (1.0 / 16.0 + 1.0 / 128.0) + most / LARGEST / 512.0;
                    assert!((got - x).abs() <= bound, "{kind:?} {name}: {got} {x}");
                }
            }
        }
    }
}
