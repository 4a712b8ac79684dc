//! `router.toml`: every section with its defaults and rules. Decides what a valid configuration is; reading
//! the file and units is `baton_shared::config`. A key that is known but not built yet is refused by name.

mod check;
mod upstream;

use std::path::{Path, PathBuf};

use baton_shared::config::net::{Endpoint, Listen};
use baton_shared::config::units::{Bytes, Percent, Seconds};
use baton_shared::config::{ConfigError, Document, is_yaml};
use baton_shared::id::{InvalidWorkerId, WorkerId};
use baton_shared::telemetry::LogFormat;
use baton_shared::wire::auth::Keys;
use serde::{Deserialize, Serialize};

use crate::table::Phase;

/// Everything the router can be told.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RouterConfig {
    /// Where to listen, and how to stop.
    pub server: ServerConfig,
    /// Deadlines and attempts.
    pub routing: RoutingConfig,
    /// Servers for the context phase.
    pub context: PoolConfig,
    /// Servers for the generation phase.
    pub generation: PoolConfig,
    /// Probes and ejection.
    pub health: HealthConfig,
    /// What one client may ask for.
    pub limits: LimitsConfig,
    /// Keys shared with the workers.
    pub auth: AuthConfig,
    /// Log output.
    pub log: LogConfig,
}

/// A checked configuration and what belongs to it.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// Checked.
    pub config: RouterConfig,
    /// Keys shared with the workers.
    pub keys: Keys,
    /// Keys and flags that were read but change nothing.
    pub without_effect: Vec<String>,
    /// Where our own keys stand; `None` = the file has others.
    pub document: Option<Document>,
}

impl Loaded {
    /// Reads our TOML, or TensorRT-LLM's `disagg_config.yaml`, by the file's name.
    ///
    /// # Errors
    /// The first mistake, with its line.
    pub fn read(file: &Path) -> Result<Self, ConfigError> {
        let mut loaded = if is_yaml(file) { upstream::load(file) } else { check::load(file) }?;
        for (name, pool) in
            [("context", &loaded.config.context), ("generation", &loaded.config.generation)]
        {
            if pool.policy == PolicyName::KvCacheAware {
                let note =
                    format!("{name}: kv_cache_aware (runs as prefix, KV events are not read)");
                loaded.without_effect.push(note);
            }
        }
        Ok(loaded)
    }
}

impl RouterConfig {
    /// The same with defaults that depend on something else filled in.
    pub fn spelled_out(mut self) -> Self {
        self.context.load = Some(self.context.load_measure(Phase::Context));
        self.generation.load = Some(self.generation.load_measure(Phase::Generation));
        self
    }
}

/// `[server]`.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerConfig {
    /// The public endpoint.
    pub listen: Listen,
    /// Threads that serve requests; 0 = cores available to this process.
    pub threads: usize,
    /// `/metrics`, `/healthz`, `/readyz`, `/admin/*`.
    pub admin_listen: Listen,
    /// File with the token that `/admin/*` asks for; needed unless the admin port is on loopback.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admin_token_file: Option<PathBuf>,
    /// How long requests in flight may go on after SIGTERM.
    pub drain_timeout: Seconds,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            listen: Listen::loopback(8000),
            threads: 0,
            admin_listen: Listen::loopback(9000),
            admin_token_file: None,
            drain_timeout: Seconds::new(30),
        }
    }
}

/// Which phase is asked first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ScheduleStyle {
    /// The context worker computes, then the generation worker pulls.
    #[default]
    ContextFirst,
    /// Not built yet.
    GenerationFirst,
}

/// What happens to KV that a context worker without a release call keeps for a request that ended without it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OrphanedKv {
    /// A generation worker is asked for one token, so that it is read and with that free.
    #[default]
    Pull,
    /// It stays until it expires there, and is counted.
    Count,
}

/// `[routing]`.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct RoutingConfig {
    /// Which phase is asked first.
    pub schedule_style: ScheduleStyle,
    /// The whole request, streaming included.
    pub request_timeout: Seconds,
    /// One try of the context phase.
    pub context_timeout: Seconds,
    /// Generation phase: until the first byte of an answer.
    pub first_token_timeout: Seconds,
    /// Generation phase: between two pieces of an answer.
    pub idle_timeout: Seconds,
    /// Tries a phase, the first included.
    pub attempts: u32,
    /// How long a request waits for a usable worker.
    pub queue_timeout: Seconds,
    /// What TensorRT-LLM context workers keep for requests that ended without it.
    pub orphaned_kv: OrphanedKv,
    /// Part of the ids this router mints, so that routers side by side differ; unset = random.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_id: Option<u8>,
    /// Prompts of which at most so many tokens are left to compute, by estimate, go whole to one generation worker; 0 = off.
    pub max_local_prefill_length: u64,
}

impl Default for RoutingConfig {
    fn default() -> Self {
        Self {
            schedule_style: ScheduleStyle::default(),
            request_timeout: Seconds::new(180),
            context_timeout: Seconds::new(60),
            first_token_timeout: Seconds::new(60),
            idle_timeout: Seconds::new(30),
            attempts: 3,
            queue_timeout: Seconds::new(5),
            orphaned_kv: OrphanedKv::default(),
            node_id: None,
            max_local_prefill_length: 0,
        }
    }
}

