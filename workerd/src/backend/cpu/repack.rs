//! Weights in the order the kernels read them: panels of 16 interleaved rows.
//!
//! A panel of a float type is, for each column, one element of each row. A panel of a quantised type is a run of
//! groups, each a head and some blocks of 32 columns:
//!
//! | type | head | a block |
//! | --- | --- | --- |
//! | Q8_0 | 16 f16 scales | 512 bytes of codes |
//! | Q4_0 | 16 f16 scales | nibbles |
//! | Q4_1 | 16 f16 scales, 16 f16 minima | nibbles |
//! | Q5_0 | 16 f16 scales | fifth bits, nibbles |
//! | Q5_1 | 16 f16 scales, 16 f16 minima | fifth bits, nibbles |
//! | Q4_K | 16 f16 `d`, 16 f16 `dmin`, for each of the 8 blocks 16 u8 scales and 16 u8 minima | nibbles |
//! | Q5_K | as Q4_K | fifth bits, nibbles |
//! | Q6_K | 16 f16 `d`, for each 16 of 256 columns 16 i8 scales | two upper bits, nibbles |
//!
//! The codes of a block are 8 vectors of 64 bytes: vector `i` holds columns `4 i..4 i + 4` of each row, row after row, as
//! a product of bytes summed by fours wants them. Nibbles are 4 × 64 bytes, byte `b` of the `j`th that of vector `j`
//! (low) and `j + 4` (high). Fifth bits are 64 bytes: bit `i` of byte `b` belongs to byte `b` of vector `i`. The two
//! upper bits are 2 × 64 bytes: bits `2 i` and `2 i + 1` of byte `b` of the `h`th belong to byte `b` of vector `4 h + i`.
//!
//! Rows that fill up the last panel are zero. F8_E4M3 becomes bf16, as there are no kernels that read it.

use std::array::from_fn;

use half::{bf16, f16};

use super::arena::{Arena, OutOfMemory, Piece};
use super::kernels::{QUANT, ROWS};
use crate::model::dequantize::{codes, put_bf16, six_bits};
use crate::model::parallel::each_row;
use crate::model::{Weight, WeightType};

/// Bytes of the parts of a quantised panel.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    /// What the group's blocks share.
    pub head: usize,
    /// Blocks in the group.
    pub blocks: usize,
    /// Of a block: bits of the codes above the fourth.
    pub high: usize,
    /// Of a block: the rest of the codes.
    pub low: usize,
}

impl Group {
    /// Of a type; `None` for floats.
    pub const fn of(dtype: WeightType) -> Option<Self> {
        let (head, blocks, high, low) = match dtype {
            WeightType::F32 | WeightType::F16 | WeightType::Bf16 | WeightType::F8E4M3 => {
                return None;
            }
            WeightType::Q8_0 => (2 * ROWS, 1, 0, QUANT * ROWS),
            WeightType::Q4_0 => (2 * ROWS, 1, 0, QUANT * ROWS / 2),
            WeightType::Q4_1 => (4 * ROWS, 1, 0, QUANT * ROWS / 2),
            WeightType::Q5_0 => (2 * ROWS, 1, QUANT * ROWS / 8, QUANT * ROWS / 2),
            WeightType::Q5_1 => (4 * ROWS, 1, QUANT * ROWS / 8, QUANT * ROWS / 2),
            WeightType::Q4K => (4 * ROWS + 16 * ROWS, 8, 0, QUANT * ROWS / 2),
            WeightType::Q5K => (4 * ROWS + 16 * ROWS, 8, QUANT * ROWS / 8, QUANT * ROWS / 2),
            WeightType::Q6K => (2 * ROWS + 16 * ROWS, 8, QUANT * ROWS / 4, QUANT * ROWS / 2),
        };
        Some(Self { head, blocks, high, low })
    }

    /// A block.
    pub const fn block(self) -> usize {
        self.high + self.low
    }

    /// The whole group.
    pub const fn bytes(self) -> usize {
        self.head + self.blocks * self.block()
    }
}

/// Bytes of a panel of `cols` columns (whole groups).
pub const fn panel_bytes(dtype: WeightType, cols: usize) -> usize {
    match (dtype, Group::of(dtype)) {
        (_, Some(group)) => cols / (group.blocks * QUANT) * group.bytes(),
        (WeightType::F32, None) => cols * ROWS * 4,
        (_, None) => cols * ROWS * 2,
    }
}

/// A matrix in panels.
#[derive(Debug)]
pub struct Panels {
    /// Element type; never F8_E4M3.
    pub dtype: WeightType,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    bytes: Piece,
}

