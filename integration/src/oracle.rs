//! An independent f32 forward pass of a Llama, Qwen2 or Qwen3: what the worker's log-probabilities are measured against.
//!
//! Straightforward on purpose: dequantised f32 weights, plain loops, no paging, no batching. It shares nothing
//! with the worker but the GGUF header reader, and keeps GGUF's own order of Q and K rows (rotating neighbouring
//! pairs), so that the worker's re-ordering is checked too.

mod frequencies;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result};
use half::bf16;

use crate::weights::{GgufFile, Matrix, read_folder};

/// What is done to K (after RoPE) and V before attention reads them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvRounding {
    /// Nothing.
    F32,
    /// Rounded to bf16, as in the worker's pool.
    Bf16,
}

/// Which two elements of a head RoPE turns together.
#[derive(Clone, Copy, Debug)]
enum Pairing {
    /// `2i` and `2i + 1`.
    Neighbours,
    /// `i` and `i + head_dim / 2`.
    Halves,
}

#[derive(Debug)]
struct Block {
    attn_norm: Matrix,
    q: Matrix,
    k: Matrix,
    v: Matrix,
    /// Of queries, keys and values.
    biases: Option<[Matrix; 3]>,
    /// Of a query's head and of a key's.
    head_norms: Option<[Matrix; 2]>,
    o: Matrix,
    ffn_norm: Matrix,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
}

/// A model's weights as f32.
#[derive(Debug)]
pub struct Oracle {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Angle of each pair at position 1.
    frequencies: Vec<f64>,
    eps: f32,
    pairing: Pairing,
    embedding: Matrix,
    blocks: Vec<Block>,
    norm: Matrix,
    head: Option<Matrix>,
}

/// One text being read: the K and V of every position so far.
#[derive(Debug)]
pub struct Reading<'a> {
    oracle: &'a Oracle,
    rounding: KvRounding,
    /// Tokens read.
    len: usize,
    cache: Cache,
    /// Another engine's cache of the same text, read instead of ours.
    given: Option<&'a Cache>,
    /// How far the given keys and values are from ours at most, in parts of the largest element of a vector.
    distance: f32,
}

/// Keys (after RoPE) and values of a text: of each block, `[position][kv_head * head_dim]`.
#[derive(Clone, Debug, Default)]
pub struct Cache {
    /// One a block.
    pub keys: Vec<Vec<f32>>,
    /// One a block.
    pub values: Vec<Vec<f32>>,
}

/// One greedy step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// The most probable id.
    pub id: u32,
    /// Its natural-log probability.
    pub logprob: f32,
    /// How far the runner-up's log-probability is below.
    pub gap: f32,
}

impl Oracle {
    /// A `.gguf` file of architecture `llama`, `qwen2` or `qwen3`.
    ///
    /// # Errors
    /// When a tensor or setting is missing or of a type not known here.
    pub fn from_gguf(path: &Path) -> Result<Self> {
        let file = GgufFile::open(path)?;
        let block = |i: usize| -> Result<Block> {
            let get = |name: &str| file.matrix(&format!("blk.{i}.{name}.weight"));
            Ok(Block {
                attn_norm: get("attn_norm")?,
                q: get("attn_q")?,
                k: get("attn_k")?,
                v: get("attn_v")?,
                biases: all(["q", "k", "v"]
                    .map(|part| file.matrix(&format!("blk.{i}.attn_{part}.bias")).ok())),
                head_norms: all(["q", "k"].map(|part| get(&format!("attn_{part}_norm")).ok())),
                o: get("attn_output")?,
                ffn_norm: get("ffn_norm")?,
                gate: get("ffn_gate")?,
                up: get("ffn_up")?,
                down: get("ffn_down")?,
            })
        };
        let heads = file.number("attention.head_count")?;
        Ok(Self {
            heads,
            kv_heads: file.number("attention.head_count_kv")?,
            head_dim: file.head_dim()?,
            frequencies: frequencies::of_gguf(&file)?,
            eps: file.float("attention.layer_norm_rms_epsilon")?,
            pairing: match file.architecture() {
                "llama" => Pairing::Neighbours,
                _ => Pairing::Halves,
            },
            embedding: file.matrix("token_embd.weight")?,
            blocks: (0..file.number("block_count")?).map(block).collect::<Result<_>>()?,
            norm: file.matrix("output_norm.weight")?,
            head: file.matrix("output.weight").ok(),
        })
    }

    /// The same with the matrices of its blocks rounded to bf16, as the CPU engine keeps those of an FP8 checkpoint.
    #[must_use]
    pub fn in_bf16(mut self) -> Self {
        for Block { q, k, v, o, gate, up, down, .. } in &mut self.blocks {
            for matrix in [q, k, v, o, gate, up, down] {
                matrix.values.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
            }
        }
        self
    }

