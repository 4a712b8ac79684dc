//! Checkpoints for tests, as Hugging Face folders: seeded random Llamas and Qwens of any small shape, and a GGUF
//! model dequantised to bf16. `tiny_gguf` and `tiny_fp8` write the same tiny models as GGUF
//! files and as FP8 checkpoints.
//!
//! A tiny model says nothing sensible, but its greedy text varies and its choices are clear, so that equality of
//! texts means something. Its tokenizer knows all 256 bytes and no emoji: each takes several tokens.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize_to_file};
use serde_json::{Value, json};

use crate::tokenizer_json::{ByteLevel, CHATML, byte_char};
use crate::weights::{GgufFile, Matrix};

/// `<|im_end|>`: ends a text. A tiny model never says it unless [`TinyModel::chain`] makes it.
pub const EOS: u32 = 2;
/// `<|im_start|>`.
pub(crate) const BOS: u32 = 1;
/// How far a tiny Mistral looks back.
pub const MISTRAL_WINDOW: u32 = 256;
const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
/// How strongly a chain's next token is preferred.
const CHAIN: f32 = 4.0;

/// Element type of a written checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TinyDtype {
    /// 4 bytes.
    F32,
    /// 2 bytes, IEEE.
    F16,
    /// 2 bytes, the upper half of an f32.
    Bf16,
}

/// What a tiny model has beside a plain Llama.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TinyArchitecture {
    /// Nothing.
    #[default]
    Llama,
    /// A window of [`MISTRAL_WINDOW`] tokens.
    Mistral,
    /// Biases of queries, keys and values.
    Qwen2,
    /// Norms of the heads of queries and keys.
    Qwen3,
}

impl TinyArchitecture {
    fn class(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    /// GGUF's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama | Self::Mistral => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }
}

/// RoPE scaling of a tiny model.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum TinyRope {
    /// None.
    #[default]
    Plain,
    /// All pairs turn slower by this.
    Linear(f32),
    /// As Llama 3.1: slow pairs turn slower by 8, made for 64 tokens.
    Llama3,
}

/// Shape and seed of a random model; the same values give the same bytes.
#[derive(Clone, Debug)]
pub struct TinyModel {
    /// What it has beside a plain Llama.
    pub architecture: TinyArchitecture,
    /// How positions are told.
    pub rope: TinyRope,
    /// Transformer blocks.
    pub layers: u32,
    /// Width of the residual stream.
    pub hidden: u32,
    /// Width of the feed-forward layer.
    pub ffn: u32,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads.
    pub kv_heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// 259 (three special tokens and all bytes) and up to some 18,000 merges more.
    pub vocab: u32,
    /// Longest sequence.
    pub max_len: u32,
    /// Of the weights.
    pub seed: u64,
    /// Of all tensors.
    pub dtype: TinyDtype,
    /// `(a, b)`: after token `a`, `b` is by far the most probable one. An emoji, a stop string or an end of text
    /// can so be had wherever a test wants it.
    pub chain: Vec<(u32, u32)>,
}

impl Default for TinyModel {
    /// 3 blocks, 8 heads of 16, 4 KV heads, 512 ids, 4,096 tokens: some 0.7 M parameters.
    fn default() -> Self {
        Self {
            architecture: TinyArchitecture::Llama,
            rope: TinyRope::Plain,
            layers: 3,
            hidden: 128,
            ffn: 256,
            heads: 8,
            kv_heads: 4,
            head_dim: 16,
            vocab: 512,
            max_len: 4096,
            seed: 1,
            dtype: TinyDtype::Bf16,
            chain: Vec::new(),
        }
    }
}

impl TinyModel {
    /// The id of the token that is this one byte.
    pub fn byte_id(byte: u8) -> u32 {
        SPECIAL.len() as u32 + u32::from(byte)
    }

