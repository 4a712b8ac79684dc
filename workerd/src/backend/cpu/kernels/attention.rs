//! Attention to one tile of 32 positions: what the kernels compute, in plain Rust.
//!
//! A score is summed over head_dim in order and an output over the tile's positions in order, one fused multiply-add a
//! step; lanes run over what is not summed. Only a tile's 32 shares are added as `(l + l+8) + (l+16 + l+24)`, then as a
//! tree. What a query gets never depends on the queries beside it.

use std::array::from_fn;

use super::scalar::{exp, larger, tree};

/// Positions of a step of the online softmax, in every path.
pub const ATTENTION_TILE: usize = 32;

/// State of an online softmax: what has been seen so far of one query.
#[derive(Clone, Copy, Debug)]
pub struct Running {
    /// Largest score.
    pub max: f32,
    /// Sum of `exp(score - max)`.
    pub sum: f32,
}

impl Running {
    /// Nothing seen.
    pub const START: Self = Self { max: f32::NEG_INFINITY, sum: 0.0 };
}

impl Default for Running {
    fn default() -> Self {
        Self::START
    }
}

/// See [`Attention::attend`].
pub type Attend = fn(
    queries: &[f32],
    keys: &[f32],
    values: &[f32],
    tokens: usize,
    running: &mut [Running],
    out: &mut [f32],
);

/// Where rows of floats lie, for vector kernels.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    /// The first one.
    pub first: *const f32,
    /// Elements from one to the next.
    pub stride: usize,
}

/// One tier's kernels; head_dim is a multiple of 8.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// A tile's keys as stored, bf16 `[32][head_dim]`, into `[head_dim][32]`.
    pub transpose: fn(stored: &[u16], keys: &mut [f32]),
    /// A tile's values as stored, bf16, into f32; lengths equal, a multiple of 8.
    pub widen: fn(stored: &[u16], values: &mut [f32]),
    /// One step of the online softmax for each of the queries `[query][head_dim]`, which are scaled already: the first
    /// `tokens` (1 to 32) positions of `keys` (`[head_dim][32]`) and `values` (`[32][head_dim]`), into `running` (one
    /// a query) and `out` (`[query][head_dim]`), which is not yet divided by `running.sum`.
    pub attend: Attend,
}

/// In plain Rust.
pub const PLAIN: Attention = Attention { transpose, widen, attend };

fn transpose(stored: &[u16], keys: &mut [f32]) {
    let head_dim = stored.len() / ATTENTION_TILE;
    for (token, stored) in stored.chunks_exact(head_dim).enumerate() {
        for (keys, stored) in keys.chunks_exact_mut(ATTENTION_TILE).zip(stored) {
            keys[token] = wide(*stored);
        }
    }
}

fn widen(stored: &[u16], values: &mut [f32]) {
    for (value, stored) in values.iter_mut().zip(stored) {
        *value = wide(*stored);
    }
}

fn wide(stored: u16) -> f32 {
    f32::from_bits(u32::from(stored) << 16)
}

fn attend(
    queries: &[f32],
    keys: &[f32],
    values: &[f32],
    tokens: usize,
    running: &mut [Running],
    out: &mut [f32],
) {
    let head_dim = queries.len() / running.len();
    let outs = out.chunks_exact_mut(head_dim);
    for ((query, running), out) in queries.chunks_exact(head_dim).zip(running).zip(outs) {
        let mut scores = [0.0_f32; ATTENTION_TILE];
        for (q, keys) in query.iter().zip(keys.as_chunks::<ATTENTION_TILE>().0) {
            scores = from_fn(|token| q.mul_add(keys[token], scores[token]));
        }
        scores[tokens..].fill(f32::NEG_INFINITY);
        let (shares, shrink) = softmax(scores, running);
        out.iter_mut().for_each(|out| *out *= shrink);
        for (value, share) in values.chunks_exact(head_dim).zip(&shares[..tokens]) {
            for (out, value) in out.iter_mut().zip(value) {
                *out = share.mul_add(*value, *out);
            }
        }
    }
}

/// A tile's shares, and by what earlier ones shrink.
fn softmax(scores: [f32; ATTENTION_TILE], running: &mut Running) -> ([f32; ATTENTION_TILE], f32) {
    let max = scores.iter().fold(running.max, |max, &score| larger(max, score));
    let shrink = if max == running.max { 1.0 } else { exp(running.max - max) };
    let shares = scores.map(|score| exp(score - max));
    let lanes: [f32; 8] =
        from_fn(|lane| (shares[lane] + shares[lane + 8]) + (shares[lane + 16] + shares[lane + 24]));
    *running = Running { max, sum: running.sum.mul_add(shrink, tree(&lanes)) };
    (shares, shrink)
}
