//! `config.json` and `generation_config.json` of a Hugging Face folder → [`ModelSpec`].
//!
//! A missing member means what its absence means to the classes that wrote the file, or is an error where they
//! disagree. What would change the results and is not computed here is an error.

use std::path::Path;

use serde_json::Value;

use super::ModelSpec;
use super::architecture::Architecture;
use super::error::ModelError;
use super::members::Members;
use super::quantization::{self, BlockShape};
use super::rope::Llama3;

/// The window of a Mistral whose file does not say: its class's default.
const MISTRAL_WINDOW: u32 = 4096;

/// What the folder's configuration says.
#[derive(Debug)]
pub struct Config {
    /// Shape.
    pub spec: ModelSpec,
    /// The embedding is the head too.
    pub tied: bool,
    /// What has a scale of its own in FP8 matrices, where it is blocks.
    pub blocks: Option<BlockShape>,
}

/// Reads `config.json`, and the end-of-text ids of `generation_config.json` where there is one.
///
/// # Errors
/// [`ModelError`].
pub fn read(folder: &Path) -> Result<Config, ModelError> {
    let config = Members::read(folder.join("config.json"))?;
    let (class, architecture) = class(&config)?;
    check_supported(&config, architecture)?;
    let blocks = quantization::check(folder, &config)?;
    let heads = config.need("num_attention_heads")?;
    let hidden = config.need("hidden_size")?;
    let head_dim = match config.number("head_dim")? {
        Some(n) => n,
        // The class's own default is 128, whatever the width.
        None if architecture == Architecture::Qwen3 => config.need("head_dim")?,
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
    let (rope_theta, rope_factors) = rope(&config, head_dim)?;
    let spec = ModelSpec {
        architecture,
        layers: config.need("num_hidden_layers")?,
        hidden,
        ffn: config.need("intermediate_size")?,
        heads,
        kv_heads: match config.number("num_key_value_heads")? {
            Some(n) => n,
            None if class == "LlamaForCausalLM" => heads,
            None => config.need("num_key_value_heads")?,
        },
        head_dim,
        vocab: config.need("vocab_size")?,
        rope_theta,
        rope_factors,
        rms_eps: config.float("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        max_len: config.number("max_position_embeddings")?.unwrap_or(2048),
        window: window(&config, &class)?,
        eos_ids,
    };
    spec.check().map_err(|(key, rule)| config.refuse(key, rule))?;
    Ok(Config { spec, tied: config.flag("tie_word_embeddings")?, blocks })
}

fn class(config: &Members) -> Result<(String, Architecture), ModelError> {
    let found = config.get("architectures").cloned().unwrap_or_default();
    let class = match found.as_array().map(Vec::as_slice) {
        Some([Value::String(class)]) => Some(class),
        _ => None,
    };
    let supported = class.and_then(|c| Some((c.clone(), Architecture::of_class(c)?)));
    supported.ok_or_else(|| {
        let rule = format!("is {found}, supported is one of {}", Architecture::classes());
        config.refuse("architectures", rule)
    })
}

fn check_supported(config: &Members, architecture: Architecture) -> Result<(), ModelError> {
    match config.string("hidden_act")? {
        None | Some("silu" | "swish") => {}
        Some(other) => {
            return Err(config.refuse("hidden_act", format!("is `{other}`, supported is `silu`")));
        }
    }
    // A Qwen2's bias is on queries, keys and values only, whatever the file says; a Llama's is on the output too.
    if !architecture.has_qkv_bias() && config.flag("attention_bias")? {
        return Err(config.refuse("attention_bias", "is true, supported is false"));
    }
    if config.flag("mlp_bias")? {
        return Err(config.refuse("mlp_bias", "is true, supported is false"));
    }
    let kinds = config.get("layer_types").and_then(Value::as_array).into_iter().flatten();
    for kind in kinds {
        if !["full_attention", "sliding_attention"].map(Value::from).contains(kind) {
            let rule = format!(
                "has {kind}, supported are `full_attention` and, within the window, `sliding_attention`"
            );
            return Err(config.refuse("layer_types", rule));
        }
    }
    match config.float("partial_rotary_factor")? {
        None | Some(1.0) => Ok(()),
        Some(x) => Err(config.refuse("partial_rotary_factor", format!("is {x}, supported is 1"))),
    }
}

/// RoPE's base and what frequencies are divided by. Older files have `rope_theta` beside, newer ones within
/// `rope_parameters`.
fn rope(config: &Members, head_dim: u32) -> Result<(f32, Vec<f32>), ModelError> {
    let newer = config.object("rope_parameters")?;
    let older = config.object("rope_scaling")?;
    let within = newer.as_ref().map(|p| p.float("rope_theta")).transpose()?.flatten();
    let theta = match within {
        Some(theta) => theta,
        None => config.float("rope_theta")?.unwrap_or(10_000.0),
    } as f32;
    let Some(scaling) = newer.or(older) else { return Ok((theta, Vec::new())) };
    let pairs = (head_dim / 2) as usize;
    let key = if scaling.has("rope_type") { "rope_type" } else { "type" };
    let factors = match scaling.string(key)? {
        Some("default") => Vec::new(),
        Some("linear") => vec![scaling.need_positive("factor")? as f32; pairs],
        Some("llama3") => {
            let rule = Llama3 {
                factor: scaling.need_positive("factor")?,
                low: scaling.need_positive("low_freq_factor")?,
                high: scaling.need_positive("high_freq_factor")?,
                original_len: scaling.need_positive("original_max_position_embeddings")?,
            };
            if rule.low >= rule.high {
                let rule = format!("is {}, not above `low_freq_factor`", rule.high);
                return Err(scaling.refuse("high_freq_factor", rule));
            }
            // A base that `check` refuses has no frequencies.
            if theta >= 1.0 { rule.factors(theta, pairs) } else { Vec::new() }
        }
        found => {
            let found = found.map_or("missing".to_owned(), |found| format!("`{found}`"));
            let rule = format!("is {found}, supported are `default`, `linear` and `llama3`");
            return Err(scaling.refuse(key, rule));
        }
    };
    Ok((theta, factors))
}

/// The sliding window, if any layer has one.
fn window(config: &Members, class: &str) -> Result<Option<u32>, ModelError> {
    let window = config.number("sliding_window")?;
    match class {
        "MistralForCausalLM" if !config.has("sliding_window") => Ok(Some(MISTRAL_WINDOW)),
        "Qwen2ForCausalLM" | "Qwen3ForCausalLM" if !config.flag("use_sliding_window")? => Ok(None),
        _ => Ok(window),
    }
}