    /// Writes `config.json`, `model.safetensors`, `tokenizer.json` and `tokenizer_config.json`.
    ///
    /// # Errors
    /// When the vocabulary is too small or too large, or a file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder)?;
        self.tokenizer()?.write(folder, CHATML, BOS, EOS)?;
        write_config(folder, &self.config())?;
        write_tensors(folder, &self.tensors(), self.dtype)
    }

    fn config(&self) -> Value {
        let mut config = json!({
            "architectures": [self.architecture.class()], "hidden_act": "silu",
            "hidden_size": self.hidden, "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
            "vocab_size": self.vocab, "max_position_embeddings": self.max_len,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": self.rope_scaling(),
            "attention_bias": false, "mlp_bias": false, "tie_word_embeddings": false,
            "bos_token_id": BOS, "eos_token_id": EOS,
        });
        if self.architecture == TinyArchitecture::Mistral {
            config["sliding_window"] = json!(MISTRAL_WINDOW);
        }
        config
    }

    fn rope_scaling(&self) -> Value {
        match self.rope {
            TinyRope::Plain => Value::Null,
            TinyRope::Linear(factor) => json!({ "rope_type": "linear", "factor": factor }),
            TinyRope::Llama3 => json!({
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
            }),
        }
    }

    /// Merges: a space before a letter, two letters, then pairs of letters before a third.
    pub(crate) fn tokenizer(&self) -> Result<ByteLevel> {
        let mut tokens: Vec<String> = SPECIAL.map(str::to_owned).to_vec();
        tokens.extend((0..=255).map(|b| byte_char(b).to_string()));
        let room = (self.vocab as usize).checked_sub(tokens.len());
        let room = room.context("a vocabulary has three special tokens and 256 bytes at least")?;
        let letters = || ('a'..='z').map(String::from);
        let space = byte_char(b' ').to_string();
        let after_space = letters().map(|l| (space.clone(), l));
        let pairs = || letters().flat_map(|a| letters().map(move |b| (a.clone(), b)));
        let triples = pairs().flat_map(|(a, b)| letters().map(move |c| (format!("{a}{b}"), c)));
        let merges: Vec<_> = after_space.chain(pairs()).chain(triples).take(room).collect();
        ensure!(merges.len() == room, "a vocabulary of {} ids is too large", self.vocab);
        tokens.extend(merges.iter().map(|(a, b)| format!("{a}{b}")));
        Ok(ByteLevel { tokens, special: vec![0, BOS, EOS], merges, single_digits: false })
    }

    /// Names as Hugging Face's.
    pub(crate) fn tensors(&self) -> Vec<(String, Matrix)> {
        let mut random = Random(self.seed);
        // Apart, so that a model has the same matrices whatever its architecture.
        let mut switches = Random(!self.seed);
        let (hidden, ffn) = (self.hidden as usize, self.ffn as usize);
        let (query, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let (query, kv, vocab) = (query as usize, kv as usize, self.vocab as usize);
        let embedding = random.matrix(vocab, hidden, 1.0);
        let mut out = Vec::new();
        for i in 0..self.layers {
            let mut put = |name: &str, tensor: Matrix| {
                let ending = if name.ends_with("bias") { "" } else { ".weight" };
                out.push((format!("model.layers.{i}.{name}{ending}"), tensor));
            };
            // Wide enough that attention has favourites and that blocks move the stream, not so wide that the
            // input token is forgotten.
            let fan_in = |n: usize, gain: f32| gain / (n as f32).sqrt();
            put("input_layernorm", random.norm(hidden));
            put("self_attn.q_proj", random.matrix(query, hidden, fan_in(hidden, 1.5)));
            put("self_attn.k_proj", random.matrix(kv, hidden, fan_in(hidden, 1.5)));
            put("self_attn.v_proj", random.matrix(kv, hidden, fan_in(hidden, 1.0)));
            match self.architecture {
                TinyArchitecture::Llama | TinyArchitecture::Mistral => {}
                TinyArchitecture::Qwen2 => {
                    for (part, width) in [("q", query), ("k", kv), ("v", kv)] {
                        let bias = switches.matrix(1, width, 0.5);
                        put(&format!("self_attn.{part}_proj.bias"), bias);
                    }
                }
                TinyArchitecture::Qwen3 => {
                    for part in ["q", "k"] {
                        let mut norm = switches.norm(self.head_dim as usize);
                        // Normalised heads have length 1 an element; that alone has no favourites.
                        norm.values.iter_mut().for_each(|x| *x *= 1.5);
                        put(&format!("self_attn.{part}_norm"), norm);
                    }
                }
            }
            put("self_attn.o_proj", random.matrix(hidden, query, fan_in(query, 1.0)));
            put("post_attention_layernorm", random.norm(hidden));
            put("mlp.gate_proj", random.matrix(ffn, hidden, fan_in(hidden, 1.0)));
            put("mlp.up_proj", random.matrix(ffn, hidden, fan_in(hidden, 1.0)));
            put("mlp.down_proj", random.matrix(hidden, ffn, fan_in(ffn, 1.0)));
        }
        out.push(("model.norm.weight".into(), random.norm(hidden)));
        out.push(("lm_head.weight".into(), self.head(&mut random, &embedding)));
        out.push(("model.embed_tokens.weight".into(), embedding));
        out
    }

    /// Logits of some ±3; special tokens never win; a chain's next token follows the embedding of the one before.
    fn head(&self, random: &mut Random, embedding: &Matrix) -> Matrix {
        let cols = embedding.cols;
        let mut head = random.matrix(embedding.rows, cols, 3.0 / (cols as f32).sqrt());
        for x in &mut head.values[..SPECIAL.len() * cols] {
            *x *= 0.1;
        }
        for &(from, to) in &self.chain {
            let from = embedding.row(from as usize);
            let length = from.iter().map(|x| x * x).sum::<f32>().sqrt();
            let row = &mut head.values[to as usize * cols..][..cols];
            row.iter_mut().zip(from).for_each(|(h, e)| *h += CHAIN * e / length);
        }
        head
    }
}

