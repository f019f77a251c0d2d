"""Stores that are damaged, that lie about their size, or that lead elsewhere, are refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import zarr
from support.shelled import invoke
from support.simulated import simulate
from support.stores import unseal

import pyablate as pa
from pyablate.analysis.unit_table import read_table
from pyablate.io.zarr_check import MAX_RATIO, check_folder
from pyablate.runs.run_folder import check_place

Damage = Callable[[Path], object]


def linked(what: str) -> Damage:
    """What belongs into the store lies outside, and a link leads there."""

    def damage(store: Path) -> None:
        outside, place = store.parent / "outside", store / what
        if place.exists():
            shutil.move(place, outside)
        else:
            outside.write_text("secret")
        place.symlink_to(outside)

    return damage


def claims(name: str, **changes: Any) -> Damage:
    """The description of an array says something else."""

    def damage(store: Path) -> None:
        path = store / name / "zarr.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def numbers(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Damage:
    """A sound array whose numbers do not fit the others'; of an older store, without checksums."""

    def damage(store: Path) -> None:
        unseal(store)
        group = zarr.open_group(store, mode="r+")
        values = change(np.asarray(group[name][...]))  # type: ignore[index]
        del group[name]
        group.create_array(name, data=values, config={"write_empty_chunks": True})

    return damage


def put(place: int, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values[place] = value
        return values

    return change


def of_format(number: int) -> Damage:
    def damage(store: Path) -> None:
        metadata = json.loads((store / "zarr.json").read_text())
        metadata["attributes"]["pyablate_format"] = number
        (store / "zarr.json").write_text(json.dumps(metadata))

    return damage


CHUNK = {"name": "regular", "configuration": {"chunk_shape": [1 << 31]}}
STRETCHED = {"name": "fixed_length_utf32", "configuration": {"length_bytes": 1 << 30}}
TOO_MUCH = "what is stored can hold at most"
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
DAMAGED: list[tuple[Damage, str]] = [
    *((linked(what), "symbolic link") for what in ("label/c/0", "label", "label/zarr.json", "x")),
    *(
        (claims(name, shape=shape), "shape")
        for name in ("label", "flip_image")
        for shape in ([1 << 50], [1 << 20, 1 << 20], [-1], ["8"], None)
    ),
    (lambda store: (store / "label/zarr.json").write_text("[" * 100_000), "damaged metadata"),
    (claims("label", shape=[1 << 31]), r"label: \d+ of its \d+ chunks are missing"),
    (claims("label", shape=[1 << 31], chunk_grid=CHUNK), r"claim 17179\d+ bytes, what is"),
    (claims("label", chunk_grid=CHUNK), rf"claim 17179\d+ bytes, {TOO_MUCH}"),
    (claims("label", data_type=STRETCHED), TOO_MUCH),
    (claims("label", data_type="r8000000000"), TOO_MUCH),
    (claims("label", shape=[1 << 40]), "larger than the limit"),
    (claims("label", chunk_grid=None), "expected chunks for the shape"),
    *(
        (lambda store, name=name: (store / name / "c/0").unlink(), f"{name}: 1 of its 1 chunks are")
        for name in ("label", "unit_layer", "flip_start", "flip_image")  # no chunk of zeros
    ),
    # An index out of range must be found before anything is indexed with it.
    *((numbers(*misfit), f"damaged result .*{misfit[0]} does not fit") for misfit in MISFITS),
    (of_format(99), "not a pyablate result of format 1"),
    (lambda store: (store / "zarr.json").unlink(), "not a pyablate result"),
    (lambda store: shutil.rmtree(store), "no such result"),
]


@pytest.mark.parametrize("number", range(len(DAMAGED)))
def test_a_damaged_store_is_refused(store, number):
    damage, said = DAMAGED[number]
    check_folder(store)
    damage(store)
    with pytest.raises(OSError, match=said):
        pa.load(store)


def test_a_store_may_be_reached_through_a_link(store):
    link = store.parent / "latest.zarr"
    link.symlink_to(store)
    assert len(pa.load(link).units) == 3


def test_a_store_with_a_link_is_not_replaced(store):
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


def test_names_in_a_store_are_no_paths(store, tmp_path):
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


def test_metadata_that_are_too_long(store, monkeypatch):
    size = (store / "label" / "zarr.json").stat().st_size
    monkeypatch.setattr("pyablate.io.zarr_check.MAX_METADATA", size - 1)
    with pytest.raises(OSError, match=f"expected at most {size - 1} bytes of metadata"):
        pa.load(store)


def test_many_claims_count_together(tmp_path):
    group = zarr.open_group(tmp_path / "table.zarr", mode="w")
    for number in range(20):
        group.create_array(f"a{number}", shape=1 << 20, dtype="f8")
    with pytest.raises(OSError, match=f"claim {20 << 23} bytes"):
        check_folder(tmp_path / "table.zarr")


def test_arrays_that_would_not_fit_into_memory(store, monkeypatch):
    draw = np.random.default_rng(0)
    store = store.with_name("large.zarr")
    group = zarr.open_group(store, mode="w")
    group.create_array("x", data=draw.integers(0, 9, 10_000_000, dtype=np.int8))
    check_folder(store, whole=True)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=70 << 20))
    with pytest.raises(OSError, match=f"its arrays take 80000000 bytes, {70 << 20} are free"):
        check_folder(store)


