//! `config.json` and `generation_config.json` of a Hugging Face folder → [`ModelSpec`].

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::ModelSpec;
use super::error::ModelError;
use super::tensors::TensorFile;

/// Longest configuration file, bytes.
const LIMIT: u64 = 4 << 20;

/// Members that change the results, and the one value besides null that is computed here.
const ONLY: &[(&str, Value)] = &[
    ("attention_bias", Value::Bool(false)),
    ("mlp_bias", Value::Bool(false)),
    ("quantization_config", Value::Null),
    ("sliding_window", Value::Null),
];

/// What the folder's configuration says.
#[derive(Debug)]
pub struct Config {
    /// Shape.
    pub spec: ModelSpec,
    /// The embedding is the head too.
    pub tied: bool,
}

/// Reads `config.json`, and the end-of-text ids of `generation_config.json` where there is one.
///
/// # Errors
/// [`ModelError`].
pub fn read(folder: &Path) -> Result<Config, ModelError> {
    let config = Members::read(folder.join("config.json"))?;
    config.check_supported()?;
    let heads = config.need("num_attention_heads")?;
    let hidden = config.need("hidden_size")?;
    let head_dim = match config.number("head_dim")? {
        Some(n) => n,
        None if heads > 0 && hidden.is_multiple_of(heads) => hidden / heads,
        None => {
            let rule = format!("is {heads}, which does not divide `hidden_size` {hidden}");
            return Err(config.refuse("num_attention_heads", rule));
        }
    };
    let mut eos_ids = config.ids("eos_token_id")?;
    let generation = folder.join("generation_config.json");
    if generation.exists() {
        eos_ids.extend(Members::read(generation)?.ids("eos_token_id")?);
    }
    eos_ids.sort_unstable();
    eos_ids.dedup();
    let spec = ModelSpec {
        architecture: "llama".into(),
        layers: config.need("num_hidden_layers")?,
        hidden,
        ffn: config.need("intermediate_size")?,
        heads,
        kv_heads: config.number("num_key_value_heads")?.unwrap_or(heads),
        head_dim,
        vocab: config.need("vocab_size")?,
        rope_theta: config.rope_theta()?,
        rms_eps: config.float("rms_norm_eps")?.unwrap_or(1e-6),
        max_len: config.number("max_position_embeddings")?.unwrap_or(2048),
        eos_ids,
    };
    spec.check().map_err(|(key, rule)| config.refuse(key, rule))?;
    Ok(Config { spec, tied: config.flag("tie_word_embeddings")?.unwrap_or(false) })
}

struct Members {
    path: PathBuf,
    members: Map<String, Value>,
}

impl Members {
    fn read(path: PathBuf) -> Result<Self, ModelError> {
        let file = TensorFile::open(&path)?;
        if file.size() > LIMIT {
            let rule = format!("is {} bytes long, the limit is {LIMIT}", file.size());
            return Err(ModelError::file(&path, rule));
        }
        let bytes = file.read(0, file.size())?.unwrap_or_default();
        match serde_json::from_slice(&bytes) {
            Ok(members) => Ok(Self { path, members }),
            Err(e) => Err(ModelError::file(&path, e.to_string())),
        }
    }

    fn refuse(&self, key: &str, rule: impl Into<String>) -> ModelError {
        ModelError::setting(&self.path, key, rule)
    }

    /// The member, null counting as absent.
    fn get(&self, key: &str) -> Option<&Value> {
        self.members.get(key).filter(|v| !v.is_null())
    }

    fn check_supported(&self) -> Result<(), ModelError> {
        let architectures = self.get("architectures").cloned().unwrap_or_default();
        if architectures != serde_json::json!(["LlamaForCausalLM"]) {
            let rule = format!("is {architectures}, supported is [\"LlamaForCausalLM\"]");
            return Err(self.refuse("architectures", rule));
        }
        match self.get("hidden_act").map(Value::as_str) {
            None | Some(Some("silu" | "swish")) => {}
            Some(_) => {
                let rule = format!("is {}, supported is \"silu\"", self.members["hidden_act"]);
                return Err(self.refuse("hidden_act", rule));
            }
        }
        for (key, only) in ONLY {
            match self.get(key) {
                Some(found) if found != only => {
                    return Err(self.refuse(key, format!("is {found}, supported is {only}")));
                }
                Some(_) | None => {}
            }
        }
        for key in ["rope_scaling", "rope_parameters"] {
            let Some(found) = self.get(key) else { continue };
            let kind = found.get("rope_type").or_else(|| found.get("type")).and_then(Value::as_str);
            if kind != Some("default") {
                let rule = format!("is {found}, supported is null or the type \"default\"");
                return Err(self.refuse(key, rule));
            }
        }
        match self.float("partial_rotary_factor")? {
            None | Some(1.0) => Ok(()),
            Some(x) => Err(self.refuse("partial_rotary_factor", format!("is {x}, supported is 1"))),
        }
    }

    fn number(&self, key: &str) -> Result<Option<u32>, ModelError> {
        let Some(found) = self.get(key) else { return Ok(None) };
        match found.as_u64().and_then(|n| u32::try_from(n).ok()) {
            Some(n) => Ok(Some(n)),
            None => Err(self.refuse(key, format!("is {found}, not a whole number below 2^32"))),
        }
    }

    fn need(&self, key: &str) -> Result<u32, ModelError> {
        self.number(key)?.ok_or_else(|| self.refuse(key, "is missing"))
    }

    fn float(&self, key: &str) -> Result<Option<f32>, ModelError> {
        let Some(found) = self.get(key) else { return Ok(None) };
        match found.as_f64() {
            Some(x) => Ok(Some(x as f32)),
            None => Err(self.refuse(key, format!("is {found}, not a number"))),
        }
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        let Some(found) = self.get(key) else { return Ok(None) };
        match found.as_bool() {
            Some(b) => Ok(Some(b)),
            None => Err(self.refuse(key, format!("is {found}, not true or false"))),
        }
    }

    /// Older files have `rope_theta` beside, newer ones within `rope_parameters`.
    fn rope_theta(&self) -> Result<f32, ModelError> {
        let newer = self.get("rope_parameters").and_then(|p| p.get("rope_theta"));
        match (newer.map(Value::as_f64), self.float("rope_theta")?) {
            (Some(Some(x)), _) => Ok(x as f32),
            (Some(None), _) => {
                Err(self.refuse("rope_parameters", "has a `rope_theta` that is no number"))
            }
            (None, Some(x)) => Ok(x),
            (None, None) => Ok(10_000.0),
        }
    }

    /// One id, a list of ids, or none.
    fn ids(&self, key: &str) -> Result<Vec<u32>, ModelError> {
        let list = match self.get(key) {
            None => return Ok(Vec::new()),
            Some(Value::Array(list)) => list.as_slice(),
            Some(one) => std::slice::from_ref(one),
        };
        let id = |v: &Value| {
            let id = v.as_u64().and_then(|n| u32::try_from(n).ok());
            id.ok_or_else(|| self.refuse(key, format!("has {v}, not a token id")))
        };
        list.iter().map(id).collect()
    }
}
