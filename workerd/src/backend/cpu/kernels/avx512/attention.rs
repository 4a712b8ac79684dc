//! Attention to one tile of 32 positions, up to six queries at a time: as `avx2::attention`, with vectors twice as long.
#![expect(unsafe_code, reason = "vector loads and stores whose bounds are asserted once")]

use std::arch::x86_64::*;

use super::super::attention::{ATTENTION_TILE, Attention, Rows, Running};
use super::super::avx2;
use super::{exps, load, store};

/// Floats of a vector.
const WIDTH: usize = 16;
/// Vectors of a tile's positions.
const GROUPS: usize = ATTENTION_TILE / WIDTH;
/// All lanes of a vector.
const ALL: __mmask16 = 0xffff;
/// The lower half of them, where head_dim is no multiple of 16.
const HALF: __mmask16 = 0x00ff;

/// The kernels; private to this table, which is given out where the CPU was found able.
pub(super) const TABLE: Attention = Attention {
    attend: |queries, keys, values, tokens, running, out| {
        // SAFETY: only the table gives this out, after finding the instructions.
        unsafe { attend(queries, keys, values, tokens, running, out) }
    },
    ..avx2::ATTENTION
};

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
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
    assert!(head_dim.is_multiple_of(8) && keys.len() == ATTENTION_TILE * head_dim);
    assert!(values.len() == keys.len() && (1..=ATTENTION_TILE).contains(&tokens));
    let (mut queries, mut running, mut out) = (queries, running, out);
    while !running.is_empty() {
        let size = match running.len() {
            1 => 1,
            2 => 2,
            3..6 => 3,
            _ => 6,
        };
        let (some, queries_left) = queries.split_at(size * head_dim);
        let (some_out, out_left) = out.split_at_mut(size * head_dim);
        let (some_running, running_left) = running.split_at_mut(size);
        // SAFETY: `size` queries, runnings and outputs of head_dim, whole tiles of keys and values.
        unsafe {
            match size {
                1 => bundle::<1>(some, keys, values, tokens, some_running, some_out),
                2 => bundle::<2>(some, keys, values, tokens, some_running, some_out),
                3 => bundle::<3>(some, keys, values, tokens, some_running, some_out),
                _ => bundle::<6>(some, keys, values, tokens, some_running, some_out),
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
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
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
    let zero = [[_mm512_setzero_ps(); GROUPS]; Q];
    // SAFETY: `Q` queries of head_dim, and head_dim rows of keys of a tile's positions.
    let scores = unsafe { accumulate(queries, head_dim, keys, zero, ALL) };
    let mut shares = [[0.0_f32; ATTENTION_TILE]; Q];
    let mut shrinks = [1.0_f32; Q];
    for q in 0..Q {
        shrinks[q] = maximum(seen(scores[q], tokens), &mut shares[q], &mut running[q]);
    }
    let (threes, rest) = shares.as_chunks_mut::<3>();
    let (running_threes, running_rest) = running.as_chunks_mut::<3>();
    let (shrink_threes, shrink_rest) = shrinks.as_chunks::<3>();
    for ((scores, running), shrinks) in threes.iter_mut().zip(running_threes).zip(shrink_threes) {
        exponentials(scores, running, shrinks);
    }
    for ((scores, running), shrink) in rest.iter_mut().zip(running_rest).zip(shrink_rest) {
        let (scores, running) = (std::array::from_mut(scores), std::array::from_mut(running));
        exponentials(scores, running, &[*shrink]);
    }
    let mut column = 0;
    while column < head_dim {
        let values = Rows { first: values[column..].as_ptr(), stride: head_dim };
        let out = out[column..].as_mut_ptr();
        // SAFETY: so many columns are left of `tokens` values and `Q` outputs.
        column += unsafe {
            match head_dim - column {
                32.. => weigh::<Q, 2>(&shares, &shrinks, tokens, values, out, ALL),
                16.. => weigh::<Q, 1>(&shares, &shrinks, tokens, values, out, ALL),
                _ => weigh::<Q, 1>(&shares, &shrinks, tokens, values, out, HALF),
            }
        };
    }
}

/// `V` vectors of `Q` outputs, of the last vector the lanes `last`: shrunk, then every token's value added. Gives their
/// elements.
///
/// # Safety
/// `tokens` (at most 32) `values` and `Q` outputs, as far apart as the values, have so many elements.
#[expect(clippy::needless_range_loop, reason = "as iterators these loops are a tenth slower")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn weigh<const Q: usize, const V: usize>(
    shares: &[[f32; ATTENTION_TILE]; Q],
    shrinks: &[f32; Q],
    tokens: usize,
    values: Rows,
    out: *mut f32,
    last: __mmask16,
) -> usize {
    let mut sums = [[_mm512_setzero_ps(); V]; Q];
    for q in 0..Q {
        let shrink = _mm512_set1_ps(shrinks[q]);
        for at in 0..V {
            let mask = if at + 1 == V { last } else { ALL };
            // SAFETY: by the caller's promise.
            let out =
                unsafe { _mm512_maskz_loadu_ps(mask, out.add(q * values.stride + at * WIDTH)) };
            sums[q][at] = _mm512_mul_ps(out, shrink);
        }
    }
    let shares = Rows { first: shares.as_ptr().cast(), stride: ATTENTION_TILE };
    // SAFETY: `Q` rows of 32 shares; the values by the caller's promise.
    let sums = unsafe { accumulate(shares, tokens, values, sums, last) };
    for q in 0..Q {
        for at in 0..V {
            let mask = if at + 1 == V { last } else { ALL };
            // SAFETY: by the caller's promise.
            unsafe {
                _mm512_mask_storeu_ps(out.add(q * values.stride + at * WIDTH), mask, sums[q][at]);
            }
        }
    }
    (V - 1) * WIDTH + last.count_ones() as usize
}

/// `sums[q] + Σ factors[q][k] * rows[k]` for `k` below `count`, in order; `rows` are `V` vectors long, of the last one
/// the lanes `last`.
///
/// # Safety
/// There are `Q` rows of `count` factors and `count` rows of so many elements.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn accumulate<const Q: usize, const V: usize>(
    factors: Rows,
    count: usize,
    rows: Rows,
    mut sums: [[__m512; V]; Q],
    last: __mmask16,
) -> [[__m512; V]; Q] {
    let mut row = rows.first;
    for k in 0..count {
        let mut vectors = [_mm512_setzero_ps(); V];
        for (at, vector) in vectors.iter_mut().enumerate() {
            let mask = if at + 1 == V { last } else { ALL };
            // SAFETY: row `k` of `count`.
            *vector = unsafe { _mm512_maskz_loadu_ps(mask, row.add(at * WIDTH)) };
        }
        for (q, sums) in sums.iter_mut().enumerate() {
            // SAFETY: factor `k` of `count` of row `q` of `Q`.
            let factor = unsafe { *factors.first.add(q * factors.stride).add(k) };
            for (sum, vector) in sums.iter_mut().zip(vectors) {
                *sum = _mm512_fmadd_ps(_mm512_set1_ps(factor), vector, *sum);
            }
        }
        // Not an index: its checks would keep the sums out of the registers.
        row = row.wrapping_add(rows.stride);
    }
    sums
}

