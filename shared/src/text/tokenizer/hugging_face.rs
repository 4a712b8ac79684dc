//! A tokenizer from a Hugging Face folder: `tokenizer.json`, and beside it `tokenizer_config.json`,
//! `generation_config.json`, `config.json` and `chat_template.jinja` for what that file leaves out.

mod outline;

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value;

use super::{Parts, Spelling, Tokenizer, TokenizerError, Vocabulary};
use outline::Outline;

/// Ids above this are a mistake: the table of bytes has one entry an id.
const LARGEST_ID: u32 = 1 << 24;

impl Tokenizer {
    /// The tokenizer in `path`, a `tokenizer.json`.
    pub fn from_file(path: &Path) -> Result<Self, TokenizerError> {
        let text = read(path)?.ok_or_else(|| TokenizerError::Read {
            path: path.to_owned(),
            source: std::io::ErrorKind::NotFound.into(),
        })?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let malformed = |error: &dyn std::fmt::Display| {
            TokenizerError::Malformed(format!("{}: {error}", path.display()))
        };
        let outline: Outline<'_> =
            serde_json::from_str(&text).map_err(|error| malformed(&error))?;
        outline.check_merges()?;
        let spelling = outline.spelling()?;
        let inner = tokenizers::Tokenizer::from_bytes(&text).map_err(|error| malformed(&error))?;
        let vocabulary = vocabulary(&inner, spelling)?;
        let settings = Settings::read(folder)?;
        let (prefix, suffix) = surroundings(&inner)?;
        Ok(Self::new(Parts {
            prefix,
            suffix,
            eos: settings.eos_ids(&inner),
            bos_token: settings.token("bos_token"),
            eos_token: settings.token("eos_token"),
            template: settings.template,
            inner,
            vocabulary,
        }))
    }
}

fn vocabulary(
    inner: &tokenizers::Tokenizer,
    spelling: Spelling,
) -> Result<Vocabulary, TokenizerError> {
    let mut vocabulary = Vocabulary::default();
    for (token, id) in inner.get_vocab(false) {
        check_id(id)?;
        vocabulary.insert(id, &spelling.bytes(&token), false);
    }
    for (id, token) in inner.get_added_tokens_decoder() {
        check_id(id)?;
        vocabulary.insert(id, token.content.as_bytes(), token.special);
    }
    Ok(vocabulary)
}

fn check_id(id: u32) -> Result<(), TokenizerError> {
    if id > LARGEST_ID {
        return Err(TokenizerError::Malformed(format!("id {id} is above {LARGEST_ID}")));
    }
    Ok(())
}

/// What the post-processor puts before and after a text.
fn surroundings(inner: &tokenizers::Tokenizer) -> Result<(Vec<u32>, Vec<u32>), TokenizerError> {
    let ids = |add_special| {
        let encoding = inner.encode_fast("a", add_special);
        encoding.map(|encoding| encoding.get_ids().to_vec())
    };
    let malformed = |error: tokenizers::Error| TokenizerError::Malformed(error.to_string());
    let (with, without) = (ids(true).map_err(malformed)?, ids(false).map_err(malformed)?);
    let places = with.len().checked_sub(without.len()).map_or(0..0, |most| 0..most + 1);
    let mut places = places.filter(|at| with[*at..].starts_with(&without));
    match places.next() {
        Some(at) => Ok((with[..at].to_vec(), with[at + without.len()..].to_vec())),
        None => Err(TokenizerError::Unsupported {
            key: "post_processor",
            value: "one that changes the text".to_owned(),
            known: "tokens before and after the text",
        }),
    }
}

/// What the files beside `tokenizer.json` say; each may be missing.
struct Settings {
    tokenizer: Value,
    generation: Value,
    model: Value,
    template: Option<String>,
}

impl Settings {
    fn read(folder: &Path) -> Result<Self, TokenizerError> {
        let json = |name: &str| -> Result<Value, TokenizerError> {
            let path = folder.join(name);
            let Some(text) = read(&path)? else { return Ok(Value::Null) };
            let malformed =
                |error| TokenizerError::Malformed(format!("{}: {error}", path.display()));
            serde_json::from_str(&text).map_err(malformed)
        };
        let tokenizer = json("tokenizer_config.json")?;
        let template = match read(&folder.join("chat_template.jinja"))? {
            Some(template) => Some(template),
            None => template_of(&tokenizer["chat_template"]),
        };
        Ok(Self {
            generation: json("generation_config.json")?,
            model: json("config.json")?,
            tokenizer,
            template,
        })
    }

    /// The text of `bos_token` or `eos_token`, which may be an object around it.
    fn token(&self, key: &str) -> Option<String> {
        let token = &self.tokenizer[key];
        token.as_str().or_else(|| token["content"].as_str()).map(str::to_owned)
    }

