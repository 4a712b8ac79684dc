//! A hub id → a path: what the local cache has, else a download into it.
//!
//! The cache has the layout that other tools of the hub use (`models--OWNER--NAME` with `refs`, `snapshots`, `blobs`),
//! so that a model is downloaded once a machine. What is cached is used without asking the hub; a snapshot counts as
//! cached when its weights are whole, which are fetched last.

mod cache;
mod client;
mod download;

use std::path::PathBuf;
use std::time::Duration;

use cache::Repository;
use client::{Client, Listing};

/// Whether a worker needs it: names at the top of a repository.
const SMALL_FILES: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "hf_quant_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    WEIGHTS_INDEX,
];
const WEIGHTS: &str = "model.safetensors";
const WEIGHTS_INDEX: &str = "model.safetensors.index.json";

/// Which model: `OWNER/NAME`, `OWNER/NAME@REVISION`, `OWNER/NAME/FILE.gguf`, or both.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelId {
    /// Who put it there.
    pub owner: String,
    /// What it is called there.
    pub name: String,
    /// Branch, tag or commit; `None` = `main`.
    pub revision: Option<String>,
    /// One `.gguf` file of several.
    pub file: Option<String>,
}

/// Where the hub and the cache are.
#[derive(Clone, Debug)]
pub struct HubSettings {
    /// `models--…` are in it.
    pub cache: PathBuf,
    /// Scheme and host of the hub.
    pub endpoint: String,
    /// For models that are not everybody's.
    pub token: Option<String>,
    /// The hub is not asked.
    pub offline: bool,
    /// How long what may take.
    pub deadlines: Deadlines,
}

/// How long what may take, and how often it is tried.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// To a connection, and from a request to the head of its answer.
    pub answer: Duration,
    /// Between two pieces of a body.
    pub stall: Duration,
    /// Tries in a row that bring nothing.
    pub tries: u32,
    /// Between two of them.
    pub pause: Duration,
}

/// Why a model cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// A variable of the environment.
    #[error("`{key}` = `{value}` {rule}")]
    Environment {
        /// Its name.
        key: &'static str,
        /// Its value.
        value: String,
        /// What it must be.
        rule: &'static str,
    },
    /// It is not cached, and the hub may not be asked.
    #[error("`{id}` is not in the cache `{cache}`, and `HF_HUB_OFFLINE` forbids to download it")]
    Offline {
        /// The model.
        id: String,
        /// Where it is not.
        cache: String,
    },
    /// No answer, or one that breaks off again and again.
    #[error(
        "`{url}` cannot be reached: {reason} (`{id}` is no file or folder here, so it was looked for there; \
         another hub is `HF_ENDPOINT`)"
    )]
    Unreachable {
        /// The model.
        id: String,
        /// What was asked for.
        url: String,
        /// What went wrong.
        reason: String,
    },
    /// 401, 403.
    #[error("the hub does not give `{what}`: {rule} ({status} at `{url}`)")]
    Forbidden {
        /// Model, or file of it.
        what: String,
        /// What to do.
        rule: String,
        /// HTTP status.
        status: u16,
        /// What was asked for.
        url: String,
    },
    /// 404.
    #[error("the hub has no `{what}` (404 at `{url}`); a model here is a folder or a `.gguf` file")]
    NotFound {
        /// Model, revision or file.
        what: String,
        /// What was asked for.
        url: String,
    },
    /// An answer that was not expected.
    #[error("`{url}` answers {what}")]
    Answer {
        /// What was asked for.
        url: String,
        /// Status, or what is wrong with the answer.
        what: String,
    },
    /// The bytes are not those that were announced.
    #[error(
        "`{file}` is damaged: its SHA-256 is {found}, the hub says {expected}; nothing of it was kept"
    )]
    WrongHash {
        /// File of the model.
        file: String,
        /// Of what came.
        found: String,
        /// Of what was announced.
        expected: String,
    },
    /// The repository has nothing that can be run, or too much.
    #[error("`{id}` {rule}")]
    Files {
        /// The model.
        id: String,
        /// What is there and what is wanted.
        rule: String,
    },
    /// The cache cannot be read or written.
    #[error("the cache: cannot {what} `{path}`")]
    Cache {
        /// Verb.
        what: &'static str,
        /// File or folder.
        path: String,
        /// What the system says.
        source: std::io::Error,
    },
}

