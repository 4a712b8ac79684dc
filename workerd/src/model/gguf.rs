//! A `.gguf` file: its settings and its tensor table.

use std::path::Path;

use baton_shared::text::gguf::{Gguf, Value};

use super::architecture::Architecture;
use super::error::ModelError;
use super::tensors::{Entry, StoredType, TensorFile, Tensors, stored_bytes};
use super::{ModelSpec, WeightType};

/// Settings of an architecture that are read here or change nothing.
const KNOWN: &[&str] = &[
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "vocab_size",
];

/// Reads the header.
///
/// # Errors
/// [`ModelError`].
pub fn open(path: &Path) -> Result<(ModelSpec, Tensors, Gguf), ModelError> {
    let file = TensorFile::open(path)?;
    let header = Gguf::open(path)
        .map_err(|source| ModelError::Header { path: path.display().to_string(), source })?;
    let mut tensors = Tensors::default();
    let index = tensors.add_file(file);
    for info in &header.tensors {
        let dtype = weight_type(info.kind).ok_or_else(|| {
            let supported = WeightType::ALL.into_iter().filter(|t| *t != WeightType::F8E4M3);
            let supported: Vec<&str> = supported.map(WeightType::name).collect();
            let rule = format!(
                "has ggml type {} (`{}`), supported are {}",
                info.kind,
                ggml_name(info.kind),
                supported.join(", ")
            );
            ModelError::tensor(path, &info.name, rule)
        })?;
        let shape: Vec<u64> = info.dims.iter().rev().copied().collect();
        let len = stored_bytes(dtype, &shape).ok_or_else(|| {
            let rule = format!(
                "of type {} cannot have shape {shape:?}: rows are whole blocks of {}",
                dtype.name(),
                dtype.block().0
            );
            ModelError::tensor(path, &info.name, rule)
        })?;
        let offset = header.data_offset.saturating_add(info.offset);
        let entry = Entry { file: index, dtype: StoredType::Known(dtype), shape, offset, len };
        tensors.add(&info.name, entry)?;
    }
    let spec = Settings::new(path, &header)?.spec(&tensors)?;
    Ok((spec, tensors, header))
}

fn weight_type(kind: u32) -> Option<WeightType> {
    match kind {
        0 => Some(WeightType::F32),
        1 => Some(WeightType::F16),
        2 => Some(WeightType::Q4_0),
        3 => Some(WeightType::Q4_1),
        6 => Some(WeightType::Q5_0),
        7 => Some(WeightType::Q5_1),
        8 => Some(WeightType::Q8_0),
        12 => Some(WeightType::Q4K),
        13 => Some(WeightType::Q5K),
        14 => Some(WeightType::Q6K),
        30 => Some(WeightType::Bf16),
        _ => None,
    }
}

fn ggml_name(kind: u32) -> &'static str {
    match kind {
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        15 => "Q8_K",
        16..=23 | 29 => "IQ",
        24..=27 => "integers",
        28 => "F64",
        34 | 35 => "TQ",
        39 => "MXFP4",
        _ => "unknown",
    }
}

struct Settings<'a> {
    path: &'a Path,
    header: &'a Gguf,
    architecture: Architecture,
}

impl<'a> Settings<'a> {
    fn new(path: &'a Path, header: &'a Gguf) -> Result<Self, ModelError> {
        let key = "general.architecture";
        let found = header.string(key).unwrap_or("missing");
        match Architecture::of_gguf(found) {
            Some(architecture) => Ok(Self { path, header, architecture }),
            None => {
                let rule = format!("is `{found}`, supported are {}", Architecture::gguf_names());
                Err(ModelError::setting(path, key, rule))
            }
        }
    }

