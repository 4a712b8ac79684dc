//! FP8 folders: which are read with which scales, and how each that is not is named.

use std::collections::BTreeMap;

use super::*;

type Tensor = (String, Dtype, Vec<usize>, Vec<u8>);

/// Of Model Optimizer: what `hf_tensors` has, the matrices of blocks in FP8 with the scales `scale` makes of their rows.
fn tensors(scale: impl Fn(usize) -> (Dtype, Vec<usize>, Vec<u8>)) -> Vec<Tensor> {
    let mut out = Vec::new();
    for (name, shape) in hf_tensors() {
        let count: usize = shape.iter().product();
        if !name.contains("proj") {
            let bytes = [0x80, 0x3f].repeat(count);
            out.push((name, Dtype::BF16, shape, bytes));
            continue;
        }
        let (dtype, of, bytes) = scale(shape[0]);
        out.push((format!("{name}_scale"), dtype, of, bytes));
        out.push((name, Dtype::F8_E4M3, shape, (0..count).map(|i| (i % 0x7f) as u8).collect()));
    }
    out
}

fn one_scale(_: usize) -> (Dtype, Vec<usize>, Vec<u8>) {
    (Dtype::F32, Vec::new(), 0.5_f32.to_le_bytes().to_vec())
}

fn write(folder: &Path, config: &Value, tensors: &[Tensor]) {
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    std::fs::write(folder.join("model.safetensors"), serialize(views, None).unwrap()).unwrap();
}

fn write_hf_quant_config(folder: &Path, quantization: &Value) {
    let file = json!({"producer": {"name": "modelopt", "version": "0.33.0"}, "quantization": quantization});
    std::fs::write(folder.join("hf_quant_config.json"), file.to_string()).unwrap();
}

#[test]
fn a_model_optimizer_folder_loads_with_one_scale_a_matrix_and_the_rest_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let mut all = tensors(one_scale);
    for (name, _) in hf_tensors().into_iter().filter(|(name, _)| name.contains("proj")) {
        let beside = name.trim_end_matches("weight");
        let mut put = |name: String| all.push((name, Dtype::F32, Vec::new(), vec![0; 4]));
        put(format!("{beside}input_scale"));
        for (part, scale) in [("k_proj", "k_scale"), ("v_proj", "v_scale")] {
            if beside.contains(part) {
                put(format!("{beside}{scale}"));
            }
        }
    }
    write(folder.path(), &config(), &all);
    write_hf_quant_config(
        folder.path(),
        &json!({"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}),
    );
    let model = load(folder.path()).unwrap();
    let gate = &model.layers[1].gate;
    assert_eq!((gate.dtype, &gate.scales), (WeightType::F8E4M3, &Scales::Tensor(0.5)));
    assert_eq!(dequantize(gate, 1)[24], 0.5, "byte 0x38 is 1");
    let rest = [&model.embedding, model.head.as_ref().unwrap()];
    assert!(rest.into_iter().all(|w| (w.dtype, &w.scales) == (WeightType::Bf16, &Scales::One)));
    let hash = model.content_hash;
    all.iter_mut().find(|tensor| tensor.0.ends_with("q_proj.weight_scale")).unwrap().3[2] ^= 1;
    write(folder.path(), &config(), &all);
    assert_ne!(load(folder.path()).unwrap().content_hash, hash, "another scale, another model");
}

#[test]
fn each_row_may_have_its_scale_in_any_float_type() {
    let folder = tempfile::tempdir().unwrap();
    let quantization = json!({
        "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "type": "float", "num_bits": 8, "strategy": "channel", "symmetric": true, "dynamic": false
        }}},
        "kv_cache_scheme": null, "quantization_status": "compressed",
    });
    let mut config = config();
    config["quantization_config"] = quantization;
    type Put = fn(f32) -> Vec<u8>;
    let bf16: Put = |x| half::bf16::from_f32(x).to_le_bytes().to_vec();
    let f32: Put = |x| x.to_le_bytes().to_vec();
    for (dtype, put) in [(Dtype::BF16, bf16), (Dtype::F32, f32)] {
        let scales = |rows: usize| (0..rows).flat_map(|row| put(1.0 + row as f32)).collect();
        write(folder.path(), &config, &tensors(|rows| (dtype, vec![rows, 1], scales(rows))));
        let down = &load(folder.path()).unwrap().layers[0].down;
        let expected: Vec<f32> = (0..HIDDEN).map(|row| 1.0 + row as f32).collect();
        assert_eq!(down.scales, Scales::Rows(Arc::new(expected)));
        let byte = down.bytes[3 * down.cols + 5];
        assert_eq!(dequantize(down, 3)[5], 4.0 * dequantize::E4M3[usize::from(byte)]);
    }
}

