//! The kernels in plain Rust, for every CPU: the order of operations that all tables keep.

mod product;

use std::array::from_fn;

use super::exponential::{HIGH, LOG2_E, LOW, MINUS_LN2_HIGH, MINUS_LN2_LOW, POLYNOMIAL};
use super::{Kernels, LANES, QUANT, QuantBlock, SMALLEST_MAX, attention};

/// The table.
pub static TABLE: Kernels = Kernels {
    name: "scalar",
    quantised: product::quantised,
    float: product::float,
    quantise,
    rms_norm,
    swiglu,
    attention: attention::PLAIN,
};

fn quantise(row: &[f32], out: &mut [QuantBlock], stride: usize) {
    for (x, out) in row.as_chunks::<QUANT>().0.iter().zip(out.iter_mut().step_by(stride)) {
        let max = x.iter().fold(0.0_f32, |max, x| larger(max, x.abs()));
        let (d, inverse) =
            if max >= SMALLEST_MAX { (max / 127.0, 127.0 / max) } else { (0.0, 0.0) };
        let q: [i32; QUANT] = from_fn(|at| nearest(x[at] * inverse) as i32);
        out.q = from_fn(|word| u32::from_le_bytes(from_fn(|at| q[word * 4 + at] as i8 as u8)));
        let halves: [i32; 2] = from_fn(|half| q[half * 16..][..16].iter().sum());
        out.d = d;
        out.sum = d * (halves[0] + halves[1]) as f32;
        out.halves = halves.map(|sum| sum as i16);
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
