"""Nothing that is loaded runs code, leads out of its folder or takes all the memory.

SECURITY.md says what is promised; every promise has its tests here.
"""

from __future__ import annotations

import ast
import io
import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from PIL import Image
from support.simulated import simulate
from support.stores import unseal
from support.touch import Touch
from typer.testing import CliRunner

import pyablate as pa
from pyablate.analysis.unit_table import read_table
from pyablate.cli.app import app
from pyablate.cli.data_specs import load_data
from pyablate.cli.model_specs import load_model
from pyablate.io import image_folder
from pyablate.io.zarr_check import check_folder

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
IMPORTERS = {"model_specs.py", "_native.py", "image_folder.py"}  # of what the user names


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
def test_no_module_can_run_what_it_reads(path: Path) -> None:
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
def test_the_search_would_find_it(line: str) -> None:
    assert faults(line, "store.py") != []


# --- pickles in every kind of input ---------------------------------------------------------------


def in_checkpoint(folder: Path, evil: Touch) -> Callable[[], object]:
    torch.save({"state_dict": {"weight": torch.zeros(1), "x": evil}}, folder / "a.pth")
    return lambda: load_model("demo:vgg_bn", folder / "a.pth")


def in_old_checkpoint(folder: Path, evil: Touch) -> Callable[[], object]:
    torch.save({"x": evil}, folder / "a.pt", _use_new_zipfile_serialization=False)
    return lambda: load_model("demo:vgg_bn", folder / "a.pt")


def in_bare_pickle(folder: Path, evil: Touch) -> Callable[[], object]:
    (folder / "a.bin").write_bytes(pickle.dumps(evil))
    return lambda: load_model("demo:vgg_bn", folder / "a.bin")


def in_safetensors(folder: Path, evil: Touch) -> Callable[[], object]:
    (folder / "a.safetensors").write_bytes(pickle.dumps(evil))
    return lambda: load_model("demo:vgg_bn", folder / "a.safetensors")


def in_npz(folder: Path, evil: Touch) -> Callable[[], object]:
    np.savez(folder / "a.npz", images=np.array([evil], dtype=object), labels=np.zeros(1, int))
    return lambda: load_data(folder / "a.npz")


def in_npz_names(folder: Path, evil: Touch) -> Callable[[], object]:
    names = np.array([evil, "b"], dtype=object)
    images = np.zeros((2, 3, 3), np.float32)
    np.savez(folder / "a.npz", images=images, labels=np.zeros(2, int), class_names=names)
    return lambda: load_data(folder / "a.npz")


def in_npz_member(folder: Path, evil: Touch) -> Callable[[], object]:
    with zipfile.ZipFile(folder / "a.npz", "w") as archive:
        archive.writestr("images", pickle.dumps(evil))
        archive.writestr("labels.npy", pickle.dumps(evil))
    return lambda: load_data(folder / "a.npz")


def in_labels(folder: Path, evil: Touch) -> Callable[[], object]:
    np.savez(folder / "a.npz", images=np.zeros((1, 3, 3), np.float32))
    np.save(folder / "labels.npy", np.array([evil], dtype=object), allow_pickle=True)
    return lambda: load_data(folder / "a.npz", labels=folder / "labels.npy")


def in_bare_labels(folder: Path, evil: Touch) -> Callable[[], object]:
    np.savez(folder / "a.npz", images=np.zeros((1, 3, 3), np.float32))
    (folder / "labels.npy").write_bytes(pickle.dumps(evil))
    return lambda: load_data(folder / "a.npz", labels=folder / "labels.npy")


def in_image(folder: Path, evil: Touch) -> Callable[[], object]:
    (folder / "photos" / "cat").mkdir(parents=True)
    (folder / "photos" / "cat" / "a.png").write_bytes(pickle.dumps(evil))
    return lambda: list(load_data(folder / "photos").batches)


def in_csv(folder: Path, evil: Touch) -> Callable[[], object]:
    (folder / "a.csv").write_bytes(pickle.dumps(evil))
    return lambda: read_table(folder / "a.csv")


def in_result(folder: Path, evil: Touch) -> Callable[[], object]:
    store = old_store(folder, evil, dtype="|O", filters=[{"id": "vlen-utf8"}, {"id": "pickle"}])
    return lambda: pa.load(store)


def in_compressor(folder: Path, evil: Touch) -> Callable[[], object]:
    store = old_store(folder, evil, compressor={"id": "pickle"}, filters=[{"id": "vlen-utf8"}])
    return lambda: pa.load(store)


def in_table(folder: Path, evil: Touch) -> Callable[[], object]:
    store = old_store(folder, evil, dtype="|O", filters=[{"id": "pickle"}])
    return lambda: read_table(store)