impl Panels {
    /// Repacks a weight into memory of the arena.
    ///
    /// # Errors
    /// If there is no such memory.
    ///
    /// # Panics
    /// If it has fewer bytes than its shape says.
    pub fn new(weight: &Weight, arena: &mut Arena) -> Result<Self, OutOfMemory> {
        let Weight { dtype: stored, rows, cols, bytes: ref from, .. } = *weight;
        let dtype = if stored == WeightType::F8E4M3 { WeightType::Bf16 } else { stored };
        let row_bytes = stored.row_bytes(cols);
        let panel = panel_bytes(dtype, cols);
        let mut bytes = arena.take(rows.div_ceil(ROWS) * panel)?;
        let from = &from[..rows * row_bytes];
        each_row(&mut bytes, panel, |panel, to| {
            let mut row = vec![0; if stored == dtype { 0 } else { dtype.row_bytes(cols) }];
            let numbers = (panel * ROWS..rows).take(ROWS);
            for (lane, number) in numbers.enumerate() {
                if stored == dtype {
                    interleave(dtype, lane, &from[number * row_bytes..][..row_bytes], to);
                } else {
                    put_bf16(weight, number, &mut row);
                    interleave(dtype, lane, &row, to);
                }
            }
        });
        Ok(Self { dtype, rows, cols, bytes })
    }

    /// Panels.
    pub fn count(&self) -> usize {
        self.rows.div_ceil(ROWS)
    }

    /// The bytes of some panels.
    pub fn bytes(&self, panels: std::ops::Range<usize>) -> &[u8] {
        let panel = panel_bytes(self.dtype, self.cols);
        &self.bytes[panels.start * panel..panels.end * panel]
    }

    /// A row as numbers, into `out` (`cols` elements).
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let (panel, lane) = (self.bytes(row / ROWS..row / ROWS + 1), row % ROWS);
        let pair = |at: usize| [panel[at * 2], panel[at * 2 + 1]];
        match self.dtype {
            WeightType::F32 => {
                let elements = panel.as_chunks::<4>().0.iter().skip(lane).step_by(ROWS);
                out.iter_mut().zip(elements).for_each(|(out, x)| *out = f32::from_le_bytes(*x));
            }
            WeightType::F16 => out.iter_mut().enumerate().for_each(|(column, out)| {
                *out = f16::from_le_bytes(pair(column * ROWS + lane)).to_f32();
            }),
            WeightType::Bf16 => out.iter_mut().enumerate().for_each(|(column, out)| {
                *out = bf16::from_le_bytes(pair(column * ROWS + lane)).to_f32();
            }),
            dtype => {
                for (block, out) in out.as_chunks_mut::<QUANT>().0.iter_mut().enumerate() {
                    let Part { weights, scale, minimum } = Part::read(dtype, panel, block, lane);
                    *out = weights.map(|weight| weight as f32 * scale);
                    if let Some(minimum) = minimum {
                        out.iter_mut().for_each(|out| *out += minimum);
                    }
                }
            }
        }
    }
}

/// 32 columns of one row of a quantised panel.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// Whole numbers: codes, less their offset where it is no minimum, times the scale of 16 columns where there is one.
    pub weights: [i32; QUANT],
    /// Of them all.
    pub scale: f32,
    /// What is added to each.
    pub minimum: Option<f32>,
}

impl Part {
    /// Block `block` of lane `lane`.
    pub fn read(dtype: WeightType, panel: &[u8], block: usize, lane: usize) -> Self {
        let group = Group::of(dtype).expect("a quantised type");
        let (at, within) = (block / group.blocks, block % group.blocks);
        let (head, blocks) = panel[at * group.bytes()..][..group.bytes()].split_at(group.head);
        let (high, low) = blocks[within * group.block()..][..group.block()].split_at(group.high);
        let codes: [u8; QUANT] = from_fn(|column| {
            let (vector, byte) = (column / 4, lane * 4 + column % 4);
            if group.low == QUANT * ROWS {
                return low[vector * VECTOR + byte];
            }
            let nibble = low[vector % 4 * VECTOR + byte] >> (vector / 4 * 4) & 15;
            match group.high / VECTOR {
                0 => nibble,
                1 => nibble | (high[byte] >> vector & 1) << 4,
                _ => nibble | (high[vector / 4 * VECTOR + byte] >> (vector % 4 * 2) & 3) << 4,
            }
        });
        let half = |index: usize| {
            let at = (index * ROWS + lane) * 2;
            f16::from_le_bytes([head[at], head[at + 1]]).to_f32()
        };
        let weights = codes.map(i32::from);
        let scale = half(0);
        match dtype {
            WeightType::Q8_0 => {
                let weights = codes.map(|code| i32::from(code.cast_signed()));
                Self { weights, scale, minimum: None }
            }
            WeightType::Q4_0 => Self { weights, scale, minimum: Some(-8.0 * scale) },
            WeightType::Q5_0 => Self { weights, scale, minimum: Some(-16.0 * scale) },
            WeightType::Q4_1 | WeightType::Q5_1 => Self { weights, scale, minimum: Some(half(1)) },
            WeightType::Q4K | WeightType::Q5K => {
                let bits = |i: usize| f32::from(head[4 * ROWS + (within * 2 + i) * ROWS + lane]);
                Self { weights, scale: scale * bits(0), minimum: Some(-(half(1) * bits(1))) }
            }
            WeightType::Q6K => {
                let scales: [i32; 2] = from_fn(|i| {
                    i32::from(head[2 * ROWS + (within * 2 + i) * ROWS + lane].cast_signed())
                });
                let weights = from_fn(|column| scales[column / 16] * (weights[column] - 32));
                Self { weights, scale, minimum: None }
            }
            WeightType::F32 | WeightType::F16 | WeightType::Bf16 | WeightType::F8E4M3 => {
                unreachable!("no group")
            }
        }
    }
}

