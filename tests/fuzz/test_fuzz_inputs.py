"""Damaged files of every kind are refused with one clear line, quickly and without much memory."""

from __future__ import annotations

import gzip
import io
import json
import resource
import shutil
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from support.fuzzing.budget import settings_for
from support.fuzzing.damage import damage
from support.simulated import simulate
from support.stores import unseal
from torch import Tensor, nn

import pyablate as pa
from pyablate.analysis.unit_table import read_table
from pyablate.cli.data_specs import load_data
from pyablate.cli.model_specs import load_model
from pyablate.io.weights import load_state, read_state

REFUSALS = (ValueError, TypeError, OSError, ImportError)  # what the shell turns into one line
SECONDS = 20.0
GIGABYTES = 4.0  # of address space beyond what is there


@contextmanager
def little_memory() -> Iterator[None]:
    """Let no huge allocation pass unnoticed, even one that nobody touches."""
    known = Path("/proc/self/statm")
    if not known.exists():  # no Linux
        yield
        return
    pages = int(known.read_text().split()[0])
    now = pages * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + int(GIGABYTES * 2**30), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def ran_out(error: BaseException | None) -> bool:
    """Whether memory ran out before a reader noticed: a refusal that comes too late."""
    while error is not None:
        if isinstance(error, MemoryError) or "not enough memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def reads_or_refuses(read: Callable[[], object]) -> None:
    """Run a reader: it gives something, or one line that says what is wrong; never more."""
    start = time.monotonic()
    with little_memory():
        said, late = "", False
        try:
            read()
        except REFUSALS as error:
            said, late = str(error).strip() or repr(error), ran_out(error)
        assert len(said) < 2000
        assert not late, said
    assert time.monotonic() - start < SECONDS


# --- files ----------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    code = {"u1": 8, "i4": 12, "f4": 13}[array.dtype.str[1:]]
    header = struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


IMAGES = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
LABELS = np.array([0, 2, 1, 1, 0, 2], dtype=np.uint8)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.conv(x)).mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sound file of every kind."""
    folder = tmp_path_factory.mktemp("sound")
    (folder / "t-images-idx3-ubyte").write_bytes(idx(IMAGES))
    (folder / "t-labels-idx1-ubyte").write_bytes(idx(LABELS))
    (folder / "z-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(IMAGES), mtime=0))
    (folder / "z-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS), mtime=0))
    floats = IMAGES.astype(np.float32)
    np.savez(folder / "plain.npz", images=floats, labels=LABELS, class_names=["a", "b", "c"])
    np.savez_compressed(folder / "packed.npz", x=IMAGES, y=LABELS)
    np.save(folder / "labels.npy", LABELS)
    model = Small().eval()
    save_file(model.state_dict(), folder / "w.safetensors")
    torch.save(model.state_dict(), folder / "w.pth")
    torch.save(model.state_dict(), folder / "old.pt", _use_new_zipfile_serialization=False)
    program = torch.export.export(
        model, (torch.rand(3, 1, 5, 4),), dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    torch.export.save(program, folder / "net.pt2")
    for kind in ("png", "jpeg", "gif", "bmp", "webp", "tiff"):
        Image.fromarray(np.kron(IMAGES[0], np.ones((4, 4), np.uint8))).save(folder / f"i.{kind}")
    draw = np.random.default_rng(0)
    result = simulate(np.full((3, 2), 0.5), 0.5, 20, draw, ["x"] * 3)
    result.save(folder / "run.zarr")
    result.to_dataframe().to_csv(folder / "units.csv", index=False)
    return folder


def _weights(path: Path, _: Path) -> object:
    state = read_state(path)
    load_state(Small(), state, str(path))
    return None


def _decoded(path: Path, sound: Path) -> object:
    folder = path.parent / "photos" / "cat"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, folder / path.name)
    return list(load_data(folder.parent).batches)


def _idx_data(path: Path, sound: Path) -> object:
    return load_data(path, labels=sound / "t-labels-idx1-ubyte")


READERS: dict[str, Callable[[Path, Path], object]] = {
    "t-images-idx3-ubyte": _idx_data,
    "z-images-idx3-ubyte.gz": _idx_data,
    "plain.npz": lambda path, _: load_data(path),
    "packed.npz": lambda path, _: load_data(path),
    "labels.npy": lambda path, sound: load_data(sound / "plain.npz", labels=path),
    "t-labels-idx1-ubyte": lambda path, sound: load_data(sound / "plain.npz", labels=path),
    "w.safetensors": _weights,
    "w.pth": _weights,
    "old.pt": _weights,
    "net.pt2": lambda path, _: load_model(str(path)),
    "i.png": _decoded,
    "i.jpeg": _decoded,
    "i.gif": _decoded,
    "i.bmp": _decoded,
    "i.webp": _decoded,
    "i.tiff": _decoded,
    "units.csv": lambda path, _: read_table(path),
}


@pytest.mark.parametrize("name", READERS)
def test_damaged_files(name, sound, tmp_path_factory):
    whole = (sound / name).read_bytes()
    folder = tmp_path_factory.mktemp("damaged")
    reads_or_refuses(lambda: READERS[name](sound / name, sound))

    @settings_for(12)
    @given(damage())
    def check(change: Callable[[bytes], bytes]) -> None:
        path = folder / name
        path.write_bytes(change(whole))
        reads_or_refuses(lambda: READERS[name](path, sound))

    check()


def members(content: bytes, change: Callable[[str, bytes], bytes]) -> bytes:
    """Return an archive with members changed and their checksums right."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        for member in old.namelist():
            new.writestr(member, change(member, old.read(member)))
    return made.getvalue()