    /// The generation settings win over the model's, and these over the tokenizer's.
    fn eos_ids(&self, inner: &tokenizers::Tokenizer) -> Vec<u32> {
        for settings in [&self.generation, &self.model] {
            let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
            let ids: Vec<u32> = match &settings["eos_token_id"] {
                Value::Array(ids) => ids.iter().filter_map(id).collect(),
                one => id(one).into_iter().collect(),
            };
            if !ids.is_empty() {
                return ids;
            }
        }
        self.token("eos_token").and_then(|token| inner.token_to_id(&token)).into_iter().collect()
    }
}

/// A template, or the one named `default` of a list.
fn template_of(value: &Value) -> Option<String> {
    let named: HashMap<&str, &str> = value
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|entry| Some((entry["name"].as_str()?, entry["template"].as_str()?)))
        .collect();
    value.as_str().or_else(|| named.get("default").copied()).map(str::to_owned)
}

/// A file's text; `None` if there is none.
fn read(path: &Path) -> Result<Option<String>, TokenizerError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TokenizerError::Read { path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn folder(tokenizer: &Value, others: &[(&str, Value)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        for (name, content) in others {
            std::fs::write(folder.path().join(name), content.to_string()).unwrap();
        }
        folder
    }

    fn byte_level() -> Value {
        json!({
            "version": "1.0",
            "added_tokens": [{"id": 4, "content": "<s>", "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true}],
            "normalizer": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [4], "tokens": ["<s>"]}}},
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3}, "merges": ["a b"]}
        })
    }

    fn sentence_piece() -> Value {
        json!({
            "version": "1.0", "added_tokens": [],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "pre_tokenizer": null, "post_processor": null,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "byte_fallback": true, "unk_token": "a",
                "vocab": {"▁": 0, "a": 1, "▁a": 2, "<0xC3>": 3, "<0xA9>": 4}, "merges": [["▁", "a"]]}
        })
    }

    fn refused(folder: &tempfile::TempDir) -> String {
        match Tokenizer::from_file(&folder.path().join("tokenizer.json")) {
            Ok(_) => panic!("it was taken"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_byte_level_folder_is_read_with_what_lies_beside_it() {
        let folder = folder(
            &byte_level(),
            &[
                (
                    "tokenizer_config.json",
                    json!({"bos_token": {"content": "<s>"}, "eos_token": "<s>",
                    "chat_template": [{"name": "x", "template": "no"}, {"name": "default", "template": "yes"}]}),
                ),
                ("generation_config.json", json!({"eos_token_id": [4, 1, 4]})),
                ("config.json", json!({"eos_token_id": 0})),
            ],
        );
        let tokenizer = Tokenizer::from_file(&folder.path().join("tokenizer.json")).unwrap();
        assert_eq!(tokenizer.encode("ab <s>", true).unwrap(), [2, 3, 4]);
        assert_eq!(tokenizer.encode_prompt("ab", true).unwrap(), [4, 2]);
        assert_eq!(tokenizer.decode(&[2, 3, 0], false), "ab a");
        assert_eq!(tokenizer.eos_ids(), [1, 4]);
        assert_eq!((tokenizer.bos_token(), tokenizer.eos_token()), (Some("<s>"), Some("<s>")));
        assert_eq!(tokenizer.chat_template(), Some("yes"));
        assert!(tokenizer.is_special(4) && !tokenizer.is_special(0));
    }

    #[test]
    fn a_sentencepiece_folder_keeps_spaces_and_bytes() {
        let folder = folder(&sentence_piece(), &[]);
        let tokenizer = Tokenizer::from_file(&folder.path().join("tokenizer.json")).unwrap();
        let ids = tokenizer.encode("a aé", true).unwrap();
        assert_eq!(ids, [2, 2, 3, 4]);
        assert_eq!(tokenizer.decode(&ids, true), " a aé");
        assert!(tokenizer.eos_ids().is_empty());
    }

    #[test]
    fn broken_folders_are_refused_in_words() {
        let empty = tempfile::tempdir().unwrap();
        assert!(refused(&empty).starts_with("cannot read `"));
        let mut broken = byte_level();
        broken["model"]["merges"] = json!([["ab", "ab"]]);
        assert!(refused(&folder(&broken, &[])).contains("longer than every token"));
        broken["model"]["merges"] = json!(["b a"]);
        assert!(refused(&folder(&broken, &[])).contains("malformed"));
        broken = byte_level();
        broken["decoder"] = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
        assert!(
            refused(&folder(&broken, &[])).contains("`decoder` = `WordPiece` is not available yet")
        );
        broken = byte_level();
        broken["model"]["vocab"]["far"] = json!(u32::MAX);
        assert!(refused(&folder(&broken, &[])).contains("malformed"));
        assert!(refused(&folder(&json!({"model": 5}), &[])).contains("`decoder` = `none`"));
        broken = byte_level();
        broken["model"] = json!(5);
        assert!(refused(&folder(&broken, &[])).contains("malformed"));
        let truncated = folder(&byte_level(), &[]);
        std::fs::write(truncated.path().join("tokenizer.json"), "{\"model\": {").unwrap();
        assert!(refused(&truncated).contains("EOF"));
    }
}
