"""What goes into a wheel; ``make test-wheel`` checks a real one with the same function."""

from __future__ import annotations

import fnmatch
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

import pyablate as pa

_ROOT = Path(__file__).parents[1]
_SPEC = importlib.util.spec_from_file_location("check_wheel", _ROOT / "tools" / "check_wheel.py")
assert _SPEC is not None
assert _SPEC.loader is not None
check_wheel = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(check_wheel)

_SOURCES = {"pyablate/__init__.py", "pyablate/_core.pyi", "pyablate/demo/a.txt"}
_NATIVE = "pyablate/_core.cpython-312-x86_64-linux-gnu.so"
_LICENCE = "pyablate-0.1.0.dist-info/licenses/LICENSE"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (set(), None),
        ({"pyablate/demo/a.txt"}, "missing: pyablate/demo/a.txt"),
        ({"tests/test_a.py"}, "not of the package: tests/test_a.py"),
        ({_NATIVE}, "expected one native module, got []"),
        ({_LICENCE}, "expected one licence, got []"),
    ],
)
def test_faults_of_a_wheel_are_named(change, fault):
    names = _SOURCES | {_NATIVE, _LICENCE, "pyablate-0.1.0.dist-info/METADATA", "pyablate/"}
    assert check_wheel.faults(names ^ change, _SOURCES) == ([fault] if fault else [])


def test_every_file_of_the_package_is_declared():
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["pyablate"]
    package = Path(pa.__file__).parent
    files = [path.relative_to(package) for path in package.rglob("*") if path.is_file()]
    data = [path for path in files if path.suffix not in (".py", ".pyc", ".so")]
    assert len(data) > 10
    loose = [pattern.replace("**/", "*") for pattern in patterns]
    undeclared = [
        path for path in data if not any(fnmatch.fnmatch(path.as_posix(), each) for each in loose)
    ]
    assert undeclared == []


def test_the_page_on_installing_knows_the_versions_needed():
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = (_ROOT / "docs" / "guides" / "install.md").read_text(encoding="utf-8")
    python = re.fullmatch(r">=(.+)", project["requires-python"])
    [torch] = [line for line in project["dependencies"] if line.startswith("torch")]
    assert python is not None
    assert f"Python {python[1]} or later" in page
    assert f"torch {torch.removeprefix('torch>=')} or later" in page
