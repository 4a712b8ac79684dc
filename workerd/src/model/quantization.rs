//! Which quantised Hugging Face folders are read, by `hf_quant_config.json` and `config.json`'s `quantization_config`: FP8
//! (e4m3) weights, with one scale a matrix or one a row. All else is refused, as its bytes mean something else.
//!
//! Which matrices are FP8 their tensors say ([`super::scales`]); the lists of those that are not need no reading.

use std::path::Path;

use serde_json::{Value, json};

use super::error::ModelError;
use super::members::Members;

const SUPPORTED: &str = "FP8 (e4m3) weights, with one scale a matrix or one a row";

/// Whether a folder's weights can be read; `config` is its `config.json`.
///
/// # Errors
/// [`ModelError`], naming the file, the member and its value.
pub fn check(folder: &Path, config: &Members) -> Result<(), ModelError> {
    let mut cache = Value::Null;
    let path = folder.join("hf_quant_config.json");
    if path.exists() {
        let file = Members::read(path)?;
        let asked = file.object("quantization")?;
        let asked = asked.ok_or_else(|| file.refuse("quantization", "is missing"))?;
        // None: nothing but perhaps the cache is quantised.
        only(&asked, "quant_algo", &[json!("FP8")])?;
        cache = asked.get("kv_cache_quant_algo").cloned().unwrap_or_default();
    }
    if let Some(asked) = config.object("quantization_config")? {
        match asked.string("quant_method")? {
            Some("modelopt") => only(&asked, "quant_algo", &[json!("FP8")])?,
            Some("fp8") => {
                only(&asked, "fmt", &[json!("e4m3")])?;
                only(&asked, "weight_block_size", &[])?;
            }
            Some("compressed-tensors") => compressed_tensors(&asked)?,
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
    Ok(())
}

fn compressed_tensors(asked: &Members) -> Result<(), ModelError> {
    only(asked, "format", &[json!("float-quantized")])?;
    only(asked, "transform_config", &[json!({})])?;
    if let Some(sparsity) = asked.object("sparsity_config")? {
        only(&sparsity, "format", &[json!("dense")])?;
    }
    let Some(groups) = asked.object("config_groups")? else { return Ok(()) };
    for name in groups.names() {
        let Some(group) = groups.object(name)? else { continue };
        only(&group, "format", &[json!("float-quantized")])?;
        let Some(weights) = group.object("weights")? else { continue };
        if weights.get("type").is_none() {
            return Err(weights.refuse("type", format!("is missing, supported are {SUPPORTED}")));
        }
        only(&weights, "type", &[json!("float")])?;
        only(&weights, "num_bits", &[json!(8)])?;
        only(&weights, "strategy", &[json!("tensor"), json!("channel")])?;
        only(&weights, "symmetric", &[json!(true)])?;
        only(&weights, "dynamic", &[json!(false)])?;
    }
    Ok(())
}

/// Whether a member is missing, null or one of these.
fn only(members: &Members, key: &str, values: &[Value]) -> Result<(), ModelError> {
    match members.get(key) {
        Some(found) if !values.contains(found) => {
            Err(members.refuse(key, format!("is {found}, supported are {SUPPORTED}")))
        }
        Some(_) | None => Ok(()),
    }
}