    /// A setting's whole key.
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture.name())
    }

    fn refuse(&self, key: &str, rule: impl Into<String>) -> ModelError {
        ModelError::setting(self.path, key, rule)
    }

    fn spec(&self, tensors: &Tensors) -> Result<ModelSpec, ModelError> {
        self.refuse_unsupported()?;
        let vocab = tensors.shape("token_embd.weight").and_then(|s| s.first().copied());
        let vocab = vocab.ok_or_else(|| {
            ModelError::tensor(self.path, "token_embd.weight", "is missing: no vocabulary")
        })?;
        let vocab = self.small("token_embd.weight", vocab)?;
        let heads = self.need("attention.head_count")?;
        let hidden = self.need("embedding_length")?;
        let head_dim = self.head_dim(hidden, heads)?;
        let spec = ModelSpec {
            architecture: self.architecture,
            layers: self.need("block_count")?,
            hidden,
            ffn: self.need("feed_forward_length")?,
            heads,
            kv_heads: self.number("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            vocab,
            rope_theta: self.float("rope.freq_base")?.unwrap_or(10_000.0),
            rope_factors: self.linear_rope_factors(head_dim)?,
            rms_eps: self.float("attention.layer_norm_rms_epsilon")?.ok_or_else(|| {
                self.refuse(&self.key("attention.layer_norm_rms_epsilon"), "is missing")
            })?,
            max_len: self.need("context_length")?,
            window: self.number("attention.sliding_window")?.filter(|window| *window > 0),
            eos_ids: self.eos_ids()?,
        };
        spec.check().map_err(|(key, rule)| self.refuse(key, rule))?;
        Ok(spec)
    }

    /// What would change the results and is not computed here is an error; what is merely unknown is told.
    fn refuse_unsupported(&self) -> Result<(), ModelError> {
        let prefix = self.key("");
        for (key, value) in &self.header.metadata {
            let Some(name) = key.strip_prefix(&prefix) else { continue };
            let neutral = match name {
                _ if KNOWN.contains(&name) => true,
                "attention.causal" => *value == Value::Bool(true),
                "expert_count" | "expert_used_count" => *value == Value::U64(0),
                _ if ["rope.scal", "expert", "attention."].iter().any(|p| name.starts_with(p)) => {
                    false
                }
                "logit_scale" | "embedding_scale" | "residual_scale" => *value == Value::F64(1.0),
                _ => {
                    tracing::warn!(file = %self.path.display(), key, "unknown model setting");
                    true
                }
            };
            if !neutral {
                let rule = "asks for something that is not supported: no experts, no RoPE scaling \
                            but `linear` and `llama3`, no other attention";
                return Err(self.refuse(key, rule));
            }
        }
        Ok(())
    }

    /// What every pair's frequency is divided by; older files have the factor as `rope.scale_linear`.
    fn linear_rope_factors(&self, head_dim: u32) -> Result<Vec<f32>, ModelError> {
        let key = self.key("rope.scaling.type");
        let factor = match self.float("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => self.float("rope.scale_linear")?,
        };
        // A file that does not name a type means this one.
        let kind = match self.header.metadata.get(&key) {
            None => "linear",
            Some(Value::String(kind)) => kind,
            Some(_) => return Err(self.refuse(&key, "is not a string")),
        };
        match (kind, factor) {
            ("none", _) | ("linear", None | Some(1.0)) => Ok(Vec::new()),
            ("linear", Some(factor)) => Ok(vec![factor; (head_dim / 2) as usize]),
            (other, _) => {
                let rule = format!("is `{other}`, supported are `none` and `linear`");
                Err(self.refuse(&key, rule))
            }
        }
    }

    fn small(&self, key: &str, value: u64) -> Result<u32, ModelError> {
        u32::try_from(value).map_err(|_| self.refuse(key, format!("is {value}, more than 2^32")))
    }

    fn number(&self, name: &str) -> Result<Option<u32>, ModelError> {
        let key = self.key(name);
        match (self.header.metadata.get(&key), self.header.u64(&key)) {
            (None, _) => Ok(None),
            (Some(_), Some(v)) => self.small(&key, v).map(Some),
            (Some(_), None) => Err(self.refuse(&key, "is not one whole number")),
        }
    }

    fn need(&self, name: &str) -> Result<u32, ModelError> {
        self.number(name)?.ok_or_else(|| self.refuse(&self.key(name), "is missing"))
    }

    fn float(&self, name: &str) -> Result<Option<f32>, ModelError> {
        let key = self.key(name);
        match (self.header.metadata.get(&key), self.header.f64(&key)) {
            (None, _) => Ok(None),
            (Some(_), Some(v)) => Ok(Some(v as f32)),
            (Some(_), None) => Err(self.refuse(&key, "is not a floating-point number")),
        }
    }

    fn head_dim(&self, hidden: u32, heads: u32) -> Result<u32, ModelError> {
        let lengths = ["attention.key_length", "attention.value_length", "rope.dimension_count"];
        let mut head_dim = None;
        for name in lengths {
            match (self.number(name)?, head_dim) {
                (Some(n), Some(first)) if n != first => {
                    let rule = format!("is {n}, but heads have {first} elements elsewhere");
                    return Err(self.refuse(&self.key(name), rule));
                }
                (found, first) => head_dim = first.or(found),
            }
        }
        match head_dim {
            Some(n) => Ok(n),
            None if heads > 0 && hidden.is_multiple_of(heads) => Ok(hidden / heads),
            None => {
                let rule = format!("is {heads}, which does not divide the width {hidden}");
                Err(self.refuse(&self.key("attention.head_count"), rule))
            }
        }
    }

    fn eos_ids(&self) -> Result<Vec<u32>, ModelError> {
        let mut ids = Vec::new();
        for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
            match (self.header.metadata.get(key), self.header.u64(key)) {
                (None, _) => {}
                (Some(_), Some(id)) => ids.push(self.small(key, id)?),
                (Some(_), None) => return Err(self.refuse(key, "is not a token id")),
            }
        }
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }
}
