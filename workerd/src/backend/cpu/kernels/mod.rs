//! The inner loops, behind a table of functions chosen once by what the CPU can do.
//!
//! Every table gives the same bits: lanes of a product are rows of the weight, k runs in order with one fused
//! multiply-add a step; a sum over a vector has 8 lanes, added as `((0+1)+(2+3))+((4+5)+(6+7))`. The scalar table is
//! the one to read; the others copy its order. What a kernel computes for one token or row never depends on the others.

pub mod attention;
#[cfg(target_arch = "x86_64")]
pub mod avx2;
#[cfg(target_arch = "x86_64")]
pub mod avx512;
pub mod scalar;
mod self_test;

use std::sync::OnceLock;

use crate::model::WeightType;

/// Lanes of the sums that run over a vector.
pub const LANES: usize = 8;
/// Rows of a weight that lie interleaved.
pub const ROWS: usize = 16;
/// Elements of a quantised block along k.
pub const QUANT: usize = 32;
/// Tokens a product kernel takes at once at most.
pub const TOKENS: usize = 32;

/// Blocks whose largest magnitude is below this quantise to 0.
const SMALLEST_MAX: f32 = 1e-30;

/// 32 elements of an activation as `d * q`, `q` in -127..=127.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
pub struct QuantBlock {
    /// Four elements a word, the first in the lowest byte.
    pub q: [u32; 8],
    /// Scale.
    pub d: f32,
    /// `d` times the sum of `q`.
    pub sum: f32,
    /// Sums of the first and of the last 16 `q`.
    pub halves: [i16; 2],
}

/// One token tile's activations, `[k][token]`, as the weight's type wants them.
#[derive(Clone, Copy, Debug)]
pub enum Tile<'a> {
    /// For quantised weights: one block for each 32 of k.
    Quantised(&'a [QuantBlock]),
    /// For float weights.
    Float(&'a [f32]),
}

/// `out[panel][token][row]` from panels (of 16 interleaved rows, [`super::repack`]) and a tile of `tokens` (1 to
/// [`TOKENS`]) tokens.
pub type Product<T> =
    fn(dtype: WeightType, panels: &[u8], tile: &[T], tokens: usize, out: &mut [f32]);

/// One tier of kernels.
pub struct Kernels {
    /// For logs.
    pub name: &'static str,
    /// With quantised weights.
    pub quantised: Product<QuantBlock>,
    /// With f32, f16 and bf16 weights.
    pub float: Product<f32>,
    /// Quantises a row (a multiple of 32) into `out[0], out[stride], …`.
    pub quantise: fn(row: &[f32], out: &mut [QuantBlock], stride: usize),
    /// `out = x / rms(x) * weight`; lengths equal, a multiple of 8.
    pub rms_norm: fn(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]),
    /// `out = silu(gate) * up`; lengths equal, a multiple of 8.
    pub swiglu: fn(gate: &[f32], up: &[f32], out: &mut [f32]),
    /// Attention to a tile of positions.
    pub attention: attention::Attention,
}

impl std::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernels").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Kernels {
    /// The tables that this CPU can run, the best one last.
    pub fn tiers() -> Vec<&'static Self> {
        #[cfg(target_arch = "x86_64")]
        let more = [avx2::table(), avx512::table()];
        #[cfg(not(target_arch = "x86_64"))]
        let more = [];
        std::iter::once(&scalar::TABLE).chain(more.into_iter().flatten()).collect()
    }

    /// The table of this name, if this CPU can run it.
    pub fn named(name: &str) -> Option<&'static Self> {
        Self::tiers().into_iter().find(|tier| tier.name == name)
    }

    /// The best table that this CPU can run and that gives the scalar table's bits.
    pub fn detect() -> &'static Self {
        static BEST: OnceLock<&Kernels> = OnceLock::new();
        BEST.get_or_init(|| {
            let good = |tier: &&Self| {
                let agrees = self_test::agrees(tier);
                if !agrees {
                    let name = tier.name;
                    tracing::error!(name, "kernels compute wrongly on this CPU, not used");
                }
                agrees
            };
            Self::tiers().into_iter().rev().find(good).unwrap_or(&scalar::TABLE)
        })
    }

    /// The product for a weight's type.
    ///
    /// # Panics
    /// If the tile is not of the kind that the type wants ([`wants_quantised`]).
    pub fn product(
        &self,
        dtype: WeightType,
        panels: &[u8],
        tile: Tile<'_>,
        tokens: usize,
        out: &mut [f32],
    ) {
        match (tile, wants_quantised(dtype)) {
            (Tile::Quantised(tile), true) => (self.quantised)(dtype, panels, tile, tokens, out),
            (Tile::Float(tile), false) => (self.float)(dtype, panels, tile, tokens, out),
            _ => panic!("a {dtype:?} weight takes the other kind of tile"),
        }
    }
}

/// Whether products with such weights take quantised activations.
pub fn wants_quantised(dtype: WeightType) -> bool {
    use WeightType::{Bf16, F8E4M3, F16, F32};
    !matches!(dtype, F32 | F16 | Bf16 | F8E4M3)
}

/// Constants of the one exponential: Cephes' `expf`, about 1 ulp.
pub mod exponential {
    /// Below this the result is 0.
    pub const LOW: f32 = -87.0;
    /// Above this the result is that of this.
    pub const HIGH: f32 = 88.0;
    /// 1 / ln 2.
    pub const LOG2_E: f32 = std::f32::consts::LOG2_E;
    /// ln 2, its upper bits, negative.
    pub const MINUS_LN2_HIGH: f32 = -0.693_359_4;
    /// ln 2, the rest, negative.
    pub const MINUS_LN2_LOW: f32 = 2.121_944_4e-4;
    /// Of `x^7` to `x^2` in `e^x = 1 + x + …`.
    pub const POLYNOMIAL: [f32; 6] =
        [1.987_569_1e-4, 1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
}

#[cfg(test)]
mod tests;