impl ModelId {
    /// Reads an id; `None` if it has not the form of one.
    pub fn parse(text: &str) -> Option<Self> {
        let (path, revision) = match text.split_once('@') {
            Some((path, revision)) => (path, Some(revision)),
            None => (text, None),
        };
        let mut parts = path.splitn(3, '/');
        let (owner, name, file) = (parts.next()?, parts.next()?, parts.next());
        let is_plain = |part: &str| {
            let legal = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
            (1..=96).contains(&part.len())
                && part.bytes().all(legal)
                && part.bytes().any(|b| b != b'.')
                && !part.starts_with(['-', '.'])
        };
        let is_path = |path: &str| path.len() <= 255 && path.split('/').all(is_plain);
        let is_gguf = |path: &str| path.ends_with(".gguf");
        let fits = is_plain(owner)
            && is_plain(name)
            && !is_gguf(name)
            && revision.is_none_or(is_path)
            && file.is_none_or(|file| is_path(file) && is_gguf(file));
        let owned = |part: &str| part.to_owned();
        fits.then(|| Self {
            owner: owned(owner),
            name: owned(name),
            revision: revision.map(owned),
            file: file.map(owned),
        })
    }

    /// `OWNER/NAME`.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.owner, self.name)
    }

    fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            answer: Duration::from_secs(20),
            stall: Duration::from_secs(30),
            tries: 5,
            pause: Duration::from_secs(2),
        }
    }
}

