//! What a [`ModelSpec`] must satisfy, whatever file it came from.

use super::ModelSpec;

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

    fn good() -> ModelSpec {
        ModelSpec {
            architecture: "llama".into(),
            layers: 2,
            hidden: 64,
            ffn: 128,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            vocab: 300,
            rope_theta: 1e4,
            rms_eps: 1e-5,
            max_len: 512,
            eos_ids: vec![2],
        }
    }

    #[test]
    fn every_unusable_number_is_refused_by_name() {
        assert_eq!(good().check(), Ok(()));
        type Spoil = fn(&mut ModelSpec);
        let cases: [(&str, Spoil); 12] = [
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
            ("rms_eps", |s| s.rms_eps = 0.0),
            ("eos_ids", |s| s.eos_ids = vec![300]),
        ];
        for (name, spoil) in cases {
            let mut spec = good();
            spoil(&mut spec);
            assert_eq!(spec.check().unwrap_err().0, name);
        }
    }
}