/// Scores of positions from `tokens` on become minus infinity.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn seen([near, far]: [__m512; GROUPS], tokens: usize) -> [__m512; GROUPS] {
    let mask = u32::MAX >> (ATTENTION_TILE - tokens);
    let unseen = _mm512_set1_ps(f32::NEG_INFINITY);
    [
        _mm512_mask_mov_ps(unseen, mask as u16, near),
        _mm512_mask_mov_ps(unseen, (mask >> WIDTH) as u16, far),
    ]
}

/// Writes a tile's scores and notes their maximum; gives by what earlier shares shrink.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn maximum(
    [near, far]: [__m512; GROUPS],
    scores: &mut [f32; ATTENTION_TILE],
    running: &mut Running,
) -> f32 {
    let (vectors, _) = scores.as_chunks_mut::<WIDTH>();
    store(&mut vectors[0], near);
    store(&mut vectors[1], far);
    let (lower, upper) = halves(_mm512_max_ps(near, far));
    let largest = avx2::largest(_mm256_max_ps(lower, upper));
    if largest > running.max {
        let [shrink] = exps([_mm512_set1_ps(running.max - largest)]);
        running.max = largest;
        return _mm512_cvtss_f32(shrink);
    }
    1.0
}

/// Turns scores into shares and adds them to the sums.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn exponentials<const Q: usize>(
    scores: &mut [[f32; ATTENTION_TILE]; Q],
    running: &mut [Running; Q],
    shrinks: &[f32; Q],
) {
    let [mut near, mut far] = [[_mm512_setzero_ps(); Q]; GROUPS];
    for q in 0..Q {
        let max = _mm512_set1_ps(running[q].max);
        let (vectors, _) = scores[q].as_chunks::<WIDTH>();
        near[q] = _mm512_sub_ps(load(&vectors[0]), max);
        far[q] = _mm512_sub_ps(load(&vectors[1]), max);
    }
    let (near, far) = (exps(near), exps(far));
    for q in 0..Q {
        let (vectors, _) = scores[q].as_chunks_mut::<WIDTH>();
        store(&mut vectors[0], near[q]);
        store(&mut vectors[1], far[q]);
        let (near, far) = (halves(near[q]), halves(far[q]));
        let sum = _mm256_add_ps(_mm256_add_ps(near.0, near.1), _mm256_add_ps(far.0, far.1));
        running[q].sum = running[q].sum.mul_add(shrinks[q], avx2::tree(sum));
    }
}

/// The lower and the upper half.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn halves(x: __m512) -> (__m256, __m256) {
    let upper = _mm512_extractf64x4_pd::<1>(_mm512_castps_pd(x));
    (_mm512_castps512_ps256(x), _mm256_castpd_ps(upper))
}
