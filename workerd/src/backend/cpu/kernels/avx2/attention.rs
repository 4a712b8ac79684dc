//! Attention to one tile of 32 positions, up to three queries at a time.
//!
//! Lanes of scores run over positions, lanes of outputs over head_dim: both are products of a few rows of numbers, each
//! broadcast, with rows of four vectors that lie in the first cache, their twelve sums in registers.
#![expect(unsafe_code, reason = "vector loads and stores whose bounds are asserted once")]

use std::arch::x86_64::*;
use std::array::from_fn;

use super::super::LANES;
use super::super::attention::{ATTENTION_TILE, Attention, Rows, Running};
use super::{exps, largest, store, tree};

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
    let head_dim = queries.len() / running.len();
    assert!(queries.len() == running.len() * head_dim && out.len() == queries.len());
    assert!(head_dim.is_multiple_of(LANES) && keys.len() == ATTENTION_TILE * head_dim);
    assert!(values.len() == keys.len() && (1..=ATTENTION_TILE).contains(&tokens));
    let (mut queries, mut running, mut out) = (queries, running, out);
    while !running.is_empty() {
        let size = match running.len() {
            1 => 1,
            2 | 4 => 2,
            _ => 3,
        };
        let (some, queries_left) = queries.split_at(size * head_dim);
        let (some_out, out_left) = out.split_at_mut(size * head_dim);
        let (some_running, running_left) = running.split_at_mut(size);
        // SAFETY: `size` queries, runnings and outputs of head_dim, whole tiles of keys and values.
        unsafe {
            match size {
                1 => bundle::<1>(some, keys, values, tokens, some_running, some_out),
                2 => bundle::<2>(some, keys, values, tokens, some_running, some_out),
                _ => bundle::<3>(some, keys, values, tokens, some_running, some_out),
            }
        }
        (queries, running, out) = (queries_left, running_left, out_left);
    }
}

/// `Q` queries.
///
/// # Safety
/// There are `Q` queries, runnings and outputs, a whole tile of keys and of values, and 1 to 32 `tokens`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn bundle<const Q: usize>(
    queries: &[f32],
    keys: &[f32],
    values: &[f32],
    tokens: usize,
    running: &mut [Running],
    out: &mut [f32],
) {
    let head_dim = queries.len() / Q;
    let queries = Rows { first: queries.as_ptr(), stride: head_dim };
    let keys = Rows { first: keys.as_ptr(), stride: ATTENTION_TILE };
    let zero = [[_mm256_setzero_ps(); GROUPS]; Q];
    // SAFETY: `Q` queries of head_dim, and head_dim rows of keys of a tile's positions.
    let scores = unsafe { accumulate(queries, head_dim, keys, zero) };
    let mut shares = [[0.0_f32; ATTENTION_TILE]; Q];
    let mut shrinks = [1.0_f32; Q];
    for q in 0..Q {
        shrinks[q] = softmax(seen(scores[q], tokens), &mut running[q], &mut shares[q]);
    }
    let mut column = 0;
    while column < head_dim {
        let values = Rows { first: values[column..].as_ptr(), stride: head_dim };
        let out = out[column..].as_mut_ptr();
        // SAFETY: so many columns are left of `tokens` values and `Q` outputs.
        column += unsafe {
            match head_dim - column {
                32.. => weigh::<Q, 4>(&shares, &shrinks, tokens, values, out),
                16.. => weigh::<Q, 2>(&shares, &shrinks, tokens, values, out),
                _ => weigh::<Q, 1>(&shares, &shrinks, tokens, values, out),
            }
        };
    }
}

