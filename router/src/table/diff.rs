//! What differs between two configurations, key by key: for the log, and for the keys that need a restart.

use std::collections::BTreeMap;
use std::fmt;

use toml::{Table, Value};

use crate::config::{PoolConfig, RouterConfig};

/// Keys that are read once, at the start.
const AT_START: [&str; 7] = [
    "server.listen",
    "server.threads",
    "server.admin_listen",
    "server.admin_token_file",
    "server.drain_timeout",
    "routing.node_id",
    "log.format",
];

/// One key that is set otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Dotted; a server goes by its identity: `context.servers[ctx-a].weight`.
    pub key: String,
    /// Before; `None` = not set, or not listed.
    pub from: Option<String>,
    /// Now.
    pub to: Option<String>,
}

impl Change {
    /// Whether a running router cannot follow.
    pub(super) fn needs_restart(&self) -> bool {
        needs_restart(&self.key)
    }
}

/// Whether a key (`server.listen`) is read at the start only, so that a running router refuses its change.
pub fn needs_restart(key: &str) -> bool {
    AT_START.contains(&key)
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.from, &self.to) {
            (Some(from), Some(to)) => write!(f, "{}: {from} -> {to}", self.key),
            (None, Some(to)) => write!(f, "+ {} = {to}", self.key),
            (Some(from), None) => write!(f, "- {} = {from}", self.key),
            (None, None) => write!(f, "{}", self.key),
        }
    }
}

/// Everything that differs, by key.
pub(super) fn changes(old: &RouterConfig, new: &RouterConfig) -> Vec<Change> {
    let (old, new) = (leaves(old), leaves(new));
    let mut changes = Vec::new();
    for key in old.keys().chain(new.keys().filter(|key| !old.contains_key(*key))) {
        let (from, to) = (old.get(key).cloned(), new.get(key).cloned());
        if from != to {
            changes.push(Change { key: key.clone(), from, to });
        }
    }
    changes
}

/// Every key with its value as TOML, defaults spelled out.
fn leaves(config: &RouterConfig) -> BTreeMap<String, String> {
    let config = config.clone().spelled_out();
    let mut leaves = BTreeMap::new();
    for (name, pool) in [("context", &config.context), ("generation", &config.generation)] {
        servers(name, pool, &mut leaves);
    }
    // What cannot be written as TOML cannot have been read from it.
    let sections = Table::try_from(&config).unwrap_or_default();
    for (name, value) in &sections {
        walk(name, value, &mut leaves);
    }
    leaves
}

/// Servers by who they are, so that one more at the top is one change.
fn servers(name: &str, pool: &PoolConfig, leaves: &mut BTreeMap<String, String>) {
    let ids = pool.servers.iter().map(|entry| match entry.id() {
        Ok(id) => id.as_str().to_owned(),
        Err(invalid) => invalid.0,
    });
    let ids: Vec<String> = ids.collect();
    for (entry, id) in pool.servers.iter().zip(&ids) {
        let key = format!("{name}.servers[{id}]");
        leaves.insert(format!("{key}.url"), entry.url.to_string());
        leaves.insert(format!("{key}.weight"), entry.weight.to_string());
        let dialect = Value::try_from(entry.dialect).map(|dialect| dialect.to_string());
        leaves.insert(format!("{key}.dialect"), dialect.unwrap_or_default());
    }
    leaves.insert(format!("{name}.servers"), ids.join(", "));
}

fn walk(key: &str, value: &Value, leaves: &mut BTreeMap<String, String>) {
    match value {
        Value::Table(table) => {
            for (name, value) in table.iter().filter(|(name, _)| *name != "servers") {
                walk(&format!("{key}.{name}"), value, leaves);
            }
        }
        leaf => drop(leaves.insert(key.to_owned(), leaf.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::config;
    use super::*;

    fn shown(old: &RouterConfig, new: &RouterConfig) -> Vec<String> {
        changes(old, new).iter().map(Change::to_string).collect()
    }

    #[test]
    fn equal_configurations_differ_in_nothing_however_they_are_spelled() {
        let old = config(&["a:1"], &["b:1"]);
        assert_eq!(shown(&old, &old.clone().spelled_out()), Vec::<String>::new());
    }

    #[test]
    fn a_change_is_shown_by_key_and_a_server_by_its_identity() {
        let old = config(&["a:1", "c:1"], &["b:1"]);
        let mut new = config(&["d:1", "a:1"], &["b:1"]);
        new.context.servers[1].weight = 2;
        new.routing.attempts = 5;
        let expected = [
            "context.servers: a:1, c:1 -> d:1, a:1",
            "context.servers[a:1].weight: 1 -> 2",
            "- context.servers[c:1].dialect = \"auto\"",
            "- context.servers[c:1].url = c:1",
            "- context.servers[c:1].weight = 1",
            "routing.attempts: 3 -> 5",
            "+ context.servers[d:1].dialect = \"auto\"",
            "+ context.servers[d:1].url = d:1",
            "+ context.servers[d:1].weight = 1",
        ];
        assert_eq!(shown(&old, &new), expected);
    }

    #[test]
    fn the_order_of_servers_is_a_change_too() {
        let (old, new) = (config(&["a:1", "c:1"], &["b:1"]), config(&["c:1", "a:1"], &["b:1"]));
        assert_eq!(shown(&old, &new), ["context.servers: a:1, c:1 -> c:1, a:1"]);
    }

    #[test]
    fn every_key_that_is_read_at_the_start_exists() {
        let mut config = config(&["a:1"], &["b:1"]);
        config.server.admin_token_file = Some("/x".into());
        config.routing.node_id = Some(1);
        let leaves = leaves(&config);
        for key in AT_START {
            assert!(leaves.contains_key(key), "{key}");
        }
    }
}
