//! Which device computes (`engine.device`), and what of the configuration means something there.
//!
//! `auto` is a choice that is stated: the first visible GPU if it and the kernels can run the model, else the CPU, and the
//! log says which and why. A device that was named and cannot be had is an error; so is one with too little memory.

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use baton_shared::os;

use crate::backend::cpu::{CpuBackend, CpuOptions, Simd};
use crate::backend::cuda::sys::{Gpu, GpuError};
use crate::backend::cuda::{CudaBackend, CudaError, CudaOptions, PoolSize};
use crate::backend::{Backend, pool_layout, warm_up};
use crate::config::{EngineSection, KvSection, WorkerConfig};
use crate::engine::StepPace;
use crate::model::narrowed::{CpuWeights, Narrowed};
use crate::model::{ModelSpec, Source};

/// Tokens of a step on the CPU at most, where time allows so many.
const MOST_CPU_TOKENS: u32 = 2048;
/// Tokens of a step on a GPU, unless configured.
const CUDA_TOKENS: u32 = 8192;

/// `engine.device`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// The first visible GPU if it will do, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// That GPU of those visible.
    Cuda(u32),
}

/// No such [`Device`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be `auto`, `cpu` or `cuda:N`")]
pub struct UnknownDevice;

impl FromStr for Device {
    type Err = UnknownDevice;

    fn from_str(name: &str) -> Result<Self, UnknownDevice> {
        match name {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            other => {
                let number = other.strip_prefix("cuda:").ok_or(UnknownDevice)?;
                // Not `+1`, which `parse` takes.
                let is_plain = number.bytes().all(|byte| byte.is_ascii_digit());
                let ordinal = number.parse().ok().filter(|_| is_plain);
                ordinal.map(Self::Cuda).ok_or(UnknownDevice)
            }
        }
    }
}

/// What was found of a [`Device`].
#[derive(Debug)]
pub struct Found {
    /// `None`: the CPU.
    gpu: Option<Arc<dyn Gpu>>,
    /// Whether the CPU will do as well.
    is_auto: bool,
}

impl Found {
    /// Opens the GPU by `open`, if there is to be one.
    ///
    /// # Errors
    /// What is wrong with a GPU that was named.
    pub fn find(
        device: Device,
        open: impl Fn(u32) -> Result<Arc<dyn Gpu>, GpuError>,
    ) -> Result<Self, GpuError> {
        let gpu = match device {
            Device::Cpu => None,
            Device::Cuda(ordinal) => Some(open(ordinal)?),
            Device::Auto => match open(0) {
                Ok(gpu) => Some(gpu),
                Err(error @ GpuError::Unavailable(_)) => {
                    tracing::info!(reason = %error, "device `auto`: the CPU computes");
                    None
                }
                Err(error) => {
                    tracing::warn!(reason = %error, "device `auto`: a GPU is there but cannot be used, the CPU computes");
                    None
                }
            },
        };
        if let Some(facts) = gpu.as_deref().map(Gpu::facts) {
            tracing::info!(
                device = format!("cuda:{}", facts.ordinal),
                name = facts.name,
                capability = format!("{}.{}", facts.capability / 10, facts.capability % 10),
                memory = facts.memory,
                driver_cuda = format!("{}.{}", facts.driver / 1000, facts.driver % 1000 / 10),
                cublaslt = gpu.as_ref().is_some_and(|gpu| gpu.has_blas()),
                "a GPU was found"
            );
        }
        Ok(Self { gpu, is_auto: device == Device::Auto })
    }

