#!/usr/bin/env bash
# Packs what `gpu-check` needs on a machine that has a driver and nothing of ours: the programs, and NIXL, packed.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
bundle=$root/target/gpu-bundle
rm -rf "$bundle"
mkdir -p "$bundle/bin"
for program in gpu-check baton-workerd baton-router; do
    strip -o "$bundle/bin/$program" "$root/target/release/$program"
done
tar -C "$root/.deps/nixl/" -cJf "$bundle/nixl.tar.xz" .
cat >"$bundle/gpu-check" <<'EOF'
#!/bin/sh
# Checks the CUDA back end on this machine; --help says how. Exit code 0 all right, 1 something is wrong, 3 no GPU.
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/nixl" && tar -C "$work/nixl" -xJf "$here/nixl.tar.xz"
export NIXL_PREFIX="$work/nixl"
# cuBLASLt, where a CUDA toolkit or PyTorch brought it.
for file in /usr/local/cuda*/lib64/libcublasLt.so.1[23] /usr/local/cuda*/targets/*/lib/libcublasLt.so.1[23] \
    $(python3 -c 'import site, glob; [print(f) for d in site.getsitepackages() for f in glob.glob(d + "/nvidia/*/lib/libcublasLt.so.1[23]")]' 2>/dev/null); do
    if [ -e "$file" ]; then
        export LD_LIBRARY_PATH="$(dirname "$file")${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
        break
    fi
done
"$here/bin/gpu-check" "$@"
EOF
chmod +x "$bundle/gpu-check"
size=$(du -sm "$bundle" | cut -f1)
if [ "$size" -gt 48 ]; then
    echo "gpu-bundle: $size MiB, 48 are allowed" >&2
    exit 1
fi
echo "gpu-bundle: $bundle, $size MiB"
