//! The kernels in plain Rust, for every CPU: the order of operations that all tables keep.

use std::array::from_fn;

use half::{bf16, f16};

use super::exponential::{HIGH, LOG2_E, LOW, MINUS_LN2_HIGH, MINUS_LN2_LOW, POLYNOMIAL};
use super::{Kernels, LANES, QUANT, QuantBlock, SMALLEST_MAX, attention};

/// The table.
pub static TABLE: Kernels = Kernels {
    name: "scalar",
    q4_1,
    q8_0,
    f32: |panels, tile, tokens, out| {
        float(panels, tile, tokens, out, |bytes: &[u8; 4]| f32::from_le_bytes(*bytes));
    },
    f16: |panels, tile, tokens, out| {
        float(panels, tile, tokens, out, |bytes| f16::from_le_bytes(*bytes).to_f32());
    },
    bf16: |panels, tile, tokens, out| {
        float(panels, tile, tokens, out, |bytes| bf16::from_le_bytes(*bytes).to_f32());
    },
    quantise,
    rms_norm,
    swiglu,
    attention: attention::PLAIN,
};

fn q4_1(panels: &[u8], tile: &[QuantBlock], tokens: usize, out: &mut [f32]) {
    let (blocks, _) = panels.as_chunks::<160>();
    let groups = blocks.chunks_exact(tile.len() / tokens);
    for (panel, out) in groups.zip(out.chunks_exact_mut(tokens * LANES)) {
        out.fill(0.0);
        for (block, tile) in panel.iter().zip(tile.chunks_exact(tokens)) {
            for lane in 0..LANES {
                let scale = half(block, 2 * lane);
                let minimum = half(block, 16 + 2 * lane);
                // Word `j` of a row holds columns 4j.. in its low nibbles and 16 + 4j.. in its high ones.
                let byte = |column: usize| block[32 + column / 4 * 32 + lane * 4 + column % 4];
                let weights: [i32; QUANT] = from_fn(|column| {
                    i32::from(if column < 16 { byte(column) & 15 } else { byte(column - 16) >> 4 })
                });
                for (x, out) in tile.iter().zip(out.chunks_exact_mut(LANES)) {
                    let sum = (dot(&weights, x) as f32).mul_add(scale * x.d, out[lane]);
                    out[lane] = minimum.mul_add(x.sum, sum);
                }
            }
        }
    }
}

fn q8_0(panels: &[u8], tile: &[QuantBlock], tokens: usize, out: &mut [f32]) {
    let blocks = tile.len() / tokens;
    let groups = panels.chunks_exact(blocks * 272);
    for (panel, out) in groups.zip(out.chunks_exact_mut(tokens * LANES)) {
        out.fill(0.0);
        let (quants, scales) = panel.split_at(blocks * 256);
        let (quants, scales) = (quants.as_chunks::<256>().0, scales.as_chunks::<16>().0);
        for ((quants, scales), tile) in quants.iter().zip(scales).zip(tile.chunks_exact(tokens)) {
            for lane in 0..LANES {
                let scale = half(scales, 2 * lane);
                let weights: [i32; QUANT] = from_fn(|column| {
                    i32::from(quants[column / 4 * 32 + lane * 4 + column % 4] as i8)
                });
                for (x, out) in tile.iter().zip(out.chunks_exact_mut(LANES)) {
                    out[lane] = (dot(&weights, x) as f32).mul_add(scale * x.d, out[lane]);
                }
            }
        }
    }
}

fn float<const BYTES: usize>(
    panels: &[u8],
    tile: &[f32],
    tokens: usize,
    out: &mut [f32],
    load: impl Fn(&[u8; BYTES]) -> f32,
) {
    let (weights, _) = panels.as_chunks::<BYTES>();
    let groups = weights.chunks_exact(tile.len() / tokens * LANES);
    for (panel, out) in groups.zip(out.chunks_exact_mut(tokens * LANES)) {
        out.fill(0.0);
        for (weights, tile) in panel.chunks_exact(LANES).zip(tile.chunks_exact(tokens)) {
            for (x, out) in tile.iter().zip(out.chunks_exact_mut(LANES)) {
                for (weight, out) in weights.iter().zip(out) {
                    *out = load(weight).mul_add(*x, *out);
                }
            }
        }
    }
}

fn dot(weights: &[i32; QUANT], x: &QuantBlock) -> i32 {
    let mut sum = 0;
    for (weights, word) in weights.as_chunks::<4>().0.iter().zip(x.q) {
        for (weight, byte) in weights.iter().zip(word.to_le_bytes()) {
            sum += weight * i32::from(byte as i8);
        }
    }
    sum
}

fn half(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

fn quantise(row: &[f32], out: &mut [QuantBlock], stride: usize) {
    for (x, out) in row.as_chunks::<QUANT>().0.iter().zip(out.iter_mut().step_by(stride)) {
        let max = x.iter().fold(0.0_f32, |max, x| larger(max, x.abs()));
        let (d, inverse) =
            if max >= SMALLEST_MAX { (max / 127.0, 127.0 / max) } else { (0.0, 0.0) };
        let q: [i32; QUANT] = from_fn(|at| nearest(x[at] * inverse) as i32);
        out.q = from_fn(|word| u32::from_le_bytes(from_fn(|at| q[word * 4 + at] as i8 as u8)));
        out.d = d;
        out.sum = d * q.iter().sum::<i32>() as f32;
    }
}

fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let mut lanes = [0.0_f32; LANES];
    for x in x.as_chunks::<LANES>().0 {
        lanes = from_fn(|lane| x[lane].mul_add(x[lane], lanes[lane]));
    }
    let scale = 1.0 / (tree(&lanes) / x.len() as f32 + epsilon).sqrt();
    for ((x, weight), out) in x.iter().zip(weight).zip(out) {
        *out = x * scale * weight;
    }
}

fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((gate, up), out) in gate.iter().zip(up).zip(out) {
        *out = gate / (1.0 + exp(-gate)) * up;
    }
}

/// `e^x`; 0 below [`LOW`].
pub fn exp(x: f32) -> f32 {
    if x < LOW {
        return 0.0;
    }
    let x = smaller(x, HIGH);
    let n = nearest(x * LOG2_E);
    let r = n.mul_add(MINUS_LN2_LOW, n.mul_add(MINUS_LN2_HIGH, x));
    let [first, rest @ ..] = POLYNOMIAL;
    let p = rest.iter().fold(first, |p, &c| p.mul_add(r, c));
    let p = p.mul_add(r * r, r) + 1.0;
    p * f32::from_bits(((n as i32 + 127) as u32) << 23)
}

/// The nearest integer, ties to even, for less than 2^22.
fn nearest(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (x + SHIFT) - SHIFT
}

/// As `vmaxps`.
pub(super) fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// As `vminps`.
fn smaller(a: f32, b: f32) -> f32 {
    if a < b { a } else { b }
}

pub(super) fn tree(lanes: &[f32; LANES]) -> f32 {
    let [a, b, c, d, e, f, g, h] = *lanes;
    ((a + b) + (c + d)) + ((e + f) + (g + h))
}
