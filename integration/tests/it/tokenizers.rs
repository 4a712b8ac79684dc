//! A SentencePiece vocabulary of a real model against ids that SentencePiece recorded (`shared/tests/tokenizer.rs` does
//! it for byte-level vocabularies). And what goes out piece by piece is the whole.

use std::path::PathBuf;

use baton_integration::files;
use baton_shared::text::gguf::{Gguf, Value};
use baton_shared::text::tokenizer::Tokenizer;
use baton_workerd::text::stream::TextStream;
use serde::Deserialize;

use crate::support::skipped;

#[derive(Deserialize)]
struct Recorded {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    /// Special tokens read as text.
    ids: Vec<u32>,
}

/// Of a file below the source tree.
fn recorded(path: &str) -> Vec<Case> {
    let recorded: Recorded =
        serde_json::from_slice(&std::fs::read(files::top().join(path)).unwrap()).unwrap();
    assert!(recorded.cases.len() >= 200, "{path}: {} cases", recorded.cases.len());
    recorded.cases
}

/// `shown`: what a text looks like when it comes back, whole or piece by piece.
fn assert_agree(tokenizer: &Tokenizer, cases: &[Case], shown: impl Fn(&str) -> String) {
    for Case { text, ids } in cases {
        assert_eq!(&tokenizer.encode(text, false).unwrap(), ids, "{text:?}");
        let whole = tokenizer.decode(ids, false);
        assert_eq!(whole, shown(text));
        let mut stream = TextStream::new(|ids: &[u32]| tokenizer.decode(ids, false));
        let mut pieces: String = ids.iter().map(|id| stream.push(*id)).collect();
        pieces += &stream.finish();
        assert_eq!(pieces, whole, "streamed");
    }
}

/// A model of `integration/optional-models.sh`, or nothing and a line that says so.
pub fn optional(test: &str, file: &str) -> Option<PathBuf> {
    let path = files::optional_model(file);
    if path.is_none() {
        skipped(test, &format!("{file} was not to be had (integration/optional-models.sh)"));
    }
    path
}

/// SentencePiece's file as the metadata that a GGUF file of the model has.
fn gguf_of_sentence_piece(model: &[u8]) -> Gguf {
    let (mut tokens, mut scores, mut types) = (Vec::new(), Vec::new(), Vec::new());
    for (field, piece) in fields(model) {
        if field != 1 {
            continue;
        }
        let (mut score, mut kind) = (0.0, 1);
        for (field, value) in fields(piece) {
            match field {
                1 => tokens.push(String::from_utf8(value.to_vec()).unwrap()),
                2 => score = f32::from_le_bytes(value.try_into().unwrap()),
                3 => kind = i64::from(value[0]),
                other => panic!("field {other} of a piece"),
            }
        }
        scores.push(score);
        types.push(kind);
    }
    let entries = [
        ("model", Value::String("llama".into())),
        ("tokens", Value::Strings(tokens)),
        ("scores", Value::Floats(scores)),
        ("token_type", Value::Ints(types)),
        ("bos_token_id", Value::U64(1)),
        ("eos_token_id", Value::U64(2)),
    ];
    let metadata =
        entries.map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).into_iter().collect();
    Gguf { version: 3, metadata, tensors: Vec::new(), data_offset: 0 }
}

/// Fields of a protocol buffers message: number and bytes.
fn fields(mut message: &[u8]) -> Vec<(u64, &[u8])> {
    fn number(message: &mut &[u8]) -> u64 {
        let len = message.iter().position(|byte| byte & 0x80 == 0).unwrap() + 1;
        let (bytes, rest) = message.split_at(len);
        *message = rest;
        bytes.iter().rev().fold(0, |value, byte| value << 7 | u64::from(byte & 0x7f))
    }
    let mut fields = Vec::new();
    while !message.is_empty() {
        let key = number(&mut message);
        let before = message;
        let len = match key & 7 {
            0 => {
                before.len() - {
                    number(&mut message);
                    message.len()
                }
            }
            1 => 8,
            2 => number(&mut message) as usize,
            5 => 4,
            other => panic!("wire type {other}"),
        };
        let from = if key & 7 == 0 { before } else { message };
        let (value, rest) = from.split_at(len);
        fields.push((key >> 3, value));
        message = rest;
    }
    fields
}

#[test]
fn the_demo_models_texts_come_out_whole_piece_by_piece() {
    let file = Gguf::open(&files::demo_model().unwrap()).unwrap();
    let tokenizer = Tokenizer::from_gguf(&file).unwrap();
    assert_agree(&tokenizer, &recorded("shared/tests/fixtures/smollm2-tokens.json"), str::to_owned);
}

#[test]
fn a_sentencepiece_vocabulary_in_a_gguf_file_gives_sentencepieces_tokens() {
    let test = "a_sentencepiece_vocabulary_in_a_gguf_file_gives_sentencepieces_tokens";
    let Some(path) = optional(test, "mistral-7b-v0.1.tokenizer.model") else { return };
    let file = gguf_of_sentence_piece(&std::fs::read(path).unwrap());
    let tokenizer = Tokenizer::from_gguf(&file).unwrap();
    let cases = recorded("integration/tests/fixtures/mistral-tokens.json");
    // Words begin with a space, the first one too; and SentencePiece writes a space as `▁`.
    let shown = |text: &str| match text {
        "" => String::new(),
        text => format!(" {text}").replace('▁', " "),
    };
    assert_agree(&tokenizer, &cases, shown);
    // And the `tokenizer.json` of the same vocabulary.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    std::fs::write(&path, tokenizer.to_json().unwrap()).unwrap();
    let from_json = Tokenizer::from_file(&path).unwrap();
    assert_agree(&from_json, &cases, shown);
}
