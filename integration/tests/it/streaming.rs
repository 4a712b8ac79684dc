//! Text that comes token by token is the text that whole decoding gives, with the real tokenizer.

use baton_integration::files;
use baton_shared::text::gguf::Gguf;
use baton_shared::text::tokenizer::Tokenizer;
use baton_workerd::text::stream::TextStream;
use serde_json::Value;

#[test]
fn streamed_decoding_is_whole_decoding_for_every_recorded_string() {
    let bytes = std::fs::read(files::demo_model().unwrap()).unwrap();
    let tokenizer = Tokenizer::from_gguf(&Gguf::parse(&bytes).unwrap()).unwrap();
    let recorded = include_str!("../../../shared/tests/fixtures/smollm2-tokens.json");
    let recorded: Value = serde_json::from_str(recorded).unwrap();
    let cases = recorded["cases"].as_array().unwrap();
    assert!(cases.len() > 200, "{} cases", cases.len());
    for case in cases {
        let ids: Vec<u32> =
            case["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
        let mut stream = TextStream::new(|window: &[u32]| tokenizer.decode(window, false));
        let mut text: String = ids.iter().map(|id| stream.push(*id)).collect();
        text += &stream.finish();
        assert_eq!(text, tokenizer.decode(&ids, false), "{}", case["text"]);
        assert_eq!(text, case["text"].as_str().unwrap());
    }
}
