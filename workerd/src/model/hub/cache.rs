//! One repository's folder in the hub's cache.
//!
//! `refs/REVISION` holds a commit, `blobs/ETAG` a file's bytes, `snapshots/COMMIT/FILE` links to a blob. A blob gets its
//! name when it is whole, a link is made after it: what is linked is whole, whoever made it.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{HubError, ModelId, WEIGHTS, WEIGHTS_INDEX};

/// Longest index, bytes.
const INDEX_LIMIT: u64 = 100 << 20;

/// A repository in the cache, be it there or not.
#[derive(Debug)]
pub struct Repository {
    folder: PathBuf,
    locks: PathBuf,
}

/// Held while a blob is fetched; other processes wait for it.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

#[derive(Deserialize)]
struct Index {
    weight_map: std::collections::BTreeMap<String, String>,
}

impl Repository {
    /// Of a model.
    pub fn new(cache: &Path, id: &ModelId) -> Self {
        let name = format!("models--{}--{}", id.owner, id.name);
        Self { folder: cache.join(&name), locks: cache.join(".locks").join(name) }
    }

    /// The commit that a revision named when it was last asked for.
    ///
    /// # Errors
    /// [`HubError::Cache`].
    pub fn commit(&self, revision: &str) -> Result<Option<String>, HubError> {
        if is_commit(revision) {
            return Ok(Some(revision.to_owned()));
        }
        let path = self.folder.join("refs").join(revision);
        match std::fs::read_to_string(&path) {
            Ok(commit) => Ok(Some(commit.trim().to_owned()).filter(|commit| is_commit(commit))),
            Err(e) if is_absent(&e) => Ok(None),
            Err(e) => Err(failed("read", &path, e)),
        }
    }

    /// Notes what a revision names.
    ///
    /// # Errors
    /// [`HubError::Cache`].
    pub fn set_commit(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        let path = self.folder.join("refs").join(revision);
        create_parent(&path)?;
        let new = path.with_extension(format!("{}.new", std::process::id()));
        std::fs::write(&new, commit).map_err(|e| failed("write", &new, e))?;
        std::fs::rename(&new, &path).map_err(|e| failed("write", &path, e))
    }

    /// The model of a commit, if all it needs is there.
    pub fn model(&self, commit: &str, id: &ModelId) -> Option<PathBuf> {
        let folder = self.folder.join("snapshots").join(commit);
        let has = |name: &str| folder.join(name).is_file();
        if let Some(file) = &id.file {
            return has(file).then(|| folder.join(file));
        }
        if has("config.json") {
            let weights = has(WEIGHTS) || {
                let shards = if has(WEIGHTS_INDEX) { self.shards(commit).ok() } else { None };
                shards.is_some_and(|shards| shards.iter().all(|shard| has(shard)))
            };
            return (weights && has("tokenizer.json")).then_some(folder);
        }
        let entries = std::fs::read_dir(&folder).ok()?.filter_map(Result::ok);
        let mut files = entries.map(|entry| entry.path()).filter(|path| {
            path.extension().is_some_and(|ending| ending == "gguf") && path.is_file()
        });
        let first = files.next();
        if files.next().is_some() { None } else { first }
    }

    /// The files that the index of a commit names.
    ///
    /// # Errors
    /// [`HubError::Cache`], also when the index is none.
    pub fn shards(&self, commit: &str) -> Result<Vec<String>, HubError> {
        let path = self.snapshot(commit, WEIGHTS_INDEX);
        let invalid = |rule: String| failed("use", &path, std::io::Error::other(rule));
        let about = std::fs::metadata(&path).map_err(|e| failed("read", &path, e))?;
        if about.len() > INDEX_LIMIT {
            return Err(invalid(format!("it is longer than {INDEX_LIMIT} bytes")));
        }
        let text = std::fs::read(&path).map_err(|e| failed("read", &path, e))?;
        let index: Index = serde_json::from_slice(&text).map_err(|e| invalid(e.to_string()))?;
        let mut shards: Vec<String> = index.weight_map.into_values().collect();
        shards.sort_unstable();
        shards.dedup();
        let is_plain = |name: &String| {
            name.ends_with(".safetensors")
                && Path::new(name).file_name().is_some_and(|f| *f == **name)
        };
        match shards.iter().find(|name| !is_plain(name)) {
            None => Ok(shards),
            Some(name) => Err(invalid(format!("`{name}` is no plain name of a safetensors file"))),
        }
    }

    /// Where a file of a commit is.
    pub fn snapshot(&self, commit: &str, file: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit).join(file)
    }

    /// Where the bytes are.
    pub fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// Waits until no other process fetches this blob.
    ///
    /// # Errors
    /// [`HubError::Cache`].
    pub fn lock(&self, etag: &str) -> Result<Lock, HubError> {
        let path = self.locks.join(format!("{etag}.lock"));
        create_parent(&path)?;
        create_parent(&self.blob(etag))?;
        let file = File::create(&path).map_err(|e| failed("create", &path, e))?;
        if file.try_lock().is_err() {
            tracing::info!(lock = %path.display(), "another process downloads the same file: waiting");
            file.lock().map_err(|e| failed("lock", &path, e))?;
        }
        Ok(Lock { _file: file })
    }

    /// Makes a whole blob a file of a commit.
    ///
    /// # Errors
    /// [`HubError::Cache`].
    pub fn link(&self, commit: &str, file: &str, etag: &str) -> Result<(), HubError> {
        let path = self.snapshot(commit, file);
        create_parent(&path)?;
        let up = "../".repeat(2 + file.matches('/').count());
        let new = path.with_extension(format!("{}.new", std::process::id()));
        std::os::unix::fs::symlink(format!("{up}blobs/{etag}"), &new)
            .and_then(|()| std::fs::rename(&new, &path))
            .map_err(|e| failed("link", &path, e))
    }
}

/// 40 hexadecimal digits.
pub fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// [`HubError::Cache`].
pub fn failed(what: &'static str, path: &Path, source: std::io::Error) -> HubError {
    HubError::Cache { what, path: path.display().to_string(), source }
}

fn is_absent(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{NotADirectory, NotFound};
    matches!(error.kind(), NotFound | NotADirectory)
}

fn create_parent(path: &Path) -> Result<(), HubError> {
    let Some(parent) = path.parent() else { return Ok(()) };
    std::fs::create_dir_all(parent).map_err(|e| failed("create", parent, e))
}
