//! Products of quantised weights with quantised activations: a panel's 16 rows are one vector.
//!
//! `vpdpbusd` takes codes without a sign and sums in i32, where nothing overflows; codes with a sign are shifted by 128
//! and what that adds is taken away again.
#![expect(unsafe_code, reason = "vector loads")]

use std::arch::x86_64::*;
use std::array::from_fn;

use super::super::avx2::bytes;
use super::super::{QuantBlock, ROWS, TOKENS};
use super::{f16s, store};
use crate::backend::cpu::repack::Group;
use crate::model::WeightType;

/// See [`super::super::Kernels::quantised`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
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

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn product_of<const TYPE: usize>(
    panels: &[u8],
    tile: &[QuantBlock],
    tokens: usize,
    out: &mut [f32],
) {
    let group = const { Group::of(WeightType::ALL[TYPE]).expect("a quantised type") };
    let groups = tile.len() / (tokens * group.blocks);
    let panels = panels.chunks_exact(groups * group.bytes());
    let (out, _) = out.as_chunks_mut::<ROWS>();
    let mut sums = [_mm512_setzero_ps(); TOKENS];
    for (panel, out) in panels.zip(out.chunks_exact_mut(tokens)) {
        if tokens == 1 {
            // Of a length that the compiler knows, the sum stays in a register.
            let mut sum = [_mm512_setzero_ps()];
            add_panel::<TYPE>(panel, tile, &mut sum);
            store(&mut out[0], sum[0]);
        } else {
            let sums = &mut sums[..tokens];
            sums.fill(_mm512_setzero_ps());
            add_panel::<TYPE>(panel, tile, sums);
            for (sum, out) in sums.iter().zip(out) {
                store(out, *sum);
            }
        }
    }
}

/// Adds a panel's products with each token to its sum.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn add_panel<const TYPE: usize>(panel: &[u8], tile: &[QuantBlock], sums: &mut [__m512]) {
    let group = const { Group::of(WeightType::ALL[TYPE]).expect("a quantised type") };
    let tokens = sums.len();
    let groups = panel.chunks_exact(group.bytes());
    for (bytes, tile) in groups.zip(tile.chunks_exact(tokens * group.blocks)) {
        let (head, blocks) = bytes.split_at(group.head);
        let blocks = blocks.chunks_exact(group.block()).zip(tile.chunks_exact(tokens));
        for (within, (block, tile)) in blocks.enumerate() {
            let weights = Weights::read::<TYPE>(head, within, block);
            for (x, sum) in tile.iter().zip(&mut *sums) {
                *sum = weights.multiply::<TYPE>(x, *sum);
            }
        }
    }
}

/// A block of a panel.
#[derive(Clone, Copy)]
struct Weights {
    /// Columns `4 i..` of each row, without a sign.
    codes: [__m512i; 8],
    scale: __m512,
    minimum: __m512,
    /// Of Q6_K: scales of the first and the last 16 columns.
    six: [__m512i; 2],
    /// What is taken away for each of the activations' halves.
    offset: __m512i,
}