/// Writes a GGUF model of architecture `llama` as a bf16 Hugging Face folder with the same tokenizer and chat
/// template.
///
/// # Errors
/// When the file is not such a model, its tokenizer is not byte-level BPE, or a file cannot be written.
pub fn dequantise_gguf(path: &Path, folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder)?;
    let file = GgufFile::open(path)?;
    let heads = file.number("attention.head_count")?;
    let head_dim = file.head_dim()?;
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), file.matrix("token_embd.weight")?),
        ("model.norm.weight".to_owned(), file.matrix("output_norm.weight")?),
    ];
    let tied = file.matrix("output.weight").map(|m| tensors.push(("lm_head.weight".into(), m)));
    for i in 0..file.number("block_count")? {
        for (from, to) in BLOCK {
            let mut tensor = file.matrix(&format!("blk.{i}.{from}.weight"))?;
            if matches!(from, "attn_q" | "attn_k") {
                tensor = halves(&tensor, head_dim);
            }
            tensors.push((format!("model.layers.{i}.{to}.weight"), tensor));
        }
    }
    let eos = file.header.u64("tokenizer.ggml.eos_token_id").context("no end-of-text id")? as u32;
    let bos = file.header.u64("tokenizer.ggml.bos_token_id").context("no begin-of-text id")? as u32;
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": file.number("embedding_length")?,
        "intermediate_size": file.number("feed_forward_length")?,
        "num_hidden_layers": file.number("block_count")?, "num_attention_heads": heads,
        "num_key_value_heads": file.number("attention.head_count_kv")?, "head_dim": head_dim,
        "vocab_size": tensors[0].1.rows, "max_position_embeddings": file.number("context_length")?,
        "rms_norm_eps": file.float("attention.layer_norm_rms_epsilon")?,
        "rope_theta": file.float("rope.freq_base")?, "rope_scaling": null,
        "attention_bias": false, "mlp_bias": false, "tie_word_embeddings": tied.is_err(),
        "bos_token_id": bos, "eos_token_id": eos, "torch_dtype": "bfloat16",
    });
    write_config(folder, &config)?;
    let template = file.header.string("tokenizer.chat_template").unwrap_or(CHATML);
    gguf_tokenizer(&file)?.write(folder, template, bos, eos)?;
    write_tensors(folder, &tensors, TinyDtype::Bf16)
}

/// What GGUF and Hugging Face call the tensors of a block.
pub(crate) const BLOCK: [(&str, &str); 9] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

fn gguf_tokenizer(file: &GgufFile) -> Result<ByteLevel> {
    let header = &file.header;
    let kind = header.string("tokenizer.ggml.model");
    ensure!(kind == Some("gpt2"), "tokenizer {kind:?} is not byte-level BPE");
    let single_digits = match header.string("tokenizer.ggml.pre") {
        Some("smollm") => true,
        Some("gpt-2") => false,
        other => anyhow::bail!("pre-tokenizer {other:?} is not known here"),
    };
    let tokens = header.strings("tokenizer.ggml.tokens").context("no tokens")?.to_vec();
    // Type 3 is a control token.
    let kinds = header.ints("tokenizer.ggml.token_type").context("no token types")?;
    let special = (0..).zip(kinds).filter(|(_, kind)| **kind == 3).map(|(id, _)| id).collect();
    let pair = |m: &String| {
        let (a, b) = m.split_once(' ').with_context(|| format!("merge `{m}` is no pair"))?;
        Ok((a.to_owned(), b.to_owned()))
    };
    let merges = header.strings("tokenizer.ggml.merges").context("no merges")?;
    let merges = merges.iter().map(pair).collect::<Result<_>>()?;
    Ok(ByteLevel { tokens, special, merges, single_digits })
}

/// Rows of each head: the even ones, then the odd ones.
fn halves(matrix: &Matrix, head_dim: usize) -> Matrix {
    let source = |row: usize| {
        let (head, at) = (row / head_dim * head_dim, row % head_dim);
        let half = head_dim / 2;
        head + if at < half { 2 * at } else { 2 * (at - half) + 1 }
    };
    let values = (0..matrix.rows).flat_map(|row| matrix.row(source(row))).copied().collect();
    Matrix { values, ..*matrix }
}

