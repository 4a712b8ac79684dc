//! Text to token ids and back.
//!
//! Decides nothing about models: whatever the file says is followed, and a file that says something unknown is
//! refused. Decoding is the concatenation of [`Tokenizer::token_bytes`], so a stream of pieces and a whole
//! answer are the same by construction; bytes that are no UTF-8 become U+FFFD.

mod gguf;
mod hugging_face;
mod sentencepiece;

use std::path::PathBuf;

use sha2::{Digest, Sha256};
use tokenizers::tokenizer::pre_tokenizer::OffsetType;
use tokenizers::{AddedVocabulary, Model, PreTokenizer};

/// Why a tokenizer cannot be had from a file.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The file cannot be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The model has no such entry.
    #[error("the model's metadata has no `{0}`")]
    Missing(&'static str),
    /// The model asks for what is not built.
    #[error("`{key}` = `{value}` is not available yet; known: {known}")]
    Unsupported {
        /// Metadata key.
        key: &'static str,
        /// What it says.
        value: String,
        /// What it may say.
        known: &'static str,
    },
    /// The file contradicts itself.
    #[error("the tokenizer is malformed: {0}")]
    Malformed(String),
}

/// Turns text into the ids of one model's vocabulary, and ids into bytes.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Finds special tokens in a text.
    with_special: AddedVocabulary,
    /// Reads special tokens as the text they are.
    without_special: AddedVocabulary,
    vocabulary: Vocabulary,
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    eos: Vec<u32>,
    bos_token: Option<String>,
    eos_token: Option<String>,
    template: Option<String>,
    hash: [u8; 32],
}

/// The bytes of every id.
#[derive(Default)]
struct Vocabulary {
    bytes: Vec<u8>,
    tokens: Vec<Option<Entry>>,
}

struct Entry {
    start: usize,
    end: usize,
    is_special: bool,
}

/// How a vocabulary writes bytes as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spelling {
    /// GPT-2's table: each byte is one printable character.
    ByteLevel,
    /// SentencePiece: `▁` is a space, `<0x0A>` a byte.
    SentencePiece,
}

/// What a file says beside model and vocabulary.
struct Parts {
    inner: tokenizers::Tokenizer,
    vocabulary: Vocabulary,
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    eos: Vec<u32>,
    bos_token: Option<String>,
    eos_token: Option<String>,
    template: Option<String>,
}

impl Tokenizer {
    fn new(parts: Parts) -> Self {
        let Parts { inner, vocabulary, prefix, suffix, mut eos, bos_token, eos_token, template } =
            parts;
        eos.sort_unstable();
        eos.dedup();
        let hash = vocabulary.hash(&eos);
        let mut with_special = inner.get_added_vocabulary().clone();
        with_special.set_encode_special_tokens(false);
        let mut without_special = with_special.clone();
        without_special.set_encode_special_tokens(true);
        Self {
            inner,
            with_special,
            without_special,
            vocabulary,
            prefix,
            suffix,
            eos,
            bos_token,
            eos_token,
            template,
            hash,
        }
    }

    /// The ids of `text`, without the model's start token. With `parse_special`, `<|im_start|>` and its like
    /// are one id; without, they are ordinary text.
    ///
    /// # Errors
    /// If the pre-tokenizer's expression gives up on the text; names the reason.
    pub fn encode(&self, text: &str, parse_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let added = if parse_special { &self.with_special } else { &self.without_special };
        let refuse = |error| TokenizerError::Malformed(format!("cannot split this text: {error}"));
        let mut pieces = added.extract_and_normalize(self.inner.get_normalizer(), text);
        if let Some(pre) = self.inner.get_pre_tokenizer() {
            pre.pre_tokenize(&mut pieces).map_err(refuse)?;
        }
        let model = self.inner.get_model();
        pieces.tokenize(|piece| model.tokenize(piece.get())).map_err(refuse)?;
        let encoding = pieces.into_encoding(None, 0, OffsetType::None).map_err(refuse)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The ids of a client's text prompt: special tokens count as such, and `add_special` puts before and after it
    /// what the model's files say: mostly a start token, or nothing.
    pub fn encode_prompt(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let ids = self.encode(text, true)?;
        Ok(if add_special { [&self.prefix[..], &ids, &self.suffix].concat() } else { ids })
    }

    /// The text of `ids`; with `skip_special` without special tokens. Unknown ids have no text.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let shown = ids.iter().filter(|id| !(skip_special && self.is_special(**id)));
        let bytes: Vec<u8> = shown.flat_map(|id| self.token_bytes(*id)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// What an id adds to a text; may be part of a character. Empty for unknown ids.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        let entry = self.vocabulary.entry(id);
        entry.map_or(&[], |entry| &self.vocabulary.bytes[entry.start..entry.end])
    }

    /// Whether an id is markup rather than text.
    pub fn is_special(&self, id: u32) -> bool {
        self.vocabulary.entry(id).is_some_and(|entry| entry.is_special)
    }

    /// One more than the largest id. A model's head may be larger.
    pub fn vocab_size(&self) -> usize {
        self.vocabulary.tokens.len()
    }

    /// Ids that end a text, ascending.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos
    }

