//! Products against their formulas, as in [`super::kernels`].

use super::super::sys::products::{FEW_ROWS, Format, Matrix, Mode, Spare};
use super::kernels::{Bench, ROUNDING, bf16s_of, both_orders};
use half::bf16;

/// A sign, four bits of exponent, three of mantissa (Micikevicius et al. 2022).
fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7) / 8.0);
    let size = match exponent {
        0 => mantissa * 2.0_f32.powi(-6),
        exponent => (1.0 + mantissa) * 2.0_f32.powi(exponent - 7),
    };
    if code & 0x80 == 0 { size } else { -size }
}

impl Bench {
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
