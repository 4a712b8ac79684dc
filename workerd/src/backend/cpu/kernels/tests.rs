use half::bf16;

use super::attention::{ATTENTION_TILE, Running};
use super::*;
use crate::backend::cpu::repack::Panels;
use crate::backend::cpu::tests::{Random, random_weight};
use crate::model::{Weight, dequantize};

/// Activations of `tokens` tokens, token-major.
fn activations(random: &mut Random, tokens: usize, cols: usize) -> Vec<f32> {
    (0..tokens * cols).map(|_| random.normal()).collect()
}

/// `[row][token]` of one kernel call.
fn product(kernels: &Kernels, weight: &Weight, x: &[f32], tokens: usize) -> Vec<f32> {
    let panels = Panels::new(weight);
    let mut out = vec![f32::NAN; panels.count() * LANES * tokens];
    let bytes = panels.bytes(0..panels.count());
    if wants_quantised(weight.dtype) {
        let mut tile = vec![QuantBlock::default(); weight.cols / QUANT * tokens];
        for (token, x) in x.chunks_exact(weight.cols).enumerate() {
            (kernels.quantise)(x, &mut tile[token..], tokens);
        }
        kernels.product(weight.dtype, bytes, Tile::Quantised(&tile), tokens, &mut out);
    } else {
        let tile: Vec<f32> = (0..weight.cols * tokens)
            .map(|at| x[at % tokens * weight.cols + at / tokens])
            .collect();
        kernels.product(weight.dtype, bytes, Tile::Float(&tile), tokens, &mut out);
    }
    let at = |row: usize, token: usize| (row / LANES * tokens + token) * LANES + row % LANES;
    (0..weight.rows * tokens).map(|i| out[at(i / tokens, i % tokens)]).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn every_product_gives_the_same_bits_on_every_tier_and_for_any_number_of_tokens() {
    let mut random = Random::new(1);
    for dtype in WeightType::ALL {
        for (rows, cols) in [(8, 32), (20, 64), (72, 96)] {
            let weight = random_weight(&mut random, dtype, rows, cols, 1.0);
            let x = activations(&mut random, 32, cols);
            let whole = product(&scalar::TABLE, &weight, &x, 32);
            for tokens in TOKENS {
                let best = product(Kernels::detect(), &weight, &x[..tokens * cols], tokens);
                for (row, best) in best.chunks_exact(tokens).enumerate() {
                    let whole = &whole[row * 32..][..tokens];
                    assert_eq!(bits(best), bits(whole), "{dtype:?} {rows}x{cols} {tokens}");
                }
            }
        }
    }
}

#[test]
fn products_are_near_those_of_the_numbers_that_the_weights_stand_for() {
    let mut random = Random::new(2);
    for dtype in WeightType::ALL {
        let (rows, cols, tokens) = (40, 256, 8);
        let weight = random_weight(&mut random, dtype, rows, cols, 1.0);
        let x = activations(&mut random, tokens, cols);
        let got = product(Kernels::detect(), &weight, &x, tokens);
        let tolerance = if wants_quantised(dtype) { 0.02 } else { 1e-5 };
        for row in 0..rows {
            let numbers = dequantize(&weight, row);
            for token in 0..tokens {
                let x = &x[token * cols..][..cols];
                let pairs = || numbers.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
                let (exact, size) =
                    (pairs().sum::<f64>(), pairs().map(|p| p * p).sum::<f64>().sqrt());
                let error = (f64::from(got[row * tokens + token]) - exact).abs();
                assert!(error <= tolerance * (size + 1.0), "{dtype:?} {row} {token}: {error}");
            }
        }
    }
}

#[test]
fn extreme_quantised_weights_and_activations_do_not_overflow() {
    for (dtype, row) in [
        (WeightType::Q8_0, [&[0, 0x3c][..], &[0x80; 32]].concat()),
        (WeightType::Q4_1, [&[0, 0x3c, 0, 0][..], &[0xff; 16]].concat()),
    ] {
        let weight = Weight { dtype, rows: 8, cols: 32, bytes: row.repeat(8).into() };
        let each = if dtype == WeightType::Q8_0 { -128.0 } else { 15.0 };
        for x in [127.0, -127.0] {
            for kernels in [&scalar::TABLE, Kernels::detect()] {
                assert_eq!(product(kernels, &weight, &[x; 32], 1), [each * 32.0 * x; 8]);
            }
        }
    }
}

#[test]
fn rows_come_back_from_panels_as_they_were() {
    let mut random = Random::new(3);
    for dtype in WeightType::ALL {
        let weight = random_weight(&mut random, dtype, 20, 96, 1.0);
        let panels = Panels::new(&weight);
        let mut row = [0.0; 96];
        for at in 0..20 {
            panels.row(at, &mut row);
            assert_eq!(bits(&row), bits(&dequantize(&weight, at)), "{dtype:?}");
        }
    }
}

#[test]
fn vector_kernels_give_the_same_bits_on_every_tier() {
    let mut random = Random::new(4);
    for len in [32, 64, 96, 576, 1536] {
        let x = activations(&mut random, 1, len);
        let y = activations(&mut random, 1, len);
        let run = |kernels: &Kernels| {
            let (mut norm, mut gated) = (vec![0.0; len], vec![0.0; len]);
            (kernels.rms_norm)(&x, &y, 1e-5, &mut norm);
            let wide: Vec<f32> = x.iter().map(|x| x * 40.0).collect();
            (kernels.swiglu)(&wide, &y, &mut gated);
            let mut blocks = vec![QuantBlock::default(); len / QUANT * 3];
            (kernels.quantise)(&x, &mut blocks, 3);
            (bits(&norm), bits(&gated), blocks)
        };
        assert_eq!(run(Kernels::detect()), run(&scalar::TABLE));
    }
}

#[test]
fn attention_gives_the_same_bits_on_every_tier_and_is_a_softmax() {
    let mut random = Random::new(5);
    for (head_dim, queries) in [(8, 1), (16, 2), (40, 3), (64, 4), (80, 5), (128, 6), (256, 7)] {
        for tokens in [1, 2, 7, 8, 9, 31, 32, 33, 64, 77] {
            let size = (head_dim as f32).sqrt().recip();
            let query: Vec<f32> = (0..queries * head_dim).map(|_| random.normal() * size).collect();
            let mut stored = || -> Vec<bf16> {
                (0..96 * head_dim).map(|_| bf16::from_f32(random.normal())).collect()
            };
            let (keys, values) = (stored(), stored());
            let run = |kernels: &Kernels, queries: &[f32]| {
                let mut running = vec![Running::START; queries.len() / head_dim];
                let mut out = vec![0.0; queries.len()];
                let [mut tile_keys, mut tile_values] =
                    [(); 2].map(|()| vec![f32::NAN; ATTENTION_TILE * head_dim]);
                for first in (0..tokens).step_by(ATTENTION_TILE) {
                    let tile = first * head_dim..(first + ATTENTION_TILE) * head_dim;
                    let bits = |stored: &[bf16]| -> Vec<u16> {
                        stored[tile.clone()].iter().map(|value| value.to_bits()).collect()
                    };
                    (kernels.attention.transpose)(&bits(&keys), &mut tile_keys);
                    (kernels.attention.widen)(&bits(&values), &mut tile_values);
                    let seen = ATTENTION_TILE.min(tokens - first);
                    let (keys, values) = (&tile_keys, &tile_values);
                    (kernels.attention.attend)(queries, keys, values, seen, &mut running, &mut out);
                }
                let outs = out.chunks_exact(head_dim).zip(&running);
                outs.flat_map(|(out, running)| out.iter().map(|out| out / running.sum)).collect()
            };
            let best: Vec<f32> = run(Kernels::detect(), &query);
            assert_eq!(bits(&best), bits(&run(&scalar::TABLE, &query)), "{head_dim} {tokens}");
            for (query, best) in query.chunks_exact(head_dim).zip(best.chunks_exact(head_dim)) {
                assert_eq!(bits(best), bits(&run(Kernels::detect(), query)), "alone");
                let dot = |key: &[bf16]| -> f64 {
                    key.iter().zip(query).map(|(k, q)| k.to_f64() * f64::from(*q)).sum()
                };
                let shares: Vec<f64> =
                    keys.chunks_exact(head_dim).take(tokens).map(|key| dot(key).exp()).collect();
                let sum: f64 = shares.iter().sum();
                for (at, best) in best.iter().enumerate() {
                    let exact: f64 = (0..tokens)
                        .map(|token| shares[token] / sum * values[token * head_dim + at].to_f64())
                        .sum();
                    assert!((f64::from(*best) - exact).abs() < 1e-5, "{best} {exact}");
                }
            }
        }
    }
}

#[test]
fn the_exponential_is_good_to_two_ulp() {
    for step in -8_700..8_800 {
        let x = step as f32 * 0.01 + 0.003;
        let exact = f64::from(x).exp();
        assert!((f64::from(scalar::exp(x)) / exact - 1.0).abs() < 2.5e-7, "{x}");
    }
    assert_eq!(scalar::exp(f32::NEG_INFINITY), 0.0);
    assert_eq!(scalar::exp(0.0), 1.0);
}
