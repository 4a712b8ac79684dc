//! Puts a worker together: model, words, back end, transport, engine.
//!
//! In this order, so that what is cheap to find wrong is found first. Nothing is served here.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use baton_shared::id::{IdMint, Incarnation, WorkerId};
use baton_shared::kv::fingerprint::{Architecture, Revision, fingerprint};
use baton_shared::kv::layout::KvDtype;
use baton_shared::os;
use baton_shared::wire::auth::Keys;

use crate::api::worker::{Limits, Worker, unix_seconds};
use crate::backend::cuda::sys::driver::{self, Features};
use crate::backend::warm_up;
use crate::config::{Secret, WorkerConfig};
use crate::device::{Found, Loaded};
use crate::engine::{EngineConfig, EngineHandle, Parts, StepPace, engine};
use crate::gpu_usage;
use crate::handover::PeerAddress;
use crate::handover::mover::{Mover, MoverHandle, MoverRegions, MoverSettings, OpenTransport};
use crate::handover::nixl::{AgentRole, NixlLibrary, NixlSettings, NixlTransport, agent_name};
use crate::kv::region::{EpochPage, KvRegion};
use crate::metrics::Metrics;
use crate::model::hub::{self, HubSettings, ModelId};
use crate::model::narrowed::CpuWeights;
use crate::model::{self, ModelError, ModelFiles, ModelSpec, Source};
use crate::text::model::ModelTexts;

/// A worker that can be served, and what must be ended after it.
pub struct Assembled {
    /// For the API.
    pub worker: Arc<Worker>,
    /// Ends after the engine.
    pub mover: MoverHandle,
}

/// Loads and starts everything, downloads the model first if it is a hub id that is not here; `address` is where HTTP
/// will be served, `environment` looks a variable up.
///
/// # Errors
/// What is missing or does not work, with the file or setting.
pub fn assemble(
    config: &WorkerConfig,
    address: SocketAddr,
    environment: impl Fn(&str) -> Option<String>,
) -> Result<Assembled> {
    let keys =
        match (&config.auth.internal_request_auth_key_file, &config.auth.internal_request_auth_key)
        {
            (Some(file), _) => Keys::load(file)?,
            (None, Some(Secret(key))) => Keys::single(key.as_bytes()),
            (None, None) => Keys::none(),
        };
    let library = NixlLibrary::load(config.nixl.library_dir.as_deref())?;
    let device = config.engine.device.parse().expect("the configuration was checked");
    let device = Found::find(device, |ordinal| driver::open(ordinal, Features::default()))?;
    let path = &find_model(config, environment)?;
    let begun = Instant::now();
    tracing::info!(path = %path.display(), "loading the model");
    let mut files = model::open(path)?;
    let spec = files.spec().clone();
    let texts = ModelTexts::open(path, files.header(), &spec)
        .with_context(|| format!("the tokenizer of `{}`", path.display()))?;
    let Loaded { mut backend, weights, pace, device, gpu } =
        device.load(config, &mut files, max_len(config, &spec))?;
    let fingerprint = fingerprint_of(config, weights, &files, &texts)?;
    drop(files);
    warm_up::warm_up(&mut *backend).context("the first steps")?;
    tracing::info!(seconds = begun.elapsed().as_secs_f32(), device, "model ready");
    let incarnation = Incarnation::random();
    let id: WorkerId = address.to_string().parse()?;
    let limits = limits(config, &spec, backend.pool());
    let names = served_names(config);
    let model = names.first().map_or("", String::as_str);
    let metrics = Arc::new(Metrics::new(config.role, model));
    if let Some(ordinal) = gpu {
        gpu_usage::watch(ordinal, &metrics);
    }
    let (handle, seat) = engine(engine_config(config, &limits, pace));
    let steps = Arc::clone(&metrics);
    handle.on_step(move |step| steps.step(step));
    let epochs = EpochPage::new(backend.pool().layout.blocks as usize)?;
    let settings = MoverSettings {
        settle_timeout: config.handover.quarantine_timeout.duration(),
        ..MoverSettings::default()
    };
    let transport =
        Transports { library, nixl: nixl_settings(config), settings, id: &id, incarnation };
    let (mover, serve) =
        transport.start(&handle, &metrics, backend.pool(), &epochs).context("hand-over")?;
    seat.start(Parts { backend, epochs, serve, incarnation, puller: Box::new(mover.clone()) })
        .context("the engine thread")?;
    let worker = Worker {
        engine: handle,
        texts: Arc::new(texts),
        names,
        role: config.role,
        id,
        address: address.to_string(),
        incarnation,
        keys,
        fingerprint,
        limits,
        metrics,
        mover: mover.clone(),
        mint: IdMint::new(rand::random(), rand::random()),
        started: unix_seconds(),
        event_hash: config.kv.event_hash,
    };
    Ok(Assembled { worker: Arc::new(worker), mover })
}

