//! TensorRT-LLM's `disagg_config.yaml` as a configuration of ours.
//!
//! What upstream says wins; what it does not know keeps our defaults. Reading and judging the file is
//! `baton_shared::config::trtllm`.

use std::path::Path;

use baton_shared::config::ConfigError;
use baton_shared::config::net::{HostPort, Listen};
use baton_shared::config::trtllm::{DisaggConfig, LoadBalancing, ServerSection};
use baton_shared::wire::auth::Keys;

use super::{LoadMeasure, Loaded, PolicyName, PoolConfig, RouterConfig, ServerEntry};

/// Reads `disagg_config.yaml`.
///
/// # Errors
/// The first mistake, with its line.
pub(super) fn load(path: &Path) -> Result<Loaded, ConfigError> {
    Ok(ours(DisaggConfig::read(path)?))
}

fn ours(theirs: DisaggConfig) -> Loaded {
    let mut config = RouterConfig::default();
    let at = HostPort { host: theirs.hostname, port: theirs.port };
    config.server.listen = Listen::Tcp(at);
    if theirs.document.has("max_retries") {
        config.routing.attempts = theirs.max_retries + 1;
    }
    config.routing.node_id = theirs.node_id;
    config.routing.max_local_prefill_length = theirs.max_local_prefill_length;
    config.context = pool(theirs.context);
    config.generation = pool(theirs.generation);
    let keys = theirs.internal_request_auth_key.map_or_else(Keys::none, Keys::single);
    Loaded { config, keys, without_effect: theirs.without_effect, document: None }
}

fn pool(theirs: ServerSection) -> PoolConfig {
    let (policy, load) = match theirs.router {
        LoadBalancing::RoundRobin => (PolicyName::RoundRobin, None),
        LoadBalancing::LeastLoaded { use_tokens: true } => {
            (PolicyName::LeastLoaded, Some(LoadMeasure::Tokens))
        }
        LoadBalancing::LeastLoaded { use_tokens: false } => {
            (PolicyName::LeastLoaded, Some(LoadMeasure::Requests))
        }
        LoadBalancing::KvCacheAware { use_tokens } => {
            let measure = if use_tokens { LoadMeasure::Tokens } else { LoadMeasure::Requests };
            (PolicyName::KvCacheAware, Some(measure))
        }
        // Upstream's load here is estimated tokens, whatever the file says.
        LoadBalancing::Conversation => (PolicyName::Conversation, Some(LoadMeasure::Tokens)),
    };
    PoolConfig { policy, load, servers: theirs.urls.into_iter().map(ServerEntry::new).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(more: &str) -> Loaded {
        let text = format!(
            "hostname: localhost\nport: 8000\nbackend: pytorch\ncontext_servers:\n  num_instances: 2\n  urls:\n\
             \x20   - \"localhost:8001\"\n    - \"localhost:8002\"\n  router: {{type: load_balancing, use_tokens: true}}\n\
             generation_servers:\n  num_instances: 1\n  urls:\n    - \"localhost:8003\"\n{more}"
        );
        ours(DisaggConfig::parse(None, text).unwrap())
    }

    #[test]
    fn the_file_of_the_documentation_becomes_a_valid_configuration() {
        let Loaded { config, keys, without_effect, .. } = read("");
        config.validate().unwrap();
        assert_eq!(config.server.listen.to_string(), "localhost:8000");
        let urls: Vec<_> = config.context.servers.iter().map(|s| s.url.to_string()).collect();
        assert_eq!(urls, ["localhost:8001", "localhost:8002"]);
        assert_eq!(config.context.policy, PolicyName::LeastLoaded);
        assert_eq!(config.context.load, Some(LoadMeasure::Tokens));
        assert_eq!(config.generation.policy, PolicyName::RoundRobin);
        assert_eq!(config.routing, super::super::RoutingConfig::default());
        assert!(!keys.authenticate());
        assert_eq!(without_effect, ["backend"]);
    }

    #[test]
    fn retries_node_key_and_short_prompts_are_taken_over() {
        let loaded = read(
            "max_retries: 0\nnode_id: 7\ninternal_request_auth_key: secret\n\
             conditional_disagg_config: {max_local_prefill_length: 100}\n",
        );
        assert_eq!(loaded.config.routing.max_local_prefill_length, 100);
        assert_eq!(loaded.config.routing.attempts, 1);
        assert_eq!(loaded.config.routing.node_id, Some(7));
        assert!(loaded.keys.authenticate());
    }
}
