//! Reads configuration files: TOML is ours, `.yaml`/`.yml` is TensorRT-LLM's. A mistake names file, line, key,
//! value and rule, and ends the process with exit code [`EXIT_CODE`].
//!
//! [`document`] knows where each key stands, [`mistake`] turns a parser's error into a rule, [`units`] and
//! [`net`] are the values that more than one section uses, [`trtllm`] reads upstream's files. What the sections
//! are is each daemon's business.

pub mod document;
mod mistake;
pub mod net;
pub mod trtllm;
pub mod units;
mod yaml;

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

pub use document::Document;
pub use mistake::nearest;

/// Exit code of a daemon that was given a bad configuration (`EX_CONFIG`).
pub const EXIT_CODE: u8 = 78;

/// One mistake in a configuration file or on the command line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.describe())]
pub struct ConfigError {
    /// The file; `None` = the command line, or a text that came over the network.
    pub file: Option<PathBuf>,
    /// 1-based.
    pub line: Option<usize>,
    /// Dotted path, `handover.pull_timeout`; empty where no key is to blame.
    pub key: String,
    /// As written, shortened; never a secret.
    pub value: Option<String>,
    /// What must hold, and what to do.
    pub rule: String,
}

impl ConfigError {
    /// A mistake that no line of a file is to blame for, such as one on the command line.
    pub fn new(key: impl Into<String>, rule: impl Into<String>) -> Self {
        Self { file: None, line: None, key: key.into(), value: None, rule: rule.into() }
    }

    /// The same, with the value that was given.
    pub fn with_value(self, value: impl Into<String>) -> Self {
        Self { value: Some(value.into()), ..self }
    }

    /// The same without its value.
    fn without_value(self) -> Self {
        Self { value: None, ..self }
    }

    /// `FILE:LINE: `key` = `value`: rule`.
    fn describe(&self) -> String {
        let place = match (&self.file, self.line) {
            (Some(file), Some(line)) => format!("{}:{line}: ", file.display()),
            (Some(file), None) => format!("{}: ", file.display()),
            (None, Some(line)) => format!("line {line}: "),
            (None, None) => String::new(),
        };
        match &self.value {
            Some(value) if self.key.is_empty() => format!("{place}`{value}`: {}", self.rule),
            Some(value) => format!("{place}`{}` = `{value}`: {}", self.key, self.rule),
            None if self.key.is_empty() => format!("{place}{}", self.rule),
            None => format!("{place}`{}`: {}", self.key, self.rule),
        }
    }
}

/// Whether a file of this name is read as TensorRT-LLM's YAML.
pub fn is_yaml(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending == "yaml" || ending == "yml")
}

/// Reads one of our own files. To check more than types say, take [`Document::read_toml`] and
/// [`Document::parse`], and build errors with [`Document::error`].
pub fn load_toml<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    Document::read_toml(path)?.parse()
}

/// The text of a configuration file, at most 4 MiB.
pub fn read_text(path: &Path) -> Result<String, ConfigError> {
    const LARGEST: u64 = 4 << 20;
    let refuse = |rule: String| ConfigError {
        file: Some(path.to_owned()),
        line: None,
        key: String::new(),
        value: None,
        rule,
    };
    let cannot_read = |error: std::io::Error| refuse(format!("cannot read this file: {error}"));
    let about = std::fs::metadata(path).map_err(cannot_read)?;
    if about.is_dir() {
        return Err(refuse("is a directory, must be a file".to_owned()));
    }
    if about.len() > LARGEST {
        return Err(refuse(format!("has {} bytes, at most {LARGEST} are read", about.len())));
    }
    let bytes = std::fs::read(path).map_err(cannot_read)?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let line = 1 + error.as_bytes()[..at].iter().filter(|byte| **byte == b'\n').count();
        ConfigError { line: Some(line), ..refuse("is not UTF-8 text".to_owned()) }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_and_a_directory_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("none.toml");
        let error = load_toml::<toml::Table>(&missing).unwrap_err().to_string();
        assert!(error.starts_with(&missing.display().to_string()), "{error}");
        assert!(error.contains("No such file"), "{error}");
        let error = load_toml::<toml::Table>(folder.path()).unwrap_err().to_string();
        assert!(error.contains("is a directory"), "{error}");
    }

    #[test]
    fn a_file_that_is_not_text_is_refused_with_its_line() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("x.toml");
        std::fs::write(&file, b"a = 1\nb = \xff\n").unwrap();
        let error = load_toml::<toml::Table>(&file).unwrap_err();
        assert_eq!((error.line, error.rule.as_str()), (Some(2), "is not UTF-8 text"));
    }

    #[test]
    fn only_yaml_names_are_upstreams() {
        assert!(is_yaml(Path::new("a/disagg_config.yaml")) && is_yaml(Path::new("x.yml")));
        assert!(!is_yaml(Path::new("router.toml")) && !is_yaml(Path::new("yaml")));
    }
}
