//! A tokenizer from GGUF metadata: SentencePiece's BPE (`tokenizer.ggml.model` = `llama`).
//!
//! Such a file has no merges, only pieces with scores: of all neighbours that make a piece, those that make the one
//! of the highest score are joined first. So every way to cut a piece in two is a merge, ordered by the piece's score.

use std::collections::HashMap;

use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Merges};
use tokenizers::normalizers::replace::Replace;
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Sequence};

use super::gguf::{CONTROL, UNKNOWN, UNUSED, USER_DEFINED, Words};
use super::{Spelling, TokenizerError, Vocabulary, hex_byte};

/// Type of a token that stands for one byte.
const BYTE: i64 = 6;
/// Longest piece, bytes; real ones have some fifty. Cutting it in all ways takes the square of this.
const LONGEST_PIECE: usize = 1024;
/// What a space is written as.
const SPACE: &str = "\u{2581}";

/// The model; with `add_space` a text begins as if after a space, as all its words do.
pub(super) fn tokenizer(
    words: &Words<'_>,
    scores: &[f32],
    add_space: bool,
) -> Result<tokenizers::Tokenizer, TokenizerError> {
    let malformed = |error: tokenizers::Error| TokenizerError::Malformed(error.to_string());
    let unknown = words.iter().find(|(_, _, kind)| *kind == UNKNOWN);
    let mut bpe = BPE::builder()
        .vocab_and_merges(words.vocab(), merges(words, scores)?)
        .byte_fallback(true)
        .fuse_unk(true);
    if let Some((_, token, _)) = unknown {
        bpe = bpe.unk_token(token.to_owned());
    }
    let mut inner = tokenizers::Tokenizer::new(bpe.build().map_err(malformed)?);
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    if add_space {
        normalizers.push(Prepend::new(SPACE.to_owned()).into());
    }
    normalizers.push(Replace::new(" ", SPACE).map_err(malformed)?.into());
    inner.with_normalizer(Some(Sequence::new(normalizers))).map_err(malformed)?;
    // Not used here; a `tokenizer.json` written from this one needs it.
    let decoders: Vec<DecoderWrapper> = vec![
        Replace::new(SPACE, " ").map_err(malformed)?.into(),
        ByteFallback::new().into(),
        Fuse::new().into(),
        Strip::new(' ', usize::from(add_space), 0).into(),
    ];
    inner.with_decoder(Some(Decoders::new(decoders)));
    inner.add_tokens(words.added()).map_err(malformed)?;
    Ok(inner)
}

/// The bytes of every id.
pub(super) fn vocabulary(words: &Words<'_>) -> Vocabulary {
    let mut vocabulary = Vocabulary::default();
    for (id, token, kind) in words.iter() {
        match (kind, hex_byte(token)) {
            (UNUSED, _) => {}
            (BYTE, Some(byte)) => vocabulary.insert(id, &[byte], false),
            (CONTROL | UNKNOWN, _) => vocabulary.insert(id, token.as_bytes(), true),
            (USER_DEFINED, _) => vocabulary.insert(id, token.as_bytes(), false),
            _ => vocabulary.insert(id, &Spelling::SentencePiece.bytes(token), false),
        }
    }
    vocabulary
}

/// All ways to cut a piece in two pieces, best piece first. Special tokens are never made of others.
fn merges(words: &Words<'_>, scores: &[f32]) -> Result<Merges, TokenizerError> {
    let pieces: HashMap<&str, u32> = words
        .iter()
        .filter(|(_, _, kind)| !matches!(*kind, CONTROL | UNKNOWN | UNUSED | USER_DEFINED | BYTE))
        .map(|(id, token, _)| (token, id))
        .collect();
    let mut made: Vec<(f32, u32, &str, &str)> = Vec::new();
    for (piece, id) in &pieces {
        if piece.len() > LONGEST_PIECE {
            let rule = format!("token {id} has {} bytes, {LONGEST_PIECE} at most", piece.len());
            return Err(TokenizerError::Malformed(rule));
        }
        for (at, _) in piece.char_indices().skip(1) {
            let (left, right) = piece.split_at(at);
            if pieces.contains_key(left) && pieces.contains_key(right) {
                made.push((scores[*id as usize], *id, left, right));
            }
        }
    }
    // By score; pieces of one score by their place in the file, cuts of one piece from the left.
    made.sort_unstable_by(|a, b| {
        b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.len().cmp(&b.2.len()))
    });
    Ok(made.into_iter().map(|(_, _, left, right)| (left.to_owned(), right.to_owned())).collect())
}