    /// What is put before a prompt: the model's start token, or nothing.
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// The start token's text, for the chat template.
    pub fn bos_token(&self) -> Option<&str> {
        self.bos_token.as_deref()
    }

    /// The end token's text, for the chat template.
    pub fn eos_token(&self) -> Option<&str> {
        self.eos_token.as_deref()
    }

    /// Source of the model's chat template.
    pub fn chat_template(&self) -> Option<&str> {
        self.template.as_deref()
    }

    /// The same tokenizer as a `tokenizer.json`, without start token, ends and template.
    pub fn to_json(&self) -> Result<String, TokenizerError> {
        self.inner.to_string(false).map_err(|error| TokenizerError::Malformed(error.to_string()))
    }

    /// SHA-256 over every id's bytes and the ids that end a text: equal for a GGUF and a `tokenizer.json` of
    /// the same model.
    pub fn hash(&self) -> [u8; 32] {
        self.hash
    }
}

impl Vocabulary {
    /// Adds a token. An id that is there already keeps its place; its bytes are the newer ones.
    fn insert(&mut self, id: u32, bytes: &[u8], is_special: bool) {
        let at = id as usize;
        if at >= self.tokens.len() {
            self.tokens.resize_with(at + 1, || None);
        }
        let start = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        self.tokens[at] = Some(Entry { start, end: self.bytes.len(), is_special });
    }

    fn entry(&self, id: u32) -> Option<&Entry> {
        self.tokens.get(id as usize)?.as_ref()
    }

    fn hash(&self, eos: &[u32]) -> [u8; 32] {
        let mut hasher = Sha256::new();
        for (id, entry) in self.tokens.iter().enumerate() {
            if let Some(entry) = entry {
                hasher.update((id as u64).to_le_bytes());
                hasher.update(((entry.end - entry.start) as u64).to_le_bytes());
                hasher.update(&self.bytes[entry.start..entry.end]);
            }
        }
        hasher.update(u64::MAX.to_le_bytes());
        for id in eos {
            hasher.update(u64::from(*id).to_le_bytes());
        }
        hasher.finalize().into()
    }
}

impl Spelling {
    /// The bytes a token of the vocabulary stands for.
    fn bytes(self, token: &str) -> Vec<u8> {
        match self {
            Self::ByteLevel => {
                let mut utf8 = [0; 4];
                let mut bytes = Vec::with_capacity(token.len());
                for c in token.chars() {
                    match gpt2_byte(c) {
                        Some(byte) => bytes.push(byte),
                        // Not in the table: a token some tool added as plain text.
                        None => bytes.extend_from_slice(c.encode_utf8(&mut utf8).as_bytes()),
                    }
                }
                bytes
            }
            Self::SentencePiece => match hex_byte(token) {
                Some(byte) => vec![byte],
                None => token.replace('\u{2581}', " ").into_bytes(),
            },
        }
    }
}

/// The byte that GPT-2's table writes as `c`: printable Latin-1 is itself, the other 68 bytes follow from
/// U+0100 on in their order.
fn gpt2_byte(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => u8::try_from(code).ok(),
        code @ 0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        code @ 0x121..=0x142 => u8::try_from(code - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// `<0x0A>`.
fn hex_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// A merge whose result is no token would make the library index out of bounds.
fn check_merge(longest: usize, left: &str, right: &str) -> Result<(), TokenizerError> {
    if left.len() + right.len() > longest {
        let rule = format!("the merge of `{left}` and `{right}` is longer than every token");
        return Err(TokenizerError::Malformed(rule));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpt2s_table_has_every_byte_once() {
        let table = (0..0x200).filter_map(char::from_u32).filter_map(gpt2_byte);
        let mut bytes: Vec<u8> = table.collect();
        assert_eq!(bytes.len(), 256);
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!(Spelling::ByteLevel.bytes("Ġhi\u{10a}"), b" hi\n");
    }

    #[test]
    fn sentencepieces_are_spelled_out() {
        assert_eq!(Spelling::SentencePiece.bytes("▁it"), b" it");
        assert_eq!(Spelling::SentencePiece.bytes("<0x0A>"), b"\n");
        assert_eq!(Spelling::SentencePiece.bytes("<0x0>"), b"<0x0>");
    }

    #[test]
    fn the_hash_depends_on_bytes_ids_and_ends() {
        let of = |tokens: &[(u32, &str)], eos: &[u32]| {
            let mut vocabulary = Vocabulary::default();
            for (id, text) in tokens {
                vocabulary.insert(*id, text.as_bytes(), false);
            }
            vocabulary.hash(eos)
        };
        let first = of(&[(0, "ab"), (1, "c")], &[1]);
        assert_eq!(first, of(&[(1, "c"), (0, "ab")], &[1]));
        for other in [
            of(&[(0, "a"), (1, "bc")], &[1]),
            of(&[(0, "ab"), (2, "c")], &[1]),
            of(&[(0, "ab"), (1, "c")], &[0]),
            of(&[(0, "ab"), (1, "c")], &[]),
        ] {
            assert_ne!(first, other);
        }
    }
}