/// How a server is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PolicyName {
    /// One after the other.
    RoundRobin,
    /// The one with the least load, by `load`; `load_balancing` is upstream's name.
    #[default]
    #[serde(alias = "load_balancing")]
    LeastLoaded,
    /// The less loaded of two at random.
    PowerOfTwo,
    /// The one with the least load and the most of the prompt, as far as it went there before.
    Prefix,
    /// Upstream's; runs as `prefix`, as the workers' KV events are not read yet.
    KvCacheAware,
    /// The one the conversation went to before.
    Conversation,
}

/// What load is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LoadMeasure {
    /// Requests in flight.
    Requests,
    /// Prompt tokens of the requests in flight, estimated.
    Tokens,
}

/// `[context]` or `[generation]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct PoolConfig {
    /// How a server is chosen.
    pub policy: PolicyName,
    /// What all but `round_robin` compare; unset = tokens for context, requests for generation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load: Option<LoadMeasure>,
    /// The servers, in order.
    pub servers: Vec<ServerEntry>,
}

impl PoolConfig {
    /// `load`, or the phase's default.
    pub fn load_measure(&self, phase: Phase) -> LoadMeasure {
        self.load.unwrap_or(match phase {
            Phase::Context => LoadMeasure::Tokens,
            Phase::Generation => LoadMeasure::Requests,
        })
    }
}

/// Which protocol a worker speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub enum DialectChoice {
    /// Asked from the worker.
    #[default]
    #[serde(rename = "auto")]
    Auto,
    /// Ours.
    #[serde(rename = "baton")]
    Baton,
    /// TensorRT-LLM up to 1.2.
    #[serde(rename = "trtllm-1.2")]
    Trtllm12,
    /// TensorRT-LLM 1.3 before its last release candidates.
    #[serde(rename = "trtllm-1.3")]
    Trtllm13,
    /// TensorRT-LLM main.
    #[serde(rename = "trtllm-main")]
    TrtllmMain,
}

/// `[[context.servers]]` or `[[generation.servers]]`.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ServerEntry {
    /// `host:port`, `http://host:port` or `unix:/path`.
    pub url: Endpoint,
    /// Identity across address changes; default: the url.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Share of the work, relative to the others; at least 1.
    #[serde(default = "one")]
    pub weight: u32,
    /// Which protocol it speaks.
    #[serde(default)]
    pub dialect: DialectChoice,
}

impl ServerEntry {
    /// An entry with only an address.
    pub fn new(url: Endpoint) -> Self {
        Self { url, name: None, weight: 1, dialect: DialectChoice::Auto }
    }

    /// Who it is: the configured name, else the address.
    pub fn id(&self) -> Result<WorkerId, InvalidWorkerId> {
        match &self.name {
            Some(name) => name.parse(),
            None => self.url.to_string().parse(),
        }
    }
}

/// `[health]`.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct HealthConfig {
    /// Asked with GET; 2xx = healthy.
    pub probe_path: String,
    /// Time between two probes of a worker.
    pub probe_interval: Seconds,
    /// How long a probe may take.
    pub probe_timeout: Seconds,
    /// Consecutive failures that eject; a refused connection counts at once.
    pub eject_after: u32,
    /// First ejection; doubled each time.
    pub eject_time: Seconds,
    /// Longest ejection.
    pub eject_time_max: Seconds,
    /// Below this share of a phase's workers answers eject nobody any more.
    pub min_usable: Percent,
}

impl Default for HealthConfig {
    fn default() -> Self {
        Self {
            probe_path: "/health".to_owned(),
            probe_interval: Seconds::new(2),
            probe_timeout: Seconds::new(1),
            eject_after: 1,
            eject_time: Seconds::new(1),
            eject_time_max: Seconds::new(60),
            min_usable: Percent::new(50.0).expect("50 is a percentage"),
        }
    }
}

/// `[limits]`.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsConfig {
    /// Longest request body, as sent and as decoded.
    pub max_body: Bytes,
    /// Requests being served at once; more are answered 429.
    pub max_in_flight: usize,
    /// How long a client may take to send a request's head.
    pub head_timeout: Seconds,
    /// How long a client may take to send its body.
    pub body_timeout: Seconds,
    /// Longest answer of a context worker.
    pub max_context_answer: Bytes,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            max_body: Bytes::mib(32),
            max_in_flight: 4096,
            head_timeout: Seconds::new(30),
            body_timeout: Seconds::new(30),
            max_context_answer: Bytes::mib(64),
        }
    }
}

/// `[auth]`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuthConfig {
    /// HMAC keys towards workers, one a line; the first signs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub internal_request_auth_key_file: Option<PathBuf>,
}

/// `[log]`.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogConfig {
    /// Text or JSON.
    pub format: LogFormat,
    /// `error`, `warn`, `info`, `debug`, `trace`, or a filter of `tracing_subscriber`.
    pub level: String,
    /// One line a request.
    pub access: bool,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { format: LogFormat::default(), level: "info".to_owned(), access: false }
    }
}

fn one() -> u32 {
    1
}
