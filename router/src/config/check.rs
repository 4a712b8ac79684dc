//! What a configuration must hold beyond its types, and where a mistake stands.

use std::path::Path;
use std::time::Duration;

use baton_shared::config::units::Seconds;
use baton_shared::config::{ConfigError, Document};
use baton_shared::wire::auth::{Keys, KeysError};

use super::{Loaded, PoolConfig, RouterConfig, ScheduleStyle, ServerEntry};
use crate::admin::token::{Token, TokenError};
use crate::table::Phase;

/// Names the place of a mistake: in a file, or nowhere.
type At<'a> = &'a dyn Fn(&str, String) -> ConfigError;

const LATER: &str = "is not available yet";

/// Reads one of our own files, and the key file it names.
///
/// # Errors
/// The first mistake, with its line.
pub(super) fn load(path: &Path) -> Result<Loaded, ConfigError> {
    let document = Document::read_toml(path)?;
    let config = RouterConfig::from_document(&document)?;
    let keys = config.load_keys(&document)?;
    if let Some(file) = &config.server.admin_token_file {
        let refuse =
            |error: TokenError| document.error("server.admin_token_file", error.to_string());
        Token::load(file).map_err(refuse)?;
    }
    Ok(Loaded { config, keys, without_effect: Vec::new(), document: Some(document) })
}

impl RouterConfig {
    /// Reads the text of one of our own files and checks it.
    ///
    /// # Errors
    /// The first mistake, with its line.
    pub fn from_document(document: &Document) -> Result<Self, ConfigError> {
        let config: Self = document.parse()?;
        config.check(&|key, rule| document.error(key, rule))?;
        Ok(config)
    }

    /// The same for a text that replaces sections of a `running` configuration and leaves out those that stay. What is
    /// read at the start only stays also where its section is given without it: the default could never be taken over.
    ///
    /// # Errors
    /// The first mistake, with its line.
    pub fn from_sections(document: &Document, running: &Self) -> Result<Self, ConfigError> {
        let mut given: Self = document.parse()?;
        macro_rules! stay {
            ($($section:ident.$key:ident)*) => {$(
                if !document.has(concat!(stringify!($section), ".", stringify!($key))) {
                    given.$section.$key.clone_from(&running.$section.$key);
                }
            )*};
        }
        stay! {
            server.listen server.threads server.admin_listen server.admin_token_file server.drain_timeout
            routing.node_id log.format
        }
        let has = |section: &str| document.has(section);
        let config = Self {
            server: if has("server") { given.server } else { running.server.clone() },
            routing: if has("routing") { given.routing } else { running.routing.clone() },
            context: if has("context") { given.context } else { running.context.clone() },
            generation: if has("generation") {
                given.generation
            } else {
                running.generation.clone()
            },
            health: if has("health") { given.health } else { running.health.clone() },
            limits: if has("limits") { given.limits } else { running.limits.clone() },
            auth: if has("auth") { given.auth } else { running.auth.clone() },
            log: if has("log") { given.log } else { running.log.clone() },
        };
        config.check(&|key, rule| document.error(key, rule))?;
        Ok(config)
    }

    /// The keys of the file that `document` names.
    ///
    /// # Errors
    /// If the file cannot be used.
    pub fn load_keys(&self, document: &Document) -> Result<Keys, ConfigError> {
        let refuse = |error: KeysError| {
            document.error("auth.internal_request_auth_key_file", error.to_string())
        };
        match &self.auth.internal_request_auth_key_file {
            None => Ok(Keys::none()),
            Some(file) => Keys::load(file).map_err(refuse),
        }
    }

