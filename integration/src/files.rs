//! Where the binaries, the demo model and the Python client of a source tree are.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The tree's top folder.
pub fn top() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().map_or_else(|| here.to_owned(), Path::to_owned)
}

/// A path below `.deps`.
///
/// # Errors
/// If it is not there: it says how to get it.
pub fn dep(relative: &str) -> Result<PathBuf> {
    let path = top().join(".deps").join(relative);
    path.canonicalize().with_context(|| format!("{} is missing: run `make setup`", path.display()))
}

/// The demo model.
///
/// # Errors
/// As [`dep`].
pub fn demo_model() -> Result<PathBuf> {
    dep("models/SmolLM2-135M-Instruct.Q4_1.gguf")?;
    // Not the canonical path: the served name is made from the file's own name.
    Ok(top().join(".deps/models/SmolLM2-135M-Instruct.Q4_1.gguf"))
}

/// A model that `integration/optional-models.sh` fetches, if it was to be had.
pub fn optional_model(name: &str) -> Option<PathBuf> {
    let path = top().join(".deps/models").join(name);
    path.is_file().then_some(path)
}

/// A binary of this build, `baton-router` or `examples/embed`: beside the running one, or one folder up (tests run from `deps/`).
///
/// # Errors
/// If it was not built.
pub fn binary(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("where this program is")?;
    own.ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .with_context(|| {
            format!("`{name}` was not built: run `cargo build --release --bins --examples`")
        })
}
