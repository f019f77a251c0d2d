#!/usr/bin/env bash
# Install a wheel of dist/ into an environment of its own, without a compiler, and run the tests on
# what was installed (`make test-wheel`). Arguments are handed to pytest.
#
#   PYTHON  the interpreter;  TORCH  what pip is to install as torch;  LOCAL  +cu130 for CUDA wheels
#   VENV    the environment (default: a new one, removed afterwards)
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-torch}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
VENV=${VENV:-$work/venv}

[[ -e $VENV/bin/python ]] || "$PYTHON" -m venv "$VENV"
python=$(realpath -s "$VENV")/bin/python
tag=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)${LOCAL:-}
wheels=(dist/pyablate-"$version"-"$tag"-*.whl)
[[ -e ${wheels[0]} ]] || { echo "no wheel dist/pyablate-$version-$tag-*.whl: make wheel" >&2; exit 1; }
wheel=$(realpath "${wheels[0]}")

# shellcheck disable=SC2086  # TORCH may carry options of pip
"$python" -m pip install -q $TORCH
"$python" -m pip uninstall -q -y pyablate
# A path of one folder: neither compiler nor cmake is found.
PATH="$VENV/bin" "$python" -m pip install -q "$wheel[test]"

# Without the package's own sources beside the tests, it is the wheel that is imported.
git ls-files -z | grep -zv '^pyablate/' | xargs -0 cp --parents -t "$work"
git ls-files pyablate | sort >"$work/sources"
cd "$work"
"$python" tools/check_wheel.py "$wheel" sources
"$python" -m pyablate doctor
"$python" -m pytest -q "$@"