    /// Checks a configuration that no file of ours stands behind.
    ///
    /// # Errors
    /// The first mistake, without a line.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.check(&|key, rule| ConfigError::new(key, rule))
    }

    fn check(&self, at: At<'_>) -> Result<(), ConfigError> {
        self.check_server(at)?;
        self.check_routing(at)?;
        self.check_pool(Phase::Context, &self.context, at)?;
        self.check_pool(Phase::Generation, &self.generation, at)?;
        self.check_shared_servers(at)?;
        self.check_health(at)?;
        self.check_limits(at)?;
        baton_shared::telemetry::check_level(&self.log.level)
            .map_err(|error| at("log.level", error.to_string()))
    }

    fn check_server(&self, at: At<'_>) -> Result<(), ConfigError> {
        let server = &self.server;
        if !server.admin_listen.is_loopback() && server.admin_token_file.is_none() {
            let rule =
                "needs `server.admin_token_file`, or must be an address of this machine only";
            return Err(at("server.admin_listen", rule.to_owned()));
        }
        if server.threads > 1024 {
            return Err(at("server.threads", "must be at most 1024".to_owned()));
        }
        Ok(())
    }

    fn check_routing(&self, at: At<'_>) -> Result<(), ConfigError> {
        let routing = &self.routing;
        if routing.schedule_style == ScheduleStyle::GenerationFirst {
            return Err(at("routing.schedule_style", LATER.to_owned()));
        }
        positive(at, "routing.request_timeout", routing.request_timeout)?;
        positive(at, "routing.context_timeout", routing.context_timeout)?;
        positive(at, "routing.first_token_timeout", routing.first_token_timeout)?;
        positive(at, "routing.idle_timeout", routing.idle_timeout)?;
        at_least_one(at, "routing.attempts", u64::from(routing.attempts))
    }

    fn check_pool(&self, phase: Phase, pool: &PoolConfig, at: At<'_>) -> Result<(), ConfigError> {
        let name = phase.as_str();
        if pool.servers.is_empty() {
            let rule = format!("needs at least one server: add `[[{name}.servers]]` with a `url`");
            return Err(at(&format!("{name}.servers"), rule));
        }
        let mut seen = Vec::new();
        for (index, entry) in pool.servers.iter().enumerate() {
            let key = |field: &str| format!("{name}.servers[{index}]{field}");
            check_entry(entry, at, &key)?;
            let field = if entry.name.is_some() { ".name" } else { ".url" };
            let id = entry.id().map_err(|error| at(&key(field), error.to_string()))?;
            if seen.contains(&id) {
                let rule = format!("`{id}` is listed twice: give one of them another `name`");
                return Err(at(&key(field), rule));
            }
            seen.push(id);
        }
        Ok(())
    }

    /// A server in both lists is one worker, so both entries must describe the same.
    fn check_shared_servers(&self, at: At<'_>) -> Result<(), ConfigError> {
        for (index, entry) in self.generation.servers.iter().enumerate() {
            let id = entry.id().ok();
            let twin = self.context.servers.iter().find(|other| other.id().ok() == id);
            if twin.is_some_and(|twin| twin != entry) {
                let rule = "is in both lists with the same identity, so both entries must be equal";
                return Err(at(&format!("generation.servers[{index}]"), rule.to_owned()));
            }
        }
        Ok(())
    }

    fn check_health(&self, at: At<'_>) -> Result<(), ConfigError> {
        let health = &self.health;
        let legal = |b: u8| b.is_ascii_graphic();
        if !health.probe_path.starts_with('/') || !health.probe_path.bytes().all(legal) {
            let rule = "must start with `/` and hold no spaces";
            return Err(at("health.probe_path", rule.to_owned()));
        }
        positive(at, "health.probe_interval", health.probe_interval)?;
        positive(at, "health.probe_timeout", health.probe_timeout)?;
        positive(at, "health.eject_time", health.eject_time)?;
        at_least_one(at, "health.eject_after", u64::from(health.eject_after))?;
        if health.eject_time_max < health.eject_time {
            let rule = format!("must be at least `health.eject_time` ({})", health.eject_time);
            return Err(at("health.eject_time_max", rule));
        }
        Ok(())
    }

    fn check_limits(&self, at: At<'_>) -> Result<(), ConfigError> {
        let limits = &self.limits;
        positive(at, "limits.head_timeout", limits.head_timeout)?;
        positive(at, "limits.body_timeout", limits.body_timeout)?;
        at_least_one(at, "limits.max_body", limits.max_body.0)?;
        at_least_one(at, "limits.max_context_answer", limits.max_context_answer.0)?;
        at_least_one(at, "limits.max_in_flight", limits.max_in_flight as u64)
    }
}

fn check_entry(
    entry: &ServerEntry,
    at: At<'_>,
    key: &dyn Fn(&str) -> String,
) -> Result<(), ConfigError> {
    if !(1..=10_000).contains(&entry.weight) {
        return Err(at(&key(".weight"), "must be from 1 to 10000".to_owned()));
    }
    Ok(())
}

fn positive(at: At<'_>, key: &str, value: Seconds) -> Result<(), ConfigError> {
    if value.0 == Duration::ZERO {
        return Err(at(key, "must be longer than zero".to_owned()));
    }
    Ok(())
}

