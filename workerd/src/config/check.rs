//! What must hold between and within the sections of a worker's configuration.

use baton_shared::config::ConfigError;
use baton_shared::config::net::Listen;
use baton_shared::config::units::Seconds;
use baton_shared::telemetry;

use super::{
    EngineSection, HandoverSection, KvSection, LogSection, NixlSection, ServerSection, WorkerConfig,
};
use crate::device::Device;
use crate::model::narrowed::CpuWeights;

impl WorkerConfig {
    /// What types cannot say.
    ///
    /// # Errors
    /// The first rule that is broken; file and line are for the caller to add.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.validate_model()?;
        self.server.validate()?;
        self.engine.validate()?;
        self.kv.validate()?;
        self.handover.validate()?;
        self.nixl.validate()?;
        self.log.validate()?;
        self.validate_exposure()
    }

    fn validate_model(&self) -> Result<(), ConfigError> {
        if self.model.as_deref().is_none_or(str::is_empty) {
            return Err(broken(
                "model",
                None,
                "is missing: name a directory, a `.gguf` file or a hub id, here or as the first argument",
            ));
        }
        if self.served_model_names.iter().any(String::is_empty) {
            return Err(broken(
                "served_model_names",
                Some("".into()),
                "must not hold an empty name",
            ));
        }
        Ok(())
    }

    /// Whoever is reachable from other machines must be able to tell its peers.
    fn validate_exposure(&self) -> Result<(), ConfigError> {
        let allowed = self.auth.allow_unauthenticated_peers || self.auth.has_key();
        if allowed || !self.is_exposed() {
            return Ok(());
        }
        let rule = "reaches beyond this machine: set `auth.internal_request_auth_key_file` \
                    (or `auth.allow_unauthenticated_peers = true`)";
        Err(if self.server.listen.is_loopback() {
            broken("handover.advertise", Some(self.handover.advertise.clone()), rule)
        } else {
            broken("server.listen", Some(self.server.listen.to_string()), rule)
        })
    }
}

impl ServerSection {
    fn validate(&self) -> Result<(), ConfigError> {
        if let Listen::Unix(_) | Listen::Inherited(_) = self.listen {
            return Err(not_yet("server.listen", &self.listen, "use `host:port`"));
        }
        at_least("server.max_queue", self.max_queue, 1)?;
        positive("server.write_timeout", self.write_timeout)
    }
}

impl EngineSection {
    fn validate(&self) -> Result<(), ConfigError> {
        if let Err(rule) = self.device.parse::<Device>() {
            let value = Some(self.device.clone());
            return Err(broken("engine.device", value, &rule.to_string()));
        }
        if let Err(rule) = self.cpu_weights.parse::<CpuWeights>() {
            let value = Some(self.cpu_weights.clone());
            return Err(broken("engine.cpu_weights", value, &rule.to_string()));
        }
        one("engine.tensor_parallel_size", self.tensor_parallel_size)?;
        one("engine.pipeline_parallel_size", self.pipeline_parallel_size)?;
        at_least("engine.max_sequences", self.max_sequences, 1)
    }
}

impl KvSection {
    fn validate(&self) -> Result<(), ConfigError> {
        if self.block_tokens != 32 {
            return Err(not_yet("kv.block_tokens", self.block_tokens, "use 32"));
        }
        if self.event_buffer > MOST_EVENTS {
            let rule = format!("must be at most {MOST_EVENTS}");
            return Err(broken("kv.event_buffer", Some(self.event_buffer.to_string()), &rule));
        }
        share("kv.free_gpu_memory_fraction", self.free_gpu_memory_fraction)?;
        self.max_leased_fraction.map_or(Ok(()), |part| share("kv.max_leased_fraction", part))
    }
}

impl HandoverSection {
    fn validate(&self) -> Result<(), ConfigError> {
        match self.backend.to_ascii_uppercase().as_str() {
            "NIXL" | "DEFAULT" | "UCX" => {}
            "MPI" | "MOONCAKE" => {
                let rule = "is not supported: use `NIXL` (the default) or `UCX`";
                return Err(broken("handover.backend", Some(self.backend.clone()), rule));
            }
            _ => {
                let rule = "must be `NIXL`, `UCX` or `DEFAULT`";
                return Err(broken("handover.backend", Some(self.backend.clone()), rule));
            }
        }
        match self.nixl_backend.to_ascii_uppercase().as_str() {
            "UCX" => {}
            "LIBFABRIC" => {
                return Err(not_yet("handover.nixl_backend", &self.nixl_backend, "use `UCX`"));
            }
            _ => {
                let rule = "must be `UCX` or `LIBFABRIC`";
                return Err(broken("handover.nixl_backend", Some(self.nixl_backend.clone()), rule));
            }
        }
        match self.fallback.as_str() {
            "error" => {}
            other @ "recompute" => {
                return Err(not_yet("handover.fallback", other, "use `error`"));
            }
            other => {
                let rule = "must be `error` or `recompute`";
                return Err(broken("handover.fallback", Some(other.into()), rule));
            }
        }
        let interface = |b: u8| b.is_ascii_graphic() && !b",;=/".contains(&b);
        if !(1..=15).contains(&self.advertise.len()) || !self.advertise.bytes().all(interface) {
            let rule = "must be the name of a network interface, as in `eth0`";
            return Err(broken("handover.advertise", Some(self.advertise.clone()), rule));
        }
        if self.max_tokens_in_buffer != 0 {
            let key = "handover.max_tokens_in_buffer";
            return Err(not_yet(key, self.max_tokens_in_buffer, "use 0"));
        }
        positive("handover.lease_timeout", self.lease_timeout)?;
        positive("handover.pull_timeout", self.pull_timeout)?;
        positive("handover.quarantine_timeout", self.quarantine_timeout)
    }
}

