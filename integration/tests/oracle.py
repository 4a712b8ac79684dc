"""The demo model's next-token log-probabilities by a plain NumPy pass, against the recorded figures.

Usage: oracle.py MODEL.gguf FIGURES.json; prints the largest distance from `f32` and from `f32_bf16_kv`.

With K and V rounded to bf16 a value beside a rounding boundary falls to either side with the last bit of a sum, and the
layers above make that as large as the rounding itself: two correct passes differ by up to 0.03. So this one adds in the
order of the pass that was recorded (OpenBLAS' kernels for SkylakeX, NumPy's own sums and exponentials), for which
OPENBLAS_CORETYPE=SkylakeX must be set. It shares no code with the engine or with the oracle in Rust.
"""

import json
import struct
import sys

import numpy as np

F32 = np.float32
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# GGML types of this file: number of elements and bytes of a block.
TYPE_F32, TYPE_Q4_1, TYPE_Q8_0 = 0, 3, 8


class Gguf:
    """Metadata and dequantised f32 tensors of a GGUF file."""

    def __init__(self, path):
        self.data = np.fromfile(path, np.uint8)
        self.at = 4
        version, tensors, pairs = self.take("I"), self.take("Q"), self.take("Q")
        assert bytes(self.data[:4]) == b"GGUF" and version == 3
        self.meta = {self.string(): self.value(self.take("I")) for _ in range(pairs)}
        infos = [self.info() for _ in range(tensors)]
        align = self.meta.get("general.alignment", 32)
        base = (self.at + align - 1) // align * align
        self.tensors = {name: self.dequantise(base + offset, shape, kind) for name, shape, kind, offset in infos}

    def take(self, code):
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def string(self):
        length = self.take("Q")
        self.at += length
        return bytes(self.data[self.at - length : self.at]).decode()

    def value(self, kind):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            inner, length = self.take("I"), self.take("Q")
            return [self.value(inner) for _ in range(length)]
        return self.take(SCALARS[kind])

    def info(self):
        name = self.string()
        shape = [self.take("Q") for _ in range(self.take("I"))]
        return name, shape[::-1], self.take("I"), self.take("Q")

    def dequantise(self, start, shape, kind):
        count = int(np.prod(shape))
        if kind == TYPE_F32:
            return self.data[start : start + 4 * count].view(F32).reshape(shape)
        size = {TYPE_Q4_1: 20, TYPE_Q8_0: 34}[kind]
        blocks = self.data[start : start + count // 32 * size].reshape(-1, size)
        scale = blocks[:, :2].copy().view(np.float16).astype(F32)
        if kind == TYPE_Q8_0:
            return (blocks[:, 2:].view(np.int8).astype(F32) * scale).reshape(shape)
        least = blocks[:, 2:4].copy().view(np.float16).astype(F32)
        packed = blocks[:, 4:]
        return (np.concatenate([packed & 15, packed >> 4], axis=1).astype(F32) * scale + least).reshape(shape)


class Model:
    """A Llama with neighbouring RoPE pairs, as GGUF stores it."""

    def __init__(self, file):
        number = lambda key: file.meta["llama." + key]
        self.tensors = file.tensors
        self.heads, self.kv_heads = number("attention.head_count"), number("attention.head_count_kv")
        self.hidden, self.blocks = number("embedding_length"), number("block_count")
        self.head_dim = self.hidden // self.heads
        self.theta, self.eps = number("rope.freq_base"), F32(number("attention.layer_norm_rms_epsilon"))

    def norm(self, x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * weight

    def rotate(self, x):
        angles = np.outer(np.arange(len(x)), self.theta ** (-np.arange(0, self.head_dim, 2) / self.head_dim))
        cos, sin = np.cos(angles).astype(F32)[:, None], np.sin(angles).astype(F32)[:, None]
        out = np.empty_like(x)
        out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
        out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
        return out

    def attend(self, x, weight, cached):
        q, k, v = ((x @ weight("attn_" + name).T).reshape(len(x), -1, self.head_dim) for name in "qkv")
        q, k, v = self.rotate(q), cached(self.rotate(k)), cached(v)
        k, v = (np.repeat(kept, self.heads // self.kv_heads, 1).transpose(1, 0, 2) for kept in (k, v))
        scores = q.transpose(1, 0, 2) @ k.transpose(0, 2, 1) / F32(np.sqrt(self.head_dim))
        scores = np.where(np.tril(np.ones((len(x), len(x)), bool)), scores, F32(-1e30))
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
        return (weights @ v).transpose(1, 0, 2).reshape(len(x), -1)

    def logprobs(self, ids, cached):
        """What follows `ids`; `cached` is done to K (after RoPE) and V."""
        x = self.tensors["token_embd.weight"][ids]
        for block in range(self.blocks):
            weight = lambda name: self.tensors[f"blk.{block}.{name}.weight"]
            x = x + self.attend(self.norm(x, weight("attn_norm")), weight, cached) @ weight("attn_output").T
            normed = self.norm(x, weight("ffn_norm"))
            gate = normed @ weight("ffn_gate").T
            gated = gate / (1 + np.exp(-gate)) * (normed @ weight("ffn_up").T)
            x = x + gated @ weight("ffn_down").T
        last = self.norm(x[-1:], self.tensors["output_norm.weight"])
        logits = (last @ self.tensors["token_embd.weight"].T)[0].astype(np.float64)
        return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def bf16(x):
    """To the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) & np.uint32(0xFFFF0000)).view(F32)


def main():
    model = Model(Gguf(sys.argv[1]))
    cases = json.load(open(sys.argv[2]))["cases"]
    assert len(cases) == 20
    for figures, cached in [("f32", lambda x: x), ("f32_bf16_kv", bf16)]:
        largest = 0.0
        for case in cases:
            logprobs = model.logprobs(case["ids"], cached)
            largest = max([largest] + [abs(logprobs[id] - value) for id, value in case[figures]["top"]])
        print(f"{figures} {largest:.6f}")


if __name__ == "__main__":
    main()