fn at_least_one(at: At<'_>, key: &str, value: u64) -> Result<(), ConfigError> {
    if value == 0 {
        return Err(at(key, "must be at least 1".to_owned()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::PolicyName;

    /// Servers at the end, so that tests may put whole sections before them.
    const SERVERS: &str = "
[[context.servers]]
url = \"localhost:8001\"
[[generation.servers]]
url = \"localhost:8003\"
";

    fn read(text: &str) -> Result<RouterConfig, ConfigError> {
        let document = Document::from_toml(Some("router.toml".into()), text.to_owned())?;
        RouterConfig::from_document(&document)
    }

    fn mistake(text: &str) -> String {
        read(&format!("{text}{SERVERS}")).unwrap_err().to_string()
    }

    #[test]
    fn the_shipped_file_holds_the_defaults_and_names_every_key() {
        let text = include_str!("../../../config/router.toml");
        let config = read(text).unwrap();
        let mut expected = RouterConfig::default().spelled_out();
        expected.context.servers = config.context.servers.clone();
        expected.generation.servers = config.generation.servers.clone();
        assert_eq!(config, expected);
        assert_eq!((config.context.servers.len(), config.generation.servers.len()), (2, 1));
        for (section, values) in toml::Table::try_from(&config).unwrap() {
            assert!(text.contains(&format!("\n[{section}]")), "{section}");
            for key in values.as_table().unwrap().keys().filter(|key| *key != "servers") {
                assert!(text.contains(&format!("\n{key} = ")), "{section}.{key}");
            }
        }
    }

    #[test]
    fn the_shipped_clusters_router_is_valid() {
        let text = include_str!("../../../config/cluster.toml");
        let cluster: toml::Table = toml::from_str(text).unwrap();
        let config: RouterConfig = cluster["router"].clone().try_into().unwrap();
        config.validate().unwrap();
    }

    #[test]
    fn two_servers_are_enough_and_the_rest_has_defaults() {
        let config = read(SERVERS).unwrap();
        assert_eq!(config.server.listen.to_string(), "127.0.0.1:8000");
        assert_eq!(config.routing.attempts, 3);
        assert_eq!(config.health.probe_interval, Seconds::new(2));
        assert_eq!(config.limits.max_body.to_string(), "32MiB");
    }

    #[test]
    fn what_is_printed_is_read_back_as_the_same() {
        let config = read(SERVERS).unwrap();
        assert_eq!(read(&toml::to_string(&config).unwrap()).unwrap(), config);
    }

    #[test]
    fn a_mistake_names_file_line_key_value_and_rule() {
        assert_eq!(
            mistake("[routing]\nattempts = 0\n"),
            "router.toml:2: `routing.attempts` = `0`: must be at least 1"
        );
        assert_eq!(
            mistake("[health]\neject_time = \"2m\"\n"),
            "router.toml:1: `health.eject_time_max`: must be at least `health.eject_time` (120s)"
        );
    }

    #[test]
    fn keys_that_are_not_built_say_so() {
        for text in [
            "[routing]\nschedule_style = \"generation_first\"\n",
            "[[context.servers]]\nurl = \"https://h:1\"\n",
        ] {
            let mistake = mistake(text);
            assert!(mistake.contains("not available yet"), "{mistake}");
        }
    }

    #[test]
    fn an_admin_port_that_others_can_reach_needs_a_token() {
        let open = "[server]\nadmin_listen = \"0.0.0.0:9000\"\n";
        let mistake = mistake(open);
        assert!(
            mistake.contains("router.toml:2") && mistake.contains("admin_token_file"),
            "{mistake}"
        );
        assert!(read(&format!("{open}admin_token_file = \"/x\"\n{SERVERS}")).is_ok());
    }

    #[test]
    fn an_unknown_key_and_a_number_without_a_unit_are_refused() {
        assert!(mistake("[routing]\natempts = 3\n").contains("atempts"));
        let unit = mistake("[routing]\nidle_timeout = 30\n");
        assert!(unit.contains("router.toml:2") && unit.contains("30s"), "{unit}");
    }

    #[test]
    fn each_role_needs_a_server_and_no_server_twice() {
        let none = read("[context]\n").unwrap_err().to_string();
        assert!(none.contains("context.servers") && none.contains("at least one"), "{none}");
        let twice = mistake("[[context.servers]]\nurl = \"http://localhost:8001\"\n");
        assert!(twice.contains("`localhost:8001` is listed twice"), "{twice}");
    }

    #[test]
    fn a_server_in_both_lists_must_be_described_alike() {
        let both = |extra: &str| {
            read(&format!("{SERVERS}[[generation.servers]]\nurl = \"localhost:8001\"\n{extra}"))
        };
        assert!(both("").is_ok());
        assert!(both("weight = 2\n").unwrap_err().to_string().contains("both lists"));
    }

    #[test]
    fn each_policy_and_upstreams_names_are_accepted() {
        for (name, policy) in [
            ("round_robin", PolicyName::RoundRobin),
            ("least_loaded", PolicyName::LeastLoaded),
            ("load_balancing", PolicyName::LeastLoaded),
            ("power_of_two", PolicyName::PowerOfTwo),
            ("prefix", PolicyName::Prefix),
            ("kv_cache_aware", PolicyName::KvCacheAware),
            ("conversation", PolicyName::Conversation),
        ] {
            for phase in ["context", "generation"] {
                let config = read(&format!("[{phase}]\npolicy = \"{name}\"\n{SERVERS}")).unwrap();
                let pool = if phase == "context" { config.context } else { config.generation };
                assert_eq!(pool.policy, policy);
            }
        }
    }

    #[test]
    fn that_kv_cache_aware_runs_as_prefix_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("router.toml");
        std::fs::write(&file, format!("[generation]\npolicy = \"kv_cache_aware\"\n{SERVERS}"))
            .unwrap();
        let notes = Loaded::read(&file).unwrap().without_effect;
        assert_eq!(notes, ["generation: kv_cache_aware (runs as prefix, KV events are not read)"]);
    }
}
