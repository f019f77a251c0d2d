#!/usr/bin/env bash
# One short visit to a GPU machine, which may have neither network nor git nor an index: build, test,
# check, measure, the most valuable first, each phase with a limit of its own. What is no measurement
# (ops exact sanitizer) runs side by side.
#
#   bash benchmarks/gpu.sh                  all phases: build ops exact sanitizer speed bench ncu
#   bash benchmarks/gpu.sh build speed      only these; a second call on one machine builds nothing
#   bash benchmarks/gpu.sh --dry-run        print the phases and their commands, run none
#
# What is found lies in $OUT, written line by line, so that a visit that is cut short leaves what it
# had: run.log, results.jsonl, bench.json and one .txt for each phase; no folders.
#
#   OUT        folder of the results                                            gpu-results
#   PYTHON     a Python with torch, cmake, ninja and pybind11                   python3
#   WHEELS     wheels that this Python lacks, from gpu_wheels.py                .whl
#   SITE       where they are unpacked; nothing is installed for good           build/gpu-site
#   DEADLINE   seconds that all of it may take                                  570
#   DEVICE     cpu tries phases out where no GPU is                             cuda
#   SMALL      1: as little of everything as shows that it runs
#
# It goes on after a failure, except of the build, and exits with 1 at the end if there was any. It
# changes no setting of the GPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

