//! A path → a model's parts: which format it is, and every weight in the one form back ends take.
//!
//! All tensors are checked before the first is read. They are read one after another, so that a back end which repacks
//! them has no more than one block in memory twice. GGUF's `llama` keeps the rows of Q and K as interleaved pairs; they
//! are put into NEOX order (halves) here, so that cached keys are always in that order, whatever file a worker loaded.
//! A tensor that is not understood is an error: leaving one out would change what the model says.

use std::path::Path;
use std::sync::Arc;

use baton_shared::text::gguf::Gguf;

use super::error::ModelError;
use super::progress::Progress;
use super::quantization::BlockShape;
use super::tensors::Tensors;
use super::{Layer, Model, ModelSpec, Source, Weight, config_json, gguf, safetensors, scales};

/// What a format calls the tensors.
#[derive(Debug)]
struct Names {
    embedding: &'static str,
    final_norm: &'static str,
    head: &'static str,
    layer: &'static str,
    attn_norm: &'static str,
    q: &'static str,
    k: &'static str,
    v: &'static str,
    biases: [&'static str; 3],
    head_norms: [&'static str; 2],
    o: &'static str,
    ffn_norm: &'static str,
    gate: &'static str,
    up: &'static str,
    down: &'static str,
}

const GGUF: Names = Names {
    embedding: "token_embd.weight",
    final_norm: "output_norm.weight",
    head: "output.weight",
    layer: "blk",
    attn_norm: "attn_norm.weight",
    q: "attn_q.weight",
    k: "attn_k.weight",
    v: "attn_v.weight",
    biases: ["attn_q.bias", "attn_k.bias", "attn_v.bias"],
    head_norms: ["attn_q_norm.weight", "attn_k_norm.weight"],
    o: "attn_output.weight",
    ffn_norm: "ffn_norm.weight",
    gate: "ffn_gate.weight",
    up: "ffn_up.weight",
    down: "ffn_down.weight",
};

const HUGGING_FACE: Names = Names {
    embedding: "model.embed_tokens.weight",
    final_norm: "model.norm.weight",
    head: "lm_head.weight",
    layer: "model.layers",
    attn_norm: "input_layernorm.weight",
    q: "self_attn.q_proj.weight",
    k: "self_attn.k_proj.weight",
    v: "self_attn.v_proj.weight",
    biases: ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"],
    head_norms: ["self_attn.q_norm.weight", "self_attn.k_norm.weight"],
    o: "self_attn.o_proj.weight",
    ffn_norm: "post_attention_layernorm.weight",
    gate: "mlp.gate_proj.weight",
    up: "mlp.up_proj.weight",
    down: "mlp.down_proj.weight",
};

/// Computed from `rope_theta`; old checkpoints carry it in every layer.
const ROPE_TABLE: &str = "self_attn.rotary_emb.inv_freq";
/// What the `llama3` scaling divides frequencies by, in a GGUF file.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// A model on disk, opened and checked.
#[derive(Debug)]
pub struct ModelFiles {
    spec: ModelSpec,
    tensors: Tensors,
    names: &'static Names,
    own_head: bool,
    /// What has a scale of its own in FP8 matrices, where it is blocks.
    blocks: Option<BlockShape>,
    header: Option<Gguf>,
    progress: Progress,
}

/// Opens a `.gguf` file or a Hugging Face folder (`config.json`, `*.safetensors`), and checks all that can be checked
/// without reading weights.
///
/// # Errors
/// [`ModelError`] naming the file and the setting or tensor.
pub fn open(path: &Path) -> Result<ModelFiles, ModelError> {
    let about = std::fs::metadata(path).map_err(|e| ModelError::io(path, e))?;
    let files = if about.is_dir() {
        let config = config_json::read(path)?;
        let mut tensors = safetensors::open(path)?;
        if config.tied {
            tensors.skip(HUGGING_FACE.head);
            tensors.skip(&format!("{}_scale", HUGGING_FACE.head));
            tensors.skip(&format!("{}_scale_inv", HUGGING_FACE.head));
        }
        scales::skip_unused(&mut tensors);
        for i in 0..config.spec.layers {
            tensors.skip(&format!("{}.{i}.{ROPE_TABLE}", HUGGING_FACE.layer));
        }
        ModelFiles::new(config.spec, tensors, &HUGGING_FACE, !config.tied, config.blocks, None)?
    } else if path.extension().is_some_and(|e| e == "gguf") {
        let (mut spec, mut tensors, header) = gguf::open(path)?;
        if tensors.contains(ROPE_FACTORS) {
            let pairs = u64::from(spec.head_dim / 2);
            rope_factors(&mut spec, tensors.vector(ROPE_FACTORS, pairs)?);
            spec.check().map_err(|(_, rule)| ModelError::tensor(path, ROPE_FACTORS, rule))?;
        }
        let own_head = tensors.contains(GGUF.head);
        ModelFiles::new(spec, tensors, &GGUF, own_head, None, Some(header))?
    } else {
        let rule = "is neither a `.gguf` file nor a folder with `config.json` and `*.safetensors`";
        return Err(ModelError::file(path, rule));
    };
    let spec = &files.spec;
    if let Some(window) = spec.window.filter(|window| *window < spec.max_len) {
        let max_len = spec.max_len;
        tracing::info!(
            window,
            max_len,
            "the model looks back no further: longer texts are refused"
        );
    }
    Ok(files)
}

/// Loads a model whole into memory; see [`open()`].
///
/// # Errors
/// [`ModelError`].
pub fn load(path: &Path) -> Result<Model, ModelError> {
    let mut files = open(path)?;
    let spec = files.spec.clone();
    Ok(Model {
        content_hash: files.content_hash()?,
        embedding: files.embedding()?,
        layers: (0..spec.layers).map(|i| files.layer(i)).collect::<Result<_, _>>()?,
        final_norm: files.final_norm()?,
        head: files.head()?,
        spec,
    })
}

impl ModelFiles {
    fn new(
        spec: ModelSpec,
        mut tensors: Tensors,
        names: &'static Names,
        own_head: bool,
        blocks: Option<BlockShape>,
        header: Option<Gguf>,
    ) -> Result<Self, ModelError> {
        for (name, shape) in names.expected(&spec, own_head) {
            tensors.check(&name, &shape)?;
            scales::read(&mut tensors, &name, blocks)?;
            tensors.skip(&name);
        }
        if let Some((name, path)) = tensors.leftover() {
            let rule = format!("is not part of a plain `{}` model", spec.architecture.name());
            return Err(ModelError::tensor(path, name, rule));
        }
        let progress = Progress::new("loading", tensors.bytes(), 0);
        Ok(Self { spec, tensors, names, own_head, blocks, header, progress })
    }

    /// The header of a GGUF file.
    pub fn header(&self) -> Option<&Gguf> {
        self.header.as_ref()
    }

    /// See [`Model::content_hash`].
    ///
    /// # Errors
    /// [`ModelError::Io`].
    pub fn content_hash(&self) -> Result<[u8; 32], ModelError> {
        self.tensors.content_hash()
    }

    fn matrix(&mut self, name: &str, rows: u64, cols: u64) -> Result<Weight, ModelError> {
        let weight = self.tensors.matrix(name, rows, cols)?;
        self.progress.add(weight.bytes.len() as u64);
        Ok(Weight { scales: scales::read(&mut self.tensors, name, self.blocks)?, ..weight })
    }

    /// Rows that RoPE turns.
    fn turned(&mut self, name: &str, rows: u64, cols: u64) -> Result<Weight, ModelError> {
        let weight = self.matrix(name, rows, cols)?;
        if self.header.is_some() && self.spec.architecture.has_gguf_pairs() {
            return Ok(halves_from_pairs(&weight, self.spec.head_dim as usize));
        }
        Ok(weight)
    }
}

impl Source for ModelFiles {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn embedding(&mut self) -> Result<Weight, ModelError> {
        self.matrix(self.names.embedding, self.spec.vocab.into(), self.spec.hidden.into())
    }

    fn layer(&mut self, index: u32) -> Result<Layer, ModelError> {
        let names = self.names;
        let name = |part: &str| format!("{}.{index}.{part}", names.layer);
        let Shape { hidden, ffn, query, kv, head_dim, .. } = Shape::of(&self.spec);
        let architecture = self.spec.architecture;
        let mut vectors = |names: &[&str], lengths: &[u64]| -> Result<Vec<Vec<f32>>, ModelError> {
            let vectors = names.iter().zip(lengths);
            vectors.map(|(part, len)| self.tensors.vector(&name(part), *len)).collect()
        };
        let qkv_bias = match architecture.has_qkv_bias() {
            true => Some(vectors(&names.biases, &[query, kv, kv])?.concat()),
            false => None,
        };
        let qk_norm = match architecture.has_qk_norm() {
            true => vectors(&names.head_norms, &[head_dim; 2])?.try_into().ok(),
            false => None,
        };
        Ok(Layer {
            attn_norm: self.tensors.vector(&name(names.attn_norm), hidden)?,
            q: self.turned(&name(names.q), query, hidden)?,
            k: self.turned(&name(names.k), kv, hidden)?,
            v: self.matrix(&name(names.v), kv, hidden)?,
            qkv_bias,
            qk_norm,
            o: self.matrix(&name(names.o), hidden, query)?,
            ffn_norm: self.tensors.vector(&name(names.ffn_norm), hidden)?,
            gate: self.matrix(&name(names.gate), ffn, hidden)?,
            up: self.matrix(&name(names.up), ffn, hidden)?,
            down: self.matrix(&name(names.down), hidden, ffn)?,
        })
    }

    fn final_norm(&mut self) -> Result<Vec<f32>, ModelError> {
        self.tensors.vector(self.names.final_norm, self.spec.hidden.into())
    }

    fn head(&mut self) -> Result<Option<Weight>, ModelError> {
        if !self.own_head {
            return Ok(None);
        }
        self.matrix(self.names.head, self.spec.vocab.into(), self.spec.hidden.into()).map(Some)
    }
}

/// Extents of a model's tensors.
struct Shape {
    hidden: u64,
    ffn: u64,
    vocab: u64,
    query: u64,
    kv: u64,
    head_dim: u64,
}

impl Shape {
    fn of(spec: &ModelSpec) -> Self {
        Self {
            hidden: spec.hidden.into(),
            ffn: spec.ffn.into(),
            vocab: spec.vocab.into(),
            query: spec.query_width().into(),
            kv: spec.kv_width().into(),
            head_dim: spec.head_dim.into(),
        }
    }
}

impl Names {
    /// All tensors of a model and their shapes; one by one, as a header may claim any number of blocks.
    fn expected(
        &self,
        spec: &ModelSpec,
        own_head: bool,
    ) -> impl Iterator<Item = (String, Vec<u64>)> {
        let Shape { hidden, ffn, vocab, query, kv, head_dim } = Shape::of(spec);
        let mut whole = vec![
            (self.embedding.to_owned(), vec![vocab, hidden]),
            (self.final_norm.to_owned(), vec![hidden]),
        ];
        if own_head {
            whole.push((self.head.to_owned(), vec![vocab, hidden]));
        }
        let mut block = vec![
            (self.attn_norm, vec![hidden]),
            (self.q, vec![query, hidden]),
            (self.k, vec![kv, hidden]),
            (self.v, vec![kv, hidden]),
            (self.o, vec![hidden, query]),
            (self.ffn_norm, vec![hidden]),
            (self.gate, vec![ffn, hidden]),
            (self.up, vec![ffn, hidden]),
            (self.down, vec![hidden, ffn]),
        ];
        if spec.architecture.has_qkv_bias() {
            block.extend(self.biases.into_iter().zip([vec![query], vec![kv], vec![kv]]));
        }
        if spec.architecture.has_qk_norm() {
            block.extend(self.head_norms.map(|norm| (norm, vec![head_dim])));
        }
        let layer = self.layer;
        let blocks = (0..spec.layers).flat_map(move |i| {
            let name =
                move |(part, shape): (&str, Vec<u64>)| (format!("{layer}.{i}.{part}"), shape);
            block.clone().into_iter().map(name)
        });
        whole.into_iter().chain(blocks)
    }
}

/// Both scalings of a GGUF file apply: that of its settings and that of its tensor.
fn rope_factors(spec: &mut ModelSpec, factors: Vec<f32>) {
    let linear = spec.rope_factors.first().copied().unwrap_or(1.0);
    spec.rope_factors = factors.into_iter().map(|factor| factor * linear).collect();
}

/// Of each head, rows `0, 2, 4, …` then `1, 3, 5, …`. GGUF's weights have no [`super::Scales`].
fn halves_from_pairs(weight: &Weight, head_dim: usize) -> Weight {
    let n = weight.dtype.row_bytes(weight.cols);
    let mut bytes = Vec::with_capacity(weight.bytes.len());
    for head in weight.bytes.chunks_exact(head_dim * n) {
        for half in 0..2 {
            for pair in head.chunks_exact(2 * n) {
                bytes.extend_from_slice(&pair[half * n..(half + 1) * n]);
            }
        }
    }
    Weight { bytes: Arc::new(bytes), ..weight.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Scales, WeightType};

    #[test]
    fn pairs_become_halves_head_by_head() {
        let bytes = Arc::new((0..16).flat_map(|row| [row, 0, row + 100, 0]).collect());
        let (dtype, scales) = (WeightType::F16, Scales::One);
        let weight = Weight { dtype, rows: 16, cols: 2, bytes, scales };
        let got = halves_from_pairs(&weight, 8);
        let rows: Vec<u8> = got.bytes.chunks(4).map(|r| r[0]).collect();
        assert_eq!(rows, [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]);
        assert!(got.bytes.chunks(4).all(|r| r[2] == r[0] + 100));
    }

    #[test]
    fn a_path_that_is_no_model_is_named() {
        let e = load(Path::new("/no/such/model.gguf")).unwrap_err().to_string();
        assert!(e.starts_with("cannot read `/no/such/model.gguf`"), "{e}");
        let file = tempfile::NamedTempFile::with_suffix(".bin").unwrap();
        let e = load(file.path()).unwrap_err().to_string();
        assert!(e.contains("neither a `.gguf` file nor a folder"), "{e}");
        let folder = tempfile::tempdir().unwrap();
        let e = load(folder.path()).unwrap_err().to_string();
        assert!(e.contains("config.json"), "{e}");
    }
}
