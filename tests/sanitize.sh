#!/bin/sh
# The native operations' tests under AddressSanitizer and UndefinedBehaviorSanitizer.
#
# Builds an instrumented copy of the package into build/sanitize and runs the tests against it; the
# first report ends the run. Python itself is not instrumented, so the sanitizer's runtime is loaded
# before it, and leaks, which would be Python's and PyTorch's, are not looked for.
#
#   tests/sanitize.sh [arguments of pytest]      PYTHON=... CXX=... choose interpreter and compiler
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
CXX=${CXX:-g++}
target=$PWD/build/sanitize
runtime=$("$CXX" -print-file-name=libasan.so)
undefined=$("$CXX" -print-file-name=libubsan.so)
standard=$("$CXX" -print-file-name=libstdc++.so)

rm -rf "$target/pyablate"
mkdir -p "$target"
cp -R pyablate "$target/"
rm -f "$target"/pyablate/_core*.so
CXX=$CXX cmake -S . -B "$target/cmake" -DCMAKE_BUILD_TYPE=Debug -DPYABLATE_CUDA=OFF \
    -DPYABLATE_SANITIZE=address,undefined -DPYABLATE_OUTPUT_DIRECTORY="$target/pyablate" \
    -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" \
    -DPython_EXECUTABLE="$("$PYTHON" -c 'import sys; print(sys.executable)')" >/dev/null
cmake --build "$target/cmake" --parallel 2 >"$target/log" 2>&1 || { cat "$target/log" >&2; exit 1; }

[ $# -gt 0 ] || set -- tests/ops/test_ops_*.py
export PYTHONPATH="$target" OMP_NUM_THREADS=2
export LD_PRELOAD="$runtime $undefined $standard"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:detect_stack_use_after_return=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
# sys.path begins with this folder, whose module is not the instrumented one
"$PYTHON" -c '
import sys
del sys.path[0]
from pyablate import _native
assert _native.build_info()["sanitizers"], f"not the instrumented module: {_native.core}"
'
exec "$PYTHON" -c '
import sys
del sys.path[0]
import pytest
sys.exit(pytest.main(["-q", "--capture=sys", "-p", "no:cacheprovider", *sys.argv[1:]]))
' "$@"