@pytest.mark.parametrize("name", ["plain.npz", "w.pth", "net.pt2"])
def test_damaged_members(name, sound, tmp_path_factory):
    """Checksums catch most damage to archives; here they are right."""
    whole = (sound / name).read_bytes()
    folder = tmp_path_factory.mktemp("members")
    with zipfile.ZipFile(sound / name) as archive:
        names = archive.namelist()

    @settings_for(15)
    @given(st.sampled_from(names), damage())
    def check(member: str, change: Callable[[bytes], bytes]) -> None:
        path = folder / name
        path.write_bytes(members(whole, lambda m, c: change(c) if m == member else c))
        reads_or_refuses(lambda: READERS[name](path, sound))

    check()


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 5)
    | st.sampled_from([1 << 31, 1 << 62, -(1 << 62), 0.5, float("nan"), "", "x", "\0", "x" * 999]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.just("a"), inner, max_size=1),
    max_leaves=4,
)


def replaced(content: Any, number: int, value: Any) -> Any:
    """Put a value in the place of the number-th entry of nested metadata."""
    places: list[tuple[Any, Any]] = []

    def visit(item: Any) -> None:
        entries = item.items() if isinstance(item, dict) else enumerate(item)
        for key, inner in list(entries):
            places.append((item, key))
            if isinstance(inner, dict | list):
                visit(inner)

    visit(content)
    holder, key = places[number % len(places)]
    holder[key] = value
    return content


def looked_at(result: pa.AblationResult) -> object:
    """What people do with a result they have read."""
    return (
        result.accuracy_drop,
        result.max_class_drop,
        [result.confusion(row) for row in range(len(result.units))],
        result.to_dataframe(),
        repr(result),
        result.significance(),
    )


def _store_files(store: Path) -> list[str]:
    return sorted(str(path.relative_to(store)) for path in store.rglob("*") if path.is_file())


def _restore(sound: Path, folder: Path) -> Path:
    store = folder / "run.zarr"
    shutil.rmtree(store, ignore_errors=True)
    shutil.copytree(sound / "run.zarr", store)
    unseal(store)  # what checksums would catch
    return store


def test_damaged_stores(sound, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    files = _store_files(sound / "run.zarr")

    @settings_for(30)
    @given(st.sampled_from(files), st.none() | damage())
    def check(name: str, change: Callable[[bytes], bytes] | None) -> None:
        store = _restore(sound, folder)
        path = store / name
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change(path.read_bytes()))
        reads_or_refuses(lambda: looked_at(pa.load(store)))
        reads_or_refuses(lambda: read_table(store))

    check()


def test_stores_with_other_metadata(sound, tmp_path_factory):
    folder = tmp_path_factory.mktemp("metadata")
    files = [name for name in _store_files(sound / "run.zarr") if name.endswith(".json")]

    @settings_for(40)
    @given(st.sampled_from(files), st.integers(0, 200), VALUES)
    def check(name: str, number: int, value: Any) -> None:
        store = _restore(sound, folder)
        path = store / name
        path.write_text(json.dumps(replaced(json.loads(path.read_text()), number, value)))
        reads_or_refuses(lambda: looked_at(pa.load(store)))

    check()


def test_stores_with_other_numbers(sound, tmp_path_factory):
    """Sound arrays whose numbers do not fit each other."""
    import zarr

    folder = tmp_path_factory.mktemp("numbers")
    arrays = "unit_layer unit_index label baseline flip_start flip_image flip_prediction".split()

    @settings_for(30)
    @given(
        st.sampled_from(arrays),
        st.integers(0, 50),
        st.sampled_from([-1, 0, 1, 2, 99, 1 << 30, -(1 << 31)]),
        st.booleans(),
    )
    def check(name: str, place: int, value: int, shorter: bool) -> None:
        store = _restore(sound, folder)
        group = zarr.open_group(store, mode="r+")
        values = np.asarray(group[name][...])  # type: ignore[index]
        if shorter:
            values = values[: place % (len(values) + 1)]
        elif len(values):
            values[place % len(values)] = value
        del group[name]
        group.create_array(name, data=values, config={"write_empty_chunks": True})
        reads_or_refuses(lambda: looked_at(pa.load(store)))

    check()


def test_arrays_of_other_kinds(tmp_path_factory):
    """Any arrays as data: numbers, or one line about what was expected."""
    path = tmp_path_factory.mktemp("arrays") / "a.npz"

    @settings_for(15)
    @given(
        shape=st.lists(st.integers(0, 4), max_size=5),
        dtype=st.sampled_from("u1 i1 u2 i8 f2 f4 f8 c8 b1 U3 S3 M8[s] O".split()),
        labels=st.lists(st.integers(-2, 5), max_size=4),
        label_type=st.sampled_from("u1 i8 f4 b1 U2".split()),
        bad=st.sampled_from([None, float("nan"), float("inf")]),
    )
    def check(
        shape: list[int], dtype: str, labels: list[int], label_type: str, bad: float | None
    ) -> None:
        values = np.zeros(shape, dtype="f4")
        if bad is not None and values.size:
            values.flat[0] = bad
        with np.errstate(invalid="ignore"):
            np.savez(path, images=values.astype(dtype), labels=np.array(labels).astype(label_type))
        reads_or_refuses(ablated)

    def ablated() -> object:
        return pa.ablate(Small().eval(), load_data(path).batches, progress=False, audit=2)

    check()
