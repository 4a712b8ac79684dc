//! Reads configuration files: TOML is ours, `.yaml`/`.yml` is TensorRT-LLM's. A mistake names file, line, key,
//! value and rule, and ends the process with exit code 78.

pub mod net;
pub mod trtllm;
pub mod units;

use std::path::PathBuf;

/// One mistake in a configuration file or on the command line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.describe())]
pub struct ConfigError {
    /// The file; `None` = the command line.
    pub file: Option<PathBuf>,
    /// 1-based.
    pub line: Option<usize>,
    /// Dotted path, `handover.pull_timeout`.
    pub key: String,
    /// As written, shortened.
    pub value: Option<String>,
    /// What must hold, and what to do.
    pub rule: String,
}

impl ConfigError {
    /// `FILE:LINE: `key` = `value`: rule`.
    fn describe(&self) -> String {
        let place = match (&self.file, self.line) {
            (Some(file), Some(line)) => format!("{}:{line}: ", file.display()),
            (Some(file), None) => format!("{}: ", file.display()),
            (None, _) => String::new(),
        };
        match &self.value {
            Some(value) => format!("{place}`{}` = `{value}`: {}", self.key, self.rule),
            None => format!("{place}`{}`: {}", self.key, self.rule),
        }
    }
}
