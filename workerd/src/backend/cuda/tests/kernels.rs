//! Each kernel against its formula in f64, threads in rising and in falling order: every output written once, nothing
//! else touched, nothing read that nobody wrote. Memory is poisoned before.

use std::sync::Arc;

use half::bf16;

use super::super::emulated::Emulator;
use super::super::sys::Gpu;
use super::super::sys::buffer::Buffer;
use super::super::sys::launch::{Dims, Kernels, Rows};
use super::super::sys::products::{Format, Matrix};
use crate::backend::cpu::tests::Random;

pub const NOBODY: u32 = u32::MAX;
const LAST: u32 = u32::MAX;
/// A bf16 is off by one part in so many at most.
pub const ROUNDING: f64 = 1.0 / 256.0;

/// A device and what to fill it with.
pub struct Bench {
    pub emulator: Arc<Emulator>,
    pub gpu: Arc<dyn Gpu>,
    pub kernels: Kernels,
    pub random: Random,
}

impl Bench {
    pub fn new(backward: bool) -> Self {
        Self::with(backward, false)
    }

    pub fn with(backward: bool, has_blas: bool) -> Self {
        let emulator = Emulator::new(256 << 20, 4, has_blas);
        emulator.run_backward(backward);
        let gpu: Arc<dyn Gpu> = Arc::<Emulator>::clone(&emulator);
        Self { kernels: Kernels::new(&gpu), emulator, gpu, random: Random::new(5) }
    }

    /// Roughly normal numbers that are bf16s.
    pub fn numbers(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| bf16::from_f32(self.random.normal()).to_f32()).collect()
    }

    pub fn buffer(&self, bytes: &[u8]) -> Buffer {
        Buffer::with(&self.gpu, "a test", bytes).unwrap()
    }

    pub fn words(&self, words: &[u32]) -> Buffer {
        self.buffer(&words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>())
    }

    pub fn floats(&self, floats: &[f32]) -> Buffer {
        self.buffer(&floats.iter().flat_map(|float| float.to_le_bytes()).collect::<Vec<u8>>())
    }

    pub fn bf16s(&self, floats: &[f32]) -> Buffer {
        let bits = floats.iter().map(|float| bf16::from_f32(*float).to_bits());
        self.buffer(&bits.flat_map(u16::to_le_bytes).collect::<Vec<u8>>())
    }

    pub fn empty(&self, bytes: usize) -> Buffer {
        Buffer::new(&self.gpu, "a test", bytes).unwrap()
    }

    pub fn matrix(&self, floats: &[f32], n: usize) -> Matrix {
        let k = floats.len() / n;
        Matrix { buffer: self.bf16s(floats), format: Format::Bf16, n: n as u32, k: k as u32 }
    }

    /// What a launch left in the first `bytes` of a buffer, each of which it wrote once.
    pub fn written_once(&self, buffer: &Buffer, bytes: usize) -> Vec<u8> {
        self.gpu.synchronise().unwrap();
        let writes = self.emulator.writes(buffer.address(), bytes);
        assert_eq!(writes, (1, 1), "each of {bytes} bytes is written once");
        let mut read = vec![0; bytes];
        buffer.read(0, &mut read).unwrap();
        read
    }

    pub fn written_bf16s(&self, buffer: &Buffer, count: usize) -> Vec<f64> {
        bf16s_of(&self.written_once(buffer, 2 * count))
    }

    pub fn written_floats(&self, buffer: &Buffer, count: usize) -> Vec<f64> {
        floats_of(&self.written_once(buffer, 4 * count))
    }

    /// How often the last launch wrote into elements of `size` bytes: those that it did at all.
    pub fn written_at_all(&self, buffer: &Buffer, size: usize) -> Vec<usize> {
        self.gpu.synchronise().unwrap();
        let writes = |at: &usize| {
            let writes = self.emulator.writes(buffer.address() + (at * size) as u64, size);
            assert!(writes == (0, 0) || writes == (1, 1), "element {at} is written {writes:?}");
            writes.0 > 0
        };
        (0..buffer.bytes() / size).filter(writes).collect()
    }
}

pub fn floats_of(bytes: &[u8]) -> Vec<f64> {
    let (floats, _) = bytes.as_chunks::<4>();
    floats.iter().map(|float| f64::from(f32::from_le_bytes(*float))).collect()
}

pub fn bf16s_of(bytes: &[u8]) -> Vec<f64> {
    let (floats, _) = bytes.as_chunks::<2>();
    floats.iter().map(|float| bf16::from_le_bytes(*float).to_f64()).collect()
}

/// All are close: within `relative` of the value wanted, or of `scale` where that is less.
pub fn assert_close(got: &[f64], wanted: &[f64], relative: f64, scale: f64, what: &str) {
    assert_eq!(got.len(), wanted.len(), "{what}");
    for (at, (got, wanted)) in got.iter().zip(wanted).enumerate() {
        let far = (got - wanted).abs();
        assert!(far <= relative * wanted.abs().max(scale), "{what}: {got} at {at}, not {wanted}");
    }
}

pub fn dims(hidden: u32, ffn: u32, heads: (u32, u32, u32), vocab: u32) -> Dims {
    let (heads, kv_heads, head_dim) = heads;
    Dims { hidden, ffn, heads, kv_heads, head_dim, vocab, epsilon: 1e-5 }
}

