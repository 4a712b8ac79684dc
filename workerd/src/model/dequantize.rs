//! Stored rows as f32: what a weight *means*, one element at a time. Kernels are the back ends' business.
//!
//! F8_E4M3 is a number of 8 bits ([`E4M3`]), times a scale of the whole matrix, of its row or of its block. Quantised types as GGUF has
//! them. An element is `scale * (code - offset)` or `scale * code + minimum`; codes are
//! 4 to 8 bits:
//!
//! | type | a block, in bytes |
//! | --- | --- |
//! | Q8_0 | f16 scale, 32 × i8 |
//! | Q4_0, Q4_1 | f16 scale, (Q4_1: f16 minimum), 16 × two nibbles: elements `i` (low) and `16 + i` |
//! | Q5_0, Q5_1 | f16 scale, (Q5_1: f16 minimum), 32 fifth bits, nibbles as above |
//! | Q4_K | f16 `d`, f16 `dmin`, 8 × 6-bit scale and minimum in 12 bytes, 4 × 32 × two nibbles: elements `64 k + i` (low) and `64 k + 32 + i`; scales are `d` times, minima `-dmin` times the 6 bits |
//! | Q5_K | as Q4_K, with 32 bytes before the nibbles: bit `k` of byte `i` is the fifth bit of element `32 k + i` |
//! | Q6_K | 128 bytes of nibbles, 64 bytes of two upper bits, 16 × i8 scale, f16 `d` |

use std::array::from_fn;

use half::{bf16, f16};

use super::{Weight, WeightType};

/// Elements that [`codes`] gives at a time.
const GROUP: usize = 32;

/// Row `row` of a matrix as f32, `weight.cols` elements.
///
/// # Panics
/// When `row` is not below `weight.rows`: a bug of the caller.
pub fn dequantize(weight: &Weight, row: usize) -> Vec<f32> {
    assert!(row < weight.rows, "row {row} of a matrix of {} rows", weight.rows);
    let n = weight.dtype.row_bytes(weight.cols);
    let bytes = &weight.bytes[row * n..(row + 1) * n];
    match weight.dtype {
        WeightType::F32 => {
            bytes.as_chunks::<4>().0.iter().map(|w| f32::from_le_bytes(*w)).collect()
        }
        WeightType::F16 => {
            bytes.as_chunks::<2>().0.iter().map(|w| f16::from_le_bytes(*w).to_f32()).collect()
        }
        WeightType::Bf16 => {
            bytes.as_chunks::<2>().0.iter().map(|w| bf16::from_le_bytes(*w).to_f32()).collect()
        }
        WeightType::F8E4M3 => {
            let mut values: Vec<_> = bytes.iter().map(|byte| E4M3[usize::from(*byte)]).collect();
            weight.scales.apply(row, &mut values);
            values
        }
        dtype => (0..weight.cols / GROUP).flat_map(|at| group(dtype, bytes, at)).collect(),
    }
}

/// Row `row` of a matrix as bf16, nearest even, into `out` (`2 * weight.cols` bytes).
///
/// # Panics
/// As [`dequantize()`].
pub fn put_bf16(weight: &Weight, row: usize, out: &mut [u8]) {
    for (out, value) in out.as_chunks_mut::<2>().0.iter_mut().zip(dequantize(weight, row)) {
        *out = bf16::from_f32(value).to_le_bytes();
    }
}

/// What each byte of F8_E4M3 means.
pub const E4M3: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut byte = 0;
    while byte < table.len() {
        table[byte] = e4m3(byte as u8);
        byte += 1;
    }
    table
};

/// Sign, 4 bits of exponent (bias 7), 3 of mantissa. All of these set is no number; there are no infinities.
const fn e4m3(byte: u8) -> f32 {
    let (exponent, mantissa) = ((byte >> 3 & 15) as u32, (byte & 7) as u32);
    let magnitude = match (exponent, mantissa) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa as f32 / 512.0,
        _ => f32::from_bits((exponent + 120) << 23 | mantissa << 20),
    };
    if byte & 0x80 == 0 { magnitude } else { -magnitude }
}

/// Elements `32 * at..` of a quantised row.
fn group(dtype: WeightType, row: &[u8], at: usize) -> [f32; GROUP] {
    let codes = codes(dtype, row, at);
    let half = |at: usize| f16::from_le_bytes([row[at], row[at + 1]]).to_f32();
    // Of the block that they are in.
    let start = at * GROUP / dtype.block().0 as usize * dtype.block().1 as usize;
    let less = |scale: f32, offset: i32| codes.map(|q| scale * (i32::from(q) - offset) as f32);
    let affine = |scale: f32, minimum: f32| codes.map(|q| scale * f32::from(q) + minimum);
    match dtype {
        WeightType::Q8_0 => codes.map(|q| half(start) * f32::from(q.cast_signed())),
        WeightType::Q4_0 => less(half(start), 8),
        WeightType::Q5_0 => less(half(start), 16),
        WeightType::Q4_1 | WeightType::Q5_1 => affine(half(start), half(start + 2)),
        WeightType::Q4K | WeightType::Q5K => {
            let (scale, minimum) = six_bits(&row[start + 4..], at % 8);
            affine(half(start) * f32::from(scale), -(half(start + 2) * f32::from(minimum)))
        }
        WeightType::Q6K => {
            let scale = |i: usize| f32::from(row[start + 192 + at % 8 * 2 + i / 16].cast_signed());
            from_fn(|i| half(start + 208) * scale(i) * (f32::from(codes[i]) - 32.0))
        }
        WeightType::F32 | WeightType::F16 | WeightType::Bf16 | WeightType::F8E4M3 => {
            unreachable!("no codes")
        }
    }
}

