"""Importing the package and asking the shell for help cost little; the public names stay true."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import pyablate as pa

_PACKAGE = Path(pa.__file__).parent
_STUB = ast.parse((_PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
_HEAVY = {
    "rich",
    "torch",
    "pandas",
    "xarray",
    "scipy",
    "zarr",
    "matplotlib",
    "numpy",
    "safetensors",
}
# Public name -> the module that it comes from, or None where it is a module itself.
_PUBLIC = {
    alias.name: node.module
    for node in ast.walk(_STUB)
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}

_IMPORT_IN_RANDOM_ORDER = """
import importlib, inspect, random, sys
import pyablate as pa
public, modules = {public!r}, {modules!r}
random.Random({seed}).shuffle(modules)
for module in modules:
    importlib.import_module(module)
for name, home in public.items():
    value = getattr(pa, name)
    if home is None:
        assert value is sys.modules["pyablate." + name], name
    else:
        assert not inspect.ismodule(value), name
        assert value is vars(sys.modules["pyablate." + home])[name], name
"""

_HELP_OF_EVERY_COMMAND = """
import sys
from pyablate.cli.app import app
commands = [command.name or command.callback.__name__ for command in app.registered_commands]
assert "run" in commands and "compare" in commands
for words in (["--help"], *([command.replace("_", "-"), "--help"] for command in commands)):
    try:
        app(words, prog_name="pyablate")
    except SystemExit as exit:
        assert not exit.code, (words, exit.code)
sys.stderr.write(" ".join(sorted(sys.modules)))
"""

_TIMED_HELP = """
import contextlib, io, json, time
from pyablate.cli.app import app
start = time.process_time()  # of the interpreter and all imports
commands = [command.name or command.callback.__name__ for command in app.registered_commands]
seconds, texts = {}, {}
for name in ["", *(command.replace("_", "-") for command in commands)]:
    for _ in range(3):
        begun = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()) as told:
            try:
                app([*name.split(), "--help"], prog_name="pyablate")
            except SystemExit:
                pass
        took = time.process_time() - begun
        seconds[name] = min(took, seconds.get(name, took))
    texts[name] = told.getvalue()
print(json.dumps({"start": start, "seconds": seconds, "texts": texts}))
"""

_BARE = "import time; print(time.process_time())"

_VERSION_OF_LOOSE_SOURCES = """
import sys
from importlib import metadata
import pyablate
assert "pyablate._version" not in sys.modules  # looked up when asked for
def missing(name):
    raise metadata.PackageNotFoundError(name)
metadata.version = missing
assert pyablate.__version__ == "0+unknown"
"""


def _python(*words: str) -> subprocess.CompletedProcess[str]:
    run = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run


def _modules() -> list[str]:
    found = pkgutil.walk_packages([str(_PACKAGE)], "pyablate.")
    # __main__ runs the shell; the compiled module and Triton may be missing.
    left = ("__main__", "_core", "pointwise_kernel")
    return [module.name for module in found if not module.name.endswith(left)]


def test_importing_the_package_imports_nothing_heavy():
    loaded = _python("-c", "import pyablate, sys; print(*sys.modules)").stdout.split()
    assert "pyablate" in loaded
    assert not _HEAVY & set(loaded)


def test_the_help_of_every_command_imports_nothing_heavy():
    loaded = _python("-c", _HELP_OF_EVERY_COMMAND).stderr.split()
    assert "pyablate.cli.app" in loaded
    assert not _HEAVY & set(loaded)


def test_help_of_every_command_takes_less_than_three_tenths_of_a_second():
    for _ in range(5):  # the best of several: a busy machine takes more CPU seconds
        run = json.loads(_python("-c", _TIMED_HELP).stdout)
        slowest = {name: run["start"] + seconds for name, seconds in run["seconds"].items()}
        if max(slowest.values()) < 0.3:
            return
    # Where all of them were slow a bare interpreter is, too: it takes 0.02 s of an idle core.
    bare = min(float(_python("-c", _BARE).stdout) for _ in range(3))
    assert max(slowest.values()) < 15 * bare, slowest


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What each command says in 80 columns, the list of all under ""."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        return json.loads(_python("-c", _TIMED_HELP).stdout)["texts"]


def test_help_is_readable_in_80_columns(helps):
    assert len(helps) > 20
    for command, text in helps.items():
        lines = text.splitlines()
        assert lines[0].startswith(f"Usage: pyablate {command}".strip())
        assert max(map(len, lines)) <= 80, command
        options = text.partition("Options:\n")[2].splitlines()
        indents = [len(line) - len(line.lstrip()) for line in options]
        assert all(indent <= 36 for indent in indents), command  # more than half is for the text
    assert "..." not in helps[""].partition("Commands:")[2]  # nothing is cut off


@pytest.mark.parametrize("seed", [0, 1])
def test_public_names_hold_in_any_order_of_imports(seed):
    _python(
        "-c",
        _IMPORT_IN_RANDOM_ORDER.format(public=_PUBLIC, modules=_modules(), seed=seed),
    )


def test_no_public_name_is_that_of_a_module_beside_it():
    packages = ["pyablate", *(name for name in _modules() if hasattr(_load(name), "__path__"))]
    assert "pyablate.compression" in packages
    for package in map(_load, packages):
        for name in getattr(package, "__all__", []):
            beside = f"{package.__name__}.{name}"
            if importlib.util.find_spec(beside) is not None:
                assert getattr(package, name) is sys.modules[beside], beside


def _load(name: str) -> object:
    return importlib.import_module(name)


def test_the_names_are_those_of_the_stub():
    assert len(_PUBLIC) > 30
    assert sorted(dir(pa)) == sorted(pa.__all__) == sorted(_PUBLIC)
    modules = {name for name in _PUBLIC if inspect.ismodule(getattr(pa, name))}
    assert modules == {name for name, home in _PUBLIC.items() if home is None}


def test_sources_that_were_not_installed_have_no_version():
    _python("-c", _VERSION_OF_LOOSE_SOURCES)


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = pa.nonsense
    with pytest.raises(ImportError, match="nonsense"):
        exec("from pyablate import nonsense")