    /// A Hugging Face folder.
    ///
    /// # Errors
    /// When a tensor or setting is missing or of a type not known here.
    pub fn from_hf(folder: &Path) -> Result<Self> {
        let config = std::fs::read(folder.join("config.json"))?;
        let config: serde_json::Value = serde_json::from_slice(&config)?;
        let float = |key: &str| config[key].as_f64().with_context(|| format!("no `{key}`"));
        let number = |key: &str| float(key).map(|n| n as usize);
        let mut tensors = read_folder(folder)?;
        let blocks = (0..number("num_hidden_layers")?).map(|i| -> Result<Block> {
            let mut attention =
                |name: &str| tensors.remove(&format!("model.layers.{i}.self_attn.{name}"));
            let biases = all(["q_proj.bias", "k_proj.bias", "v_proj.bias"].map(&mut attention));
            let head_norms = all(["q_norm.weight", "k_norm.weight"].map(&mut attention));
            let mut get =
                |name: &str| take(&mut tensors, &format!("model.layers.{i}.{name}.weight"));
            Ok(Block {
                attn_norm: get("input_layernorm")?,
                q: get("self_attn.q_proj")?,
                k: get("self_attn.k_proj")?,
                v: get("self_attn.v_proj")?,
                biases,
                head_norms,
                o: get("self_attn.o_proj")?,
                ffn_norm: get("post_attention_layernorm")?,
                gate: get("mlp.gate_proj")?,
                up: get("mlp.up_proj")?,
                down: get("mlp.down_proj")?,
            })
        });
        let blocks = blocks.collect::<Result<_>>()?;
        let mut take = |name: &str| take(&mut tensors, name);
        let tied = config["tie_word_embeddings"] == true;
        Ok(Self {
            heads: number("num_attention_heads")?,
            kv_heads: number("num_key_value_heads")?,
            head_dim: number("head_dim")?,
            frequencies: frequencies::of_hf(&config, number("head_dim")?)?,
            eps: float("rms_norm_eps")? as f32,
            pairing: Pairing::Halves,
            embedding: take("model.embed_tokens.weight")?,
            blocks,
            norm: take("model.norm.weight")?,
            head: if tied { None } else { Some(take("lm_head.weight")?) },
        })
    }

    /// Starts a text.
    pub fn read(&self, rounding: KvRounding) -> Reading<'_> {
        let none = vec![Vec::new(); self.blocks.len()];
        let cache = Cache { keys: none.clone(), values: none };
        Reading { oracle: self, rounding, len: 0, cache, given: None, distance: 0.0 }
    }

    /// Natural-log probabilities, `[vocab]`, of what follows `ids`.
    pub fn logprobs(&self, ids: &[u32], rounding: KvRounding) -> Vec<f32> {
        self.read(rounding).feed(ids)
    }

    /// As [`Oracle::logprobs`], with another engine's cache of `ids` read instead of ours; and how far its keys
    /// and values are from those computed here at most, in parts of the largest element of a vector.
    ///
    /// With each side's own rounded cache two correct passes drift apart; this way they cannot.
    pub fn logprobs_over(&self, ids: &[u32], cache: &Cache) -> (Vec<f32>, f32) {
        let mut reading = Reading { given: Some(cache), ..self.read(KvRounding::F32) };
        let logprobs = reading.feed(ids);
        (logprobs, reading.distance)
    }

    /// The most probable continuation, token by token; it does not stop at an end of text.
    pub fn greedy(&self, ids: &[u32], steps: usize, rounding: KvRounding) -> Vec<Step> {
        let mut reading = self.read(rounding);
        let mut logprobs = reading.feed(ids);
        let mut out = Vec::with_capacity(steps);
        while out.len() < steps {
            let step = best(&logprobs);
            out.push(step);
            if out.len() < steps {
                logprobs = reading.feed(&[step.id]);
            }
        }
        out
    }

    fn rotate(&self, head: &mut [f32], position: usize) {
        let half = self.head_dim / 2;
        for i in 0..half {
            let (sin, cos) = (position as f64 * self.frequencies[i]).sin_cos();
            let (sin, cos) = (sin as f32, cos as f32);
            let (a, b) = match self.pairing {
                Pairing::Neighbours => (2 * i, 2 * i + 1),
                Pairing::Halves => (i, i + half),
            };
            let (x, y) = (head[a], head[b]);
            head[a] = x * cos - y * sin;
            head[b] = x * sin + y * cos;
        }
    }
}