/// Where peers reach a worker that listens on `bound`: a wildcard is the advertised interface's address.
///
/// # Errors
/// If there is no such interface, or it has no address.
pub fn peer_address(config: &WorkerConfig, bound: SocketAddr) -> Result<SocketAddr> {
    if !bound.ip().is_unspecified() {
        return Ok(bound);
    }
    let interface = &config.handover.advertise;
    let ip = if interface == "lo" {
        IpAddr::V4(Ipv4Addr::LOCALHOST)
    } else {
        let all = os::interface_addresses(interface).context("network interfaces")?;
        let Some(ip) = all.iter().find(|ip| ip.is_ipv4()).or(all.first()) else {
            bail!(
                "`handover.advertise` = `{interface}`: there is no such interface with an address"
            );
        };
        *ip
    };
    Ok(SocketAddr::new(ip, bound.port()))
}

/// Where the configured model is: as it says, or, where nothing is there and it looks like one, as a hub id.
fn find_model(
    config: &WorkerConfig,
    environment: impl Fn(&str) -> Option<String>,
) -> Result<PathBuf> {
    let model = config.model.as_deref().unwrap_or_default();
    match ModelId::parse(model) {
        Some(id) if !Path::new(model).exists() => {
            Ok(hub::fetch(&id, &HubSettings::from_environment(environment)?)?)
        }
        Some(_) | None => Ok(PathBuf::from(model)),
    }
}

/// How NIXL is started.
struct Transports<'a> {
    library: NixlLibrary,
    nixl: NixlSettings,
    settings: MoverSettings,
    id: &'a WorkerId,
    incarnation: Incarnation,
}

impl Transports<'_> {
    fn start(
        &self,
        engine: &EngineHandle,
        metrics: &Arc<Metrics>,
        pool: &KvRegion,
        epochs: &EpochPage,
    ) -> Result<(MoverHandle, PeerAddress)> {
        let regions = MoverRegions { pool: pool.region.clone(), epochs: epochs.region().clone() };
        let (metrics, tell) = (Arc::clone(metrics), engine.mover_sink());
        let sink = Box::new(move |event| {
            metrics.mover_said(&event);
            tell(event);
        });
        let (serve, move_) = (self.opener(AgentRole::Serve), self.opener(AgentRole::Move));
        let started = Mover::start(serve, move_, regions, sink, self.settings)?;
        let (place, bytes) = (pool.region.place(), pool.region.bytes());
        tracing::info!(%place, bytes, transport = "NIXL/UCX", "the pool is registered");
        Ok(started)
    }

    fn opener(&self, role: AgentRole) -> OpenTransport {
        let (library, settings) = (self.library.clone(), self.nixl.clone());
        let name = agent_name(self.id, 0, role, &self.incarnation);
        Box::new(move || {
            let transport = NixlTransport::open(&library, &settings, name)?;
            Ok(Box::new(transport) as Box<dyn crate::handover::Transport>)
        })
    }
}

fn nixl_settings(config: &WorkerConfig) -> NixlSettings {
    NixlSettings {
        interface: config.handover.advertise.clone(),
        ports: config.nixl.ports().map(|(first, last)| first..=last),
    }
}

fn fingerprint_of(
    config: &WorkerConfig,
    weights: CpuWeights,
    files: &ModelFiles,
    texts: &ModelTexts,
) -> Result<[u8; 32], ModelError> {
    let spec = files.spec();
    let architecture = Architecture {
        name: spec.architecture.name(),
        layers: spec.layers,
        hidden: spec.hidden,
        ffn: spec.ffn,
        heads: spec.heads,
        kv_heads: spec.kv_heads,
        head_dim: spec.head_dim,
        vocab: spec.vocab,
        rope_theta: spec.rope_theta,
        rope_factors: &spec.rope_factors,
        rms_eps: spec.rms_eps,
    };
    let revision = match &config.model_revision {
        Some(revision) => Revision::Configured(revision),
        None => Revision::Content(weights.content_hash(files.content_hash()?)),
    };
    Ok(fingerprint(&architecture, texts.hash(), KvDtype::Bf16, revision))
}

/// Tokens of the longest sequence; the pool may allow less.
fn max_len(config: &WorkerConfig, spec: &ModelSpec) -> u32 {
    match config.engine.max_model_len {
        0 => spec.longest(),
        limit => limit.min(spec.longest()),
    }
}

