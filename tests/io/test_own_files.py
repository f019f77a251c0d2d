"""What people put into the folder of a run stays there, or the work is refused beforehand."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from support import runs
from support.runs import Killed
from support.simulated import small
from support.stores import contents, unseal

import pyablate as pa
from pyablate.io import own_files
from pyablate.results import store
from pyablate.unit_attributes.files import write_attributes

IMAGES = 13
run = partial(runs.run, images=IMAGES)


@pytest.fixture
def result() -> pa.AblationResult:
    return small()


def notes(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")


def a_store(folder: Path) -> None:
    """A store of which Zarr leaves chunks out: those of nothing but zeros."""
    group = zarr.create_group(folder / "mean.zarr")
    group.create_array("x", shape=(5,), chunks=(1,), dtype="f4")[:2] = 1


def another_result(folder: Path) -> None:
    small(seed=1).save(folder / "old.zarr")


def among_the_blocks(folder: Path) -> None:
    (folder / "blocks" / "old").mkdir(parents=True)
    (folder / "blocks" / "notes.txt").write_text("mine")
    (folder / "blocks" / "old" / "000000000.npz").write_text("mine")


def an_empty_folder(folder: Path) -> None:
    (folder / "for later").mkdir()


LEFT: list[Callable[[Path], None]] = [
    notes,
    a_store,
    another_result,
    among_the_blocks,
    an_empty_folder,
]


def added(folder: Path, put: Callable[[Path], None]) -> dict[str, bytes]:
    before = contents(folder)
    put(folder)
    return {name: what for name, what in contents(folder).items() if name not in before}


@pytest.mark.parametrize("put", LEFT)
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("finished", [False, True])
def test_what_lies_beside_is_left(tmp_path, put, fresh, finished):
    """Resumed, finished, and begun anew: the run's own files are right, the others as they were."""
    run(tmp_path / "whole.zarr", intervention="mean")
    place = tmp_path / "run.zarr"
    if finished:
        run(place, intervention="mean")
    else:
        with pytest.raises(Killed):
            run(place, stop_at=4, intervention="mean")
    mine = added(place, put)
    run(place, intervention="mean", fresh=fresh)
    assert contents(place) == {**contents(tmp_path / "whole.zarr"), **mine}
    assert (put is not an_empty_folder) or (place / "for later").is_dir()
    assert len(pa.load(place).labels) == IMAGES


