//! Whole checkpoints in both formats: what loads, and how each damage and each unsupported thing is named.

use std::path::Path;

use ::safetensors::Dtype;
use ::safetensors::tensor::{TensorView, serialize};
use half::f16;
use serde_json::{Value, json};

use super::narrowed::{CpuWeights, Narrowed};
use super::*;

mod architectures;
mod fp8;

const LAYERS: usize = 2;
const HIDDEN: usize = 32;
const FFN: usize = 64;
const VOCAB: usize = 40;
/// Two query heads and one KV head of 16.
const HEAD_DIM: usize = 16;

/// The tensors of a Hugging Face folder: name and shape.
fn hf_tensors() -> Vec<(String, Vec<usize>)> {
    let mut out = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
        ("lm_head.weight".to_owned(), vec![VOCAB, HIDDEN]),
    ];
    for i in 0..LAYERS {
        for (name, shape) in [
            ("input_layernorm", vec![HIDDEN]),
            ("self_attn.q_proj", vec![2 * HEAD_DIM, HIDDEN]),
            ("self_attn.k_proj", vec![HEAD_DIM, HIDDEN]),
            ("self_attn.v_proj", vec![HEAD_DIM, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, 2 * HEAD_DIM]),
            ("post_attention_layernorm", vec![HIDDEN]),
            ("mlp.gate_proj", vec![FFN, HIDDEN]),
            ("mlp.up_proj", vec![FFN, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, FFN]),
        ] {
            out.push((format!("model.layers.{i}.{name}.weight"), shape));
        }
    }
    out
}

fn f32_bytes(n: usize) -> Vec<u8> {
    (0..n).flat_map(|i| (i as f32).to_le_bytes()).collect()
}

fn safetensors_bytes(tensors: &[(String, Vec<usize>)], dtype: Dtype) -> Vec<u8> {
    let size = dtype.bitsize() / 8;
    let data: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, shape)| f32_bytes((shape.iter().product::<usize>() * size).div_ceil(4)))
        .collect();
    let views = tensors.iter().zip(&data).map(|((name, shape), data)| {
        (name.clone(), TensorView::new(dtype, shape.clone(), data).unwrap())
    });
    serialize(views, None).unwrap()
}

fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": HIDDEN,
        "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": VOCAB, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "rope_theta": 5e5, "eos_token_id": 2, "torch_dtype": "float32",
    })
}

fn write_folder(folder: &Path, config: &Value) {
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let bytes = safetensors_bytes(&hf_tensors(), Dtype::F32);
    std::fs::write(folder.join("model.safetensors"), bytes).unwrap();
}

fn refusal(path: &Path) -> String {
    format!("{:#}", anyhow::Error::from(load(path).unwrap_err()))
}

#[test]
fn a_folder_loads_with_every_number_and_row_in_place() {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &config());
    std::fs::write(folder.path().join("generation_config.json"), r#"{"eos_token_id":[7,2]}"#)
        .unwrap();
    let model = load(folder.path()).unwrap();
    let expected = ModelSpec {
        architecture: Architecture::Llama,
        layers: 2,
        hidden: 32,
        ffn: 64,
        heads: 2,
        kv_heads: 1,
        head_dim: 16,
        vocab: 40,
        rope_theta: 5e5,
        rope_factors: Vec::new(),
        rms_eps: 1e-5,
        max_len: 512,
        window: None,
        eos_ids: vec![2, 7],
    };
    assert_eq!(model.spec, expected);
    assert_eq!(model.layers.len(), LAYERS);
    assert_eq!(model.final_norm[31], 31.0);
    let q = &model.layers[1].q;
    assert_eq!((q.rows, q.cols, q.dtype), (32, 32, WeightType::F32));
    assert_eq!(dequantize(q, 3)[..2], [96.0, 97.0]);
    assert_eq!(model.head.unwrap().rows, VOCAB);
}

#[test]
fn a_model_made_smaller_is_another_model_whose_embedding_and_head_keep_8_bits() {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &config());
    let mut model = &load(folder.path()).unwrap();
    let mut types = |wanted| {
        let mut narrowed = Narrowed::new(&mut model, wanted);
        let (embedding, head) = (narrowed.embedding().unwrap(), narrowed.head().unwrap().unwrap());
        let layer = narrowed.layer(1).unwrap();
        [embedding.dtype, head.dtype, layer.q.dtype, layer.down.dtype]
    };
    let (wide, eight, four) = (WeightType::F32, WeightType::Q8_0, WeightType::Q4_1);
    assert_eq!(types(CpuWeights::AsIs), [wide; 4]);
    assert_eq!(types(CpuWeights::Q8_0), [eight; 4]);
    assert_eq!(types(CpuWeights::Q4_1), [eight, eight, four, four]);
    let all = [CpuWeights::AsIs, CpuWeights::Q8_0, CpuWeights::Q4_1];
    let [same, other, another] = all.map(|kept| kept.content_hash(model.content_hash));
    assert_eq!(same, model.content_hash);
    assert!(same != other && same != another && other != another);
}

