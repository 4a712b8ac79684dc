//! Products of rows with weights: which kernel, or the vendor's library, for how many rows and which format.
#![expect(unsafe_code, reason = "the vendor's library gets addresses")]

use super::buffer::{Buffer, View};
use super::kernel::Args;
use super::launch::{Kernels, holds};
use super::{GpuError, Product};

/// What a product does with its sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Stores bf16.
    Bf16,
    /// Adds to f32.
    Add,
    /// Stores `silu(gate) * up` as bf16: weights have 8 gates and 8 ups in turn.
    Swiglu,
    /// Stores f32.
    F32,
}

/// How weights are kept.
#[derive(Debug)]
pub enum Format {
    /// Two bytes.
    Bf16,
    /// One byte, e4m3, with an f32 that each row is multiplied by.
    F8(Buffer),
}

/// Weights of a product, `[n][k]`.
#[derive(Debug)]
pub struct Matrix {
    /// Their memory.
    pub buffer: Buffer,
    /// How they are kept.
    pub format: Format,
    /// Outputs.
    pub n: u32,
    /// Inputs.
    pub k: u32,
}

/// Most rows that the kernels for few rows take.
pub const FEW_ROWS: u32 = 16;
/// Memory for what products compute on their way.
#[derive(Clone, Copy, Debug)]
pub struct Spare<'a> {
    /// bf16, gates and ups of all rows: for [`Mode::Swiglu`] where the vendor's library multiplies.
    pub gate_up: View<'a>,
    /// bf16, a whole matrix: for weights of one byte and many rows.
    pub wide: View<'a>,
}

impl Kernels {
    /// `out (+)= x w^T` for `m` rows of `x` (bf16).
    ///
    /// # Errors
    /// What the device says.
    pub fn multiply(
        &self,
        mode: Mode,
        weights: &Matrix,
        x: View<'_>,
        m: u32,
        out: View<'_>,
        spare: Spare<'_>,
    ) -> Result<(), GpuError> {
        let (n, k) = (weights.n, weights.k);
        let stride = if mode == Mode::Swiglu { n / 2 } else { n };
        let wide = matches!(mode, Mode::Add | Mode::F32);
        holds("rows", x, u64::from(m) * u64::from(k), 2);
        holds("products", out, u64::from(m) * u64::from(stride), if wide { 4 } else { 2 });
        if m <= FEW_ROWS {
            return self.multiply_few(mode, weights, x, m, out, stride);
        }
        let weights = match &weights.format {
            Format::Bf16 => weights.buffer.address(),
            Format::F8(scales) => {
                self.widen(weights, scales, spare.wide)?;
                spare.wide.address()
            }
        };
        let name = mode.name();
        if !self.gpu().has_blas() {
            let args = Args::default().u64(x.address()).u64(weights).u64(out.address());
            let args = args.u32(m).u32(n).u32(k).u32(stride);
            let grid = [m.div_ceil(128) * n.div_ceil(128), 1, 1];
            return self.start(&format!("gemm_{name}"), grid, 256, 65_536, &args);
        }
        let is_swiglu = mode == Mode::Swiglu;
        if is_swiglu {
            holds("gates and ups", spare.gate_up, u64::from(m) * u64::from(n), 2);
        }
        let product = Product {
            weights,
            x: x.address(),
            out: if is_swiglu { spare.gate_up.address() } else { out.address() },
            m,
            n,
            k,
            stride: n,
            wide,
            add: mode == Mode::Add,
        };
        // SAFETY: all three are as large as the product needs, as checked above.
        unsafe { self.gpu().multiply(&product)? };
        if is_swiglu { self.swiglu(spare.gate_up, out, m, n / 2) } else { Ok(()) }
    }

    /// [`Self::multiply`] for at most [`FEW_ROWS`] rows.
    fn multiply_few(
        &self,
        mode: Mode,
        weights: &Matrix,
        x: View<'_>,
        m: u32,
        out: View<'_>,
        stride: u32,
    ) -> Result<(), GpuError> {
        let Matrix { buffer, format, n, k } = weights;
        let (columns, tiles, parts) = match m {
            0..=1 => (1, 1, 1),
            2..=8 => (8, 2, 1),
            _ => (16, 2, 2),
        };
        let (kind, scales) = match format {
            Format::Bf16 => ("", 0),
            Format::F8(scales) => {
                holds("scales", scales.view(), u64::from(*n), 4);
                ("f8_", scales.address())
            }
        };
        let args = Args::default()
            .u64(buffer.address())
            .u64(scales)
            .u64(x.address())
            .u64(out.address())
            .u32(*n)
            .u32(*k)
            .u32(m)
            .u32(stride);
        let grid = [n.div_ceil(16 * tiles), 1, 1];
        let shared = 8 * tiles * parts * 4 * 32 * 4;
        self.start(&format!("skinny_{kind}{}_{columns}", mode.name()), grid, 256, shared, &args)
    }

    fn widen(&self, weights: &Matrix, scales: &Buffer, wide: View<'_>) -> Result<(), GpuError> {
        let Matrix { buffer, n, k, .. } = weights;
        let elements = u64::from(*n) * u64::from(*k);
        holds("scales", scales.view(), u64::from(*n), 4);
        holds("widened weights", wide, elements, 2);
        assert!(k.is_multiple_of(16), "{k} columns");
        let args = Args::default()
            .u64(buffer.address())
            .u64(scales.address())
            .u64(wide.address())
            .u32(*n)
            .u32(*k);
        let blocks = elements.div_ceil(256 * 16) as u32;
        self.start("widen", [blocks, 1, 1], 256, 0, &args)
    }

    fn swiglu(
        &self,
        gate_up: View<'_>,
        out: View<'_>,
        rows: u32,
        ffn: u32,
    ) -> Result<(), GpuError> {
        let step = 65_535;
        for first in (0..rows).step_by(step as usize) {
            let count = (rows - first).min(step);
            let row = u64::from(first) * u64::from(ffn) * 2;
            let args =
                Args::default().u64(gate_up.address() + 2 * row).u64(out.address() + row).u32(ffn);
            self.start("swiglu", [ffn.div_ceil(2048), count, 1], 256, 0, &args)?;
        }
        Ok(())
    }
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::Add => "add",
            Self::Swiglu => "swiglu",
            Self::F32 => "f32",
        }
    }
}