impl Reading<'_> {
    /// Reads on, and gives the natural-log probabilities, `[vocab]`, of what follows.
    ///
    /// # Panics
    /// When `ids` is empty or has an id that is not in the vocabulary.
    pub fn feed(&mut self, ids: &[u32]) -> Vec<f32> {
        let o = self.oracle;
        let mut x: Vec<f32> =
            ids.iter().flat_map(|id| o.embedding.row(*id as usize)).copied().collect();
        for (i, block) in o.blocks.iter().enumerate() {
            let normed = norm(&x, &block.attn_norm, o.eps);
            let mixed = self.attend(i, block, &normed);
            add(&mut x, &multiply(&block.o, &mixed));
            let normed = norm(&x, &block.ffn_norm, o.eps);
            let mut gated = multiply(&block.gate, &normed);
            let up = multiply(&block.up, &normed);
            for (g, u) in gated.iter_mut().zip(up) {
                *g = *g / (1.0 + (-*g).exp()) * u;
            }
            add(&mut x, &multiply(&block.down, &gated));
        }
        self.len += ids.len();
        let last = &x[x.len() - o.embedding.cols..];
        let logits = multiply(o.head.as_ref().unwrap_or(&o.embedding), &norm(last, &o.norm, o.eps));
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|l| f64::from(l - most).exp()).sum();
        logits.iter().map(|l| l - most - sum.ln() as f32).collect()
    }

    /// Attention of all new tokens; adds their keys and values to the cache of block `i`.
    fn attend(&mut self, i: usize, block: &Block, x: &[f32]) -> Vec<f32> {
        let o = self.oracle;
        let (width, kv_width) = (o.heads * o.head_dim, o.kv_heads * o.head_dim);
        let mut q = multiply(&block.q, x);
        let mut k = multiply(&block.k, x);
        let mut v = multiply(&block.v, x);
        for (rows, bias) in [&mut q, &mut k, &mut v].into_iter().zip(block.biases.iter().flatten())
        {
            rows.chunks_exact_mut(bias.values.len()).for_each(|row| add(row, &bias.values));
        }
        for (rows, weight) in [&mut q, &mut k].into_iter().zip(block.head_norms.iter().flatten()) {
            *rows = norm(rows, weight, o.eps);
        }
        for (rows, row) in [(&mut q, width), (&mut k, kv_width)] {
            for (t, token) in rows.chunks_exact_mut(row).enumerate() {
                for head in token.chunks_exact_mut(o.head_dim) {
                    o.rotate(head, self.len + t);
                }
            }
        }
        match self.rounding {
            KvRounding::F32 => {}
            KvRounding::Bf16 => {
                for x in k.iter_mut().chain(&mut v) {
                    *x = bf16::from_f32(*x).to_f32();
                }
            }
        }
        if let Some(given) = self.given {
            self.distance = self.distance.max(distance(&k, &given.keys[i], o.head_dim));
            self.distance = self.distance.max(distance(&v, &given.values[i], o.head_dim));
        }
        self.cache.keys[i].extend(k);
        self.cache.values[i].extend(v);
        let cache = self.given.unwrap_or(&self.cache);
        let (keys, values, seen) = (&cache.keys[i], &cache.values[i], self.len);
        in_parallel(q.len() / width, |tokens| {
            let mut out = Vec::with_capacity(tokens.len() * width);
            for t in tokens {
                for h in 0..o.heads {
                    let q = &q[t * width + h * o.head_dim..][..o.head_dim];
                    let at = h / (o.heads / o.kv_heads) * o.head_dim;
                    out.extend(attend_head(q, keys, values, at, kv_width, seen + t + 1));
                }
            }
            out
        })
    }
}

/// One query against the first `n` positions of the head that begins at `at` of each row.
fn attend_head(
    q: &[f32],
    keys: &[f32],
    values: &[f32],
    at: usize,
    row: usize,
    n: usize,
) -> Vec<f32> {
    let scale = 1.0 / (q.len() as f32).sqrt();
    let mut scores: Vec<f32> =
        (0..n).map(|p| dot(q, &keys[p * row + at..][..q.len()]) * scale).collect();
    let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    scores.iter_mut().for_each(|s| *s = (*s - most).exp());
    let sum: f32 = scores.iter().sum();
    let mut out = vec![0.0; q.len()];
    for (p, score) in scores.iter().enumerate() {
        let weight = score / sum;
        for (o, v) in out.iter_mut().zip(&values[p * row + at..][..q.len()]) {
            *o += weight * v;
        }
    }
    out
}

