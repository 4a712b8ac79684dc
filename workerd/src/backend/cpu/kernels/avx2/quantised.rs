//! Products of quantised weights with quantised activations: 8 rows a vector, two vectors a panel.
//!
//! Codes without a sign meet activations in `vpmaddubsw`, whose sums of pairs are added as i16 for as long as they fit:
//! 8 times for 4 bits (8 * 2 * 15 * 127 = 30,480), 4 times for 5 bits (31,496), twice for 6 bits (32,004).
#![expect(unsafe_code, reason = "vector loads and stores")]

use std::arch::asm;
use std::arch::x86_64::*;
use std::array::from_fn;

use super::super::{LANES, QUANT, QuantBlock, ROWS, SMALLEST_MAX, TOKENS};
use super::{bytes, largest, load, store};
use crate::backend::cpu::repack::Group;
use crate::model::WeightType;

/// See [`super::super::Kernels::quantised`].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn product(
    dtype: WeightType,
    panels: &[u8],
    tile: &[QuantBlock],
    tokens: usize,
    out: &mut [f32],
) {
    macro_rules! by_type {
        ($($dtype:ident)*) => {
            match dtype {
                $(WeightType::$dtype => {
                    product_of::<{ WeightType::$dtype as usize }>(panels, tile, tokens, out);
                })*
                WeightType::F32 | WeightType::F16 | WeightType::Bf16 | WeightType::F8E4M3 => {
                    panic!("{dtype:?} here")
                }
            }
        };
    }
    by_type!(Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q4K Q5K Q6K);
}

/// Tokens that are worked on side by side, so that none waits for its own sums.
const ABREAST: usize = 4;

#[target_feature(enable = "avx2,fma,f16c")]
fn product_of<const TYPE: usize>(
    panels: &[u8],
    tile: &[QuantBlock],
    tokens: usize,
    out: &mut [f32],
) {
    let group = const { Group::of(WeightType::ALL[TYPE]).expect("a quantised type") };
    let groups = tile.len() / (tokens * group.blocks);
    let panels = panels.chunks_exact(groups * group.bytes());
    let mut sums = [[_mm256_setzero_ps(); 2]; TOKENS];
    let sums = &mut sums[..tokens];
    for (panel, out) in panels.zip(out.chunks_exact_mut(tokens * ROWS)) {
        sums.fill([_mm256_setzero_ps(); 2]);
        let groups = panel.chunks_exact(group.bytes());
        let tiles = tile.chunks_exact(tokens * group.blocks);
        for (bytes, tile) in groups.zip(tiles) {
            let (head, blocks) = bytes.split_at(group.head);
            let blocks = blocks.chunks_exact(group.block()).zip(tile.chunks_exact(tokens));
            for (within, (block, tile)) in blocks.enumerate() {
                for half in 0..2 {
                    let weights = Weights::read::<TYPE>(head, within, block, half);
                    let (several, rest) = tile.as_chunks::<ABREAST>();
                    let (several_sums, rest_sums) = sums.as_chunks_mut::<ABREAST>();
                    for (x, sums) in several.iter().zip(several_sums) {
                        weights.multiply::<TYPE, ABREAST>(x, sums, half);
                    }
                    for (x, sums) in rest.iter().zip(rest_sums) {
                        weights.multiply::<TYPE, 1>(&[*x], std::array::from_mut(sums), half);
                    }
                }
            }
        }
        let (out, _) = out.as_chunks_mut::<LANES>();
        for (sum, out) in sums.as_flattened().iter().zip(out) {
            store(out, *sum);
        }
    }
}

/// A block of 8 rows.
#[derive(Clone, Copy)]
struct Weights {
    /// Columns `4 i..` of each row.
    codes: [__m256i; 8],
    scale: __m256,
    minimum: __m256,
    /// Of Q6_K: scales of the first and the last 16 columns, each twice in a lane; what the halves' sums count.
    six: [__m256i; 3],
}

