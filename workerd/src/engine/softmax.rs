//! Numbers over a whole vocabulary: best tokens, weights, their sum.
//!
//! The same bits on every machine: own `exp` and `ln` (libm's differ), sums in one order, no fused operations. Loops
//! run over pieces of eight so that any compiler makes vectors of them. What is not a number counts as minus infinity.

use std::cmp::Ordering;

const LANES: usize = 8;
/// Up to so many best tokens are kept in order while looking; more are selected from a list of all.
const FEW: usize = 1024;

/// Heavier first, then the lower id: a total order, so no sort or selection can choose otherwise.
pub(super) fn by_weight(left: &(u32, f32), right: &(u32, f32)) -> Ordering {
    right.1.total_cmp(&left.1).then(left.0.cmp(&right.0))
}

/// Id of the highest value, the lowest of equals; 0 if there is none above minus infinity.
pub(super) fn argmax(values: &[f32]) -> u32 {
    let highest = highest(values);
    let is_there = |piece: &[f32]| piece.iter().fold(false, |is, value| is | (*value == highest));
    let piece = values.chunks(LANES).position(is_there).unwrap_or(0) * LANES;
    let within = values[piece..].iter().position(|value| *value == highest).unwrap_or(0);
    if highest == f32::NEG_INFINITY { 0 } else { (piece + within) as u32 }
}

fn highest(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for piece in values.chunks(LANES) {
        for (lane, value) in lanes.iter_mut().zip(piece) {
            *lane = if *value > *lane { *value } else { *lane };
        }
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

/// The `count` highest values with their ids, best first.
pub(super) fn best(values: &[f32], count: usize) -> Vec<(u32, f32)> {
    let count = count.min(values.len());
    if count > FEW {
        let mut all = at_least(values, f32::NEG_INFINITY);
        all.truncate(count);
        return all;
    }
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    for (piece, values) in values.chunks(LANES).enumerate() {
        let bar = best.last().filter(|_| best.len() == count).map(|worst| worst.1);
        let is_below = |bar: f32| values.iter().fold(true, |is, value| is & (*value <= bar));
        if bar.is_some_and(is_below) {
            continue;
        }
        for (within, value) in values.iter().enumerate() {
            let entry = ((piece * LANES + within) as u32, number(*value));
            let at = best.partition_point(|other| by_weight(other, &entry) == Ordering::Less);
            if at < count {
                best.insert(at, entry);
                best.truncate(count);
            }
        }
    }
    best
}

/// All values not below `floor` with their ids, best first.
pub(super) fn at_least(values: &[f32], floor: f32) -> Vec<(u32, f32)> {
    let mut kept = Vec::new();
    for (piece, values) in values.chunks(LANES).enumerate() {
        if values.iter().fold(true, |is, value| is & (*value < floor)) {
            continue;
        }
        let ids = (piece * LANES) as u32..;
        let pairs = ids.zip(values).map(|(id, value)| (id, number(*value)));
        kept.extend(pairs.filter(|(_, value)| *value >= floor));
    }
    kept.sort_unstable_by(by_weight);
    kept
}

fn number(value: f32) -> f32 {
    if value.is_nan() { f32::NEG_INFINITY } else { value }
}

/// Replaces each logit by `e^((logit - highest) / temperature)`.
pub(super) fn to_weights(logits: &mut [f32], highest: f32, temperature: f32) {
    for logit in logits {
        *logit = exp((*logit - highest) / temperature);
    }
}

/// Sum of the weights that are at least `floor`.
pub(super) fn sum(weights: &[f32], floor: f32) -> f64 {
    let mut lanes = [0.0; LANES];
    for piece in weights.chunks(LANES) {
        for (lane, weight) in lanes.iter_mut().zip(piece) {
            *lane += f64::from(if *weight >= floor { *weight } else { 0.0 });
        }
    }
    lanes.iter().sum()
}

/// `ln(sum(exp(logits)))`; the highest logit itself if that is infinite.
pub(super) fn log_sum_exp(logits: &[f32]) -> f64 {
    let highest = highest(logits);
    if !highest.is_finite() {
        return f64::from(highest);
    }
    let mut weights = logits.to_vec();
    to_weights(&mut weights, highest, 1.0);
    f64::from(highest) + ln(sum(&weights, 0.0))
}

/// `e^x` for `x <= 0` within 2 units in the last place; 0 below the smallest normal number and for what is none.
fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    /// Adding it leaves a whole number in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let power = rounded - ROUND;
    let rest = (x - power * LN2_HIGH) - power * LN2_LOW;
    let mut value = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        value = value * rest + coefficient;
    }
    let exponent = rounded.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    let value = value * f32::from_bits(exponent);
    if x > -87.0 { value } else { 0.0 }
}