/// `V` vectors of `Q` outputs: shrunk, then every token's value added. Gives their elements.
///
/// # Safety
/// `tokens` (at most 32) `values` and `Q` outputs, as far apart as the values, have so many elements.
#[expect(clippy::needless_range_loop, reason = "as iterators these loops are a tenth slower")]
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn weigh<const Q: usize, const V: usize>(
    shares: &[[f32; ATTENTION_TILE]; Q],
    shrinks: &[f32; Q],
    tokens: usize,
    values: Rows,
    out: *mut f32,
) -> usize {
    let mut sums = [[_mm256_setzero_ps(); V]; Q];
    for q in 0..Q {
        let shrink = _mm256_set1_ps(shrinks[q]);
        for at in 0..V {
            // SAFETY: by the caller's promise.
            let out = unsafe { _mm256_loadu_ps(out.add(q * values.stride + at * LANES)) };
            sums[q][at] = _mm256_mul_ps(out, shrink);
        }
    }
    let shares = Rows { first: shares.as_ptr().cast(), stride: ATTENTION_TILE };
    // SAFETY: `Q` rows of 32 shares; the values by the caller's promise.
    let sums = unsafe { accumulate(shares, tokens, values, sums) };
    for q in 0..Q {
        for at in 0..V {
            // SAFETY: by the caller's promise.
            unsafe { _mm256_storeu_ps(out.add(q * values.stride + at * LANES), sums[q][at]) };
        }
    }
    V * LANES
}

/// `sums[q] + Σ factors[q][k] * rows[k]` for `k` below `count`, in order; `rows` are `V` vectors long.
///
/// # Safety
/// There are `Q` rows of `count` factors and `count` rows of so many elements.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn accumulate<const Q: usize, const V: usize>(
    factors: Rows,
    count: usize,
    rows: Rows,
    mut sums: [[__m256; V]; Q],
) -> [[__m256; V]; Q] {
    let mut row = rows.first;
    for k in 0..count {
        let mut broadcast = [_mm256_setzero_ps(); Q];
        for (q, factor) in broadcast.iter_mut().enumerate() {
            // SAFETY: factor `k` of `count` of row `q` of `Q`.
            *factor = _mm256_set1_ps(unsafe { *factors.first.add(q * factors.stride).add(k) });
        }
        // All of a vector's products before the next is loaded: 12 sums, 3 factors and it are 16 registers.
        for at in 0..V {
            // SAFETY: row `k` of `count`.
            let vector = unsafe { _mm256_loadu_ps(row.add(at * LANES)) };
            for (sums, factor) in sums.iter_mut().zip(broadcast) {
                sums[at] = _mm256_fmadd_ps(factor, vector, sums[at]);
            }
        }
        // Not an index: its checks would keep the sums out of the registers.
        row = row.wrapping_add(rows.stride);
    }
    sums
}

/// Scores of positions from `tokens` on become minus infinity.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn seen(scores: [__m256; GROUPS], tokens: usize) -> [__m256; GROUPS] {
    if tokens == ATTENTION_TILE {
        return scores;
    }
    let numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    let mut masked = scores;
    for (group, score) in masked.iter_mut().enumerate() {
        let left = _mm256_set1_epi32(tokens as i32 - (group * LANES) as i32);
        let is_seen = _mm256_castsi256_ps(_mm256_cmpgt_epi32(left, numbers));
        *score = _mm256_blendv_ps(_mm256_set1_ps(f32::NEG_INFINITY), *score, is_seen);
    }
    masked
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
    let largest = largest(_mm256_max_ps(_mm256_max_ps(a, b), _mm256_max_ps(c, d)));
    let mut shrink = 1.0;
    if largest > running.max {
        let [factor] = exps([_mm256_set1_ps(running.max - largest)]);
        shrink = _mm256_cvtss_f32(factor);
        running.max = largest;
    }
    let max = _mm256_set1_ps(running.max);
    let mut x = scores;
    for x in &mut x {
        *x = _mm256_sub_ps(*x, max);
    }
    let [a, b, c, d] = exps(x);
    let (vectors, _) = shares.as_chunks_mut::<LANES>();
    for (vector, share) in vectors.iter_mut().zip([a, b, c, d]) {
        store(vector, share);
    }
    let sum = tree(_mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d)));
    running.sum = running.sum.mul_add(shrink, sum);
    shrink
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_words(from: &[u16; LANES]) -> __m128i {
    // SAFETY: 16 readable bytes.
    unsafe { _mm_loadu_si128(from.as_ptr().cast()) }
}
