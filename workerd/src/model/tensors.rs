//! The tensors of a model as they lie in its files, whatever the format: a checked table and reads from it.
//!
//! Holds always: every entry lies within its file as long as the file is not changed under us, and a file that
//! is cut while it is read is an error, not a fault (bytes are read, not mapped).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::dequantize::dequantize;
use super::error::ModelError;
use super::{Scales, Weight, WeightType};

/// How much of each end of a tensor goes into the content hash, bytes.
const HASHED_ENDS: u64 = 64 << 10;

/// One open file.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    file: File,
    len: u64,
}

/// Element type as the file says; what cannot be computed with is an error only when it is needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoredType {
    /// One that weights may have.
    Known(WeightType),
    /// Any other, by its name in the format.
    Other(String),
}

/// Where one tensor lies.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Index of its file.
    pub file: usize,
    /// Element type.
    pub dtype: StoredType,
    /// Extents, slowest first.
    pub shape: Vec<u64>,
    /// Bytes from the start of the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// All tensors of a model by name.
#[derive(Debug, Default)]
pub struct Tensors {
    files: Vec<TensorFile>,
    entries: BTreeMap<String, Entry>,
    /// Names that were asked for.
    known: BTreeSet<String>,
}

impl TensorFile {
    /// Opens a regular file.
    ///
    /// # Errors
    /// [`ModelError::Io`], or [`ModelError::File`] when it is something else than a file.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let failed = |e| ModelError::io(path, e);
        let file = File::open(path).map_err(failed)?;
        let about = file.metadata().map_err(failed)?;
        if !about.is_file() {
            return Err(ModelError::file(path, "not a regular file"));
        }
        Ok(Self { path: path.to_owned(), file, len: about.len() })
    }

    /// Path as given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size in bytes when it was opened.
    pub fn size(&self) -> u64 {
        self.len
    }

    /// `len` bytes from `offset` on; `None` when the file has no such bytes.
    ///
    /// # Errors
    /// [`ModelError::Io`], also when the file became shorter since it was opened.
    pub fn read(&self, offset: u64, len: u64) -> Result<Option<Vec<u8>>, ModelError> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Ok(None);
        }
        let mut bytes = vec![0; len as usize];
        let read = self.file.read_exact_at(&mut bytes, offset);
        read.map_err(|e| ModelError::io(&self.path, e))?;
        Ok(Some(bytes))
    }
}

impl Tensors {
    /// Adds a file; the index is what entries name it by.
    pub fn add_file(&mut self, file: TensorFile) -> usize {
        self.files.push(file);
        self.files.len() - 1
    }

    /// Adds a tensor.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] when it reaches past the end of its file or its name is there already.
    pub fn add(&mut self, name: &str, entry: Entry) -> Result<(), ModelError> {
        let file = &self.files[entry.file];
        if entry.offset.checked_add(entry.len).is_none_or(|end| end > file.len) {
            let rule = format!(
                "of {} bytes at byte {} reaches past the end of the file at byte {}: the file is truncated",
                entry.len, entry.offset, file.len
            );
            return Err(ModelError::tensor(&file.path, name, rule));
        }
        if let Some(other) = self.entries.get(name) {
            let rule = format!("is also in `{}`", self.files[other.file].path.display());
            return Err(ModelError::tensor(&file.path, name, rule));
        }
        self.entries.insert(name.to_owned(), entry);
        Ok(())
    }

    /// Whether there is such a tensor.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// The shape of a tensor, slowest extent first.
    pub fn shape(&self, name: &str) -> Option<&[u64]> {
        Some(&self.entries.get(name)?.shape)
    }

    /// The type of a tensor, where weights may have it.
    pub fn dtype(&self, name: &str) -> Option<WeightType> {
        match self.entries.get(name)?.dtype {
            StoredType::Known(dtype) => Some(dtype),
            StoredType::Other(_) => None,
        }
    }

    /// The error of a tensor; `rule` says what is found and what is allowed.
    pub fn refuse(&self, name: &str, rule: impl Into<String>) -> ModelError {
        let entry = self.entries.get(name);
        let path = entry.map_or(Path::new(""), |entry| &self.files[entry.file].path);
        ModelError::tensor(path, name, rule)
    }