#[test]
fn a_tied_folder_has_no_head_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config();
    config["tie_word_embeddings"] = true.into();
    write_folder(folder.path(), &config);
    assert!(load(folder.path()).unwrap().head.is_none());
}

#[test]
fn shards_load_as_the_whole_and_have_its_hash() {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &config());
    let whole = load(folder.path()).unwrap();
    std::fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    let tensors = hf_tensors();
    let mut map = serde_json::Map::new();
    for (i, part) in tensors.chunks(8).enumerate() {
        let name = format!("model-{i}.safetensors");
        std::fs::write(folder.path().join(&name), safetensors_bytes(part, Dtype::F32)).unwrap();
        map.extend(part.iter().map(|(tensor, _)| (tensor.clone(), name.clone().into())));
    }
    let from_all = load(folder.path()).unwrap();
    let index = folder.path().join("model.safetensors.index.json");
    std::fs::write(&index, json!({ "weight_map": map }).to_string()).unwrap();
    let from_index = load(folder.path()).unwrap();
    for model in [from_all, from_index] {
        assert_eq!(model.content_hash, whole.content_hash);
        assert_eq!(model.layers[1].down.bytes, whole.layers[1].down.bytes);
    }
    map["lm_head.weight"] = "../elsewhere.safetensors".into();
    std::fs::write(&index, json!({ "weight_map": map }).to_string()).unwrap();
    assert!(refusal(folder.path()).contains("not a plain file name"));
}

#[test]
fn a_cut_safetensors_file_is_called_truncated() {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &config());
    let file = folder.path().join("model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    for n in [0, 7, 8, 100, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&file, &bytes[..n]).unwrap();
        let e = refusal(folder.path());
        assert!(e.contains("model.safetensors") && e.contains("truncated"), "{n}: {e}");
    }
}

#[test]
fn a_file_that_is_cut_while_it_is_loaded_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &config());
    let path = folder.path().join("model.safetensors");
    let mut files = open(folder.path()).unwrap();
    std::fs::File::options().write(true).open(&path).unwrap().set_len(5000).unwrap();
    let e = files.embedding().and_then(|_| files.layer(1)).unwrap_err();
    assert!(matches!(&e, ModelError::Io { path, .. } if path.contains("model.safetensors")), "{e}");
}

#[test]
fn a_header_that_claims_a_million_blocks_is_refused_at_the_first_that_is_not_there() {
    let mut gguf = TestGguf::new("llama", hf_tensors());
    gguf.numbers[0].1 = 1 << 20;
    let e = refusal(gguf.file().path());
    assert!(e.contains("tensor `blk.2.attn_norm.weight` is missing"), "{e}");
}

#[test]
fn no_changed_byte_of_a_safetensors_header_makes_it_panic() {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &config());
    let file = folder.path().join("model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    for i in (0..8).chain((8..header).step_by(3)) {
        let mut changed = bytes.clone();
        changed[i] ^= 1 << (i % 8);
        std::fs::write(&file, &changed).unwrap();
        drop(load(folder.path()));
    }
}

#[test]
fn what_a_folder_asks_for_and_is_not_supported_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let cases = [
        (
            "architectures",
            json!(["MixtralForCausalLM"]),
            "supported is one of `LlamaForCausalLM`, `MistralForCausalLM`, `Qwen2ForCausalLM`, `Qwen3",
        ),
        ("architectures", json!([]), "is [], supported is one of"),
        (
            "rope_scaling",
            json!({"rope_type": "yarn", "factor": 8.0}),
            "`rope_scaling.rope_type` is `yarn`, supported are `default`, `linear` and `llama3`",
        ),
        ("rope_scaling", json!({"type": "linear"}), "`rope_scaling.factor` is missing"),
        ("rope_scaling", json!({"type": "linear", "factor": -1}), "is -1, not above 0"),
        ("rope_scaling", json!("linear"), "not an object"),
        ("rope_parameters", json!({"rope_theta": 1e4}), "`rope_parameters.type` is missing"),
        ("layer_types", json!(["full_attention", "linear_attention"]), "has \"linear_attention\""),
        ("sliding_window", json!(0), "is 0"),
        ("attention_bias", json!(true), "supported is false"),
        ("mlp_bias", json!(true), "supported is false"),
        ("hidden_act", json!("gelu"), "supported is `silu`"),
        ("hidden_size", json!(-3), "not a whole number"),
        ("vocab_size", Value::Null, "is missing"),
        ("num_key_value_heads", json!(3), "does not divide the 2 heads"),
        ("eos_token_id", json!([2, "x"]), "not a token id"),
        ("eos_token_id", json!(40), "the vocabulary has 40 ids"),
        ("rms_norm_eps", json!("tiny"), "not a number"),
    ];
    for (key, value, rule) in cases {
        let mut config = config();
        config[key] = value;
        write_folder(folder.path(), &config);
        let e = refusal(folder.path());
        assert!(e.contains("config.json") && e.contains(rule), "{key}: {e}");
    }
    std::fs::write(folder.path().join("config.json"), "{").unwrap();
    assert!(refusal(folder.path()).contains("config.json"));
}