#[cfg(test)]
mod tests {
    use super::super::Tokenizer;
    use crate::text::gguf::{Gguf, Value};

    const NORMAL: i64 = 1;

    fn file(change: impl Fn(&mut Gguf)) -> Gguf {
        use super::{BYTE, CONTROL, UNKNOWN, USER_DEFINED};
        let mut words: Vec<(String, i64, f32)> = vec![
            ("<unk>".into(), UNKNOWN, 0.0),
            ("<s>".into(), CONTROL, 0.0),
            ("</s>".into(), CONTROL, 0.0),
        ];
        words.extend((0..=255).map(|byte| (format!("<0x{byte:02X}>"), BYTE, 0.0)));
        // Ids from 259 on; "ab" beats "bc" beats "▁a".
        for (piece, score) in [
            ("ab", -1.0),
            ("bc", -2.0),
            ("▁a", -3.0),
            ("abc", -4.0),
            ("▁ab", -5.0),
            ("▁▁", -6.0),
            ("a", -10.0),
            ("b", -11.0),
            ("c", -12.0),
            ("▁", -13.0),
            ("<", -14.0),
            ("/", -15.0),
            ("s", -16.0),
            (">", -17.0),
        ] {
            words.push((piece.into(), NORMAL, score));
        }
        words.push(("<tool>".into(), USER_DEFINED, 0.0));
        let mut file =
            Gguf { version: 3, metadata: Default::default(), tensors: vec![], data_offset: 0 };
        let mut set = |key: &str, value| {
            file.metadata.insert(format!("tokenizer.ggml.{key}"), value);
        };
        set("model", Value::String("llama".into()));
        set("tokens", Value::Strings(words.iter().map(|(piece, ..)| piece.clone()).collect()));
        set("token_type", Value::Ints(words.iter().map(|(_, kind, _)| *kind).collect()));
        set("scores", Value::Floats(words.iter().map(|(.., score)| *score).collect()));
        set("bos_token_id", Value::U64(1));
        set("eos_token_id", Value::U64(2));
        change(&mut file);
        file
    }

    fn tokenizer(change: impl Fn(&mut Gguf)) -> Tokenizer {
        Tokenizer::from_gguf(&file(change)).unwrap()
    }

    #[test]
    fn neighbours_that_make_the_best_piece_are_joined_first() {
        let tokenizer = tokenizer(|_| {});
        let ids = |text: &str| tokenizer.encode(text, false).unwrap();
        let id = |piece: &str| {
            let found = (259..)
                .take(14)
                .find(|id| tokenizer.token_bytes(*id) == piece.replace('▁', " ").as_bytes());
            found.unwrap()
        };
        // ▁ a b → ▁ ab → ▁ab, as no other pair is left; ▁ a b c → ▁ ab c → ▁ abc, as -4 beats -5.
        assert_eq!(ids("ab"), [id("▁ab")]);
        assert_eq!(ids("abc"), [id("▁"), id("abc")]);
        assert_eq!(ids(" a"), [id("▁"), id("▁a")]);
        assert_eq!(ids("  c"), [id("▁▁"), id("▁"), id("c")]);
        assert!(ids("").is_empty());
    }

