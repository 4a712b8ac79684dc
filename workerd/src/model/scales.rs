//! The scales beside a folder's FP8 matrices: `X.weight_scale` belongs to `X.weight` and has one number, or one a row.

use std::sync::Arc;

use super::error::ModelError;
use super::tensors::Tensors;
use super::{Scales, WeightType};

/// Scales of activations and of the KV cache, which are bf16 here: how their names end.
const UNUSED: [&str; 7] = [
    ".input_scale",
    ".k_proj.k_scale",
    ".v_proj.v_scale",
    ".k_proj.output_scale",
    ".v_proj.output_scale",
    ".self_attn.k_scale",
    ".self_attn.v_scale",
];

/// Marks the scales that have no use here as known.
pub fn skip_unused(tensors: &mut Tensors) {
    tensors.skip_all(|name| UNUSED.iter().any(|end| name.ends_with(end)));
}

/// Those of the tensor `name`, which is there: [`Scales::One`] if it is not FP8. Reads them.
///
/// # Errors
/// [`ModelError`], naming the tensor: they are missing, of another shape, not finite, or not above 0.
pub fn read(tensors: &mut Tensors, name: &str) -> Result<Scales, ModelError> {
    if tensors.dtype(name) != Some(WeightType::F8E4M3) {
        return Ok(Scales::One);
    }
    let Some(&[rows, _]) = tensors.shape(name) else {
        return Err(tensors.refuse(name, "has type F8_E4M3, which only matrices may have"));
    };
    let scale = format!("{name}_scale");
    let Some(shape) = tensors.shape(&scale).map(<[u64]>::to_vec) else {
        let blocks = format!("{name}_scale_inv");
        let rule = match tensors.contains(&blocks) {
            true => format!(
                "has scales of blocks (`{blocks}`), supported are `{scale}` with one number or one a row"
            ),
            false => format!("has type F8_E4M3, and its scale `{scale}` is missing"),
        };
        return Err(tensors.refuse(name, rule));
    };
    let of_rows = match shape[..] {
        [] | [1] | [1, 1] => false,
        [n] | [n, 1] if n == rows => true,
        _ => {
            let rule = format!("has shape {shape:?}, expected [], [1], [{rows}] or [{rows}, 1]");
            return Err(tensors.refuse(&scale, rule));
        }
    };
    let scales = tensors.numbers(&scale, &shape)?;
    if let Some(at) = scales.iter().position(|scale| *scale <= 0.0) {
        let rule = format!("has {} at element {at}, a scale is above 0", scales[at]);
        return Err(tensors.refuse(&scale, rule));
    }
    Ok(if of_rows { Scales::Rows(Arc::new(scales)) } else { Scales::Tensor(scales[0]) })
}
