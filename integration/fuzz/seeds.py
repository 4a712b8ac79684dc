"""Writes the seeds of the fuzz targets: tiny well-formed files, one for each way through a reader.

Usage: seeds.py CORPUS. The same bytes each time; what fuzzing found and was kept lies beside them.
"""

import json
import math
import pathlib
import struct
import sys

STRING, ARRAY = 8, 9
# GGML types: number, elements and bytes of a block.
TYPES = {"F32": (0, 1, 4), "F16": (1, 1, 2), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20), "Q5_0": (6, 32, 22),
         "Q5_1": (7, 32, 24), "Q8_0": (8, 32, 34), "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176),
         "Q6_K": (14, 256, 210), "BF16": (30, 1, 2)}
HIDDEN, FFN, VOCAB, KV = 32, 32, 8, 16


def text(s):
    return struct.pack("<Q", len(s.encode())) + s.encode()


def value(v):
    """Type number and bytes of a metadata value."""
    if isinstance(v, bool):
        return 7, struct.pack("<?", v)
    if isinstance(v, int):
        return 4, struct.pack("<I", v)
    if isinstance(v, float):
        return 6, struct.pack("<f", v)
    if isinstance(v, str):
        return STRING, text(v)
    kinds = [(5, struct.pack("<i", x)) if isinstance(x, int) and not isinstance(x, bool) else value(x) for x in v]
    kind = kinds[0][0] if kinds else 4
    return ARRAY, struct.pack("<IQ", kind, len(v)) + b"".join(b for _, b in kinds)


def gguf(meta, tensors, version=3):
    """`tensors`: name to (dims fastest first, type)."""
    out, data = bytearray(b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(meta))), bytearray()
    for key, v in meta.items():
        kind, raw = value(v)
        out += text(key) + struct.pack("<I", kind) + raw
    for name, (dims, kind) in tensors.items():
        number, elements, size = TYPES[kind]
        out += text(name) + struct.pack("<I", len(dims)) + b"".join(struct.pack("<Q", d) for d in dims)
        out += struct.pack("<IQ", number, len(data))
        data += bytes(math.prod(dims) // elements * size)
        data += bytes(-len(data) % 32)
    return bytes(out + bytes(-len(out) % 32) + data)


TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "Ġ", "1"]


def tokenizer(pre, **more):
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": TOKENS,
            "tokenizer.ggml.token_type": [3, 3, 3, 1, 1, 1, 1, 1], "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2} | more


def settings(arch, hidden, ffn):
    return {"general.architecture": arch} | {f"{arch}.{key}": v for key, v in {
        "block_count": 1, "context_length": 64, "embedding_length": hidden, "feed_forward_length": ffn,
        "attention.head_count": 2, "attention.head_count_kv": 1, "rope.freq_base": 1e4,
        "attention.layer_norm_rms_epsilon": 1e-5}.items()}


