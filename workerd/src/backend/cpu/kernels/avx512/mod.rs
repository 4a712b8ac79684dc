//! The table for CPUs with AVX-512 and its dot products of bytes (VNNI). What is not here is AVX2's.
#![expect(unsafe_code, reason = "functions for a CPU that was checked to have the instructions")]

mod attention;
mod float;
mod quantised;
mod vector;

use std::arch::x86_64::*;

use super::exponential::{HIGH, LOG2_E, LOW, MINUS_LN2_HIGH, MINUS_LN2_LOW, POLYNOMIAL};
use super::{Kernels, ROWS, avx2};

/// The table, if this CPU can run it.
pub fn table() -> Option<&'static Kernels> {
    let able = avx2::table().is_some()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni");
    able.then_some(&TABLE)
}

// Private: a function of this table may only be called where `table()` found the CPU able.
static TABLE: Kernels = Kernels {
    name: "avx512",
    quantised: |dtype, panels, tile, tokens, out| {
        // SAFETY: only `table` gives this out, after finding the instructions.
        unsafe { quantised::product(dtype, panels, tile, tokens, out) }
    },
    // SAFETY: as above.
    float: |dtype, panels, tile, tokens, out| unsafe {
        float::product(dtype, panels, tile, tokens, out)
    },
    // SAFETY: as above.
    quantise: |row, out, stride| unsafe { vector::quantise(row, out, stride) },
    // SAFETY: as above.
    swiglu: |gate, up, out| unsafe { vector::swiglu(gate, up, out) },
    attention: attention::TABLE,
    ..avx2::TABLE
};

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn load(from: &[f32; ROWS]) -> __m512 {
    // SAFETY: 64 readable bytes.
    unsafe { _mm512_loadu_ps(from.as_ptr()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn store(to: &mut [f32; ROWS], value: __m512) {
    // SAFETY: 64 writable bytes.
    unsafe { _mm512_storeu_ps(to.as_mut_ptr(), value) }
}

/// 16 f16.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn f16s(from: &[u8; 32]) -> __m512 {
    // SAFETY: 32 readable bytes.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from.as_ptr().cast()) })
}

/// As [`super::scalar::exp`]; step by step for all, as each step waits for the one before.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn exps<const N: usize>(x: [__m512; N]) -> [__m512; N] {
    let [first, rest @ ..] = POLYNOMIAL;
    let (mut n, mut r, mut p) = (x, x, [_mm512_set1_ps(first); N]);
    for i in 0..N {
        r[i] = _mm512_min_ps(x[i], _mm512_set1_ps(HIGH));
        n[i] = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(
            _mm512_mul_ps(r[i], _mm512_set1_ps(LOG2_E)),
        );
    }
    for minus_ln2 in [MINUS_LN2_HIGH, MINUS_LN2_LOW] {
        for i in 0..N {
            r[i] = _mm512_fmadd_ps(n[i], _mm512_set1_ps(minus_ln2), r[i]);
        }
    }
    for c in rest {
        for i in 0..N {
            p[i] = _mm512_fmadd_ps(p[i], r[i], _mm512_set1_ps(c));
        }
    }
    for i in 0..N {
        p[i] = _mm512_fmadd_ps(p[i], _mm512_mul_ps(r[i], r[i]), r[i]);
    }
    for i in 0..N {
        let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n[i]), _mm512_set1_epi32(127));
        let scale = _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent));
        let not_low = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x[i], _mm512_set1_ps(LOW));
        p[i] = _mm512_maskz_mul_ps(not_low, _mm512_add_ps(p[i], _mm512_set1_ps(1.0)), scale);
    }
    p
}
