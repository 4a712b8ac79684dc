//! What a [`ModelSpec`] must satisfy, whatever file it came from.

use super::{ModelSpec, rope};

/// Largest value of any extent: products of three stay far below a u64.
const EXTENT_LIMIT: u32 = 1 << 20;

impl ModelSpec {
    /// The first number that cannot be used, and why.
    ///
    /// # Errors
    /// The name of the field and the rule it breaks.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        let extents = [
            ("layers", self.layers),
            ("hidden", self.hidden),
            ("ffn", self.ffn),
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("vocab", self.vocab),
        ];
        for (name, value) in extents {
            if value == 0 || value > EXTENT_LIMIT {
                return Err((name, format!("is {value}, allowed are 1 to {EXTENT_LIMIT}")));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let rule =
                format!("is {}, which does not divide the {} heads", self.kv_heads, self.heads);
            return Err(("kv_heads", rule));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(("head_dim", format!("is {}, which is odd", self.head_dim)));
        }
        if u64::from(self.heads) * u64::from(self.head_dim) > u64::from(EXTENT_LIMIT) {
            let rule = format!("is {}: with {} heads that is too wide", self.head_dim, self.heads);
            return Err(("head_dim", rule));
        }
        if self.max_len == 0 {
            return Err(("max_len", "is 0".into()));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta >= 1.0) {
            return Err(("rope_theta", format!("is {}, at least 1 is needed", self.rope_theta)));
        }
        let pairs = (self.head_dim / 2) as usize;
        if !self.rope_factors.is_empty() && self.rope_factors.len() != pairs {
            let rule = format!("are {}, heads have {pairs} pairs", self.rope_factors.len());
            return Err(("rope_factors", rule));
        }
        if let Some(factor) = self.rope_factors.iter().find(|f| !(f.is_finite() && **f > 0.0)) {
            return Err(("rope_factors", format!("have {factor}, which is not above 0")));
        }
        if self.window == Some(0) {
            return Err(("sliding_window", "is 0".into()));
        }
        if !(self.rms_eps > 0.0 && self.rms_eps < 1.0) {
            return Err(("rms_eps", format!("is {}, allowed is 0 to 1, exclusive", self.rms_eps)));
        }
        match self.eos_ids.iter().find(|id| **id >= self.vocab) {
            None => Ok(()),
            Some(id) => {
                Err(("eos_ids", format!("has {id}, the vocabulary has {} ids", self.vocab)))
            }
        }
    }

    /// Angle of each pair of a head at position 1.
    pub fn rope_frequencies(&self) -> Vec<f64> {
        let mut frequencies = rope::frequencies(self.rope_theta, (self.head_dim / 2) as usize);
        for (frequency, factor) in frequencies.iter_mut().zip(&self.rope_factors) {
            *frequency /= f64::from(*factor);
        }
        frequencies
    }

    /// Longest sequence that is computed as the model was made to be: while no token is outside any layer's window,
    /// a window changes nothing.
    pub fn longest(&self) -> u32 {
        self.window.map_or(self.max_len, |window| window.min(self.max_len))
    }

    /// Rows of the query matrix, columns of the output matrix.
    pub fn query_width(&self) -> u32 {
        self.heads * self.head_dim
    }

    /// Rows of the key and of the value matrix.
    pub fn kv_width(&self) -> u32 {
        self.kv_heads * self.head_dim
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Architecture;

    fn good() -> ModelSpec {
        ModelSpec {
            architecture: Architecture::Llama,
            layers: 2,
            hidden: 64,
            ffn: 128,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            vocab: 300,
            rope_theta: 1e4,
            rope_factors: vec![1.0; 8],
            rms_eps: 1e-5,
            max_len: 512,
            window: Some(256),
            eos_ids: vec![2],
        }
    }

    #[test]
    fn every_unusable_number_is_refused_by_name() {
        assert_eq!(good().check(), Ok(()));
        type Spoil = fn(&mut ModelSpec);
        let cases: [(&str, Spoil); 15] = [
            ("layers", |s| s.layers = 0),
            ("hidden", |s| s.hidden = u32::MAX),
            ("ffn", |s| s.ffn = 0),
            ("heads", |s| s.heads = 0),
            ("kv_heads", |s| s.kv_heads = 3),
            ("head_dim", |s| s.head_dim = 15),
            ("head_dim", |s| s.head_dim = EXTENT_LIMIT),
            ("vocab", |s| s.vocab = 0),
            ("max_len", |s| s.max_len = 0),
            ("rope_theta", |s| s.rope_theta = f32::NAN),
            ("rope_factors", |s| s.rope_factors = vec![1.0; 7]),
            ("rope_factors", |s| s.rope_factors[3] = 0.0),
            ("sliding_window", |s| s.window = Some(0)),
            ("rms_eps", |s| s.rms_eps = 0.0),
            ("eos_ids", |s| s.eos_ids = vec![300]),
        ];
        for (name, spoil) in cases {
            let mut spec = good();
            spoil(&mut spec);
            assert_eq!(spec.check().unwrap_err().0, name);
        }
    }

    #[test]
    fn a_window_bounds_the_length_and_factors_divide_frequencies() {
        assert_eq!(good().longest(), 256);
        assert_eq!(ModelSpec { window: None, ..good() }.longest(), 512);
        let plain = ModelSpec { rope_factors: vec![], ..good() }.rope_frequencies();
        let halved = ModelSpec { rope_factors: vec![2.0; 8], ..good() }.rope_frequencies();
        assert_eq!(plain.len(), 8);
        assert!(plain.iter().zip(&halved).all(|(p, h)| *p == h * 2.0));
    }
}
