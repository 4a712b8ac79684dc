//! How fast each pair of a head turns: one table, whatever scaling a model asks for. By basic arithmetic only, so
//! that every machine gets the same bits.

use std::f64::consts::TAU;

/// The `llama3` scaling of a `config.json`: slow pairs turn slower by a factor, fast ones as ever, those between
/// are blended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Llama3 {
    /// By which slow pairs are slowed.
    pub factor: f64,
    /// Pairs that turn less often than this in `original_len` positions are slow.
    pub low: f64,
    /// Pairs that turn more often than this in `original_len` positions are fast.
    pub high: f64,
    /// Length the model was first made for.
    pub original_len: f64,
}

impl Llama3 {
    /// What the frequency of each of `pairs` pairs is divided by: the numbers that GGUF files keep in
    /// `rope_freqs.weight`.
    pub fn factors(&self, theta: f32, pairs: usize) -> Vec<f32> {
        let Self { factor, low, high, original_len } = *self;
        let of = |frequency: f64| {
            let turns = original_len * frequency / TAU;
            if turns > high {
                1.0
            } else if turns < low {
                factor
            } else {
                let share = (turns - low) / (high - low);
                1.0 / ((1.0 - share) / factor + share)
            }
        };
        frequencies(theta, pairs).into_iter().map(|frequency| of(frequency) as f32).collect()
    }
}

/// Angle of pair `i` at position 1: `theta^(-i / pairs)`, for `i` in `0..pairs`.
pub fn frequencies(theta: f32, pairs: usize) -> Vec<f64> {
    let root = root(f64::from(theta), pairs);
    let mut power = 1.0;
    let mut frequencies = Vec::with_capacity(pairs);
    for _ in 0..pairs {
        frequencies.push(1.0 / power);
        power *= root;
    }
    frequencies
}

/// The `n`th root of `x >= 1` by Newton's method from above, which only descends.
fn root(x: f64, n: usize) -> f64 {
    let mut root = 1.0 + (x - 1.0) / n as f64;
    loop {
        let power = (1..n).fold(1.0, |power, _| power * root);
        let next = root - (power * root - x) / (n as f64 * power);
        if next >= root || !next.is_finite() {
            return root;
        }
        root = next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies_are_those_of_the_formula() {
        for (theta, pairs) in [(10_000.0_f32, 8), (100_000.0, 32), (500_000.0, 64), (1.0, 4)] {
            for (pair, frequency) in frequencies(theta, pairs).iter().enumerate() {
                let exact = f64::from(theta).powf(-(pair as f64) / pairs as f64);
                assert!((frequency / exact - 1.0).abs() < 1e-12, "{theta} {pair}");
            }
        }
    }

    #[test]
    fn llama3_slows_slow_pairs_only_and_blends_between() {
        let scaling = Llama3 { factor: 32.0, low: 1.0, high: 4.0, original_len: 8192.0 };
        let factors = scaling.factors(500_000.0, 32);
        assert!(factors.is_sorted(), "{factors:?}");
        assert_eq!((factors[0], factors[31]), (1.0, 32.0));
        // Llama 3.2 1B: by its own formula, pairs 0 to 14 are fast, from 18 on slow.
        assert!(factors[14] == 1.0 && factors[15] > 1.0, "{factors:?}");
        assert!(factors[17] < 32.0 && factors[18] == 32.0, "{factors:?}");
    }
}
