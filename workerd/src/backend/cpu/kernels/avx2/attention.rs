//! Attention to one tile of 32 positions, up to three queries at a time.
//!
//! Lanes of scores run over positions, lanes of outputs over head_dim: both are products of a few rows of numbers, each
//! broadcast, with rows of four vectors that lie in the first cache, their twelve sums in registers.
#![expect(unsafe_code, reason = "vector loads and stores whose bounds are asserted once")]

use std::arch::x86_64::*;
use std::array::from_fn;

use super::super::LANES;
use super::super::attention::{ATTENTION_TILE, Attention, Running};
use super::{exp, largest, load, store, tree};

/// Vectors of a tile's positions.
const GROUPS: usize = ATTENTION_TILE / LANES;

/// The kernels; private to this table, which is given out where the CPU was found able.
pub(super) const TABLE: Attention = Attention {
    // SAFETY: only the table gives this out, after finding the instructions.
    transpose: |stored, keys| unsafe { transpose(stored, keys) },
    // SAFETY: as above.
    widen: |stored, values| unsafe { widen(stored, values) },
    attend: |queries, keys, values, tokens, running, out| {
        // SAFETY: as above.
        unsafe { attend(queries, keys, values, tokens, running, out) }
    },
};

#[target_feature(enable = "avx2,fma,f16c")]
fn transpose(stored: &[u16], keys: &mut [f32]) {
    let head_dim = stored.len() / ATTENTION_TILE;
    assert!(head_dim.is_multiple_of(LANES) && stored.len() == keys.len());
    let (stored, _) = stored.as_chunks::<LANES>();
    let across = head_dim / LANES;
    let zero = _mm256_setzero_si256();
    for (at, keys) in keys.chunks_exact_mut(LANES * ATTENTION_TILE).enumerate() {
        for group in 0..GROUPS {
            // Eight elements of token `i` and, in the upper half, of token `i + 4`.
            let row = |token: usize| load_words(&stored[(group * LANES + token) * across + at]);
            let rows: [__m256i; 4] = from_fn(|i| {
                _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(row(i)), row(i + 4))
            });
            let pairs = [
                _mm256_unpacklo_epi16(rows[0], rows[1]),
                _mm256_unpacklo_epi16(rows[2], rows[3]),
                _mm256_unpackhi_epi16(rows[0], rows[1]),
                _mm256_unpackhi_epi16(rows[2], rows[3]),
            ];
            // Two elements of head_dim each, four tokens of one beside four of the next.
            let fours = [
                _mm256_unpacklo_epi32(pairs[0], pairs[1]),
                _mm256_unpackhi_epi32(pairs[0], pairs[1]),
                _mm256_unpacklo_epi32(pairs[2], pairs[3]),
                _mm256_unpackhi_epi32(pairs[2], pairs[3]),
            ];
            let (keys, _) = keys.as_chunks_mut::<LANES>();
            for (i, four) in fours.into_iter().enumerate() {
                // A bf16 above 16 zero bits is its f32.
                let even = _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, four));
                let odd = _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, four));
                store(&mut keys[2 * i * GROUPS + group], even);
                store(&mut keys[(2 * i + 1) * GROUPS + group], odd);
            }
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn widen(stored: &[u16], values: &mut [f32]) {
    let (stored, _) = stored.as_chunks::<LANES>();
    for (stored, value) in stored.iter().zip(values.as_chunks_mut::<LANES>().0) {
        let words = _mm256_cvtepu16_epi32(load_words(stored));
        store(value, _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words)));
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn attend(
    queries: &[f32],
    keys: &[f32],
    values: &[f32],
    tokens: usize,
    running: &mut [Running],
    out: &mut [f32],
) {
    let count = running.len();
    let head_dim = queries.len() / count;
    assert!(queries.len() == count * head_dim && out.len() == queries.len());
    assert!(head_dim.is_multiple_of(LANES) && keys.len() == ATTENTION_TILE * head_dim);
    assert!(values.len() == keys.len() && (1..=ATTENTION_TILE).contains(&tokens));
    let mut first = 0;
    while first < count {
        let size = match count - first {
            1 => 1,
            2 | 4 => 2,
            _ => 3,
        };
        let part = first * head_dim..(first + size) * head_dim;
        let (queries, out) = (&queries[part.clone()], &mut out[part]);
        let running = &mut running[first..first + size];
        match size {
            1 => bundle::<1>(queries, keys, values, tokens, running, out),
            2 => bundle::<2>(queries, keys, values, tokens, running, out),
            _ => bundle::<3>(queries, keys, values, tokens, running, out),
        }
        first += size;
    }
}

