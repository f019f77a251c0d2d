"""Damage to what is stored: refused, or without effect; never other numbers."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from support import runs
from support.faults import suspected
from support.runs import Killed
from support.simulated import small
from support.stores import OLD, as_of_then, contents, unseal

import pyablate as pa
from pyablate.analysis.unit_table import read_table
from pyablate.results import store
from pyablate.runs import blocks, fingerprint, run_folder
from pyablate.runs.run_folder import StoreMismatch
from pyablate.unit_attributes.files import write_attributes


def run(place: Path, stop_at: int | None = None, **options: Any) -> pa.AblationResult:
    plain = {"intervention": "mean", "measures": ["loss"]}
    return runs.run(place, stop_at, **{**plain, **options})


def bits(folder: Path, count: int, seed: int) -> Iterator[Path]:
    """Flip random single bits one at a time, as many in each file; say in which."""
    chance = random.Random(seed)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        sound = path.read_bytes()
        for _ in range(-(-count // len(files))):
            flipped = bytearray(sound)
            flipped[chance.randrange(len(sound))] ^= 1 << chance.randrange(8)
            path.write_bytes(flipped)
            yield path
            path.write_bytes(sound)


def refused(folder: Path, count: int, seed: int, read: Callable[[], str], error: Any) -> int:
    """How many flipped bits are noticed; the others must be without effect."""
    expected, found = read(), 0
    for path in bits(folder, count, seed):
        try:
            assert read() == expected, path
        except error:
            found += 1
    return found


def everything(result: pa.AblationResult) -> str:
    """All that a result says, with every digit."""
    flips = [array for array in vars(result.flips).values() if array is not None]
    arrays = [result.labels, result.baseline, *flips]
    parts = [(array.dtype.str, array.tolist()) for array in arrays]
    sums = {name: (one.change.tolist(), one.accuracy) for name, one in result.measures.items()}
    plain = (result.class_names, result.intervention, result.audit, result.strategy)
    return repr((parts, sums, result.units.to_dict(), plain, result.provenance))


def test_no_bit_of_a_result_flips_unseen(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_say_unsealed", lambda source: None)
    run(tmp_path / "run.zarr")
    read = lambda: everything(pa.load(tmp_path / "run.zarr"))  # noqa: E731
    assert refused(tmp_path / "run.zarr", 400, 0, read, OSError) > 300


def test_without_checksums_bits_flip_unseen(tmp_path):
    """The test above can fail."""
    run(tmp_path / "run.zarr")
    unseal(tmp_path / "run.zarr")
    expected = everything(pa.load(tmp_path / "run.zarr"))
    different = 0
    for _ in bits(tmp_path / "run.zarr", 400, seed=0):
        with contextlib.suppress(OSError):
            different += everything(pa.load(tmp_path / "run.zarr")) != expected
    assert different > 5


def test_no_bit_of_a_table_flips_unseen(tmp_path):
    values = np.random.default_rng(0).normal(size=(3, 2))
    labels = ["a:0", "a:1", "a:2"]
    found = xr.Dataset(
        {"l1": ("unit", values[:, 0]), "selectivity": (("unit", "class"), values)},
        coords={"unit": labels, "class": ["cat", "dog"]},
        attrs={"images": 7},
    )
    write_attributes(found, tmp_path / "table.zarr")
    with xr.open_zarr(tmp_path / "table.zarr") as opened:  # as anybody reads it
        xr.testing.assert_equal(opened.load(), found)

    def read() -> str:
        table = read_table(tmp_path / "table.zarr")
        attributes = {name: value for name, value in table.attrs.items() if name != "checksums"}
        return f"{table.to_dict(data='list') | {'attrs': None}} {attributes}"

    assert refused(tmp_path / "table.zarr", 300, 1, read, OSError) > 100
    gc.collect()  # of Zarr's failed tasks: within ast.parse it would break Python 3.11


def test_no_bit_of_a_block_flips_unseen(tmp_path, monkeypatch):
    """Of finished blocks and of one at work: damaged, and computed again, or without effect."""
    monkeypatch.setattr(run_folder, "SECONDS", 0.0)
    with pytest.raises(Killed):
        run(tmp_path / "run.zarr", stop_at=6)
    folder = tmp_path / "run.zarr/blocks"
    known = json.loads((folder / "manifest.json").read_text())["identity"]
    readers = {".begun.npz": blocks.read_partial, ".npz": blocks.read_block}
    names = sorted(path.name for path in folder.glob("0*.npz"))
    assert [name[9:] for name in names] == [".npz", ".begun.npz"]

    def read(path: Path) -> str | None:
        found = readers[path.name[9:]](path, fingerprint.fingerprint(known))
        if found is None:
            return None
        known_metadata = vars(found.metadata) | {
            name: (one.change.tolist(), one.accuracy)
            for name, one in found.metadata.measures.items()
        }
        known_metadata.pop("measures")
        if isinstance(found, blocks.PartialBlock):
            return repr(
                (found.jobs, [[x.tolist() for x in y] for y in found.chunks], known_metadata)
            )
        flips = [array for array in vars(found.flips).values() if array is not None]
        arrays = [found.labels, found.baseline, *flips]
        return repr(([array.tolist() for array in arrays], known_metadata))

    expected = {folder / name: read(folder / name) for name in names}
    assert None not in expected.values()
    damaged = 0
    for path in bits(folder, 1200, seed=2):
        if path not in expected:
            continue
        found = read(path)
        damaged += found is None
        assert found in (None, expected[path])
    assert damaged > 300


def test_no_bit_of_what_a_run_begins_with_flips_unseen(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path / "run.zarr", stop_at=2)
    place = tmp_path / "run.zarr"

    def read() -> str:
        arrays, manifest = run_folder.read_statistics(place), run_folder._read_manifest(place)
        assert manifest is not None
        used = [manifest[name] for name in ("identity", "block", "memory")]
        return repr((used, [(name, arrays[name].tolist()) for name in arrays]))

    assert refused(place, 400, 3, read, StoreMismatch) > 200


def test_what_others_add_does_not_matter(tmp_path):
    run(tmp_path / "run.zarr")
    expected = everything(pa.load(tmp_path / "run.zarr"))
    group = zarr.open_group(tmp_path / "run.zarr", mode="r+")
    group.attrs["comment"] = "the one for the paper"
    group.create_array("mine", data=np.arange(3))
    (tmp_path / "run.zarr/label/notes.txt").write_text("mine")
    with pytest.warns(zarr.errors.ZarrUserWarning):  # about the note and consolidation
        zarr.consolidate_metadata(tmp_path / "run.zarr", zarr_format=3)
    assert everything(pa.load(tmp_path / "run.zarr")) == expected


def test_a_chunk_of_another_result_is_damage(tmp_path):
    """What a checksum of each chunk by itself would not tell."""
    run(tmp_path / "run.zarr")
    run(tmp_path / "other.zarr", intervention="zero")
    for name in ("flip_image", "flip_prediction", "flip_start"):
        shutil.rmtree(tmp_path / "run.zarr" / name)
        shutil.copytree(tmp_path / "other.zarr" / name, tmp_path / "run.zarr" / name)
    with pytest.raises(OSError, match=r"damaged result .*the array 'flip_image' is not as it was"):
        pa.load(tmp_path / "run.zarr")


@pytest.mark.parametrize(
    "held", [[], {}, 1, {"arrays": {}, "attributes": {}}, {"arrays": {"../x": ""}}]
)
def test_checksums_that_are_none(store, held):
    metadata = json.loads((store / "zarr.json").read_text())
    metadata["attributes"]["checksums"] = held
    (store / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(OSError, match=r"damaged result .*checksums"):
        pa.load(store)
    with pytest.raises(OSError, match="checksums"):
        small().save(store)


# Stored by the last version without checksums


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What it stored, and the versions of then."""
    shutil.copytree(OLD / "finished.zarr", tmp_path / "finished.zarr")
    as_of_then("unfinished.zarr", tmp_path, monkeypatch)
    return tmp_path


