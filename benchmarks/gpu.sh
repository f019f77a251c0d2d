#!/usr/bin/env bash
# Everything that needs a GPU, in one call: build with CUDA, the cuda tests (kernels, waits of the
# host, slices recorded as CUDA graphs), compute-sanitizer over the native operations, the benchmarks
# on the device. What came out lies in benchmarks/results/.
#
#   bash benchmarks/gpu.sh              all of it; goes on after a failure and exits with 1 at the end
#   bash benchmarks/gpu.sh --dry-run    print the commands, run none
#   VENV=/path bash benchmarks/gpu.sh   another virtual environment than .venv; it must have a torch
#                                       that sees the GPU (TORCH='torch' make build makes one)
#   BENCH_ARGS='--images 500'           passed on to the benchmarks
set -euo pipefail
cd "$(dirname "$0")/.."

dry=false
case "${1:-}" in
"") ;;
--dry-run) dry=true ;;
*)
    echo "usage: bash benchmarks/gpu.sh [--dry-run]" >&2
    exit 2
    ;;
esac

python="${VENV:-.venv}/bin/python"
read -r -a bench_args <<<"${BENCH_ARGS:-}"
op_tests=(tests/ops/test_ops_*.py)
failed=()
log=/dev/null

# One step: its name, then its command. Its output goes to the terminal and to the log.
step() {
    local name="$1"
    shift
    if $dry; then
        printf '# %s\n' "$name"
        printf '%q ' "$@"
        printf '\n'
        return
    fi
    printf '== %s\n' "$name" | tee -a "$log"
    if "$@" 2>&1 | tee -a "$log"; then
        printf '== %s: passed\n' "$name" | tee -a "$log"
    else
        printf '== %s: FAILED\n' "$name" | tee -a "$log"
        failed+=("$name")
    fi
}

if ! $dry; then
    for tool in nvcc nvidia-smi compute-sanitizer git "$python"; do
        if ! command -v "$tool" >/dev/null; then
            echo "gpu.sh: $tool not found; it needs a CUDA toolkit, a GPU and a built $python" >&2
            exit 1
        fi
    done
    "$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else
        "gpu.sh: this torch sees no GPU: " + torch.__version__)'
    gpu="$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)"
    mkdir -p benchmarks/results
    log="benchmarks/results/gpu-$(tr -cs 'a-zA-Z0-9' '-' <<<"$gpu" | sed 's/-*$//').log"
    {
        echo "date:   $(date -u +%Y-%m-%dT%H:%M:%SZ)"
        echo "gpu:    $gpu"
        echo "driver: $(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)"
        echo "nvcc:   $(nvcc --version | tail -n 1)"
        echo "torch:  $("$python" -c 'import torch; print(torch.__version__, torch.version.cuda)')"
        echo "commit: $(git rev-parse HEAD)$(git diff --quiet HEAD -- pyablate csrc || echo ' +')"
    } | tee "$log"
fi

step "build with CUDA" env PYABLATE_CUDA=ON "$python" -m pip install -q -e '.[test,bench]'
step "the module has CUDA" "$python" -c \
    'import pyablate as pa; print(pa.build_info()); assert pa._native.core.has_cuda'
step "cuda tests" "$python" -m pytest -q -m cuda
# PyTorch's caching allocator hides accesses beyond a tensor's end from memcheck.
for tool in memcheck racecheck; do
    step "compute-sanitizer $tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
        "$python" -m pytest -q -m cuda -p no:cacheprovider "${op_tests[@]}"
done
step "benchmarks" "$python" -m pytest -s -q -p no:cacheprovider benchmarks/bench_*.py \
    --device cuda "${bench_args[@]}"
step "tables" "$python" benchmarks/table.py

if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}" | tee -a "$log" >&2
    exit 1
fi
$dry || echo "all passed; see $log and benchmarks/results/"