#[test]
fn a_tensor_that_is_missing_misshapen_of_another_type_or_unknown_is_named() {
    let folder = tempfile::tempdir().unwrap();
    write_folder(folder.path(), &config());
    type Change<'a> = &'a dyn Fn(&mut Vec<(String, Vec<usize>)>);
    let check = |dtype, change: Change<'_>, rule: &str| {
        let mut tensors = hf_tensors();
        change(&mut tensors);
        let bytes = safetensors_bytes(&tensors, dtype);
        std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
        let e = refusal(folder.path());
        assert!(e.contains("model.safetensors") && e.contains(rule), "{e}");
    };
    check(Dtype::F32, &|t| drop(t.remove(1)), "tensor `model.norm.weight` is missing");
    check(
        Dtype::F32,
        &|t| t[0].1 = vec![VOCAB, 8],
        "tensor `model.embed_tokens.weight` has shape [40, 8], expected [40, 32]",
    );
    check(Dtype::I16, &|_| {}, "has type I16, supported are F32, F16, BF16, Q8_0");
    check(
        Dtype::F32,
        &|t| t.push(("model.layers.0.self_attn.q_proj.bias".into(), vec![32])),
        "tensor `model.layers.0.self_attn.q_proj.bias` is not part of a plain `llama`",
    );
}

fn put_string(out: &mut Vec<u8>, s: &str) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend(s.as_bytes());
}

