//! The checkpoints tests make: what the worker's loader and tokenizer read of them.

use baton_integration::files::demo_model;
use baton_integration::tiny_model::{
    EOS, TinyArchitecture, TinyDtype, TinyModel, TinyRope, dequantise_gguf,
};
use baton_shared::text::gguf::Gguf;
use baton_shared::text::tokenizer::Tokenizer;
use baton_workerd::model;

#[test]
fn the_dequantised_demo_model_is_the_same_model() {
    let folder = tempfile::tempdir().unwrap();
    let gguf = demo_model().unwrap();
    dequantise_gguf(&gguf, folder.path()).unwrap();
    let [one, two] = [gguf.as_path(), folder.path()].map(|path| model::load(path).unwrap());
    assert_eq!(one.spec, two.spec);
    assert!(one.head.is_none() && two.head.is_none());
    // Rows of Q are in the same order, and as close as bf16 can say.
    for row in [0, 1, 33, 575] {
        let [a, b] = [&one, &two].map(|model| model::dequantize(&model.layers[7].q, row));
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= a.abs() / 256.0), "row {row}");
    }
    let one = Tokenizer::from_gguf(&Gguf::open(&gguf).unwrap()).unwrap();
    let two = Tokenizer::from_file(&folder.path().join("tokenizer.json")).unwrap();
    assert_eq!(one.hash(), two.hash());
    let text = "12 crabs in 2024 🦀, don't they?\n\n<|im_end|>";
    assert_eq!(one.encode(text, true).unwrap(), two.encode(text, true).unwrap());
}

#[test]
fn both_formats_of_a_tiny_model_are_one_model() {
    for (architecture, rope) in [
        (TinyArchitecture::Llama, TinyRope::Linear(3.0)),
        (TinyArchitecture::Qwen2, TinyRope::Llama3),
        (TinyArchitecture::Qwen3, TinyRope::Plain),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tiny.gguf");
        let tiny = TinyModel { architecture, rope, dtype: TinyDtype::F32, ..TinyModel::default() };
        tiny.write(folder.path()).unwrap();
        tiny.write_gguf(&file).unwrap();
        let [mut one, mut two] = [folder.path(), &file].map(|path| model::load(path).unwrap());
        let [a, b] = [&mut one, &mut two].map(|m| std::mem::take(&mut m.spec.rope_factors));
        assert_eq!(a.len(), b.len());
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-4), "{a:?} {b:?}");
        assert_eq!(one.spec, two.spec);
        for (one, two) in one.layers.iter().zip(&two.layers) {
            assert_eq!(one.q.bytes, two.q.bytes);
            assert_eq!(one.k.bytes, two.k.bytes);
            assert_eq!(one.down.bytes, two.down.bytes);
            assert_eq!((&one.qkv_bias, &one.qk_norm), (&two.qkv_bias, &two.qk_norm));
        }
        let one = Tokenizer::from_gguf(&Gguf::open(&file).unwrap()).unwrap();
        let two = Tokenizer::from_file(&folder.path().join("tokenizer.json")).unwrap();
        assert_eq!(one.hash(), two.hash());
    }
}

#[test]
fn a_tiny_tokenizer_gives_back_every_text_and_cuts_emoji() {
    let folder = tempfile::tempdir().unwrap();
    TinyModel::default().write(folder.path()).unwrap();
    let tokenizer = Tokenizer::from_file(&folder.path().join("tokenizer.json")).unwrap();
    assert_eq!(tokenizer.eos_ids(), [EOS]);
    for text in
        ["", "hello there, 42 worlds\r\n\t", "Zażółć gęślą jaźń", "東京は", "🦀👩‍👩‍👧🇵🇱", "\u{0}\u{7f}"]
    {
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids, false), text);
    }
    let crab: Vec<u32> = "🦀".bytes().map(TinyModel::byte_id).collect();
    assert_eq!(tokenizer.encode("🦀", false).unwrap(), crab);
    assert!(tokenizer.encode("hello", false).unwrap().len() < 5);
    assert_eq!(tokenizer.encode("<|im_end|>", true).unwrap(), [EOS]);
}
