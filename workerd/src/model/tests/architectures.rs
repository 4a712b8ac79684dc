//! Each architecture in both formats, and each RoPE scaling and window.

use super::*;

/// The tensors of a folder of `class`.
fn tensors(class: &str) -> Vec<(String, Vec<usize>)> {
    let mut out = hf_tensors();
    for i in 0..LAYERS {
        let mut put = |name: &str, len| {
            out.push((format!("model.layers.{i}.self_attn.{name}"), vec![len]));
        };
        match class {
            "Qwen2ForCausalLM" => {
                put("q_proj.bias", 2 * HEAD_DIM);
                put("k_proj.bias", HEAD_DIM);
                put("v_proj.bias", HEAD_DIM);
            }
            "Qwen3ForCausalLM" => {
                put("q_norm.weight", HEAD_DIM);
                put("k_norm.weight", HEAD_DIM);
            }
            _ => {}
        }
    }
    out
}

fn load_folder(class: &str, more: Value) -> Result<Model, ModelError> {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config();
    config["architectures"] = json!([class]);
    config["head_dim"] = HEAD_DIM.into();
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let bytes = safetensors_bytes(&tensors(class), Dtype::F32);
    std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    load(folder.path())
}

fn spec(class: &str, more: Value) -> ModelSpec {
    load_folder(class, more).unwrap().spec
}

#[test]
fn each_architecture_has_its_biases_and_norms_in_both_formats() {
    for (class, name, pairs) in [
        ("LlamaForCausalLM", "llama", true),
        ("MistralForCausalLM", "llama", true),
        ("Qwen2ForCausalLM", "qwen2", false),
        ("Qwen3ForCausalLM", "qwen3", false),
    ] {
        let folder = load_folder(class, json!({})).unwrap();
        let file = load(TestGguf::new(name, tensors(class)).file().path()).unwrap();
        for model in [folder, file] {
            assert_eq!(model.spec.architecture.name(), name);
            let layer = &model.layers[1];
            let bias = layer.qkv_bias.as_ref().map(Vec::len);
            let norms = layer.qk_norm.as_ref().map(|norms| norms.each_ref().map(Vec::len));
            match name {
                "qwen2" => assert_eq!((bias, norms), (Some(4 * HEAD_DIM), None)),
                "qwen3" => assert_eq!((bias, norms), (None, Some([HEAD_DIM; 2]))),
                _ => assert_eq!((bias, norms), (None, None)),
            }
            if let Some(bias) = &layer.qkv_bias {
                // Queries, then keys, then values; each file tensor counts from 0.
                assert_eq!((bias[31], bias[32], bias[47], bias[48]), (31.0, 0.0, 15.0, 0.0));
            }
        }
        let q = &load(TestGguf::new(name, tensors(class)).file().path()).unwrap().layers[0].q;
        assert_eq!(dequantize(q, 1)[0], if pairs { 2.0 } else { 1.0 }, "{name}");
    }
}

#[test]
fn a_qwen_without_its_biases_or_norms_is_refused() {
    for (class, name, missing) in
        [("Qwen2ForCausalLM", "qwen2", "bias"), ("Qwen3ForCausalLM", "qwen3", "_norm.weight")]
    {
        let gguf = TestGguf::new(name, hf_tensors());
        let e = refusal(gguf.file().path());
        assert!(e.contains("tensor `blk.0.attn_q") && e.contains(missing), "{e}");
        assert!(e.contains("is missing"), "{class}: {e}");
    }
    let e = load_folder("LlamaForCausalLM", json!({"attention_bias": true})).unwrap_err();
    assert!(e.to_string().contains("`attention_bias` is true"), "{e}");
    let e = load_folder("Qwen3ForCausalLM", json!({"head_dim": null})).unwrap_err();
    assert!(e.to_string().contains("`head_dim` is missing"), "{e}");
    let e = load_folder("Qwen2ForCausalLM", json!({"num_key_value_heads": null})).unwrap_err();
    assert!(e.to_string().contains("`num_key_value_heads` is missing"), "{e}");
}

#[test]
fn rope_scalings_become_factors_in_both_formats() {
    let class = "LlamaForCausalLM";
    assert!(spec(class, json!({"rope_scaling": {"rope_type": "default"}})).rope_factors.is_empty());
    let linear = spec(class, json!({"rope_scaling": {"type": "linear", "factor": 4.0}}));
    assert_eq!(linear.rope_factors, [4.0; 8]);
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
    let older = spec(class, json!({"rope_scaling": llama3}));
    let mut newer = llama3.clone();
    newer["rope_theta"] = json!(5e5);
    let newer = spec(class, json!({"rope_parameters": newer, "rope_theta": null}));
    assert_eq!(older, newer);
    assert_eq!((older.rope_factors[0], older.rope_factors[7]), (1.0, 8.0));
    for (floats, strings) in [
        (vec![("rope.scaling.factor", 4.0)], vec![("rope.scaling.type", "linear")]),
        (vec![("rope.scale_linear", 4.0)], vec![]),
    ] {
        let mut gguf = TestGguf::new("llama", hf_tensors());
        gguf.floats.extend(floats);
        gguf.strings.extend(strings);
        assert_eq!(load(gguf.file().path()).unwrap().spec.rope_factors, [4.0; 8]);
        // The test's numbers count from 0, and nothing can be divided by that.
        gguf.tensors.push(("rope_freqs.weight".into(), vec![8], 0));
        let e = refusal(gguf.file().path());
        assert!(e.contains("tensor `rope_freqs.weight` have 0, which is not above 0"), "{e}");
    }
    for (key, value) in [("rope.scaling.type", "yarn"), ("rope.scaling.type", "longrope")] {
        let mut gguf = TestGguf::new("qwen2", tensors("Qwen2ForCausalLM"));
        gguf.strings.push((key, value));
        let e = refusal(gguf.file().path());
        assert!(e.contains("`qwen2.rope.scaling.type` is `"), "{e}");
        assert!(e.contains("supported are `none` and `linear`"), "{e}");
    }
}

#[test]
fn a_window_bounds_the_length_where_the_class_uses_it() {
    let window = |class, more| spec(class, more).window;
    assert_eq!(window("MistralForCausalLM", json!({})), Some(4096));
    assert_eq!(window("MistralForCausalLM", json!({"sliding_window": null})), None);
    assert_eq!(window("MistralForCausalLM", json!({"sliding_window": 128})), Some(128));
    assert_eq!(window("Qwen2ForCausalLM", json!({"sliding_window": 128})), None);
    let used = json!({"sliding_window": 128, "use_sliding_window": true});
    assert_eq!(window("Qwen2ForCausalLM", used), Some(128));
    assert_eq!(spec("LlamaForCausalLM", json!({"sliding_window": 128})).longest(), 128);
    let mut gguf = TestGguf::new("llama", hf_tensors());
    gguf.numbers.push(("attention.sliding_window", 100));
    assert_eq!(load(gguf.file().path()).unwrap().spec.longest(), 100);
}

#[test]
fn experts_and_other_attention_are_refused_by_key() {
    for (key, value) in [("expert_count", 8), ("attention.max_alibi_bias", 8)] {
        let mut gguf = TestGguf::new("llama", hf_tensors());
        gguf.numbers.push((key, value));
        let e = refusal(gguf.file().path());
        assert!(e.contains(&format!("`llama.{key}` asks for something")), "{e}");
    }
    let mut gguf = TestGguf::new("llama", hf_tensors());
    gguf.numbers.push(("expert_count", 0));
    load(gguf.file().path()).unwrap();
}