/// `Q` queries.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn bundle<const Q: usize>(
    queries: &[f32],
    keys: &[f32],
    values: &[f32],
    tokens: usize,
    running: &mut [Running],
    out: &mut [f32],
) {
    let head_dim = queries.len() / Q;
    let queries: [&[f32]; Q] = from_fn(|q| &queries[q * head_dim..(q + 1) * head_dim]);
    let start = [[_mm256_setzero_ps(); GROUPS]; Q];
    let mut scores = accumulate(queries, head_dim, keys, ATTENTION_TILE, start);
    if tokens < ATTENTION_TILE {
        for scores in &mut scores {
            *scores = seen(*scores, tokens);
        }
    }
    let mut shares = [[0.0_f32; ATTENTION_TILE]; Q];
    let mut shrinks = [1.0_f32; Q];
    for q in 0..Q {
        shrinks[q] = softmax(scores[q], &mut running[q], &mut shares[q]);
    }
    let shares: [&[f32]; Q] = from_fn(|q| &shares[q][..]);
    let mut first = 0;
    while first < head_dim {
        let (values, out) = (&values[first..], &mut out[first..]);
        first += match head_dim - first {
            32.. => weigh::<Q, 4>(shares, shrinks, tokens, values, head_dim, out),
            16.. => weigh::<Q, 2>(shares, shrinks, tokens, values, head_dim, out),
            _ => weigh::<Q, 1>(shares, shrinks, tokens, values, head_dim, out),
        };
    }
}

/// `V` vectors of the outputs `[query][head_dim]`: shrunk, then every token's value added. Gives their elements.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn weigh<const Q: usize, const V: usize>(
    shares: [&[f32]; Q],
    shrinks: [f32; Q],
    tokens: usize,
    values: &[f32],
    head_dim: usize,
    out: &mut [f32],
) -> usize {
    let mut sums = [[_mm256_setzero_ps(); V]; Q];
    for (q, sums) in sums.iter_mut().enumerate() {
        let out = &out[q * head_dim..].as_chunks::<LANES>().0[..V];
        let shrink = _mm256_set1_ps(shrinks[q]);
        *sums = from_fn(|at| _mm256_mul_ps(load(&out[at]), shrink));
    }
    let sums = accumulate(shares, tokens, values, head_dim, sums);
    for (q, sums) in sums.iter().enumerate() {
        let out = &mut out[q * head_dim..].as_chunks_mut::<LANES>().0[..V];
        for (out, sum) in out.iter_mut().zip(sums) {
            store(out, *sum);
        }
    }
    V * LANES
}

/// `sums[q] + Σ factors[q][k] * rows[k]` for `k` below `count`, in order; `rows` are `V` vectors long, `stride` apart.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn accumulate<const Q: usize, const V: usize>(
    factors: [&[f32]; Q],
    count: usize,
    rows: &[f32],
    stride: usize,
    mut sums: [[__m256; V]; Q],
) -> [[__m256; V]; Q] {
    assert!(count > 0 && factors.iter().all(|factors| factors.len() >= count));
    assert!(rows.len() >= (count - 1) * stride + V * LANES);
    let mut row = rows.as_ptr();
    for k in 0..count {
        // SAFETY: `k < count`, and each has as many.
        let factors: [__m256; Q] =
            factors.map(|factors| _mm256_set1_ps(unsafe { *factors.get_unchecked(k) }));
        for at in 0..V {
            // SAFETY: `V` vectors from `k * stride` on, `k < count`, lie in `rows` by the assertion.
            let vector = unsafe { _mm256_loadu_ps(row.add(at * LANES)) };
            for (sums, factor) in sums.iter_mut().zip(factors) {
                sums[at] = _mm256_fmadd_ps(factor, vector, sums[at]);
            }
        }
        // Not an index: its checks would keep the sums out of the registers.
        row = row.wrapping_add(stride);
    }
    sums
}

/// Scores of positions from `tokens` on become minus infinity.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn seen(scores: [__m256; GROUPS], tokens: usize) -> [__m256; GROUPS] {
    let numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    let tokens = i32::try_from(tokens).expect("at most 32");
    from_fn(|group| {
        let left = _mm256_set1_epi32(tokens - (group * LANES) as i32);
        let is_seen = _mm256_castsi256_ps(_mm256_cmpgt_epi32(left, numbers));
        _mm256_blendv_ps(_mm256_set1_ps(f32::NEG_INFINITY), scores[group], is_seen)
    })
}

/// Writes a tile's shares; gives by what earlier ones shrink.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn softmax(
    scores: [__m256; GROUPS],
    running: &mut Running,
    shares: &mut [f32; ATTENTION_TILE],
) -> f32 {
    let [a, b, c, d] = scores;
    let tile_max = largest(_mm256_max_ps(_mm256_max_ps(a, b), _mm256_max_ps(c, d)));
    let max = if tile_max > running.max { tile_max } else { running.max };
    let shrink = match max == running.max {
        true => 1.0,
        false => _mm256_cvtss_f32(exp(_mm256_set1_ps(running.max - max))),
    };
    let [a, b, c, d] = scores.map(|score| exp(_mm256_sub_ps(score, _mm256_set1_ps(max))));
    let (vectors, _) = shares.as_chunks_mut::<LANES>();
    for (vector, share) in vectors.iter_mut().zip([a, b, c, d]) {
        store(vector, share);
    }
    let sum = tree(_mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d)));
    *running = Running { max, sum: running.sum.mul_add(shrink, sum) };
    shrink
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_words(from: &[u16; LANES]) -> __m128i {
    // SAFETY: 16 readable bytes.
    unsafe { _mm_loadu_si128(from.as_ptr().cast()) }
}
