//! Products of f32, f16 and bf16 weights with f32 activations: 8 rows a vector, two vectors a panel, columns in order;
//! norm and activation.
#![expect(unsafe_code, reason = "vector loads")]

use std::arch::x86_64::*;

use super::super::LANES;
use super::quantised::f16s;
use super::{exp, load, store, tree};
use crate::model::WeightType;

/// See [`super::super::Kernels::float`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn product(
    dtype: WeightType,
    panels: &[u8],
    tile: &[f32],
    tokens: usize,
    out: &mut [f32],
) {
    match dtype {
        WeightType::F32 => by_panel(panels, tile, tokens, out, |bytes: &[u8; 32]| {
            // SAFETY: 32 readable bytes.
            unsafe { _mm256_loadu_ps(bytes.as_ptr().cast()) }
        }),
        WeightType::F16 => by_panel(panels, tile, tokens, out, |bytes| f16s(bytes)),
        _ => by_panel(panels, tile, tokens, out, |bytes: &[u8; 16]| {
            // SAFETY: 16 readable bytes.
            let words = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(words)))
        }),
    }
}

/// As many panels and tokens at once as there are registers for their sums, so that no addition waits for another.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn by_panel<const BYTES: usize>(
    panels: &[u8],
    tile: &[f32],
    tokens: usize,
    out: &mut [f32],
    weight: impl Fn(&[u8; BYTES]) -> __m256 + Copy,
) {
    let k = tile.len() / tokens;
    let mut panels = panels.as_chunks::<BYTES>().0.as_chunks::<2>().0;
    let mut out = out.as_chunks_mut::<LANES>().0.as_chunks_mut::<2>().0;
    while !panels.is_empty() {
        let count = match (tokens, panels.len() / k) {
            (1, 4..) => accumulate::<BYTES, 4, 1>(panels, tile, 0, tokens, out, weight),
            (2, 2..) => accumulate::<BYTES, 2, 2>(panels, tile, 0, tokens, out, weight),
            _ => {
                let mut first = 0;
                while first < tokens {
                    first += match tokens - first {
                        6.. => accumulate::<BYTES, 1, 6>(panels, tile, first, tokens, out, weight),
                        4.. => accumulate::<BYTES, 1, 4>(panels, tile, first, tokens, out, weight),
                        2.. => accumulate::<BYTES, 1, 2>(panels, tile, first, tokens, out, weight),
                        _ => accumulate::<BYTES, 1, 1>(panels, tile, first, tokens, out, weight),
                    }
                    .1;
                }
                (1, tokens)
            }
        }
        .0;
        panels = &panels[count * k..];
        out = &mut out[count * tokens..];
    }
}

/// `P` panels times `T` tokens from `first` on. Gives `(P, T)`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn accumulate<const BYTES: usize, const P: usize, const T: usize>(
    panels: &[[[u8; BYTES]; 2]],
    tile: &[f32],
    first: usize,
    tokens: usize,
    out: &mut [[[f32; LANES]; 2]],
    weight: impl Fn(&[u8; BYTES]) -> __m256 + Copy,
) -> (usize, usize) {
    let k = tile.len() / tokens;
    assert!(panels.len() >= P * k && out.len() >= P * tokens && first + T <= tokens);
    let mut sums = [[[_mm256_setzero_ps(); 2]; T]; P];
    for (at, xs) in tile.chunks_exact(tokens).enumerate() {
        for (p, sums) in sums.iter_mut().enumerate() {
            // SAFETY: `at < k`, `p < P`, and there are `P * k` columns.
            let [a, b] = unsafe { panels.get_unchecked(p * k + at) };
            let (a, b) = (weight(a), weight(b));
            for (t, sum) in sums.iter_mut().enumerate() {
                // SAFETY: `first + T <= tokens`, the length of `xs`.
                let x = _mm256_set1_ps(unsafe { *xs.get_unchecked(first + t) });
                *sum = [_mm256_fmadd_ps(a, x, sum[0]), _mm256_fmadd_ps(b, x, sum[1])];
            }
        }
    }
    for (p, sums) in sums.iter().enumerate() {
        for (t, sum) in sums.iter().enumerate() {
            let [a, b] = &mut out[p * tokens + first + t];
            store(a, sum[0]);
            store(b, sum[1]);
        }
    }
    (P, T)
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let mut lanes = _mm256_setzero_ps();
    for x in x.as_chunks::<LANES>().0 {
        let x = load(x);
        lanes = _mm256_fmadd_ps(x, x, lanes);
    }
    let scale = 1.0 / (tree(lanes) / x.len() as f32 + epsilon).sqrt();
    for ((x, weight), out) in x.iter().zip(weight).zip(out) {
        *out = x * scale * weight;
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    let (gate, up) = (gate.as_chunks::<LANES>().0, up.as_chunks::<LANES>().0);
    let minus = _mm256_set1_ps(-0.0);
    for ((gate, up), out) in gate.iter().zip(up).zip(out.as_chunks_mut::<LANES>().0) {
        let gate = load(gate);
        let e = exp(_mm256_xor_ps(gate, minus));
        let silu = _mm256_div_ps(gate, _mm256_add_ps(_mm256_set1_ps(1.0), e));
        store(out, _mm256_mul_ps(silu, load(up)));
    }
}
