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
}

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
            TinyFp8::CompressedTensors => {
                let path = folder.join("config.json");
                let mut config: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
                config["quantization_config"] = compressed_tensors();
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
    let scales: Vec<f32> = match kind {
        TinyFp8::ModelOptimizer => vec![scale(&matrix.values); matrix.rows],
        TinyFp8::CompressedTensors => {
            let of_row = |row| bf16::from_f32(scale(matrix.row(row))).to_f32();
            (0..matrix.rows).map(of_row).collect()
        }
    };
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
            let shape = [matrix.rows, 1];
            put(format!("{module}weight_scale"), Dtype::BF16, &shape, bf16s(&scales));
        }
    }
    let rows = matrix.values.chunks_exact(matrix.cols).zip(&scales);
    let bytes = rows.flat_map(|(row, scale)| row.iter().map(move |x| e4m3(x / scale)));
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
    fn both_kinds_have_the_numbers_of_the_bf16_folder_but_for_their_rounding() {
        let tiny = TinyModel::default();
        let folder = tempfile::tempdir().unwrap();
        tiny.write(folder.path()).unwrap();
        let expected = read_folder(folder.path()).unwrap();
        for kind in [TinyFp8::ModelOptimizer, TinyFp8::CompressedTensors] {
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
