//! What a worker is told: the sections of `config/workerd-*.toml`, their defaults, and what must hold between them.
//!
//! Keys whose feature is not built yet are refused, never ignored. Nothing here touches the network or a device.

mod check;
mod trtllm;

use std::collections::BTreeMap;
use std::path::PathBuf;

use baton_shared::config::net::Listen;
use baton_shared::config::units::{Bytes, Seconds};
use baton_shared::kv::block_hash::EventHashAlgorithm;
use baton_shared::role::Role;
use baton_shared::telemetry::LogFormat;
use serde::{Deserialize, Serialize};

pub use check::not_yet;

/// A worker's whole configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WorkerConfig {
    /// Directory, `.gguf` file, or hub id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Names clients may use; empty = one made from `model`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub served_model_names: Vec<String>,
    /// Part of the hand-over fingerprint; `None` = a hash of the weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model_revision: Option<String>,
    /// A default for routing and admission.
    pub role: Role,
    /// `[server]`
    pub server: ServerSection,
    /// `[engine]`
    pub engine: EngineSection,
    /// `[kv]`
    pub kv: KvSection,
    /// `[handover]`
    pub handover: HandoverSection,
    /// `[nixl]`
    pub nixl: NixlSection,
    /// `[auth]`
    pub auth: AuthSection,
    /// `[log]`
    pub log: LogSection,
    /// Keys of a `trtllm-serve` file that were accepted without effect, for one warning.
    #[serde(skip)]
    pub without_effect: Vec<String>,
}

/// `[server]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerSection {
    /// Where HTTP is served; port 0 = any free one.
    pub listen: Listen,
    /// Waiting requests; beyond it 429.
    pub max_queue: u32,
    /// A client that reads nothing for this long is dropped.
    pub write_timeout: Seconds,
}

/// `[engine]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EngineSection {
    /// `auto`, `cpu` or `cuda:N`.
    pub device: String,
    /// CPU threads; 0 = as many as there are cores.
    pub threads: u32,
    /// Sequences in one step at most.
    pub max_sequences: u32,
    /// Input tokens in one step at most; 0 = by device.
    pub max_batch_tokens: u32,
    /// Longest sequence; 0 = the model's own.
    pub max_model_len: u32,
    /// `as-is`, `q8_0` or `q4_1`: how weights are kept at most.
    pub cpu_weights: String,
    /// Ranks that share each layer.
    pub tensor_parallel_size: u32,
    /// Ranks that share the layers.
    pub pipeline_parallel_size: u32,
}

/// `[kv]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KvSection {
    /// Tokens of a block.
    pub block_tokens: u32,
    /// Size of the pool on the CPU.
    pub pool: Bytes,
    /// Tokens the pool holds at most; 0 = as many as its size allows.
    pub max_tokens: u32,
    /// Size of the pool on a GPU, as a share of what is free once weights and activations are there.
    pub free_gpu_memory_fraction: f64,
    /// Whether blocks of earlier prompts are used again.
    pub prefix_cache: bool,
    /// Events of the prefix cache kept for `/kv_cache_events`; 0 = none.
    pub event_buffer: u32,
    /// How these name blocks.
    pub event_hash: EventHashAlgorithm,
    /// Share of the pool that leases may hold; `None` = 0.9 for role context, else 0.5.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_leased_fraction: Option<f64>,
}

/// `[handover]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HandoverSection {
    /// `NIXL`, or its other names `DEFAULT` and `UCX`.
    pub backend: String,
    /// NIXL's own backend.
    pub nixl_backend: String,
    /// Tokens in flight at most; 0 = what the pool holds.
    pub max_tokens_in_buffer: u32,
    /// How long a context worker keeps blocks for their reader.
    pub lease_timeout: Seconds,
    /// How long one pull may take.
    pub pull_timeout: Seconds,
    /// How long the transfers of a pull that was given up may go on before all are ended by force.
    pub quarantine_timeout: Seconds,
    /// What happens when a pull fails: `error` or `recompute`.
    pub fallback: String,
    /// Network interface peers reach us by.
    pub advertise: String,
}

