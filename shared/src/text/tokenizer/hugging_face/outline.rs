//! What of a `tokenizer.json` has to be looked at before the library reads it, in passes that keep nothing: as a tree, a
//! large vocabulary takes more than a hundred megabytes.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

use super::super::{Spelling, TokenizerError, check_merge};

/// The members that are looked at. What is no such thing is refused by the library in its own words.
#[derive(Deserialize)]
pub struct Outline<'a> {
    #[serde(borrow)]
    model: &'a RawValue,
    #[serde(default)]
    decoder: Value,
}

#[derive(Deserialize)]
struct Model<'a> {
    #[serde(borrow, default)]
    vocab: Option<&'a RawValue>,
    #[serde(borrow, default)]
    merges: Option<&'a RawValue>,
}

/// Bytes of the longest key of an object.
struct LongestKey(usize);

/// The longest merge, and its length.
struct LongestMerge(Option<(String, String)>);

#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    /// `"a b"`.
    Joined(String),
    /// `["a", "b"]`.
    Pair(String, String),
    Other(IgnoredAny),
}

impl Outline<'_> {
    /// Whether every merge can give a token.
    ///
    /// # Errors
    /// [`TokenizerError::Malformed`].
    pub fn check_merges(&self) -> Result<(), TokenizerError> {
        let Ok(model) = serde_json::from_str::<Model<'_>>(self.model.get()) else { return Ok(()) };
        let (Some(vocab), Some(merges)) = (model.vocab, model.merges) else { return Ok(()) };
        let vocab = serde_json::from_str::<LongestKey>(vocab.get());
        let merges = serde_json::from_str::<LongestMerge>(merges.get());
        match (vocab, merges) {
            (Ok(LongestKey(longest)), Ok(LongestMerge(Some((left, right))))) => {
                check_merge(longest, &left, &right)
            }
            _ => Ok(()),
        }
    }

    /// How tokens are written.
    ///
    /// # Errors
    /// [`TokenizerError::Unsupported`].
    pub fn spelling(&self) -> Result<Spelling, TokenizerError> {
        let listed = self.decoder["decoders"].as_array().into_iter().flatten();
        let kinds: Vec<&str> = std::iter::once(&self.decoder)
            .chain(listed)
            .filter_map(|decoder| decoder["type"].as_str())
            .collect();
        let has = |kind| kinds.contains(&kind);
        if has("ByteLevel") {
            Ok(Spelling::ByteLevel)
        } else if has("ByteFallback") || has("Metaspace") {
            Ok(Spelling::SentencePiece)
        } else {
            Err(TokenizerError::Unsupported {
                key: "decoder",
                value: if kinds.is_empty() { "none".to_owned() } else { kinds.join(", ") },
                known: "ByteLevel, ByteFallback, Metaspace",
            })
        }
    }
}

impl<'de> Deserialize<'de> for LongestKey {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Keys;
        impl<'de> Visitor<'de> for Keys {
            type Value = LongestKey;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<LongestKey, A::Error> {
                let mut longest = 0;
                while let Some((Text(key), IgnoredAny)) = map.next_entry()? {
                    longest = longest.max(key.len());
                }
                Ok(LongestKey(longest))
            }
        }
        from.deserialize_map(Keys)
    }
}

impl<'de> Deserialize<'de> for LongestMerge {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Merges;
        impl<'de> Visitor<'de> for Merges {
            type Value = LongestMerge;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<LongestMerge, A::Error> {
                let mut longest: Option<(String, String)> = None;
                while let Some(merge) = list.next_element()? {
                    let (left, right) = match merge {
                        Merge::Joined(merge) => match merge.split_once(' ') {
                            Some((left, right)) => (left.to_owned(), right.to_owned()),
                            None => (merge, String::new()),
                        },
                        Merge::Pair(left, right) => (left, right),
                        Merge::Other(IgnoredAny) => continue,
                    };
                    let len = |(left, right): &(String, String)| left.len() + right.len();
                    let merge = (left, right);
                    if longest.as_ref().is_none_or(|longest| len(&merge) > len(longest)) {
                        longest = Some(merge);
                    }
                }
                Ok(LongestMerge(longest))
            }
        }
        from.deserialize_seq(Merges)
    }
}
