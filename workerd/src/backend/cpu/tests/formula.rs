//! A forward pass that shares nothing with the engine.

use super::{PLAIN, prompt, run, tiny_model};
use crate::model::{Model, Weight, WeightType, dequantize};

/// Log-probabilities after a prompt, by the formulas in f64; keys and values rounded as the pool has them.
fn by_formula(model: &Model, prompt: &[u32]) -> Vec<f64> {
    let spec = &model.spec;
    let (heads, group) = (spec.heads as usize, (spec.heads / spec.kv_heads) as usize);
    let size = spec.head_dim as usize;
    let rows = |weight: &Weight, x: &[f64]| -> Vec<f64> {
        let dot = |row: Vec<f32>| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum();
        (0..weight.rows).map(|row| dot(dequantize(weight, row))).collect()
    };
    let normed = |x: &[f64], weight: &[f32]| -> Vec<f64> {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        let scale = 1.0 / (mean + f64::from(spec.rms_eps)).sqrt();
        x.iter().zip(weight).map(|(x, w)| x * scale * f64::from(*w)).collect()
    };
    let turned = |x: &mut [f64], position: usize| {
        for head in x.chunks_exact_mut(size) {
            for pair in 0..size / 2 {
                let power = -2.0 * pair as f64 / size as f64;
                let angle = position as f64 * f64::from(spec.rope_theta).powf(power);
                let (a, b) = (head[pair], head[pair + size / 2]);
                head[pair] = a * angle.cos() - b * angle.sin();
                head[pair + size / 2] = b * angle.cos() + a * angle.sin();
            }
        }
    };
    let rounded = |x: Vec<f64>| -> Vec<f64> {
        x.iter().map(|x| half::bf16::from_f32(*x as f32).to_f64()).collect()
    };
    let mut caches = vec![(Vec::new(), Vec::new()); model.layers.len()];
    let mut x = Vec::new();
    for (position, token) in prompt.iter().enumerate() {
        x = dequantize(&model.embedding, *token as usize).into_iter().map(f64::from).collect();
        for (layer, (keys, values)) in model.layers.iter().zip(&mut caches) {
            let input = normed(&x, &layer.attn_norm);
            let (mut query, mut key) = (rows(&layer.q, &input), rows(&layer.k, &input));
            turned(&mut query, position);
            turned(&mut key, position);
            keys.push(rounded(key));
            values.push(rounded(rows(&layer.v, &input)));
            let mut attended = vec![0.0; heads * size];
            for head in 0..heads {
                let mine = head * size..(head + 1) * size;
                let theirs = head / group * size..(head / group + 1) * size;
                let score = |key: &Vec<f64>| -> f64 {
                    let pairs = query[mine.clone()].iter().zip(&key[theirs.clone()]);
                    (pairs.map(|(q, k)| q * k).sum::<f64>() / (size as f64).sqrt()).exp()
                };
                let shares: Vec<f64> = keys.iter().map(score).collect();
                let sum: f64 = shares.iter().sum();
                for (share, value) in shares.iter().zip(values.iter()) {
                    for (out, value) in
                        attended[mine.clone()].iter_mut().zip(&value[theirs.clone()])
                    {
                        *out += share / sum * value;
                    }
                }
            }
            rows(&layer.o, &attended).iter().zip(&mut x).for_each(|(add, x)| *x += add);
            let input = normed(&x, &layer.ffn_norm);
            let (gate, up) = (rows(&layer.gate, &input), rows(&layer.up, &input));
            let gated: Vec<f64> =
                gate.iter().zip(&up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            rows(&layer.down, &gated).iter().zip(&mut x).for_each(|(add, x)| *x += add);
        }
    }
    let head = model.head.as_ref().unwrap_or(&model.embedding);
    let logits = rows(head, &normed(&x, &model.final_norm));
    let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
    logits.iter().map(|logit| logit - sum.ln()).collect()
}

#[test]
fn log_probabilities_are_those_of_the_formulas() {
    for (dtype, tolerance) in [
        // A key that is rounded the other way to bf16 moves them by some 1e-3.
        (WeightType::F32, 5e-3),
        (WeightType::F16, 5e-3),
        (WeightType::Bf16, 5e-3),
        // Eight bits an activation weigh more here than in a wide model.
        (WeightType::Q8_0, 0.5),
        (WeightType::Q4_1, 0.5),
    ] {
        for heads in [(4, 2, 16), (4, 4, 8), (4, 1, 24)] {
            let model = tiny_model((dtype, dtype), Some(WeightType::Bf16), heads);
            for len in [1, 5, 40] {
                let prompt = prompt(len);
                let exact = by_formula(&model, &prompt);
                for (token, bits) in &run(&model, &prompt, PLAIN)[0] {
                    let error = (f64::from(f32::from_bits(*bits)) - exact[*token as usize]).abs();
                    assert!(error < tolerance, "{dtype:?} {heads:?} {len}: {error}");
                }
            }
        }
    }
}
