//! Turns what a parser says into a rule an operator can act on: which key, what it must be, and which known
//! key was probably meant.

use std::path::PathBuf;

use super::ConfigError;
use super::document::{Document, join, line_of};
use crate::expected::{self, backticked};

/// A text that is not TOML at all.
pub(super) fn syntax(file: Option<PathBuf>, text: &str, error: &toml::de::Error) -> ConfigError {
    let span = error.span();
    let line = span.as_ref().map(|span| line_of(text, span.start));
    let written = line.and_then(|line| text.lines().nth(line - 1)).map(str::trim);
    let value = written.filter(|written| !written.is_empty() && written.len() <= 80);
    let is_secret = value.is_some_and(|value| value.contains("auth_key"));
    ConfigError {
        file,
        line,
        key: String::new(),
        value: value.filter(|_| !is_secret).map(str::to_owned),
        rule: format!("is not TOML: {}", error.message()),
    }
}

/// A text that is TOML but not what its sections say.
pub(super) fn of_type(document: &Document, error: &toml::de::Error) -> ConfigError {
    let message = error.message();
    let entry = error.span().and_then(|span| document.entry_at(&span));
    let key = entry.map(|entry| entry.key.clone()).unwrap_or_default();
    if let Some(field) = quoted_after(message, "missing field ") {
        return document.error(&join(&key, field), "is missing");
    }
    match unknown_key(message) {
        Some((name, known)) => {
            // The span is that of the key where there is one, else that of the table around it.
            let is_named = key == name || key.ends_with(&format!(".{name}"));
            let key = if is_named { key } else { join(&key, name) };
            document.error(&key, unknown_rule(name, &known)).without_value()
        }
        None => document.error(&key, expected::rule(message, "a table")),
    }
}

/// The rule for a key nobody knows: the nearest known one, else all of them.
pub(super) fn unknown_rule(name: &str, known: &[&str]) -> String {
    match nearest(name, known.iter().copied()) {
        Some(near) => format!("unknown key, did you mean `{near}`?"),
        None if known.is_empty() => "unknown key, none is allowed here".to_owned(),
        None => format!("unknown key, known here: {}", known.join(", ")),
    }
}

/// The known name that `name` was probably meant to be: at most a third of its letters differ.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let limit = (name.chars().count() / 3).max(1);
    let ranked = known.into_iter().map(|candidate| (distance(name, candidate), candidate));
    ranked.filter(|(distance, _)| *distance <= limit).min().map(|(_, candidate)| candidate)
}

/// Letters to insert, drop, replace or swap with their neighbour to get from one word to the other
/// (optimal string alignment); case does not count.
fn distance(from: &str, to: &str) -> usize {
    let from: Vec<char> = from.to_lowercase().chars().collect();
    let to: Vec<char> = to.to_lowercase().chars().collect();
    let mut before_last = vec![0; to.len() + 1];
    let mut last: Vec<usize> = (0..=to.len()).collect();
    for i in 1..=from.len() {
        let mut row = vec![i; to.len() + 1];
        for j in 1..=to.len() {
            let replaced = last[j - 1] + usize::from(from[i - 1] != to[j - 1]);
            row[j] = replaced.min(last[j] + 1).min(row[j - 1] + 1);
            let is_swap = i > 1 && j > 1 && from[i - 1] == to[j - 2] && from[i - 2] == to[j - 1];
            if is_swap {
                row[j] = row[j].min(before_last[j - 2] + 1);
            }
        }
        before_last = std::mem::replace(&mut last, row);
    }
    last[to.len()]
}

/// serde's "unknown field `x`, expected one of `a`, `b`".
fn unknown_key(message: &str) -> Option<(&str, Vec<&str>)> {
    let name = quoted_after(message, "unknown field ")?;
    Some((name, backticked(message).skip(1).collect()))
}