    /// Loads the model and makes the pool. No sequence is longer than `max_len`.
    ///
    /// # Errors
    /// The model's, the device's; memory that is not there, with sizes.
    pub fn load(
        self,
        config: &WorkerConfig,
        source: &mut impl Source,
        max_len: u32,
    ) -> Result<Loaded> {
        if let Some(gpu) = self.gpu {
            match CudaBackend::load(&gpu, source, &cuda_options(config, max_len)) {
                Ok(backend) => {
                    warn_of(config, true);
                    return Ok(Loaded {
                        backend: Box::new(backend),
                        weights: CpuWeights::AsIs,
                        pace: None,
                        device: format!("cuda:{}", gpu.facts().ordinal),
                        gpu: Some(gpu.facts().ordinal),
                    });
                }
                Err(error) => {
                    let reason = reason_for_the_cpu(error, self.is_auto)?;
                    tracing::warn!(reason, "device `auto`: the CPU computes");
                }
            }
        }
        warn_of(config, false);
        let weights = cpu_weights(config);
        let options = cpu_options(config, source.spec())?;
        let threads = options.threads;
        let backend = CpuBackend::load(&mut Narrowed::new(source, weights), &options)?;
        Ok(Loaded {
            weights,
            pace: Some(step_pace(source.spec(), threads)),
            device: format!("cpu ({})", backend.simd()),
            gpu: None,
            backend: Box::new(backend),
        })
    }
}

/// A model on its device.
pub struct Loaded {
    /// Computes.
    pub backend: Box<dyn Backend>,
    /// How much smaller than in the files the weights are: part of what the model is to peers.
    pub weights: CpuWeights,
    /// How prompts are cut; `None` = by tokens alone.
    pub pace: Option<StepPace>,
    /// What computes, in words.
    pub device: String,
    /// Which GPU of the visible ones, if one does.
    pub gpu: Option<u32>,
}

/// Why the CPU computes what a GPU could not load.
///
/// # Errors
/// What the CPU is no answer to.
fn reason_for_the_cpu(error: CudaError, is_auto: bool) -> Result<String, CudaError> {
    match error {
        CudaError::Model(_) if is_auto => Ok(error.to_string()),
        error => Err(error),
    }
}

/// Keys that were set and mean nothing on a GPU, or on the CPU.
fn without_effect(config: &WorkerConfig, on_gpu: bool) -> Vec<&'static str> {
    let (engine, kv) = (EngineSection::default(), KvSection::default());
    let keys = [
        ("engine.threads", on_gpu && config.engine.threads != engine.threads),
        ("engine.cpu_weights", on_gpu && config.engine.cpu_weights != engine.cpu_weights),
        ("kv.pool", on_gpu && config.kv.pool != kv.pool),
        (
            "kv.free_gpu_memory_fraction",
            !on_gpu && config.kv.free_gpu_memory_fraction != kv.free_gpu_memory_fraction,
        ),
    ];
    keys.into_iter().filter(|(_, is_idle)| *is_idle).map(|(key, _)| key).collect()
}

fn warn_of(config: &WorkerConfig, on_gpu: bool) {
    let keys = without_effect(config, on_gpu).join(", ");
    if !keys.is_empty() {
        let device = if on_gpu { "a GPU" } else { "the CPU" };
        tracing::warn!(keys, "keys that have no effect on {device}");
    }
}

fn cpu_weights(config: &WorkerConfig) -> CpuWeights {
    config.engine.cpu_weights.parse().expect("the configuration was checked")
}

/// Blocks that `kv.max_tokens` allows.
fn most_blocks(config: &WorkerConfig) -> u32 {
    match config.kv.max_tokens {
        0 => u32::MAX,
        tokens => (tokens / config.kv.block_tokens).max(1),
    }
}

/// Tokens of a step: as configured, else `usual`; each sequence of a step has one.
fn batch_tokens(config: &WorkerConfig, usual: u32) -> u32 {
    let configured = Some(config.engine.max_batch_tokens).filter(|tokens| *tokens > 0);
    configured.unwrap_or(usual).max(config.engine.max_sequences)
}

fn cuda_options(config: &WorkerConfig, max_len: u32) -> CudaOptions {
    let fraction = config.kv.free_gpu_memory_fraction;
    CudaOptions {
        max_sequences: config.engine.max_sequences,
        max_batch_tokens: batch_tokens(config, CUDA_TOKENS),
        // The first steps are a sequence too.
        max_len: max_len.max(warm_up::LONGEST + 1),
        pool: PoolSize::Share { fraction, most: most_blocks(config) },
        block_tokens: config.kv.block_tokens,
        graphs: true,
    }
}