def old_store(folder: Path, evil: Touch, **described: Any) -> Path:
    """Return a group of Zarr format 2, whose codecs may unpickle."""
    store = folder / "a.zarr"
    (store / "label").mkdir(parents=True)
    array = {
        **{"zarr_format": 2, "shape": [2], "chunks": [2], "dtype": "|O", "compressor": None},
        **{"fill_value": 0, "order": "C", "filters": None},
    }
    (store / ".zgroup").write_text('{"zarr_format": 2}')
    (store / ".zattrs").write_text(
        '{"pyablate_format": 1, "layers": ["a"], "unit_labels": ["a:0"]}'
    )
    (store / "label" / ".zarray").write_text(json.dumps(array | described))
    (store / "label" / ".zattrs").write_text('{"_ARRAY_DIMENSIONS": ["unit"]}')
    (store / "label" / "0").write_bytes(pickle.dumps(evil))
    return store


PICKLES = {
    name: make
    for name, make in list(globals().items())
    if name.startswith("in_") and callable(make)
}


@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_is_never_run(kind: str, tmp_path: Path, trap: Path) -> None:
    load = PICKLES[kind](tmp_path, Touch(trap))
    with pytest.raises((ValueError, OSError)) as caught:
        load()
    assert not trap.exists()
    assert "\n" not in str(caught.value)


def test_the_pickle_would_have_run(tmp_path: Path, trap: Path) -> None:
    pickle.loads(pickle.dumps(Touch(trap)))
    assert trap.exists()


# --- stores ---------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    simulate(np.full((3, 2), 0.5), 0.5, 4, draw, ["x"] * 3).save(tmp_path / "run.zarr")
    return tmp_path / "run.zarr"


@pytest.mark.parametrize("what", ["label/c/0", "label", "label/zarr.json", "extra"])
def test_a_store_that_leads_elsewhere_is_refused(store: Path, what: str) -> None:
    outside = store.parent / "outside"
    place = store / what
    if place.exists():
        shutil.move(place, outside)
    else:
        outside.write_text("secret")
    place.symlink_to(outside)
    with pytest.raises(OSError, match="symbolic link"):
        pa.load(store)


def test_a_store_may_be_reached_through_a_link(store: Path) -> None:
    link = store.parent / "latest.zarr"
    link.symlink_to(store)
    assert len(pa.load(link).units) == 3


def test_a_store_with_a_link_is_not_replaced(store: Path) -> None:
    outside = store.parent / "outside"
    outside.mkdir()
    (outside / "precious.txt").write_text("kept")
    result = pa.load(store)
    (store / "link").symlink_to(outside)
    with pytest.raises(OSError, match="holds link, which pyablate did not write"):
        result.save(store)
    assert (outside / "precious.txt").read_text() == "kept"
    (store / "link").unlink()
    assert len(pa.load(store).units) == 3


def test_names_in_a_store_are_no_paths(store: Path, tmp_path: Path) -> None:
    """Layer and class names go into columns, never into file names."""
    unseal(store)
    metadata = json.loads((store / "zarr.json").read_text())
    metadata["attributes"]["layers"] = ["../../escape"]
    metadata["attributes"]["unit_labels"] = [f"../../escape:{unit}" for unit in range(3)]
    metadata["attributes"]["class_names"] = ["/etc/passwd", "../up"]
    (store / "zarr.json").write_text(json.dumps(metadata))
    before = set(tmp_path.rglob("*"))
    pa.load(store).save(tmp_path / "again.zarr")
    made = set(tmp_path.rglob("*")) - before
    assert made
    assert all(path.is_relative_to(tmp_path / "again.zarr") for path in made)


@pytest.mark.parametrize("name", ["label", "flip_image"])
@pytest.mark.parametrize("shape", [[1 << 50], [1 << 20, 1 << 20], [-1], ["8"], None])
def test_a_store_that_claims_too_much(store: Path, name: str, shape: Any) -> None:
    path = store / name / "zarr.json"
    metadata = json.loads(path.read_text())
    metadata["shape"] = shape
    path.write_text(json.dumps(metadata))
    with pytest.raises(OSError, match="shape"):
        pa.load(store)


def test_metadata_that_claim_to_be_deep(store: Path) -> None:
    (store / "label" / "zarr.json").write_text("[" * 100_000)
    with pytest.raises(OSError, match="damaged metadata"):
        pa.load(store)


