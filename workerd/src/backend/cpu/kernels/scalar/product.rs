//! Products of weights with activations, one row and token at a time: what every tier has to give, bit for bit.
//!
//! Quantised: the 32 products of a block are summed as whole numbers, exactly. Then, in block order, one fused
//! multiply-add of that sum with (the weights' scale times the activations' scale), and, for types with a minimum, one
//! more of the minimum with the activations' sum.

use half::{bf16, f16};

use super::super::{QUANT, QuantBlock, ROWS};
use crate::backend::cpu::repack::{Part, panel_bytes};
use crate::model::WeightType;

pub(super) fn quantised(
    dtype: WeightType,
    panels: &[u8],
    tile: &[QuantBlock],
    tokens: usize,
    out: &mut [f32],
) {
    let panels = panels.chunks_exact(panel_bytes(dtype, tile.len() / tokens * QUANT));
    for (panel, out) in panels.zip(out.chunks_exact_mut(tokens * ROWS)) {
        out.fill(0.0);
        for (block, tile) in tile.chunks_exact(tokens).enumerate() {
            for lane in 0..ROWS {
                let Part { weights, scale, minimum } = Part::read(dtype, panel, block, lane);
                for (x, out) in tile.iter().zip(out.chunks_exact_mut(ROWS)) {
                    let out = &mut out[lane];
                    *out = (dot(&weights, x) as f32).mul_add(scale * x.d, *out);
                    if let Some(minimum) = minimum {
                        *out = minimum.mul_add(x.sum, *out);
                    }
                }
            }
        }
    }
}

fn dot(weights: &[i32; QUANT], x: &QuantBlock) -> i32 {
    let mut sum = 0;
    for (weights, word) in weights.as_chunks::<4>().0.iter().zip(x.q) {
        for (weight, byte) in weights.iter().zip(word.to_le_bytes()) {
            sum += weight * i32::from(byte.cast_signed());
        }
    }
    sum
}

pub(super) fn float(
    dtype: WeightType,
    panels: &[u8],
    tile: &[f32],
    tokens: usize,
    out: &mut [f32],
) {
    match dtype {
        WeightType::F32 => by_column(panels, tile, tokens, out, |x| f32::from_le_bytes(*x)),
        WeightType::F16 => {
            by_column(panels, tile, tokens, out, |x| f16::from_le_bytes(*x).to_f32())
        }
        _ => by_column(panels, tile, tokens, out, |x| bf16::from_le_bytes(*x).to_f32()),
    }
}

/// One fused multiply-add a column, in the order of columns.
fn by_column<const BYTES: usize>(
    panels: &[u8],
    tile: &[f32],
    tokens: usize,
    out: &mut [f32],
    load: impl Fn(&[u8; BYTES]) -> f32,
) {
    let panels = panels.as_chunks::<BYTES>().0.chunks_exact(tile.len() / tokens * ROWS);
    for (panel, out) in panels.zip(out.chunks_exact_mut(tokens * ROWS)) {
        out.fill(0.0);
        for (weights, tile) in panel.chunks_exact(ROWS).zip(tile.chunks_exact(tokens)) {
            for (x, out) in tile.iter().zip(out.chunks_exact_mut(ROWS)) {
                for (weight, out) in weights.iter().zip(out) {
                    *out = load(weight).mul_add(*x, *out);
                }
            }
        }
    }
}