    /// Bytes of all tensors together.
    pub fn bytes(&self) -> u64 {
        self.entries.values().map(|e| e.len).fold(0, u64::saturating_add)
    }

    /// Marks a tensor, where there is one, as known.
    pub fn skip(&mut self, name: &str) {
        if self.contains(name) {
            self.known.insert(name.to_owned());
        }
    }

    /// Marks all tensors of such names as known.
    pub fn skip_all(&mut self, is_known: impl Fn(&str) -> bool) {
        self.known.extend(self.entries.keys().filter(|name| is_known(name)).cloned());
    }

    /// The first tensor, by name, that is neither known nor was read, and its file.
    pub fn leftover(&self) -> Option<(&str, &Path)> {
        let (name, entry) = self.entries.iter().find(|(name, _)| !self.known.contains(*name))?;
        Some((name, &self.files[entry.file].path))
    }

    /// A matrix of this shape, its bytes as stored; its scales, where it has some, are other tensors.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] when it is missing, has another shape or a type that is not supported;
    /// [`ModelError::Io`].
    pub fn matrix(&mut self, name: &str, rows: u64, cols: u64) -> Result<Weight, ModelError> {
        let (dtype, bytes) = self.take(name, &[rows, cols])?;
        let (rows, cols) = (rows as usize, cols as usize);
        Ok(Weight { dtype, rows, cols, bytes: Arc::new(bytes), scales: Scales::One })
    }

    /// A vector of `len` elements as f32.
    ///
    /// # Errors
    /// As [`Tensors::matrix`], and [`ModelError::Tensor`] when an element is not finite.
    pub fn vector(&mut self, name: &str, len: u64) -> Result<Vec<f32>, ModelError> {
        self.numbers(name, &[len])
    }

    /// A small tensor of any shape as f32.
    ///
    /// # Errors
    /// As [`Tensors::vector`].
    pub fn numbers(&mut self, name: &str, shape: &[u64]) -> Result<Vec<f32>, ModelError> {
        let (dtype, bytes) = self.take(name, shape)?;
        let (block, block_bytes) = dtype.block();
        let cols = bytes.len() / block_bytes as usize * block as usize;
        let bytes = Arc::new(bytes);
        let weight = Weight { dtype, rows: 1, cols, bytes, scales: Scales::One };
        let vector = dequantize(&weight, 0);
        match vector.iter().position(|x| !x.is_finite()) {
            None => Ok(vector),
            Some(i) => Err(self.refuse(name, format!("has {} at element {i}", vector[i]))),
        }
    }

    fn take(&mut self, name: &str, shape: &[u64]) -> Result<(WeightType, Vec<u8>), ModelError> {
        let (dtype, entry) = self.find(name, shape)?;
        let file = &self.files[entry.file];
        let bytes = file.read(entry.offset, entry.len)?.expect("add checked the file's length");
        self.known.insert(name.to_owned());
        Ok((dtype, bytes))
    }

    /// Whether a tensor is there, of this shape and of a type that is supported.
    ///
    /// # Errors
    /// [`ModelError::Tensor`].
    pub fn check(&self, name: &str, shape: &[u64]) -> Result<(), ModelError> {
        self.find(name, shape).map(drop)
    }

    fn find(&self, name: &str, shape: &[u64]) -> Result<(WeightType, &Entry), ModelError> {
        let Some(entry) = self.entries.get(name) else {
            let path = self.files.first().map_or(Path::new(""), |f| &f.path);
            let path = if self.files.len() > 1 { path.parent().unwrap_or(path) } else { path };
            return Err(ModelError::tensor(path, name, "is missing"));
        };
        let file = &self.files[entry.file];
        let refuse = |rule: String| Err(ModelError::tensor(&file.path, name, rule));
        if entry.shape != shape {
            return refuse(format!("has shape {:?}, expected {shape:?}", entry.shape));
        }
        let dtype = match &entry.dtype {
            StoredType::Known(dtype) => *dtype,
            StoredType::Other(found) => {
                let supported = WeightType::ALL.map(WeightType::name).join(", ");
                return refuse(format!("has type {found}, supported are {supported}"));
            }
        };
        let expected = stored_bytes(dtype, shape);
        if expected != Some(entry.len) {
            return refuse(format!(
                "of type {} and shape {shape:?} cannot be {} bytes long",
                dtype.name(),
                entry.len
            ));
        }
        Ok((dtype, entry))
    }

