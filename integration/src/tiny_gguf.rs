//! Tiny models as GGUF files, in F32: the same weights as their Hugging Face folders, with GGUF's names, settings and
//! order of rows.

use std::path::Path;

use anyhow::Result;

use crate::tiny_model::{BLOCK, BOS, EOS, TinyArchitecture, TinyModel, TinyRope, is_vector};
use crate::tokenizer_json::CHATML;
use crate::weights::Matrix;

const ALIGNMENT: usize = 32;
/// GGUF's value types.
const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

impl TinyModel {
    /// Writes the model as a GGUF file.
    ///
    /// # Errors
    /// As [`TinyModel::write`].
    pub fn write_gguf(&self, path: &Path) -> Result<()> {
        let mut file = Writer::default();
        self.put_settings(&mut file)?;
        for (name, tensor) in self.tensors() {
            let is_turned = name.ends_with("q_proj.weight") || name.ends_with("k_proj.weight");
            let tensor = match self.architecture {
                TinyArchitecture::Llama | TinyArchitecture::Mistral if is_turned => {
                    pairs(&tensor, self.head_dim as usize)
                }
                _ => tensor,
            };
            file.tensor(&gguf_name(&name), &tensor, is_vector(&name));
        }
        if self.rope == TinyRope::Llama3 {
            let values = llama3_factors(self.head_dim as usize);
            let factors = Matrix { rows: 1, cols: values.len(), values };
            file.tensor("rope_freqs.weight", &factors, true);
        }
        std::fs::write(path, file.finish())?;
        Ok(())
    }

    fn put_settings(&self, file: &mut Writer) -> Result<()> {
        let name = self.architecture.name();
        file.string("general.architecture", name);
        for (key, value) in [
            ("block_count", self.layers),
            ("embedding_length", self.hidden),
            ("feed_forward_length", self.ffn),
            ("attention.head_count", self.heads),
            ("attention.head_count_kv", self.kv_heads),
            ("attention.key_length", self.head_dim),
            ("attention.value_length", self.head_dim),
            ("context_length", self.max_len),
        ] {
            file.number(&format!("{name}.{key}"), value);
        }
        file.float(&format!("{name}.attention.layer_norm_rms_epsilon"), 1e-5);
        file.float(&format!("{name}.rope.freq_base"), 10_000.0);
        if let TinyRope::Linear(factor) = self.rope {
            file.string(&format!("{name}.rope.scaling.type"), "linear");
            file.float(&format!("{name}.rope.scaling.factor"), factor);
        }
        let tokenizer = self.tokenizer()?;
        file.string("tokenizer.ggml.model", "gpt2");
        file.string("tokenizer.ggml.pre", "gpt-2");
        file.strings("tokenizer.ggml.tokens", &tokenizer.tokens);
        let kind = |id| if tokenizer.special.contains(&id) { 3 } else { 1 };
        let kinds: Vec<i32> = (0..).take(tokenizer.tokens.len()).map(kind).collect();
        file.ints("tokenizer.ggml.token_type", &kinds);
        let merges: Vec<String> =
            tokenizer.merges.iter().map(|(a, b)| format!("{a} {b}")).collect();
        file.strings("tokenizer.ggml.merges", &merges);
        file.number("tokenizer.ggml.bos_token_id", BOS);
        file.number("tokenizer.ggml.eos_token_id", EOS);
        file.string("tokenizer.chat_template", CHATML);
        Ok(())
    }
}

/// `blk.0.attn_q.weight` of `model.layers.0.self_attn.q_proj.weight`.
fn gguf_name(name: &str) -> String {
    match name {
        "model.embed_tokens.weight" => return "token_embd.weight".into(),
        "model.norm.weight" => return "output_norm.weight".into(),
        "lm_head.weight" => return "output.weight".into(),
        _ => {}
    }
    let norms = [("attn_q_norm", "self_attn.q_norm"), ("attn_k_norm", "self_attn.k_norm")];
    let name = name.replace("model.layers.", "blk.");
    let parts = BLOCK.iter().chain(&norms);
    parts.fold(name, |name, (ours, theirs)| {
        name.replace(&format!(".{theirs}."), &format!(".{ours}."))
    })
}

/// Rows of each head: the first half's and the second half's by turns.
fn pairs(matrix: &Matrix, head_dim: usize) -> Matrix {
    let source = |row: usize| {
        let (head, at) = (row / head_dim * head_dim, row % head_dim);
        head + at / 2 + at % 2 * (head_dim / 2)
    };
    let values = (0..matrix.rows).flat_map(|row| matrix.row(source(row))).copied().collect();
    Matrix { values, ..*matrix }
}

/// In f32, as the converters of such files compute them.
fn llama3_factors(head_dim: usize) -> Vec<f32> {
    let factor = |pair: usize| -> f32 {
        let frequency = 10_000.0_f32.powf(-2.0 * pair as f32 / head_dim as f32);
        let wavelength = std::f32::consts::TAU / frequency;
        if wavelength < 64.0 / 4.0 {
            1.0
        } else if wavelength > 64.0 {
            8.0
        } else {
            let smooth = (64.0 / wavelength - 1.0) / (4.0 - 1.0);
            1.0 / ((1.0 - smooth) / 8.0 + smooth)
        }
    };
    (0..head_dim / 2).map(factor).collect()
}

#[derive(Default)]
struct Writer {
    entries: u64,
    metadata: Vec<u8>,
    tensors: u64,
    table: Vec<u8>,
    data: Vec<u8>,
}

impl Writer {
    fn key(&mut self, key: &str, kind: u32) {
        self.entries += 1;
        put_string(&mut self.metadata, key);
        self.metadata.extend(kind.to_le_bytes());
    }

    fn number(&mut self, key: &str, value: u32) {
        self.key(key, U32);
        self.metadata.extend(value.to_le_bytes());
    }

    fn float(&mut self, key: &str, value: f32) {
        self.key(key, F32);
        self.metadata.extend(value.to_le_bytes());
    }

    fn string(&mut self, key: &str, value: &str) {
        self.key(key, STRING);
        put_string(&mut self.metadata, value);
    }

    fn array(&mut self, key: &str, kind: u32, len: usize) {
        self.key(key, ARRAY);
        self.metadata.extend(kind.to_le_bytes());
        self.metadata.extend((len as u64).to_le_bytes());
    }

    fn strings(&mut self, key: &str, values: &[String]) {
        self.array(key, STRING, values.len());
        values.iter().for_each(|value| put_string(&mut self.metadata, value));
    }

    fn ints(&mut self, key: &str, values: &[i32]) {
        self.array(key, I32, values.len());
        values.iter().for_each(|value| self.metadata.extend(value.to_le_bytes()));
    }

    fn tensor(&mut self, name: &str, tensor: &Matrix, is_vector: bool) {
        self.tensors += 1;
        put_string(&mut self.table, name);
        let dims = if is_vector { vec![tensor.cols] } else { vec![tensor.cols, tensor.rows] };
        self.table.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|extent| self.table.extend((*extent as u64).to_le_bytes()));
        // ggml's F32.
        self.table.extend(0_u32.to_le_bytes());
        self.table.extend((self.data.len() as u64).to_le_bytes());
        self.data.extend(tensor.values.iter().flat_map(|x| x.to_le_bytes()));
        self.data.resize(self.data.len().next_multiple_of(ALIGNMENT), 0);
    }

    fn finish(self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3_u32.to_le_bytes());
        out.extend(self.tensors.to_le_bytes());
        out.extend(self.entries.to_le_bytes());
        out.extend(self.metadata);
        out.extend(self.table);
        out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
        out.extend(self.data);
        out
    }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}
