//! A kernel source: its text with the prelude in front, and what it is compiled for.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// What a source may be compiled for.
pub const TARGETS: [Target; 3] = [
    Target { name: "compute_80", gpus: &["sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120"] },
    Target { name: "compute_89", gpus: &["sm_89", "sm_90a", "sm_100a", "sm_120"] },
    Target { name: "compute_90a", gpus: &["sm_90a"] },
];
/// What the first comment of a source holds.
const HEADER: &str = "Targets:";

/// A virtual architecture, and the GPUs that have to run its PTX.
#[derive(Debug)]
pub struct Target {
    /// As NVRTC calls it.
    pub name: &'static str,
    /// As ptxas calls them.
    pub gpus: &'static [&'static str],
}

/// One `NAME.cu`.
pub struct Source {
    /// Without `.cu`.
    pub name: String,
    /// The prelude and the source.
    pub text: String,
    /// At least one.
    pub targets: Vec<&'static Target>,
}

impl Source {
    /// The sources of a folder, by name.
    ///
    /// # Errors
    /// If a file cannot be read, or names no target.
    pub fn all(folder: &Path) -> Result<Vec<Self>> {
        let prelude = read(&folder.join("prelude.cuh"))?;
        let mut sources = Vec::new();
        for path in listing(folder)? {
            let is_source = path.extension().is_some_and(|extension| extension == "cu");
            let Some(name) = path.file_stem().filter(|_| is_source) else { continue };
            let name = name.to_string_lossy().into_owned();
            let source = read(&path)?;
            let targets = targets(&source).with_context(|| path.display().to_string())?;
            let text =
                format!("#line 1 \"prelude.cuh\"\n{prelude}\n#line 1 \"{name}.cu\"\n{source}");
            sources.push(Self { name, text, targets });
        }
        Ok(sources)
    }
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| path.display().to_string())
}

/// The paths in a folder, sorted; none if there is no such folder.
///
/// # Errors
/// If it cannot be read.
pub fn listing(folder: &Path) -> Result<Vec<PathBuf>> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let paths: std::io::Result<Vec<PathBuf>> = entries.map(|entry| Ok(entry?.path())).collect();
    let mut paths = paths.with_context(|| folder.display().to_string())?;
    paths.sort();
    Ok(paths)
}

/// What the first comment of a source says that it is compiled for.
fn targets(source: &str) -> Result<Vec<&'static Target>> {
    let comment = source.lines().map_while(|line| line.strip_prefix("//"));
    let Some(names) = comment.filter_map(|line| line.trim().strip_prefix(HEADER)).next() else {
        bail!("the first comment needs a line `// {HEADER} compute_80`");
    };
    let named = names.split([' ', ',']).filter(|name| !name.is_empty());
    let targets: Result<Vec<_>> = named
        .map(|name| {
            TARGETS.iter().find(|target| target.name == name).with_context(|| {
                let known: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
                format!("`{HEADER}` names `{name}`, which is none of {}", known.join(", "))
            })
        })
        .collect();
    let targets = targets?;
    if targets.is_empty() {
        bail!("`{HEADER}` names nothing");
    }
    Ok(targets)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(source: &str) -> Result<Vec<&str>> {
        Ok(targets(source)?.iter().map(|target| target.name).collect())
    }

    #[test]
    fn the_first_comment_names_the_targets() {
        let source = "// Adds.\n// Targets: compute_80, compute_90a\nint x;";
        assert_eq!(names(source).unwrap(), ["compute_80", "compute_90a"]);
    }

    #[test]
    fn a_source_without_targets_is_refused_and_told_what_is_missing() {
        for (source, told) in [
            ("int x;\n// Targets: compute_80", "needs a line"),
            ("// Targets: compute_70", "`compute_70`, which is none of compute_80,"),
            ("// Targets:", "names nothing"),
        ] {
            let error = names(source).unwrap_err().to_string();
            assert!(error.contains(told), "{source}: {error}");
        }
    }
}
