//! A configuration file with the place of every key, so that a mistake found by a type or by `validate` can
//! say where it stands.
//!
//! Keys are dotted paths, list members are numbered from 0: `context.servers[1].url`.

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use toml::de::{DeTable, DeValue};

use super::{ConfigError, mistake, read_text};

/// A file that could be parsed, and where its keys are.
#[derive(Clone, Debug)]
pub struct Document {
    file: Option<PathBuf>,
    text: String,
    entries: Vec<Entry>,
}

/// One key of a file.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// Dotted path.
    pub key: String,
    /// Byte range of the key's last part, or of a list's member.
    pub name: Range<usize>,
    /// Byte range of the value.
    pub value: Range<usize>,
    /// Tables and lists have no value worth showing.
    pub is_leaf: bool,
}

impl Document {
    /// Reads a TOML file.
    pub fn read_toml(path: &Path) -> Result<Self, ConfigError> {
        Self::from_toml(Some(path.to_owned()), read_text(path)?)
    }

    /// A TOML text; `file` is what errors name.
    pub fn from_toml(file: Option<PathBuf>, text: String) -> Result<Self, ConfigError> {
        let mut entries = Vec::new();
        match DeTable::parse(&text) {
            Ok(table) => walk_table("", table.get_ref(), &mut entries),
            Err(error) => return Err(mistake::syntax(file, &text, &error)),
        }
        Ok(Self { file, text, entries })
    }

    /// A file some other parser has read.
    pub(super) fn new(file: Option<PathBuf>, text: String, entries: Vec<Entry>) -> Self {
        Self { file, text, entries }
    }

    /// The TOML text as a `T`; a mistake names its line, key, value and rule.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, ConfigError> {
        toml::from_str(&self.text).map_err(|error| mistake::of_type(self, &error))
    }

    /// The file, if it is one.
    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// The text as it was read.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether the file sets `key`.
    pub fn has(&self, key: &str) -> bool {
        self.entry(key).is_some()
    }

    /// A mistake at `key`, with its line and value. Where the file leaves `key` out (a default is to blame),
    /// the line is that of the nearest table around it.
    pub fn error(&self, key: &str, rule: impl Into<String>) -> ConfigError {
        let around =
            std::iter::successors(Some(key), |key| key.rfind(['.', '[']).map(|end| &key[..end]));
        let place = around.filter_map(|key| self.entry(key)).next();
        ConfigError {
            file: self.file.clone(),
            line: place.map(|entry| line_of(&self.text, entry.name.start)),
            key: key.to_owned(),
            value: self.entry(key).and_then(|entry| self.shown(entry)),
            rule: rule.into(),
        }
    }

    /// The entry of a dotted key.
    pub(super) fn entry(&self, key: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.key == key)
    }

    /// The innermost entry whose key or value covers `span`.
    pub(super) fn entry_at(&self, span: &Range<usize>) -> Option<&Entry> {
        let covers = |range: &Range<usize>| range.start <= span.start && span.end <= range.end;
        let named = self.entries.iter().find(|entry| entry.name == *span);
        let inside =
            self.entries.iter().filter(|entry| covers(&entry.name) || covers(&entry.value));
        named.or_else(|| inside.min_by_key(|entry| entry.value.len()))
    }

    /// A value as written, on one line, at most 60 characters; `None` for tables, lists and secrets.
    pub(super) fn shown(&self, entry: &Entry) -> Option<String> {
        const LONGEST: usize = 60;
        let secret = entry.key.ends_with("auth_key") || entry.key.ends_with("token");
        if !entry.is_leaf || secret {
            return None;
        }
        let value = self.text.get(entry.value.clone())?.lines().next()?.trim();
        let value = value.trim_matches(['"', '\'']);
        Some(match value.char_indices().nth(LONGEST) {
            Some((cut, _)) => format!("{}…", &value[..cut]),
            None => value.to_owned(),
        })
    }
}

/// 1-based line of the byte at `offset`.
pub(super) fn line_of(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|byte| *byte == b'\n').count()
}

/// `parent.name`, quoted where a dot in the name would be read as another level.
pub(super) fn join(parent: &str, name: &str) -> String {
    let name = if name.contains('.') { format!("\"{name}\"") } else { name.to_owned() };
    if parent.is_empty() { name } else { format!("{parent}.{name}") }
}

fn walk_table(parent: &str, table: &DeTable<'_>, entries: &mut Vec<Entry>) {
    for (name, value) in table {
        let key = join(parent, name.get_ref());
        walk_value(key, name.span(), value.span(), value.get_ref(), entries);
    }
}

fn walk_value(
    key: String,
    name: Range<usize>,
    span: Range<usize>,
    value: &DeValue<'_>,
    entries: &mut Vec<Entry>,
) {
    let is_leaf = value.as_table().is_none() && value.as_array().is_none();
    entries.push(Entry { key: key.clone(), name, value: span, is_leaf });
    if let Some(table) = value.as_table() {
        walk_table(&key, table, entries);
    }
    for (index, item) in value.as_array().into_iter().flat_map(|list| list.iter()).enumerate() {
        let member = format!("{key}[{index}]");
        walk_value(member, item.span(), item.span(), item.get_ref(), entries);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
role = \"both\"

[server]
listen = \"127.0.0.1:1\"
internal_request_auth_key = \"secret\"

[[worker]]
port = 1
[[worker]]
port = 70000
";

    fn document() -> Document {
        Document::from_toml(Some("x.toml".into()), TEXT.to_owned()).unwrap()
    }

    #[test]
    fn an_error_at_a_key_names_file_line_and_value() {
        let error = document().error("server.listen", "must be free");
        assert_eq!(error.to_string(), "x.toml:4: `server.listen` = `127.0.0.1:1`: must be free");
        let error = document().error("worker[1].port", "too large");
        assert_eq!(error.to_string(), "x.toml:10: `worker[1].port` = `70000`: too large");
    }

    #[test]
    fn a_key_that_is_left_out_points_at_the_table_around_it() {
        let error = document().error("server.threads", "must be at least 1");
        assert_eq!((error.line, error.value), (Some(3), None));
        let error = document().error("kv.pool", "too small");
        assert_eq!((error.line, error.value), (None, None));
    }

    #[test]
    fn a_secret_is_never_shown() {
        let error = document().error("server.internal_request_auth_key", "too short");
        assert_eq!((error.line, error.value), (Some(5), None));
    }

    #[test]
    fn a_long_value_is_cut() {
        let text = format!("a = \"{}\"", "x".repeat(500));
        let error = Document::from_toml(None, text).unwrap().error("a", "bad");
        assert_eq!(error.value.unwrap().chars().count(), 61);
    }
}
