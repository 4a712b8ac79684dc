//! `disagg_config.yaml`: where the servers are, how they are picked, and what a launcher gives them.

use std::collections::HashSet;
use std::path::Path;

use super::keys::{self, DISAGG, WORKER};
use super::worker::{WorkerSettings, join_path};
use crate::config::net::Endpoint;
use crate::config::yaml::{Node, Yaml};
use crate::config::{ConfigError, Document, read_text};

/// A `disagg_config.yaml`, checked.
#[derive(Clone, Debug)]
pub struct DisaggConfig {
    /// Where the router listens; `localhost` by default.
    pub hostname: String,
    /// 8000 by default.
    pub port: u16,
    /// Tries after the first, per phase; 1 by default.
    pub max_retries: u32,
    /// Bits of the ids this router mints.
    pub node_id: Option<u8>,
    /// Prompts of at most so many tokens go to one generation server; 0, the default, = none.
    pub max_local_prefill_length: u64,
    /// Shared secret of router and workers.
    pub internal_request_auth_key: Option<String>,
    /// Servers of the first phase; at least one.
    pub context: ServerSection,
    /// Servers of the second phase; at least one.
    pub generation: ServerSection,
    /// Dotted keys that were accepted without effect, for one warning.
    pub without_effect: Vec<String>,
    /// For errors found later.
    pub document: Document,
}

/// `context_servers` or `generation_servers`.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerSection {
    /// In the file's order, without duplicates.
    pub urls: Vec<Endpoint>,
    /// How one of them is picked.
    pub router: LoadBalancing,
    /// What a launcher gives each worker; the file's own keys where the section leaves one out.
    pub worker: WorkerSettings,
}

/// `router.type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadBalancing {
    /// In turn.
    RoundRobin,
    /// The least loaded first.
    LeastLoaded {
        /// Whether load is prompt tokens rather than requests.
        use_tokens: bool,
    },
    /// The least loaded that has the most of the prompt.
    KvCacheAware {
        /// Whether load is prompt tokens rather than requests.
        use_tokens: bool,
    },
    /// The one the conversation went to before.
    Conversation,
}

impl DisaggConfig {
    /// Reads a file.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        Self::parse(Some(path), read_text(path)?)
    }

    /// Reads a text; `file` is what errors name.
    pub fn parse(file: Option<&Path>, text: String) -> Result<Self, ConfigError> {
        let file = Yaml::parse(file.map(Path::to_owned), text)?;
        let mut without_effect = Vec::new();
        keys::check(&file, "", &[DISAGG, WORKER], &mut without_effect)?;
        let shared = WorkerSettings::of_section(&file, "")?;
        let whole = |key, high| file.whole(key, 0..=high);
        Ok(Self {
            hostname: file.text("hostname")?.unwrap_or_else(|| "localhost".to_owned()),
            port: narrow(whole("port", i64::from(u16::MAX))?).unwrap_or(8000),
            max_retries: narrow(whole("max_retries", 100)?).unwrap_or(1),
            node_id: narrow(whole("node_id", i64::from(u8::MAX))?),
            max_local_prefill_length: narrow(whole(
                "conditional_disagg_config.max_local_prefill_length",
                i64::from(u32::MAX),
            )?)
            .unwrap_or(0),
            internal_request_auth_key: shared.internal_request_auth_key.clone(),
            context: section(&file, "context_servers", &shared)?,
            generation: section(&file, "generation_servers", &shared)?,
            without_effect,
            document: file.document,
        })
    }
}

/// A number that was checked to fit.
fn narrow<T: TryFrom<i64>>(number: Option<i64>) -> Option<T> {
    number.and_then(|number| T::try_from(number).ok())
}

fn section(file: &Yaml, name: &str, shared: &WorkerSettings) -> Result<ServerSection, ConfigError> {
    check_contradictions(file, name)?;
    Ok(ServerSection {
        urls: urls(file, name)?,
        router: load_balancing(file, name)?,
        worker: WorkerSettings::of_section(file, name)?.or(shared),
    })
}

