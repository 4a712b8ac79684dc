//! Products of f32, f16 and bf16 weights with f32 activations: a panel's 16 rows are one vector, columns in order.
#![expect(unsafe_code, reason = "vector loads")]

use std::arch::x86_64::*;

use super::super::ROWS;
use super::{f16s, store};
use crate::model::WeightType;

/// See [`super::super::Kernels::float`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn product(
    dtype: WeightType,
    panels: &[u8],
    tile: &[f32],
    tokens: usize,
    out: &mut [f32],
) {
    match dtype {
        WeightType::F32 => by_panel(panels, tile, tokens, out, |bytes: &[u8; 64]| {
            // SAFETY: 64 readable bytes.
            unsafe { _mm512_loadu_ps(bytes.as_ptr().cast()) }
        }),
        WeightType::F16 => by_panel(panels, tile, tokens, out, |bytes| f16s(bytes)),
        _ => by_panel(panels, tile, tokens, out, |bytes: &[u8; 32]| {
            // SAFETY: 32 readable bytes.
            let words = unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) };
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(words)))
        }),
    }
}

/// As many panels and tokens at once as it takes for no addition to wait for another.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn by_panel<const BYTES: usize>(
    panels: &[u8],
    tile: &[f32],
    tokens: usize,
    out: &mut [f32],
    weight: impl Fn(&[u8; BYTES]) -> __m512 + Copy,
) {
    let k = tile.len() / tokens;
    let mut panels = panels.as_chunks::<BYTES>().0;
    let mut out = out.as_chunks_mut::<ROWS>().0;
    while !panels.is_empty() {
        let (count, _) = match (tokens, panels.len() / k) {
            (1, 4..) => accumulate::<BYTES, 4, 1>(panels, tile, 0, tokens, out, weight),
            (2, 4..) => accumulate::<BYTES, 4, 2>(panels, tile, 0, tokens, out, weight),
            (3..=4, 2..) => {
                let mut first = 0;
                while first < tokens {
                    first += match tokens - first {
                        4 => accumulate::<BYTES, 2, 4>(panels, tile, first, tokens, out, weight),
                        2.. => accumulate::<BYTES, 2, 2>(panels, tile, first, tokens, out, weight),
                        _ => accumulate::<BYTES, 2, 1>(panels, tile, first, tokens, out, weight),
                    }
                    .1;
                }
                (2, tokens)
            }
            _ => {
                let mut first = 0;
                while first < tokens {
                    first += match tokens - first {
                        16.. => {
                            accumulate::<BYTES, 1, 16>(panels, tile, first, tokens, out, weight)
                        }
                        8.. => accumulate::<BYTES, 1, 8>(panels, tile, first, tokens, out, weight),
                        4.. => accumulate::<BYTES, 1, 4>(panels, tile, first, tokens, out, weight),
                        2.. => accumulate::<BYTES, 1, 2>(panels, tile, first, tokens, out, weight),
                        _ => accumulate::<BYTES, 1, 1>(panels, tile, first, tokens, out, weight),
                    }
                    .1;
                }
                (1, tokens)
            }
        };
        panels = &panels[count * k..];
        out = &mut out[count * tokens..];
    }
}

/// `P` panels times `T` tokens from `first` on. Gives `(P, T)`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn accumulate<const BYTES: usize, const P: usize, const T: usize>(
    panels: &[[u8; BYTES]],
    tile: &[f32],
    first: usize,
    tokens: usize,
    out: &mut [[f32; ROWS]],
    weight: impl Fn(&[u8; BYTES]) -> __m512 + Copy,
) -> (usize, usize) {
    let k = tile.len() / tokens;
    assert!(panels.len() >= P * k && out.len() >= P * tokens && first + T <= tokens);
    let mut sums = [[_mm512_setzero_ps(); T]; P];
    for (at, xs) in tile.chunks_exact(tokens).enumerate() {
        for (p, sums) in sums.iter_mut().enumerate() {
            // SAFETY: `at < k`, `p < P`, and there are `P * k` columns.
            let weight = weight(unsafe { panels.get_unchecked(p * k + at) });
            for (t, sum) in sums.iter_mut().enumerate() {
                // SAFETY: `first + T <= tokens`, the length of `xs`.
                let x = _mm512_set1_ps(unsafe { *xs.get_unchecked(first + t) });
                *sum = _mm512_fmadd_ps(weight, x, *sum);
            }
        }
    }
    for (p, sums) in sums.iter().enumerate() {
        for (t, sum) in sums.iter().enumerate() {
            store(&mut out[p * tokens + first + t], *sum);
        }
    }
    (P, T)
}
