//! `*.safetensors` of a Hugging Face folder: which files, and the tensor table of each.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::Deserialize;

use super::WeightType;
use super::error::ModelError;
use super::tensors::{Entry, StoredType, TensorFile, Tensors};

/// Longest header and longest index, bytes.
const HEADER_LIMIT: u64 = 100 << 20;

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The tensors of a folder: of `model.safetensors`, else of the files its index names, else of all
/// `*.safetensors`.
///
/// # Errors
/// [`ModelError`].
pub fn open(folder: &Path) -> Result<Tensors, ModelError> {
    let whole = folder.join("model.safetensors");
    let index = folder.join("model.safetensors.index.json");
    let mut tensors = Tensors::default();
    if whole.exists() {
        add_file(&mut tensors, &whole)?;
    } else if index.exists() {
        let map = read_index(&index)?;
        for name in map.values().collect::<BTreeSet<_>>() {
            add_file(&mut tensors, &folder.join(name))?;
        }
        if let Some((name, file)) = map.iter().find(|(name, _)| !tensors.contains(name)) {
            return Err(ModelError::tensor(&index, name, format!("is not in `{file}`")));
        }
    } else {
        for path in all_files(folder)? {
            add_file(&mut tensors, &path)?;
        }
    }
    Ok(tensors)
}

fn read_index(path: &Path) -> Result<BTreeMap<String, String>, ModelError> {
    let file = TensorFile::open(path)?;
    if file.size() > HEADER_LIMIT {
        let rule = format!("is {} bytes long, the limit is {HEADER_LIMIT}", file.size());
        return Err(ModelError::file(path, rule));
    }
    let bytes = file.read(0, file.size())?.unwrap_or_default();
    let index: Index =
        serde_json::from_slice(&bytes).map_err(|e| ModelError::file(path, e.to_string()))?;
    let plain = |name: &str| Path::new(name).file_name().is_some_and(|f| f == name);
    match index.weight_map.iter().find(|(_, file)| !plain(file)) {
        None => Ok(index.weight_map),
        Some((tensor, file)) => {
            let rule = format!("is said to be in `{file}`, which is not a plain file name");
            Err(ModelError::tensor(path, tensor, rule))
        }
    }
}

fn all_files(folder: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let failed = |e| ModelError::io(folder, e);
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            paths.push(path);
        }
    }
    if paths.is_empty() {
        return Err(ModelError::file(folder, "has no `*.safetensors` file"));
    }
    paths.sort();
    Ok(paths)
}

fn add_file(tensors: &mut Tensors, path: &Path) -> Result<(), ModelError> {
    let file = TensorFile::open(path)?;
    let len = file.size();
    let truncated = |rule: String| ModelError::file(path, format!("{rule}: the file is truncated"));
    let size = file.read(0, 8)?;
    let size = size.ok_or_else(|| truncated(format!("has {len} bytes, a header needs 8")))?;
    let size = u64::from_le_bytes(size.try_into().expect("8 bytes were read"));
    if size > HEADER_LIMIT {
        let rule = format!("header length {size} at byte 0 is over the limit {HEADER_LIMIT}");
        return Err(ModelError::file(path, format!("{rule}: not a safetensors file?")));
    }
    let header = file.read(8, size)?;
    let header = header
        .ok_or_else(|| truncated(format!("has {len} bytes, its header at byte 8 needs {size}")))?;
    let metadata: Metadata = serde_json::from_slice(&header)
        .map_err(|e| ModelError::file(path, format!("header at byte 8 is invalid: {e}")))?;
    let index = tensors.add_file(file);
    for name in metadata.offset_keys() {
        let info = metadata.info(&name).expect("the key comes from the table");
        let (start, end) = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
        let shape = info.shape.iter().map(|n| *n as u64).collect();
        let offset = (8 + size).saturating_add(start);
        let dtype = stored_type(info.dtype);
        tensors.add(&name, Entry { file: index, dtype, shape, offset, len: end - start })?;
    }
    let end = (8 + size).saturating_add(metadata.data_len() as u64);
    if end < len {
        let rule = format!("has {len} bytes, its tensors end at byte {end}");
        return Err(ModelError::file(path, rule));
    }
    Ok(())
}

fn stored_type(dtype: Dtype) -> StoredType {
    match dtype {
        Dtype::F32 => StoredType::Known(WeightType::F32),
        Dtype::F16 => StoredType::Known(WeightType::F16),
        Dtype::BF16 => StoredType::Known(WeightType::Bf16),
        Dtype::F8_E4M3 => StoredType::Known(WeightType::F8E4M3),
        other => StoredType::Other(other.to_string()),
    }
}