def weights(kind, hidden, ffn, kv, own_head=False, bias=False, qk_norm=False):
    matrices = {"attn_q": (hidden, hidden), "attn_k": (hidden, kv), "attn_v": (hidden, kv),
                "attn_output": (hidden, hidden), "ffn_gate": (hidden, ffn), "ffn_up": (hidden, ffn),
                "ffn_down": (ffn, hidden)}
    out = {"token_embd.weight": ((hidden, VOCAB), kind), "output_norm.weight": ((hidden,), "F32")}
    if own_head:
        out["output.weight"] = ((hidden, VOCAB), kind)
    out |= {f"blk.0.{name}.weight": (dims, kind) for name, dims in matrices.items()}
    out |= {f"blk.0.{name}.weight": ((hidden,), "F32") for name in ("attn_norm", "ffn_norm")}
    if bias:
        out |= {f"blk.0.{name}.bias": ((matrices[name][1],), "F32") for name in ("attn_q", "attn_k", "attn_v")}
    if qk_norm:
        out |= {f"blk.0.{name}.weight": ((hidden // 2,), "F32") for name in ("attn_q_norm", "attn_k_norm")}
    return out


def safetensors(kind, size, left_out=()):
    shapes = {"model.embed_tokens": [VOCAB, HIDDEN], "lm_head": [VOCAB, HIDDEN], "model.norm": [HIDDEN]}
    layer = {"self_attn.q_proj": [HIDDEN, HIDDEN], "self_attn.k_proj": [KV, HIDDEN], "self_attn.v_proj": [KV, HIDDEN],
             "self_attn.o_proj": [HIDDEN, HIDDEN], "mlp.gate_proj": [FFN, HIDDEN], "mlp.up_proj": [FFN, HIDDEN],
             "mlp.down_proj": [HIDDEN, FFN], "input_layernorm": [HIDDEN], "post_attention_layernorm": [HIDDEN]}
    shapes |= {f"model.layers.0.{name}": shape for name, shape in layer.items()}
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        if name not in left_out:
            end = at + math.prod(shape) * size
            header[name + ".weight"] = {"dtype": kind, "shape": shape, "data_offsets": [at, end]}
            at = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + bytes(at)


def main():
    corpus = pathlib.Path(sys.argv[1])

    def put(target, name, data):
        path = corpus / target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2"):
        put("gguf_header", f"tokenizer-{pre}", gguf(tokenizer(pre), {}))
    put("gguf_header", "tokenizer-spm", gguf(tokenizer("default") | {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [float(-i) for i in range(8)],
        "tokenizer.ggml.add_bos_token": True}, {}))
    every = {"bool": True, "float": 0.5, "strings": ["a", ""], "ints": [1, -1], "floats": [1.5], "bools": [True],
             "empty": [], "general.alignment": 32}
    put("gguf_header", "every-type", gguf(every, {"x": ((2, 4), "F32"), "y": ((32,), "Q8_0")}))
    put("gguf_header", "version-2", gguf({"a": 1}, {}, version=2))
    for kind in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        put("gguf_model", f"llama-{kind}",
            gguf(settings("llama", HIDDEN, FFN) | tokenizer("smollm"), weights(kind, HIDDEN, FFN, KV)))
    scaled = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0, "llama.rope.dimension_count": 16}
    put("gguf_model", "llama-scaled", gguf(settings("llama", HIDDEN, FFN) | scaled, weights("Q8_0", HIDDEN, FFN, KV)))
    for arch, more in (("qwen2", {"bias": True}), ("qwen3", {"qk_norm": True})):
        put("gguf_model", arch, gguf(settings(arch, HIDDEN, FFN) | tokenizer("qwen2"),
                                     weights("Q8_0", HIDDEN, FFN, KV, own_head=True, **more)))
    for kind in ("Q4_K", "Q5_K", "Q6_K"):
        # Rows of these are multiples of 256: one matrix of the type among small ones, refused or not.
        put("gguf_model", f"one-{kind}", gguf(settings("llama", HIDDEN, 256), weights("Q8_0", HIDDEN, 256, KV)
                                              | {"blk.0.ffn_down.weight": ((256, HIDDEN), kind)}))
    for kind, size in (("F32", 4), ("F16", 2), ("BF16", 2)):
        put("safetensors", f"tiny-{kind}", safetensors(kind, size))
    put("safetensors", "tiny-tied", safetensors("BF16", 2, ["lm_head"]))
    put("safetensors", "other-type", safetensors("I8", 1))
    for number, body in enumerate((
            {"model": "m", "prompt": "a", "max_tokens": 4, "stream": True, "stream_options": {"include_usage": True}},
            {"model": "m", "prompt": [1, 2, 3], "stop": ["x"], "disaggregated_params": {"request_type": "context_only"}},
            {"model": "m", "messages": [{"role": "user", "content": "Hé \\"}], "n": 1, "stream": False})):
        put("request", f"request-{number}", json.dumps(body, indent=number).encode())
    params = {"request_type": "context_only", "ctx_request_id": 1 << 41, "first_gen_tokens": [7],
              "opaque_state": "AAAA", "disagg_request_id": 1 << 41}
    for number, (reason, more, choice) in enumerate((
            ("not_finished", {"prompt_token_ids": [1, 2]}, {"text": "a"}),
            ("not_finished", {"prompt_token_ids_b64": "AQAAAA=="}, {"message": {"role": "assistant", "content": "a"}}),
            ("stop", {"prompt_token_ids": [1, 2]}, {"text": "a", "logprobs": None, "stop_reason": "x"}),
            ("length", {}, {"message": {"role": "assistant", "content": "\n"}}))):
        put("answer", f"answer-{number}", json.dumps({
            "id": "cmpl-1", "object": "text_completion", "created": 1, "model": "m", **more,
            "choices": [{"index": 0, **choice, "finish_reason": reason, "disaggregated_params": params}],
            "usage": {"prompt_tokens": 2, "total_tokens": 3, "completion_tokens": 1}}).encode())
    root = corpus.resolve().parents[2]
    for file in (root / "config/router.toml", *sorted((root / "config/examples").glob("disagg_config*.yaml"))):
        put("config", file.name, file.read_bytes())


if __name__ == "__main__":
    main()
