//! Real models' tokenizers against ids that llama.cpp gave for the same strings.
#![cfg(feature = "text")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::io::Write;
use std::path::{Path, PathBuf};

use baton_shared::text::gguf::Gguf;
use baton_shared::text::tokenizer::Tokenizer;
use serde::Deserialize;

const DEMO: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
/// Fetched on request only.
const QWEN: &str = "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf";

#[derive(Deserialize)]
struct Golden {
    model: String,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
    ids_parse_special: Option<Vec<u32>>,
}

fn model_file(name: &str) -> Option<PathBuf> {
    let folders = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
    folders.map(|folder| folder.join(".deps/models").join(name)).find(|path| path.exists())
}

fn tokenizer(path: &Path) -> Tokenizer {
    let file = Gguf::open(path).expect("the model is a GGUF file");
    Tokenizer::from_gguf(&file).expect("the model has a tokenizer")
}

fn demo_tokenizer() -> Tokenizer {
    let path = model_file(DEMO);
    tokenizer(&path.unwrap_or_else(|| panic!("`{DEMO}` is not here: run `make setup`")))
}

fn qwen_tokenizer(test: &str) -> Option<Tokenizer> {
    let Some(path) = model_file(QWEN) else {
        let line = format!("skipped: {test}: `{QWEN}` is not in .deps/models\n");
        // Past the test runner, which would keep the line to itself.
        std::io::stderr().write_all(line.as_bytes()).unwrap();
        return None;
    };
    Some(tokenizer(&path))
}

fn golden(model: &str) -> Vec<Case> {
    let text = match model {
        DEMO => include_str!("fixtures/smollm2-tokens.json"),
        _ => include_str!("fixtures/qwen2.5-coder-tokens.json"),
    };
    let golden: Golden = serde_json::from_str(text).expect("the fixture is valid");
    assert_eq!(golden.model, model);
    assert!(golden.cases.len() >= 250);
    golden.cases
}

fn assert_encodes_as_llama_cpp(tokenizer: &Tokenizer, cases: Vec<Case>) {
    for case in cases {
        let plain = tokenizer.encode(&case.text, false).unwrap();
        assert_eq!(plain, case.ids, "{:?}", case.text);
        let special = tokenizer.encode(&case.text, true).unwrap();
        assert_eq!(special, case.ids_parse_special.unwrap_or(case.ids), "{:?}", case.text);
    }
}

fn assert_decodes_to_the_text(tokenizer: &Tokenizer, cases: Vec<Case>) {
    for case in cases {
        assert_eq!(tokenizer.decode(&case.ids, false), case.text);
        let pieces: Vec<u8> =
            case.ids.iter().flat_map(|id| tokenizer.token_bytes(*id)).copied().collect();
        assert_eq!(String::from_utf8_lossy(&pieces), case.text);
    }
}

#[test]
fn every_golden_string_has_llama_cpps_ids() {
    assert_encodes_as_llama_cpp(&demo_tokenizer(), golden(DEMO));
}

#[test]
fn decoding_gives_every_golden_string_back() {
    assert_decodes_to_the_text(&demo_tokenizer(), golden(DEMO));
}

#[test]
fn every_golden_string_has_llama_cpps_ids_for_qwen_too() {
    if let Some(tokenizer) = qwen_tokenizer("every_golden_string_has_llama_cpps_ids_for_qwen_too") {
        assert_encodes_as_llama_cpp(&tokenizer, golden(QWEN));
    }
}

#[test]
fn decoding_gives_every_golden_string_back_for_qwen_too() {
    if let Some(tokenizer) = qwen_tokenizer("decoding_gives_every_golden_string_back_for_qwen_too")
    {
        assert_decodes_to_the_text(&tokenizer, golden(QWEN));
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
    for case in golden(DEMO) {
        assert_eq!(from_file.encode(&case.text, false).unwrap(), case.ids, "{:?}", case.text);
    }
    std::fs::write(&config, r#"{"eos_token_id": [2, 0]}"#).unwrap();
    assert_ne!(Tokenizer::from_file(&file).unwrap().hash(), from_gguf.hash());
}
