#!/usr/bin/env bash
# Builds the fuzz targets with coverage instrumentation (libFuzzer, on the stable toolchain) and runs them one after
# another, from the committed corpus on; what they find lands in found/ (inputs) and artifacts/ (failures).
#
#   integration/fuzz/run.sh [SECONDS] [TARGET...]     600 seconds each and all targets by default
set -euo pipefail
cd "$(dirname "$0")"

seconds=${1:-600}
shift || true
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(gguf_header gguf_model safetensors request answer config)

# With `--target` these flags stay away from build scripts and macros.
flags=(-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
    -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing)
RUSTFLAGS=${flags[*]} cargo build --release --target x86_64-unknown-linux-gnu

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for target in "${targets[@]}"; do
    mkdir -p "found/$target" "artifacts/$target"
    echo "=== $target: $seconds s"
    TMPDIR=$work "target/x86_64-unknown-linux-gnu/release/$target" "found/$target" "corpus/$target" \
        -max_total_time="$seconds" -max_len=32768 -timeout=30 -rss_limit_mb=1024 -print_final_stats=1 \
        -artifact_prefix="artifacts/$target/" 2>&1 | tee "artifacts/$target/log" | tail -20
done
