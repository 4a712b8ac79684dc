//! `reference/configuration.md` against the types of both daemons: every key, its default, what values it takes, and
//! whether a reload takes it. The types name their own keys: by what they say of one that they do not know.

use std::fmt::Write;

use baton_router::config::RouterConfig;
use baton_router::table;
use baton_workerd::config::WorkerConfig;
use toml::{Table, Value};

use crate::page::{self, code};

/// No key and no value of anything.
const NONSENSE: &str = "zzz";

/// A file and how to judge it.
struct File {
    /// The page's heading.
    heading: &'static str,
    /// Something valid, to which a key is added.
    valid: Table,
    /// What comes of it: every default that is not "unset".
    defaults: Table,
    judge: fn(&Table) -> Result<(), String>,
    /// Lists of tables.
    lists: &'static [&'static str],
    has_reload: bool,
}

fn files() -> [File; 2] {
    let servers = "[[context.servers]]\nurl = \"a:1\"\n[[generation.servers]]\nurl = \"b:1\"\n";
    let valid: Table = toml::from_str(servers).unwrap();
    let given: RouterConfig = valid.clone().try_into().unwrap();
    [
        File {
            heading: "Router",
            valid,
            defaults: Table::try_from(given.spelled_out()).unwrap(),
            judge: |table| {
                let config: RouterConfig = table.clone().try_into().map_err(text)?;
                config.validate().map_err(text)
            },
            lists: &["context.servers", "generation.servers"],
            has_reload: true,
        },
        File {
            heading: "Worker",
            valid: toml::from_str("model = \"m\"").unwrap(),
            defaults: Table::try_from(WorkerConfig::default()).unwrap(),
            judge: |table| {
                let config: WorkerConfig = table.clone().try_into().map_err(text)?;
                config.validate().map_err(text)
            },
            lists: &[],
            has_reload: false,
        },
    ]
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// A key as the page has it.
struct Row {
    key: String,
    values: String,
    default: String,
    reload: Option<String>,
}

impl File {
    /// The page's rows by section (`server`, `context.servers`; empty = top level).
    fn rows(&self) -> Vec<(String, Vec<Row>)> {
        let mut sections = Vec::new();
        for section in page::book("reference/configuration.md").sections() {
            let [_, file, section_heading] = section.headings.as_slice() else { continue };
            if file != self.heading {
                continue;
            }
            let names = code(section_heading);
            let names = if names.is_empty() { vec![""] } else { names };
            for name in names {
                let rows = section.rows.iter().map(|row| self.row(row)).collect();
                sections.push((name.trim_matches(['[', ']']).to_owned(), rows));
            }
        }
        sections
    }

    fn row(&self, cells: &[String]) -> Row {
        let columns = if self.has_reload { 5 } else { 4 };
        assert_eq!(cells.len(), columns, "{cells:?}");
        Row {
            key: code(&cells[0])[0].to_owned(),
            values: cells[1].clone(),
            default: cells[2].clone(),
            reload: self.has_reload.then(|| cells[3].clone()),
        }
    }

    /// Something valid but for `value` at `section.key`.
    fn with(&self, section: &str, key: &str, value: Value) -> Table {
        let mut whole = self.valid.clone();
        let mut table = &mut whole;
        for part in section.split('.').filter(|part| !part.is_empty()) {
            let next = table.entry(part).or_insert_with(|| Table::new().into());
            table = match next {
                Value::Array(entries) => entries[0].as_table_mut().unwrap(),
                other => other.as_table_mut().unwrap(),
            };
        }
        table.insert(key.to_owned(), value);
        whole
    }

    fn refusal(&self, section: &str, key: &str, value: impl Into<Value>) -> Option<String> {
        (self.judge)(&self.with(section, key, value.into())).err()
    }

    /// The keys that the type of a section knows, tables and lists of tables left out.
    fn known(&self, section: &str) -> Vec<String> {
        let said = self.refusal(section, NONSENSE, NONSENSE).unwrap();
        assert!(said.contains("unknown field"), "[{section}]: {said}");
        let known = said.lines().find(|line| line.contains("unknown field")).unwrap();
        code(known).into_iter().skip(1).map(str::to_owned).collect()
    }

    /// Sections by their names; empty = top level.
    fn sections(&self) -> Vec<String> {
        let tables = self.defaults.iter().filter(|(_, value)| value.is_table());
        let mut sections = vec![String::new()];
        sections.extend(tables.map(|(name, _)| name.clone()));
        sections.extend(self.lists.iter().map(|&name| name.to_owned()));
        sections
    }

    /// What a key that is left out is taken for.
    fn default(&self, section: &str, key: &str) -> Option<&Value> {
        let mut table = &self.defaults;
        for part in section.split('.').filter(|part| !part.is_empty()) {
            table = match table.get(part)? {
                Value::Array(entries) => entries.first()?.as_table()?,
                other => other.as_table()?,
            };
        }
        table.get(key)
    }
}

#[test]
fn each_key_of_the_code_is_on_the_page_and_each_on_the_page_is_one_of_the_code() {
    let mut wrong = String::new();
    for file in files() {
        let sections = file.sections();
        let rows = file.rows();
        for section in &sections {
            let known = file.known(section);
            let shown = rows.iter().find(|(name, _)| name == section).map(|(_, rows)| rows);
            // At the top level a section is no key.
            let is_key = |key: &String| !section.is_empty() || !sections.contains(key);
            for key in known.iter().filter(|key| is_key(key)) {
                if !shown.is_some_and(|rows| rows.iter().any(|row| row.key == *key)) {
                    let default = file.default(section, key);
                    let default = default.map_or("unset".to_owned(), |it| format!("`{it}`"));
                    let row = format!("| `{key}` | … | {default} | … |");
                    let _ = writeln!(wrong, "{}: `[{section}]` lacks {row}", file.heading);
                }
            }
            for row in shown.into_iter().flatten().filter(|row| !known.contains(&row.key)) {
                let _ = writeln!(wrong, "{}: no `{}` in `[{section}]`", file.heading, row.key);
            }
        }
        for (section, _) in rows.iter().filter(|(name, _)| !sections.contains(name)) {
            let _ = writeln!(wrong, "{}: there is no `[{section}]`", file.heading);
        }
    }
    assert!(wrong.is_empty(), "docs/src/reference/configuration.md:\n{wrong}");
}

#[test]
fn defaults_are_those_of_the_code() {
    for file in files() {
        for (section, rows) in file.rows() {
            for row in rows {
                let key = format!("{}: {section}.{}", file.heading, row.key);
                match file.default(&section, &row.key) {
                    Some(_) if row.default == "needed" => {}
                    Some(default) => {
                        let literal = format!("`{default}`");
                        assert!(row.default.contains(&literal), "{key}: the default is {literal}");
                    }
                    None => {
                        let is_unset =
                            ["unset", "needed"].iter().any(|it| row.default.starts_with(it));
                        assert!(is_unset, "{key}: there is no default");
                    }
                }
            }
        }
    }
}

#[test]
fn what_the_page_allows_is_allowed_and_what_is_beside_it_is_refused() {
    for file in files() {
        for (section, rows) in file.rows() {
            for row in &rows {
                let name = format!("{}: {section}.{} ({})", file.heading, row.key, row.values);
                let (good, bad) = examples(&row.values);
                for value in good {
                    let said = file.refusal(&section, &row.key, value.clone());
                    assert_eq!(said, None, "{name} = {value}");
                }
                for value in bad {
                    let said = file.refusal(&section, &row.key, value.clone());
                    assert!(said.is_some(), "{name} = {value} is taken");
                }
            }
        }
    }
}

/// Values that a description says are right, and values that it says are not.
fn examples(values: &str) -> (Vec<Value>, Vec<Value>) {
    let number = |word: &str| word.trim_matches(',').parse::<i64>().ok();
    let numbers: Vec<i64> = values.split(' ').filter_map(number).collect();
    let list = |items: &[&str]| items.iter().map(|it| Value::from(*it)).collect::<Vec<Value>>();
    let nonsense = || vec![Value::from(NONSENSE)];
    match (values, numbers.as_slice()) {
        (it, [least, most]) if it.starts_with("whole number from") => (
            vec![Value::from(*least), Value::from(*most)],
            vec![Value::from(least - 1), Value::from(most + 1), Value::from(0.5)],
        ),
        (it, [least]) if it.starts_with("whole number, at least") => {
            (vec![Value::from(*least)], vec![Value::from(least - 1), Value::from(0.5)])
        }
        ("whole number", _) => (vec![Value::from(0), Value::from(7)], vec![Value::from(-1)]),
        ("duration above 0", _) => (list(&["59s"]), list(&["0s", "61", "-1s"])),
        ("duration", _) => (list(&["0s", "61s"]), list(&["61"])),
        (it, _) if it.starts_with("duration, at least") => (list(&["60s"]), list(&["1ms", "60"])),
        ("size, at least 1", _) => (list(&["1B", "64MiB"]), list(&["0B", NONSENSE])),
        ("size", _) => (list(&["64MiB"]), list(&[NONSENSE])),
        ("percentage", _) => (list(&["0%", "100%"]), list(&["101%", "50"])),
        ("share above 0, at most 1", _) => {
            (vec![0.01.into(), 1.0.into()], vec![0.0.into(), 1.01.into()])
        }
        ("`true`, `false`", _) => (vec![true.into(), false.into()], nonsense()),
        ("level or filter", _) => (list(&["debug", "info,baton_router=debug"]), nonsense()),
        ("address", _) => (list(&["127.0.0.1:7", "localhost:7"]), list(&["127.0.0.1", ""])),
        ("text" | "path" | "list" | "list of texts" | "table of texts", _) => {
            (Vec::new(), vec![Value::from(0.5)])
        }
        (it, _) if it.starts_with('`') => {
            let named: Vec<Value> = code(it)
                .into_iter()
                .map(|name| number(name).map_or(Value::from(name), Value::from))
                .collect();
            (named, nonsense())
        }
        ("address of a server", _) => (list(&["a:7", "http://a:7", "unix:/x"]), list(&["a", ""])),
        ("range of ports", _) => (list(&["20000-20100"]), list(&["20000-20001", "20000"])),
        ("path that begins with `/`", _) => (list(&["/x"]), list(&["x", ""])),
        ("name of a network interface", _) => (list(&["lo"]), list(&["", "a b"])),
        _ => panic!("`{values}` is no description this test knows"),
    }
}

#[test]
fn values_that_have_names_are_all_on_the_page() {
    for file in files() {
        for (section, rows) in file.rows() {
            for row in &rows {
                let Some(said) = file.refusal(&section, &row.key, NONSENSE) else { continue };
                let Some(line) = said.lines().find(|line| line.contains("unknown variant")) else {
                    continue;
                };
                for name in code(line).into_iter().skip(1) {
                    let is_taken = file.refusal(&section, &row.key, name).is_none();
                    let is_shown = code(&row.values).contains(&name);
                    let key = format!("{}: {section}.{}", file.heading, row.key);
                    assert_eq!(is_shown, is_taken, "{key}: `{name}`");
                }
            }
        }
    }
}

#[test]
fn what_a_reload_takes_is_what_the_router_takes() {
    let [router, _] = files();
    for (section, rows) in router.rows() {
        for row in rows {
            let key = format!("{section}.{}", row.key);
            let expected = if table::needs_restart(&key) { "restart" } else { "yes" };
            assert_eq!(row.reload.as_deref(), Some(expected), "{key}");
        }
    }
}