# What an extension was built from; in one order, whatever the machine's language.
sources() (
    export LC_ALL=C
    cat CMakeLists.txt csrc/*/*.{cpp,h,cu,cuh} csrc/include/pyablate/*.h 2>/dev/null | sha256sum | cut -c1-16
)

every=(build ops exact sanitizer speed bench ncu)
dry=false
phases=()
for argument in "$@"; do
    if [[ "$argument" == --dry-run ]]; then
        dry=true
    elif [[ "$argument" == --sources ]]; then # for gpu_wheels.py
        sources
        exit
    elif [[ " ${every[*]} " == *" $argument "* ]]; then
        phases+=("$argument")
    else
        echo "usage: bash benchmarks/gpu.sh [--dry-run] [${every[*]}]" >&2
        exit 2
    fi
done
((${#phases[@]})) || phases=("${every[@]}")

begin=$SECONDS
out="${OUT:-$PWD/gpu-results}"
python="${PYTHON:-python3}"
wheels="${WHEELS:-.whl}"
site="${SITE:-$PWD/build/gpu-site}"
deadline="${DEADLINE:-570}"
device="${DEVICE:-cuda}"
small=()
[[ "${SMALL:-0}" == 1 ]] && small=(--small)
log=/dev/null
failures="$(mktemp)" # a file, since phases that run side by side are processes of their own
trap 'rm -f "$failures"' EXIT
export PYABLATE_CACHE="" # rates that are measured beside other work are not for later phases
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}"
pytest=("$python" -m pytest -q -p no:cacheprovider --tb=short)

say() { printf '%4d s  %s\n' $((SECONDS - begin)) "$*" | tee -a "$log"; }
left() { echo $((deadline - (SECONDS - begin))); }

# step LIMIT FILE COMMAND...: no longer than LIMIT or what is left; all output to FILE, its end shown
step() {
    local limit="$1" name="$2" status=0 start=$SECONDS
    shift 2
    if $dry; then
        printf '%s, at most %d s: ' "$name" "$limit"
        printf '%q ' "$@"
        printf '\n'
        return
    fi
    (($(left) - 3 < limit)) && limit=$(($(left) - 3))
    if ((limit < 5)); then
        say "$name: no time left for: $*"
        echo "$name (no time)" >>"$failures"
        return 1
    fi
    printf '\n== %s\n' "$*" >>"$out/$name.txt"
    LIMIT="$limit" timeout --signal=INT --kill-after=5 "$limit" "$@" >>"$out/$name.txt" 2>&1 || status=$?
    tail -n 12 "$out/$name.txt" | cut -c1-200
    ((status == 124 || status == 137)) && echo "== cut off after $limit s" >>"$out/$name.txt"
    say "$name: status $status, $((SECONDS - start)) s of $limit"
    ((status)) && echo "$name: ${*:1:4}" >>"$failures"
    return "$status"
}

has_cuda() {
    "$python" -c 'import sys
from pyablate import _native
sys.exit(_native.core is None or not _native.core.has_cuda)' 2>>"$log"
}

facts() {
    echo "date:    $(date -u +%Y-%m-%dT%H:%M:%SZ)"
    echo "gpu:     $(nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,power.limit --format=csv,noheader 2>&1 | head -n 1)"
    echo "host:    $(uname -r), $(nproc) cores, load $(cut -d' ' -f1-3 /proc/loadavg)"
    echo "nvcc:    $(nvcc --version 2>&1 | tail -n 1)"
    echo "commit:  $(git rev-parse HEAD 2>/dev/null || echo unknown), sources $(sources)"
    "$python" -c 'import sys, torch
print("python: ", sys.version.split()[0], "torch", torch.__version__, torch.version.cuda)'
}

unpack() {
    compgen -G "$wheels/*.whl" >/dev/null || return 0
    [[ -f "$site/.done" ]] && return 0
    step 60 build "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
        --upgrade --target "$site" "$wheels"/*.whl && { $dry || touch "$site/.done"; }
}

compile() { # its command is that of `pip install` without isolation, which would ask an index
    step 240 build env PYABLATE_CUDA=ON CMAKE_BUILD_PARALLEL_LEVEL="$(nproc)" \
        "$python" setup.py -q build_ext --inplace
}

build() {
    $dry || facts 2>&1 | tee -a "$log"
    unpack || return 1
    $dry && { compile; return; }
    local now
    now="$(sources)"
    if [[ "$(cat build/gpu.sources 2>/dev/null)" == "$now" ]] && has_cuda; then
        say "build: there already"
        return 0
    fi
    if [[ "$(cat "$wheels/sources" 2>/dev/null)" == "$now" ]]; then
        cp "$wheels"/_core*.so pyablate/
    fi
    has_cuda || compile || return 1
    has_cuda || { say "build: the extension has no CUDA, or does not load"; return 1; }
    mkdir -p build && echo "$now" >build/gpu.sources
}

# The operations against the reference, the waits of the host, slices recorded as CUDA graphs,
# convolutions with ReLU in one pass.
ops() {
    step 120 ops "${pytest[@]}" -p no:benchmark -m cuda -n 6 --maxfail=60 tests/ops/test_ops_*.py \
        tests/engine/test_waits.py tests/engine/test_pointwise.py
}

# Whole runs against the float64 hook loop.
exact() {
    step 120 exact "$python" benchmarks/gpu_checks.py exact --device "$device" --out "$out" "${small[@]}"
}

# Ceilings, our kernels, a network, sizes of slices.
speed() {
    step 190 speed "$python" benchmarks/gpu_checks.py speed --device "$device" --out "$out" "${small[@]}"
}

# A few cases of the suite, with its rivals.
bench() {
    local cases="resnet50 or Lite0 or convnext or deit"
    cases+=" or (vgg_bn and features.9) or (resnet and stage2.1.relu1)"
    step 150 bench "${pytest[@]}" -s --device "$device" --rounds 3 --seconds 0.3 --no-compile --results "$out" \
        benchmarks/bench_imagenet.py benchmarks/bench_layers.py -k "not test_network and ($cases)"
}

# PyTorch's caching allocator hides accesses beyond a tensor's end from memcheck.
sanitizer() {
    local tool
    for tool in memcheck racecheck; do
        step 120 "sanitizer-$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 \
            "${pytest[@]}" -x -m cuda -p no:xdist tests/ops/test_ops_edges.py tests/ops/test_ops_classify.py \
            tests/ops/test_ops_depthwise.py tests/ops/test_ops_difference.py &
    done
    wait
}

# Where the heaviest kernels lose; the clocks stay as they are.
ncu() {
    step 60 ncu ncu --clock-control none --launch-count 6 --section SpeedOfLight \
        --section MemoryWorkloadAnalysis --section Occupancy --section WarpStateStats \
        --kernel-name 'regex:delta_activation|delta_mean|delta_max_pool|unit_delta|head_flips' \
        "$python" benchmarks/gpu_checks.py kernels --device "$device" --out "$out" --small
}

if ! $dry; then
    mkdir -p "$out" || exit 2
    out="$(cd "$out" && pwd)"
    log="$out/run.log"
fi
asked() { [[ " ${phases[*]} " == *" $1 "* ]]; }

say "phases: ${phases[*]}; $deadline s in all"
if asked build && ! build; then
    echo build >>"$failures"
    say "no build, no results"
else
    for phase in ops exact sanitizer; do
        if asked "$phase"; then
            if $dry; then "$phase"; else "$phase" & fi
        fi
    done
    wait
    for phase in speed bench ncu; do
        asked "$phase" && "$phase"
    done
fi
say "done; failed: $(wc -l <"$failures")"
[[ ! -s "$failures" ]] || { sed 's/^/  /' "$failures" | tee -a "$log"; exit 1; }
