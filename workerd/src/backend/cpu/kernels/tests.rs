use std::sync::Arc;

use half::bf16;

use super::attention::{ATTENTION_TILE, Running};
use super::*;
use crate::backend::cpu::arena::Arena;
use crate::backend::cpu::repack::Panels;
use crate::backend::cpu::tests::{Random, random_weight};
use crate::model::{Scales, Weight, dequantize};

/// Random numbers that differ from run to run; a failure prints the seed, `BATON_TEST_SEED` repeats it.
fn fresh(name: &str) -> Random {
    let seed = match std::env::var("BATON_TEST_SEED") {
        Ok(seed) => seed.parse().expect("BATON_TEST_SEED is a number"),
        Err(_) => rand::random(),
    };
    println!("{name}: BATON_TEST_SEED={seed}");
    Random::new(seed)
}

/// Every tier that this CPU can run.
fn tiers() -> Vec<&'static Kernels> {
    let tiers = Kernels::tiers();
    println!("tiers: {}", tiers.iter().map(|tier| tier.name).collect::<Vec<_>>().join(", "));
    tiers
}

/// Activations of `tokens` tokens, token-major.
fn activations(random: &mut Random, tokens: usize, cols: usize) -> Vec<f32> {
    (0..tokens * cols).map(|_| random.normal()).collect()
}

/// Columns that a weight of this type can have, from few to some.
fn widths(dtype: WeightType) -> [usize; 3] {
    match dtype.block() {
        (1, _) if !wants_quantised(dtype) => [1, 33, 96],
        (256, _) => [256, 512, 1280],
        _ => [32, 96, 544],
    }
}

