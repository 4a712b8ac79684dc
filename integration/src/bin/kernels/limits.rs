//! `limits.toml`: the most registers that a thread of each kernel may use, so that a change that costs some is seen.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};

use super::ptxas::Kernel;
use super::source::Source;

/// Beside the sources.
pub const FILE: &str = "limits.toml";
const HEADER: &str = "# Most registers that a thread of each kernel may use on any GPU; written by `make kernels`.\n\n";

/// Registers by source and kernel.
#[derive(Debug, Default)]
pub struct Limits {
    sources: BTreeMap<String, BTreeMap<String, u32>>,
}

impl Limits {
    /// The limits kept in a folder; none if it has no such file.
    ///
    /// # Errors
    /// If the file is not what this program writes.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        if !path.exists() {
            return Ok(Self::default());
        }
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let sources = toml::from_str(&text).with_context(|| path.display().to_string())?;
        Ok(Self { sources })
    }

    /// Keeps them in a folder.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(FILE);
        let text = format!("{HEADER}{}", toml::to_string(&self.sources)?);
        std::fs::write(&path, text).with_context(|| path.display().to_string())
    }

    /// Forgets the kernels of `source`.
    pub fn forget(&mut self, source: &str) {
        self.sources.remove(source);
    }

    /// Allows `kernel` as many registers as it uses.
    pub fn raise(&mut self, source: &str, kernel: &Kernel) {
        let limits = self.sources.entry(source.to_owned()).or_default();
        let limit = limits.entry(kernel.name.clone()).or_default();
        *limit = kernel.registers.max(*limit);
    }

    /// What is wrong with the registers of `kernel` on `gpu`.
    pub fn excess(&self, source: &str, kernel: &Kernel, gpu: &str) -> Option<String> {
        let name = &kernel.name;
        match self.sources.get(source).and_then(|limits| limits.get(name)) {
            None => Some(format!("{FILE}: [{source}] lacks `{name}`: `make kernels`")),
            Some(limit) => (kernel.registers > *limit).then(|| {
                format!(
                    "{FILE}: [{source}] allows `{name}` {limit} registers, it uses {} on {gpu}",
                    kernel.registers
                )
            }),
        }
    }

    /// The names of those that have no source.
    pub fn without(&self, sources: &[Source]) -> Vec<String> {
        let has_none = |name: &&String| !sources.iter().any(|source| source.name == **name);
        self.sources.keys().filter(has_none).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_may_use_what_it_used_on_its_hungriest_gpu_and_no_more() {
        let kernel = |registers| Kernel { name: "add".to_owned(), registers, ..Kernel::default() };
        let mut limits = Limits::default();
        assert!(limits.excess("sums", &kernel(1), "sm_80").unwrap().contains("lacks `add`"));
        limits.raise("sums", &kernel(40));
        limits.raise("sums", &kernel(32));
        assert_eq!(limits.excess("sums", &kernel(40), "sm_80"), None);
        assert!(
            limits
                .excess("sums", &kernel(41), "sm_80")
                .unwrap()
                .contains("allows `add` 40 registers")
        );
        let folder = tempfile::tempdir().unwrap();
        limits.write(folder.path()).unwrap();
        let read = Limits::read(folder.path()).unwrap();
        assert_eq!(read.excess("sums", &kernel(40), "sm_80"), None);
        assert_eq!(read.without(&[]), ["sums"]);
    }
}
