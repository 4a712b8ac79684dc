//! The scales beside a folder's FP8 matrices: `X.weight_scale`, or `X.weight_scale_inv`, belongs to `X.weight` and has one
//! number, or one a row or block. Elements are multiplied by either.

use std::sync::Arc;

use super::error::ModelError;
use super::quantization::BlockShape;
use super::tensors::Tensors;
use super::{Blocks, Scales, WeightType};

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

/// Those of the tensor `name`, which is there: [`Scales::One`] if it is not FP8. Reads them; `block` if there are such.
///
/// # Errors
/// [`ModelError`], naming the tensor: they are missing, of another shape, not finite, or not above 0.
pub fn read(
    tensors: &mut Tensors,
    name: &str,
    block: Option<BlockShape>,
) -> Result<Scales, ModelError> {
    if tensors.dtype(name) != Some(WeightType::F8E4M3) {
        return Ok(Scales::One);
    }
    let Some(&[rows, cols]) = tensors.shape(name) else {
        return Err(tensors.refuse(name, "has type F8_E4M3, which only matrices may have"));
    };
    let names = ["scale", "scale_inv"].map(|end| format!("{name}_{end}"));
    let Some(scale) = names.iter().find(|scale| tensors.contains(scale)) else {
        let rule = format!("has type F8_E4M3, and its scale `{}` is missing", names[0]);
        return Err(tensors.refuse(name, rule));
    };
    let shape = tensors.shape(scale).unwrap_or_default().to_vec();
    let grid =
        block.map(|block| Blocks::grid(block, rows as usize, cols as usize).map(|n| n as u64));
    let per = match shape[..] {
        [] | [1] | [1, 1] => Per::Tensor,
        [n] | [n, 1] if n == rows => Per::Row,
        _ => match block {
            Some(block) if grid.is_some_and(|grid| shape == grid) => Per::Block(block),
            _ => {
                let blocks =
                    grid.map_or(String::new(), |grid| format!(", {grid:?} for its blocks"));
                let rule = format!(
                    "has shape {shape:?}, expected [], [1], [{rows}] or [{rows}, 1]{blocks}"
                );
                return Err(tensors.refuse(scale, rule));
            }
        },
    };
    let scales = tensors.numbers(scale, &shape)?;
    if let Some(at) = scales.iter().position(|scale| *scale <= 0.0) {
        let rule = format!("has {} at element {at}, a scale is above 0", scales[at]);
        return Err(tensors.refuse(scale, rule));
    }
    Ok(match per {
        Per::Tensor => Scales::Tensor(scales[0]),
        Per::Row => Scales::Rows(Arc::new(scales)),
        Per::Block(shape) => Scales::Blocks(Blocks { shape, scales: Arc::new(scales) }),
    })
}

/// What has a scale of its own.
enum Per {
    Tensor,
    Row,
    Block(BlockShape),
}