def test_an_older_result_loads_with_a_note(old, caplog):
    with caplog.at_level(logging.INFO, "pyablate"):
        first = pa.load(old / "finished.zarr")
        pa.load(old / "finished.zarr")
    assert len(re.findall("written without checksums", caplog.text)) == 1
    assert len(first.labels) == 23
    again = run(old / "finished.zarr")  # compares everything, images too
    assert everything(again) == everything(first)
    assert contents(old / "finished.zarr") == contents(OLD / "finished.zarr")


def test_an_older_run_goes_on(old, caplog):
    seen: list[int] = []
    found = run(old / "unfinished.zarr", progress=lambda done, total, layer: seen.append(done))
    assert seen[0] > 0
    assert "without a checksum, by an older version" in caplog.text
    assert "damaged" not in caplog.text
    before = pa.load(OLD / "finished.zarr")
    np.testing.assert_array_equal(found.predictions(), before.predictions())
    assert found.provenance == before.provenance
    assert found.audit == before.audit


def test_blocks_of_an_older_run_are_computed_again_where_a_layer_was_found_wrong(
    old, monkeypatch, caplog
):
    before = pa.load(OLD / "finished.zarr")
    suspected(monkeypatch, len(before.labels) - 1, {"1": 1})
    found = run(old / "unfinished.zarr")
    assert "finished blocks are computed again, with the care that others needed: 1" in caplog.text
    np.testing.assert_array_equal(found.predictions(), before.predictions())
    assert found.audit == replace(before.audit, mended=1)


def test_an_older_result_is_replaced(old):
    (old / "finished.zarr/notes.txt").write_text("mine")
    run(old / "finished.zarr", fresh=True, intervention="zero")
    assert (old / "finished.zarr/notes.txt").read_text() == "mine"
    assert pa.load(old / "finished.zarr").intervention == "zero"
