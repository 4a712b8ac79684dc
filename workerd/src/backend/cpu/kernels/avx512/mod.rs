//! The table for CPUs with AVX-512 and its dot products of bytes (VNNI). What is neither a matrix product nor attention is AVX2's.
#![expect(unsafe_code, reason = "functions for a CPU that was checked to have the instructions")]

mod attention;
mod float;
mod quantised;

use std::arch::x86_64::*;

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
    attention: attention::TABLE,
    ..avx2::TABLE
};

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
