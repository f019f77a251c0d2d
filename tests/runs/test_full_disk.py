"""A disk that is really full: a small file system in memory, mounted for the test."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.runs import BATCH, IMAGES, network
from support.stores import contents

import pyablate as pa
from pyablate.cli.common import NO_ROOM, error_line

PAGE = 4096
ROOM = 2 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes; what is on it goes with the test."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("only root on Linux can mount a file system")
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(place)]
    made = subprocess.run(mount, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def leave(disk: Path, pages: int) -> None:
    """Let a file take all room but some pages; none at all for many."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    free = os.statvfs(disk).f_bavail
    assert os.statvfs(disk).f_frsize == PAGE
    if pages < free:
        ballast.write_bytes(bytes(PAGE * (free - pages)))
        assert os.statvfs(disk).f_bavail == pages


def run(place: Path, progress: Callable[[int, int, str], None] | bool = False) -> None:
    model, images, labels = network()
    pa.ablate(
        model,
        (images, labels),
        "*",
        intervention="mean",
        measures=["loss"],
        batch_size=BATCH,
        audit=40,
        strategy="replay",  # needs no capture, which takes longer than all else here
        output=place,
        progress=progress,
    )


def fails(place: Path) -> str:
    """Run until the disk is full; what the shell would say."""
    with pytest.raises(OSError, match="output: ") as raised:
        run(place)
    assert raised.value.errno == errno.ENOSPC
    line, code = error_line(raised.value)
    assert code == NO_ROOM
    assert line is not None
    return line


def blocks(place: Path) -> list[str]:
    return sorted(path.name for path in place.glob("blocks/?????????.npz"))


def test_a_run_on_a_full_disk_goes_on_when_there_is_room(disk, tmp_path):
    run(tmp_path / "whole.zarr")
    place, count = disk / "run.zarr", IMAGES // BATCH
    leave(disk, 0)
    assert "cannot write" in fails(place)
    kept: list[list[str]] = []
    for pages in (8, 8, 12):  # room for some more blocks each time, never for all
        leave(disk, pages)
        said = fails(place)
        kept.append(blocks(place))
        assert f"no room for {place}" in said
        assert f"{len(kept[-1])} of {count} blocks are kept" in said
        assert "the same call or command goes on from there" in said
        assert not list(place.rglob("*.new"))
        with pytest.raises(OSError, match="an unfinished run"):
            pa.load(place)
    assert 0 < len(kept[0]) < len(kept[1]) < len(kept[2]) < count
    leave(disk, ROOM // PAGE)
    first: list[int] = []
    run(place, progress=lambda done, total, layer: first.append(done * count // total))
    assert first[0] == len(kept[-1])  # nothing that was kept is done again
    assert contents(place) == contents(tmp_path / "whole.zarr")


def test_a_disk_that_is_full_when_the_result_is_written(disk, tmp_path):
    run(tmp_path / "whole.zarr")
    place, count = disk / "run.zarr", IMAGES // BATCH
    leave(disk, count + 6)  # the blocks, but not all of the result's files
    assert f"{count} of {count} blocks are kept" in fails(place)
    with pytest.raises(OSError, match="an unfinished run"):
        pa.load(place)
    leave(disk, ROOM // PAGE)
    first: list[int] = []
    run(place, progress=lambda done, total, layer: first.append(total - done))
    assert first[0] == 0
    assert contents(place) == contents(tmp_path / "whole.zarr")


def test_saving_on_a_full_disk_leaves_what_was_there(disk, tmp_path):
    run(tmp_path / "whole.zarr")
    result = pa.load(tmp_path / "whole.zarr")
    result.save(disk / "run.zarr")
    before = contents(disk / "run.zarr")
    leave(disk, 4)
    with pytest.raises(OSError, match="No space") as raised:
        result.save(disk / "run.zarr")
    assert error_line(raised.value)[1] == NO_ROOM
    assert contents(disk / "run.zarr") == before
    assert {path.name for path in disk.iterdir()} == {"ballast", "run.zarr"}