#[test]
fn each_block_may_have_its_scale_under_either_name() {
    let folder = tempfile::tempdir().unwrap();
    let fp8 = json!({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [24, 40]});
    let group = |shape: Value| {
        json!({"quant_method": "compressed-tensors", "format": "float-quantized",
            "config_groups": {"group_0": {"weights": {"type": "float", "num_bits": 8,
                "strategy": "block", "block_structure": shape, "dynamic": false}}}})
    };
    for (quantization, end) in [(fp8, "_inv"), (group(json!([24, 40])), "")] {
        let mut config = config();
        config["quantization_config"] = quantization;
        let mut all = tensors(one_scale);
        let shapes: BTreeMap<String, Vec<usize>> = hf_tensors().into_iter().collect();
        for (name, _, shape, bytes) in &mut all {
            let Some(matrix) = name.strip_suffix("_scale").map(|name| &shapes[name]) else {
                continue;
            };
            *shape = vec![matrix[0].div_ceil(24), matrix[1].div_ceil(40)];
            *bytes =
                (0..shape[0] * shape[1]).flat_map(|at| (1.0 + at as f32).to_le_bytes()).collect();
            name.push_str(end);
        }
        write(folder.path(), &config, &all);
        let down = &load(folder.path()).unwrap().layers[0].down;
        let across = down.cols.div_ceil(40);
        let Scales::Blocks(blocks) = &down.scales else { panic!("{:?}", down.scales) };
        assert_eq!(
            (blocks.shape, blocks.scales.len()),
            ([24, 40], down.rows.div_ceil(24) * across)
        );
        let (row, col) = (down.rows - 1, down.cols - 1);
        let byte = down.bytes[row * down.cols + col];
        let scale = 1.0 + (row / 24 * across + col / 40) as f32;
        assert_eq!(dequantize(down, row)[col], scale * dequantize::E4M3[usize::from(byte)]);
        // Where nobody says how large blocks are, such scales mean nothing.
        write(folder.path(), &super::config(), &all);
        let e = refusal(folder.path());
        assert!(e.contains("has shape [2, ") && e.contains("expected [], [1]"), "{e}");
    }
    let mut two = group(json!([24, 40]));
    two["config_groups"]["group_1"] = group(json!([8, 8]))["config_groups"]["group_0"].clone();
    let mut config = config();
    config["quantization_config"] = two;
    write(folder.path(), &config, &tensors(one_scale));
    let e = refusal(folder.path());
    assert!(e.contains("group_1.weights.block_structure` is [8,8], must be the same"), "{e}");
}

#[test]
fn a_scale_that_is_missing_misshapen_or_no_scale_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let name = "model.layers.1.self_attn.o_proj.weight";
    let refusal_with = |change: &dyn Fn(&mut Vec<Tensor>)| {
        let mut all = tensors(one_scale);
        change(&mut all);
        write(folder.path(), &config(), &all);
        let mut error = refusal(folder.path());
        assert!(error.contains("model.safetensors`: tensor `"), "{error}");
        error.drain(..error.find("tensor").unwrap());
        error
    };
    let at = |all: &[Tensor], name: &str| all.iter().position(|t| t.0 == name).unwrap();
    let scale = format!("{name}_scale");
    let e = refusal_with(&|all| drop(all.remove(at(all, &scale))));
    let rule = format!("`{name}` has type F8_E4M3, and its scale `{scale}` is missing");
    assert!(e.contains(&rule), "{e}");
    let e = refusal_with(&|all| {
        let at = at(all, &scale);
        all[at] = (format!("{name}_scale_inv"), Dtype::F32, vec![1, 1], vec![0; 4]);
    });
    assert!(e.contains(&format!("`{scale}_inv` has 0 at element 0, a scale is above 0")), "{e}");
    let e = refusal_with(&|all| {
        let at = at(all, &scale);
        all[at] = (format!("{name}_scale_inv"), Dtype::F32, vec![2, 2], vec![0; 16]);
    });
    assert!(e.contains(&format!("`{scale}_inv` has shape [2, 2], expected [], [1]")), "{e}");
    for (number, rule) in [
        (f32::NAN, "has NaN at element 0"),
        (f32::INFINITY, "has inf at element 0"),
        (0.0, "has 0 at element 0, a scale is above 0"),
        (-1.0, "has -1 at element 0, a scale is above 0"),
    ] {
        let e = refusal_with(&|all| {
            let at = at(all, &scale);
            all[at].3 = number.to_le_bytes().to_vec();
        });
        assert!(e.contains(&format!("`{scale}` {rule}")), "{e}");
    }
    let e = refusal_with(&|all| {
        let at = at(all, &scale);
        all[at] = (scale.clone(), Dtype::F32, vec![2], vec![0; 8]);
    });
    assert!(e.contains(&format!("`{scale}` has shape [2], expected [], [1], [32]")), "{e}");
    let e = refusal_with(&|all| {
        let at = at(all, "model.norm.weight");
        all[at].1 = Dtype::F8_E4M3;
        all[at].3.truncate(HIDDEN);
    });
    assert!(e.contains("`model.norm.weight` has type F8_E4M3, which only matrices"), "{e}");
    let e = refusal_with(&|all| {
        all.push(("lm_head.weight_scale".into(), Dtype::F32, Vec::new(), vec![0; 4]));
    });
    assert!(e.contains("`lm_head.weight_scale` is not part of a plain `llama`"), "{e}");
}

