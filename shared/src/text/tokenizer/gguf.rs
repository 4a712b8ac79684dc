//! A tokenizer from GGUF metadata. Here: byte-level BPE (`tokenizer.ggml.model` = `gpt2`), split as
//! `tokenizer.ggml.pre` says; SentencePiece (`llama`) is in [`super::sentencepiece`].

use std::collections::HashSet;

use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;
use tokenizers::{AddedToken, NormalizerWrapper};

use super::{Parts, Spelling, Tokenizer, TokenizerError, Vocabulary, check_merge, sentencepiece};
use crate::text::gguf::Gguf;

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const BOS: &str = "tokenizer.ggml.bos_token_id";
const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
const ADD_EOS: &str = "tokenizer.ggml.add_eos_token";
const ADD_SPACE: &str = "tokenizer.ggml.add_space_prefix";
const SCORES: &str = "tokenizer.ggml.scores";
/// Ids that end a text: of a sequence, a turn, a message.
const ENDS: [&str; 3] =
    ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

/// Values of `tokenizer.ggml.token_type`.
pub(super) const UNKNOWN: i64 = 2;
pub(super) const CONTROL: i64 = 3;
pub(super) const USER_DEFINED: i64 = 4;
pub(super) const UNUSED: i64 = 5;

const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN_SPLIT: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// How a text is cut before merges apply.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pre {
    Gpt2,
    SmolLm,
    Llama3,
    Qwen2,
    Tekken,
}

/// The vocabulary as a file lists it.
pub(super) struct Words<'a> {
    tokens: &'a [String],
    types: &'a [i64],
}

impl Tokenizer {
    /// The tokenizer a GGUF file describes.
    pub fn from_gguf(file: &Gguf) -> Result<Self, TokenizerError> {
        let model = file.string(MODEL).ok_or(TokenizerError::Missing(MODEL))?;
        let words = Words::read(file)?;
        let (inner, vocabulary, starts) = match model {
            "gpt2" => {
                let pre = Pre::of(file.string(PRE).ok_or(TokenizerError::Missing(PRE))?)?;
                let merges = file.strings(MERGES).ok_or(TokenizerError::Missing(MERGES))?;
                (byte_level_bpe(pre, &words, merges)?, vocabulary(&words), pre.starts_texts())
            }
            "llama" => {
                let scores = file.floats(SCORES).ok_or(TokenizerError::Missing(SCORES))?;
                words.check_len(scores.len(), "scores")?;
                let add_space = file.bool(ADD_SPACE).unwrap_or(true);
                let inner = sentencepiece::tokenizer(&words, scores, add_space)?;
                (inner, sentencepiece::vocabulary(&words), true)
            }
            other => {
                let (value, known) = (other.to_owned(), "gpt2, llama");
                return Err(TokenizerError::Unsupported { key: MODEL, value, known });
            }
        };
        let id_of = |key| id_of(file, key, words.tokens.len());
        let text_of = |id: Option<u32>| id.map(|id| words.tokens[id as usize].clone());
        let bos = id_of(BOS)?;
        let mut eos = Vec::new();
        for key in ENDS {
            eos.extend(id_of(key)?);
        }
        let (add_bos, add_eos) = (file.bool(ADD_BOS), file.bool(ADD_EOS).unwrap_or(false));
        Ok(Self::new(Parts {
            inner,
            vocabulary,
            prefix: bos.filter(|_| add_bos.unwrap_or(starts)).into_iter().collect(),
            suffix: eos.first().copied().filter(|_| add_eos).into_iter().collect(),
            bos_token: text_of(bos),
            eos_token: text_of(eos.first().copied()),
            eos,
            template: file.string("tokenizer.chat_template").map(str::to_owned),
        }))
    }
}

impl<'a> Words<'a> {
    fn read(file: &'a Gguf) -> Result<Self, TokenizerError> {
        let tokens = file.strings(TOKENS).ok_or(TokenizerError::Missing(TOKENS))?;
        let types = file.ints(TYPES).ok_or(TokenizerError::Missing(TYPES))?;
        let words = Self { tokens, types };
        words.check_len(types.len(), "types")?;
        Ok(words)
    }

    fn check_len(&self, len: usize, what: &str) -> Result<(), TokenizerError> {
        if len == self.tokens.len() {
            return Ok(());
        }
        let rule = format!("{} tokens have {len} {what}", self.tokens.len());
        Err(TokenizerError::Malformed(rule))
    }

