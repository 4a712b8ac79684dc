#!/usr/bin/env bash
# Packs what `gpu-check` needs on a machine that has a driver and nothing of ours: the programs, and NIXL, packed.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
bundle=$root/target/gpu-bundle
rm -rf "$bundle"
mkdir -p "$bundle/packed"
for program in gpu-check baton-workerd baton-router; do
    strip -o "$bundle/packed/$program" "$root/target/release/$program"
done
# The worker's tests, of which some run on a GPU.
tests=$(cd "$root" && cargo test --release --workspace --lib --no-run --message-format=json 2>/dev/null |
    python3 -c '
import json, sys
for line in sys.stdin:
    made = json.loads(line)
    if made.get("executable") and made["target"]["name"] == "baton_workerd" and made["profile"]["test"]:
        print(made["executable"])')
strip -o "$bundle/packed/worker-tests" "$tests"
cp -r "$root/.deps/nixl/" "$bundle/packed/nixl"
tar -C "$bundle/packed" -cJf "$bundle/packed.tar.xz" .
rm -r "$bundle/packed"
cat >"$bundle/gpu-check" <<'EOF'
#!/bin/sh
# Checks the CUDA back end on this machine; --help says how. Exit code 0 all right, 1 something is wrong, 3 no GPU.
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tar -C "$work" -xJf "$here/packed.tar.xz"
export NIXL_PREFIX="$work/nixl"
# cuBLASLt, where a CUDA toolkit or PyTorch brought it.
for file in /usr/local/cuda*/lib64/libcublasLt.so.1[23] /usr/local/cuda*/targets/*/lib/libcublasLt.so.1[23] \
    $(python3 -c 'import site, glob; [print(f) for d in site.getsitepackages() for f in glob.glob(d + "/nvidia/*/lib/libcublasLt.so.1[23]")]' 2>/dev/null); do
    if [ -e "$file" ]; then
        export LD_LIBRARY_PATH="$(dirname "$file")${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
        break
    fi
done
"$work/gpu-check" "$@"
EOF
chmod +x "$bundle/gpu-check"
size=$(du -sm "$bundle" | cut -f1)
if [ "$size" -gt 48 ]; then
    echo "gpu-bundle: $size MiB, 48 are allowed" >&2
    exit 1
fi
echo "gpu-bundle: $bundle, $size MiB"