fn write_config(folder: &Path, config: &Value) -> Result<()> {
    Ok(std::fs::write(folder.join("config.json"), serde_json::to_vec_pretty(config)?)?)
}

/// Whether a tensor has one dimension.
pub(crate) fn is_vector(name: &str) -> bool {
    name.ends_with("norm.weight") || name.ends_with(".bias")
}

fn write_tensors(folder: &Path, tensors: &[(String, Matrix)], dtype: TinyDtype) -> Result<()> {
    let encode = |m: &Matrix| -> Vec<u8> {
        match dtype {
            TinyDtype::F32 => m.values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            TinyDtype::F16 => {
                m.values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect()
            }
            TinyDtype::Bf16 => {
                m.values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect()
            }
        }
    };
    let kind = match dtype {
        TinyDtype::F32 => Dtype::F32,
        TinyDtype::F16 => Dtype::F16,
        TinyDtype::Bf16 => Dtype::BF16,
    };
    let encoded: Vec<Vec<u8>> = tensors.iter().map(|(_, m)| encode(m)).collect();
    let views = tensors.iter().zip(&encoded).map(|((name, m), bytes)| {
        let shape = if is_vector(name) { vec![m.cols] } else { vec![m.rows, m.cols] };
        TensorView::new(kind, shape, bytes).map(|view| (name.clone(), view))
    });
    let views = views.collect::<Result<Vec<_>, _>>()?;
    serialize_to_file(views, None, &folder.join("model.safetensors"))?;
    Ok(())
}

/// SplitMix64: the same numbers on every machine and in every version of every crate.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Nearly normal, mean 0, deviation 1: four uniform numbers, added.
    fn normal(&mut self) -> f32 {
        let bits = self.next();
        let sum: u64 = (0..4).map(|i| (bits >> (16 * i)) & 0xffff).sum();
        // A uniform number of 0..65536 has deviation 65536 / √12; four together twice that.
        (sum as f32 - 2.0 * 65_535.0) / (65_536.0 / 3.0f32.sqrt())
    }

    fn matrix(&mut self, rows: usize, cols: usize, deviation: f32) -> Matrix {
        let values = (0..rows * cols).map(|_| self.normal() * deviation).collect();
        Matrix { rows, cols, values }
    }

    fn norm(&mut self, cols: usize) -> Matrix {
        let values = (0..cols).map(|_| 1.0 + 0.1 * self.normal()).collect();
        Matrix { rows: 1, cols, values }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::{KvRounding, Oracle};

    fn oracle(model: &TinyModel) -> Oracle {
        let folder = tempfile::tempdir().unwrap();
        model.write(folder.path()).unwrap();
        Oracle::from_hf(folder.path()).unwrap()
    }

    #[test]
    fn greedy_text_varies_and_its_choices_are_clear() {
        for seed in 1..=3 {
            let oracle = oracle(&TinyModel { seed, ..TinyModel::default() });
            for prompt in [&[70, 90, 300][..], &[5], &[100; 40]] {
                let steps = oracle.greedy(prompt, 64, KvRounding::Bf16);
                let mut ids: Vec<u32> = steps.iter().map(|s| s.id).collect();
                let mut gaps: Vec<f32> = steps.iter().map(|s| s.gap).collect();
                gaps.sort_by(f32::total_cmp);
                ids.sort_unstable();
                ids.dedup();
                println!(
                    "{seed}: {} distinct, gaps {:?}",
                    ids.len(),
                    (gaps[3], gaps[32], gaps[60])
                );
                assert!(ids.len() >= 24, "{ids:?}");
                assert!((0.2..3.0).contains(&gaps[32]), "{gaps:?}");
                assert!(ids[0] > EOS, "{ids:?}");
            }
        }
    }

    #[test]
    fn a_chain_says_what_it_was_made_to_say() {
        let text = "!😀".bytes().map(TinyModel::byte_id);
        let ids: Vec<u32> = text.chain([EOS]).collect();
        let chain = ids.windows(2).map(|w| (w[0], w[1])).collect();
        let oracle = oracle(&TinyModel { chain, ..TinyModel::default() });
        let steps = oracle.greedy(&[70, 90, ids[0]], ids.len() - 1, KvRounding::F32);
        assert_eq!(steps.iter().map(|s| s.id).collect::<Vec<_>>(), ids[1..]);
    }

    #[test]
    fn the_same_seed_writes_the_same_bytes_and_another_does_not() {
        let bytes = |seed| {
            let folder = tempfile::tempdir().unwrap();
            TinyModel { seed, ..TinyModel::default() }.write(folder.path()).unwrap();
            std::fs::read(folder.path().join("model.safetensors")).unwrap()
        };
        assert_eq!(bytes(7), bytes(7));
        assert_ne!(bytes(7), bytes(8));
    }
}
