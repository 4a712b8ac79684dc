//! Whether a tier of kernels gives the scalar table's bits on this very CPU: asked once, before it is used.
//!
//! A tier is written on one CPU and runs on many. A CPU, an emulator or a compiler that computes otherwise would change
//! what a model says without a sign; it costs about a millisecond to know.

use super::{Kernels, QUANT, QuantBlock, ROWS, scalar, wants_quantised};
use crate::backend::cpu::repack::panel_bytes;
use crate::model::WeightType;

const COLUMNS: usize = 256;
/// Enough to go through the ways for one, some and a rest.
const TOKENS: [usize; 2] = [1, 7];

/// Whether products and vector kernels are those of the scalar table.
pub(super) fn agrees(tier: &Kernels) -> bool {
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 8
    };
    let x: Vec<f32> = (0..COLUMNS * 7).map(|_| next() as f32 / 2_f32.powi(22) - 2.0).collect();
    // Without the upper bits of a sign and an exponent, any bytes are numbers of any type, the larger ones near 1.
    let panel: Vec<u8> = (0..COLUMNS * ROWS * 4).map(|_| (next() as u8) & 0x3b).collect();
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    let row = |table: &Kernels| {
        let (x, y) = x[..2 * COLUMNS].split_at(COLUMNS);
        let (mut norm, mut gated) = (vec![0.0; COLUMNS], vec![0.0; COLUMNS]);
        (table.rms_norm)(x, y, 1e-5, &mut norm);
        (table.swiglu)(x, y, &mut gated);
        (bits(norm), bits(gated), quantised(table, x, 1))
    };
    let product = |table: &Kernels, dtype: WeightType, tokens: usize| {
        let mut out = vec![0.0; tokens * ROWS];
        let panel = &panel[..panel_bytes(dtype, COLUMNS)];
        let x = &x[..COLUMNS * tokens];
        if wants_quantised(dtype) {
            (table.quantised)(dtype, panel, &quantised(table, x, tokens), tokens, &mut out);
        } else {
            (table.float)(dtype, panel, x, tokens, &mut out);
        }
        bits(out)
    };
    let same = |dtype: &WeightType, tokens: usize| {
        product(tier, *dtype, tokens) == product(&scalar::TABLE, *dtype, tokens)
    };
    row(tier) == row(&scalar::TABLE)
        && WeightType::ALL.iter().all(|dtype| TOKENS.into_iter().all(|tokens| same(dtype, tokens)))
}

fn quantised(table: &Kernels, x: &[f32], tokens: usize) -> Vec<QuantBlock> {
    let mut blocks = vec![QuantBlock::default(); x.len() / QUANT];
    for (token, x) in x.chunks_exact(COLUMNS).enumerate() {
        (table.quantise)(x, &mut blocks[token..], tokens);
    }
    blocks
}