/// A GGUF of the same shape; Q4_1 matrices, F32 vectors.
struct TestGguf {
    architecture: &'static str,
    numbers: Vec<(&'static str, usize)>,
    floats: Vec<(&'static str, f32)>,
    strings: Vec<(&'static str, &'static str)>,
    tensors: Vec<(String, Vec<usize>, u32)>,
}

impl TestGguf {
    fn new(architecture: &'static str, tensors: Vec<(String, Vec<usize>)>) -> Self {
        let names = [
            ("model.embed_tokens", "token_embd"),
            ("model.norm", "output_norm"),
            ("lm_head", "output"),
            ("model.layers", "blk"),
            ("input_layernorm", "attn_norm"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("self_attn.q_norm", "attn_q_norm"),
            ("self_attn.k_norm", "attn_k_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        ];
        let tensor = |(name, shape): (String, Vec<usize>)| {
            let name = names.iter().fold(name, |name, (from, to)| name.replace(from, to));
            let kind = if shape.len() == 1 { 0 } else { 3 };
            (name, shape, kind)
        };
        Self {
            architecture,
            numbers: vec![
                ("block_count", LAYERS),
                ("embedding_length", HIDDEN),
                ("feed_forward_length", FFN),
                ("attention.head_count", 2),
                ("attention.head_count_kv", 1),
                ("rope.dimension_count", HEAD_DIM),
                ("context_length", 512),
                ("tokenizer.ggml.eos_token_id", 2),
                ("tokenizer.ggml.eot_token_id", 5),
            ],
            floats: vec![("attention.layer_norm_rms_epsilon", 1e-5)],
            strings: vec![("general.architecture", architecture)],
            tensors: tensors.into_iter().map(tensor).collect(),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        let entries = self.numbers.len() + self.floats.len() + self.strings.len();
        out.extend((entries as u64).to_le_bytes());
        let put_key = |out: &mut Vec<u8>, key: &str, kind: u32| {
            let is_whole = key.starts_with("general.") || key.starts_with("tokenizer.");
            let key =
                if is_whole { key.to_owned() } else { format!("{}.{key}", self.architecture) };
            put_string(out, &key);
            out.extend(kind.to_le_bytes());
        };
        for (key, value) in &self.strings {
            put_key(&mut out, key, 8);
            put_string(&mut out, value);
        }
        for (key, value) in &self.floats {
            put_key(&mut out, key, 6);
            out.extend(value.to_le_bytes());
        }
        for (key, value) in &self.numbers {
            put_key(&mut out, key, 4);
            out.extend((*value as u32).to_le_bytes());
        }
        let mut data = Vec::new();
        for (name, shape, kind) in &self.tensors {
            put_string(&mut out, name);
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|n| out.extend((*n as u64).to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            let n: usize = shape.iter().product();
            match kind {
                0 => data.extend(f32_bytes(n)),
                _ => data.extend((0..n / 32).flat_map(q4_1_block)),
            }
            data.resize(data.len().next_multiple_of(32), 0);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        out
    }

    fn file(&self) -> tempfile::NamedTempFile {
        gguf_file(&self.bytes())
    }
}

/// Of a Llama; `change` may alter the tensor table.
fn gguf_bytes(change: impl Fn(&mut Vec<(String, Vec<usize>, u32)>)) -> Vec<u8> {
    let mut gguf = TestGguf::new("llama", hf_tensors());
    change(&mut gguf.tensors);
    gguf.bytes()
}

/// 32 times its own number.
fn q4_1_block(i: usize) -> Vec<u8> {
    let mut block = vec![0; 20];
    block[2..4].copy_from_slice(&f16::from_f32(i as f32).to_le_bytes());
    block
}

fn gguf_file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::with_suffix(".gguf").unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    file
}

#[test]
fn a_gguf_loads_with_q_and_k_in_halves() {
    let model = load(gguf_file(&gguf_bytes(|_| {})).path()).unwrap();
    assert_eq!((model.spec.layers, model.spec.head_dim, model.spec.vocab), (2, 16, 40));
    assert_eq!((model.spec.rope_theta, model.spec.rms_eps), (10_000.0, 1e-5));
    assert_eq!(model.spec.eos_ids, [2, 5]);
    let first = |w: &Weight| (0..w.rows).map(|r| dequantize(w, r)[0] as u32).collect::<Vec<_>>();
    let halves =
        |head: u32| (0..8).map(move |i| head + 2 * i).chain((0..8).map(move |i| head + 2 * i + 1));
    let layer = &model.layers[0];
    assert_eq!(first(&layer.q), halves(0).chain(halves(16)).collect::<Vec<_>>());
    assert_eq!(first(&layer.k), halves(0).collect::<Vec<_>>());
    assert_eq!(first(&layer.v), (0..16).collect::<Vec<_>>());
    assert!(model.head.is_some());
}

#[test]
fn a_gguf_without_a_head_is_tied() {
    let bytes = gguf_bytes(|t| t.retain(|(name, ..)| name != "output.weight"));
    assert!(load(gguf_file(&bytes).path()).unwrap().head.is_none());
}

#[test]
fn a_gguf_cut_anywhere_is_refused() {
    let bytes = gguf_bytes(|_| {});
    let file = gguf_file(&bytes);
    let data = bytes.len() - 128;
    for n in (0..data).step_by(509).chain(data..bytes.len()) {
        std::fs::write(file.path(), &bytes[..n]).unwrap();
        match load(file.path()) {
            Err(e @ (ModelError::Header { .. } | ModelError::Tensor { .. })) => {
                assert!(e.to_string().contains(".gguf"), "{n}: {e}");
            }
            other => panic!("{n}: {other:?}"),
        }
    }
}

#[test]
fn what_a_gguf_has_and_is_not_supported_is_named() {
    let retype = |kind: u32| gguf_bytes(move |t| t[4].2 = kind);
    let e = refusal(gguf_file(&retype(10)).path());
    let rule = "tensor `blk.0.attn_q.weight` has ggml type 10 (`Q2_K`), supported are F32, F16";
    assert!(e.contains(rule), "{e}");
    let e = refusal(gguf_file(&retype(12)).path());
    let rule = "tensor `blk.0.attn_q.weight` of type Q4_K cannot have shape [32, 32]: rows are whole blocks of 256";
    assert!(e.contains(rule), "{e}");
    let e = refusal(gguf_file(&gguf_bytes(|t| t[3].0 = "blk.0.other.weight".into())).path());
    assert!(e.contains("tensor `blk.0.attn_norm.weight` is missing"), "{e}");
    let extra = |t: &mut Vec<(String, Vec<usize>, u32)>| {
        t.push(("blk.1.attn_q.bias".into(), vec![32], 0));
    };
    let e = refusal(gguf_file(&gguf_bytes(extra)).path());
    assert!(e.contains("tensor `blk.1.attn_q.bias` is not part of a plain `llama`"), "{e}");
    let e = refusal(TestGguf::new("gemma3", hf_tensors()).file().path());
    let rule = "`general.architecture` is `gemma3`, supported are `llama`, `qwen2`, `qwen3`";
    assert!(e.contains(rule), "{e}");
    let e = refusal(gguf_file(b"not a model at all").path());
    assert!(e.contains("not a GGUF file"), "{e}");
}