/// `[row][token]` of one kernel call.
fn product(kernels: &Kernels, weight: &Weight, x: &[f32], tokens: usize) -> Vec<f32> {
    let panels = Panels::new(weight, &mut Arena::default()).unwrap();
    let mut out = vec![f32::NAN; panels.count() * ROWS * tokens];
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
    let at = |row: usize, token: usize| (row / ROWS * tokens + token) * ROWS + row % ROWS;
    (0..weight.rows * tokens).map(|i| out[at(i / tokens, i % tokens)]).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn every_product_gives_the_same_bits_on_every_tier_and_for_any_number_of_tokens() {
    let mut random = fresh("products");
    for dtype in WeightType::ALL {
        for (rows, cols) in [5, 16, 20, 72, 150].into_iter().zip(widths(dtype).into_iter().cycle())
        {
            let weight = random_weight(&mut random, dtype, rows, cols, 1.0);
            let x = activations(&mut random, TOKENS, cols);
            let whole = product(&scalar::TABLE, &weight, &x, TOKENS);
            for tier in tiers() {
                for tokens in 1..=TOKENS {
                    let some = product(tier, &weight, &x[..tokens * cols], tokens);
                    for (row, some) in some.chunks_exact(tokens).enumerate() {
                        let whole = &whole[row * TOKENS..][..tokens];
                        let what = (tier.name, dtype, rows, cols, tokens, row);
                        assert_eq!(bits(some), bits(whole), "{what:?}");
                    }
                }
            }
        }
    }
}

/// What a row's quantised blocks stand for.
fn as_quantised(x: &[f32]) -> Vec<f32> {
    let mut blocks = vec![QuantBlock::default(); x.len() / QUANT];
    (Kernels::detect().quantise)(x, &mut blocks, 1);
    let values = blocks.iter().flat_map(|block| {
        let codes = block.q.into_iter().flat_map(u32::to_le_bytes);
        codes.map(|code| f32::from(code.cast_signed()) * block.d)
    });
    values.collect()
}

#[test]
fn quantised_activations_are_off_by_half_a_step_at_most() {
    let mut random = fresh("activations");
    let x = activations(&mut random, 1, 4096);
    for (x, got) in x.chunks_exact(QUANT).zip(as_quantised(&x).chunks_exact(QUANT)) {
        let step = x.iter().fold(0.0_f32, |max, x| max.max(x.abs())) / 127.0;
        for (x, got) in x.iter().zip(got) {
            assert!((x - got).abs() <= step * 0.5001, "{x} {got} {step}");
        }
    }
}

#[test]
fn products_are_those_of_the_numbers_that_weights_and_activations_stand_for() {
    let mut random = fresh("near");
    for dtype in WeightType::ALL {
        let (rows, cols, tokens) = (40, 256, 8);
        let weight = random_weight(&mut random, dtype, rows, cols, 1.0);
        let mut x = activations(&mut random, tokens, cols);
        let got = product(Kernels::detect(), &weight, &x, tokens);
        if wants_quantised(dtype) {
            x = x.chunks_exact(cols).flat_map(as_quantised).collect();
        }
        for row in 0..rows {
            let numbers = dequantize(&weight, row);
            for token in 0..tokens {
                let x = &x[token * cols..][..cols];
                let pairs = || numbers.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
                let (exact, size) = (pairs().sum::<f64>(), pairs().map(f64::abs).sum::<f64>());
                let error = (f64::from(got[row * tokens + token]) - exact).abs();
                // A minimum and its codes are much larger than their sum.
                assert!(error <= 1e-5 * size, "{dtype:?} {row} {token}: {error} of {size}");
            }
        }
    }
}

/// A row of a block whose codes are all the largest, or the smallest, that there are, and what an element then is.
fn extreme(dtype: WeightType, largest: bool) -> (Vec<u8>, f32) {
    let (one, zero) = ([0, 0x3c], [0, 0]);
    let code = |bits: usize| if largest { 0xff_u8 >> (8 - bits) } else { 0 };
    let nibbles = vec![code(4) * 17; dtype.block().0 as usize / 2];
    let fifths = vec![code(8); dtype.block().0 as usize / 8];
    let (bytes, value): (Vec<&[u8]>, u8) = match dtype {
        WeightType::Q8_0 => {
            let all = [if largest { 127_i8 } else { -128 }.cast_unsigned(); 32];
            return ([&one[..], &all].concat(), if largest { 127.0 } else { -128.0 });
        }
        WeightType::Q4_0 => return ([&one[..], &nibbles].concat(), f32::from(code(4)) - 8.0),
        WeightType::Q5_0 => {
            return ([&one[..], &fifths, &nibbles].concat(), f32::from(code(5)) - 16.0);
        }
        WeightType::Q4_1 => (vec![&one, &zero, &nibbles], code(4)),
        WeightType::Q5_1 => (vec![&one, &zero, &fifths, &nibbles], code(5)),
        WeightType::Q4K => (vec![&one, &zero, &[0xff; 12], &nibbles], code(4)),
        WeightType::Q5K => (vec![&one, &zero, &[0xff; 12], &fifths, &nibbles], code(5)),
        WeightType::Q6K => {
            let upper = vec![code(8); 64];
            let scales = [if largest { 127_i8 } else { -128 }.cast_unsigned(); 16];
            let row = [&nibbles[..], &upper, &scales, &one].concat();
            return (row, if largest { 31.0 * 127.0 } else { 32.0 * 128.0 });
        }
        WeightType::F32 | WeightType::F16 | WeightType::Bf16 | WeightType::F8E4M3 => {
            unreachable!("no codes")
        }
    };
    // The K types' scale is 63.
    let scale = if dtype.block().0 == 256 { 63.0 } else { 1.0 };
    (bytes.concat(), scale * f32::from(value))
}

#[test]
fn extreme_quantised_weights_and_activations_do_not_overflow() {
    for dtype in WeightType::ALL.into_iter().filter(|dtype| wants_quantised(*dtype)) {
        for largest in [true, false] {
            let (row, each) = extreme(dtype, largest);
            let cols = dtype.block().0 as usize;
            let (bytes, scales) = (row.repeat(16).into(), Scales::One);
            let weight = Weight { dtype, rows: 16, cols, bytes, scales };
            for x in [127.0, -127.0] {
                for kernels in tiers() {
                    let got = product(kernels, &weight, &vec![x; cols], 1);
                    assert_eq!(got, [each * cols as f32 * x; 16], "{} {dtype:?}", kernels.name);
                }
            }
        }
    }
}

#[test]
fn a_tier_that_computes_otherwise_fails_its_self_test() {
    assert!(tiers().into_iter().all(self_test::agrees));
    let broken = Kernels {
        name: "broken",
        swiglu: |gate, up, out| {
            (scalar::TABLE.swiglu)(gate, up, out);
            out[0] = f32::from_bits(out[0].to_bits() ^ 1);
        },
        ..scalar::TABLE
    };
    assert!(!self_test::agrees(&broken));
    let broken = Kernels {
        quantised: |dtype, panels, tile, tokens, out| {
            (scalar::TABLE.quantised)(dtype, panels, tile, tokens, out);
            if dtype == WeightType::Q5K && tokens > 1 {
                out[20] = f32::from_bits(out[20].to_bits() ^ 1);
            }
        },
        ..scalar::TABLE
    };
    assert!(!self_test::agrees(&broken));
}

#[test]
fn rows_come_back_from_panels_as_they_were() {
    let mut random = fresh("rows");
    for dtype in WeightType::ALL {
        for cols in widths(dtype) {
            let weight = random_weight(&mut random, dtype, 20, cols, 1.0);
            let panels = Panels::new(&weight, &mut Arena::default()).unwrap();
            let mut row = vec![0.0; cols];
            for at in 0..20 {
                panels.row(at, &mut row);
                assert_eq!(row, dequantize(&weight, at), "{dtype:?}");
            }
        }
    }
}

#[test]
fn panels_of_f8_hold_the_nearest_bf16_of_each_scaled_number() {
    let mut random = fresh("f8");
    let (rows, cols) = (37, 50);
    let mut weight = random_weight(&mut random, WeightType::F8E4M3, rows, cols, 1.0);
    let scales = (0..rows).map(|_| random.normal().abs() + 0.01).collect();
    weight.scales = Scales::Rows(Arc::new(scales));
    let panels = Panels::new(&weight, &mut Arena::default()).unwrap();
    assert_eq!(panels.dtype, WeightType::Bf16);
    let mut row = vec![0.0; cols];
    for at in 0..rows {
        panels.row(at, &mut row);
        let nearest = |x: f32| bf16::from_f32(x).to_f32();
        let expected: Vec<f32> = dequantize(&weight, at).into_iter().map(nearest).collect();
        assert_eq!(row, expected);
    }
}

#[test]
fn vector_kernels_give_the_same_bits_on_every_tier() {
    let mut random = fresh("vectors");
    for len in [32, 64, 96, 576, 1536] {
        let x = activations(&mut random, 1, len);
        let y = activations(&mut random, 1, len);
        let run = |kernels: &Kernels| {
            let (mut norm, mut gated) = (vec![0.0; len], vec![0.0; len]);
            (kernels.rms_norm)(&x, &y, 1e-5, &mut norm);
            let wide: Vec<f32> = x.iter().map(|x| x * 40.0).collect();
            (kernels.swiglu)(&wide, &y, &mut gated);
            // Lengths are a multiple of 8, no more.
            (kernels.swiglu)(&wide[8..], &y[8..], &mut gated[..len - 8]);
            let mut blocks = vec![QuantBlock::default(); len / QUANT * 3];
            (kernels.quantise)(&x, &mut blocks, 3);
            (bits(&norm), bits(&gated), blocks)
        };
        for tier in tiers() {
            assert_eq!(run(tier), run(&scalar::TABLE), "{} {len}", tier.name);
        }
    }
}

#[test]
fn attention_gives_the_same_bits_on_every_tier_and_is_a_softmax() {
    let mut random = fresh("attention");
    for (head_dim, queries) in [(8, 1), (16, 2), (40, 3), (64, 4), (80, 5), (128, 6), (256, 13)] {
        for tokens in [1, 2, 7, 8, 9, 31, 32, 33, 64, 77] {
            let size = (head_dim as f32).sqrt().recip();
            let query: Vec<f32> = (0..queries * head_dim).map(|_| random.normal() * size).collect();
            // What lies behind the last position may be anything.
            let mut stored = || -> Vec<bf16> {
                let seen: Vec<bf16> =
                    (0..tokens * head_dim).map(|_| bf16::from_f32(random.normal())).collect();
                seen.into_iter().chain(std::iter::repeat(bf16::NAN)).take(96 * head_dim).collect()
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
            let plain: Vec<f32> = run(&scalar::TABLE, &query);
            for tier in tiers() {
                let got = run(tier, &query);
                assert_eq!(bits(&got), bits(&plain), "{} {head_dim} {tokens}", tier.name);
            }
            for (query, best) in query.chunks_exact(head_dim).zip(plain.chunks_exact(head_dim)) {
                for tier in tiers() {
                    assert_eq!(bits(best), bits(&run(tier, query)), "{} alone", tier.name);
                }
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
