//! Products of f32, f16 and bf16 weights with f32 activations, 8 rows a vector, k in order; norm and activation.
#![expect(unsafe_code, reason = "vector loads")]

use std::arch::x86_64::*;

use super::super::LANES;
use super::quantised::load_f16;
use super::{exp, load, store, tree};

/// Tokens whose sums stay in registers.
const HELD: usize = 8;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn f32(panels: &[u8], tile: &[f32], tokens: usize, out: &mut [f32]) {
    product(panels, tile, tokens, out, |bytes: &[u8; 32]| {
        // SAFETY: 32 readable bytes.
        unsafe { _mm256_loadu_ps(bytes.as_ptr().cast()) }
    });
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn f16(panels: &[u8], tile: &[f32], tokens: usize, out: &mut [f32]) {
    product(panels, tile, tokens, out, |bytes| load_f16(bytes));
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn bf16(panels: &[u8], tile: &[f32], tokens: usize, out: &mut [f32]) {
    product(panels, tile, tokens, out, |bytes: &[u8; 16]| {
        // SAFETY: 16 readable bytes.
        let words = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(words)))
    });
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn product<const BYTES: usize>(
    panels: &[u8],
    tile: &[f32],
    tokens: usize,
    out: &mut [f32],
    weight: impl Fn(&[u8; BYTES]) -> __m256 + Copy,
) {
    match tokens {
        1 => several::<BYTES, 4, 1>(panels, tile, tokens, out, weight),
        2 => several::<BYTES, 4, 2>(panels, tile, tokens, out, weight),
        4 => several::<BYTES, 2, 4>(panels, tile, tokens, out, weight),
        8 | 16 | 32 => several::<BYTES, 1, HELD>(panels, tile, tokens, out, weight),
        tokens => panic!("no product for {tokens} tokens"),
    }
}

/// `G` panels at once, so that additions to one do not wait for those to another; then what is left one by one.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn several<const BYTES: usize, const G: usize, const T: usize>(
    panels: &[u8],
    tile: &[f32],
    tokens: usize,
    out: &mut [f32],
    weight: impl Fn(&[u8; BYTES]) -> __m256 + Copy,
) {
    let k = tile.len() / tokens;
    let vectors = panels.as_chunks::<BYTES>().0;
    let (bundles, rest) = vectors.split_at(vectors.len() / (k * G) * (k * G));
    let (bundle_outs, rest_outs) =
        out.as_chunks_mut::<LANES>().0.split_at_mut(bundles.len() / k * tokens);
    let bundle_outs = bundle_outs.chunks_exact_mut(G * tokens);
    for (bundle, out) in bundles.chunks_exact(k * G).zip(bundle_outs) {
        accumulate::<BYTES, G, T>(bundle, tile, tokens, out, weight);
    }
    for (panel, out) in rest.chunks_exact(k).zip(rest_outs.chunks_exact_mut(tokens)) {
        accumulate::<BYTES, 1, T>(panel, tile, tokens, out, weight);
    }
}

/// `G` panels times all tokens, `T` of them at a time.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn accumulate<const BYTES: usize, const G: usize, const T: usize>(
    bundle: &[[u8; BYTES]],
    tile: &[f32],
    tokens: usize,
    out: &mut [[f32; LANES]],
    weight: impl Fn(&[u8; BYTES]) -> __m256 + Copy,
) {
    let k = tile.len() / tokens;
    assert!(bundle.len() == G * k && out.len() == G * tokens && tokens.is_multiple_of(T));
    for first in (0..tokens).step_by(T) {
        let mut sums = [[_mm256_setzero_ps(); T]; G];
        for (at, xs) in tile.chunks_exact(tokens).enumerate() {
            for (g, sums) in sums.iter_mut().enumerate() {
                // SAFETY: `at < k`, `g < G`, and the bundle has `G * k` vectors.
                let weight = weight(unsafe { bundle.get_unchecked(g * k + at) });
                for (t, sum) in sums.iter_mut().enumerate() {
                    // SAFETY: `first + T <= tokens`, the length of `xs`.
                    let x = _mm256_set1_ps(unsafe { *xs.get_unchecked(first + t) });
                    *sum = _mm256_fmadd_ps(weight, x, *sum);
                }
            }
        }
        for (g, sums) in sums.iter().enumerate() {
            for (t, sum) in sums.iter().enumerate() {
                store(&mut out[g * tokens + first + t], *sum);
            }
        }
    }
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