/// A key of the whole file is inherited by both sections; a section may repeat it, not change it.
fn check_contradictions(file: &Yaml, name: &str) -> Result<(), ConfigError> {
    let (Node::Map(top), Some(Node::Map(own))) = (&file.root, file.get(name)) else {
        return Ok(());
    };
    for (key, value) in own {
        let is_changed = |(other, node): &(String, Node)| other == key && node != value;
        if top.iter().any(is_changed) {
            let rule = format!("is also set for the whole file, to another value (`{key}`)");
            return Err(file.document.error(&join_path(name, key), rule));
        }
    }
    Ok(())
}

fn urls(file: &Yaml, name: &str) -> Result<Vec<Endpoint>, ConfigError> {
    let key = join_path(name, "urls");
    let texts = file.texts(&key)?;
    if texts.is_empty() {
        return Err(file.document.error(&key, "must list at least one server, `host:port`"));
    }
    let mut seen = HashSet::new();
    let mut urls = Vec::with_capacity(texts.len());
    for (index, text) in texts.iter().enumerate() {
        let refuse = |rule: String| file.document.error(&format!("{key}[{index}]"), rule);
        let url: Endpoint = text.parse().map_err(|error| refuse(format!("{error}")))?;
        if !seen.insert(url.clone()) {
            return Err(refuse("is listed twice".to_owned()));
        }
        urls.push(url);
    }
    let count_key = join_path(name, "num_instances");
    let count = file.whole(&count_key, 0..=i64::from(u32::MAX))?;
    if count.is_some_and(|count| usize::try_from(count) != Ok(urls.len())) {
        let rule = format!("must be the number of `urls`, {}", urls.len());
        return Err(file.document.error(&count_key, rule));
    }
    Ok(urls)
}

