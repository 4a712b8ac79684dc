//! Tiny random models, written once a test run.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, PoisonError};

use baton_integration::tiny_model::{TinyArchitecture, TinyModel, TinyRope};

/// A tiny model on disk.
pub struct Tiny {
    pub path: PathBuf,
    pub name: String,
    pub vocab: u64,
}

/// A Llama with 4 or 8 KV heads.
pub fn model(kv_heads: u32) -> Tiny {
    written(format!("tiny-{kv_heads}"), &TinyModel { kv_heads, ..TinyModel::default() })
}

/// One of another architecture, as a folder or (a name that ends in `.gguf`) a file.
pub fn of(architecture: TinyArchitecture, rope: TinyRope, name: &str) -> Tiny {
    written(name.to_owned(), &TinyModel { architecture, rope, ..TinyModel::default() })
}

fn written(name: String, tiny: &TinyModel) -> Tiny {
    static WRITTEN: LazyLock<Mutex<HashSet<String>>> = LazyLock::new(Mutex::default);
    // Held while writing, so that nobody reads half a model.
    let mut written = WRITTEN.lock().unwrap_or_else(PoisonError::into_inner);
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(&name);
    let stem = name.strip_suffix(".gguf");
    if written.insert(name.clone()) {
        match stem {
            None => tiny.write(&path).unwrap(),
            Some(_) => tiny.write_gguf(&path).unwrap(),
        }
    }
    let name = stem.unwrap_or(&name).to_owned();
    Tiny { path, name, vocab: u64::from(tiny.vocab) }
}
