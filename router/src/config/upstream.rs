//! TensorRT-LLM's `disagg_config.yaml` as a configuration of ours.

use std::path::Path;

use baton_shared::config::ConfigError;

use crate::cli::Loaded;

/// Reads `disagg_config.yaml`.
///
/// # Errors
/// The first mistake.
pub fn load(path: &Path) -> Result<Loaded, ConfigError> {
    Err(ConfigError::new("", "TensorRT-LLM's YAML is not available yet")
        .with_value(path.display().to_string()))
}
