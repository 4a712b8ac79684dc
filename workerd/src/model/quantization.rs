//! Which quantised Hugging Face folders are read, by `hf_quant_config.json` and `config.json`'s `quantization_config`: FP8
//! (e4m3) weights, with one scale a matrix, a row or a block. All else is refused, as its bytes mean something else.
//!
//! Which matrices are FP8 their tensors say ([`super::scales`]); the lists of those that are not need no reading.

use std::path::Path;

use serde_json::{Value, json};

use super::error::ModelError;
use super::members::Members;

const SUPPORTED: &str = "FP8 (e4m3) weights, with one scale a matrix, a row or a block";

/// Rows and columns of a block that has a scale of its own.
pub type BlockShape = [usize; 2];

/// Whether a folder's weights can be read; `config` is its `config.json`. Gives the blocks they are scaled by, if they are.
///
/// # Errors
/// [`ModelError`], naming the file, the member and its value.
pub fn check(folder: &Path, config: &Members) -> Result<Option<BlockShape>, ModelError> {
    let (mut cache, mut blocks) = (Value::Null, None);
    let path = folder.join("hf_quant_config.json");
    if path.exists() {
        let file = Members::read(path)?;
        let asked = file.object("quantization")?;
        let asked = asked.ok_or_else(|| file.refuse("quantization", "is missing"))?;
        // None: nothing but perhaps the cache is quantised.
        only(&asked, "quant_algo", &MODEL_OPTIMIZER.map(|algo| json!(algo)))?;
        cache = asked.get("kv_cache_quant_algo").cloned().unwrap_or_default();
    }
    if let Some(asked) = config.object("quantization_config")? {
        match asked.string("quant_method")? {
            Some("modelopt") => {
                only(&asked, "quant_algo", &MODEL_OPTIMIZER.map(|algo| json!(algo)))?;
            }
            Some("fp8") => {
                only(&asked, "fmt", &[json!("e4m3")])?;
                blocks = block_shape(&asked, "weight_block_size")?;
            }
            Some("compressed-tensors") => blocks = compressed_tensors(&asked)?,
            found => {
                let found = found.map_or("missing".to_owned(), |found| format!("`{found}`"));
                let rule = format!(
                    "is {found}, supported are `modelopt`, `fp8` and `compressed-tensors` with {SUPPORTED}"
                );
                return Err(asked.refuse("quant_method", rule));
            }
        }
        cache = asked.get("kv_cache_scheme").cloned().unwrap_or(cache);
    }
    if !cache.is_null() {
        tracing::info!(asked = %cache, "made for a quantised KV cache: this worker's stays bf16");
    }
    Ok(blocks)
}

/// What Model Optimizer calls them.
const MODEL_OPTIMIZER: [&str; 2] = ["FP8", "FP8_PER_CHANNEL_PER_TOKEN"];

fn compressed_tensors(asked: &Members) -> Result<Option<BlockShape>, ModelError> {
    only(asked, "format", &[json!("float-quantized")])?;
    only(asked, "transform_config", &[json!({})])?;
    if let Some(sparsity) = asked.object("sparsity_config")? {
        only(&sparsity, "format", &[json!("dense")])?;
    }
    let Some(groups) = asked.object("config_groups")? else { return Ok(None) };
    let mut blocks = None;
    for name in groups.names() {
        let Some(group) = groups.object(name)? else { continue };
        only(&group, "format", &[json!("float-quantized")])?;
        let Some(weights) = group.object("weights")? else { continue };
        if weights.get("type").is_none() {
            return Err(weights.refuse("type", format!("is missing, supported are {SUPPORTED}")));
        }
        only(&weights, "type", &[json!("float")])?;
        only(&weights, "num_bits", &[json!(8)])?;
        only(&weights, "strategy", &[json!("tensor"), json!("channel"), json!("block")])?;
        only(&weights, "symmetric", &[json!(true)])?;
        only(&weights, "dynamic", &[json!(false)])?;
        if weights.string("strategy")? == Some("block") {
            let shape = block_shape(&weights, "block_structure")?;
            if shape.is_none() || blocks.is_some_and(|blocks| Some(blocks) != shape) {
                let found = weights.get("block_structure").cloned().unwrap_or_default();
                let rule = format!("is {found}, must be the same for all groups with blocks");
                return Err(weights.refuse("block_structure", rule));
            }
            blocks = shape;
        }
    }
    Ok(blocks)
}

/// A member that is rows and columns; `None` where it is missing or null.
fn block_shape(members: &Members, key: &str) -> Result<Option<BlockShape>, ModelError> {
    let Some(found) = members.get(key) else { return Ok(None) };
    let extents: Option<Vec<u64>> =
        found.as_array().and_then(|a| a.iter().map(Value::as_u64).collect());
    match extents.as_deref() {
        Some(&[rows, cols]) if (1..=LARGEST).contains(&rows) && (1..=LARGEST).contains(&cols) => {
            Ok(Some([rows as usize, cols as usize]))
        }
        _ => {
            Err(members.refuse(key, format!("is {found}, must be two numbers from 1 to {LARGEST}")))
        }
    }
}

/// Rows and columns of a block at most.
const LARGEST: u64 = 1 << 16;

/// Whether a member is missing, null or one of these.
fn only(members: &Members, key: &str, values: &[Value]) -> Result<(), ModelError> {
    match members.get(key) {
        Some(found) if !values.contains(found) => {
            Err(members.refuse(key, format!("is {found}, supported are {SUPPORTED}")))
        }
        Some(_) | None => Ok(()),
    }
}