/// Bytes of a vector: 4 columns of each row.
const VECTOR: usize = 4 * ROWS;

/// Puts a stored row into its lane of a panel.
fn interleave(dtype: WeightType, lane: usize, from: &[u8], to: &mut [u8]) {
    let Some(group) = Group::of(dtype) else {
        return match dtype {
            WeightType::F32 => spread::<4>(from, to, lane),
            _ => spread::<2>(from, to, lane),
        };
    };
    let stored = dtype.block().1 as usize;
    let groups = to.chunks_exact_mut(group.bytes()).zip(from.chunks_exact(stored));
    for (at, (to, block)) in groups.enumerate() {
        let (head, blocks) = to.split_at_mut(group.head);
        put_head(dtype, lane, block, head);
        for (within, to) in blocks.chunks_exact_mut(group.block()).enumerate() {
            let codes = codes(dtype, from, at * group.blocks + within);
            let (high, low) = to.split_at_mut(group.high);
            put_codes(&codes, lane, high, low);
        }
    }
}

fn put_head(dtype: WeightType, lane: usize, block: &[u8], head: &mut [u8]) {
    match dtype {
        WeightType::Q4_1 | WeightType::Q5_1 => spread::<2>(&block[..4], head, lane),
        WeightType::Q4K | WeightType::Q5K => {
            let (halves, bytes) = head.split_at_mut(4 * ROWS);
            spread::<2>(&block[..4], halves, lane);
            for (at, to) in bytes.chunks_exact_mut(2 * ROWS).enumerate() {
                let (scale, minimum) = six_bits(&block[4..16], at);
                spread::<1>(&[scale, minimum], to, lane);
            }
        }
        WeightType::Q6K => {
            let (halves, bytes) = head.split_at_mut(2 * ROWS);
            spread::<2>(&block[208..], halves, lane);
            spread::<1>(&block[192..208], bytes, lane);
        }
        _ => spread::<2>(&block[..2], head, lane),
    }
}

fn put_codes(codes: &[u8; QUANT], lane: usize, high: &mut [u8], low: &mut [u8]) {
    if low.len() == QUANT * ROWS {
        return spread::<4>(codes, low, lane);
    }
    let (near, far) = codes.split_at(QUANT / 2);
    let nibbles: [u8; QUANT / 2] = from_fn(|i| near[i] & 15 | far[i] << 4);
    spread::<4>(&nibbles, low, lane);
    match high.len() / VECTOR {
        0 => {}
        1 => {
            let bits = |byte| (0..8).fold(0, |bits, i| bits | (codes[4 * i + byte] >> 4) << i);
            spread::<4>(&from_fn::<u8, 4, _>(bits), high, lane);
        }
        _ => {
            let bits = |at: usize| {
                let codes = &codes[at / 4 * 16 + at % 4..];
                (0..4).fold(0, |bits, i| bits | (codes[4 * i] >> 4) << (2 * i))
            };
            spread::<4>(&from_fn::<u8, 8, _>(bits), high, lane);
        }
    }
}

/// Piece `i` of `from`, `N` bytes long, becomes piece `16 * i + lane` of `to`.
fn spread<const N: usize>(from: &[u8], to: &mut [u8], lane: usize) {
    let to = to.as_chunks_mut::<N>().0.chunks_exact_mut(ROWS);
    for (from, to) in from.as_chunks::<N>().0.iter().zip(to) {
        to[lane] = *from;
    }
}