    /// Id, text and type of each.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &'a str, i64)> {
        let words = (0..).zip(self.tokens.iter().zip(self.types));
        words.map(|(id, (token, kind))| (id, token.as_str(), *kind))
    }

    /// Text to id.
    pub(super) fn vocab(&self) -> Vocab {
        self.iter().map(|(id, token, _)| (token.to_owned(), id)).collect()
    }

    /// What is found in a text before it is split: special tokens, and those that a user added.
    pub(super) fn added(&self) -> Vec<AddedToken> {
        let is_special = |kind: i64| match kind {
            CONTROL | UNKNOWN => Some(true),
            USER_DEFINED => Some(false),
            _ => None,
        };
        let added = self.iter().filter(|(_, token, _)| !token.is_empty());
        let added = added.filter_map(|(_, token, kind)| {
            Some(AddedToken::from(token, is_special(kind)?).normalized(false))
        });
        added.collect()
    }
}

/// The id a key names, checked against the vocabulary.
fn id_of(file: &Gguf, key: &str, tokens: usize) -> Result<Option<u32>, TokenizerError> {
    let Some(id) = file.u64(key) else { return Ok(None) };
    match u32::try_from(id) {
        Ok(id) if (id as usize) < tokens => Ok(Some(id)),
        Ok(_) | Err(_) => {
            let rule = format!("`{key}` = {id}, but there are {tokens} tokens");
            Err(TokenizerError::Malformed(rule))
        }
    }
}

fn byte_level_bpe(
    pre: Pre,
    words: &Words<'_>,
    merges: &[String],
) -> Result<tokenizers::Tokenizer, TokenizerError> {
    let malformed = |error: tokenizers::Error| TokenizerError::Malformed(error.to_string());
    let bpe = BPE::builder()
        .vocab_and_merges(words.vocab(), pairs(words.tokens, merges)?)
        .ignore_merges(pre.ignores_merges())
        .build()
        .map_err(malformed)?;
    let mut inner = tokenizers::Tokenizer::new(bpe);
    inner.with_pre_tokenizer(Some(pre.splitter().map_err(malformed)?));
    // Not used here; a `tokenizer.json` written from this one needs it.
    inner.with_decoder(Some(ByteLevel::default()));
    inner.add_tokens(words.added()).map_err(malformed)?;
    inner.with_normalizer(None::<NormalizerWrapper>).map_err(malformed)?;
    Ok(inner)
}

/// `"a b"` to (`a`, `b`), each merge's result being a token.
fn pairs(tokens: &[String], merges: &[String]) -> Result<Merges, TokenizerError> {
    let known: HashSet<&str> = tokens.iter().map(String::as_str).collect();
    let longest = tokens.iter().map(String::len).max().unwrap_or(0);
    merges
        .iter()
        .map(|merge| {
            // The space of a token is written `Ġ`, so the first space parts the two.
            let refuse = || TokenizerError::Malformed(format!("`{merge}` is not a merge"));
            let (left, right) = merge.split_once(' ').ok_or_else(refuse)?;
            check_merge(longest, left, right)?;
            if known.contains(left) && known.contains(right) {
                Ok((left.to_owned(), right.to_owned()))
            } else {
                Err(refuse())
            }
        })
        .collect()
}

fn vocabulary(words: &Words<'_>) -> Vocabulary {
    let mut vocabulary = Vocabulary::default();
    for (id, token, kind) in words.iter() {
        match kind {
            UNUSED => {}
            CONTROL | UNKNOWN | USER_DEFINED => {
                vocabulary.insert(id, token.as_bytes(), kind != USER_DEFINED);
            }
            _ => vocabulary.insert(id, &Spelling::ByteLevel.bytes(token), false),
        }
    }
    vocabulary
}

impl Pre {
    fn of(name: &str) -> Result<Self, TokenizerError> {
        match name {
            "gpt-2" | "gpt2" | "phi-2" | "mpt" | "olmo" => Ok(Self::Gpt2),
            "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" => Ok(Self::SmolLm),
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "pixtral" => Ok(Self::Llama3),
            "qwen2" | "deepseek-r1-qwen" => Ok(Self::Qwen2),
            "tekken" => Ok(Self::Tekken),
            other => Err(TokenizerError::Unsupported {
                key: PRE,
                value: other.to_owned(),
                known: "gpt-2, smollm, llama-bpe, qwen2, tekken",
            }),
        }
    }

