//! The demo model's tokenizer against ids that llama.cpp gave for the same strings.
#![cfg(feature = "text")]

use std::path::{Path, PathBuf};

use baton_shared::text::gguf::Gguf;
use baton_shared::text::tokenizer::Tokenizer;
use serde::Deserialize;

const MODEL: &str = ".deps/models/SmolLM2-135M-Instruct.Q4_1.gguf";

#[derive(Deserialize)]
struct Golden {
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
    ids_parse_special: Option<Vec<u32>>,
}

fn model_file() -> PathBuf {
    let folders = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
    let found = folders.map(|folder| folder.join(MODEL)).find(|path| path.exists());
    found.unwrap_or_else(|| panic!("`{MODEL}` is not here: run `make setup`"))
}

fn demo_tokenizer() -> Tokenizer {
    let file = Gguf::open(&model_file()).expect("the demo model is a GGUF file");
    Tokenizer::from_gguf(&file).expect("the demo model has a tokenizer")
}

fn golden() -> Vec<Case> {
    let text = include_str!("fixtures/smollm2-tokens.json");
    let golden: Golden = serde_json::from_str(text).expect("the fixture is valid");
    golden.cases
}

#[test]
fn every_golden_string_has_llama_cpps_ids() {
    let tokenizer = demo_tokenizer();
    let cases = golden();
    assert!(cases.len() >= 250);
    for case in cases {
        let plain = tokenizer.encode(&case.text, false).unwrap();
        assert_eq!(plain, case.ids, "{:?}", case.text);
        let special = tokenizer.encode(&case.text, true).unwrap();
        assert_eq!(special, case.ids_parse_special.unwrap_or(case.ids), "{:?}", case.text);
    }
}

#[test]
fn decoding_gives_every_golden_string_back() {
    let tokenizer = demo_tokenizer();
    for case in golden() {
        assert_eq!(tokenizer.decode(&case.ids, false), case.text);
        let pieces: Vec<u8> =
            case.ids.iter().flat_map(|id| tokenizer.token_bytes(*id)).copied().collect();
        assert_eq!(String::from_utf8_lossy(&pieces), case.text);
    }
}

#[test]
fn the_demo_models_metadata_is_followed() {
    let tokenizer = demo_tokenizer();
    assert_eq!(tokenizer.vocab_size(), 49_152);
    assert_eq!(tokenizer.eos_ids(), [2]);
    assert!(tokenizer.prefix().is_empty());
    assert!(tokenizer.is_special(1) && !tokenizer.is_special(19_556));
    assert_eq!(tokenizer.bos_token(), Some("<|im_start|>"));
    assert_eq!(tokenizer.eos_token(), Some("<|im_end|>"));
    assert!(tokenizer.chat_template().unwrap().contains("<|im_start|>"));
}

#[test]
fn a_hugging_face_folder_of_the_same_model_has_the_same_ids_and_hash() {
    let from_gguf = demo_tokenizer();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokenizer.json");
    std::fs::write(&file, from_gguf.to_json().unwrap()).unwrap();
    let config = folder.path().join("generation_config.json");
    std::fs::write(&config, r#"{"eos_token_id": 2}"#).unwrap();
    let from_file = Tokenizer::from_file(&file).unwrap();
    assert_eq!(from_file.hash(), from_gguf.hash());
    for case in golden() {
        assert_eq!(from_file.encode(&case.text, false).unwrap(), case.ids, "{:?}", case.text);
    }
    std::fs::write(&config, r#"{"eos_token_id": [2, 0]}"#).unwrap();
    assert_ne!(Tokenizer::from_file(&file).unwrap().hash(), from_gguf.hash());
}
