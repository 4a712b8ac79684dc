//! The command lines of `baton-up` and `baton-client`. They live in the library because `manuals` makes their manual
//! pages and completions.

use std::path::PathBuf;

use baton_shared::config::net::Listen;
use clap::{Parser, ValueEnum};

/// A whole local cluster, workers and router, from one file.
#[derive(Debug, Parser)]
#[command(name = "baton-up", version)]
pub struct Up {
    /// Cluster file: `[router]` has the keys of router.toml, each `[[worker]]` those of a worker's file and a `name`
    pub file: PathBuf,
    /// Send a request when ready, print its answer and who did what
    #[arg(long = "try")]
    pub try_it: bool,
    /// End after the answer (with `--try`) or as soon as the cluster is ready
    #[arg(long)]
    pub once: bool,
    /// Folder for logs and configurations [default: a new one in the system's temporary folder]
    #[arg(long)]
    pub logs: Option<PathBuf>,
}

/// Sends all prompts of a file at once and keeps the answers: the options and files of TensorRT-LLM's
/// `disagg_client.py`.
#[derive(Debug, Parser)]
#[command(name = "baton-client", version)]
pub struct Client {
    /// The router's file, for its address: disagg_config.yaml, or our TOML
    #[arg(
        short = 'c',
        long,
        alias = "disagg_config-file",
        alias = "disagg_config_file",
        value_name = "FILE",
        required_unless_present = "server"
    )]
    pub disagg_config_file: Option<PathBuf>,
    /// The router's address, HOST:PORT or unix:/PATH, instead of the file's
    #[arg(long, value_name = "ADDRESS")]
    pub server: Option<Listen>,
    /// A JSON array of prompts
    #[arg(short = 'p', long, alias = "prompts_file", value_name = "FILE")]
    pub prompts_file: PathBuf,
    /// Most tokens of one answer
    #[arg(long, alias = "max_tokens", value_name = "N", default_value_t = 100,
        value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: u32,
    /// 0 = always the likeliest token
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = temperature)]
    pub temperature: f64,
    /// How long the server may take until it is ready, in seconds
    #[arg(long, alias = "server_start_timeout", value_name = "SECONDS", default_value_t = 180)]
    pub server_start_timeout: u64,
    /// Which API; chat puts a system message before each prompt
    #[arg(short = 'e', long, value_enum, default_value_t = Api::Completions)]
    pub endpoint: Api,
    /// Where the answers go: a JSON array of texts in the order of the prompts
    #[arg(
        short = 'o',
        long,
        alias = "output_file",
        value_name = "FILE",
        default_value = "output.json"
    )]
    pub output_file: PathBuf,
    /// Ask for streams; the answers are the same
    #[arg(long)]
    pub streaming: bool,
    /// Go on to `--max-tokens` after the model's end of text
    #[arg(long, alias = "ignore_eos")]
    pub ignore_eos: bool,
}

/// Of OpenAI's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Api {
    /// `/v1/completions`
    Completions,
    /// `/v1/chat/completions`
    Chat,
}

fn temperature(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.0..=2.0).contains(&value) => Ok(value),
        Ok(_) | Err(_) => Err("must be a number from 0 to 2".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_flags_do_not_contradict_each_other() {
        Up::command().debug_assert();
        Client::command().debug_assert();
    }

    #[test]
    fn upstreams_spelling_of_the_clients_flags_is_accepted() {
        let flags = "baton-client --disagg_config-file a.yaml --prompts-file p.json --max-tokens 7 \
                     --temperature 0.5 --server-start-timeout 9 -e chat -o o.json --streaming --ignore-eos";
        let client = Client::try_parse_from(flags.split_whitespace()).unwrap();
        assert_eq!(client.disagg_config_file, Some("a.yaml".into()));
        assert_eq!((client.max_tokens, client.server_start_timeout), (7, 9));
        assert_eq!((client.temperature, client.endpoint), (0.5, Api::Chat));
        assert!(client.streaming && client.ignore_eos);
        // Or the address, but one of the two.
        assert!(Client::try_parse_from(["baton-client", "-p", "p", "--server", "h:1"]).is_ok());
        assert!(Client::try_parse_from(["baton-client", "-p", "p"]).is_err());
        assert!(
            Client::try_parse_from(["baton-client", "-c", "c", "-p", "p", "--temperature", "nan"])
                .is_err()
        );
    }
}