def test_results_of_nothing_but_zeros_come_back(tmp_path):
    """Their chunks are written all the same: one layer, one class, no flips."""
    draw = np.random.default_rng(0)
    made = simulate(np.zeros((3, 2)), 1.0, 4, draw, ["x"] * 3)
    made = dataclasses.replace(made, labels=made.labels * 0, baseline=made.baseline * 0)
    made.save(tmp_path / "run.zarr")
    assert (pa.load(tmp_path / "run.zarr").labels == 0).all()


def test_nothing_that_our_codec_can_pack_is_refused(tmp_path):
    """Constant numbers are what Zstandard packs best."""
    for number in (0, 7):
        path = tmp_path / f"{number}.zarr"
        group = zarr.open_group(path, mode="w")
        values = np.full(1 << 24, number, np.int64)
        group.create_array("x", data=values, config={"write_empty_chunks": True})
        check_folder(path, whole=True)
        stored = sum(file.stat().st_size for file in (path / "x" / "c").rglob("*"))
        assert values.nbytes < MAX_RATIO * stored


# --- neither files nor folders --------------------------------------------------------------------


@pytest.fixture
def soon() -> Iterator[None]:
    """Nothing may wait for somebody to write into a named pipe."""

    def stop(*_: Any) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("name", ["zarr.json", "label/zarr.json", "label/c/0", "extra", ".zattrs"])
@pytest.mark.parametrize("read", [pa.load, read_table, check_place, pa.AblationResult.save])
def test_a_pipe_in_a_store(store, name, read):
    loaded = pa.load(store)
    (store / name).unlink(missing_ok=True)
    os.mkfifo(store / name)
    if read is pa.AblationResult.save:
        if name in ("zarr.json", ".zattrs"):
            with pytest.raises(OSError, match=f"{name} is neither a file nor a folder"):
                loaded.save(store)
        return
    with pytest.raises(OSError, match=f"{name} is neither a file nor a folder"):
        read(store)


@pytest.mark.usefixtures("soon", "empty_folder")
@pytest.mark.parametrize(
    "words",
    [
        "run demo:vgg_bn --data pipe",
        "run demo:vgg_bn --data pipe.npz",
        "run demo:vgg_bn --data plain.npz --labels pipe",
        "run demo:vgg_bn --data plain.npz --labels pipe.npy",
        "run demo:vgg_bn --data demo --weights pipe",
        "run demo:vgg_bn --data demo --weights pipe.safetensors",
        "run pipe.pt2 --data demo",
        "run demo:vgg_bn --data demo --output pipe",
        "run demo:vgg_bn --data demo --output pipe.zarr",
        "report pipe",
        "report pipe.zarr",
        "plot pipe",
        "plot pipe --kind cumulative",
        "significance pipe",
        "merge pipe pipe.zarr",
        "correlate run.zarr pipe",
        "correlate pipe pipe",
        "prune demo:vgg_bn --data demo --limit 8 --by pipe",
        "cumulative demo:vgg_bn --data demo --limit 8 --order pipe.csv",
        "sensitivity demo:vgg_bn --data demo --limit 8 --csv pipe.csv",
    ],
)
def test_a_pipe_where_a_file_is_expected(store, words):
    np.savez("plain.npz", images=np.zeros((1, 28, 28), np.float32), labels=np.zeros(1, int))
    for suffix in ("", ".npz", ".npy", ".safetensors", ".pt2", ".zarr", ".csv"):
        os.mkfifo(f"pipe{suffix}")
    code, said = invoke(*words.split())
    assert code == 2, said
    assert "pyablate: " in said
