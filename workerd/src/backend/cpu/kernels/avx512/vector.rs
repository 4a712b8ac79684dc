//! What is not a matrix product: quantising activations, and the feed-forward layer's gate.
#![expect(unsafe_code, reason = "vector loads and stores")]

use std::arch::x86_64::*;

use super::super::{QUANT, QuantBlock, ROWS, SMALLEST_MAX};
use super::{exps, load, store};

/// See [`super::super::Kernels::quantise`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn quantise(row: &[f32], out: &mut [QuantBlock], stride: usize) {
    for (x, out) in row.as_chunks::<QUANT>().0.iter().zip(out.iter_mut().step_by(stride)) {
        let [a, b] = x.as_chunks::<ROWS>().0 else { unreachable!("32 elements") };
        let (a, b) = (load(a), load(b));
        let max = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
        let (d, inverse) =
            if max >= SMALLEST_MAX { (max / 127.0, 127.0 / max) } else { (0.0, 0.0) };
        let inverse = _mm512_set1_ps(inverse);
        let a = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(a, inverse)));
        let b = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(b, inverse)));
        let q = _mm256_set_m128i(b, a);
        // SAFETY: `q` is 32 writable bytes.
        unsafe { _mm256_storeu_si256(out.q.as_mut_ptr().cast(), q) };
        // Sums of four, then of the four in each half.
        let sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), q);
        let sums = _mm256_add_epi32(sums, _mm256_shuffle_epi32::<0b01_00_11_10>(sums));
        let sums = _mm256_add_epi32(sums, _mm256_shuffle_epi32::<0b10_11_00_01>(sums));
        let halves = [_mm256_extract_epi32::<0>(sums), _mm256_extract_epi32::<4>(sums)];
        out.d = d;
        out.sum = d * (halves[0] + halves[1]) as f32;
        out.halves = halves.map(|sum| sum as i16);
    }
}

/// See [`super::super::Kernels::swiglu`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(super) fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    let (gates, gate_rest) = gate.as_chunks::<ROWS>();
    let (ups, up_rest) = up.as_chunks::<ROWS>();
    let (outs, out_rest) = out.as_chunks_mut::<ROWS>();
    for ((gate, up), out) in gates.iter().zip(ups).zip(outs) {
        store(out, gated(load(gate), load(up)));
    }
    if !gate_rest.is_empty() {
        let (mut gate, mut up, mut out) = ([0.0; ROWS], [0.0; ROWS], [0.0; ROWS]);
        gate[..gate_rest.len()].copy_from_slice(gate_rest);
        up[..up_rest.len()].copy_from_slice(up_rest);
        store(&mut out, gated(load(&gate), load(&up)));
        out_rest.copy_from_slice(&out[..out_rest.len()]);
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn gated(gate: __m512, up: __m512) -> __m512 {
    let minus = _mm512_castsi512_ps(_mm512_xor_si512(
        _mm512_castps_si512(gate),
        _mm512_castps_si512(_mm512_set1_ps(-0.0)),
    ));
    let [e] = exps([minus]);
    let silu = _mm512_div_ps(gate, _mm512_add_ps(_mm512_set1_ps(1.0), e));
    _mm512_mul_ps(silu, up)
}
