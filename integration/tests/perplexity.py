"""Records how probable a text is to a plain f32 NumPy pass of a GGUF model: what the engine's perplexity is held against.

Usage: perplexity.py LLAMA_TOKENIZE MODEL.gguf TEXT > FIGURES.json

The text is cut into windows of 512 tokens, each read on its own; a window's figure is the sum of the natural-log
probabilities of its tokens but the first. llama.cpp's tokenizer gives the ids.
"""

import hashlib
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import oracle

WINDOW = 512


def main():
    tokenize, path, text = sys.argv[1:4]
    command = [tokenize, "-m", path, "-f", text, "--ids", "--no-bos", "--log-disable"]
    ids = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    model = oracle.Model(oracle.Gguf(path))
    windows = [ids[at : at + WINDOW] for at in range(0, len(ids), WINDOW)]
    sums = []
    for window in windows:
        logprobs = model.logprobs_after(model.states(window, lambda x: x)[:-1])
        sums.append(float(logprobs[np.arange(len(window) - 1), window[1:]].sum()))
    perplexity = math.exp(-sum(sums) / (len(ids) - len(windows)))
    print("{")
    print(f'"model": {json.dumps(pathlib.Path(path).name)},')
    print(f'"sha256": "{hashlib.sha256(open(path, "rb").read()).hexdigest()}",')
    print(f'"source": "integration/tests/perplexity.py: f32 NumPy forward on the dequantised weights; ids by llama-tokenize",')
    print(f'"window": {WINDOW},')
    print(f'"perplexity": {perplexity:.5f},')
    print(f'"logprobs": {json.dumps([round(sum, 4) for sum in sums])},')
    print(f'"ids": {json.dumps(ids)}')
    print("}")


if __name__ == "__main__":
    main()
