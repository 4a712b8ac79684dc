//! Tiny random models, written once a test run.

use std::path::PathBuf;
use std::sync::OnceLock;

use baton_integration::tiny_model::TinyModel;
use tempfile::TempDir;

/// A tiny model on disk.
pub struct Tiny {
    pub path: PathBuf,
    pub name: String,
    pub vocab: u64,
}

/// One with 4 or 8 KV heads.
pub fn model(kv_heads: u32) -> Tiny {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| tempfile::tempdir().unwrap());
    let name = format!("tiny-{kv_heads}");
    let path = folder.path().join(&name);
    let tiny = TinyModel { kv_heads, ..TinyModel::default() };
    if !path.exists() {
        tiny.write(&path).unwrap();
    }
    Tiny { path, name, vocab: u64::from(tiny.vocab) }
}
