//! The command line: our own flags, and those of `trtllm-serve` that make sense here.
//!
//! Decides what wins: command line over file over environment over defaults. What is known but not built yet is
//! refused as bad configuration; what is not known is a usage error.

use std::path::PathBuf;

use baton_shared::config::net::{HostPort, Listen};
use baton_shared::config::units::Bytes;
use baton_shared::config::{self, ConfigError, Document};
use baton_shared::role::Role;
use clap::Parser;

use crate::config::{WorkerConfig, not_yet};

/// One inference worker daemon. Flags of `trtllm-serve` are accepted with underscores as well.
#[derive(Clone, Debug, Default, Parser)]
#[command(name = "baton-workerd", version)]
pub struct Args {
    /// Directory (Hugging Face layout), `.gguf` file, or hub id
    pub model: Option<String>,
    /// What this worker is for: context, generation or both; every worker serves every request
    #[arg(long, visible_alias = "server_role", alias = "server-role", value_parser = role)]
    pub role: Option<Role>,
    /// Where to serve HTTP, `host:port`; port 0 = any free one
    #[arg(long, value_name = "HOST:PORT", conflicts_with_all = ["host", "port"])]
    pub listen: Option<Listen>,
    /// Host part of `--listen`
    #[arg(long)]
    pub host: Option<String>,
    /// Port part of `--listen`
    #[arg(long)]
    pub port: Option<u16>,
    /// Configuration: our TOML, or (`.yaml`, `.yml`) the options file of `trtllm-serve`
    #[arg(
        long,
        short = 'c',
        value_name = "FILE",
        visible_alias = "extra_llm_api_options",
        alias = "extra-llm-api-options"
    )]
    pub config: Option<PathBuf>,
    /// Name clients may use for the model; may be repeated
    #[arg(long, value_name = "NAME", alias = "served_model_name")]
    pub served_model_name: Vec<String>,
    /// What computes: auto, cpu or cuda:N (N counts the visible GPUs from 0)
    #[arg(long)]
    pub device: Option<String>,
    /// CPU threads; 0 = as many as there are cores
    #[arg(long)]
    pub threads: Option<u32>,
    /// How weights are kept on the CPU: as-is, q8_0 or q4_1 (made smaller at load)
    #[arg(long, value_name = "TYPE", alias = "cpu_weights")]
    pub cpu_weights: Option<String>,
    /// Size of the KV pool on the CPU, as in `512MiB`
    #[arg(long, value_name = "SIZE", alias = "kv_pool")]
    pub kv_pool: Option<Bytes>,
    /// Size of the KV pool on a GPU, as a share of the memory that is free beside the model
    #[arg(
        long,
        value_name = "SHARE",
        visible_alias = "kv_cache_free_gpu_memory_fraction",
        alias = "free_gpu_memory_fraction"
    )]
    pub free_gpu_memory_fraction: Option<f64>,
    /// error, warn, info, debug, trace, or a filter
    #[arg(long, value_name = "LEVEL", alias = "log_level")]
    pub log_level: Option<String>,
    /// Only say whether the configuration is right
    #[arg(long, conflicts_with = "print_config")]
    pub check: bool,
    /// Only print the configuration that results
    #[arg(long)]
    pub print_config: bool,
    /// `pytorch` is accepted without effect
    #[arg(long, hide_short_help = true)]
    pub backend: Option<String>,
    /// Tensor parallel ranks; 1
    #[arg(long, value_name = "N", hide_short_help = true, alias = "tp_size")]
    pub tp_size: Option<u32>,
    /// Pipeline parallel ranks; 1
    #[arg(long, value_name = "N", hide_short_help = true, alias = "pp_size")]
    pub pp_size: Option<u32>,
    /// Service discovery; not available yet
    #[arg(long, value_name = "URI", hide_short_help = true, alias = "disagg_cluster_uri")]
    pub disagg_cluster_uri: Option<String>,
    /// Service discovery; not available yet
    #[arg(
        long,
        value_name = "FILE",
        hide_short_help = true,
        alias = "metadata_server_config_file"
    )]
    pub metadata_server_config_file: Option<PathBuf>,
}

/// What the process is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Serve.
    Serve,
    /// Say that the configuration is right.
    Check,
    /// Print it.
    Print,
}

