"""Kill a real run at random moments, start it again, and compare what comes out in the end.

A program of its own: it forks, which a process with threads must not. It imports everything once;
each child is one call of the command, from the first check to the last byte.

    python killed.py FOLDER KILLS SEED
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

import pyablate as pa
from pyablate.runs import run_folder
from support.runs import BATCH, network
from support.stores import contents


def once(place: Path, begun: int) -> None:
    """Give the command; the first report of progress goes into the pipe ``begun``."""
    model, images, labels = network()

    def report(done: int, total: int, layer: str) -> None:
        nonlocal begun
        if begun >= 0:
            os.write(begun, b"!")
            begun = -1
        time.sleep(0.002)  # so that there is something to kill between two writes

    pa.ablate(
        model,
        (images, labels),
        "*",
        intervention="mean",
        batch_size=BATCH,
        audit=40,
        output=place,
        progress=report,
    )


def start(place: Path) -> tuple[int, int]:
    """Give the command in a child; its number, and where it says that the first block begins."""
    hear, say = os.pipe()
    child = os.fork()
    if child:
        os.close(say)
        return child, hear
    os.close(hear)
    try:
        once(place, say)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def finished(child: int) -> bool:
    """Wait for a child; whether it came to its end by itself."""
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise SystemExit(f"a run failed with {os.WEXITSTATUS(status)}")
    return os.WIFEXITED(status)


def main() -> None:
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    run_folder.SECONDS = 0.0  # also blocks in the middle of their jobs are written down
    once(folder / "warm.zarr", -1)  # imports and measurements that every child would repeat
    chance = random.Random(seed)
    unbroken, place = folder / "unbroken.zarr", folder / "killed.zarr"
    child, hear = start(unbroken)
    os.read(hear, 1)
    begin = time.perf_counter()
    assert finished(child)
    length = time.perf_counter() - begin
    expected = contents(unbroken)
    assert "zarr.json" in expected
    assert not any(name.startswith("blocks") for name in expected)

    killed = resumed = ends = 0
    while killed < kills:
        kept = len(list(place.glob("blocks/*.npz")))
        child, hear = start(place)
        # Some moments lie before the first block, most in a third of the run's length after it.
        if chance.random() < 0.8:
            os.read(hear, 1)
        time.sleep(chance.uniform(0, length / 3))
        os.kill(child, signal.SIGKILL)
        os.close(hear)
        if finished(child):
            ends += 1
            assert contents(place) == expected, "an unbroken end differs"
            shutil.rmtree(place)
        else:
            killed += 1
            resumed += kept > 2
    if place.exists():
        child, hear = start(place)
        assert finished(child)
        assert contents(place) == expected, "the last one differs"
    print(f"{killed} killed, {resumed} of them had resumed, {ends} came to their end before")


if __name__ == "__main__":
    main()