/// The codes of elements `32 * at..` of a quantised row, as stored (those of Q8_0 are two's complements).
///
/// # Panics
/// If the type has no codes or the row no such elements.
pub fn codes(dtype: WeightType, row: &[u8], at: usize) -> [u8; GROUP] {
    let nibbles = |from: usize| -> [u8; GROUP] {
        let bytes = &row[from..from + 16];
        from_fn(|i| if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 })
    };
    let fifths = |from: usize, nibbles: [u8; GROUP]| -> [u8; GROUP] {
        let bits = u32::from_le_bytes([row[from], row[from + 1], row[from + 2], row[from + 3]]);
        from_fn(|i| nibbles[i] | ((bits >> i & 1) as u8) << 4)
    };
    let (block, part) = (at / 8 * dtype.row_bytes(256), at % 8);
    match dtype {
        WeightType::Q8_0 => from_fn(|i| row[at * 34 + 2 + i]),
        WeightType::Q4_0 => nibbles(at * 18 + 2),
        WeightType::Q4_1 => nibbles(at * 20 + 4),
        WeightType::Q5_0 => fifths(at * 22 + 2, nibbles(at * 22 + 6)),
        WeightType::Q5_1 => fifths(at * 24 + 4, nibbles(at * 24 + 8)),
        WeightType::Q4K => {
            let bytes = &row[block + 16 + part / 2 * 32..][..32];
            from_fn(|i| bytes[i] >> (part % 2 * 4) & 15)
        }
        WeightType::Q5K => {
            let (fifth, bytes) = row[block + 16..].split_at(32);
            let bytes = &bytes[part / 2 * 32..][..32];
            from_fn(|i| bytes[i] >> (part % 2 * 4) & 15 | (fifth[i] >> part & 1) << 4)
        }
        WeightType::Q6K => {
            let (half, quarter) = (part / 4, part % 4);
            let low = &row[block + half * 64 + quarter % 2 * 32..][..32];
            let high = &row[block + 128 + half * 32..][..32];
            from_fn(|i| low[i] >> (quarter / 2 * 4) & 15 | (high[i] >> (quarter * 2) & 3) << 4)
        }
        WeightType::F32 | WeightType::F16 | WeightType::Bf16 | WeightType::F8E4M3 => {
            panic!("{dtype:?} has no codes")
        }
    }
}