impl NixlSection {
    fn validate(&self) -> Result<(), ConfigError> {
        const FEWEST: u16 = 8;
        if let Some(range) = &self.port_range {
            let wide = |(first, last): (u16, u16)| {
                first >= 1 && last.checked_sub(first).is_some_and(|n| n >= FEWEST - 1)
            };
            if !self.ports().is_some_and(wide) {
                let rule = "must be `first-last` with at least 8 ports, as in `20000-20100`";
                return Err(broken("nixl.port_range", Some(range.clone()), rule));
            }
        }
        let plain = |b: u8| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_';
        for key in self.ucx.keys() {
            if key.is_empty() || !key.bytes().all(plain) || key.starts_with("UCX_") {
                let rule = "must be a UCX setting without its prefix, as in `TLS`";
                return Err(broken("nixl.ucx", Some(key.clone()), rule));
            }
        }
        Ok(())
    }
}

impl LogSection {
    fn validate(&self) -> Result<(), ConfigError> {
        telemetry::check_level(&self.level)
            .map_err(|_| broken("log.level", Some(self.level.clone()), LEVEL_RULE))
    }
}

/// Each takes some 200 bytes, those of long prompts a few thousand.
const MOST_EVENTS: u32 = 1 << 20;

const LEVEL_RULE: &str =
    "must be error, warn, info, debug, trace or off, or a filter such as `info,target=debug`";

/// A value that breaks `rule`.
fn broken(key: &str, value: Option<String>, rule: &str) -> ConfigError {
    ConfigError { value, ..ConfigError::new(key, rule) }
}

/// A value that will be right one day.
pub fn not_yet(key: &str, value: impl ToString, instead: &str) -> ConfigError {
    broken(key, Some(value.to_string()), &format!("is not available yet: {instead}"))
}

fn at_least(key: &str, value: u32, least: u32) -> Result<(), ConfigError> {
    if value >= least {
        return Ok(());
    }
    Err(broken(key, Some(value.to_string()), &format!("must be at least {least}")))
}

fn share(key: &str, value: f64) -> Result<(), ConfigError> {
    if value > 0.0 && value <= 1.0 {
        return Ok(());
    }
    Err(broken(key, Some(value.to_string()), "must be above 0 and at most 1"))
}

fn one(key: &str, value: u32) -> Result<(), ConfigError> {
    match value {
        1 => Ok(()),
        0 => at_least(key, value, 1),
        more => Err(not_yet(key, more, "use 1")),
    }
}

