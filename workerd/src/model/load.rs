//! A path → a [`Model`]: which format it is, and every weight in the one form back ends take.
//!
//! GGUF's `llama` keeps the rows of Q and K as interleaved pairs; they are put into NEOX order (halves) here, so
//! that cached keys are always in that order, whatever file a worker loaded. A tensor that is not understood is
//! an error: leaving one out would change what the model says.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::error::ModelError;
use super::tensors::Tensors;
use super::{Layer, Model, ModelSpec, Weight, config_json, gguf, safetensors};

/// What a format calls the tensors.
struct Names {
    embedding: &'static str,
    final_norm: &'static str,
    head: &'static str,
    layer: &'static str,
    attn_norm: &'static str,
    q: &'static str,
    k: &'static str,
    v: &'static str,
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
    o: "self_attn.o_proj.weight",
    ffn_norm: "post_attention_layernorm.weight",
    gate: "mlp.gate_proj.weight",
    up: "mlp.up_proj.weight",
    down: "mlp.down_proj.weight",
};

/// Computed from `rope_theta`; old checkpoints carry it in every layer.
const ROPE_TABLE: &str = "self_attn.rotary_emb.inv_freq";

/// Loads a `.gguf` file or a Hugging Face folder (`config.json`, `*.safetensors`) whole into memory.
///
/// # Errors
/// [`ModelError`] naming the file and the setting or tensor.
pub fn load(path: &Path) -> Result<Model, ModelError> {
    let started = Instant::now();
    let about = std::fs::metadata(path).map_err(|e| ModelError::io(path, e))?;
    let model = if about.is_dir() {
        let config = config_json::read(path)?;
        let mut tensors = safetensors::open(path)?;
        if config.tied {
            tensors.skip(HUGGING_FACE.head);
        }
        for i in 0..config.spec.layers {
            tensors.skip(&format!("{}.{i}.{ROPE_TABLE}", HUGGING_FACE.layer));
        }
        build(config.spec, tensors, &HUGGING_FACE, !config.tied)?
    } else if path.extension().is_some_and(|e| e == "gguf") {
        let (spec, tensors) = gguf::open(path)?;
        let own_head = tensors.contains(GGUF.head);
        let mut model = build(spec, tensors, &GGUF, own_head)?;
        for layer in &mut model.layers {
            layer.q = halves_from_pairs(&layer.q, model.spec.head_dim as usize);
            layer.k = halves_from_pairs(&layer.k, model.spec.head_dim as usize);
        }
        model
    } else {
        let rule = "is neither a `.gguf` file nor a folder with `config.json` and `*.safetensors`";
        return Err(ModelError::file(path, rule));
    };
    let seconds = started.elapsed().as_secs_f32();
    tracing::info!(path = %path.display(), layers = model.spec.layers, seconds, "model loaded");
    Ok(model)
}

fn build(
    spec: ModelSpec,
    mut tensors: Tensors,
    names: &Names,
    own_head: bool,
) -> Result<Model, ModelError> {
    let content_hash = tensors.content_hash()?;
    let (hidden, vocab) = (u64::from(spec.hidden), u64::from(spec.vocab));
    tracing::debug!(bytes = tensors.bytes(), "loading weights");
    let embedding = tensors.matrix(names.embedding, vocab, hidden)?;
    let layers: Vec<Layer> =
        (0..spec.layers).map(|i| layer(&spec, &mut tensors, names, i)).collect::<Result<_, _>>()?;
    let final_norm = tensors.vector(names.final_norm, hidden)?;
    let head = match own_head {
        true => Some(tensors.matrix(names.head, vocab, hidden)?),
        false => None,
    };
    if let Some((name, path)) = tensors.leftover() {
        let rule = "is not part of a plain Llama model, which is all that is supported";
        return Err(ModelError::tensor(path, name, rule));
    }
    Ok(Model { spec, embedding, layers, final_norm, head, content_hash })
}

fn layer(
    spec: &ModelSpec,
    tensors: &mut Tensors,
    names: &Names,
    i: u32,
) -> Result<Layer, ModelError> {
    let name = |part: &str| format!("{}.{i}.{part}", names.layer);
    let (hidden, ffn) = (u64::from(spec.hidden), u64::from(spec.ffn));
    let (query, kv) = (u64::from(spec.query_width()), u64::from(spec.kv_width()));
    tracing::trace!(layer = i, "loading");
    Ok(Layer {
        attn_norm: tensors.vector(&name(names.attn_norm), hidden)?,
        q: tensors.matrix(&name(names.q), query, hidden)?,
        k: tensors.matrix(&name(names.k), kv, hidden)?,
        v: tensors.matrix(&name(names.v), kv, hidden)?,
        o: tensors.matrix(&name(names.o), hidden, query)?,
        ffn_norm: tensors.vector(&name(names.ffn_norm), hidden)?,
        gate: tensors.matrix(&name(names.gate), ffn, hidden)?,
        up: tensors.matrix(&name(names.up), ffn, hidden)?,
        down: tensors.matrix(&name(names.down), hidden, ffn)?,
    })
}

/// Of each head, rows `0, 2, 4, …` then `1, 3, 5, …`.
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
    use crate::model::WeightType;

    #[test]
    fn pairs_become_halves_head_by_head() {
        let bytes = Arc::new((0..16).flat_map(|row| [row, 0, row + 100, 0]).collect());
        let weight = Weight { dtype: WeightType::F16, rows: 16, cols: 2, bytes };
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
