//! YAML with the place of every key, and typed reading of single values.
//!
//! Follows what upstream's loader (YAML 1.1, safe) makes of a scalar where that differs from YAML 1.2: `yes`,
//! `no`, `on` and `off` are booleans. Null counts as left out.

use std::num::NonZeroU32;
use std::ops::{Range, RangeInclusive};
use std::path::PathBuf;

use saphyr::{LoadableYamlNode, MarkedYaml, Marker, Scalar, YamlData};

use super::ConfigError;
use super::document::{Document, Entry, join};

/// A file that could be parsed. Keys are dotted paths, as in [`Document`].
#[derive(Clone, Debug)]
pub(super) struct Yaml {
    pub document: Document,
    pub root: Node,
}

/// One value.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Node {
    Null,
    Bool(bool),
    Whole(i64),
    Number(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<(String, Node)>),
}

impl Yaml {
    /// Parses a text; `file` is what errors name.
    pub fn parse(file: Option<PathBuf>, text: String) -> Result<Self, ConfigError> {
        let mut entries = Vec::new();
        let root = match read_all(&text, &mut entries) {
            Ok(root) => root,
            Err((line, rule)) => {
                return Err(ConfigError { file, line, key: String::new(), value: None, rule });
            }
        };
        Ok(Self { document: Document::new(file, text, entries), root })
    }

    /// The value at a dotted key; `None` where it is left out or null.
    pub fn get(&self, key: &str) -> Option<&Node> {
        let mut node = &self.root;
        for part in key.split('.') {
            let Node::Map(members) = node else { return None };
            node = members.iter().find(|(name, _)| name == part).map(|(_, node)| node)?;
        }
        (*node != Node::Null).then_some(node)
    }

    /// A text.
    pub fn text(&self, key: &str) -> Result<Option<String>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Node::Text(text)) => Ok(Some(text.clone())),
            Some(_) => Err(self.document.error(key, "must be a string")),
        }
    }

    /// A boolean.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Node::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.document.error(key, "must be `true` or `false`")),
        }
    }

    /// A whole number within `range`.
    pub fn whole(&self, key: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Node::Whole(number)) if range.contains(number) => Ok(Some(*number)),
            Some(_) => {
                let (low, high) = (range.start(), range.end());
                let rule = format!("must be a whole number from {low} to {high}");
                Err(self.document.error(key, rule))
            }
        }
    }

    /// A whole number from 1.
    pub fn count(&self, key: &str) -> Result<Option<NonZeroU32>, ConfigError> {
        let number = self.whole(key, 1..=i64::from(u32::MAX))?;
        Ok(number.and_then(|number| u32::try_from(number).ok()).and_then(NonZeroU32::new))
    }

    /// A share above 0, at most 1.
    pub fn fraction(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        let number = match self.get(key) {
            None => return Ok(None),
            Some(Node::Number(number)) => *number,
            Some(Node::Whole(number)) => *number as f64,
            Some(_) => f64::NAN,
        };
        if number > 0.0 && number <= 1.0 {
            Ok(Some(number))
        } else {
            Err(self.document.error(key, "must be a number above 0, at most 1"))
        }
    }

    /// A list of texts; empty where it is left out.
    pub fn texts(&self, key: &str) -> Result<Vec<String>, ConfigError> {
        let Some(node) = self.get(key) else { return Ok(Vec::new()) };
        let Node::List(items) = node else {
            return Err(self.document.error(key, "must be a list"));
        };
        let text = |(index, item): (usize, &Node)| match item {
            Node::Text(text) => Ok(text.clone()),
            _ => Err(self.document.error(&format!("{key}[{index}]"), "must be a string")),
        };
        items.iter().enumerate().map(text).collect()
    }
}

type Refusal = (Option<usize>, String);

fn read_all(text: &str, entries: &mut Vec<Entry>) -> Result<Node, Refusal> {
    let documents = MarkedYaml::load_from_str(text)
        .map_err(|error| (Some(error.marker().line()), format!("is not YAML: {}", error.info())))?;
    let mut reader = Reader { offsets: text.char_indices().map(|(at, _)| at).collect(), entries };
    reader.offsets.push(text.len());
    match documents.as_slice() {
        [] => Err((None, "is empty".to_owned())),
        [root] => match reader.node(String::new(), root)? {
            Node::Null => Err((None, "is empty".to_owned())),
            map @ Node::Map(_) => Ok(map),
            _ => Err((Some(root.span.start.line()), "must be a map of keys".to_owned())),
        },
        [_, second, ..] => {
            Err((Some(second.span.start.line()), "must hold one document".to_owned()))
        }
    }
}

/// Turns marked nodes into plain ones, noting where each stands.
struct Reader<'a> {
    /// Byte of each character, as marks count characters.
    offsets: Vec<usize>,
    entries: &'a mut Vec<Entry>,
}