/// The 6-bit scale and minimum number `at` of 8, from the 12 bytes that Q4_K and Q5_K pack them into.
pub fn six_bits(bytes: &[u8], at: usize) -> (u8, u8) {
    if at < 4 {
        (bytes[at] & 63, bytes[at + 4] & 63)
    } else {
        let upper = |i: usize| bytes[i] >> 6 << 4;
        (bytes[at + 4] & 15 | upper(at - 4), bytes[at + 4] >> 4 | upper(at))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::{Blocks, Scales};

    fn row(dtype: WeightType, cols: usize, bytes: Vec<u8>) -> Vec<f32> {
        let scales = Scales::One;
        dequantize(&Weight { dtype, rows: 1, cols, bytes: Arc::new(bytes), scales }, 0)
    }

    fn from_hex(text: &str) -> Vec<u8> {
        (0..text.len())
            .step_by(2)
            .map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap())
            .collect()
    }

    #[test]
    fn quantised_blocks_mean_what_gguf_files_mean_by_them() {
        let mut seen = Vec::new();
        for line in include_str!("dequantized.txt").lines().skip(1) {
            let [name, blocks, expected] = line.split(' ').collect::<Vec<_>>()[..] else {
                panic!()
            };
            let dtype = WeightType::ALL.into_iter().find(|t| t.name() == name).unwrap();
            let expected: Vec<f32> = from_hex(expected)
                .as_chunks::<4>()
                .0
                .iter()
                .map(|bytes| f32::from_le_bytes(*bytes))
                .collect();
            assert_eq!(row(dtype, expected.len(), from_hex(blocks)), expected, "{name}");
            seen.push(dtype);
        }
        assert_eq!(seen.len(), WeightType::ALL.len() - 4);
    }

    #[test]
    fn a_q4_1_block_holds_its_first_half_in_the_low_nibbles() {
        let mut block = Vec::new();
        block.extend(f16::from_f32(0.5).to_le_bytes());
        block.extend(f16::from_f32(-2.0).to_le_bytes());
        block.extend((0..16u8).map(|i| i | (15 - i) << 4));
        let got = row(WeightType::Q4_1, 32, block);
        let ramp = (0..16).map(|i| i as f32 * 0.5 - 2.0);
        let expected: Vec<f32> = ramp.clone().chain(ramp.rev()).collect();
        assert_eq!(got, expected);
    }

    #[test]
    fn a_q8_0_block_is_signed() {
        let mut block = f16::from_f32(0.25).to_le_bytes().to_vec();
        block.extend((0..32).map(|i| (i as i8 - 16) as u8));
        let expected: Vec<f32> = (0..32).map(|i| (i as f32 - 16.0) * 0.25).collect();
        assert_eq!(row(WeightType::Q8_0, 32, block), expected);
    }

    #[test]
    fn each_byte_of_e4m3_means_what_the_format_says() {
        for (byte, got) in (0..=255_u8).zip(E4M3) {
            let sign = if byte >= 128 { -1.0 } else { 1.0 };
            let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f64::from(byte & 7));
            let expected = match exponent {
                0 => sign * mantissa / 8.0 * 2_f64.powi(-6),
                _ => sign * (1.0 + mantissa / 8.0) * 2_f64.powi(exponent - 7),
            };
            if byte & 0x7f == 0x7f {
                assert!(got.is_nan(), "{byte:#x}: {got}");
            } else {
                assert_eq!(f64::from(got), expected, "{byte:#x}");
                assert_eq!(got.is_sign_negative(), byte >= 128, "{byte:#x}");
            }
        }
        assert_eq!(
            [0x38, 0x7e, 0x01, 0x08].map(|b: usize| E4M3[b]),
            [1.0, 448.0, 0.001_953_125, 0.015_625]
        );
    }

    #[test]
    fn e4m3_is_scaled_as_a_whole_row_by_row_or_block_by_block() {
        let weight = |scales| Weight {
            dtype: WeightType::F8E4M3,
            rows: 2,
            cols: 2,
            bytes: Arc::new(vec![0x38, 0xb8, 0x40, 0x7e]),
            scales,
        };
        let rows = |scales: Scales| {
            let weight = weight(scales);
            [0, 1].map(|row| dequantize(&weight, row))
        };
        assert_eq!(rows(Scales::One), [vec![1.0, -1.0], vec![2.0, 448.0]]);
        assert_eq!(rows(Scales::Tensor(0.25)), [vec![0.25, -0.25], vec![0.5, 112.0]]);
        let scales = Scales::Rows(Arc::new(vec![0.5, 3.0]));
        assert_eq!(rows(scales), [vec![0.5, -0.5], vec![6.0, 1344.0]]);
        let blocks = |shape, scales: &[f32]| {
            Scales::Blocks(Blocks { shape, scales: Arc::new(scales.to_vec()) })
        };
        let each = blocks([1, 1], &[0.5, 2.0, 3.0, 0.25]);
        assert_eq!(rows(each), [vec![0.5, -2.0], vec![6.0, 112.0]]);
        // Cut short by the matrix's end.
        let upright = blocks([128, 1], &[0.5, 2.0]);
        assert_eq!(rows(upright), [vec![0.5, -2.0], vec![1.0, 896.0]]);
        assert_eq!(rows(blocks([128, 128], &[2.0])), [vec![2.0, -2.0], vec![4.0, 896.0]]);
    }

    #[test]
    fn a_row_as_bf16_is_rounded_to_nearest_even() {
        // 1 + 2^-8 and 1 + 3 * 2^-8 lie between two bf16 numbers each.
        for (scale, expected) in [(1.0 + 1.0 / 256.0, 1.0), (1.0 + 3.0 / 256.0, 1.015_625)] {
            let bytes = Arc::new(vec![0x38, 0xb8]);
            let (dtype, scales) = (WeightType::F8E4M3, Scales::Tensor(scale));
            let weight = Weight { dtype, rows: 1, cols: 2, bytes, scales };
            let mut row = [0; 4];
            put_bf16(&weight, 0, &mut row);
            let got = row.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32());
            assert_eq!(got.collect::<Vec<_>>(), [expected, -expected]);
        }
    }

    #[test]
    fn all_float_types_of_the_same_number_mean_it() {
        for x in [0.0f32, 1.0, -0.15625] {
            assert_eq!(row(WeightType::F32, 1, x.to_le_bytes().to_vec()), [x]);
            assert_eq!(row(WeightType::F16, 1, f16::from_f32(x).to_le_bytes().to_vec()), [x]);
            assert_eq!(row(WeightType::Bf16, 1, bf16::from_f32(x).to_le_bytes().to_vec()), [x]);
        }
    }
}