    #[test]
    fn what_has_no_piece_becomes_bytes_and_comes_back() {
        let tokenizer = tokenizer(|_| {});
        let ids = tokenizer.encode("é\n🦀", false).unwrap();
        let bytes: Vec<u32> = "é\n🦀".bytes().map(|byte| 3 + u32::from(byte)).collect();
        assert_eq!(ids[1..], bytes);
        for text in ["ab é c", "🦀", "\u{0}", "  ", "<s>ab</s><tool>"] {
            let ids = tokenizer.encode(text, false).unwrap();
            assert_eq!(tokenizer.decode(&ids, false), format!(" {text}"), "{ids:?}");
        }
    }

    #[test]
    fn special_tokens_are_one_id_only_where_asked_for_and_user_defined_ones_always() {
        let tokenizer = tokenizer(|_| {});
        let a = tokenizer.encode("a", false).unwrap();
        assert_eq!(tokenizer.encode("<s>a</s>", true).unwrap(), [&[1], &a[..], &[2]].concat());
        assert!(!tokenizer.encode("<s>a</s>", false).unwrap().contains(&1));
        let tool = tokenizer.vocab_size() as u32 - 1;
        assert_eq!(tokenizer.encode("<tool>a", false).unwrap(), [&[tool], &a[..]].concat());
        assert!(tokenizer.is_special(0) && tokenizer.is_special(2) && !tokenizer.is_special(tool));
    }

    #[test]
    fn start_end_and_leading_space_are_as_the_file_says() {
        let set = |key: &'static str, value: bool| {
            tokenizer(move |file| {
                file.metadata.insert(format!("tokenizer.ggml.{key}"), Value::Bool(value));
            })
        };
        let prompt = |tokenizer: &Tokenizer| tokenizer.encode_prompt("ab", true).unwrap();
        let plain = tokenizer(|_| {});
        let ab = plain.encode("ab", false).unwrap();
        assert_eq!(prompt(&plain), [&[1], &ab[..]].concat());
        assert_eq!(plain.encode_prompt("ab", false).unwrap(), ab);
        assert_eq!(prompt(&set("add_bos_token", false)), ab);
        assert_eq!(prompt(&set("add_eos_token", true)), [&[1], &ab[..], &[2]].concat());
        let bare = set("add_space_prefix", false);
        assert_eq!(bare.decode(&bare.encode("ab", false).unwrap(), false), "ab");
    }

    #[test]
    fn a_tokenizer_json_written_from_it_says_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let ours = tokenizer(|_| {});
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, ours.to_json().unwrap()).unwrap();
        let theirs = Tokenizer::from_file(&path).unwrap();
        for text in ["ab abc  é🦀", "<s> a</s>b", " "] {
            for special in [false, true] {
                let [a, b] = [&ours, &theirs].map(|t| t.encode(text, special).unwrap());
                assert_eq!(a, b, "{text}");
                assert_eq!(ours.decode(&a, special), theirs.decode(&a, special));
            }
        }
    }

    #[test]
    fn broken_metadata_is_refused_in_words() {
        let refused = |change: fn(&mut Gguf)| match Tokenizer::from_gguf(&file(change)) {
            Ok(_) => panic!("it was taken"),
            Err(error) => error.to_string(),
        };
        let no_scores = refused(|file| drop(file.metadata.remove("tokenizer.ggml.scores")));
        assert!(no_scores.contains("has no `tokenizer.ggml.scores`"), "{no_scores}");
        let few = refused(|file| {
            file.metadata.insert("tokenizer.ggml.scores".into(), Value::Floats(vec![1.0]));
        });
        assert!(few.contains("274 tokens have 1 scores"), "{few}");
        let long = refused(|file| {
            if let Some(Value::Strings(tokens)) = file.metadata.get_mut("tokenizer.ggml.tokens") {
                tokens[260] = "x".repeat(5000);
            }
        });
        assert!(long.contains("token 260 has 5000 bytes"), "{long}");
    }
}