impl Args {
    /// What to do once the configuration was found right.
    pub fn action(&self) -> Action {
        if self.print_config {
            Action::Print
        } else if self.check {
            Action::Check
        } else {
            Action::Serve
        }
    }

    /// The configuration that results, checked. `environment` looks a variable up.
    ///
    /// # Errors
    /// The first mistake, with file and line if one is to blame.
    pub fn load(
        self,
        environment: impl Fn(&str) -> Option<String>,
    ) -> Result<WorkerConfig, ConfigError> {
        let (mut config, document) = match &self.config {
            None => (WorkerConfig::default(), None),
            Some(path) if config::is_yaml(path) => {
                let (config, document) = WorkerConfig::read_yaml(path)?;
                (config, Some(document))
            }
            Some(path) => {
                let document = Document::read_toml(path)?;
                (document.parse()?, Some(document))
            }
        };
        let mut from_file = config.clone();
        let has = |key: &str| document.as_ref().is_some_and(|document| document.has(key));
        if let Some(backend) = environment("TRTLLM_NIXL_KVCACHE_BACKEND")
            && !has("handover.nixl_backend")
        {
            config.handover.nixl_backend = backend;
        }
        self.apply(&mut config)?;
        // That the command line names the model is no mistake of the file.
        from_file.model = from_file.model.or_else(|| config.model.clone());
        config.validate().map_err(|error| match document {
            // What the file says is to blame only where nothing has overruled it.
            Some(document) if from_file.validate().is_err_and(|other| other == error) => {
                ConfigError { value: error.value, ..document.error(&error.key, error.rule) }
            }
            Some(_) | None => error,
        })?;
        Ok(config)
    }

    /// Lays the flags over `config`.
    fn apply(self, config: &mut WorkerConfig) -> Result<(), ConfigError> {
        let Self {
            model,
            role,
            listen,
            host,
            port,
            config: _,
            served_model_name,
            device,
            threads,
            cpu_weights,
            kv_pool,
            free_gpu_memory_fraction,
            log_level,
            check: _,
            print_config: _,
            backend,
            tp_size,
            pp_size,
            disagg_cluster_uri,
            metadata_server_config_file,
        } = self;
        refuse_unbuilt(backend, disagg_cluster_uri, metadata_server_config_file)?;
        config.model = model.or(config.model.take());
        set(&mut config.role, role);
        set(&mut config.server.listen, listen);
        replace_address(&mut config.server.listen, host, port)?;
        if !served_model_name.is_empty() {
            config.served_model_names = served_model_name;
        }
        set(&mut config.engine.device, device);
        set(&mut config.engine.threads, threads);
        set(&mut config.engine.cpu_weights, cpu_weights);
        set(&mut config.kv.pool, kv_pool);
        set(&mut config.kv.free_gpu_memory_fraction, free_gpu_memory_fraction);
        set(&mut config.log.level, log_level);
        set(&mut config.engine.tensor_parallel_size, tp_size);
        set(&mut config.engine.pipeline_parallel_size, pp_size);
        Ok(())
    }
}

fn set<T>(target: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *target = value;
    }
}

fn refuse_unbuilt(
    backend: Option<String>,
    cluster: Option<String>,
    metadata: Option<PathBuf>,
) -> Result<(), ConfigError> {
    if let Some(other) = backend.filter(|name| name != "pytorch") {
        let rule = "is not supported: leave it out, or use `pytorch`";
        return Err(ConfigError::new("--backend", rule).with_value(other));
    }
    let instead = "list the workers in the router's configuration";
    if let Some(uri) = cluster {
        return Err(not_yet("--disagg_cluster_uri", uri, instead));
    }
    if let Some(file) = metadata {
        return Err(not_yet("--metadata_server_config_file", file.display(), instead));
    }
    Ok(())
}

/// `--host` and `--port` replace one part of the address each.
fn replace_address(
    listen: &mut Listen,
    host: Option<String>,
    port: Option<u16>,
) -> Result<(), ConfigError> {
    if host.is_none() && port.is_none() {
        return Ok(());
    }
    let HostPort { host: old_host, port: old_port } = match listen {
        Listen::Tcp(address) => address.clone(),
        Listen::Unix(_) | Listen::Inherited(_) => HostPort { host: "127.0.0.1".into(), port: 8001 },
    };
    let host = host.unwrap_or(old_host);
    let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(&host);
    let address = HostPort { host: bare.to_owned(), port: port.unwrap_or(old_port) };
    // Printed and read again, so that the host is checked as everywhere.
    *listen = address.to_string().parse().map_err(|error: config::net::InvalidAddress| {
        ConfigError::new("--host", error.to_string()).with_value(host.clone())
    })?;
    Ok(())
}

