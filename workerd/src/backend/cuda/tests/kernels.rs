//! Each kernel against its formula in f64, threads in rising and in falling order: every output written once, nothing
//! else touched, nothing read that nobody wrote. Memory is poisoned before.

use std::sync::Arc;

use baton_shared::kv::layout::{KvDtype, KvLayout};
use half::bf16;

use super::super::emulated::Emulator;
use super::super::sys::Gpu;
use super::super::sys::buffer::Buffer;
use super::super::sys::launch::{
    Dims, FEW_ROWS, Format, Kernels, Matrix, Mode, PoolLayer, Rows, Spare,
};
use crate::backend::cpu::tests::Random;

const NOBODY: u32 = u32::MAX;
const LAST: u32 = u32::MAX;
/// A bf16 is off by one part in so many at most.
const ROUNDING: f64 = 1.0 / 256.0;

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

    fn with(backward: bool, has_blas: bool) -> Self {
        let emulator = Emulator::new(256 << 20, 4, has_blas);
        emulator.run_backward(backward);
        let gpu: Arc<dyn Gpu> = Arc::<Emulator>::clone(&emulator);
        Self { kernels: Kernels::new(&gpu), emulator, gpu, random: Random::new(5) }
    }

    /// Roughly normal numbers that are bf16s.
    fn numbers(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| bf16::from_f32(self.random.normal()).to_f32()).collect()
    }

    fn buffer(&self, bytes: &[u8]) -> Buffer {
        Buffer::with(&self.gpu, "a test", bytes).unwrap()
    }

    pub fn words(&self, words: &[u32]) -> Buffer {
        self.buffer(&words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>())
    }

    pub fn floats(&self, floats: &[f32]) -> Buffer {
        self.buffer(&floats.iter().flat_map(|float| float.to_le_bytes()).collect::<Vec<u8>>())
    }

    fn bf16s(&self, floats: &[f32]) -> Buffer {
        let bits = floats.iter().map(|float| bf16::from_f32(*float).to_bits());
        self.buffer(&bits.flat_map(u16::to_le_bytes).collect::<Vec<u8>>())
    }

    pub fn empty(&self, bytes: usize) -> Buffer {
        Buffer::new(&self.gpu, "a test", bytes).unwrap()
    }

    fn matrix(&self, floats: &[f32], n: usize) -> Matrix {
        let k = floats.len() / n;
        Matrix { buffer: self.bf16s(floats), format: Format::Bf16, n: n as u32, k: k as u32 }
    }

    /// A random matrix of one byte an element, and what its elements mean for products of `m` rows.
    fn narrow_matrix(&mut self, m: usize, n: usize, k: usize) -> (Matrix, Vec<f32>) {
        let codes: Vec<u8> = (0..n * k).map(|_| self.code()).collect();
        let scales: Vec<f32> = (0..n).map(|_| 0.02 + self.random.normal().abs() * 0.01).collect();
        let meant = codes.iter().enumerate().map(|(at, code)| {
            let value = e4m3(*code) * scales[at / k];
            if m as u32 <= FEW_ROWS { value } else { bf16::from_f32(value).to_f32() }
        });
        let meant = meant.collect();
        let format = Format::F8(self.floats(&scales));
        (Matrix { buffer: self.buffer(&codes), format, n: n as u32, k: k as u32 }, meant)
    }

    /// Any e4m3 that is a number.
    fn code(&mut self) -> u8 {
        let code = self.random.below(256) as u8;
        if code & 0x7f == 0x7f { code ^ 1 } else { code }
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

    fn written_bf16s(&self, buffer: &Buffer, count: usize) -> Vec<f64> {
        bf16s_of(&self.written_once(buffer, 2 * count))
    }

    fn written_floats(&self, buffer: &Buffer, count: usize) -> Vec<f64> {
        floats_of(&self.written_once(buffer, 4 * count))
    }

    /// How often the last launch wrote into elements of `size` bytes: those that it did at all.
    fn written_at_all(&self, buffer: &Buffer, size: usize) -> Vec<usize> {
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

fn bf16s_of(bytes: &[u8]) -> Vec<f64> {
    let (floats, _) = bytes.as_chunks::<2>();
    floats.iter().map(|float| bf16::from_le_bytes(*float).to_f64()).collect()
}

/// All are close: within `relative` of the value wanted, or of `scale` where that is less.
fn assert_close(got: &[f64], wanted: &[f64], relative: f64, scale: f64, what: &str) {
    assert_eq!(got.len(), wanted.len(), "{what}");
    for (at, (got, wanted)) in got.iter().zip(wanted).enumerate() {
        let far = (got - wanted).abs();
        assert!(far <= relative * wanted.abs().max(scale), "{what}: {got} at {at}, not {wanted}");
    }
}

fn dims(hidden: u32, ffn: u32, heads: (u32, u32, u32), vocab: u32) -> Dims {
    let (heads, kv_heads, head_dim) = heads;
    Dims { hidden, ffn, heads, kv_heads, head_dim, vocab, epsilon: 1e-5 }
}

fn both_orders(test: impl Fn(Bench)) {
    [false, true].into_iter().for_each(|backward| test(Bench::new(backward)));
}

/// Rows of a step, and what keeps their memory.
struct Held {
    tokens: Buffer,
    slots: Buffer,
    positions: Buffer,
    starts: Buffer,
    tables: Buffer,
    count: u32,
}

impl Held {
    fn new(
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

    fn rows(&self) -> Rows<'_> {
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

/// A sign, four bits of exponent, three of mantissa (Micikevicius et al. 2022).
fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7) / 8.0);
    let size = match exponent {
        0 => mantissa * 2.0_f32.powi(-6),
        exponent => (1.0 + mantissa) * 2.0_f32.powi(exponent - 7),
    };
    if code & 0x80 == 0 { size } else { -size }
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// `x w^T` of rows of `k`, and for each product the sum of its terms' sizes, which rounding is measured by.
fn products(x: &[f32], w: &[f32], k: usize) -> Vec<(f64, f64)> {
    let mut all = Vec::new();
    for x in x.chunks(k) {
        for w in w.chunks(k) {
            let terms = || x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
            all.push((terms().sum(), terms().map(f64::abs).sum()));
        }
    }
    all
}

/// 1e-6 of the sum of terms' sizes is what adding some hundred f32s may be off.
const ADDING: f64 = 1e-6;

fn check_product(bench: &mut Bench, mode: Mode, m: usize, n: usize, k: usize) {
    let w = bench.numbers(n * k);
    let matrix = bench.matrix(&w, n);
    check_product_of(bench, mode, m, &matrix, &w);
}

fn check_narrow_product(bench: &mut Bench, mode: Mode, m: usize, n: usize, k: usize) {
    let (matrix, w) = bench.narrow_matrix(m, n, k);
    check_product_of(bench, mode, m, &matrix, &w);
}

fn check_product_of(bench: &mut Bench, mode: Mode, m: usize, matrix: &Matrix, w: &[f32]) {
    let (n, k) = (matrix.n as usize, matrix.k as usize);
    let what = format!("{mode:?}, {m} x {n} x {k}, {:?}", matrix.format);
    let x = bench.numbers(m * k);
    let rows = bench.bf16s(&x);
    let all = products(&x, w, k);
    let (gate_up, wide) = (bench.empty(16), bench.empty(n * k * 2));
    let spare = Spare { gate_up: gate_up.view(), wide: wide.view() };
    let old = bench.numbers(m * n);
    let out = match mode {
        Mode::Bf16 => bench.empty(m * n * 2),
        Mode::Swiglu => bench.empty(m * n),
        Mode::F32 => bench.empty(m * n * 4),
        Mode::Add => bench.floats(&old),
    };
    bench.kernels.multiply(mode, matrix, rows.view(), m as u32, out.view(), spare).unwrap();
    match mode {
        Mode::Bf16 => {
            let got = bench.written_bf16s(&out, m * n);
            for (got, (wanted, size)) in got.iter().zip(&all) {
                let bound = ROUNDING * wanted.abs() + ADDING * size;
                assert!((got - wanted).abs() <= bound, "{what}: {got}, not {wanted}");
            }
        }
        Mode::F32 | Mode::Add => {
            let got = bench.written_floats(&out, m * n);
            for ((got, (product, size)), old) in got.iter().zip(&all).zip(&old) {
                let wanted = if mode == Mode::Add { product + f64::from(*old) } else { *product };
                let bound = ADDING * (size + 1.0);
                assert!((got - wanted).abs() <= bound, "{what}: {got}, not {wanted}");
            }
        }
        Mode::Swiglu => {
            let ffn = n / 2;
            let got = bench.written_bf16s(&out, m * ffn);
            for (at, got) in got.iter().enumerate() {
                // 8 gates, then 8 ups.
                let (row, feature) = (at / ffn, at % ffn);
                let gate = row * n + feature / 8 * 16 + feature % 8;
                let ((gate, first), (up, second)) = (all[gate], all[gate + 8]);
                let wanted = silu(gate) * up;
                let bound = ROUNDING * wanted.abs()
                    + 4.0 * ADDING * (first * up.abs() + gate.abs() * second + first);
                assert!((got - wanted).abs() <= bound, "{what}: {got}, not {wanted}");
            }
        }
    }
}

#[test]
fn products_of_few_rows_are_sums_of_products() {
    both_orders(|mut bench| {
        for mode in [Mode::Bf16, Mode::Add, Mode::F32, Mode::Swiglu] {
            for (m, n, k) in [
                (1, 48, 64),
                (1, 16, 2080),
                (5, 80, 96),
                (8, 32, 1056),
                (13, 112, 32),
                (16, 64, 320),
            ] {
                check_product(&mut bench, mode, m, n, k);
            }
        }
        for (m, n, k) in [(1, 50, 96), (7, 34, 32), (16, 100, 64)] {
            check_product(&mut bench, Mode::F32, m, n, k);
        }
    });
}

#[test]
fn products_of_many_rows_are_sums_of_products() {
    both_orders(|mut bench| {
        for mode in [Mode::Bf16, Mode::Add, Mode::F32, Mode::Swiglu] {
            for (m, n, k) in [(17, 64, 32), (128, 128, 96), (150, 208, 160)] {
                check_product(&mut bench, mode, m, n, k);
            }
        }
        // More than 16 tiles of rows; widths that are no tile's.
        for (m, n, k) in [(2100, 16, 32), (33, 50, 64), (20, 130, 224)] {
            check_product(&mut bench, Mode::F32, m, n, k);
        }
    });
}

#[test]
fn weights_of_one_byte_are_multiplied_by_the_scale_of_their_row() {
    both_orders(|mut bench| {
        for mode in [Mode::Bf16, Mode::Add, Mode::F32, Mode::Swiglu] {
            for (m, n, k) in [(1, 48, 64), (1, 16, 2112), (5, 80, 128), (13, 48, 1088)] {
                check_narrow_product(&mut bench, mode, m, n, k);
            }
            for (m, n, k) in [(17, 64, 32), (130, 144, 96), (20, 16, 64)] {
                check_narrow_product(&mut bench, mode, m, n, k);
            }
        }
        check_narrow_product(&mut bench, Mode::F32, 7, 34, 64);
    });
}

#[test]
fn every_number_of_one_byte_becomes_the_same_number_of_two() {
    both_orders(|bench| {
        let codes: Vec<u8> = (0..=255).filter(|code| code & 0x7f != 0x7f).chain([0, 0]).collect();
        let buffer = bench.buffer(&codes);
        let format = Format::F8(bench.floats(&[1.0, 1.0]));
        let (x, out) = (bench.bf16s(&[0.0; 17 * 128]), bench.empty(17 * 8));
        let matrix = Matrix { buffer, format, n: 2, k: 128 };
        let wide = bench.empty(512);
        let spare = Spare { gate_up: wide.view(), wide: wide.view() };
        bench.kernels.multiply(Mode::F32, &matrix, x.view(), 17, out.view(), spare).unwrap();
        let mut read = vec![0; 512];
        wide.read(0, &mut read).unwrap();
        let wanted: Vec<f64> = codes.iter().map(|code| f64::from(e4m3(*code))).collect();
        assert_eq!(bf16s_of(&read), wanted);
    });
}

#[test]
fn where_the_vendors_library_multiplies_gates_and_ups_become_activations_afterwards() {
    for backward in [false, true] {
        let mut bench = Bench::with(backward, true);
        for (m, ffn, k) in [(17, 8, 32), (18, 96, 64), (19, 2056, 32)] {
            let n = 2 * ffn;
            let (x, w) = (bench.numbers(m * k), bench.numbers(n * k));
            let (rows, matrix) = (bench.bf16s(&x), bench.matrix(&w, n));
            let (out, spare) = (bench.empty(m * ffn * 2), bench.empty(m * n * 2));
            let (rows, count) = (rows.view(), m as u32);
            bench
                .kernels
                .multiply(
                    Mode::Swiglu,
                    &matrix,
                    rows,
                    count,
                    out.view(),
                    Spare { gate_up: spare.view(), wide: spare.view() },
                )
                .unwrap();
            let got = bench.written_bf16s(&out, m * ffn);
            let all = products(&x, &w, k);
            for (at, got) in got.iter().enumerate() {
                let gate = at / ffn * n + at % ffn / 8 * 16 + at % ffn % 8;
                let [gate, up] = [all[gate].0, all[gate + 8].0];
                let wanted = silu(gate) * up;
                // Gates and ups are rounded on their way, and a gate's error counts in its exponent.
                let bound = ROUNDING * (3.0 + gate.abs()) * wanted.abs() + 1e-5;
                assert!((got - wanted).abs() <= bound, "{got}, not {wanted}");
            }
        }
    }
}

/// A pool of two layers, and where its elements are.
struct TestPool {
    layout: KvLayout,
    buffer: Buffer,
}

impl TestPool {
    fn new(bench: &Bench, dims: &Dims, block_tokens: u32, blocks: u32) -> Self {
        let (size, heads) = (dims.head_dim, 0..dims.kv_heads);
        let layout = KvLayout::block_major(KvDtype::Bf16, block_tokens, size, blocks, 0..2, heads);
        Self { buffer: bench.empty(layout.bytes() as usize), layout }
    }

    fn layer(&self) -> PoolLayer<'_> {
        PoolLayer { memory: self.buffer.view(), layout: &self.layout, layer: 1 }
    }

    /// Element (in the second layer) of a key (0) or value (1).
    fn at(&self, block: u32, head: u32, kv: u64, token: u32) -> usize {
        let layout = &self.layout;
        let within = u64::from(token % layout.block_tokens) * u64::from(layout.head_dim);
        let bytes = u64::from(block) * layout.stride_block
            + layout.stride_layer
            + u64::from(head) * layout.stride_head
            + kv * layout.stride_kv;
        (bytes / 2 + within) as usize
    }
}

#[test]
fn queries_keys_and_values_are_turned_and_stored_where_their_position_is() {
    both_orders(|mut bench| {
        for (heads, block_tokens, has_bias, has_norms) in [
            ((4, 2, 32), 8, false, false),
            ((9, 3, 64), 16, true, false),
            ((5, 5, 128), 64, false, true),
            ((3, 1, 64), 8, true, true),
        ] {
            let dims = dims(64, 32, heads, 2);
            let (all, size) = ((dims.heads + 2 * dims.kv_heads) as usize, dims.head_dim as usize);
            let half = size / 2;
            let positions = [0, 2 * block_tokens + 3, NOBODY, block_tokens - 1];
            let (starts, tables) = ([0, 1, 0, 4], [5, 0, 3, 2, 1]);
            let held = Held::new(&bench, &[0; 4], &positions, &starts, &tables);
            let pool = TestPool::new(&bench, &dims, block_tokens, 6);
            let (qkv, bias) = (bench.numbers(4 * all * size), bench.numbers(all * size));
            let norms = [bench.numbers(size), bench.numbers(size)];
            let angles: Vec<f32> = (0..4 * half)
                .flat_map(|at| [(at as f32 * 0.7).cos(), (at as f32 * 0.7).sin()])
                .collect();
            let (qkv_there, bias_there) = (bench.bf16s(&qkv), bench.floats(&bias));
            let norms_there = norms.each_ref().map(|norm| bench.floats(norm));
            let [query_norm, key_norm] = norms_there.each_ref().map(Buffer::view);
            let angles_there = bench.floats(&angles);
            let queries = bench.empty(4 * dims.heads as usize * size * 2);
            bench
                .kernels
                .turn_and_store(
                    &dims,
                    qkv_there.view(),
                    has_bias.then(|| bias_there.view()),
                    has_norms.then_some((query_norm, key_norm)),
                    angles_there.view(),
                    &held.rows(),
                    &pool.layer(),
                    queries.view(),
                )
                .unwrap();
            let mut written = bench.written_at_all(&queries, 2);
            let mut in_pool = bench.written_at_all(&pool.buffer, 2);
            let read = |buffer: &Buffer| {
                let mut bytes = vec![0; buffer.bytes()];
                buffer.read(0, &mut bytes).unwrap();
                bf16s_of(&bytes)
            };
            let (queries, pool_now) = (read(&queries), read(&pool.buffer));
            for row in [0, 1, 3] {
                for head in 0..all {
                    let from = (row * all + head) * size;
                    let mut values: Vec<f64> =
                        qkv[from..][..size].iter().map(|value| f64::from(*value)).collect();
                    if has_bias {
                        let bias = &bias[head * size..][..size];
                        values.iter_mut().zip(bias).for_each(|(v, bias)| *v += f64::from(*bias));
                    }
                    let is_query = head < dims.heads as usize;
                    let is_value = head >= (dims.heads + dims.kv_heads) as usize;
                    if has_norms && !is_value {
                        let squares: f64 = values.iter().map(|value| value * value).sum();
                        let scale = 1.0 / (squares / size as f64 + 1e-5).sqrt();
                        let norm = &norms[usize::from(!is_query)];
                        values.iter_mut().zip(norm).for_each(|(v, n)| *v *= scale * f64::from(*n));
                    }
                    if !is_value {
                        for pair in 0..half {
                            let at = 2 * (row * half + pair);
                            let [cosine, sine] = [angles[at], angles[at + 1]].map(f64::from);
                            let (a, b) = (values[pair], values[half + pair]);
                            values[pair] = a * cosine - b * sine;
                            values[half + pair] = b * cosine + a * sine;
                        }
                    }
                    let (got, at, seen) = if is_query {
                        (&queries, (row * dims.heads as usize + head) * size, &mut written)
                    } else {
                        let (kv, first) = if is_value {
                            (1, dims.heads + dims.kv_heads)
                        } else {
                            (0, dims.heads)
                        };
                        let position = positions[row];
                        let block = tables[(starts[row] + position / block_tokens) as usize];
                        let at = pool.at(block, head as u32 - first, kv, position);
                        (&pool_now, at, &mut in_pool)
                    };
                    assert_close(&got[at..][..size], &values, ROUNDING, 1e-2, "turned");
                    let before = seen.len();
                    seen.retain(|written| !(at..at + size).contains(written));
                    assert_eq!(before - seen.len(), size, "row {row}, head {head}");
                }
            }
            assert!(written.is_empty() && in_pool.is_empty(), "nothing else is written");
        }
    });
}

/// Sequences of given lengths in a pool, with their keys and values.
struct Attended {
    dims: Dims,
    pool: TestPool,
    tables: Vec<u32>,
    starts: Vec<u32>,
    lengths: Vec<u32>,
    /// By sequence, KV head, token.
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
}

impl Attended {
    fn new(bench: &mut Bench, heads: (u32, u32, u32), block_tokens: u32, lengths: &[u32]) -> Self {
        let dims = dims(64, 32, heads, 2);
        let counts: Vec<u32> = lengths.iter().map(|len| len.div_ceil(block_tokens)).collect();
        let all: u32 = counts.iter().sum();
        let mut blocks: Vec<u32> = (0..all).collect();
        (1..blocks.len()).for_each(|at| blocks.swap(at, bench.random.below(at + 1)));
        let pool = TestPool::new(bench, &dims, block_tokens, all);
        let mut one = Self {
            dims,
            pool,
            tables: blocks,
            starts: Vec::new(),
            lengths: lengths.to_vec(),
            keys: Vec::new(),
            values: Vec::new(),
        };
        let size = dims.head_dim as usize;
        let mut start = 0;
        for (len, count) in lengths.iter().zip(counts) {
            one.starts.push(start);
            let elements = (dims.kv_heads * len) as usize * size;
            let (keys, values) = (bench.numbers(elements), bench.numbers(elements));
            for head in 0..dims.kv_heads {
                for token in 0..*len {
                    let block = one.tables[(start + token / block_tokens) as usize];
                    for (kv, from) in [(0, &keys), (1, &values)] {
                        let from = &from[(head * len + token) as usize * size..][..size];
                        let bits = from.iter().map(|value| bf16::from_f32(*value).to_bits());
                        let bytes: Vec<u8> = bits.flat_map(u16::to_le_bytes).collect();
                        let at = one.pool.at(block, head, kv, token);
                        one.pool.buffer.write(2 * at, &bytes).unwrap();
                    }
                }
            }
            one.keys.push(keys);
            one.values.push(values);
            start += count;
        }
        one
    }

    /// Attention of a query of one head to the first `seen` tokens of a sequence.
    fn formula(&self, sequence: usize, head: usize, query: &[f32], seen: usize) -> Vec<f64> {
        let (size, len) = (self.dims.head_dim as usize, self.lengths[sequence] as usize);
        let kv_head = head / (self.dims.heads / self.dims.kv_heads) as usize;
        let row = |of: &[f32], token: usize| -> Vec<f64> {
            let row = &of[(kv_head * len + token) * size..][..size];
            row.iter().map(|value| f64::from(*value)).collect()
        };
        let score = |token| -> f64 {
            let key = row(&self.keys[sequence], token);
            key.iter().zip(query).map(|(k, q)| k * f64::from(*q)).sum::<f64>()
                / (size as f64).sqrt()
        };
        let scores: Vec<f64> = (0..seen).map(score).collect();
        let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let shares: Vec<f64> = scores.iter().map(|score| (score - highest).exp()).collect();
        let whole: f64 = shares.iter().sum();
        let mut out = vec![0.0; size];
        for (token, share) in shares.iter().enumerate() {
            let value = row(&self.values[sequence], token);
            out.iter_mut().zip(value).for_each(|(out, value)| *out += share / whole * value);
        }
        out
    }
}

/// Shares are bf16: each value's part is off by 1/256 at most, and so is the sum of values of size 1 to 4.
const ATTENTION: f64 = 0.015;

#[test]
fn attention_of_one_token_each_is_the_softmax_over_its_own_blocks() {
    both_orders(|mut bench| {
        for (heads, block_tokens, lengths, splits) in [
            ((4, 2, 32), 8, vec![1, 70, 32], 1),
            ((9, 3, 64), 16, vec![5, 33, 129], 3),
            ((8, 2, 128), 32, vec![100, 7], 2),
            ((40, 2, 64), 64, vec![65, 130], 2),
            ((2, 2, 32), 4, vec![257], 8),
        ] {
            let there = Attended::new(&mut bench, heads, block_tokens, &lengths);
            let (dims, count) = (there.dims, lengths.len());
            let (heads, size) = (dims.heads as usize, dims.head_dim as usize);
            // A row of nobody's at the end.
            let rows = count + 1;
            let positions: Vec<u32> = lengths.iter().map(|len| len - 1).chain([NOBODY]).collect();
            let starts: Vec<u32> = there.starts.iter().copied().chain([0]).collect();
            let held = Held::new(&bench, &vec![0; rows], &positions, &starts, &there.tables);
            let queries = bench.numbers(rows * heads * size);
            let queries_there = bench.bf16s(&queries);
            let out = bench.empty(rows * heads * size * 2);
            let parts = rows * heads * splits;
            let (sums, states) = (bench.empty(parts * size * 4), bench.empty(parts * 8));
            let ended = bench.words(&vec![0; rows * heads]);
            bench
                .kernels
                .decode_attention(
                    &dims,
                    queries_there.view(),
                    &held.rows(),
                    rows as u32,
                    splits as u32,
                    &there.pool.layer(),
                    [sums.view(), states.view(), ended.view()],
                    out.view(),
                )
                .unwrap();
            let got = bench.written_bf16s(&out, count * heads * size);
            let rest = (heads * size * 2) as u64;
            let writes = bench.emulator.writes(out.address() + count as u64 * rest, rest as usize);
            assert_eq!(writes, (0, 0), "nobody's row");
            let mut left = vec![1; rows * heads * 4];
            ended.read(0, &mut left).unwrap();
            assert!(left.iter().all(|byte| *byte == 0), "no part is left counted");
            for (at, got) in got.chunks(size).enumerate() {
                let (row, head) = (at / heads, at % heads);
                let query = &queries[at * size..][..size];
                let wanted = there.formula(row, head, query, lengths[row] as usize);
                assert_close(got, &wanted, ATTENTION, 1.0, &format!("row {row}, head {head}"));
            }
        }
    });
}

#[test]
fn attention_of_many_tokens_is_the_softmax_over_all_before_each() {
    both_orders(|mut bench| {
        // The last so many tokens of each sequence are new.
        for (heads, block_tokens, lengths, new) in [
            ((2, 1, 32), 8, vec![70, 3], vec![70, 1]),
            ((3, 1, 64), 16, vec![40, 150], vec![7, 140]),
            ((2, 2, 128), 32, vec![64, 33], vec![64, 33]),
            ((4, 2, 64), 64, vec![129, 65], vec![2, 65]),
        ] {
            let there = Attended::new(&mut bench, heads, block_tokens, &lengths);
            let dims = there.dims;
            let (heads, size) = (dims.heads as usize, dims.head_dim as usize);
            let rows: u32 = new.iter().sum();
            let (mut tiles, mut of_row) = (Vec::new(), Vec::new());
            for (sequence, (len, new)) in lengths.iter().zip(&new).enumerate() {
                for first in (0..*new).step_by(128) {
                    let row = of_row.len() as u32 + first;
                    tiles.extend([
                        row,
                        (new - first).min(128),
                        len - new + first,
                        there.starts[sequence],
                    ]);
                }
                of_row.extend((0..*new).map(|at| (sequence, (len - new + at) as usize)));
            }
            let zeros = vec![0; rows as usize];
            let held = Held::new(&bench, &zeros, &zeros, &zeros, &there.tables);
            let queries = bench.numbers(rows as usize * heads * size);
            let queries_there = bench.bf16s(&queries);
            let tiles_there = bench.words(&tiles);
            let out = bench.empty(rows as usize * heads * size * 2);
            bench
                .kernels
                .prefill_attention(
                    &dims,
                    queries_there.view(),
                    &held.rows(),
                    tiles_there.view(),
                    tiles.len() as u32 / 4,
                    &there.pool.layer(),
                    out.view(),
                )
                .unwrap();
            let got = bench.written_bf16s(&out, rows as usize * heads * size);
            for (at, got) in got.chunks(size).enumerate() {
                let ((sequence, position), head) = (of_row[at / heads], at % heads);
                let query = &queries[at * size..][..size];
                let wanted = there.formula(sequence, head, query, position + 1);
                assert_close(got, &wanted, ATTENTION, 1.0, &format!("position {position}"));
            }
        }
    });
}
