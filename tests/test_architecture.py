"""Packages import one way, files not in circles, and the package root holds faces only."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import pyablate as pa

_ROOT = Path(__file__).parents[1]
_SPEC = importlib.util.spec_from_file_location("architecture", _ROOT / "tools" / "architecture.py")
assert _SPEC is not None
assert _SPEC.loader is not None
architecture = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(architecture)

PACKAGE = Path(pa.__file__).parent
IMPORTS = architecture.imports(PACKAGE)


def test_no_package_imports_from_one_above_it():
    assert architecture.upward(IMPORTS) == []


def test_no_files_import_in_a_circle():
    assert architecture.circles(IMPORTS) == []


def test_the_package_root_holds_packages_and_faces_only():
    rooms = {architecture.room(module) for module in IMPORTS}
    assert rooms <= set(architecture.ORDER)
    assert {name for name in architecture.ORDER if name != "__main__"} <= rooms
    loose = {path.stem for path in PACKAGE.glob("*.py")} - architecture.FORMER
    assert loose <= {
        *("__init__", "__main__", "_native", "_validation", "_version", "interventions", "result")
    }


def test_every_package_says_what_it_is():
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        assert (folder / "__init__.py").read_text().startswith('"""'), folder


def _package(folder: Path, files: dict[str, str]) -> dict[str, dict[str, list[int]]]:
    for name, text in {"__init__.py": "", **files}.items():
        path = folder / "pyablate" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return architecture.imports(folder / "pyablate")


@pytest.mark.parametrize(
    "text",
    [
        "import pyablate.engine.rules",
        "from pyablate.engine import rules",
        "from pyablate.engine.rules import RULES",
        "from ..engine.rules import RULES",
        "if TYPE_CHECKING:\n    from pyablate.engine.rules import Rule",
        "def rule():\n    from pyablate.engine import rules",
    ],
)
def test_an_arrow_upward_would_be_found(text, tmp_path):
    found = _package(
        tmp_path, {"ops/__init__.py": "", "ops/units.py": text, "engine/rules.py": "RULES = {}"}
    )
    [line] = architecture.upward(found)
    assert line.startswith("pyablate.ops.units -> pyablate.engine.rules (")
    assert architecture.circles(found) == []


def test_a_circle_would_be_found(tmp_path):
    files = {
        "ops/a.py": "from pyablate.ops import b",
        "ops/b.py": "def late():\n    import pyablate.ops.c",
        "ops/c.py": "from pyablate.ops.a import one",
        "ops/d.py": "from pyablate.ops import a",
        "ops/__init__.pyi": "from .d import d as d",
        "ops/__init__.py": "",
    }
    found = _package(tmp_path, files)
    assert architecture.circles(found) == [["pyablate.ops.a", "pyablate.ops.b", "pyablate.ops.c"]]
    assert list(found["pyablate.ops.__init__"]) == ["pyablate.ops.d"]


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("a.png", "b.png"):
        architecture.draw(PACKAGE, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