impl Weights {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
    fn read<const TYPE: usize>(head: &[u8], within: usize, block: &[u8]) -> Self {
        let dtype = const { WeightType::ALL[TYPE] };
        let group = const { Group::of(WeightType::ALL[TYPE]).expect("a quantised type") };
        let (high, low) = block.split_at(group.high);
        let halves = |index: usize| f16s(bytes(head, index * 2 * ROWS));
        let scale = halves(0);
        let mut six = [_mm512_setzero_si512(); 2];
        let mut offset = _mm512_set1_epi16(-128);
        let (scale, minimum) = match dtype {
            WeightType::Q4_0 => (scale, _mm512_mul_ps(scale, _mm512_set1_ps(-8.0))),
            WeightType::Q5_0 => (scale, _mm512_mul_ps(scale, _mm512_set1_ps(-16.0))),
            WeightType::Q4_1 | WeightType::Q5_1 => (scale, halves(1)),
            WeightType::Q4K | WeightType::Q5K => {
                let number = |index: usize| {
                    let at = 4 * ROWS + (within * 2 + index) * ROWS;
                    _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(sixteen_bytes(bytes(head, at))))
                };
                let minimum = _mm512_mul_ps(halves(1), number(1));
                let minus = _mm512_castps_si512(_mm512_set1_ps(-0.0));
                let minimum = _mm512_xor_si512(_mm512_castps_si512(minimum), minus);
                (_mm512_mul_ps(scale, number(0)), _mm512_castsi512_ps(minimum))
            }
            WeightType::Q6K => {
                six = from_fn(|index| {
                    let at = 2 * ROWS + (within * 2 + index) * ROWS;
                    _mm512_cvtepi8_epi32(sixteen_bytes(bytes(head, at)))
                });
                let both =
                    _mm512_mask_blend_epi16(0xaaaa_aaaa, six[0], _mm512_slli_epi32::<16>(six[1]));
                offset = _mm512_mullo_epi16(both, _mm512_set1_epi16(-32));
                (scale, _mm512_setzero_ps())
            }
            _ => (scale, _mm512_setzero_ps()),
        };
        let vector = |from: &[u8], index: usize| load_bytes(bytes(from, index * 64));
        let nibbles: [__m512i; 8] = from_fn(|i| {
            let both = vector(low, i % 4);
            let wanted = if i < 4 { both } else { _mm512_srli_epi16::<4>(both) };
            _mm512_and_si512(wanted, _mm512_set1_epi8(15))
        });
        let codes = match group.high / 64 {
            _ if dtype == WeightType::Q8_0 => {
                from_fn(|i| _mm512_xor_si512(vector(low, i), _mm512_set1_epi8(-128)))
            }
            0 => nibbles,
            1 => {
                let bits = vector(high, 0);
                let masked = |bits| _mm512_and_si512(bits, _mm512_set1_epi8(16));
                let fifths = [
                    masked(_mm512_slli_epi16::<4>(bits)),
                    masked(_mm512_slli_epi16::<3>(bits)),
                    masked(_mm512_slli_epi16::<2>(bits)),
                    masked(_mm512_slli_epi16::<1>(bits)),
                    masked(bits),
                    masked(_mm512_srli_epi16::<1>(bits)),
                    masked(_mm512_srli_epi16::<2>(bits)),
                    masked(_mm512_srli_epi16::<3>(bits)),
                ];
                from_fn(|i| _mm512_or_si512(nibbles[i], fifths[i]))
            }
            _ => {
                let masked = |bits| _mm512_and_si512(bits, _mm512_set1_epi8(48));
                let four = |bits| {
                    [
                        masked(_mm512_slli_epi16::<4>(bits)),
                        masked(_mm512_slli_epi16::<2>(bits)),
                        masked(bits),
                        masked(_mm512_srli_epi16::<2>(bits)),
                    ]
                };
                let upper = [four(vector(high, 0)), four(vector(high, 1))];
                from_fn(|i| _mm512_or_si512(nibbles[i], upper[i / 4][i % 4]))
            }
        };
        Self { codes, scale, minimum, six, offset }
    }

    /// `sum` and the block's product with a token.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
    fn multiply<const TYPE: usize>(&self, x: &QuantBlock, sum: __m512) -> __m512 {
        let dtype = const { WeightType::ALL[TYPE] };
        let (mut near, mut far) = (_mm512_setzero_si512(), _mm512_setzero_si512());
        if dtype == WeightType::Q8_0 {
            near = _mm512_dpwssd_epi32(near, self.offset, halves(x));
        }
        for i in 0..4 {
            near = _mm512_dpbusd_epi32(near, self.codes[i], word(x, i));
            far = _mm512_dpbusd_epi32(far, self.codes[i + 4], word(x, i + 4));
        }
        if dtype == WeightType::Q6K {
            near = _mm512_mullo_epi32(near, self.six[0]);
            far = _mm512_mullo_epi32(far, self.six[1]);
            near = _mm512_dpwssd_epi32(near, self.offset, halves(x));
        }
        let dot = _mm512_cvtepi32_ps(_mm512_add_epi32(near, far));
        let sum = _mm512_fmadd_ps(dot, _mm512_mul_ps(self.scale, _mm512_set1_ps(x.d)), sum);
        if matches!(dtype, WeightType::Q8_0 | WeightType::Q6K) {
            return sum;
        }
        _mm512_fmadd_ps(self.minimum, _mm512_set1_ps(x.sum), sum)
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn word(x: &QuantBlock, index: usize) -> __m512i {
    _mm512_set1_epi32(x.q[index].cast_signed())
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn halves(x: &QuantBlock) -> __m512i {
    let [a, b] = x.halves.map(|half| u32::from(half.cast_unsigned()));
    _mm512_set1_epi32((a | b << 16).cast_signed())
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn load_bytes(from: &[u8; 64]) -> __m512i {
    // SAFETY: 64 readable bytes.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
fn sixteen_bytes(from: &[u8; 16]) -> __m128i {
    // SAFETY: 16 readable bytes.
    unsafe { _mm_loadu_si128(from.as_ptr().cast()) }
}
