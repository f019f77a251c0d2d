"""Every name of the reference has an example in its docstring, and the examples are true."""

from __future__ import annotations

import doctest
import functools
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

_REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
_NEEDS = {
    "pyablate.compression": "torch_pruning",
    "pyablate.attribution": "captum",
    "pyablate.comparison": "captum",
    "pyablate.experiments._patterns": "sklearn",
    "pyablate.plots": "matplotlib",
}


def _of_module(name: str) -> list[str]:
    module = importlib.import_module(name)
    own = [key for key, value in vars(module).items() if _module(value) == name and key[0] != "_"]
    return [f"{name}.{key}" for key in getattr(module, "__all__", own)]


def _module(value: object) -> str | None:
    return value.__module__ if inspect.isfunction(value) or inspect.isclass(value) else None


def _documented() -> list[str]:
    """Functions and classes on the pages of the reference, by their full names."""
    text = "".join(page.read_text() for page in sorted(_REFERENCE.glob("*.md")))
    found = re.findall(r"auto(?:function|class|exception):: ([\w.]+)", text)
    names = [name if name.startswith("pyablate.") else f"pyablate.{name}" for name in found]
    for module, chosen in re.findall(r"automodule:: ([\w.]+)\n   :members:(.*)", text):
        some = [f"{module}.{name}" for name in re.findall(r"\w+", chosen)]
        names += some or _of_module(module)
    return sorted({name for name in names if callable(pkgutil.resolve_name(name))})


_NAMES = _documented()


@functools.cache
def _shared() -> dict[str, Any]:
    """Names that all examples share: the lines of the reference's first page."""
    (code,) = re.findall(r"```python\n(.*?)```", (_REFERENCE / "index.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "index.md", "exec"), names)
    return names


def test_the_reference_names_what_there_is() -> None:
    assert {"pyablate.ablate", "pyablate.ops.classify", "pyablate.demo.VGG"} <= set(_NAMES)
    assert len(_NAMES) > 90


@pytest.mark.parametrize("name", _NAMES)
def test_a_public_name_has_an_example(name: str) -> None:
    assert ">>> " in (inspect.getdoc(pkgutil.resolve_name(name)) or "")


@pytest.mark.slow
@pytest.mark.parametrize("name", _NAMES)
def test_an_example_is_true(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = pkgutil.resolve_name(name)
    for module, needed in _NEEDS.items():
        if found.__module__.startswith(module):
            pytest.importorskip(needed)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    text = inspect.getdoc(found)
    test = doctest.DocTestParser().get_doctest(text, dict(_shared()), name, None, 0)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    failed, _ = runner.run(test, out=report.append)
    assert failed == 0, "".join(report)
