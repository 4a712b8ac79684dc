//! Rotary positions: angles of each pair of a head, by basic arithmetic only, so that every machine gets the same bits.
//! How fast pairs turn is the model's business: see [`crate::model::rope`].

/// Sines and cosines of a position, one a pair.
pub fn angles(position: u32, frequencies: &[f64], sines: &mut [f32], cosines: &mut [f32]) {
    for ((frequency, sine), cosine) in frequencies.iter().zip(sines).zip(cosines) {
        let (s, c) = sine_and_cosine(f64::from(position) * frequency);
        (*sine, *cosine) = (s as f32, c as f32);
    }
}

/// Turns a head in NEOX order: element `i` of the first half is paired with element `i` of the second.
pub fn turn(head: &mut [f32], sines: &[f32], cosines: &[f32], scale: f32) {
    let (first, second) = head.split_at_mut(sines.len());
    for (((a, b), sine), cosine) in first.iter_mut().zip(second).zip(sines).zip(cosines) {
        let (x, y) = (*a, *b);
        *a = (x * cosine - y * sine) * scale;
        *b = (y * cosine + x * sine) * scale;
    }
}

/// Taylor series after reduction to an eighth of a turn; good to 1e-10 below a million.
fn sine_and_cosine(angle: f64) -> (f64, f64) {
    // π/2 in two pieces; the first has 33 bits, so that its product with a quarter's number is exact.
    const HALF_PI_HIGH: f64 = 1.570_796_326_734_125_6;
    const HALF_PI_LOW: f64 = 6.077_100_506_506_192e-11;
    let quarters = (angle * std::f64::consts::FRAC_2_PI).round_ties_even();
    let x = (angle - quarters * HALF_PI_HIGH) - quarters * HALF_PI_LOW;
    let square = x * x;
    let sine = x * series(square, 1);
    let cosine = series(square, 0);
    match (quarters as i64).rem_euclid(4) {
        0 => (sine, cosine),
        1 => (cosine, -sine),
        2 => (-sine, -cosine),
        _ => (-cosine, sine),
    }
}

/// `1 - s/((o+1)(o+2)) + s²/((o+1)(o+2)(o+3)(o+4)) - …`: the cosine for `o = 0`, the sine over x for `o = 1`.
fn series(square: f64, offset: u32) -> f64 {
    (0..9).rev().fold(1.0, |rest, term| {
        let n = f64::from(2 * term + offset);
        1.0 - square / ((n + 1.0) * (n + 2.0)) * rest
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::rope::frequencies;

    #[test]
    fn angles_are_those_of_the_formula() {
        for (theta, pairs) in [(10_000.0_f32, 8), (100_000.0, 32), (500_000.0, 64), (1.0, 4)] {
            let frequencies = frequencies(theta, pairs);
            let (mut sines, mut cosines) = (vec![0.0; pairs], vec![0.0; pairs]);
            for position in [0, 1, 2, 3, 7, 100, 8191, 131_071, 1_000_000] {
                angles(position, &frequencies, &mut sines, &mut cosines);
                for pair in 0..pairs {
                    let angle = f64::from(position) * frequencies[pair];
                    assert!((f64::from(sines[pair]) - angle.sin()).abs() < 1e-7);
                    assert!((f64::from(cosines[pair]) - angle.cos()).abs() < 1e-7);
                }
            }
        }
    }

    #[test]
    fn turning_keeps_length_and_pairs_halves() {
        let mut head = [1.0, 0.0, 0.0, 2.0];
        turn(&mut head, &[1.0, 0.0], &[0.0, 1.0], 1.0);
        assert_eq!(head, [0.0, 0.0, 1.0, 2.0]);
    }
}