/// `[nixl]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NixlSection {
    /// Where NIXL's libraries are; before all other places.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub library_dir: Option<PathBuf>,
    /// UCX's ports, `20000-20100`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port_range: Option<String>,
    /// Passed on as `UCX_KEY=value`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub ucx: BTreeMap<String, String>,
}

/// `[auth]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuthSection {
    /// One key a line: the first signs, all verify.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub internal_request_auth_key_file: Option<PathBuf>,
    /// The one key of a `trtllm-serve` file.
    #[serde(skip)]
    pub internal_request_auth_key: Option<Secret>,
    /// Lets a worker be reached from other machines without a key.
    pub allow_unauthenticated_peers: bool,
}

/// Text that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// `[log]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogSection {
    /// `auto`, `text` or `json`.
    pub format: LogFormat,
    /// `error`, `warn`, `info`, `debug`, `trace`, or a filter.
    pub level: String,
}

impl Default for WorkerConfig {
    fn default() -> Self {
        Self {
            model: None,
            served_model_names: Vec::new(),
            model_revision: None,
            role: Role::Both,
            server: ServerSection::default(),
            engine: EngineSection::default(),
            kv: KvSection::default(),
            handover: HandoverSection::default(),
            nixl: NixlSection::default(),
            auth: AuthSection::default(),
            log: LogSection::default(),
            without_effect: Vec::new(),
        }
    }
}

impl Default for ServerSection {
    fn default() -> Self {
        Self { listen: Listen::loopback(8001), max_queue: 1024, write_timeout: Seconds::new(30) }
    }
}

impl Default for EngineSection {
    fn default() -> Self {
        Self {
            device: "auto".into(),
            threads: 0,
            max_sequences: 64,
            max_batch_tokens: 0,
            max_model_len: 0,
            cpu_weights: "as-is".into(),
            tensor_parallel_size: 1,
            pipeline_parallel_size: 1,
        }
    }
}

impl Default for KvSection {
    fn default() -> Self {
        Self {
            block_tokens: 32,
            pool: Bytes::mib(512),
            max_tokens: 0,
            free_gpu_memory_fraction: 0.9,
            prefix_cache: true,
            event_buffer: 1024,
            event_hash: EventHashAlgorithm::default(),
            max_leased_fraction: None,
        }
    }
}

impl Default for HandoverSection {
    fn default() -> Self {
        Self {
            backend: "NIXL".into(),
            nixl_backend: "UCX".into(),
            max_tokens_in_buffer: 0,
            lease_timeout: Seconds::new(60),
            pull_timeout: Seconds::new(10),
            quarantine_timeout: Seconds::new(30),
            fallback: "error".into(),
            advertise: "lo".into(),
        }
    }
}

impl Default for LogSection {
    fn default() -> Self {
        Self { format: LogFormat::Auto, level: "info".into() }
    }
}

impl WorkerConfig {
    /// Share of the pool that leases may hold.
    pub fn max_leased_fraction(&self) -> f64 {
        self.kv.max_leased_fraction.unwrap_or(match self.role {
            Role::Context => 0.9,
            Role::Generation | Role::Both => 0.5,
        })
    }

    /// Whether other machines can reach this worker over HTTP or by its transport.
    pub fn is_exposed(&self) -> bool {
        !self.server.listen.is_loopback() || self.handover.advertise != "lo"
    }
}

impl NixlSection {
    /// First and last port, if any are set.
    pub fn ports(&self) -> Option<(u16, u16)> {
        let (first, last) = self.port_range.as_deref()?.split_once('-')?;
        Some((first.trim().parse().ok()?, last.trim().parse().ok()?))
    }
}

impl AuthSection {
    /// Whether peers must show a key.
    pub fn has_key(&self) -> bool {
        self.internal_request_auth_key_file.is_some() || self.internal_request_auth_key.is_some()
    }
}
