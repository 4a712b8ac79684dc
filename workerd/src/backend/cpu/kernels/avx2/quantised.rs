//! Products of Q4_1 and Q8_0 weights with quantised activations, 8 rows a vector.
//!
//! A block's 32 products are summed as integers, exactly; then one or two fused multiply-adds a block, in block order.
#![expect(unsafe_code, reason = "vector loads and stores")]

use std::arch::x86_64::*;
use std::array::from_fn;

use super::super::{LANES, QUANT, QuantBlock, SMALLEST_MAX};
use super::{largest, load, store};

macro_rules! by_tokens {
    ($product:ident, $panels:expr, $tile:expr, $tokens:expr, $out:expr) => {
        match $tokens {
            1 => $product::<1>($panels, $tile, $out),
            2 => $product::<2>($panels, $tile, $out),
            4 => $product::<4>($panels, $tile, $out),
            8 => $product::<8>($panels, $tile, $out),
            16 => $product::<16>($panels, $tile, $out),
            32 => $product::<32>($panels, $tile, $out),
            tokens => panic!("no product for {tokens} tokens"),
        }
    };
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn q4_1(panels: &[u8], tile: &[QuantBlock], tokens: usize, out: &mut [f32]) {
    by_tokens!(q4_1_tile, panels, tile, tokens, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn q8_0(panels: &[u8], tile: &[QuantBlock], tokens: usize, out: &mut [f32]) {
    by_tokens!(q8_0_tile, panels, tile, tokens, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q4_1_tile<const T: usize>(panels: &[u8], tile: &[QuantBlock], out: &mut [f32]) {
    let (tile, _) = tile.as_chunks::<T>();
    let groups = panels.as_chunks::<160>().0.chunks_exact(tile.len());
    let outs = out.as_chunks_mut::<LANES>().0.chunks_exact_mut(T);
    let (low, ones) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1));
    for (panel, out) in groups.zip(outs) {
        let mut sums = [_mm256_setzero_ps(); T];
        for (block, tile) in panel.iter().zip(tile) {
            let (heads, nibbles) = block.split_at(32);
            let (heads, nibbles) = (heads.as_chunks::<16>().0, nibbles.as_chunks::<32>().0);
            let (scale, minimum) = (load_f16(&heads[0]), load_f16(&heads[1]));
            let words: [__m256i; 4] = from_fn(|j| load_bytes(&nibbles[j]));
            let lows = words.map(|word| _mm256_and_si256(word, low));
            let highs = words.map(|word| _mm256_and_si256(_mm256_srli_epi16::<4>(word), low));
            for (x, sum) in tile.iter().zip(&mut sums) {
                // Two chains of i16; all eight pair sums together are at most 8 * 2 * 15 * 127 = 30,480.
                let mut chains = [_mm256_setzero_si256(); 2];
                for j in 0..4 {
                    let near = _mm256_maddubs_epi16(lows[j], broadcast(x.q[j]));
                    let far = _mm256_maddubs_epi16(highs[j], broadcast(x.q[4 + j]));
                    chains[0] = _mm256_add_epi16(chains[0], near);
                    chains[1] = _mm256_add_epi16(chains[1], far);
                }
                let dot = _mm256_madd_epi16(_mm256_add_epi16(chains[0], chains[1]), ones);
                let factor = _mm256_mul_ps(scale, _mm256_set1_ps(x.d));
                *sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), factor, *sum);
                *sum = _mm256_fmadd_ps(minimum, _mm256_set1_ps(x.sum), *sum);
            }
        }
        for (sum, out) in sums.iter().zip(out) {
            store(out, *sum);
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn q8_0_tile<const T: usize>(panels: &[u8], tile: &[QuantBlock], out: &mut [f32]) {
    let (tile, _) = tile.as_chunks::<T>();
    let groups = panels.chunks_exact(tile.len() * 272);
    let outs = out.as_chunks_mut::<LANES>().0.chunks_exact_mut(T);
    let ones = _mm256_set1_epi16(1);
    for (panel, out) in groups.zip(outs) {
        let (quants, scales) = panel.split_at(tile.len() * 256);
        let (quants, scales) = (quants.as_chunks::<256>().0, scales.as_chunks::<16>().0);
        let mut sums = [_mm256_setzero_ps(); T];
        for ((quants, scale), tile) in quants.iter().zip(scales).zip(tile) {
            let scale = load_f16(scale);
            let quants = quants.as_chunks::<32>().0;
            let words: [__m256i; 8] = from_fn(|j| load_bytes(&quants[j]));
            for (x, sum) in tile.iter().zip(&mut sums) {
                let mut dot = _mm256_setzero_si256();
                for (word, x) in words.iter().zip(x.q) {
                    // |w| times x with w's sign: a pair is at most 2 * 128 * 127 = 32,512.
                    let signed = _mm256_sign_epi8(broadcast(x), *word);
                    let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(*word), signed);
                    dot = _mm256_add_epi32(dot, _mm256_madd_epi16(pairs, ones));
                }
                let factor = _mm256_mul_ps(scale, _mm256_set1_ps(x.d));
                *sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), factor, *sum);
            }
        }
        for (sum, out) in sums.iter().zip(out) {
            store(out, *sum);
        }
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quantise(row: &[f32], out: &mut [QuantBlock], stride: usize) {
    let sign = _mm256_set1_ps(-0.0);
    for (x, out) in row.as_chunks::<QUANT>().0.iter().zip(out.iter_mut().step_by(stride)) {
        let x = x.as_chunks::<LANES>().0;
        let x: [__m256; 4] = from_fn(|at| load(&x[at]));
        let [a, b, c, d] = x.map(|x| _mm256_andnot_ps(sign, x));
        let max = largest(_mm256_max_ps(_mm256_max_ps(a, b), _mm256_max_ps(c, d)));
        let (d, inverse) =
            if max >= SMALLEST_MAX { (max / 127.0, 127.0 / max) } else { (0.0, 0.0) };
        let inverse = _mm256_set1_ps(inverse);
        let q = x.map(|x| _mm256_cvtps_epi32(_mm256_mul_ps(x, inverse)));
        let sums = _mm256_add_epi32(_mm256_add_epi32(q[0], q[1]), _mm256_add_epi32(q[2], q[3]));
        // Packing works within halves of a vector: the permutation brings words back into order.
        let bytes =
            _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
        let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        // SAFETY: `q` is 32 writable bytes.
        unsafe {
            _mm256_storeu_si256(
                out.q.as_mut_ptr().cast(),
                _mm256_permutevar8x32_epi32(bytes, order),
            );
        }
        let mut lanes = [0_i32; LANES];
        // SAFETY: `lanes` is 32 writable bytes.
        unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), sums) };
        out.d = d;
        out.sum = d * lanes.iter().sum::<i32>() as f32;
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn broadcast(word: u32) -> __m256i {
    _mm256_set1_epi32(word.cast_signed())
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn load_bytes(from: &[u8; 32]) -> __m256i {
    // SAFETY: 32 readable bytes.
    unsafe { _mm256_loadu_si256(from.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn load_f16(from: &[u8; 16]) -> __m256 {
    // SAFETY: 16 readable bytes.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(from.as_ptr().cast()) })
}