pub fn both_orders(test: impl Fn(Bench)) {
    [false, true].into_iter().for_each(|backward| test(Bench::new(backward)));
}

/// Rows of a step, and what keeps their memory.
pub struct Held {
    tokens: Buffer,
    slots: Buffer,
    positions: Buffer,
    starts: Buffer,
    tables: Buffer,
    count: u32,
}

impl Held {
    pub fn new(
        bench: &Bench,
        tokens: &[u32],
        positions: &[u32],
        starts: &[u32],
        tables: &[u32],
    ) -> Self {
        let slots: Vec<u32> = (0..tokens.len() as u32).rev().collect();
        Self {
            tokens: bench.words(tokens),
            slots: bench.words(&slots),
            positions: bench.words(positions),
            starts: bench.words(starts),
            tables: bench.words(tables),
            count: tokens.len() as u32,
        }
    }

    pub fn rows(&self) -> Rows<'_> {
        Rows {
            count: self.count,
            tokens: self.tokens.view(),
            slots: self.slots.view(),
            positions: self.positions.view(),
            starts: self.starts.view(),
            tables: self.tables.view(),
        }
    }
}

#[test]
fn embeddings_are_rows_of_the_table_and_angles_those_of_positions() {
    both_orders(|mut bench| {
        for (hidden, head_dim) in [(64, 64), (96, 32), (2056, 128)] {
            let (vocab, pairs) = (10, head_dim as usize / 2);
            let table = bench.numbers(vocab * hidden);
            let matrix = bench.matrix(&table, vocab);
            // The third row's token is the newest of its slot, the last row's is nobody's.
            let held =
                Held::new(&bench, &[3, 9, LAST, 0], &[0, 1_000_003, 77, NOBODY], &[0; 4], &[0; 4]);
            let mut slots = vec![0_u32; 4 * 16];
            slots[16 + 13] = 5;
            let slots = bench.words(&slots);
            let frequencies: Vec<f64> =
                (0..pairs).map(|pair| 1e6_f64.powf(-(pair as f64) / pairs as f64)).collect();
            let bytes: Vec<u8> = frequencies.iter().flat_map(|f| f.to_le_bytes()).collect();
            let frequencies_there = bench.buffer(&bytes);
            let (stream, angles) = (bench.empty(4 * hidden * 4), bench.empty(4 * pairs * 8));
            let dims = dims(hidden as u32, 32, (1, 1, head_dim), vocab as u32);
            bench
                .kernels
                .embed(
                    &dims,
                    &matrix,
                    &held.rows(),
                    slots.view(),
                    frequencies_there.view(),
                    stream.view(),
                    angles.view(),
                )
                .unwrap();
            let angles = bench.written_floats(&angles, 8 * pairs);
            let stream = bench.written_floats(&stream, 4 * hidden);
            for (row, (token, position)) in
                [(3, 0.0), (9, 1_000_003.0), (5, 77.0), (0, 0.0)].into_iter().enumerate()
            {
                let wanted = table[token * hidden..][..hidden].iter().map(|v| f64::from(*v));
                assert!(stream[row * hidden..][..hidden].iter().copied().eq(wanted), "row {row}");
                for (pair, frequency) in frequencies.iter().enumerate() {
                    let (sine, cosine) = (position * frequency).sin_cos();
                    let got = &angles[2 * (row * pairs + pair)..][..2];
                    assert_close(got, &[cosine, sine], 1e-6, 1.0, "angle");
                }
            }
        }
    });
}

#[test]
fn norms_are_those_of_the_rows_named() {
    both_orders(|mut bench| {
        for (hidden, count) in [(64, 3), (100, 5), (4100, 2)] {
            let stream = bench.numbers(7 * hidden);
            let weight = bench.numbers(hidden);
            let (stream_there, weight_there) = (bench.floats(&stream), bench.floats(&weight));
            let dims = dims(hidden as u32, 32, (1, 1, 32), 2);
            for named in [None, Some([6, 2, 2, 0, 5])] {
                let rows = named.map(|rows| bench.words(&rows[..count]));
                let out = bench.empty(count * hidden * 2);
                let (stream_view, weight_view) = (stream_there.view(), weight_there.view());
                bench
                    .kernels
                    .rms_norm(
                        &dims,
                        stream_view,
                        weight_view,
                        rows.as_ref().map(Buffer::view),
                        count as u32,
                        out.view(),
                    )
                    .unwrap();
                let got = bench.written_bf16s(&out, count * hidden);
                for (number, got) in got.chunks(hidden).enumerate() {
                    let row = named.map_or(number, |rows| rows[number] as usize);
                    let row = &stream[row * hidden..][..hidden];
                    let squares: f64 = row.iter().map(|v| f64::from(*v).powi(2)).sum();
                    let scale = 1.0 / (squares / hidden as f64 + 1e-5).sqrt();
                    let wanted: Vec<f64> = row
                        .iter()
                        .zip(&weight)
                        .map(|(value, weight)| f64::from(*value) * scale * f64::from(*weight))
                        .collect();
                    assert_close(got, &wanted, ROUNDING, 1e-3, "norm");
                }
            }
        }
    });
}