fn positive(key: &str, value: Seconds) -> Result<(), ConfigError> {
    const LONGEST: Seconds = Seconds::new(24 * 3600);
    if value.0.is_zero() || value > LONGEST {
        let rule = "must be above 0 and at most 24 hours";
        return Err(broken(key, Some(value.to_string()), rule));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use baton_shared::role::Role;

    use super::*;

    fn parse(text: &str) -> WorkerConfig {
        toml::from_str(text).unwrap()
    }

    /// What `validate` says about `model = "m"` and `text`.
    fn refused(text: &str) -> ConfigError {
        parse(&format!("model = \"m\"\n{text}")).validate().unwrap_err()
    }

    #[test]
    fn an_empty_file_is_the_defaults_and_lacks_only_the_model() {
        assert_eq!(parse(""), WorkerConfig::default());
        assert_eq!(parse("").validate().unwrap_err().key, "model");
        parse("model = \"m\"").validate().unwrap();
    }

    #[test]
    fn what_is_printed_reads_back_as_the_same() {
        let config =
            parse("model = \"m\"\n[nixl]\nucx = { TLS = \"tcp\" }\n[kv]\npool = \"64MiB\"");
        assert_eq!(parse(&toml::to_string(&config).unwrap()), config);
    }

    #[test]
    fn the_shipped_files_hold_the_defaults_and_name_every_key() {
        for (text, role, port) in [
            (include_str!("../../../config/workerd-context.toml"), Role::Context, 8001),
            (include_str!("../../../config/workerd-generation.toml"), Role::Generation, 8003),
        ] {
            let config = parse(text);
            config.validate().unwrap();
            let mut expected =
                WorkerConfig { model: config.model.clone(), role, ..WorkerConfig::default() };
            expected.server.listen = Listen::loopback(port);
            assert_eq!(config, expected);
            for (section, values) in toml::Table::try_from(&config).unwrap() {
                let Some(values) = values.as_table() else { continue };
                assert!(text.contains(&format!("\n[{section}]")), "{section}");
                for key in values.keys() {
                    assert!(text.contains(&format!("\n{key} = ")), "{section}.{key}");
                }
            }
        }
    }

    #[test]
    fn an_unknown_key_is_refused_in_every_section() {
        for section in ["", "[server]\n", "[engine]\n", "[kv]\n", "[handover]\n", "[nixl]\n"] {
            assert!(toml::from_str::<WorkerConfig>(&format!("{section}surprise = 1")).is_err());
        }
    }

    #[test]
    fn what_is_not_built_says_so() {
        for (text, key) in [
            ("[engine]\ntensor_parallel_size = 2", "engine.tensor_parallel_size"),
            ("[engine]\npipeline_parallel_size = 2", "engine.pipeline_parallel_size"),
            ("[kv]\nblock_tokens = 64", "kv.block_tokens"),
            ("[handover]\nnixl_backend = \"LIBFABRIC\"", "handover.nixl_backend"),
            ("[handover]\nfallback = \"recompute\"", "handover.fallback"),
            ("[server]\nlisten = \"unix:/run/w.sock\"", "server.listen"),
        ] {
            let error = refused(text);
            assert_eq!(error.key, key);
            assert!(error.rule.contains("not available yet"), "{error}");
        }
    }

    #[test]
    fn values_out_of_range_name_the_key() {
        for (text, key) in [
            ("served_model_names = [\"\"]", "served_model_names"),
            ("[engine]\ndevice = \"tpu\"", "engine.device"),
            ("[engine]\ndevice = \"gpu\"", "engine.device"),
            ("[engine]\ndevice = \"cuda:\"", "engine.device"),
            ("[engine]\ndevice = \"cuda:x\"", "engine.device"),
            ("[engine]\nmax_sequences = 0", "engine.max_sequences"),
            ("[engine]\ncpu_weights = \"q4_0\"", "engine.cpu_weights"),
            ("[kv]\nmax_leased_fraction = 1.5", "kv.max_leased_fraction"),
            ("[kv]\nfree_gpu_memory_fraction = 0.0", "kv.free_gpu_memory_fraction"),
            ("[kv]\nfree_gpu_memory_fraction = 1.5", "kv.free_gpu_memory_fraction"),
            ("[kv]\nfree_gpu_memory_fraction = nan", "kv.free_gpu_memory_fraction"),
            ("[kv]\nevent_buffer = 2000000", "kv.event_buffer"),
            ("[handover]\nbackend = \"MPI\"", "handover.backend"),
            ("[handover]\npull_timeout = \"0s\"", "handover.pull_timeout"),
            ("[handover]\nadvertise = \"\"", "handover.advertise"),
            ("[nixl]\nport_range = \"20000-20001\"", "nixl.port_range"),
            ("[nixl]\nucx = { UCX_TLS = \"tcp\" }", "nixl.ucx"),
            ("[server]\nmax_queue = 0", "server.max_queue"),
            ("[log]\nlevel = \"loud\"", "log.level"),
        ] {
            assert_eq!(refused(text).key, key, "{text}");
        }
    }

    #[test]
    fn a_worker_others_can_reach_needs_a_key_or_an_explicit_no() {
        assert_eq!(refused("[server]\nlisten = \"0.0.0.0:8001\"").key, "server.listen");
        assert_eq!(refused("[handover]\nadvertise = \"eth0\"").key, "handover.advertise");
        for auth in ["allow_unauthenticated_peers = true", "internal_request_auth_key_file = \"k\""]
        {
            let text = format!("model = \"m\"\n[server]\nlisten = \"0.0.0.0:1\"\n[auth]\n{auth}");
            parse(&text).validate().unwrap();
        }
    }

    #[test]
    fn the_prefix_cache_is_on_unless_it_is_switched_off() {
        assert!(parse("").kv.prefix_cache && parse("[kv]\nprefix_cache = true").kv.prefix_cache);
        parse("model = \"m\"\n[kv]\nprefix_cache = true").validate().unwrap();
        assert!(!parse("[kv]\nprefix_cache = false").kv.prefix_cache);
        assert!(toml::from_str::<WorkerConfig>("[kv]\nevent_hash = \"md5\"").is_err());
        let short = parse("[kv]\nevent_hash = \"v2_sha256_64\"").kv.event_hash;
        assert_eq!(short.as_str(), "v2_sha256_64");
    }

    #[test]
    fn a_context_worker_may_lease_more_of_its_pool() {
        assert_eq!(parse("role = \"context\"").max_leased_fraction(), 0.9);
        assert_eq!(parse("").max_leased_fraction(), 0.5);
        assert_eq!(parse("[kv]\nmax_leased_fraction = 0.25").max_leased_fraction(), 0.25);
    }
}
