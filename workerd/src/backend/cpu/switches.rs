//! What some architectures do to a row of queries, keys and values before its position turns it: a bias (Qwen2), a
//! norm of each head of queries and keys (Qwen3). A Llama does nothing.
//!
//! Element by element, or by the kernels' own norm: the same bits on every tier.

use super::attention::Heads;
use super::kernels::Kernels;
use super::linear::{Team, grow};
use super::pieces::Split;
use crate::model::Layer;

/// One layer's.
#[derive(Debug)]
pub struct Switches {
    /// `[queries, keys, values]`.
    bias: Option<Vec<f32>>,
    /// Of a query's head and of a key's, `[head]` each.
    norms: Option<[Vec<f32>; 2]>,
    epsilon: f32,
}

impl Switches {
    /// Of a layer, whose shapes were checked.
    pub fn new(layer: &Layer, epsilon: f32) -> Self {
        Self { bias: layer.qkv_bias.clone(), norms: layer.qk_norm.clone(), epsilon }
    }

    /// Changes rows of queries, keys and values.
    pub fn apply(&self, team: &mut Team, heads: Heads, rows: &mut [f32]) {
        if self.bias.is_none() && self.norms.is_none() {
            return;
        }
        let kernels = team.kernels;
        team.each(Split::even(rows, heads.row()), |scratch, _, row| {
            self.row(kernels, heads, row, &mut scratch.row);
        });
    }

    /// Changes one row. `spare` is any memory.
    fn row(&self, kernels: &Kernels, heads: Heads, row: &mut [f32], spare: &mut Vec<f32>) {
        if let Some(bias) = &self.bias {
            row.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
        }
        if let Some([query_norm, key_norm]) = &self.norms {
            grow(spare, heads.size);
            let spare = &mut spare[..heads.size];
            let (queries, rest) = row.split_at_mut(heads.query_row());
            let keys = &mut rest[..heads.keys * heads.size];
            for (part, norm) in [(queries, query_norm), (keys, key_norm)] {
                for head in part.chunks_exact_mut(heads.size) {
                    (kernels.rms_norm)(head, norm, self.epsilon, spare);
                    head.copy_from_slice(spare);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::kernels::scalar;

    const HEADS: Heads = Heads { queries: 4, keys: 2, size: 24 };

    fn row() -> Vec<f32> {
        (0..HEADS.row()).map(|at| ((at * 37 % 101) as f32 - 50.0) / 7.0).collect()
    }

    fn applied(kernels: &Kernels, bias: bool, norms: bool) -> Vec<f32> {
        let numbers = |len: usize| (0..len).map(|at| (at % 13) as f32 * 0.21 - 1.1).collect();
        let switches = Switches {
            bias: bias.then(|| numbers(HEADS.row())),
            norms: norms.then(|| [numbers(HEADS.size), numbers(HEADS.size + 5)[5..].to_vec()]),
            epsilon: 1e-6,
        };
        let mut row = row();
        switches.row(kernels, HEADS, &mut row, &mut Vec::new());
        row
    }

    #[test]
    fn every_tier_gives_the_same_bits() {
        for (bias, norms) in [(true, false), (false, true), (true, true)] {
            let [one, two] = [&scalar::TABLE, Kernels::detect()].map(|k| applied(k, bias, norms));
            let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&one), bits(&two), "{bias} {norms}");
        }
    }

    #[test]
    fn without_switches_nothing_changes_and_values_are_never_normalised() {
        let kernels = Kernels::detect();
        assert_eq!(applied(kernels, false, false), row());
        let values = HEADS.row() - HEADS.keys * HEADS.size;
        let got = applied(kernels, false, true);
        assert_eq!(got[values..], row()[values..]);
        let changed = got.iter().zip(&row()).filter(|(a, b)| a != b).count();
        assert!(changed > values * 9 / 10, "{changed} of {values}");
        assert!(applied(kernels, true, false).iter().zip(&row()).any(|(a, b)| a != b));
    }
}