/// `ln(x)` for finite `x >= 1` within 2 units in the last place: `2 artanh((m - 1) / (m + 1))` of the mantissa.
fn ln(x: f64) -> f64 {
    let bits = x.to_bits();
    let exponent = (bits >> 52) as i64 - 1023;
    let mantissa = f64::from_bits((bits & ((1 << 52) - 1)) | (1023 << 52));
    let ratio = (mantissa - 1.0) / (mantissa + 1.0);
    let square = ratio * ratio;
    let series = (0..20).rev().fold(0.0, |sum, term| sum * square + 1.0 / f64::from(2 * term + 1));
    exponent as f64 * std::f64::consts::LN_2 + 2.0 * ratio * series
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::philox;

    fn spread(count: u64) -> Vec<f32> {
        (0..count).map(|position| (philox::uniform(1, position) * 30.0 - 15.0) as f32).collect()
    }

    #[test]
    fn own_exp_and_ln_are_within_rounding_of_the_exact_ones() {
        for step in 0..87_000 {
            let x = step as f32 * -0.001;
            let exact = f64::from(x).exp();
            assert!((f64::from(exp(x)) - exact).abs() <= exact * 2.5e-7, "exp({x})");
            let y = 1.0 + f64::from(step) * 0.73;
            assert!((ln(y) - y.ln()).abs() <= 1e-15 * (1.0 + y.ln()), "ln({y})");
        }
        assert_eq!((exp(0.0), ln(1.0)), (1.0, 0.0));
        assert_eq!((exp(-88.0), exp(f32::NEG_INFINITY), exp(f32::NAN)), (0.0, 0.0, 0.0));
    }

    #[test]
    fn the_highest_is_found_wherever_it_stands() {
        for len in 1..40 {
            for at in 0..len {
                let mut values = vec![-1.0; len];
                values[at] = 2.0;
                assert_eq!(argmax(&values), at as u32);
                values[len - 1] = 2.0;
                assert_eq!(argmax(&values), at as u32, "the lowest of equals");
            }
        }
        assert_eq!(argmax(&[f32::NAN, f32::NEG_INFINITY, -1e30]), 2);
        assert_eq!(argmax(&[f32::NAN; 9]), 0);
    }

    #[test]
    fn the_best_are_the_first_of_all_in_order() {
        let mut values = spread(3_000);
        values[7] = f32::NAN;
        values[2_000] = values[3];
        let mut all: Vec<(u32, f32)> = (0..).zip(values.iter().map(|v| number(*v))).collect();
        all.sort_by(by_weight);
        for count in [0, 1, 2, 8, 100, FEW, FEW + 1, 2_999, 3_000, 9_000] {
            assert_eq!(best(&values, count), all[..count.min(3_000)], "{count}");
        }
        let above: Vec<_> = all.iter().copied().filter(|(_, value)| *value >= 3.0).collect();
        assert_eq!(at_least(&values, 3.0), above);
    }

    #[test]
    fn sums_are_right_for_any_length() {
        for len in 0..30 {
            let values: Vec<f32> = (0..len).map(|at| at as f32).collect();
            let above: Vec<f32> = values.iter().copied().filter(|value| *value >= 4.0).collect();
            assert_eq!(sum(&values, 0.0), f64::from(values.iter().sum::<f32>()));
            assert_eq!(sum(&values, 4.0), f64::from(above.iter().sum::<f32>()));
        }
        let values = spread(5_000);
        let exact = values.iter().map(|value| f64::from(*value).exp()).sum::<f64>().ln();
        assert!((log_sum_exp(&values) - exact).abs() < 1e-6);
    }
}