impl Weights {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn read<const TYPE: usize>(head: &[u8], within: usize, block: &[u8], half: usize) -> Self {
        let dtype = const { WeightType::ALL[TYPE] };
        let group = const { Group::of(WeightType::ALL[TYPE]).expect("a quantised type") };
        let (high, low) = block.split_at(group.high);
        let halves = |index: usize| f16s(bytes(head, index * 2 * ROWS + half * 16));
        let mut six = [_mm256_setzero_si256(); 3];
        let scale = halves(0);
        let (scale, minimum) = match dtype {
            WeightType::Q4_0 => (scale, _mm256_mul_ps(scale, _mm256_set1_ps(-8.0))),
            WeightType::Q5_0 => (scale, _mm256_mul_ps(scale, _mm256_set1_ps(-16.0))),
            WeightType::Q4_1 | WeightType::Q5_1 => (scale, halves(1)),
            WeightType::Q4K | WeightType::Q5K => {
                let number = |index: usize| {
                    let at = 4 * ROWS + (within * 2 + index) * ROWS + half * 8;
                    _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight_bytes(bytes(head, at))))
                };
                let minimum = _mm256_mul_ps(halves(1), number(1));
                let minus = _mm256_set1_ps(-0.0);
                (_mm256_mul_ps(scale, number(0)), _mm256_xor_ps(minimum, minus))
            }
            WeightType::Q6K => {
                let twice = |index: usize| {
                    let at = 2 * ROWS + (within * 2 + index) * ROWS + half * 8;
                    let number = _mm256_cvtepi8_epi32(eight_bytes(bytes(head, at)));
                    let lower = _mm256_and_si256(number, _mm256_set1_epi32(0xffff));
                    _mm256_or_si256(lower, _mm256_slli_epi32::<16>(number))
                };
                let (first, last) = (twice(0), twice(1));
                let both = _mm256_blend_epi16::<0b1010_1010>(first, last);
                six = [first, last, _mm256_mullo_epi16(both, _mm256_set1_epi16(-32))];
                (scale, _mm256_setzero_ps())
            }
            _ => (scale, _mm256_setzero_ps()),
        };
        let vector = |from: &[u8], index: usize| load_bytes(bytes(from, index * 64 + half * 32));
        let nibbles: [__m256i; 8] = from_fn(|i| {
            let both = vector(low, i % 4);
            let wanted = if i < 4 { both } else { _mm256_srli_epi16::<4>(both) };
            _mm256_and_si256(wanted, _mm256_set1_epi8(15))
        });
        let codes = match group.high / 64 {
            _ if dtype == WeightType::Q8_0 => from_fn(|i| vector(low, i)),
            0 => nibbles,
            1 => {
                let bits = vector(high, 0);
                let masked = |bits| _mm256_and_si256(bits, _mm256_set1_epi8(16));
                let fifths = [
                    masked(_mm256_slli_epi16::<4>(bits)),
                    masked(_mm256_slli_epi16::<3>(bits)),
                    masked(_mm256_slli_epi16::<2>(bits)),
                    masked(_mm256_slli_epi16::<1>(bits)),
                    masked(bits),
                    masked(_mm256_srli_epi16::<1>(bits)),
                    masked(_mm256_srli_epi16::<2>(bits)),
                    masked(_mm256_srli_epi16::<3>(bits)),
                ];
                from_fn(|i| _mm256_or_si256(nibbles[i], fifths[i]))
            }
            _ => {
                let masked = |bits| _mm256_and_si256(bits, _mm256_set1_epi8(48));
                let four = |bits| {
                    [
                        masked(_mm256_slli_epi16::<4>(bits)),
                        masked(_mm256_slli_epi16::<2>(bits)),
                        masked(bits),
                        masked(_mm256_srli_epi16::<2>(bits)),
                    ]
                };
                let upper = [four(vector(high, 0)), four(vector(high, 1))];
                from_fn(|i| _mm256_or_si256(nibbles[i], upper[i / 4][i % 4]))
            }
        };
        Self { codes, scale, minimum, six }
    }

    /// Adds the block's products with `N` tokens.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn multiply<const TYPE: usize, const N: usize>(
        &self,
        x: &[QuantBlock; N],
        sums: &mut [[__m256; 2]; N],
        half: usize,
    ) {
        let dtype = const { WeightType::ALL[TYPE] };
        let dots = match dtype {
            WeightType::Q8_0 => self.signed(x),
            WeightType::Q6K => self.six(x),
            WeightType::Q5_0 | WeightType::Q5_1 | WeightType::Q5K => {
                let dots = [self.unsigned::<N, 4>(x, 0), self.unsigned::<N, 4>(x, 4)];
                from_fn(|n| _mm256_add_epi32(dots[0][n], dots[1][n]))
            }
            _ => self.unsigned::<N, 8>(x, 0),
        };
        for n in 0..N {
            let factor = _mm256_mul_ps(self.scale, _mm256_set1_ps(x[n].d));
            let mut sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[n]), factor, sums[n][half]);
            if !matches!(dtype, WeightType::Q8_0 | WeightType::Q6K) {
                sum = _mm256_fmadd_ps(self.minimum, _mm256_set1_ps(x[n].sum), sum);
            }
            sums[n][half] = sum;
        }
    }

    /// Sums of the products of `STEPS` vectors of codes from `first` on.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn unsigned<const N: usize, const STEPS: usize>(
        &self,
        x: &[QuantBlock; N],
        first: usize,
    ) -> [__m256i; N] {
        let pairs = |i: usize, n: usize| _mm256_maddubs_epi16(self.codes[i], broadcast(x[n].q[i]));
        let mut sums: [__m256i; N] = from_fn(|n| pairs(first, n));
        for i in first + 1..first + STEPS {
            for (n, sum) in sums.iter_mut().enumerate() {
                *sum = in_order(_mm256_add_epi16(*sum, pairs(i, n)));
            }
        }
        sums.map(|sum| _mm256_madd_epi16(sum, _mm256_set1_epi16(1)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn six<const N: usize>(&self, x: &[QuantBlock; N]) -> [__m256i; N] {
        let mut sums = [_mm256_setzero_si256(); N];
        for (x, sum) in x.iter().zip(&mut sums) {
            let [a, b] = x.halves.map(|half| u32::from(half.cast_unsigned()));
            *sum = _mm256_madd_epi16(self.six[2], broadcast(a | b << 16));
        }
        for i in (0..8).step_by(2) {
            for (x, sum) in x.iter().zip(&mut sums) {
                let pairs = |i: usize| _mm256_maddubs_epi16(self.codes[i], broadcast(x.q[i]));
                let pairs = _mm256_add_epi16(pairs(i), pairs(i + 1));
                let fours = _mm256_madd_epi16(pairs, self.six[i / 4]);
                *sum = in_order(_mm256_add_epi32(*sum, fours));
            }
        }
        sums
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn signed<const N: usize>(&self, x: &[QuantBlock; N]) -> [__m256i; N] {
        let mut sums = [_mm256_setzero_si256(); N];
        for (i, code) in self.codes.into_iter().enumerate() {
            for (x, sum) in x.iter().zip(&mut sums) {
                // |w| times x with w's sign: a pair is at most 2 * 128 * 127 = 32,512.
                let signed = _mm256_sign_epi8(broadcast(x.q[i]), code);
                let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(code), signed);
                let fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
                *sum = in_order(_mm256_add_epi32(*sum, fours));
            }
        }
        sums
    }
}

/// Keeps the compiler from adding up in another order, for which there are too few registers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn in_order(mut sum: __m256i) -> __m256i {
    // SAFETY: no instruction at all.
    unsafe {
        asm!("/* {0} */", inout(ymm_reg) sum, options(pure, nomem, nostack, preserves_flags));
    }
    sum
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
        let halves = [whole(_mm256_add_epi32(q[0], q[1])), whole(_mm256_add_epi32(q[2], q[3]))];
        out.d = d;
        out.sum = d * (halves[0] + halves[1]) as f32;
        out.halves = halves.map(|sum| sum as i16);
    }
}

/// The sum of the lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn whole(x: __m256i) -> i32 {
    let x = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
    let x = _mm_add_epi32(x, _mm_shuffle_epi32::<0b01_00_11_10>(x));
    _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32::<0b10_11_00_01>(x)))
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
fn eight_bytes(from: &[u8; 8]) -> __m128i {
    // SAFETY: 8 readable bytes.
    unsafe { _mm_loadl_epi64(from.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn f16s(from: &[u8; 16]) -> __m256 {
    // SAFETY: 16 readable bytes.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(from.as_ptr().cast()) })
}
