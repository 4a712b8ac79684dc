"""What transformers computes, as lines of JSON: `numbers FOLDER` for the models and prompts that gpu-check wrote there,
`speed` for its own generation with Llama-3.1-8B's shape and random weights. Exit code 4: a package is missing."""

import json
import pathlib
import sys
import time

try:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, LlamaConfig
except ImportError as error:
    print(f"no reference: {error}", file=sys.stderr)
    sys.exit(4)


def numbers(folder):
    """In f32 on the CPU: the greedy tokens after each prompt, and the five most probable ones of each step."""
    for path in sorted(pathlib.Path(folder).iterdir()):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for prompt in json.loads((path / "prompts.json").read_text()):
            tokens, steps = list(prompt["prompt"]), []
            for _ in range(prompt["steps"]):
                with torch.no_grad():
                    logits = model(torch.tensor([tokens])).logits[0, -1].double()
                best = torch.log_softmax(logits, -1).topk(5)
                pairs = list(zip(best.indices.tolist(), best.values.tolist()))
                steps.append({"token": pairs[0][0], "logprob": pairs[0][1], "top": pairs})
                tokens.append(pairs[0][0])
            print(json.dumps({"model": path.name, "steps": steps}))


def speed():
    """In bf16 on the GPU: seconds of a decode step of 1 and 8 sequences, and of a prompt of 8,192 tokens."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=16384, rope_theta=500000.0)
    torch.set_default_device("cuda")
    torch.set_default_dtype(torch.bfloat16)
    try:
        from transformers.initialization import no_init_weights
    except ImportError:
        from transformers.modeling_utils import no_init_weights
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    report = {"torch": torch.__version__, "transformers": transformers.__version__}
    with torch.no_grad():
        for batch in (1, 8):
            tokens = torch.randint(0, 128000, (batch, 2048))
            times = []
            for new in (1, 33):
                torch.cuda.synchronize()
                begun = time.time()
                model.generate(tokens, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                               attention_mask=torch.ones_like(tokens), pad_token_id=0)
                torch.cuda.synchronize()
                times.append(time.time() - begun)
            report[f"decode {batch}"] = (times[1] - times[0]) / 32
        tokens = torch.randint(0, 128000, (1, 8192))
        for _ in range(3):
            torch.cuda.synchronize()
            begun = time.time()
            model(tokens, logits_to_keep=1)
            torch.cuda.synchronize()
            report["prefill 8192"] = time.time() - begun
    print(json.dumps(report))


if __name__ == "__main__":
    numbers(sys.argv[2]) if sys.argv[1] == "numbers" else speed()
