//! The worker YAML of `trtllm-serve` as our configuration.
//!
//! What only makes the same answers faster is accepted without effect and named in one warning.

use std::path::Path;

use baton_shared::config::trtllm::WorkerSettings;
use baton_shared::config::units::Seconds;
use baton_shared::config::{ConfigError, Document};

use super::{Secret, WorkerConfig};

impl WorkerConfig {
    /// Reads a worker YAML over the defaults; the document is for errors found later.
    ///
    /// # Errors
    /// A key that is unknown or a value that is wrong, with file and line.
    pub fn read_yaml(path: &Path) -> Result<(Self, Document), ConfigError> {
        let (settings, document) = WorkerSettings::read(path)?;
        Ok((Self::from_trtllm(settings), document))
    }

    /// Upstream's settings over our defaults.
    pub fn from_trtllm(settings: WorkerSettings) -> Self {
        let WorkerSettings {
            model,
            max_batch_size,
            max_num_tokens,
            max_seq_len,
            tokens_per_block,
            kv_max_tokens,
            free_gpu_memory_fraction,
            enable_block_reuse,
            event_buffer,
            event_hash,
            max_tokens_in_buffer,
            kv_transfer_timeout,
            internal_request_auth_key,
            mut without_effect,
        } = settings;
        let mut config = Self { model, ..Self::default() };
        let set = |target: &mut u32, value: Option<std::num::NonZeroU32>| {
            *target = value.map_or(*target, std::num::NonZeroU32::get);
        };
        set(&mut config.engine.max_sequences, max_batch_size);
        set(&mut config.engine.max_batch_tokens, max_num_tokens);
        set(&mut config.engine.max_model_len, max_seq_len);
        set(&mut config.kv.block_tokens, tokens_per_block);
        set(&mut config.kv.max_tokens, kv_max_tokens);
        let kv = &mut config.kv;
        kv.free_gpu_memory_fraction =
            free_gpu_memory_fraction.unwrap_or(kv.free_gpu_memory_fraction);
        kv.prefix_cache = enable_block_reuse.unwrap_or(kv.prefix_cache);
        kv.event_buffer = event_buffer.unwrap_or(kv.event_buffer);
        kv.event_hash = event_hash.unwrap_or(kv.event_hash);
        if let Some(timeout) = kv_transfer_timeout {
            let handover = &mut config.handover;
            handover.lease_timeout = Seconds(timeout);
            handover.pull_timeout = handover.pull_timeout.min(Seconds(timeout));
        }
        config.auth.internal_request_auth_key = internal_request_auth_key.map(Secret);
        if max_tokens_in_buffer.is_some() {
            // Blocks go straight from pool to pool: there is no buffer to size.
            without_effect.push("cache_transceiver_config.max_tokens_in_buffer".to_owned());
        }
        Self { without_effect, ..config }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn read(text: &str) -> WorkerConfig {
        let mut file = tempfile::Builder::new().suffix(".yaml").tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        WorkerConfig::read_yaml(file.path()).unwrap().0
    }

    #[test]
    fn the_documentations_context_file_is_our_defaults_and_one_warning() {
        let text = "disable_overlap_scheduler: True\ncache_transceiver_config:\n  backend: UCX\n  \
                    max_tokens_in_buffer: 2048\n";
        let config = read(text);
        let named = ["disable_overlap_scheduler", "cache_transceiver_config.max_tokens_in_buffer"];
        assert_eq!(config.without_effect, named);
        assert_eq!(
            config,
            WorkerConfig {
                without_effect: config.without_effect.clone(),
                ..WorkerConfig::default()
            }
        );
    }

    #[test]
    fn sizes_times_and_the_key_are_taken_over() {
        let config = read(
            "max_batch_size: 8\nmax_num_tokens: 512\nmax_seq_len: 2048\ninternal_request_auth_key: sesame\n\
             kv_cache_config: {max_tokens: 4096, free_gpu_memory_fraction: 0.4, enable_block_reuse: false, event_buffer_max_size: 0}\ncache_transceiver_config: {kv_transfer_timeout_ms: 1500}\n",
        );
        let engine = &config.engine;
        assert_eq!(
            (engine.max_sequences, engine.max_batch_tokens, engine.max_model_len),
            (8, 512, 2048)
        );
        assert_eq!((config.kv.max_tokens, config.kv.free_gpu_memory_fraction), (4096, 0.4));
        assert_eq!((config.kv.prefix_cache, config.kv.event_buffer), (false, 0));
        assert_eq!(config.handover.lease_timeout, Seconds::millis(1500));
        assert_eq!(config.handover.pull_timeout, Seconds::millis(1500));
        assert!(config.auth.has_key());
        assert!(!format!("{config:?}").contains("sesame"));
    }
}