/// Upstream writes roles in capitals.
fn role(text: &str) -> Result<Role, String> {
    [Role::Context, Role::Generation, Role::Both]
        .into_iter()
        .find(|role| role.as_str().eq_ignore_ascii_case(text))
        .ok_or_else(|| "must be context, generation or both".to_owned())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn args(line: &str) -> Args {
        let words = std::iter::once("baton-workerd").chain(line.split_whitespace());
        Args::try_parse_from(words).unwrap()
    }

    fn load(line: &str) -> Result<WorkerConfig, ConfigError> {
        args(line).load(|_| None)
    }

    fn file(ending: &str, text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::Builder::new().suffix(ending).tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    #[test]
    fn both_spellings_of_trtllm_serves_flags_are_understood() {
        let ours = load("M --role context --listen localhost:9 --served-model-name a").unwrap();
        for line in [
            "M --server_role CONTEXT --host localhost --port 9 --served_model_name a --backend pytorch",
            "M --server-role Context --host localhost --port 9 --served-model-name a --tp_size 1 --pp-size 1",
        ] {
            assert_eq!(load(line).unwrap(), ours, "{line}");
        }
    }

    #[test]
    fn the_command_line_wins_over_the_file() {
        let file =
            file(".toml", "model = \"F\"\nrole = \"context\"\n[server]\nlisten = \"127.0.0.1:7\"");
        let line =
            format!("--config {} --role generation --port 8 --threads 3", file.path().display());
        let config = load(&line).unwrap();
        assert_eq!(config.model.as_deref(), Some("F"));
        assert_eq!(config.role, Role::Generation);
        assert_eq!(config.server.listen.to_string(), "127.0.0.1:8");
        assert_eq!(config.engine.threads, 3);
    }

    #[test]
    fn a_mistake_in_the_file_names_file_and_line_and_one_on_the_command_line_does_not() {
        let file = file(".toml", "model = \"F\"\n\n[engine]\ntensor_parallel_size = 2\n");
        let error = load(&format!("--config {}", file.path().display())).unwrap_err();
        assert_eq!((error.line, error.key.as_str()), (Some(4), "engine.tensor_parallel_size"));
        assert!(error.file.is_some());
        let error = load("M --tp_size 2").unwrap_err();
        assert_eq!((error.file, error.key.as_str()), (None, "engine.tensor_parallel_size"));
    }

    #[test]
    fn flags_that_are_not_built_yet_say_so() {
        for line in ["M --disagg_cluster_uri http://h:1", "M --metadata_server_config_file f.yaml"]
        {
            assert!(load(line).unwrap_err().rule.contains("not available yet"));
        }
        assert_eq!(load("M --backend tensorrt").unwrap_err().key, "--backend");
    }

    #[test]
    fn the_nixl_backend_of_the_environment_is_used_unless_the_file_names_one() {
        let environment =
            |name: &str| (name == "TRTLLM_NIXL_KVCACHE_BACKEND").then(|| "LIBFABRIC".to_owned());
        let error = args("M").load(environment).unwrap_err();
        assert_eq!(error.key, "handover.nixl_backend");
        let file = file(".toml", "model = \"F\"\n[handover]\nnixl_backend = \"UCX\"");
        args(&format!("--config {}", file.path().display())).load(environment).unwrap();
    }

    #[test]
    fn an_ipv6_host_may_have_brackets_or_not() {
        for host in ["::1", "[::1]"] {
            let config = load(&format!("M --host {host} --port 5")).unwrap();
            assert_eq!(config.server.listen.to_string(), "[::1]:5");
        }
        assert_eq!(load("M --host a/b").unwrap_err().key, "--host");
    }

    #[test]
    fn unknown_flags_and_roles_are_usage_errors() {
        for line in ["M --surprise", "M --role decode", "M --port x", "M --listen h:1 --port 2"] {
            let words = ["baton-workerd"].into_iter().chain(line.split_whitespace());
            assert_eq!(Args::try_parse_from(words).unwrap_err().exit_code(), 2, "{line}");
        }
    }
}
