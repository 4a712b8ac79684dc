//! Why a model cannot be loaded: each error names the file, and the setting or tensor in it.

use std::path::Path;

use baton_shared::text::gguf::GgufError;

/// Why a model cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The system refuses to open or read something.
    #[error("cannot read `{path}`")]
    Io {
        /// File or folder.
        path: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// The GGUF header is damaged or cut.
    #[error("`{path}` is no usable GGUF file")]
    Header {
        /// File.
        path: String,
        /// What is wrong where.
        source: GgufError,
    },
    /// The file or folder as a whole cannot be used.
    #[error("`{path}`: {rule}")]
    File {
        /// File or folder.
        path: String,
        /// What is wrong with it.
        rule: String,
    },
    /// A setting is missing, unusable or not supported.
    #[error("`{path}`: `{key}` {rule}")]
    Setting {
        /// File.
        path: String,
        /// GGUF metadata key or JSON member.
        key: String,
        /// What is found and what is allowed.
        rule: String,
    },
    /// A tensor is missing, unusable or not supported.
    #[error("`{path}`: tensor `{tensor}` {rule}")]
    Tensor {
        /// File, or folder where it is missing.
        path: String,
        /// Its name in the file.
        tensor: String,
        /// What is found and what is allowed; offsets are bytes from the start of the file.
        rule: String,
    },
    /// `engine.cpu_weights` wants weights narrower than they can be.
    #[error("`engine.cpu_weights`: {matrix} cannot be kept as {dtype}: {rule}")]
    Narrow {
        /// Which matrix.
        matrix: String,
        /// Type wanted.
        dtype: &'static str,
        /// Why not.
        rule: &'static str,
    },
}

impl ModelError {
    /// [`ModelError::Io`].
    pub(super) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.display().to_string(), source }
    }

    /// [`ModelError::File`].
    pub(super) fn file(path: &Path, rule: impl Into<String>) -> Self {
        Self::File { path: path.display().to_string(), rule: rule.into() }
    }

    /// [`ModelError::Setting`].
    pub(super) fn setting(path: &Path, key: &str, rule: impl Into<String>) -> Self {
        Self::Setting { path: path.display().to_string(), key: key.into(), rule: rule.into() }
    }

    /// [`ModelError::Tensor`].
    pub(super) fn tensor(path: &Path, tensor: &str, rule: impl Into<String>) -> Self {
        let (path, tensor) = (path.display().to_string(), tensor.into());
        Self::Tensor { path, tensor, rule: rule.into() }
    }
}