fn quoted_after<'a>(message: &'a str, start: &str) -> Option<&'a str> {
    message.strip_prefix(start)?.strip_prefix('`')?.split('`').next()
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use serde::Deserialize;

    use super::*;
    use crate::config::net::Listen;
    use crate::config::units::Seconds;
    use crate::role::Role;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only errors are looked at")]
    struct File {
        role: Option<Role>,
        server: Option<Server>,
        worker: Option<Vec<Server>>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only errors are looked at")]
    struct Server {
        listen: Option<Listen>,
        max_queue: Option<u16>,
        threads: Option<NonZeroUsize>,
        write_timeout: Option<Seconds>,
        name: String,
    }

    fn error_of(text: &str) -> String {
        let document = Document::from_toml(Some("f.toml".into()), text.to_owned());
        document.and_then(|document| document.parse::<File>()).unwrap_err().to_string()
    }

    #[test]
    fn an_unknown_key_suggests_the_nearest_known_one() {
        assert_eq!(
            error_of("role = \"both\"\n[server]\nname = \"x\"\nmax_queu = 1\n"),
            "f.toml:4: `server.max_queu`: unknown key, did you mean `max_queue`?"
        );
        assert_eq!(
            error_of("[[worker]]\nname = \"x\"\n[[worker]]\nnaem = \"x\"\n"),
            "f.toml:4: `worker[1].naem`: unknown key, did you mean `name`?"
        );
        assert_eq!(
            error_of("\nelephant = 1\n"),
            "f.toml:2: `elephant`: unknown key, known here: role, server, worker"
        );
        assert_eq!(
            error_of("[sevrer]\nname = \"x\"\n"),
            "f.toml:1: `sevrer`: unknown key, did you mean `server`?"
        );
    }

    #[test]
    fn a_wrong_value_says_what_it_must_be() {
        for (line, said) in [
            (
                "max_queue = \"many\"",
                "`server.max_queue` = `many`: must be a whole number from 0 to 65535",
            ),
            ("max_queue = -1", "`server.max_queue` = `-1`: must be a whole number from 0 to 65535"),
            (
                "max_queue = 70000",
                "`server.max_queue` = `70000`: must be a whole number from 0 to 65535",
            ),
            ("threads = 0", "`server.threads` = `0`: must be a whole number from 1"),
            (
                "write_timeout = \"30\"",
                "`server.write_timeout` = `30`: must be a duration with a unit (ms, s, m, h), as in `30s`",
            ),
            (
                "write_timeout = 30",
                "`server.write_timeout` = `30`: must be a duration with a unit (ms, s, m, h), as in `30s`",
            ),
            (
                "listen = \"nowhere\"",
                "`server.listen` = `nowhere`: must be `host:port`, as in `127.0.0.1:8001` or `[::1]:8001`",
            ),
            ("name = 1", "`server.name` = `1`: must be a string"),
        ] {
            let others = if line.starts_with("name") { "" } else { "name = \"x\"\n" };
            let text = format!("[server]\n{others}{line}\n");
            let at = text.lines().count();
            assert_eq!(error_of(&text), format!("f.toml:{at}: {said}"));
        }
        assert_eq!(
            error_of("role = \"contxt\""),
            "f.toml:1: `role` = `contxt`: must be one of `context`, `generation`, `both`"
        );
        assert_eq!(error_of("server = 1"), "f.toml:1: `server` = `1`: must be a table");
    }

    #[test]
    fn a_missing_key_is_named_with_the_line_of_its_table() {
        assert_eq!(error_of("\n[server]\nmax_queue = 1\n"), "f.toml:2: `server.name`: is missing");
    }

    #[test]
    fn text_that_is_not_toml_is_refused_with_its_line() {
        let error = error_of("role = \"both\"\nserver = {\n");
        assert!(error.starts_with("f.toml:2: ") || error.starts_with("f.toml:3: "), "{error}");
        assert!(error.contains("is not TOML"), "{error}");
        let error = error_of("a = 1\na = 2\n");
        assert!(error.starts_with("f.toml:2: `a = 2`: is not TOML: duplicate key"), "{error}");
    }

    #[test]
    fn swapped_and_missing_letters_are_near_and_other_words_are_not() {
        assert_eq!(distance("refersh_interval", "refresh_interval"), 1);
        assert_eq!(distance("", "abc"), 3);
        assert_eq!(nearest("prot", ["host", "port"]), Some("port"));
        assert_eq!(nearest("banana", ["host", "port"]), None);
    }
}
