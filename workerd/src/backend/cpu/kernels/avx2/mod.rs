//! The table for CPUs with AVX2, FMA and F16C.
#![expect(unsafe_code, reason = "functions for a CPU that was checked to have the instructions")]

mod attention;
mod float;
mod quantised;

use std::arch::x86_64::*;

use super::exponential::{HIGH, LOG2_E, LOW, MINUS_LN2_HIGH, MINUS_LN2_LOW, POLYNOMIAL};
use super::{Kernels, LANES};

/// The table, if this CPU can run it.
pub fn table() -> Option<&'static Kernels> {
    let able = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    able.then_some(&OURS)
}

/// Attention's part, for the tables above this one.
pub(super) const ATTENTION: super::attention::Attention = attention::TABLE;

// A function of this table may only be called where `table()` found the CPU able.
static OURS: Kernels = TABLE;
pub(super) const TABLE: Kernels = Kernels {
    name: "avx2",
    quantised: |dtype, panels, tile, tokens, out| {
        // SAFETY: only `table` gives this out, after finding the instructions.
        unsafe { quantised::product(dtype, panels, tile, tokens, out) }
    },
    // SAFETY: as above.
    float: |dtype, panels, tile, tokens, out| unsafe {
        float::product(dtype, panels, tile, tokens, out)
    },
    // SAFETY: as above.
    quantise: |row, out, stride| unsafe { quantised::quantise(row, out, stride) },
    // SAFETY: as above.
    rms_norm: |x, weight, epsilon, out| unsafe { float::rms_norm(x, weight, epsilon, out) },
    // SAFETY: as above.
    swiglu: |gate, up, out| unsafe { float::swiglu(gate, up, out) },
    attention: attention::TABLE,
};

/// `N` bytes from `at` on.
#[inline]
pub(super) fn bytes<const N: usize>(from: &[u8], at: usize) -> &[u8; N] {
    from[at..].first_chunk().expect("a whole block")
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load(from: &[f32; LANES]) -> __m256 {
    // SAFETY: 32 readable bytes.
    unsafe { _mm256_loadu_ps(from.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn store(to: &mut [f32; LANES], value: __m256) {
    // SAFETY: 32 writable bytes.
    unsafe { _mm256_storeu_ps(to.as_mut_ptr(), value) }
}

/// `((0+1)+(2+3))+((4+5)+(6+7))`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn tree(x: __m256) -> f32 {
    let pairs = _mm256_hadd_ps(x, x);
    let halves = _mm256_hadd_ps(pairs, pairs);
    let (low, high) = (_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves));
    _mm_cvtss_f32(_mm_add_ss(low, high))
}

/// The largest lane.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn largest(x: __m256) -> f32 {
    let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
}

/// As [`super::scalar::exp`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn exp(x: __m256) -> __m256 {
    let [e] = exps([x]);
    e
}

/// As [`super::scalar::exp`]; step by step for all, as each step waits for the one before.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn exps<const N: usize>(x: [__m256; N]) -> [__m256; N] {
    let [first, rest @ ..] = POLYNOMIAL;
    let (mut n, mut r, mut p) = (x, x, [_mm256_set1_ps(first); N]);
    for i in 0..N {
        r[i] = _mm256_min_ps(x[i], _mm256_set1_ps(HIGH));
        n[i] = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(_mm256_mul_ps(
            r[i],
            _mm256_set1_ps(LOG2_E),
        ));
    }
    for minus_ln2 in [MINUS_LN2_HIGH, MINUS_LN2_LOW] {
        for i in 0..N {
            r[i] = _mm256_fmadd_ps(n[i], _mm256_set1_ps(minus_ln2), r[i]);
        }
    }
    for c in rest {
        for i in 0..N {
            p[i] = _mm256_fmadd_ps(p[i], r[i], _mm256_set1_ps(c));
        }
    }
    for i in 0..N {
        p[i] = _mm256_fmadd_ps(p[i], _mm256_mul_ps(r[i], r[i]), r[i]);
    }
    for i in 0..N {
        let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n[i]), _mm256_set1_epi32(127));
        let scale = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent));
        let not_low = _mm256_cmp_ps::<_CMP_NLT_UQ>(x[i], _mm256_set1_ps(LOW));
        let e = _mm256_mul_ps(_mm256_add_ps(p[i], _mm256_set1_ps(1.0)), scale);
        p[i] = _mm256_and_ps(e, not_low);
    }
    p
}
