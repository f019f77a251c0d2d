"""Nothing that is loaded runs code, leads out of its folder or takes all the memory.

SECURITY.md says what is promised; every promise has its tests here.
"""

from __future__ import annotations

import ast
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.shelled import invoke
from support.touch import Touch

import pyablate as pa
from pyablate.analysis.unit_table import read_table
from pyablate.cli.data_specs import load_data
from pyablate.cli.model_specs import load_model

PACKAGE = Path(pa.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))


# --- the package itself ---------------------------------------------------------------------------

FORBIDDEN_MODULES = {
    *("cloudpickle", "cPickle", "dill", "joblib", "jsonpickle", "marshal", "shelve", "yaml"),
    *("runpy", "code", "codeop", "subprocess", "ctypes"),
}
FORBIDDEN_CALLS = {
    *("system", "popen", "read_pickle", "to_pickle", "extractall", "Unpickler"),
    *("add_safe_globals", "safe_globals", "load_library", "aoti_load_package"),
}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
LOADERS = {"exported.py": "export.load"}  # the one other loader of torch, behind our checks
# Of what the user names, or of what need not be installed.
IMPORTERS = {
    *("model_specs.py", "_native.py", "_validation.py", "diagnose.py"),
    *("image_files.py", "class_map.py"),
}


def called(node: ast.Call) -> str:
    """Dotted name of what is called, as written."""
    parts = []
    target: ast.AST = node.func
    while isinstance(target, ast.Attribute):
        parts.append(target.attr)
        target = target.value
    parts.append(target.id if isinstance(target, ast.Name) else "")
    return ".".join(reversed(parts))


ALLOWED = {
    "exported.py": {"pickle"},  # for the name of its error
    "diagnose.py": {"ctypes"},  # asks the CUDA driver for its version; loads nothing that is named
}


