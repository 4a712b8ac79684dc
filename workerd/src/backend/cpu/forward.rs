//! A Llama block after another: what a step's rows go through, from token ids to logits.
//!
//! Each row's result depends on its own token, position and the pool only; see `attention` and `linear`.

use super::CpuError;
use super::arena::{Arena, OutOfMemory};
use super::attention::{self, Heads, Parts};
use super::cache::Cache;
use super::linear::{Activations, Linear, Team, Tiling, grow};
use super::pieces::{Count, Split};
use super::places::Places;
use super::switches::Switches;
use crate::backend::check;
use crate::model::{Layer, Source};

/// The weights as the kernels read them.
#[derive(Debug)]
pub struct Weights {
    heads: Heads,
    hidden: usize,
    ffn: usize,
    vocab: usize,
    epsilon: f32,
    /// Angle of each pair of a head at position 1.
    frequencies: Vec<f64>,
    embedding: Linear,
    blocks: Vec<Block>,
    final_norm: Vec<f32>,
    /// `None`: the embedding.
    head: Option<Linear>,
}

#[derive(Debug)]
struct Block {
    attention_norm: Vec<f32>,
    qkv: Linear,
    switches: Switches,
    output: Linear,
    ffn_norm: Vec<f32>,
    gate_up: Linear,
    down: Linear,
}

impl Weights {
    /// Repacks a model part by part.
    ///
    /// # Errors
    /// [`CpuError`]: a part cannot be read, or has another shape than it should.
    pub fn load(source: &mut impl Source) -> Result<Self, CpuError> {
        let spec = &source.spec().clone();
        check::spec(spec).map_err(CpuError::Model)?;
        let (embedding, final_norm) = (source.embedding()?, source.final_norm()?);
        let head = source.head()?;
        check::ends(spec, &embedding, &final_norm, head.as_ref()).map_err(CpuError::Model)?;
        let arena = &mut Arena::default();
        let head = head.map(|head| Linear::new(&[&head], arena)).transpose()?;
        let embedding = Linear::new(&[&embedding], arena)?;
        let block = |index| {
            let layer = source.layer(index)?;
            check::layer(spec, &layer).map_err(CpuError::Model)?;
            Ok(Block::new(&layer, spec.rms_eps, arena)?)
        };
        Ok(Self {
            blocks: (0..spec.layers).map(block).collect::<Result<_, CpuError>>()?,
            heads: Heads {
                queries: spec.heads as usize,
                keys: spec.kv_heads as usize,
                size: spec.head_dim as usize,
            },
            hidden: spec.hidden as usize,
            ffn: spec.ffn as usize,
            vocab: spec.vocab as usize,
            epsilon: spec.rms_eps,
            frequencies: spec.rope_frequencies(),
            embedding,
            final_norm,
            head,
        })
    }

    /// Ids are below this.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    fn head(&self) -> &Linear {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// The first weights applied in block `index`, or behind the last block.
    fn entry(&self, index: usize) -> &Linear {
        self.blocks.get(index).map_or(self.head(), |block| &block.qkv)
    }
}

impl Block {
    fn new(layer: &Layer, epsilon: f32, arena: &mut Arena) -> Result<Self, OutOfMemory> {
        Ok(Self {
            attention_norm: layer.attn_norm.clone(),
            qkv: Linear::new(&[&layer.q, &layer.k, &layer.v], arena)?,
            switches: Switches::new(layer, epsilon),
            output: Linear::new(&[&layer.o], arena)?,
            ffn_norm: layer.ffn_norm.clone(),
            gate_up: Linear::new(&[&layer.gate, &layer.up], arena)?,
            down: Linear::new(&[&layer.down], arena)?,
        })
    }
}

/// A step's rows; reused from step to step.
#[derive(Debug, Default)]
pub struct Batch {
    /// Input token of each row.
    tokens: Vec<u32>,
    places: Places,
    /// Rows whose logits are wanted.
    sampled: Vec<usize>,
}

impl Batch {
    /// Empties it, keeping its memory.
    pub fn clear(&mut self) {
        let Self { tokens, places, sampled } = self;
        tokens.clear();
        places.clear();
        sampled.clear();
    }

    /// Adds a sequence's input from position `start` on, for `threads` threads; its block table begins at `table` of the
    /// plan's.
    pub fn push(
        &mut self,
        weights: &Weights,
        input: &[u32],
        start: u32,
        table: usize,
        sample: bool,
        threads: usize,
    ) {
        self.tokens.extend_from_slice(input);
        let rows = (start, input.len(), table);
        self.places.push(rows, weights.heads, &weights.frequencies, threads);
        if sample {
            self.sampled.push(self.tokens.len() - 1);
        }
    }
}

/// Activations between the products; grows to the largest step seen.
#[derive(Debug, Default)]
pub struct Workspace {
    tiling: Tiling,
    sampled_tiling: Tiling,
    activations: Activations,
    /// `[row][hidden]`: the residual stream.
    stream: Vec<f32>,
    /// `[row][hidden]`: what a block's half adds to it.
    delta: Vec<f32>,
    /// `[row][queries, keys, values]`.
    qkv: Vec<f32>,
    /// `[row][query head]`.
    attended: Vec<f32>,
    /// Of rows whose attention is computed span by span.
    parts: Parts,
    /// `[row][gate, up]`.
    gate_up: Vec<f32>,
    /// `[sampled row][hidden]`: the stream after the last block.
    last: Vec<f32>,
    /// `[sampled row][vocab]`.
    logits: Vec<f32>,
}