fn load_balancing(file: &Yaml, name: &str) -> Result<LoadBalancing, ConfigError> {
    let key = join_path(name, "router.type");
    let use_tokens = file.flag(&join_path(name, "router.use_tokens"))?.unwrap_or(false);
    let kind = file.text(&key)?.unwrap_or_else(|| "round_robin".to_owned());
    let rule = match kind.to_ascii_lowercase().as_str() {
        "round_robin" => return Ok(LoadBalancing::RoundRobin),
        "load_balancing" => return Ok(LoadBalancing::LeastLoaded { use_tokens }),
        "kv_cache_aware" => return Ok(LoadBalancing::KvCacheAware { use_tokens }),
        "conversation" => return Ok(LoadBalancing::Conversation),
        _ => "must be `round_robin`, `load_balancing`, `kv_cache_aware` or `conversation`",
    };
    Err(file.document.error(&key, rule))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<DisaggConfig, ConfigError> {
        DisaggConfig::parse(Some(Path::new("d.yaml")), text.to_owned())
    }

    fn with(more: &str) -> String {
        format!("context_servers:\n  urls: ['a:1']\ngeneration_servers:\n  urls: ['b:2']\n{more}")
    }

    #[test]
    fn a_file_without_extras_has_upstreams_defaults() {
        let config = parse(&with("")).unwrap();
        assert_eq!((config.hostname.as_str(), config.port), ("localhost", 8000));
        assert_eq!((config.max_retries, config.node_id), (1, None));
        assert_eq!(config.context.router, LoadBalancing::RoundRobin);
        assert_eq!(config.generation.urls, ["b:2".parse().unwrap()]);
        assert!(config.without_effect.is_empty());
    }

    #[test]
    fn worker_keys_reach_both_sections() {
        let config = parse(
            "model: M\nbackend: pytorch\nport: 9\nmax_retries: 0\nnode_id: 7\nmax_seq_len: 100\n\
             context_servers:\n  num_instances: 2\n  urls: ['a:1', 'http://a:2']\n  max_batch_size: 4\n\
             \x20 kv_cache_config:\n    free_gpu_memory_fraction: 0.9\n  router: {type: load_balancing, use_tokens: yes}\n\
             generation_servers:\n  urls: ['b:2']\n  tensor_parallel_size: 1\n",
        )
        .unwrap();
        assert_eq!((config.port, config.max_retries, config.node_id), (9, 0, Some(7)));
        assert_eq!(config.context.router, LoadBalancing::LeastLoaded { use_tokens: true });
        assert_eq!(config.context.worker.model.as_deref(), Some("M"));
        assert_eq!(config.generation.worker.model.as_deref(), Some("M"));
        assert_eq!(config.context.worker.max_batch_size.map(|count| count.get()), Some(4));
        assert_eq!(config.generation.worker.max_batch_size, None);
        assert_eq!(config.generation.worker.max_seq_len.map(|count| count.get()), Some(100));
        assert_eq!(config.without_effect, ["backend", "generation_servers.tensor_parallel_size"]);
    }

    #[test]
    fn each_of_upstreams_routers_is_accepted_with_its_arguments() {
        for (router, expected) in [
            ("{type: round_robin}", LoadBalancing::RoundRobin),
            ("{type: Load_Balancing}", LoadBalancing::LeastLoaded { use_tokens: false }),
            (
                "{type: kv_cache_aware, use_tokens: true, max_batch_size: 64, tokens_per_block: 32, load_weight: 0.25}",
                LoadBalancing::KvCacheAware { use_tokens: true },
            ),
            (
                "{type: conversation, match_threshold: 0.75, tokens_per_block: 128, hash_skip_count: 0, max_sessions: 9}",
                LoadBalancing::Conversation,
            ),
        ] {
            let text = format!(
                "context_servers:\n  urls: ['a:1']\n  router: {router}\ngeneration_servers:\n  urls: ['b:2']\n"
            );
            assert_eq!(parse(&text).unwrap().context.router, expected, "{router}");
        }
    }

    #[test]
    fn mistakes_name_line_key_and_rule() {
        for (text, said) in [
            (with("prot: 8000\n"), "d.yaml:5: `prot`: unknown key, did you mean `port`?"),
            (
                with("port: 70000\n"),
                "d.yaml:5: `port` = `70000`: must be a whole number from 0 to 65535",
            ),
            (
                with("schedule_style: generation_first\n"),
                "d.yaml:5: `schedule_style` = `generation_first`: only `context_first` is available yet",
            ),
            (
                with("conditional_disagg_config:\n  max_local_prefill_length: -1\n"),
                "d.yaml:6: `conditional_disagg_config.max_local_prefill_length` = `-1`: must be a whole number from 0 to 4294967295",
            ),
            (
                "context_servers:\n  urls: ['a:1']\n".to_owned(),
                "d.yaml: `generation_servers.urls`: must list at least one server, `host:port`",
            ),
            (
                "generation_servers:\n  urls: ['a:1']\ncontext_servers:\n  num_instances: 3\n  urls:\n  - 'a:1'\n".to_owned(),
                "d.yaml:4: `context_servers.num_instances` = `3`: must be the number of `urls`, 1",
            ),
            (
                "context_servers:\n  urls: ['a:1', 'a:1']\n".to_owned(),
                "d.yaml:2: `context_servers.urls[1]` = `a:1`: is listed twice",
            ),
            (
                "context_servers:\n  urls:\n  - 'a:1'\n  - 'https://a:2'\n".to_owned(),
                "d.yaml:4: `context_servers.urls[1]` = `https://a:2`: `https://` towards a worker is not available yet",
            ),
            (
                "context_servers:\n  urls: ['a:1']\n  router:\n    type: random\n".to_owned(),
                "d.yaml:4: `context_servers.router.type` = `random`: must be `round_robin`, `load_balancing`, `kv_cache_aware` or `conversation`",
            ),
            (
                "max_batch_size: 5\ncontext_servers:\n  urls: ['a:1']\n  max_batch_size: 6\n".to_owned(),
                "d.yaml:4: `context_servers.max_batch_size` = `6`: is also set for the whole file, to another value (`max_batch_size`)",
            ),
            (
                "context_servers:\n  url: ['a:1']\n".to_owned(),
                "d.yaml:2: `context_servers.url`: unknown key, did you mean `urls`?",
            ),
        ] {
            assert_eq!(parse(&text).unwrap_err().to_string(), said);
        }
    }
}
