//! One file of a model into the cache: what came of it before a cut is kept, and what is whole is checked.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::HubError;
use super::cache::{Repository, failed};
use super::client::{About, Client, Refusal};
use crate::model::progress::Progress;

/// Bytes read at a time.
const PIECE: usize = 256 << 10;

/// Fetches a file of a commit, unless it is there.
///
/// # Errors
/// [`HubError`].
pub fn file(
    client: &Client,
    repository: &Repository,
    commit: &str,
    name: &str,
) -> Result<(), HubError> {
    if repository.snapshot(commit, name).is_file() {
        return Ok(());
    }
    let about = client.about(commit, name)?;
    let blob = repository.blob(&about.etag);
    let lock = repository.lock(&about.etag)?;
    if !blob.is_file() {
        let mut partial = Partial::open(blob.with_extension("incomplete"))?;
        partial.complete(client, commit, name, &about)?;
        partial.check(name, &about)?;
        std::fs::rename(&partial.path, &blob).map_err(|e| failed("rename", &partial.path, e))?;
    }
    drop(lock);
    repository.link(commit, name, &about.etag)
}

/// The first bytes of a file.
struct Partial {
    path: PathBuf,
    file: File,
    len: u64,
    hash: Sha256,
}

impl Partial {
    fn open(path: PathBuf) -> Result<Self, HubError> {
        let options = File::options().read(true).write(true).create(true).truncate(false).clone();
        let file = options.open(&path).map_err(|e| failed("open", &path, e))?;
        let mut partial = Self { path, file, len: 0, hash: Sha256::new() };
        let mut piece = vec![0; PIECE];
        loop {
            let read = partial.file.read(&mut piece);
            match read.map_err(|e| failed("read", &partial.path, e))? {
                0 => return Ok(partial),
                n => {
                    partial.len += n as u64;
                    partial.hash.update(&piece[..n]);
                }
            }
        }
    }

    /// Forgets all.
    fn empty(&mut self) -> Result<(), HubError> {
        self.len = 0;
        self.hash = Sha256::new();
        self.file
            .set_len(0)
            .and_then(|()| self.file.seek(SeekFrom::Start(0)).map(drop))
            .map_err(|e| failed("empty", &self.path, e))
    }

    /// Fetches what is missing, in as many tries as it takes while each brings something.
    fn complete(
        &mut self,
        client: &Client,
        commit: &str,
        name: &str,
        about: &About,
    ) -> Result<(), HubError> {
        if self.len > about.size {
            self.empty()?;
        }
        if self.len > 0 {
            tracing::info!(file = name, bytes = self.len, of = about.size, "resuming");
        }
        let mut progress = Progress::new(format!("downloading {name}"), about.size, self.len);
        let mut in_vain = 0;
        while self.len < about.size {
            let before = self.len;
            let reason = match self.attempt(client, commit, name, about, &mut progress)? {
                None => continue,
                Some(reason) => reason,
            };
            in_vain = if self.len > before { 0 } else { in_vain + 1 };
            tracing::warn!(
                file = name,
                bytes = self.len,
                of = about.size,
                reason,
                "the download broke off"
            );
            if in_vain == client.deadlines.tries {
                return Err(client.unreachable(&client.file_url(commit, name), reason));
            }
            client.pause();
        }
        Ok(())
    }

    /// One connection. What went wrong, if it was not over.
    fn attempt(
        &mut self,
        client: &Client,
        commit: &str,
        name: &str,
        about: &About,
        progress: &mut Progress,
    ) -> Result<Option<String>, HubError> {
        let part = match client.part(commit, name, self.len) {
            Ok(part) => part,
            Err(Refusal::Passing(reason)) => return Ok(Some(reason)),
            Err(Refusal::Final(error)) => return Err(error),
        };
        if part.start < self.len {
            self.empty()?;
        }
        let mut body = part.body.into_reader();
        let mut piece = vec![0; PIECE];
        loop {
            match body.read(&mut piece) {
                Ok(0) if self.len < about.size => return Ok(Some("the connection was cut".into())),
                Ok(0) => return Ok(None),
                Ok(n) => {
                    if self.len + n as u64 > about.size {
                        self.empty()?;
                        let what = format!("with more than the {} bytes it announced", about.size);
                        return Err(HubError::Answer { url: client.file_url(commit, name), what });
                    }
                    self.file.write_all(&piece[..n]).map_err(|e| failed("write", &self.path, e))?;
                    self.hash.update(&piece[..n]);
                    self.len += n as u64;
                    progress.add(n as u64);
                }
                Err(error) => return Ok(Some(error.to_string())),
            }
        }
    }

    /// Whether it is what was announced; if not, nothing of it stays.
    fn check(&mut self, name: &str, about: &About) -> Result<(), HubError> {
        self.file.sync_all().map_err(|e| failed("write", &self.path, e))?;
        // Small files have another kind of etag, which is no hash of their bytes alone.
        let is_sha256 = about.etag.len() == 64 && about.etag.bytes().all(|b| b.is_ascii_hexdigit());
        let found = hex(&self.hash.finalize_reset());
        if is_sha256 && !found.eq_ignore_ascii_case(&about.etag) {
            remove(&self.path)?;
            let (file, expected) = (name.to_owned(), about.etag.clone());
            return Err(HubError::WrongHash { file, found, expected });
        }
        Ok(())
    }
}

fn remove(path: &Path) -> Result<(), HubError> {
    std::fs::remove_file(path).map_err(|e| failed("remove", path, e))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