impl HubSettings {
    /// As the hub's own tools read the environment: `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME`, `HF_ENDPOINT`,
    /// `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HUB_OFFLINE`.
    ///
    /// # Errors
    /// [`HubError::Environment`].
    pub fn from_environment(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, HubError> {
        let set = |key: &str| lookup(key).filter(|value| !value.is_empty());
        let home = match (set("HF_HOME"), set("XDG_CACHE_HOME"), set("HOME")) {
            (Some(home), _, _) => PathBuf::from(home),
            (None, Some(cache), _) => PathBuf::from(cache).join("huggingface"),
            (None, None, Some(home)) => PathBuf::from(home).join(".cache/huggingface"),
            (None, None, None) => std::env::temp_dir().join("huggingface"),
        };
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        if !["http://", "https://"].iter().any(|scheme| endpoint.starts_with(scheme)) {
            let rule = "must begin with `http://` or `https://`";
            return Err(HubError::Environment { key: "HF_ENDPOINT", value: endpoint, rule });
        }
        let token_file = set("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        let token = set("HF_TOKEN").or_else(|| std::fs::read_to_string(token_file).ok());
        let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        if token.as_ref().is_some_and(|token| !token.bytes().all(|b| b.is_ascii_graphic())) {
            let rule = "must be printable characters";
            return Err(HubError::Environment { key: "HF_TOKEN", value: "…".into(), rule });
        }
        let yes = |value: String| {
            ["1", "ON", "YES", "TRUE"].contains(&value.to_ascii_uppercase().as_str())
        };
        Ok(Self {
            cache: set("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token,
            offline: set("HF_HUB_OFFLINE").is_some_and(yes),
            deadlines: Deadlines::default(),
        })
    }
}

/// The model's folder, or its `.gguf` file, on this machine.
///
/// # Errors
/// [`HubError`].
pub fn fetch(id: &ModelId, settings: &HubSettings) -> Result<PathBuf, HubError> {
    let repository = Repository::new(&settings.cache, id);
    let commit = repository.commit(id.revision())?;
    if let Some(found) = commit.as_deref().and_then(|commit| repository.model(commit, id)) {
        tracing::info!(path = %found.display(), "the model is in the cache");
        return Ok(found);
    }
    if settings.offline {
        let (id, cache) = (id.repository(), settings.cache.display().to_string());
        return Err(HubError::Offline { id, cache });
    }
    let client = Client::new(settings, id);
    // What a revision names is kept: the files of one snapshot are of one commit.
    let listing = client.list(commit.as_deref().unwrap_or(id.revision()))?;
    tracing::info!(
        id = id.repository(),
        commit = listing.commit,
        hub = settings.endpoint,
        "downloading the model"
    );
    for file in wanted(id, &listing)? {
        download::file(&client, &repository, &listing.commit, &file)?;
        if file == WEIGHTS_INDEX {
            for shard in shards(&repository, &listing, id)? {
                download::file(&client, &repository, &listing.commit, &shard)?;
            }
        }
    }
    if commit.is_none() && id.revision() != listing.commit {
        repository.set_commit(id.revision(), &listing.commit)?;
    }
    repository.model(&listing.commit, id).ok_or_else(|| HubError::Files {
        id: id.repository(),
        rule: "was downloaded and is not whole: was the cache changed meanwhile?".into(),
    })
}

/// Files in the order they are fetched: weights last.
fn wanted(id: &ModelId, listing: &Listing) -> Result<Vec<String>, HubError> {
    let refuse = |rule: String| Err(HubError::Files { id: id.repository(), rule });
    let has = |name: &str| listing.files.iter().any(|file| file == name);
    if let Some(file) = &id.file {
        return if has(file) {
            Ok(vec![file.clone()])
        } else {
            refuse(format!("has no `{file}`; it has {}", list(&ggufs(listing))))
        };
    }
    if has("config.json") && (has(WEIGHTS) || has(WEIGHTS_INDEX)) {
        let mut files: Vec<&str> = SMALL_FILES.into_iter().filter(|file| has(file)).collect();
        if has(WEIGHTS) {
            files.retain(|file| *file != WEIGHTS_INDEX);
            files.push(WEIGHTS);
        }
        return Ok(files.into_iter().map(str::to_owned).collect());
    }
    match ggufs(listing).as_slice() {
        [] => refuse(format!(
            "has neither `config.json` with `{WEIGHTS}` (or `{WEIGHTS_INDEX}`) nor a `.gguf` file"
        )),
        [one] => Ok(vec![one.clone()]),
        several => refuse(format!(
            "has several `.gguf` files: name one as `{}/FILE`: {}",
            id.repository(),
            list(several)
        )),
    }
}

/// The `.gguf` files at the top of a repository.
fn ggufs(listing: &Listing) -> Vec<String> {
    let is_top = |file: &&String| file.ends_with(".gguf") && !file.contains('/');
    listing.files.iter().filter(is_top).cloned().collect()
}

fn list(files: &[String]) -> String {
    if files.is_empty() { "none".to_owned() } else { files.join(", ") }
}

/// What the index, which was fetched, names.
fn shards(
    repository: &Repository,
    listing: &Listing,
    id: &ModelId,
) -> Result<Vec<String>, HubError> {
    let shards = repository.shards(&listing.commit)?;
    match shards.iter().find(|shard| !listing.files.contains(shard)) {
        None => Ok(shards),
        Some(missing) => Err(HubError::Files {
            id: id.repository(),
            rule: format!("has no `{missing}`, which its `{WEIGHTS_INDEX}` names"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_told_from_paths() {
        let id = ModelId::parse("TinyLlama/TinyLlama-1.1B-Chat-v1.0").unwrap();
        assert_eq!(
            (id.repository(), id.revision(), id.file.clone()),
            ("TinyLlama/TinyLlama-1.1B-Chat-v1.0".into(), "main", None)
        );
        let id = ModelId::parse("a/b-GGUF/q4/b.Q4_K_M.gguf@refs/pr/1").unwrap();
        assert_eq!((id.revision(), id.file.as_deref()), ("refs/pr/1", Some("q4/b.Q4_K_M.gguf")));
        for path in [
            "gpt2",
            "/a/b",
            "./a/b",
            "../b",
            "a/..",
            "a/b/c",
            "a/b.gguf",
            "a/b/../c.gguf",
            "a b/c",
            "a/",
            "",
            "a/b@",
            "a/b@../x",
            "a/b/@x",
            "a/.b",
            "-a/b",
            "a/b/x.bin",
        ] {
            assert_eq!(ModelId::parse(path), None, "{path}");
        }
    }

    #[test]
    fn the_environment_is_read_as_the_hubs_own_tools_do() {
        let with = |set: &'static [(&'static str, &'static str)]| {
            HubSettings::from_environment(move |key| {
                set.iter().find(|(name, _)| *name == key).map(|(_, value)| (*value).to_owned())
            })
        };
        let cache = |set| with(set).unwrap().cache.display().to_string();
        assert_eq!(cache(&[("HOME", "/h")]), "/h/.cache/huggingface/hub");
        assert_eq!(cache(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), "/x/huggingface/hub");
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/f")]), "/f/hub");
        assert_eq!(cache(&[("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")]), "/c");
        let plain = with(&[("HF_HOME", "/f")]).unwrap();
        assert_eq!(plain.endpoint, "https://huggingface.co");
        assert!(plain.token.is_none() && !plain.offline);
        let set = with(&[
            ("HF_HOME", "/f"),
            ("HF_ENDPOINT", "http://mirror/"),
            ("HF_TOKEN", " secret\n"),
            ("HF_HUB_OFFLINE", "1"),
        ]);
        let set = set.unwrap();
        assert_eq!((&*set.endpoint, set.token.as_deref()), ("http://mirror", Some("secret")));
        assert!(set.offline);
        let e = with(&[("HF_ENDPOINT", "mirror")]).unwrap_err().to_string();
        assert!(e.contains("`HF_ENDPOINT` = `mirror` must begin with"), "{e}");
        assert!(with(&[("HF_TOKEN", "a b")]).is_err());
    }
}