def faults(source: str, name: str) -> list[str]:
    """What a module does that nothing in the package may do."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            )
            modules = {str(module).split(".")[0] for module in names}
            found += sorted((modules & (FORBIDDEN_MODULES | {"pickle"})) - ALLOWED.get(name, set()))
        if not isinstance(node, ast.Call):
            continue
        call = called(node)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        forbidden = call.split(".")[-1] in FORBIDDEN_CALLS and call != "platform.system"
        if forbidden or call in FORBIDDEN_NAMES:
            found.append(call)
        if call.split(".")[0] == "pickle":
            found.append(call)
        if call == "torch.load" and keywords.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if call in ("np.load", "numpy.load") and keywords.get("allow_pickle") != "False":
            found.append("np.load without allow_pickle=False")
        if call.endswith("export.load") and name not in LOADERS:
            found.append(call)
        if call.endswith("import_module") and name not in IMPORTERS:
            found.append(call)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_can_run_what_it_reads(path):
    assert faults(path.read_text(), path.name) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import load",
        "eval(text)",
        "os.system(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "pd.read_pickle(path)",
        "torch.export.load(path)",
        "importlib.import_module(name)",
        "archive.extractall()",
    ],
)
def test_the_search_would_find_it(line):
    assert faults(line, "store.py") != []


# --- pickles in every kind of input ---------------------------------------------------------------


Writer = Callable[[Path, Touch], object]
Reader = Callable[[Path], object]


def bare(path: Path, evil: Touch) -> None:
    path.write_bytes(pickle.dumps(evil))


def in_member(path: Path, evil: Touch) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images", pickle.dumps(evil))
        archive.writestr("labels.npy", pickle.dumps(evil))


def in_names(path: Path, evil: Touch) -> None:
    names = np.array([evil, "b"], dtype=object)
    images = np.zeros((2, 3, 3), np.float32)
    np.savez(path, images=images, labels=np.zeros(2, int), class_names=names)


def in_codec(**described: Any) -> Writer:
    """A group of Zarr format 2, whose codecs may unpickle."""

    def write(store: Path, evil: Touch) -> None:
        (store / "label").mkdir(parents=True)
        array = {
            **{"zarr_format": 2, "shape": [2], "chunks": [2], "dtype": "|O", "compressor": None},
            **{"fill_value": 0, "order": "C", "filters": None, **described},
        }
        known = {"pyablate_format": 1, "layers": ["a"], "unit_labels": ["a:0"]}
        (store / ".zgroup").write_text('{"zarr_format": 2}')
        (store / ".zattrs").write_text(json.dumps(known))
        (store / "label" / ".zarray").write_text(json.dumps(array))
        (store / "label" / ".zattrs").write_text('{"_ARRAY_DIMENSIONS": ["unit"]}')
        (store / "label" / "0").write_bytes(pickle.dumps(evil))

    return write


def weights(path: Path) -> object:
    return load_model("demo:vgg_bn", path)


def labels(path: Path) -> object:
    np.savez(path.with_name("a.npz"), images=np.zeros((1, 3, 3), np.float32))
    return load_data(path.with_name("a.npz"), labels=path)


TEXT, PICKLE = {"id": "vlen-utf8"}, {"id": "pickle"}
PICKLES: dict[str, tuple[str, Writer, Reader]] = {
    "checkpoint": (
        "a.pth",
        lambda path, evil: torch.save({"state_dict": {"weight": torch.zeros(1), "x": evil}}, path),
        weights,
    ),
    "old checkpoint": (
        "a.pt",
        lambda path, evil: torch.save({"x": evil}, path, _use_new_zipfile_serialization=False),
        weights,
    ),
    "bare pickle": ("a.bin", bare, weights),
    "safetensors": ("a.safetensors", bare, weights),
    "images": (
        "a.npz",
        lambda path, evil: np.savez(path, images=np.array([evil], object), labels=np.zeros(1, int)),
        load_data,
    ),
    "names of classes": ("a.npz", in_names, load_data),
    "member of an archive": ("a.npz", in_member, load_data),
    "labels": (
        "labels.npy",
        lambda path, evil: np.save(path, np.array([evil], object), allow_pickle=True),
        labels,
    ),
    "bare labels": ("labels.npy", bare, labels),
    "image": ("photos/cat/a.png", bare, lambda path: list(load_data(path.parents[1]).batches)),
    "csv": ("a.csv", bare, read_table),
    "result": ("a.zarr", in_codec(filters=[TEXT, PICKLE]), pa.load),
    "compressor": ("a.zarr", in_codec(compressor=PICKLE, filters=[TEXT]), pa.load),
    "table": ("a.zarr", in_codec(filters=[PICKLE]), read_table),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_is_never_run(kind, tmp_path, trap):
    name, write, read = PICKLES[kind]
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    write(tmp_path / name, Touch(trap))
    with pytest.raises((ValueError, OSError)) as caught:
        read(tmp_path / name)
    assert not trap.exists()
    assert "\n" not in str(caught.value)


def test_the_pickle_would_have_run(tmp_path, trap):
    pickle.loads(pickle.dumps(Touch(trap)))
    assert trap.exists()


# --- the shell ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["evil.py", "evil", "./evil:make", "evil.pt2"])
def test_code_is_imported_only_under_a_module_name(model, tmp_path, trap, monkeypatch):
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    shutil.copy(tmp_path / "evil.py", tmp_path / "evil.pt2")
    monkeypatch.chdir(tmp_path)
    assert invoke("layers", model, "--input-shape", "1,8,8")[0] == 2
    assert not trap.exists()


def test_data_folders_are_no_import_path(tmp_path, trap):
    folder = tmp_path / "photos"
    (folder / "cat").mkdir(parents=True)
    Image.new("L", (1, 1)).save(folder / "cat" / "a.png")
    for name in ("torch.py", "PIL.py", "__init__.py"):
        (folder / name).write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    load_data(folder)
    assert not trap.exists()