@pytest.mark.parametrize("put", LEFT)
def test_a_kill_anywhere_leaves_what_lies_beside(tmp_path, monkeypatch, put):
    run(tmp_path / "whole.zarr")
    run(tmp_path / "old.zarr", intervention="mean")
    mine = added(tmp_path / "old.zarr", put)
    for step in ("rename", "unlink"):
        real = getattr(os, step)
        for number in (0, 1, 3, 8, 10):
            place = tmp_path / "run.zarr"
            shutil.copytree(tmp_path / "old.zarr", place)
            left = [number]

            def fail(*arguments: Any, left: list[int] = left, real: Any = real, **o: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return real(*arguments, **o)

            monkeypatch.setattr(os, step, fail)
            with pytest.raises(Killed):
                run(place, fresh=True)
            monkeypatch.undo()
            run(place, fresh=True)
            assert contents(place) == {**contents(tmp_path / "whole.zarr"), **mine}
            shutil.rmtree(place)


@pytest.mark.parametrize("name", ["label", "zarr.json", "loss_change_sum"])
@pytest.mark.parametrize("fresh", [False, True])
def test_what_is_in_the_way_is_refused_before_the_work(tmp_path, name, fresh):
    place = tmp_path / "run.zarr"
    with pytest.raises(Killed):
        run(place, stop_at=4)
    if name == "zarr.json":
        xr.Dataset({"x": ("n", [1.0])}).to_zarr(place, group="mine", consolidated=False)
    else:
        (place / name).mkdir()
        (place / name / "zarr.json").write_text("{}")
    before = contents(place)
    calls: list[Any] = []
    with pytest.raises(OSError, match=f"holds {name}, which pyablate did not write"):
        run(place, fresh=fresh, progress=lambda *step: calls.append(step))
    assert not calls
    assert contents(place) == before


def test_what_comes_into_the_way_during_the_run_is_not_replaced(tmp_path):
    run(tmp_path / "whole.zarr")
    place = tmp_path / "run.zarr"

    def report(done: int, total: int, layer: str) -> None:
        (place / "label").mkdir(exist_ok=True)

    with pytest.raises(OSError, match="holds label, which pyablate did not write"):
        run(place, progress=report)
    assert (place / "label").is_dir()
    (place / "label").rmdir()
    calls: list[int] = []
    run(place, progress=lambda done, total, layer: calls.append(total - done))
    assert calls[0] == 0  # nothing was lost
    assert contents(place) == contents(tmp_path / "whole.zarr")


@pytest.mark.parametrize("name", ["loss_change_sum", "blocks"])
def test_what_is_in_the_way_of_another_run_is_refused(tmp_path, name):
    """The result that is there has no sums and no blocks."""
    place = tmp_path / "run.zarr"
    run(place)
    if name == "blocks":
        (place / name).write_text("mine")
    else:
        zarr.open_group(place, mode="r+").create_array(name, data=np.arange(3))
    before = contents(place)
    run(place)
    calls: list[Any] = []
    with pytest.raises(OSError, match=f"holds {name}, which pyablate did not write"):
        run(place, fresh=True, measures=["loss"], progress=lambda *step: calls.append(step))
    assert not calls
    assert contents(place) == before


@pytest.mark.parametrize("inside", ["label/notes.txt", "label/c/notes.txt", "label/mine/x"])
def test_files_among_our_arrays_are_refused(tmp_path, result, inside):
    place = tmp_path / "run.zarr"
    run(place)
    (place / inside).parent.mkdir(exist_ok=True)
    (place / inside).write_text("mine")
    before = contents(place)
    run(place)  # nothing is written: it is read, and the file does not matter
    for write in (lambda: run(place, fresh=True), lambda: result.save(place)):
        with pytest.raises(OSError, match=f"holds {inside}, which pyablate did not write"):
            write()
        assert contents(place) == before


@pytest.mark.parametrize("put", LEFT)
def test_save_refuses_what_it_could_not_keep(tmp_path, result, put):
    place = tmp_path / "run.zarr"
    result.save(place)
    put(place)
    before = contents(place)
    writers: list[Callable[[], object]] = [
        lambda: result.save(place),
        lambda: store.check_writable(place),
        lambda: pa.merge([place], place),
    ]
    for write in writers:
        with pytest.raises(OSError, match="which pyablate did not write"):
            write()
        assert contents(place) == before
        assert (put is not an_empty_folder) or (place / "for later").is_dir()
    assert len(pa.load(place).units) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["run.zarr"]


def test_an_array_that_somebody_has_changed_is_not_removed(tmp_path, result):
    place = tmp_path / "run.zarr"
    run(place)
    group = zarr.open_group(place, mode="r+")
    del group["label"]
    group.create_array("label", data=np.arange(3))
    before = contents(place)
    for write in (lambda: run(place, fresh=True), lambda: result.save(place)):
        with pytest.raises(OSError, match=r"holds label, which .* or somebody has changed"):
            write()
        assert contents(place) == before


def test_folders_that_only_look_like_ours(tmp_path):
    """A folder `blocks` with a `manifest.json` is nothing that only runs have."""
    site = tmp_path / "site"
    (site / "blocks").mkdir(parents=True)
    (site / "blocks" / "manifest.json").write_text('{"name": "my blocks"}')
    (site / "blocks" / "hero.js").write_text("mine")
    before = contents(site)
    with pytest.raises(OSError, match="exists and is not a pyablate result"):
        run(site, fresh=True)
    place = tmp_path / "run.zarr"
    run(place)
    shutil.copytree(site / "blocks", place / "blocks")
    with pytest.raises(OSError, match=r"holds blocks/manifest.json, which pyablate did not"):
        run(place, fresh=True)
    run(place)
    assert contents(site) == before
    assert (place / "blocks" / "manifest.json").exists()


def test_tables_of_attributes_and_results_do_not_replace_each_other(tmp_path, result):
    found = xr.Dataset({"l1": ("unit", [1.0, 2.0])}, coords={"unit": ["a:0", "a:1"]})
    table, place = tmp_path / "table.zarr", tmp_path / "run.zarr"
    write_attributes(found, table)
    result.save(place)
    before = contents(tmp_path)
    with pytest.raises(OSError, match="exists and is not a pyablate result"):
        result.save(table)
    with pytest.raises(OSError, match="exists and is not a pyablate result"):
        run(table, fresh=True)
    with pytest.raises(OSError, match="exists and is not a pyablate table of attributes"):
        write_attributes(found, place)
    assert contents(tmp_path) == before
    write_attributes(found.rename(l1="l2"), table)
    zarr.open_group(table, mode="r+").create_array("mine", data=np.arange(2))
    before = contents(tmp_path)
    with pytest.raises(OSError, match="which pyablate did not write"):
        write_attributes(found, table)
    assert contents(tmp_path) == before


def test_results_without_checksums_are_replaced_by_name(tmp_path, result):
    place = tmp_path / "run.zarr"
    run(place)
    unseal(place)
    notes(place)
    with pytest.raises(OSError, match=r"holds notes.txt"):
        result.save(place)
    run(place, fresh=True)
    assert (place / "notes.txt").read_text() == "mine"
    unseal(place)
    (place / "notes.txt").unlink()
    result.save(place)
    assert len(pa.load(place).units) == 3


def test_the_names_of_our_arrays_are_all_known(tmp_path):
    run(tmp_path / "run.zarr", measures=["loss", "margin"])
    run(tmp_path / "estimated.zarr", guarantee="estimated", budget="50%")
    found = [*(tmp_path / "run.zarr").iterdir(), *(tmp_path / "estimated.zarr").iterdir()]
    assert {path.name for path in found if path.is_dir()} == set(own_files.ARRAYS)
    own_files.check_replaceable(tmp_path / "run.zarr")
