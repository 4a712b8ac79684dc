//! The worker YAML of `trtllm-serve --config` (older name `--extra_llm_api_options`), and the same keys inside a
//! server section of `disagg_config.yaml`.

use std::num::NonZeroU32;
use std::path::Path;
use std::time::Duration;

use super::keys::{self, WORKER};
use crate::config::document::join;
use crate::config::yaml::Yaml;
use crate::config::{ConfigError, Document, read_text};
use crate::kv::block_hash::EventHashAlgorithm;

/// What a worker YAML sets; `None` = left out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WorkerSettings {
    /// Folder, file or hub id; only where `disagg_config.yaml` starts the workers too.
    pub model: Option<String>,
    /// Most sequences in one step.
    pub max_batch_size: Option<NonZeroU32>,
    /// Most tokens in one step.
    pub max_num_tokens: Option<NonZeroU32>,
    /// Longest sequence, prompt and answer.
    pub max_seq_len: Option<NonZeroU32>,
    /// Tokens a KV block holds.
    pub tokens_per_block: Option<NonZeroU32>,
    /// Most tokens in the KV pool.
    pub kv_max_tokens: Option<NonZeroU32>,
    /// Share of the free device memory for the KV pool; means nothing on a CPU.
    pub free_gpu_memory_fraction: Option<f64>,
    /// Whether prompts share cached prefixes.
    pub enable_block_reuse: Option<bool>,
    /// Most events of the prefix cache that wait for `/kv_cache_events`.
    pub event_buffer: Option<u32>,
    /// How they name blocks.
    pub event_hash: Option<EventHashAlgorithm>,
    /// Bound on tokens in flight between workers.
    pub max_tokens_in_buffer: Option<NonZeroU32>,
    /// How long a context worker keeps blocks for their reader.
    pub kv_transfer_timeout: Option<Duration>,
    /// Shared secret of router and workers.
    pub internal_request_auth_key: Option<String>,
    /// Dotted keys that were accepted without effect, for one warning.
    pub without_effect: Vec<String>,
}

impl WorkerSettings {
    /// Reads a worker YAML; the document is for errors found later.
    pub fn read(path: &Path) -> Result<(Self, Document), ConfigError> {
        let file = Yaml::parse(Some(path.to_owned()), read_text(path)?)?;
        let mut without_effect = Vec::new();
        keys::check(&file, "", &[WORKER], &mut without_effect)?;
        let settings = Self { without_effect, ..Self::of_section(&file, "")? };
        Ok((settings, file.document))
    }

    /// The mapped keys under `section` (empty = the whole file), which was checked against the tables.
    pub(super) fn of_section(file: &Yaml, section: &str) -> Result<Self, ConfigError> {
        let at = |key: &str| join_path(section, key);
        check_backend(file, &at("cache_transceiver_config.backend"))?;
        let timeout =
            file.whole(&at("cache_transceiver_config.kv_transfer_timeout_ms"), 1..=86_400_000)?;
        let auth_key = at("internal_request_auth_key");
        let internal_request_auth_key = file.text(&auth_key)?;
        if internal_request_auth_key.as_ref().is_some_and(String::is_empty) {
            return Err(file.document.error(&auth_key, "must have at least one character"));
        }
        Ok(Self {
            model: file.text(&at("model"))?,
            max_batch_size: file.count(&at("max_batch_size"))?,
            max_num_tokens: file.count(&at("max_num_tokens"))?,
            max_seq_len: file.count(&at("max_seq_len"))?,
            tokens_per_block: file.count(&at("kv_cache_config.tokens_per_block"))?,
            kv_max_tokens: file.count(&at("kv_cache_config.max_tokens"))?,
            free_gpu_memory_fraction: file
                .fraction(&at("kv_cache_config.free_gpu_memory_fraction"))?,
            enable_block_reuse: file.flag(&at("kv_cache_config.enable_block_reuse"))?,
            event_buffer: file
                .whole(&at("kv_cache_config.event_buffer_max_size"), 0..=1 << 20)?
                .and_then(|events| u32::try_from(events).ok()),
            event_hash: event_hash(file, &at("kv_cache_config.kv_cache_event_hash_algo"))?,
            max_tokens_in_buffer: file
                .count(&at("cache_transceiver_config.max_tokens_in_buffer"))?,
            kv_transfer_timeout: timeout
                .and_then(|ms| u64::try_from(ms).ok())
                .map(Duration::from_millis),
            internal_request_auth_key,
            without_effect: Vec::new(),
        })
    }

    /// The settings of a section, where it leaves a key out those of the whole file.
    pub(super) fn or(self, other: &Self) -> Self {
        let other = other.clone();
        Self {
            model: self.model.or(other.model),
            max_batch_size: self.max_batch_size.or(other.max_batch_size),
            max_num_tokens: self.max_num_tokens.or(other.max_num_tokens),
            max_seq_len: self.max_seq_len.or(other.max_seq_len),
            tokens_per_block: self.tokens_per_block.or(other.tokens_per_block),
            kv_max_tokens: self.kv_max_tokens.or(other.kv_max_tokens),
            free_gpu_memory_fraction: self
                .free_gpu_memory_fraction
                .or(other.free_gpu_memory_fraction),
            enable_block_reuse: self.enable_block_reuse.or(other.enable_block_reuse),
            event_buffer: self.event_buffer.or(other.event_buffer),
            event_hash: self.event_hash.or(other.event_hash),
            max_tokens_in_buffer: self.max_tokens_in_buffer.or(other.max_tokens_in_buffer),
            kv_transfer_timeout: self.kv_transfer_timeout.or(other.kv_transfer_timeout),
            internal_request_auth_key: self
                .internal_request_auth_key
                .or(other.internal_request_auth_key),
            without_effect: self.without_effect,
        }
    }
}