#[test]
fn a_quantisation_that_is_not_fp8_is_refused_by_file_member_and_value() {
    let folder = tempfile::tempdir().unwrap();
    let group = |weights: Value| json!({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}});
    let cases = [
        (json!({"bits": 4}), "quant_method` is missing, supported are `modelopt`"),
        (json!({"quant_method": "awq"}), "quant_method` is `awq`"),
        (json!({"quant_method": "modelopt", "quant_algo": "NVFP4"}), "quant_algo` is \"NVFP4\""),
        (
            json!({"quant_method": "fp8", "weight_block_size": [128, 0]}),
            "weight_block_size` is [128,0], must be two numbers",
        ),
        (
            json!({"quant_method": "fp8", "weight_block_size": 128}),
            "weight_block_size` is 128, must be two numbers",
        ),
        (json!({"quant_method": "fp8", "fmt": "e5m2"}), "fmt` is \"e5m2\""),
        (
            json!({"quant_method": "compressed-tensors", "format": "pack-quantized"}),
            "format` is \"pack-quantized\"",
        ),
        (
            json!({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}),
            "sparsity_config.format` is \"sparse-24-bitmask\"",
        ),
        (
            json!({"quant_method": "compressed-tensors", "transform_config": {"config_groups": {}}}),
            "transform_config` is {",
        ),
        (group(json!({"num_bits": 8})), "config_groups.group_0.weights.type` is missing"),
        (
            group(json!({"type": "int", "num_bits": 8})),
            "config_groups.group_0.weights.type` is \"int\"",
        ),
        (
            group(json!({"type": "float", "num_bits": 4})),
            "config_groups.group_0.weights.num_bits` is 4",
        ),
        (
            group(json!({"type": "float", "num_bits": 8, "strategy": "group"})),
            "config_groups.group_0.weights.strategy` is \"group\"",
        ),
        (
            group(json!({"type": "float", "num_bits": 8, "strategy": "block"})),
            "config_groups.group_0.weights.block_structure` is null, must be the same",
        ),
    ];
    for (value, rule) in cases {
        let mut config = config();
        config["quantization_config"] = value;
        write(folder.path(), &config, &tensors(one_scale));
        let e = refusal(folder.path());
        let begin = format!("config.json`: `quantization_config.{rule}");
        assert!(e.contains(&begin), "{e}");
        assert!(e.contains("FP8 (e4m3)") || e.contains("must be"), "{e}");
    }
    write(folder.path(), &config(), &tensors(one_scale));
    for (quantization, rule) in [
        (json!({"quant_algo": "W4A8_AWQ"}), "`quantization.quant_algo` is \"W4A8_AWQ\", supported"),
        (Value::Null, "`quantization` is missing"),
    ] {
        write_hf_quant_config(folder.path(), &quantization);
        let e = refusal(folder.path());
        assert!(e.contains(&format!("hf_quant_config.json`: {rule}")), "{e}");
    }
}
