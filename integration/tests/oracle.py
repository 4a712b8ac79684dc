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
# GGML types: number, and elements and bytes of a block.
TYPE_F32, TYPE_Q4_1, TYPE_Q5_0, TYPE_Q8_0, TYPE_Q4_K, TYPE_Q6_K = 0, 3, 6, 8, 12, 14
BLOCKS = {TYPE_Q4_1: (32, 20), TYPE_Q5_0: (32, 22), TYPE_Q8_0: (32, 34), TYPE_Q4_K: (256, 144), TYPE_Q6_K: (256, 210)}


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
        elements, size = BLOCKS[kind]
        blocks = self.data[start : start + count // elements * size].reshape(-1, size)
        return DEQUANTISE[kind](blocks).astype(F32).reshape(shape)


def half(pairs):
    """Two bytes a number."""
    return np.ascontiguousarray(pairs).view(np.float16).astype(F32)


def nibbles(packed):
    """The low ones, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def q8_0(blocks):
    return blocks[:, 2:].view(np.int8).astype(F32) * half(blocks[:, :2])


def q4_1(blocks):
    return nibbles(blocks[:, 4:]).astype(F32) * half(blocks[:, :2]) + half(blocks[:, 2:4])


def q5_0(blocks):
    """Scale, the fifth bits of all 32, nibbles."""
    fifth = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little")
    return ((nibbles(blocks[:, 6:]) | fifth << 4).astype(F32) - 16) * half(blocks[:, :2])


def q4_k(blocks):
    """Scale and minimum of 8 parts of 32: 6 bits each, packed into 12 bytes; then nibbles, 64 elements a 32 bytes."""
    packed, quants = blocks[:, 4:16], blocks[:, 16:].reshape(-1, 4, 32)
    low, mid, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6) << 4], axis=1).astype(F32) * half(blocks[:, :2])
    least = np.concatenate([mid & 63, high >> 4 | (mid >> 6) << 4], axis=1).astype(F32) * half(blocks[:, 2:4])
    values = np.stack([quants & 15, quants >> 4], axis=2).reshape(-1, 8, 32).astype(F32)
    return values * scales[..., None] - least[..., None]


def q6_k(blocks):
    """Low four bits, high two bits, 16 signed scales of 16 elements each, scale of all."""
    low, high = blocks[:, :128].reshape(-1, 2, 2, 32), blocks[:, 128:192].reshape(-1, 2, 1, 32)
    low = np.concatenate([low & 15, low >> 4], axis=2)
    high = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=2)
    values = (low | high << 4).astype(F32).reshape(-1, 16, 16) - 32
    scales = blocks[:, 192:208].view(np.int8).astype(F32) * half(blocks[:, 208:210])
    return values * scales[..., None]


DEQUANTISE = {TYPE_Q4_1: q4_1, TYPE_Q5_0: q5_0, TYPE_Q8_0: q8_0, TYPE_Q4_K: q4_k, TYPE_Q6_K: q6_k}


class Model:
    """A Llama with neighbouring RoPE pairs, or a Qwen2 with halves and biases, as GGUF stores them."""

    def __init__(self, file):
        architecture = file.meta["general.architecture"]
        number = lambda key: file.meta[f"{architecture}.{key}"]
        self.tensors = file.tensors
        self.heads, self.kv_heads = number("attention.head_count"), number("attention.head_count_kv")
        self.hidden, self.blocks = number("embedding_length"), number("block_count")
        self.head_dim = self.hidden // self.heads
        middle = self.head_dim // 2
        # Which elements of a head turn together.
        self.turned = (np.s_[..., 0::2], np.s_[..., 1::2])
        if architecture != "llama":
            self.turned = (np.s_[..., :middle], np.s_[..., middle:])
        self.theta, self.eps = number("rope.freq_base"), F32(number("attention.layer_norm_rms_epsilon"))

    def norm(self, x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * weight

    def rotate(self, x):
        angles = np.outer(np.arange(len(x)), self.theta ** (-np.arange(0, self.head_dim, 2) / self.head_dim))
        cos, sin = np.cos(angles).astype(F32)[:, None], np.sin(angles).astype(F32)[:, None]
        out = np.empty_like(x)
        one, two = self.turned
        out[one] = x[one] * cos - x[two] * sin
        out[two] = x[one] * sin + x[two] * cos
        return out

    def project(self, x, name):
        out = x @ self.tensors[name + ".weight"].T
        bias = self.tensors.get(name + ".bias")
        out = out if bias is None else out + bias
        return out.reshape(len(x), -1, self.head_dim)

    def attend(self, x, block, cached):
        q, k, v = (self.project(x, f"blk.{block}.attn_{name}") for name in "qkv")
        q, k, v = self.rotate(q), cached(self.rotate(k)), cached(v)
        k, v = (np.repeat(kept, self.heads // self.kv_heads, 1).transpose(1, 0, 2) for kept in (k, v))
        scores = q.transpose(1, 0, 2) @ k.transpose(0, 2, 1) / F32(np.sqrt(self.head_dim))
        scores = np.where(np.tril(np.ones((len(x), len(x)), bool)), scores, F32(-1e30))
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
        return (weights @ v).transpose(1, 0, 2).reshape(len(x), -1)

    def states(self, ids, cached):
        """The residual stream after the last block; `cached` is done to K (after RoPE) and V."""
        x = self.tensors["token_embd.weight"][ids]
        for block in range(self.blocks):
            weight = lambda name: self.tensors[f"blk.{block}.{name}.weight"]
            x = x + self.attend(self.norm(x, weight("attn_norm")), block, cached) @ weight("attn_output").T
            normed = self.norm(x, weight("ffn_norm"))
            gate = normed @ weight("ffn_gate").T
            gated = gate / (1 + np.exp(-gate)) * (normed @ weight("ffn_up").T)
            x = x + gated @ weight("ffn_down").T
        return x

    def logprobs_after(self, states):
        """Natural-log probabilities of what follows each of the rows."""
        head = self.tensors.get("output.weight")
        head = self.tensors["token_embd.weight"] if head is None else head
        logits = (self.norm(states, self.tensors["output_norm.weight"]) @ head.T).astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def logprobs(self, ids, cached):
        """What follows `ids`."""
        return self.logprobs_after(self.states(ids, cached)[-1:])[0]


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