/// `section.key`, where `key` may be dotted itself.
pub(super) fn join_path(section: &str, key: &str) -> String {
    key.split('.').fold(section.to_owned(), |path, part| join(&path, part))
}

/// `DEFAULT`, `NIXL` and `UCX` (NIXL over UCX) are one and the same here; older files write lower case.
fn check_backend(file: &Yaml, key: &str) -> Result<(), ConfigError> {
    let Some(backend) = file.text(key)? else { return Ok(()) };
    let rule = match backend.to_ascii_uppercase().as_str() {
        "DEFAULT" | "NIXL" | "UCX" => return Ok(()),
        "MPI" => "MPI is not supported, write `NIXL`",
        "MOONCAKE" => "is not available yet, write `NIXL`",
        _ => "must be `DEFAULT`, `NIXL` or `UCX`",
    };
    Err(file.document.error(key, rule))
}

/// `auto` is the default.
fn event_hash(file: &Yaml, key: &str) -> Result<Option<EventHashAlgorithm>, ConfigError> {
    let Some(name) = file.text(key)? else { return Ok(None) };
    let known = [
        EventHashAlgorithm::V1BlockKey,
        EventHashAlgorithm::V2Sha256,
        EventHashAlgorithm::V2Sha256Short,
    ];
    if name == "auto" {
        return Ok(None);
    }
    let named = known.into_iter().find(|algorithm| algorithm.as_str() == name);
    let rule = "must be `auto`, `v1_block_key`, `v2_sha256` or `v2_sha256_64`";
    named.map(Some).ok_or_else(|| file.document.error(key, rule))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<WorkerSettings, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.yaml");
        std::fs::write(&path, text).unwrap();
        let without_folder =
            |error: ConfigError| ConfigError { file: Some("w.yaml".into()), ..error };
        WorkerSettings::read(&path).map(|(settings, _)| settings).map_err(without_folder)
    }

    #[test]
    fn mapped_keys_become_fields() {
        let settings = read(
            "max_batch_size: 8\nmax_num_tokens: 512\nmax_seq_len: 2048\n\
             cache_transceiver_config:\n  backend: nixl\n  max_tokens_in_buffer: 2048\n  kv_transfer_timeout_ms: 1500\n\
             kv_cache_config: {enable_block_reuse: false, event_buffer_max_size: 64, kv_cache_event_hash_algo: v2_sha256, max_tokens: 4096, tokens_per_block: 32, free_gpu_memory_fraction: 0.9}\n\
             tensor_parallel_size: 1\ncuda_graph_config:\n  batch_sizes: [1, 2]\ndisable_overlap_scheduler: True\n",
        )
        .unwrap();
        assert_eq!(settings.max_batch_size, NonZeroU32::new(8));
        assert_eq!(settings.max_seq_len, NonZeroU32::new(2048));
        assert_eq!(settings.max_tokens_in_buffer, NonZeroU32::new(2048));
        assert_eq!(settings.kv_transfer_timeout, Some(Duration::from_millis(1500)));
        assert_eq!(settings.enable_block_reuse, Some(false));
        assert_eq!(settings.event_buffer, Some(64));
        assert_eq!(settings.event_hash, Some(EventHashAlgorithm::V2Sha256));
        assert_eq!(settings.free_gpu_memory_fraction, Some(0.9));
        let without = ["tensor_parallel_size", "cuda_graph_config", "disable_overlap_scheduler"];
        assert_eq!(settings.without_effect, without);
    }

    #[test]
    fn mistakes_name_line_key_and_rule() {
        for (text, said) in [
            (
                "cache_transceiver_config:\n  backend: UCX\n  max_token_in_buffer: 5\n",
                "w.yaml:3: `cache_transceiver_config.max_token_in_buffer`: unknown key, did you mean `max_tokens_in_buffer`?",
            ),
            (
                "\nmax_batchsize: 5\n",
                "w.yaml:2: `max_batchsize`: unknown key, did you mean `max_batch_size`?",
            ),
            ("elephants: 5\n", "w.yaml:1: `elephants`: unknown key"),
            (
                "cache_transceiver_config:\n  backend: MPI\n",
                "w.yaml:2: `cache_transceiver_config.backend` = `MPI`: MPI is not supported, write `NIXL`",
            ),
            (
                "tensor_parallel_size: 2\n",
                "w.yaml:1: `tensor_parallel_size` = `2`: only `1` is available yet",
            ),
            (
                "max_batch_size: 0\n",
                "w.yaml:1: `max_batch_size` = `0`: must be a whole number from 1 to 4294967295",
            ),
            (
                "kv_cache_config:\n  kv_cache_event_hash_algo: md5\n",
                "w.yaml:2: `kv_cache_config.kv_cache_event_hash_algo` = `md5`: must be `auto`, `v1_block_key`, `v2_sha256` or `v2_sha256_64`",
            ),
            ("kv_cache_config: 5\n", "w.yaml:1: `kv_cache_config` = `5`: must be a map of keys"),
            (
                "speculative_config:\n  decoding_type: MTP\n",
                "w.yaml:1: `speculative_config`: is not available yet",
            ),
            (
                "disagg_cluster:\n  cluster_uri: x\n",
                "w.yaml:1: `disagg_cluster`: is not available yet: give the router this worker's address instead",
            ),
            (
                "internal_request_auth_key: ''\n",
                "w.yaml:1: `internal_request_auth_key`: must have at least one character",
            ),
        ] {
            assert_eq!(read(text).unwrap_err().to_string(), said);
        }
    }
}
