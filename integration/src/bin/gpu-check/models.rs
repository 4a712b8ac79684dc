//! Models of random weights, in memory: small ones of every architecture, and the shape of Llama-3.1-8B.

use std::sync::Arc;

use baton_workerd::model::{
    Architecture, Layer, Model, ModelError, ModelSpec, Source, Weight, WeightType,
};
use half::bf16;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// What a small model has beside a plain Llama, and its heads.
#[derive(Clone, Copy, Debug)]
pub struct Small {
    /// For reports.
    pub name: &'static str,
    /// Architecture.
    pub architecture: Architecture,
    /// Query heads, KV heads, elements of a head.
    pub heads: (u32, u32, u32),
    /// Residual stream, feed-forward layer.
    pub widths: (u32, u32),
    /// Ids.
    pub vocab: u32,
}

/// One of each kind; heads of all widths, groups of 1 to 7.
pub const SMALL: [Small; 5] = [
    Small {
        name: "llama, heads 9/3 of 64",
        architecture: Architecture::Llama,
        heads: (9, 3, 64),
        widths: (576, 1536),
        vocab: 1000,
    },
    Small {
        name: "llama, heads 8/2 of 128",
        architecture: Architecture::Llama,
        heads: (8, 2, 128),
        widths: (512, 1024),
        vocab: 4098,
    },
    Small {
        name: "qwen2, heads 14/2 of 64",
        architecture: Architecture::Qwen2,
        heads: (14, 2, 64),
        widths: (896, 1216),
        vocab: 770,
    },
    Small {
        name: "qwen3, heads 8/4 of 128",
        architecture: Architecture::Qwen3,
        heads: (8, 4, 128),
        widths: (512, 768),
        vocab: 2048,
    },
    Small {
        name: "llama, heads 4/4 of 32",
        architecture: Architecture::Llama,
        heads: (4, 4, 32),
        widths: (64, 96),
        vocab: 100,
    },
];

fn random_bytes(random: &mut StdRng, elements: usize, scale: f32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(elements * 2);
    for _ in 0..elements {
        // A sum of four uniform numbers is near enough to a normal one.
        let bits: u32 = random.random();
        let sum = (0..4).map(|byte| f32::from((bits >> (8 * byte)) as u8) - 127.5).sum::<f32>();
        bytes.extend(bf16::from_f32(sum / 147.2 * scale).to_le_bytes());
    }
    bytes
}

/// A matrix whose rows keep the size of what they are applied to, roughly.
pub fn matrix(random: &mut StdRng, rows: u32, cols: u32, gain: f32) -> Weight {
    let (rows, cols) = (rows as usize, cols as usize);
    let bytes = random_bytes(random, rows * cols, gain / (cols as f32).sqrt());
    Weight { dtype: WeightType::Bf16, rows, cols, bytes: Arc::new(bytes) }
}

fn norm(random: &mut StdRng, len: u32) -> Vec<f32> {
    (0..len).map(|_| 0.8 + 0.4 * random.random::<f32>()).collect()
}

fn layer(random: &mut StdRng, spec: &ModelSpec) -> Layer {
    let (queries, keys, hidden) = (spec.query_width(), spec.kv_width(), spec.hidden);
    let has_bias = spec.architecture == Architecture::Qwen2;
    let has_norms = spec.architecture == Architecture::Qwen3;
    let bias = (0..queries + 2 * keys).map(|_| random.random::<f32>() - 0.5).collect();
    let size = spec.head_dim;
    let norms = [norm(random, size), norm(random, size)];
    Layer {
        attn_norm: norm(random, hidden),
        q: matrix(random, queries, hidden, 1.5),
        k: matrix(random, keys, hidden, 1.5),
        v: matrix(random, keys, hidden, 1.0),
        qkv_bias: has_bias.then_some(bias),
        qk_norm: has_norms.then_some(norms),
        o: matrix(random, hidden, queries, 1.0),
        ffn_norm: norm(random, hidden),
        gate: matrix(random, spec.ffn, hidden, 1.0),
        up: matrix(random, spec.ffn, hidden, 1.0),
        down: matrix(random, hidden, spec.ffn, 1.0),
    }
}

impl Small {
    /// With weights of that seed.
    pub fn model(&self, seed: u64) -> Model {
        let (heads, kv_heads, head_dim) = self.heads;
        let spec = ModelSpec {
            architecture: self.architecture,
            layers: 3,
            hidden: self.widths.0,
            ffn: self.widths.1,
            heads,
            kv_heads,
            head_dim,
            vocab: self.vocab,
            rope_theta: 10_000.0,
            rope_factors: Vec::new(),
            rms_eps: 1e-5,
            max_len: 4096,
            window: None,
            eos_ids: vec![1],
        };
        let random = &mut StdRng::seed_from_u64(seed);
        let is_tied = head_dim == 32;
        Model {
            embedding: matrix(
                random,
                spec.vocab,
                spec.hidden,
                if is_tied { 3.0 } else { (spec.hidden as f32).sqrt() },
            ),
            layers: (0..spec.layers).map(|_| layer(random, &spec)).collect(),
            final_norm: norm(random, spec.hidden),
            head: (!is_tied).then(|| matrix(random, spec.vocab, spec.hidden, 3.0)),
            content_hash: [0; 32],
            spec,
        }
    }
}

/// Llama-3.1-8B's shape. All layers share their random numbers on the host; each has its own on the device.
pub struct Large {
    spec: ModelSpec,
    layer: Layer,
    ends: Weight,
}

impl Large {
    /// With so many blocks (32 are the model's).
    pub fn llama_8b(layers: u32) -> Self {
        let spec = ModelSpec {
            architecture: Architecture::Llama,
            layers,
            hidden: 4096,
            ffn: 14336,
            heads: 32,
            kv_heads: 8,
            head_dim: 128,
            vocab: 128_256,
            rope_theta: 500_000.0,
            rope_factors: Vec::new(),
            rms_eps: 1e-5,
            max_len: 131_072,
            window: None,
            eos_ids: vec![1],
        };
        let random = &mut StdRng::seed_from_u64(1);
        Self {
            layer: layer(random, &spec),
            ends: matrix(random, spec.vocab, spec.hidden, 1.0),
            spec,
        }
    }
}

impl Source for Large {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn embedding(&mut self) -> Result<Weight, ModelError> {
        Ok(self.ends.clone())
    }

    fn layer(&mut self, _: u32) -> Result<Layer, ModelError> {
        Ok(self.layer.clone())
    }

    fn final_norm(&mut self) -> Result<Vec<f32>, ModelError> {
        Ok(vec![1.0; self.spec.hidden as usize])
    }

    fn head(&mut self) -> Result<Option<Weight>, ModelError> {
        Ok(Some(self.ends.clone()))
    }
}