impl Reader<'_> {
    fn byte(&self, mark: Marker) -> usize {
        self.offsets[mark.index().min(self.offsets.len() - 1)]
    }

    fn range(&self, node: &MarkedYaml<'_>) -> Range<usize> {
        self.byte(node.span.start)..self.byte(node.span.end)
    }

    fn node(&mut self, key: String, node: &MarkedYaml<'_>) -> Result<Node, Refusal> {
        let refuse = |rule: &str| Err((Some(node.span.start.line()), rule.to_owned()));
        Ok(match &node.data {
            YamlData::Value(scalar) => scalar_node(scalar),
            YamlData::Sequence(items) => {
                let mut list = Vec::with_capacity(items.len());
                for (index, item) in items.iter().enumerate() {
                    let member = format!("{key}[{index}]");
                    let range = self.range(item);
                    self.note(&member, range, item);
                    list.push(self.node(member, item)?);
                }
                Node::List(list)
            }
            YamlData::Mapping(members) => {
                let mut map = Vec::with_capacity(members.len());
                for (name, value) in members {
                    let YamlData::Value(Scalar::String(text)) = &name.data else {
                        return Err((Some(name.span.start.line()), "keys must be strings".into()));
                    };
                    let path = join(&key, text);
                    let range = self.range(name);
                    self.note(&path, range, value);
                    map.push((text.to_string(), self.node(path, value)?));
                }
                Node::Map(map)
            }
            YamlData::Tagged(..) => return refuse("holds a tag, plain values are read only"),
            YamlData::Alias(_) => return refuse("refers to an anchor that is not there"),
            YamlData::Representation(..) | YamlData::BadValue => return refuse("is not a value"),
        })
    }

    fn note(&mut self, key: &str, name: Range<usize>, value: &MarkedYaml<'_>) {
        let is_leaf = matches!(value.data, YamlData::Value(_));
        let value = self.range(value);
        self.entries.push(Entry { key: key.to_owned(), name, value, is_leaf });
    }
}

fn scalar_node(scalar: &Scalar<'_>) -> Node {
    match scalar {
        Scalar::Null => Node::Null,
        Scalar::Boolean(flag) => Node::Bool(*flag),
        Scalar::Integer(number) => Node::Whole(*number),
        Scalar::FloatingPoint(number) => Node::Number(number.into_inner()),
        Scalar::String(text) => match text.to_ascii_lowercase().as_str() {
            "yes" | "on" => Node::Bool(true),
            "no" | "off" => Node::Bool(false),
            _ => Node::Text(text.to_string()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn yaml(text: &str) -> Result<Yaml, ConfigError> {
        Yaml::parse(Some("f.yaml".into()), text.to_owned())
    }

    #[test]
    fn values_are_read_by_type() {
        let file =
            yaml("a: True\nb: {c: 5, d: 'x', ü: 0.5}\nl: [p, q]\nn: null\no: off\n").unwrap();
        assert_eq!(file.flag("a"), Ok(Some(true)));
        assert_eq!(file.flag("o"), Ok(Some(false)));
        assert_eq!(file.whole("b.c", 0..=9), Ok(Some(5)));
        assert_eq!(file.text("b.d"), Ok(Some("x".to_owned())));
        assert_eq!(file.fraction("b.ü"), Ok(Some(0.5)));
        assert_eq!(file.texts("l"), Ok(vec!["p".to_owned(), "q".to_owned()]));
        assert_eq!(file.text("n"), Ok(None));
        assert_eq!(file.count("missing.key"), Ok(None));
    }

    #[test]
    fn a_wrong_value_names_line_and_value_after_wide_characters_too() {
        let file = yaml("# ünïcödé 😀\na:\n  b: many\nl:\n- x\n- 5\n").unwrap();
        let error = file.count("a.b").unwrap_err();
        assert_eq!(
            error.to_string(),
            "f.yaml:3: `a.b` = `many`: must be a whole number from 1 to 4294967295"
        );
        let error = file.texts("l").unwrap_err();
        assert_eq!(error.to_string(), "f.yaml:6: `l[1]` = `5`: must be a string");
    }

    #[test]
    fn what_is_not_one_map_is_refused() {
        for (text, said) in [
            ("", "f.yaml: is empty"),
            ("# nothing\n", "f.yaml: is empty"),
            ("null\n", "f.yaml: is empty"),
            ("- a\n", "f.yaml:1: must be a map of keys"),
            ("a: 1\n---\nb: 2\n", "f.yaml:3: must hold one document"),
            ("1: 2\n", "f.yaml:1: keys must be strings"),
        ] {
            assert_eq!(yaml(text).unwrap_err().to_string(), said, "{text}");
        }
        for text in ["a: [1\n", "a: b: c\n", "a: 1\n\tb: 2\n", "a: 1\na: 2\n", "a: *x\n"] {
            let error = yaml(text).unwrap_err();
            assert!(error.line.is_some() && error.rule.starts_with("is not YAML"), "{error}");
        }
    }
}
