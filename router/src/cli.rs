//! The command line: our own flags, and those of `trtllm-serve disaggregated` under their names.

use std::path::PathBuf;

use baton_shared::config::ConfigError;
use baton_shared::config::net::Listen;
use baton_shared::config::units::Seconds;
use clap::Parser;

use crate::config::Loaded;

/// Ingress for disaggregated LLM serving: one OpenAI-compatible endpoint in front of context and generation
/// workers.
#[derive(Clone, Debug, Parser)]
#[command(name = "baton-router", version, about)]
pub struct Cli {
    /// Our TOML, or TensorRT-LLM's disagg_config.yaml as it is
    #[arg(short = 'c', long, value_name = "FILE", alias = "config_file")]
    pub config: PathBuf,

    /// Check the configuration and exit: 0, or 78 with what is wrong
    #[arg(long)]
    pub check: bool,

    /// Print the configuration with all defaults as TOML and exit
    #[arg(long)]
    pub print_config: bool,

    /// Where to listen, instead of the file's `server.listen`: HOST:PORT, unix:/PATH or systemd:NAME
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<Listen>,

    /// Where operators are answered, instead of the file's `server.admin_listen`: likewise
    #[arg(long, value_name = "ADDRESS")]
    pub admin_listen: Option<Listen>,

    /// Seconds a whole request may take, instead of the file's `routing.request_timeout`
    #[arg(short = 'r', long, alias = "request_timeout", value_name = "SECONDS")]
    pub request_timeout: Option<u64>,

    /// Log level: error, warn, info, debug or trace, instead of the file's `log.level`
    #[arg(short = 'l', long, alias = "log_level", value_name = "LEVEL")]
    pub log_level: Option<String>,

    /// Accepted for TensorRT-LLM's sake: workers may come up whenever they like
    #[arg(short = 't', long, alias = "server_start_timeout", value_name = "SECONDS")]
    pub server_start_timeout: Option<u64>,

    /// Accepted for TensorRT-LLM's sake, where it has no effect either
    #[arg(long, value_name = "SECONDS", hide = true)]
    pub metrics_log_interval: Option<u64>,

    /// TensorRT-LLM's metadata server: not available yet
    #[arg(short = 'm', long, alias = "metadata_server_config_file", value_name = "FILE")]
    pub metadata_server_config: Option<PathBuf>,
}

impl Cli {
    /// Reads the file and lays the flags over it.
    ///
    /// # Errors
    /// The first mistake, for exit code 78.
    pub fn load(&self) -> Result<Loaded, ConfigError> {
        if let Some(file) = &self.metadata_server_config {
            let error = ConfigError::new("--metadata-server-config", "is not available yet");
            return Err(error.with_value(file.display().to_string()));
        }
        let mut loaded = Loaded::read(&self.config)?;
        if let Some(listen) = &self.listen {
            loaded.config.server.listen = listen.clone();
        }
        if let Some(listen) = &self.admin_listen {
            loaded.config.server.admin_listen = listen.clone();
        }
        if let Some(seconds) = self.request_timeout {
            loaded.config.routing.request_timeout = Seconds::new(seconds);
        }
        if let Some(level) = &self.log_level {
            loaded.config.log.level = our_level(level);
        }
        if self.server_start_timeout.is_some() {
            loaded.without_effect.push("--server-start-timeout".to_owned());
        }
        if self.metrics_log_interval.is_some() {
            loaded.without_effect.push("--metrics-log-interval".to_owned());
        }
        // The flags may have broken what held in the file.
        loaded.config.validate()?;
        Ok(loaded)
    }
}

/// TensorRT-LLM's names of levels; others as they are.
fn our_level(level: &str) -> String {
    match level {
        "internal_error" => "error",
        "warning" => "warn",
        "verbose" => "debug",
        other => other,
    }
    .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    const FILE: &str = "
[[context.servers]]
url = \"localhost:8001\"
[[generation.servers]]
url = \"localhost:8003\"
";

    fn load(args: &[&str]) -> Result<Loaded, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("router.toml");
        std::fs::write(&file, FILE).unwrap();
        let file = file.to_str().unwrap();
        let args = ["baton-router", "-c", file].into_iter().chain(args.iter().copied());
        Cli::try_parse_from(args).unwrap().load()
    }

    #[test]
    fn the_flags_do_not_contradict_each_other() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_win_over_the_file() {
        let flags = ["--listen", "127.0.0.1:7", "-r", "7", "-l", "warning", "-t", "9"];
        let loaded = load(&flags).unwrap();
        assert_eq!(loaded.config.server.listen.to_string(), "127.0.0.1:7");
        assert_eq!(loaded.config.routing.request_timeout, Seconds::new(7));
        assert_eq!(loaded.config.log.level, "warn");
        assert_eq!(loaded.without_effect, ["--server-start-timeout"]);
    }

    #[test]
    fn upstreams_spelling_of_flags_is_accepted() {
        let flags = ["--request_timeout", "7", "--log_level", "verbose"];
        assert_eq!(load(&flags).unwrap().config.log.level, "debug");
    }

    #[test]
    fn a_flag_can_be_as_wrong_as_a_key() {
        let error = load(&["-r", "0"]).unwrap_err().to_string();
        assert_eq!(error, "`routing.request_timeout`: must be longer than zero");
        let error = load(&["-l", "loud"]).unwrap_err().to_string();
        assert!(error.contains("loud"), "{error}");
        let error = load(&["-m", "metadata_config.yaml"]).unwrap_err().to_string();
        assert!(error.contains("not available yet"), "{error}");
    }
}
