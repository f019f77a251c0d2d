"""One run by several processes, forked from one that has imported everything.

python ranked.py FOLDER
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

import pyablate as pa
from pyablate.runs import run_folder
from support.runs import network
from support.screened import careless_thresholds
from support.stores import contents


def ablate(place: Path, **options: Any) -> pa.AblationResult:
    model, images, labels = network()
    options = {"intervention": "mean", "batch_size": 3, "audit": 40, "progress": False, **options}
    return pa.ablate(model, (images, labels), "*", output=place, **options)


def together(place: Path, count: int, *, dies: int | None = None, **options: Any) -> list[int]:
    """Run in ``count`` processes; their wait statuses. One may die after two blocks."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            _take_part(place, rank, count, port, dies=rank == dies, **options)
        children.append(child)
    statuses: dict[int, int] = {}
    while len(statuses) < count:
        child, status = os.wait()
        statuses[child] = status
        if status:  # as torchrun does
            for other in set(children) - set(statuses):
                os.kill(other, signal.SIGKILL)
    return [statuses[child] for child in children]


def _take_part(
    place: Path, rank: int, count: int, port: int, *, dies: bool, **options: Any
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    seen: list[tuple[int, int, str]] = []
    if dies:
        _die_after_two_blocks()
    try:
        watched = {"distributed": True, "progress": lambda *step: seen.append(step)}
        result = ablate(place, **watched, **options)
        assert len(result.labels) == len(network()[2])
        assert bool(seen) == (rank == 0)
        assert not seen or seen[-1][0] == seen[-1][1]
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _die_after_two_blocks() -> None:
    real = run_folder.RunStore.write
    left = [2]

    def write(self: run_folder.RunStore, *arguments: Any) -> None:
        real(self, *arguments)
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    run_folder.RunStore.write = write  # type: ignore[method-assign]


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    ablate(folder / "one.zarr")
    expected = contents(folder / "one.zarr")
    place = folder / "many.zarr"
    for count in (2, 3):
        assert together(place, count) == [0] * count
        assert contents(place) == expected, f"{count} processes differ from one"
        shutil.rmtree(place)
    statuses = together(place, 3, dies=1)
    assert os.WTERMSIG(statuses[1]) == signal.SIGKILL
    assert not (place / "zarr.json").exists()
    kept = len(list(place.glob("blocks/?????????.npz")))
    assert kept >= 2
    assert together(place, 2) == [0, 0]
    assert contents(place) == expected, "after a death they differ"
    # A shard is shared just so.
    for number in (1, 2):
        ablate(folder / f"part{number}.zarr", shard=(number, 2))
    pa.merge([folder / "part2.zarr", folder / "part1.zarr"], folder / "merged.zarr")
    assert contents(folder / "merged.zarr") == expected, "merged shards differ"
    _check_screened(folder)
    _check_estimated(folder)
    print(f"equal; {kept} blocks were kept over a death")


def _check_screened(folder: Path) -> None:
    """Blocks of one process are done again where the sample of another raises a threshold."""
    with pytest.MonkeyPatch.context() as patch:
        careless_thresholds(patch, 1e-6, 0.5)
        options = {"guarantee": "screened", "seed": 1}
        one = ablate(folder / "screened.zarr", **options).screening
        assert one.settled > 0
        assert one.total.raised > 0
        place = folder / "screened by two.zarr"
        assert together(place, 2, **options) == [0, 0]
    assert contents(place) == contents(folder / "screened.zarr"), "screened processes differ"


def _check_estimated(folder: Path) -> None:
    """Two processes draw the pairs that one draws, also where one of them dies and both go on."""
    options = {"guarantee": "estimated", "budget": "40%", "seed": 1}
    one = ablate(folder / "estimated.zarr", **options).estimate
    assert 0 < one.drawn.sum() < one.live.sum()
    place = folder / "estimated by two.zarr"
    assert together(place, 2, dies=1, **options) != [0, 0]
    assert together(place, 2, **options) == [0, 0]
    assert contents(place) == contents(folder / "estimated.zarr"), "estimating processes differ"


if __name__ == "__main__":
    main()