fn limits(config: &WorkerConfig, spec: &ModelSpec, pool: &KvRegion) -> Limits {
    let block_tokens = pool.layout.block_tokens;
    let leasable = f64::from(pool.layout.blocks) * config.max_leased_fraction();
    let longest = spec.longest();
    if config.engine.max_model_len > longest {
        let asked = config.engine.max_model_len;
        tracing::warn!(asked, longest, "`engine.max_model_len` is more than the model can do");
    }
    Limits {
        max_len: max_len(config, spec),
        pool_tokens: pool.layout.blocks.saturating_mul(block_tokens),
        leasable_tokens: (leasable as u32).saturating_mul(block_tokens),
        block_tokens,
    }
}

fn engine_config(config: &WorkerConfig, limits: &Limits, pace: Option<StepPace>) -> EngineConfig {
    EngineConfig {
        max_queue: config.server.max_queue as usize,
        max_sequences: config.engine.max_sequences,
        max_len: limits.max_len,
        max_leased_fraction: config.max_leased_fraction(),
        lease_timeout: config.handover.lease_timeout.duration(),
        pull_timeout: config.handover.pull_timeout.duration(),
        max_batch_tokens: match config.engine.max_batch_tokens {
            0 => u32::MAX,
            tokens => tokens,
        },
        prefix_cache: config.kv.prefix_cache,
        event_buffer: config.kv.event_buffer as usize,
        event_hash: config.kv.event_hash,
        pace,
        ..EngineConfig::default()
    }
}

/// The configured names, else one made from the model's.
fn served_names(config: &WorkerConfig) -> Vec<String> {
    if !config.served_model_names.is_empty() {
        return config.served_model_names.clone();
    }
    let model = config.model.as_deref().unwrap_or_default();
    let path = Path::new(model);
    let text = |part: &std::ffi::OsStr| part.to_string_lossy().into_owned();
    let id = ModelId::parse(model).filter(|_| !path.exists());
    let file = match &id {
        Some(ModelId { file: Some(file), .. }) => Some(Path::new(file)),
        Some(_) => None,
        None => path.extension().is_some_and(|ending| ending == "gguf").then_some(path),
    };
    let name = match (file, &id) {
        (Some(file), _) => {
            file.file_stem().map(|stem| without_quantisation(&text(stem)).to_owned())
        }
        (None, Some(id)) => Some(id.repository()),
        (None, None) => {
            // `.` and `dir/..` have no name of their own.
            let named = path.file_name().map(text);
            named.or_else(|| path.canonicalize().ok()?.file_name().map(text))
        }
    };
    vec![name.unwrap_or_else(|| model.to_owned())]
}

/// `SmolLM2-135M-Instruct.Q4_1` without `.Q4_1`; also with `-` before it.
fn without_quantisation(stem: &str) -> &str {
    let Some((name, suffix)) = stem.rsplit_once(['.', '-']) else { return stem };
    let upper = suffix.to_ascii_uppercase();
    let is_type = ["F16", "F32", "BF16"].contains(&&*upper)
        || upper
            .strip_prefix("IQ")
            .or(upper.strip_prefix('Q'))
            .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    if is_type && !name.is_empty() { name } else { stem }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name_of(model: &str) -> String {
        let config = WorkerConfig { model: Some(model.into()), ..WorkerConfig::default() };
        served_names(&config).remove(0)
    }

    #[test]
    fn a_model_is_called_like_its_file_or_folder() {
        for (model, name) in [
            ("/m/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
            ("tiny-llama-Q8_0.gguf", "tiny-llama"),
            ("llama-3-bf16.gguf", "llama-3"),
            ("Qwen2.gguf", "Qwen2"),
            ("model-v2.gguf", "model-v2"),
            ("/models/tiny-4", "tiny-4"),
            ("/models/tiny-4/", "tiny-4"),
            ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
            ("a/b@v1", "a/b"),
            ("a/b-GGUF/q4/b.Q4_K_M.gguf@v1", "b"),
        ] {
            assert_eq!(name_of(model), name);
        }
        let config =
            WorkerConfig { served_model_names: vec!["a".into()], ..WorkerConfig::default() };
        assert_eq!(served_names(&config), ["a"]);
    }

    #[test]
    fn a_wildcard_address_is_replaced_by_one_that_peers_can_use() {
        let config = WorkerConfig::default();
        let address =
            |text: &str| peer_address(&config, text.parse().unwrap()).unwrap().to_string();
        assert_eq!(address("127.0.0.1:8001"), "127.0.0.1:8001");
        assert_eq!(address("0.0.0.0:8001"), "127.0.0.1:8001");
    }
}