    /// SHA-256 over the tensor table in the order of names (name, type, shape) and the first and last 64 KiB
    /// of each tensor. How tensors are spread over files does not change it.
    ///
    /// # Errors
    /// [`ModelError::Io`].
    pub fn content_hash(&self) -> Result<[u8; 32], ModelError> {
        let mut hash = Sha256::new();
        for (name, entry) in &self.entries {
            let dtype = match &entry.dtype {
                StoredType::Known(dtype) => dtype.name(),
                StoredType::Other(name) => name,
            };
            for text in [name, dtype] {
                hash.update((text.len() as u64).to_le_bytes());
                hash.update(text);
            }
            hash.update((entry.shape.len() as u64).to_le_bytes());
            for extent in &entry.shape {
                hash.update(extent.to_le_bytes());
            }
            let len = entry.len.min(HASHED_ENDS);
            for offset in [entry.offset, entry.offset + entry.len - len] {
                let read = self.files[entry.file].read(offset, len)?;
                hash.update(read.expect("add checked the file's length"));
            }
        }
        Ok(hash.finalize().into())
    }
}

/// Bytes of a tensor of this type and shape (without extents it is one element); `None` when there is no such tensor.
pub fn stored_bytes(dtype: WeightType, shape: &[u64]) -> Option<u64> {
    let (cols, rows) = shape.split_last().unwrap_or((&1, &[]));
    let (block, bytes) = dtype.block();
    if !cols.is_multiple_of(block) {
        return None;
    }
    rows.iter().try_fold((cols / block).checked_mul(bytes)?, |n, r| n.checked_mul(*r))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_content_hash_does_not_depend_on_how_tensors_are_spread_over_files() {
        let folder = tempfile::tempdir().unwrap();
        let [one, two] = ["one", "two"].map(|f| folder.path().join(f));
        std::fs::write(&one, [1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        std::fs::write(&two, [9, 5, 6, 7, 8]).unwrap();
        let entry = |file, offset| {
            let dtype = StoredType::Known(WeightType::F32);
            Entry { file, dtype, shape: vec![1], offset, len: 4 }
        };
        let hash = |place: [(usize, u64); 2]| {
            let mut tensors = Tensors::default();
            tensors.add_file(TensorFile::open(&one).unwrap());
            tensors.add_file(TensorFile::open(&two).unwrap());
            for (name, (file, offset)) in ["a", "b"].into_iter().zip(place) {
                tensors.add(name, entry(file, offset)).unwrap();
            }
            tensors.content_hash().unwrap()
        };
        assert_eq!(hash([(0, 0), (0, 4)]), hash([(0, 0), (1, 1)]));
        assert_ne!(hash([(0, 0), (0, 4)]), hash([(0, 4), (0, 0)]));
    }

    #[test]
    fn sizes_that_do_not_fit_are_no_size() {
        assert_eq!(stored_bytes(WeightType::Q4_1, &[3, 64]), Some(120));
        assert_eq!(stored_bytes(WeightType::Q4_1, &[3, 33]), None);
        assert_eq!(stored_bytes(WeightType::F32, &[u64::MAX, 4]), None);
        assert_eq!(stored_bytes(WeightType::F32, &[]), Some(4));
        assert_eq!(stored_bytes(WeightType::Q8_0, &[]), None);
    }

    #[test]
    fn a_tensor_past_the_end_of_its_file_is_refused_with_its_place() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [0; 10]).unwrap();
        let mut tensors = Tensors::default();
        tensors.add_file(TensorFile::open(file.path()).unwrap());
        let dtype = StoredType::Known(WeightType::F32);
        for offset in [8, u64::MAX] {
            let entry = Entry { file: 0, dtype: dtype.clone(), shape: vec![1], offset, len: 4 };
            let e = tensors.add("x", entry).unwrap_err().to_string();
            assert!(e.contains(&format!("`x` of 4 bytes at byte {offset}")), "{e}");
            assert!(e.contains("at byte 10"), "{e}");
        }
    }
}
