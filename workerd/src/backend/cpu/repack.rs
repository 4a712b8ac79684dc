//! Weights in the order the kernels read them: panels of 8 interleaved rows.
//!
//! | type | a panel |
//! | --- | --- |
//! | Q4_1 | for each 32 columns: 8 f16 scales, 8 f16 minima, then 4 × 32 bytes: 4 bytes of each row's nibbles |
//! | Q8_0 | for each 32 columns 8 × 32 bytes: 4 columns of each row; after all of them, for each 32 columns 8 f16 scales |
//! | F32, F16, BF16 | for each column one element of each row |
//!
//! Rows that fill up the last panel are zero.

use half::{bf16, f16};

use super::kernels::{LANES, QUANT, panel_bytes};
use crate::model::{Weight, WeightType};

/// A matrix in panels.
#[derive(Debug)]
pub struct Panels {
    /// Element type.
    pub dtype: WeightType,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    bytes: Vec<u8>,
    /// Where the first cache line of `bytes` begins.
    start: usize,
}

impl Panels {
    /// Repacks a weight.
    ///
    /// # Panics
    /// If it has fewer bytes than its shape says.
    pub fn new(weight: &Weight) -> Self {
        let Weight { dtype, rows, cols, bytes: ref from } = *weight;
        let row_bytes = dtype.row_bytes(cols);
        let panel = panel_bytes(dtype, cols);
        let mut bytes = vec![0; rows.div_ceil(LANES) * panel + LINE];
        let start = bytes.as_ptr().align_offset(LINE).min(LINE);
        for (row, from) in from[..rows * row_bytes].chunks_exact(row_bytes).enumerate() {
            let to = &mut bytes[start + row / LANES * panel..][..panel];
            interleave(dtype, cols, row % LANES, from, to);
        }
        Self { dtype, rows, cols, bytes, start }
    }

    /// Panels.
    pub fn count(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// The bytes of some panels.
    pub fn bytes(&self, panels: std::ops::Range<usize>) -> &[u8] {
        let panel = panel_bytes(self.dtype, self.cols);
        &self.bytes[self.start + panels.start * panel..self.start + panels.end * panel]
    }

    /// A row as numbers, into `out` (`cols` elements).
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let (panel, lane) = (self.bytes(row / LANES..row / LANES + 1), row % LANES);
        let half = |at: usize| f16::from_le_bytes([panel[at], panel[at + 1]]).to_f32();
        for (column, out) in out.iter_mut().enumerate() {
            let (block, within) = (column / QUANT, column % QUANT);
            *out = match self.dtype {
                WeightType::F32 => {
                    let at = (column * LANES + lane) * 4;
                    f32::from_le_bytes([panel[at], panel[at + 1], panel[at + 2], panel[at + 3]])
                }
                WeightType::F16 => half((column * LANES + lane) * 2),
                WeightType::Bf16 => {
                    let at = (column * LANES + lane) * 2;
                    bf16::from_le_bytes([panel[at], panel[at + 1]]).to_f32()
                }
                WeightType::Q8_0 => {
                    let quant = panel[block * 256 + within / 4 * 32 + lane * 4 + within % 4] as i8;
                    f32::from(quant) * half(self.cols / QUANT * 256 + block * 16 + lane * 2)
                }
                WeightType::Q4_1 => {
                    let (block, half_column) = (block * 160, within % 16);
                    let byte =
                        panel[block + 32 + half_column / 4 * 32 + lane * 4 + half_column % 4];
                    let quant = if within < 16 { byte & 15 } else { byte >> 4 };
                    f32::from(quant) * half(block + lane * 2) + half(block + 16 + lane * 2)
                }
            };
        }
    }
}

/// Bytes of a cache line: vectors of a panel then rarely lie across two.
const LINE: usize = 64;

/// Puts a stored row into its lane of a panel.
fn interleave(dtype: WeightType, cols: usize, lane: usize, from: &[u8], to: &mut [u8]) {
    match dtype {
        WeightType::F32 => spread::<4>(from, to, lane),
        WeightType::F16 | WeightType::Bf16 => spread::<2>(from, to, lane),
        WeightType::Q8_0 => {
            let (quants, scales) = to.split_at_mut(cols * LANES);
            for (block, from) in from.as_chunks::<34>().0.iter().enumerate() {
                let (scale, from) = from.split_at(2);
                spread::<2>(scale, &mut scales[block * 16..][..16], lane);
                spread::<4>(from, &mut quants[block * 256..][..256], lane);
            }
        }
        WeightType::Q4_1 => {
            for (from, to) in from.as_chunks::<20>().0.iter().zip(to.as_chunks_mut::<160>().0) {
                let (heads, nibbles) = to.split_at_mut(32);
                spread::<2>(&from[..4], heads, lane);
                spread::<4>(&from[4..], nibbles, lane);
            }
        }
    }
}

/// Piece `i` of `from`, `N` bytes long, becomes piece `8 * i + lane` of `to`.
fn spread<const N: usize>(from: &[u8], to: &mut [u8], lane: usize) {
    let to = to.as_chunks_mut::<N>().0.chunks_exact_mut(LANES);
    for (from, to) in from.as_chunks::<N>().0.iter().zip(to) {
        to[lane] = *from;
    }
}
