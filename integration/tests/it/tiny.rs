//! Tiny random models, written once a test run.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, PoisonError};

use baton_integration::tiny_model::TinyModel;

/// A tiny model on disk.
pub struct Tiny {
    pub path: PathBuf,
    pub name: String,
    pub vocab: u64,
}

/// One with 4 or 8 KV heads.
pub fn model(kv_heads: u32) -> Tiny {
    static WRITTEN: LazyLock<Mutex<HashSet<u32>>> = LazyLock::new(Mutex::default);
    // Held while writing, so that nobody reads half a model.
    let mut written = WRITTEN.lock().unwrap_or_else(PoisonError::into_inner);
    let name = format!("tiny-{kv_heads}");
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(&name);
    let tiny = TinyModel { kv_heads, ..TinyModel::default() };
    if written.insert(kv_heads) {
        tiny.write(&path).unwrap();
    }
    Tiny { path, name, vocab: u64::from(tiny.vocab) }
}
