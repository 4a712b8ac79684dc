//! Stored rows as f32: what a weight *means*, one element at a time. Kernels are the back ends' business.

use half::{bf16, f16};

use super::{Weight, WeightType};

/// Row `row` of a matrix as f32, `weight.cols` elements.
///
/// # Panics
/// When `row` is not below `weight.rows`: a bug of the caller.
pub fn dequantize(weight: &Weight, row: usize) -> Vec<f32> {
    assert!(row < weight.rows, "row {row} of a matrix of {} rows", weight.rows);
    let n = weight.dtype.row_bytes(weight.cols);
    let bytes = &weight.bytes[row * n..(row + 1) * n];
    let mut out = Vec::with_capacity(weight.cols);
    match weight.dtype {
        WeightType::F32 => {
            let (words, _) = bytes.as_chunks::<4>();
            out.extend(words.iter().map(|w| f32::from_le_bytes(*w)));
        }
        WeightType::F16 => {
            let (words, _) = bytes.as_chunks::<2>();
            out.extend(words.iter().map(|w| f16::from_le_bytes(*w).to_f32()));
        }
        WeightType::Bf16 => {
            let (words, _) = bytes.as_chunks::<2>();
            out.extend(words.iter().map(|w| bf16::from_le_bytes(*w).to_f32()));
        }
        WeightType::Q8_0 => {
            let (blocks, _) = bytes.as_chunks::<34>();
            for b in blocks {
                let scale = f16::from_le_bytes([b[0], b[1]]).to_f32();
                out.extend(b[2..].iter().map(|q| f32::from(*q as i8) * scale));
            }
        }
        WeightType::Q4_1 => {
            let (blocks, _) = bytes.as_chunks::<20>();
            for b in blocks {
                let scale = f16::from_le_bytes([b[0], b[1]]).to_f32();
                let least = f16::from_le_bytes([b[2], b[3]]).to_f32();
                out.extend(b[4..].iter().map(|q| f32::from(q & 15) * scale + least));
                out.extend(b[4..].iter().map(|q| f32::from(q >> 4) * scale + least));
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn row(dtype: WeightType, cols: usize, bytes: Vec<u8>) -> Vec<f32> {
        dequantize(&Weight { dtype, rows: 1, cols, bytes: Arc::new(bytes) }, 0)
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
    fn all_float_types_of_the_same_number_mean_it() {
        for x in [0.0f32, 1.0, -0.15625] {
            assert_eq!(row(WeightType::F32, 1, x.to_le_bytes().to_vec()), [x]);
            assert_eq!(row(WeightType::F16, 1, f16::from_f32(x).to_le_bytes().to_vec()), [x]);
            assert_eq!(row(WeightType::Bf16, 1, bf16::from_f32(x).to_le_bytes().to_vec()), [x]);
        }
    }
}
