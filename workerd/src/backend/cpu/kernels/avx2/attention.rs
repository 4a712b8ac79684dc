//! One step of the online softmax for one query.
//!
//! Lanes of a score run over head_dim (8 sums, added as the scalar table does); lanes of the output run over head_dim,
//! tokens in order.
#![expect(unsafe_code, reason = "vector loads and stores whose bounds are asserted once")]

use std::arch::x86_64::*;
use std::array::from_fn;

use super::super::{ATTENTION_TILE, LANES, Running};
use super::{exp, largest, load, store, tree};

const GROUPS: usize = ATTENTION_TILE / LANES;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn attend(
    query: &[f32],
    keys: &[f32],
    values: &[f32],
    tokens: usize,
    running: &mut Running,
    out: &mut [f32],
) {
    let head_dim = query.len();
    assert!(head_dim.is_multiple_of(LANES) && out.len() == head_dim && tokens <= ATTENTION_TILE);
    assert!(keys.len() == ATTENTION_TILE * head_dim && values.len() == keys.len());
    let mut scores = [_mm256_set1_ps(f32::NEG_INFINITY); GROUPS];
    for (group, scores) in scores.iter_mut().enumerate().take(tokens.div_ceil(LANES)) {
        let keys = &keys[group * LANES * head_dim..][..LANES * head_dim];
        *scores = eight_scores(query, keys, tokens - group * LANES);
    }
    let [a, b, c, d] = scores;
    let tile_max = largest(_mm256_max_ps(_mm256_max_ps(a, b), _mm256_max_ps(c, d)));
    let max = if tile_max > running.max { tile_max } else { running.max };
    let shrink = exp(_mm256_set1_ps(running.max - max));
    let shares = scores.map(|score| exp(_mm256_sub_ps(score, _mm256_set1_ps(max))));
    let [a, b, c, d] = shares;
    let sum = tree(_mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d)));
    let mut flat = [[0.0; LANES]; GROUPS];
    for (flat, share) in flat.iter_mut().zip(shares) {
        store(flat, share);
    }
    *running = Running { max, sum: running.sum.mul_add(_mm256_cvtss_f32(shrink), sum) };
    let shares = &flat.as_flattened()[..tokens];
    let mut first = 0;
    while first < head_dim {
        first += match head_dim - first {
            64.. => weigh::<8>(shares, values, shrink, first, out),
            32.. => weigh::<4>(shares, values, shrink, first, out),
            _ => weigh::<1>(shares, values, shrink, first, out),
        };
    }
}

/// Scores of 8 tokens; those from `tokens` on are minus infinity.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn eight_scores(query: &[f32], keys: &[f32], tokens: usize) -> __m256 {
    let head_dim = query.len();
    let mut sums = [_mm256_setzero_ps(); LANES];
    for (at, q) in query.as_chunks::<LANES>().0.iter().enumerate() {
        let q = load(q);
        for (token, sum) in sums.iter_mut().enumerate() {
            let from = token * head_dim + at * LANES;
            // SAFETY: `attend` gives 8 rows of `head_dim`, and `at * 8 + 8 <= head_dim`.
            let key = unsafe { _mm256_loadu_ps(keys.as_ptr().add(from)) };
            *sum = _mm256_fmadd_ps(q, key, *sum);
        }
    }
    // Horizontal additions give each token's ((0+1)+(2+3)) in the lower half and ((4+5)+(6+7)) in the upper one.
    let pairs: [__m256; 4] = from_fn(|at| _mm256_hadd_ps(sums[2 * at], sums[2 * at + 1]));
    let (near, far) = (_mm256_hadd_ps(pairs[0], pairs[1]), _mm256_hadd_ps(pairs[2], pairs[3]));
    let scores = _mm256_add_ps(
        _mm256_permute2f128_ps::<0x20>(near, far),
        _mm256_permute2f128_ps::<0x31>(near, far),
    );
    let numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    let tokens = _mm256_set1_epi32(i32::try_from(tokens.min(LANES)).expect("at most 8"));
    let seen = _mm256_castsi256_ps(_mm256_cmpgt_epi32(tokens, numbers));
    _mm256_blendv_ps(_mm256_set1_ps(f32::NEG_INFINITY), scores, seen)
}

/// `R` vectors of the output from element `first` on: shrunk, then every token's value added. Gives their elements.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn weigh<const R: usize>(
    shares: &[f32],
    values: &[f32],
    shrink: __m256,
    first: usize,
    out: &mut [f32],
) -> usize {
    let head_dim = out.len();
    assert!(first + R * LANES <= head_dim && shares.len() * head_dim <= values.len());
    let out = &mut out[first..].as_chunks_mut::<LANES>().0[..R];
    let mut sums: [__m256; R] = from_fn(|at| _mm256_mul_ps(load(&out[at]), shrink));
    for (token, share) in shares.iter().enumerate() {
        let share = _mm256_set1_ps(*share);
        for (at, sum) in sums.iter_mut().enumerate() {
            let from = token * head_dim + first + at * LANES;
            // SAFETY: below `shares.len() * head_dim`, asserted above.
            let value = unsafe { _mm256_loadu_ps(values.as_ptr().add(from)) };
            *sum = _mm256_fmadd_ps(share, value, *sum);
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        store(out, sum);
    }
    R * LANES
}