impl Workspace {
    /// Runs a step: writes the rows' keys and values to the pool, all layers of `cache`, and gives
    /// `[sampled row][vocab]`.
    pub fn run(
        &mut self,
        team: &mut Team,
        weights: &Weights,
        batch: &Batch,
        cache: Cache<'_>,
    ) -> &mut [f32] {
        let rows = batch.tokens.len();
        self.fit(weights, rows);
        self.tiling.set(rows);
        let stream = &mut self.stream[..rows * weights.hidden];
        team.each(Split::even(stream, weights.hidden), |_, row, stream| {
            weights.embedding.row(batch.tokens[row] as usize, stream);
        });
        for (layer, block) in (0..).zip(&weights.blocks) {
            let cache = Cache { layer, ..cache };
            self.attention(team, weights, block, &batch.places, cache);
            self.feed_forward(team, weights, block, weights.entry(layer as usize + 1));
        }
        self.logits(team, weights, &batch.sampled)
    }

    fn fit(&mut self, weights: &Weights, rows: usize) {
        grow(&mut self.stream, rows * weights.hidden);
        grow(&mut self.delta, rows * weights.hidden);
        grow(&mut self.qkv, rows * weights.heads.row());
        grow(&mut self.attended, rows * weights.heads.query_row());
        grow(&mut self.gate_up, rows * 2 * weights.ffn);
    }

    fn attention(
        &mut self,
        team: &mut Team,
        weights: &Weights,
        block: &Block,
        places: &Places,
        cache: Cache<'_>,
    ) {
        let first = cache.layer == 0;
        self.normalise(team, weights, &block.attention_norm, &block.qkv, !first);
        let Self { tiling, activations, delta, qkv, attended, parts, .. } = self;
        let heads = weights.heads;
        block.qkv.apply(team, tiling, activations, qkv, &block.output);
        block.switches.apply(team, heads, &mut qkv[..tiling.rows() * heads.row()]);
        let layer = attention::Layer { heads, places, cache, qkv };
        layer.attend(team, parts, attended);
        let want = (block.output.forms(), heads.query_row());
        let beside = Count(tiling.run_ends().len());
        activations.fill(team, tiling, want, beside, |(), _, row, out| {
            layer.gather(row, parts, attended, out);
        });
        block.output.apply(team, tiling, activations, delta, &block.gate_up);
    }

    fn feed_forward(&mut self, team: &mut Team, weights: &Weights, block: &Block, next: &Linear) {
        self.normalise(team, weights, &block.ffn_norm, &block.gate_up, true);
        let Self { tiling, activations, delta, gate_up, .. } = self;
        block.gate_up.apply(team, tiling, activations, gate_up, &block.down);
        let kernels = team.kernels;
        let want = (block.down.forms(), weights.ffn);
        let beside = Count(tiling.run_ends().len());
        activations.fill(team, tiling, want, beside, |(), _, row, out| {
            let (gate, up) =
                gate_up[row * 2 * weights.ffn..][..2 * weights.ffn].split_at(weights.ffn);
            (kernels.swiglu)(gate, up, out);
        });
        block.down.apply(team, tiling, activations, delta, next);
    }

    /// Adds `delta` to the stream (if `add`) and makes its norm the input of `next`.
    fn normalise(
        &mut self,
        team: &mut Team,
        weights: &Weights,
        norm: &[f32],
        next: &Linear,
        add: bool,
    ) {
        let Self { tiling, activations, stream, delta, .. } = self;
        let hidden = weights.hidden;
        let kernels = team.kernels;
        let beside = Split::at(stream, tiling.run_ends(), hidden);
        let want = (next.forms(), hidden);
        activations.fill(team, tiling, want, beside, |stream, at, row, out| {
            let stream = &mut stream[at * hidden..][..hidden];
            if add {
                add_to(stream, &delta[row * hidden..][..hidden]);
            }
            (kernels.rms_norm)(stream, norm, weights.epsilon, out);
        });
    }

    fn logits(&mut self, team: &mut Team, weights: &Weights, sampled: &[usize]) -> &mut [f32] {
        let Self { sampled_tiling: tiling, activations, stream, delta, last, logits, .. } = self;
        let hidden = weights.hidden;
        let kernels = team.kernels;
        let head = weights.head();
        tiling.set(sampled.len());
        grow(logits, sampled.len() * weights.vocab);
        let want = (head.forms(), hidden);
        grow(last, sampled.len() * hidden);
        let beside = Split::at(last, tiling.run_ends(), hidden);
        let (stream, delta) = (&*stream, &*delta);
        activations.fill(team, tiling, want, beside, |last, at, number, out| {
            let last = &mut last[at * hidden..][..hidden];
            let row = sampled[number] * hidden..(sampled[number] + 1) * hidden;
            last.copy_from_slice(&stream[row.clone()]);
            add_to(last, &delta[row]);
            (kernels.rms_norm)(last, &weights.final_norm, weights.epsilon, out);
        });
        head.apply(team, tiling, activations, logits, weights.entry(0));
        &mut logits[..sampled.len() * weights.vocab]
    }
}

fn add_to(sum: &mut [f32], addend: &[f32]) {
    for (sum, addend) in sum.iter_mut().zip(addend) {
        *sum += addend;
    }
}