def test_metadata_that_are_too_long(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (store / "label" / "zarr.json").stat().st_size
    monkeypatch.setattr("pyablate.io.zarr_check.MAX_METADATA", size - 1)
    with pytest.raises(OSError, match=f"expected at most {size - 1} bytes of metadata"):
        pa.load(store)


def put(place: int, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values[place] = value
        return values

    return change


MISFITS: list[tuple[str, Callable[[np.ndarray], np.ndarray]]] = [
    ("flip_start", put(0, 1)),
    ("flip_start", put(1, 1 << 30)),
    ("flip_start", put(-1, 1 << 30)),
    ("flip_start", lambda values: values[:-1]),
    ("flip_image", put(0, -1)),
    ("flip_image", put(0, 1 << 30)),
    ("flip_image", lambda values: values.astype(np.float32)),
    ("flip_prediction", put(0, 2)),
    ("flip_prediction", lambda values: values[1:]),
    ("label", put(0, -1)),
    ("label", put(0, 2)),
    ("baseline", put(0, 2)),
    ("baseline", lambda values: values[1:]),
    ("baseline", lambda values: values.reshape(2, -1)),
]


@pytest.mark.parametrize("number", range(len(MISFITS)))
def test_a_store_whose_numbers_do_not_fit(store: Path, number: int) -> None:
    """An index out of range must be found before anything is indexed with it."""
    unseal(store)
    name, change = MISFITS[number]
    group = zarr.open_group(store, mode="r+")
    values = change(np.asarray(group[name][...]))  # type: ignore[index]
    del group[name]
    group.create_array(name, data=values, config={"write_empty_chunks": True})
    with pytest.raises(OSError, match=f"damaged result .*{name} does not fit"):
        pa.load(store)


def test_a_sound_store_passes(store: Path) -> None:
    check_folder(store)


# --- images and arrays ----------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """Return a PNG file that claims a size in a few bytes."""
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def photos(folder: Path, content: bytes, name: str = "a.png") -> Path:
    (folder / "photos" / "cat").mkdir(parents=True)
    (folder / "photos" / "cat" / name).write_bytes(content)
    return folder / "photos"


@pytest.mark.parametrize("size", [(9_500, 9_500), (100_000, 100_000), (1, 2_000_000_000)])
def test_an_image_that_claims_too_much(tmp_path: Path, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"data: '.*a.png' is too large"):
        list(load_data(photos(tmp_path, png_header(*size))).batches)


def test_a_long_animation_is_its_first_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [Image.new("L", (8, 8), 255 * (n > 0)) for n in range(200)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=10)
    from PIL import GifImagePlugin

    seeks: list[int] = []
    monkeypatch.setattr(
        GifImagePlugin.GifImageFile, "seek", lambda _self, frame: seeks.append(frame)
    )
    data = load_data(photos(tmp_path, buffer.getvalue(), "a.gif"))
    images, _ = next(iter(data.batches))
    assert images.shape == (1, 3, 8, 8)
    assert float(images.max()) == 0
    assert seeks == []


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tif", "ppm", "gif"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.9])
def test_truncated_images(tmp_path: Path, suffix: str, keep: float) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    kinds = {"jpg": "JPEG", "tif": "TIFF"}
    Image.fromarray(pixels).save(buffer, kinds.get(suffix, suffix.upper()))
    whole = buffer.getvalue()
    folder = photos(tmp_path, whole[: int(keep * len(whole))], f"a.{suffix}")
    with pytest.raises(ValueError, match=r"data: cannot decode '.*a\.\w+'"):
        list(load_data(folder).batches)


def test_the_limit_of_pixels_is_pillows_own() -> None:
    assert Image.MAX_IMAGE_PIXELS == image_folder.MAX_PIXELS


def npy_header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue()


@pytest.mark.parametrize("shape", [(1 << 60,), (1 << 34, 28, 28), (1 << 62, 1 << 62)])
def test_arrays_that_claim_too_much(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", npy_header(shape))
        archive.writestr("labels.npy", npy_header((3,), "<i8") + bytes(24))
    with pytest.raises(ValueError, match=r"data: .*a.npz'"):
        load_data(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", images=np.zeros((1, 3, 3), np.float32))
    (tmp_path / "labels.npy").write_bytes(npy_header(shape, "<i8"))
    with pytest.raises(ValueError, match=r"labels: cannot read '.*labels.npy'"):
        load_data(tmp_path / "b.npz", labels=tmp_path / "labels.npy")


def test_a_checkpoint_that_unpacks_to_too_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"")
        archive.writestr("a/data/0", bytes(1 << 20))
    monkeypatch.setattr("pyablate.io.weights.MAX_BYTES", 1 << 19)
    with pytest.raises(ValueError, match=r"weights: '.*a.pth' unpacks to \d+ bytes, the limit is"):
        load_model("demo:vgg_bn", tmp_path / "a.pth")


# --- the shell ------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["evil.py", "evil", "./evil:make", "evil.pt2"])
def test_code_is_imported_only_under_a_module_name(
    model: str, tmp_path: Path, trap: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    shutil.copy(tmp_path / "evil.py", tmp_path / "evil.pt2")
    monkeypatch.chdir(tmp_path)
    outcome = CliRunner().invoke(app, ["layers", model, "--input-shape", "1,8,8"])
    assert outcome.exit_code == 2
    assert not trap.exists()


def test_data_folders_are_no_import_path(tmp_path: Path, trap: Path) -> None:
    folder = photos(tmp_path, png_header(1, 1))
    for name in ("torch.py", "PIL.py", "__init__.py"):
        (folder / name).write_text(f"import os\nos.mkdir({str(trap)!r})\n")
    load_data(folder)
    assert not trap.exists()