fn cpu_options(config: &WorkerConfig, spec: &ModelSpec) -> Result<CpuOptions> {
    let block_tokens = config.kv.block_tokens;
    let block_bytes = pool_layout(spec, block_tokens, 1).block_bytes();
    let pool = config.kv.pool;
    let blocks = u32::try_from(pool.get() / block_bytes).unwrap_or(u32::MAX);
    ensure!(
        blocks > 0,
        "`kv.pool` = `{pool}` is too small: one block of this model has {block_bytes} bytes"
    );
    Ok(CpuOptions {
        threads: match config.engine.threads {
            0 => os::cores_available().get(),
            threads => threads as usize,
        },
        max_sequences: config.engine.max_sequences,
        max_batch_tokens: batch_tokens(config, MOST_CPU_TOKENS),
        blocks: most_blocks(config).min(blocks),
        block_tokens,
        simd: Simd::Auto,
    })
}

/// A long prompt keeps nobody's next token waiting for longer than some 75 ms: 50 to 100 ms are the aim.
fn step_pace(spec: &ModelSpec, threads: usize) -> StepPace {
    const TARGET: Duration = Duration::from_millis(75);
    /// Additions and multiplications one thread does in a second, roughly.
    const WORK: f64 = 4e10;
    let (hidden, ffn) = (f64::from(spec.hidden), f64::from(spec.ffn));
    let attention = 2.0 * f64::from(spec.query_width() + spec.kv_width()) * hidden;
    let weights = f64::from(spec.layers) * (attention + 3.0 * ffn * hidden);
    let row = 2.0 * weights / (WORK * threads as f64);
    StepPace { target: TARGET, row: Duration::from_secs_f64(row) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cuda::emulated::Emulator;
    use crate::backend::cuda::tests::model::{Shape, tiny_model};
    use crate::model::Architecture;

    fn none(_: u32) -> Result<Arc<dyn Gpu>, GpuError> {
        Err(GpuError::Unavailable("the driver is on holiday".to_owned()))
    }

    fn config(text: &str) -> WorkerConfig {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn devices_are_named_as_in_the_configuration() {
        assert_eq!("auto".parse(), Ok(Device::Auto));
        assert_eq!("cpu".parse(), Ok(Device::Cpu));
        assert_eq!("cuda:0".parse(), Ok(Device::Cuda(0)));
        assert_eq!("cuda:12".parse(), Ok(Device::Cuda(12)));
        for name in ["", "gpu", "cuda", "cuda:", "cuda:x", "cuda:+1", "cuda:-1", "cuda:4294967296"]
        {
            assert_eq!(name.parse::<Device>(), Err(UnknownDevice), "{name}");
        }
    }

    #[test]
    fn auto_takes_the_cpu_where_there_is_no_gpu_and_a_named_gpu_is_an_error() {
        assert!(Found::find(Device::Auto, none).unwrap().gpu.is_none());
        let error = Found::find(Device::Cuda(3), none).unwrap_err();
        assert_eq!(error.to_string(), "no CUDA device: the driver is on holiday");
    }

    #[test]
    fn auto_asks_for_the_first_gpu_and_the_cpu_for_none() {
        let asked = std::cell::Cell::new(None);
        let open = |ordinal| {
            asked.set(Some(ordinal));
            none(ordinal)
        };
        Found::find(Device::Cpu, open).unwrap();
        assert_eq!(asked.take(), None);
        Found::find(Device::Auto, open).unwrap();
        assert_eq!(asked.take(), Some(0));
        Found::find(Device::Cuda(5), open).unwrap_err();
        assert_eq!(asked.take(), Some(5));
    }

    #[test]
    fn the_pool_of_a_gpu_is_a_share_of_what_is_free_and_max_tokens_bounds_it() {
        let pool = |text| cuda_options(&config(text), 2048).pool;
        let share = |fraction, most| PoolSize::Share { fraction, most };
        assert_eq!(pool(""), share(0.9, u32::MAX));
        assert_eq!(pool("[kv]\nfree_gpu_memory_fraction = 0.4"), share(0.4, u32::MAX));
        let bounded = share(0.9, 128);
        assert_eq!(pool("[kv]\nmax_tokens = 4096\npool = \"1MiB\""), bounded);
    }

    #[test]
    fn a_gpus_step_has_8192_tokens_unless_configured_and_one_for_each_sequence() {
        let tokens = |text| cuda_options(&config(text), 2048).max_batch_tokens;
        assert_eq!(tokens(""), 8192);
        assert_eq!(tokens("[engine]\nmax_batch_tokens = 512"), 512);
        assert_eq!(tokens("[engine]\nmax_batch_tokens = 8\nmax_sequences = 256"), 256);
        // The first steps must fit, however short sequences are.
        assert!(cuda_options(&config(""), 16).max_len > warm_up::LONGEST);
    }

    #[test]
    fn only_auto_leaves_a_model_that_the_kernels_cannot_run_to_the_cpu() {
        let model = || CudaError::Model("`head_dim` is 96".to_owned());
        let full = || GpuError::OutOfMemory { what: "x".to_owned(), bytes: 9, free: 5, total: 8 };
        let reason = reason_for_the_cpu(model(), true).unwrap();
        assert_eq!(reason, "the cuda back end cannot run this model: `head_dim` is 96");
        reason_for_the_cpu(model(), false).unwrap_err();
        let error = reason_for_the_cpu(full().into(), true).unwrap_err();
        // As `main` prints it: once.
        let said = format!("{:#}", anyhow::Error::from(error));
        assert_eq!(said, "out of device memory: x needs 9 bytes, 5 of 8 are free");
    }

    /// Two layers whose heads are so wide, on an emulated GPU of so much memory.
    fn loaded(head_dim: u32, memory: u64, is_auto: bool) -> Result<Loaded> {
        let shape =
            Shape { architecture: Architecture::Llama, heads: (2, 1, head_dim), tied: true };
        let config = config(
            "[engine]\nmax_sequences = 2\nmax_batch_tokens = 64\nthreads = 1\n\
             cpu_weights = \"q8_0\"\n[kv]\nmax_tokens = 160",
        );
        let found = Found { gpu: Some(Emulator::new(memory, 2, false)), is_auto };
        found.load(&config, &mut &tiny_model(&shape), 512)
    }

    #[test]
    fn a_gpu_has_the_weights_of_the_files_and_cuts_prompts_by_tokens() {
        for is_auto in [false, true] {
            let mut loaded = loaded(32, 1 << 30, is_auto).unwrap();
            assert_eq!((loaded.device.as_str(), loaded.gpu), ("cuda:0", Some(0)));
            assert_eq!((loaded.weights, loaded.pace), (CpuWeights::AsIs, None));
            let caps = loaded.backend.caps();
            assert_eq!((caps.lag, caps.max_sequences, caps.max_batch_tokens), (1, 2, 64));
            assert_eq!(loaded.backend.pool().layout.blocks, 5);
            warm_up::warm_up(&mut *loaded.backend).unwrap();
        }
    }

    #[test]
    fn a_model_that_the_kernels_cannot_run_is_on_the_cpu_with_auto() {
        let on_cpu = loaded(48, 1 << 30, true).unwrap();
        assert!(on_cpu.device.starts_with("cpu ("), "{}", on_cpu.device);
        assert_eq!((on_cpu.weights, on_cpu.gpu), (CpuWeights::Q8_0, None));
        assert!(on_cpu.pace.is_some());
        let error = loaded(48, 1 << 30, false).err().unwrap().to_string();
        assert!(error.contains("`head_dim` is 48"), "{error}");
    }

    #[test]
    fn memory_that_is_not_there_is_an_error_with_auto_too() {
        let error = loaded(32, 200_000, true).err().unwrap().to_string();
        assert!(error.starts_with("out of device memory: "), "{error}");
        assert!(error.ends_with(" of 200000 are free"), "{error}");
    }

    #[test]
    fn keys_of_the_other_device_are_named() {
        let of = |text, on| without_effect(&config(text), on);
        assert!(of("", false).is_empty() && of("", true).is_empty());
        let all = "[engine]\nthreads = 2\ncpu_weights = \"q8_0\"\n\
                   [kv]\npool = \"1GiB\"\nfree_gpu_memory_fraction = 0.5";
        assert_eq!(of(all, false), ["kv.free_gpu_memory_fraction"]);
        assert_eq!(of(all, true), ["engine.threads", "engine.cpu_weights", "kv.pool"]);
    }
}
