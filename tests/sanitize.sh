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

rm -rf "$target"
CXX=$CXX PYABLATE_CUDA=OFF PYABLATE_SANITIZE=address,undefined \
    "$PYTHON" -m pip install -q --no-deps --target "$target" .

[ $# -gt 0 ] || set -- tests/test_ops_*.py
PYTHONPATH=$target OMP_NUM_THREADS=2 \
    LD_PRELOAD="$runtime $undefined $standard" \
    ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:detect_stack_use_after_return=1 \
    UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
    "$PYTHON" -c '
import sys
import pytest
from pyablate import _native
assert _native.build_info()["sanitizers"], "not the instrumented module: " + str(_native.core)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
' "$@"
