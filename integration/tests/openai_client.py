"""Drives a Baton router (or worker) with the official OpenAI client, as a user would. argv: base URL, model."""

import sys

import openai

base_url, model = sys.argv[1:3]
client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=60)

# Models.
models = [one.id for one in client.models.list()]
assert models == [model], models

# Completions, whole and streamed.
ask = dict(model=model, prompt="NVIDIA is a great company because", max_tokens=16, temperature=0)
whole = client.completions.create(**ask)
assert whole.object == "text_completion" and whole.id.startswith("cmpl-"), whole
assert whole.choices[0].finish_reason in ("length", "stop"), whole
assert whole.usage.completion_tokens <= 16 and whole.usage.prompt_tokens == 8, whole.usage
assert whole.choices[0].text, whole
streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**ask, stream=True))
assert streamed == whole.choices[0].text, (streamed, whole.choices[0].text)

# Log-probabilities.
probed = client.completions.create(**{**ask, "max_tokens": 3}, logprobs=3)
logprobs = probed.choices[0].logprobs
assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 3
assert "".join(logprobs.tokens) == probed.choices[0].text, logprobs
assert all(value <= 0 for value in logprobs.token_logprobs), logprobs
assert all(len(top) == 3 for top in logprobs.top_logprobs), logprobs

# Chat, whole and streamed, with usage.
ask = dict(
    model=model,
    messages=[
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]},
    ],
    max_tokens=24,
    temperature=0,
)
whole = client.chat.completions.create(**ask)
assert whole.object == "chat.completion" and whole.choices[0].message.role == "assistant", whole
assert "Paris" in whole.choices[0].message.content, whole
chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
assert chunks[0].choices[0].delta.role == "assistant", chunks[0]
text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
assert text == whole.choices[0].message.content, (text, whole)
assert chunks[-1].usage == whole.usage, (chunks[-1].usage, whole.usage)
finishes = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
assert finishes == [whole.choices[0].finish_reason], finishes
probed = client.chat.completions.create(**{**ask, "max_tokens": 2}, logprobs=True, top_logprobs=2)
content = probed.choices[0].logprobs.content
assert len(content) == 2 and all(len(one.top_logprobs) == 2 for one in content), content
assert bytes(content[0].bytes).decode() == content[0].token, content[0]


# Errors come as the client's own classes.
def fails(kind, **bad):
    try:
        client.completions.create(**{"model": model, "prompt": "x", "max_tokens": 1, **bad})
    except kind as error:
        assert error.body and error.body.get("message"), error.body
        return error
    raise AssertionError(f"{bad} was not refused")


assert fails(openai.NotFoundError, model="no-such-model").code == "model_not_found"
assert fails(openai.BadRequestError, prompt="").param == "prompt"
assert fails(openai.BadRequestError, temperature="hot").param == "temperature"
assert fails(openai.BadRequestError, n=2).param == "n"
assert fails(openai.BadRequestError, prompt=[1] * 100_000).code == "context_length_exceeded"
try:
    client.chat.completions.create(model=model, messages=[])
    raise AssertionError("no messages were accepted")
except openai.BadRequestError as error:
    assert error.param == "messages", error.body

# A client that leaves in the middle of a stream.
stream = client.completions.create(model=model, prompt="Once upon a time", max_tokens=500, stream=True)
next(iter(stream))
stream.close()
print("all well")
