//! Tiny random models of each shape, in bf16.

use crate::backend::cpu::tests::{Random, random_weight};
use crate::model::{Architecture, Layer, Model, ModelSpec, WeightType};

/// Of all tiny models.
pub const VOCAB: u32 = 100;
const HIDDEN: u32 = 96;
const FFN: u32 = 160;

/// What tiny models differ in.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Which switches are on.
    pub architecture: Architecture,
    /// Heads, KV heads and their size.
    pub heads: (u32, u32, u32),
    /// The embedding is the head.
    pub tied: bool,
}

/// Two layers.
pub fn tiny_model(shape: &Shape) -> Model {
    let mut random = Random::new(11);
    let (heads, kv_heads, head_dim) = shape.heads;
    let spec = ModelSpec {
        architecture: shape.architecture,
        layers: 2,
        hidden: HIDDEN,
        ffn: FFN,
        heads,
        kv_heads,
        head_dim,
        vocab: VOCAB,
        rope_theta: 10_000.0,
        rope_factors: Vec::new(),
        rms_eps: 1e-5,
        max_len: 512,
        window: None,
        eos_ids: vec![1],
    };
    let (hidden, ffn, size) = (HIDDEN as usize, FFN as usize, head_dim as usize);
    let (queries, keys) = ((heads * head_dim) as usize, (kv_heads * head_dim) as usize);
    let norm = |len: usize| (0..len).map(|at| 1.0 + (at % 5) as f32 * 0.1).collect::<Vec<f32>>();
    let bias = |len: usize| (0..len).map(|at| (at % 7) as f32 * 0.1 - 0.3).collect::<Vec<f32>>();
    let mut matrix = |rows: usize, cols: usize| {
        random_weight(&mut random, WeightType::Bf16, rows, cols, 1.0 / (cols as f32).sqrt())
    };
    let layers = (0..2)
        .map(|_| Layer {
            attn_norm: norm(hidden),
            q: matrix(queries, hidden),
            k: matrix(keys, hidden),
            v: matrix(keys, hidden),
            qkv_bias: shape.architecture.has_qkv_bias().then(|| bias(queries + 2 * keys)),
            qk_norm: shape.architecture.has_qk_norm().then(|| [norm(size), norm(size)]),
            o: matrix(hidden, queries),
            ffn_norm: norm(hidden),
            gate: matrix(ffn, hidden),
            up: matrix(ffn, hidden),
            down: matrix(hidden, ffn),
        })
        .collect();
    Model {
        spec,
        embedding: matrix(VOCAB as usize, hidden),
        layers,
        final_norm: norm(hidden),
        head: (!shape.tied).then(|| matrix(VOCAB as usize, hidden)),
        content_hash: [0; 32],
    }
}