    fn splitter(self) -> Result<PreTokenizerWrapper, tokenizers::Error> {
        let gpt2 = || PreTokenizerWrapper::from(ByteLevel::new(false, true, true));
        let by = |pattern: &str| -> Result<PreTokenizerWrapper, tokenizers::Error> {
            let pattern = SplitPattern::Regex(pattern.to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?;
            let bytes = ByteLevel::new(false, true, false);
            Ok(Sequence::new(vec![split.into(), bytes.into()]).into())
        };
        match self {
            Self::Gpt2 => Ok(gpt2()),
            Self::SmolLm => Ok(Sequence::new(vec![Digits::new(true).into(), gpt2()]).into()),
            Self::Llama3 => by(LLAMA3_SPLIT),
            Self::Qwen2 => by(QWEN2_SPLIT),
            Self::Tekken => by(TEKKEN_SPLIT),
        }
    }

    /// A piece that is a token is that token, whatever merges would make of it.
    fn ignores_merges(self) -> bool {
        matches!(self, Self::Llama3 | Self::Tekken)
    }

    /// Whether texts begin with the start token where the file does not say.
    fn starts_texts(self) -> bool {
        matches!(self, Self::Llama3 | Self::Tekken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::gguf::Value;

    fn file(pre: &str, change: impl Fn(&mut Gguf)) -> Gguf {
        let tokens = ["<|end|>", "a", "b", "ab", "Ġ", "Ã", "©", "1", "2", "é"];
        let mut types = vec![1; tokens.len()];
        types[0] = CONTROL;
        let mut file =
            Gguf { version: 3, metadata: Default::default(), tensors: vec![], data_offset: 0 };
        let mut set = |key: &str, value| file.metadata.insert(key.to_owned(), value);
        set(MODEL, Value::String("gpt2".into()));
        set(PRE, Value::String(pre.into()));
        set(TOKENS, Value::Strings(tokens.map(str::to_owned).to_vec()));
        set(TYPES, Value::Ints(types));
        set(MERGES, Value::Strings(vec!["a b".into()]));
        set(ENDS[0], Value::U64(0));
        set(BOS, Value::U64(0));
        change(&mut file);
        file
    }

    #[test]
    fn a_small_vocabulary_is_merged_split_and_decoded() {
        for pre in ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken"] {
            let tokenizer = Tokenizer::from_gguf(&file(pre, |_| {})).unwrap();
            let ids = tokenizer.encode("ab é12<|end|>", true).unwrap();
            assert_eq!(ids, [3, 4, 5, 6, 7, 8, 0], "{pre}");
            assert_eq!(tokenizer.decode(&ids, false), "ab é12<|end|>");
            assert_eq!(tokenizer.decode(&ids, true), "ab é12");
            assert_eq!(tokenizer.token_bytes(5), b"\xc3");
            assert_eq!((tokenizer.eos_ids(), tokenizer.vocab_size()), (&[0][..], 10));
            assert_eq!(tokenizer.token_bytes(99), b"");
        }
    }

    #[test]
    fn a_start_token_goes_before_prompts_only_where_the_model_wants_it() {
        let plain = Tokenizer::from_gguf(&file("gpt-2", |_| {})).unwrap();
        assert_eq!(plain.encode_prompt("ab", true).unwrap(), [3]);
        let llama = Tokenizer::from_gguf(&file("llama-bpe", |_| {})).unwrap();
        assert_eq!(llama.encode_prompt("ab", true).unwrap(), [0, 3]);
        assert_eq!(llama.encode_prompt("ab", false).unwrap(), [3]);
    }

    #[test]
    fn broken_metadata_is_refused_in_words() {
        let with = |key: &'static str, value: Option<Value>| {
            let broken = file("gpt-2", |file| match &value {
                Some(value) => {
                    file.metadata.insert(key.to_owned(), value.clone());
                }
                None => {
                    file.metadata.remove(key);
                }
            });
            match Tokenizer::from_gguf(&broken) {
                Ok(_) => panic!("{key} was taken"),
                Err(error) => error.to_string(),
            }
        };
        let merges = |merge: &str| with(MERGES, Some(Value::Strings(vec![merge.to_owned()])));
        assert!(with(TOKENS, None).contains("has no `tokenizer.ggml.tokens`"));
        assert!(with(MODEL, Some(Value::String("t5".into()))).contains("known: gpt2, llama"));
        assert!(
            with(MODEL, Some(Value::String("llama".into())))
                .contains("has no `tokenizer.ggml.scores`")
        );
        assert!(with(PRE, Some(Value::String("viking".into()))).contains("known: gpt-2, smollm"));
        assert!(with(TYPES, Some(Value::Ints(vec![1]))).contains("10 tokens have 1 types"));
        assert!(with(ENDS[0], Some(Value::U64(10))).contains("there are 10 tokens"));
        assert!(with(ENDS[0], Some(Value::U64(u64::MAX))).contains("there are 10 tokens"));
        assert!(merges("ab").contains("is not a merge"));
        assert!(merges("a x").contains("is not a merge"));
        assert!(merges("a 2").contains("malformed"));
        assert!(merges("<|end|> <|end|>").contains("longer than every token"));
    }
}