/// The largest difference of two elements, in parts of the largest element of their vector.
fn distance(ours: &[f32], theirs: &[f32], head_dim: usize) -> f32 {
    assert_eq!(ours.len(), theirs.len(), "caches of different lengths");
    let vectors = ours.chunks_exact(head_dim).zip(theirs.chunks_exact(head_dim));
    let distance = vectors.map(|(ours, theirs)| {
        let largest = ours.iter().fold(f32::MIN_POSITIVE, |m, x| m.max(x.abs()));
        let apart = ours.iter().zip(theirs).map(|(x, y)| (x - y).abs());
        apart.fold(0.0, f32::max) / largest
    });
    distance.fold(0.0, f32::max)
}

/// All or none of them.
fn all<const N: usize>(parts: [Option<Matrix>; N]) -> Option<[Matrix; N]> {
    parts.into_iter().collect::<Option<Vec<_>>>()?.try_into().ok()
}

fn take(tensors: &mut BTreeMap<String, Matrix>, name: &str) -> Result<Matrix> {
    tensors.remove(name).with_context(|| format!("no tensor `{name}`"))
}

/// The most probable id and how sure it is.
fn best(logprobs: &[f32]) -> Step {
    let mut step = Step { id: 0, logprob: f32::NEG_INFINITY, gap: f32::INFINITY };
    for (id, &logprob) in logprobs.iter().enumerate() {
        if logprob > step.logprob {
            step = Step { id: id as u32, logprob, gap: logprob - step.logprob };
        } else {
            step.gap = step.gap.min(step.logprob - logprob);
        }
    }
    step
}

/// RMSNorm of each row of `weight.cols`.
fn norm(x: &[f32], weight: &Matrix, eps: f32) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for row in x.chunks_exact(weight.cols) {
        let mean = dot(row, row) / row.len() as f32;
        let scale = 1.0 / (mean + eps).sqrt();
        out.extend(row.iter().zip(&weight.values).map(|(x, w)| x * scale * w));
    }
    out
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

/// `[token][cols]` → `[token][rows]`.
fn multiply(weight: &Matrix, x: &[f32]) -> Vec<f32> {
    let tokens: Vec<&[f32]> = x.chunks_exact(weight.cols).collect();
    let (fours, rest) = tokens.as_chunks::<4>();
    let by_row = in_parallel(weight.rows, |rows| {
        let mut out = Vec::with_capacity(rows.len() * tokens.len());
        for r in rows {
            let row = weight.row(r);
            out.extend(fours.iter().flat_map(|four| dot4(row, four)));
            out.extend(rest.iter().map(|x| dot(row, x)));
        }
        out
    });
    let mut out = vec![0.0; by_row.len()];
    for (r, row) in by_row.chunks_exact(tokens.len()).enumerate() {
        for (t, value) in row.iter().enumerate() {
            out[t * weight.rows + r] = *value;
        }
    }
    out
}

/// [`dot`] of `a` with four vectors, so that `a` is loaded once for all.
fn dot4(a: &[f32], b: &[&[f32]; 4]) -> [f32; 4] {
    let n = a.len() / 8 * 8;
    let [b0, b1, b2, b3] = b.map(|b| b[..n].as_chunks::<8>().0);
    let [mut s0, mut s1, mut s2, mut s3] = [[0.0f32; 8]; 4];
    let parts = a[..n].as_chunks::<8>().0.iter().zip(b0.iter().zip(b1)).zip(b2.iter().zip(b3));
    for ((a, (b0, b1)), (b2, b3)) in parts {
        for i in 0..8 {
            s0[i] += a[i] * b0[i];
            s1[i] += a[i] * b1[i];
            s2[i] += a[i] * b2[i];
            s3[i] += a[i] * b3[i];
        }
    }
    let rest = b.map(|b| dot(&a[n..], &b[n..]));
    let sums = [s0, s1, s2, s3].map(|s| s.iter().sum::<f32>());
    std::array::from_fn(|t| sums[t] + rest[t])
}

/// 16 sums side by side, so that the compiler can use vectors.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a, a_rest) = a.as_chunks::<16>();
    let (b, b_rest) = b.as_chunks::<16>();
    let mut sums = [0.0f32; 16];
    for (a, b) in a.iter().zip(b) {
        for i in 0..16 {
            sums[i] += a[i] * b[i];
        }
    }
    sums.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}

/// `work` over pieces of `0..n` on all cores; the results in order, one after another.
fn in_parallel(n: usize, work: impl Fn(Range<usize>) -> Vec<f32> + Sync) -> Vec<f32> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from).min(n);
    if cores < 2 {
        return work(0..n);
    }
    let work = &work;
    std::thread::scope(|scope| {
        let start = |c: usize| scope.spawn(move || work(c * n / cores..(c + 1) * n / cores));
        let threads: Vec<_> = (1..cores).map(start).collect();
        let mut out = work(0..n / cores);
        for thread in threads {
            out.extend(thread.join().expect("the forward pass does not panic"));
        }
        out
    })
}
