"""What commands cost from start to end, each in a process of its own: time, CPU and memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from measure import Settings, say, write
from peak_memory import peak_bytes

MEBIBYTE = 2**20
REPEATS = 5
SHELL = "from pyablate.cli.app import main; main()"
CASES = {
    "python": ("pass", ()),
    "`pyablate --help`": (SHELL, ("--help",)),
    "`pyablate run --help`": (SHELL, ("run", "--help")),
    "`import torch`": ("import torch", ()),
    "`pyablate layers demo:vgg_bn`": (SHELL, ("layers", "demo:vgg_bn")),
    "`pyablate run demo:vgg_bn --data demo --limit 200`": (
        SHELL,
        ("run", "demo:vgg_bn", "--data", "demo", "--limit", "200", "--no-progress"),
    ),
}
# The peak is read in a run of its own, whose imports would spoil the times.
PEAK = """
import sys
sys.path.insert(0, {folder!r})
try:
    exec({code!r})
finally:
    from peak_memory import peak_bytes
    sys.stderr.write("\\n%d" % peak_bytes())
"""


def _run(code: str, words: tuple[str, ...], folder: Path) -> tuple[float, float]:
    """Return wall and CPU seconds of one process."""
    before, start = os.times(), time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", code, *words], cwd=folder, capture_output=True, check=True
    )
    wall, after = time.perf_counter() - start, os.times()
    children = (after.children_user, after.children_system)
    return wall, sum(children) - before.children_user - before.children_system


def _peak(code: str, words: tuple[str, ...], folder: Path) -> int:
    script = PEAK.format(folder=str(Path(peak_bytes.__code__.co_filename).parent), code=code)
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stderr.rpartition("\n")[2])


@pytest.mark.parametrize("name", CASES)
def test_start_up(name: str, benchmark: Any, settings: Settings, tmp_path: Path) -> None:
    if settings.device != "cpu":
        pytest.skip("measures processes, not a GPU")
    code, words = CASES[name]
    found: list[tuple[float, float]] = []
    repeats = REPEATS if settings.rounds > 1 else 1
    benchmark.pedantic(lambda: found.append(_run(code, words, tmp_path)), rounds=repeats)
    record = {
        "group": "start-up",
        "seconds": [wall for wall, _ in found],
        "cpu_seconds": [cpu for _, cpu in found],
        "peak": _peak(code, words, tmp_path),
    }
    write(f"start-up {name}", record, settings)
    wall, cpu = min(record["seconds"]), min(record["cpu_seconds"])
    say(f"{name}: {wall:.2f} s, {cpu:.2f} s of CPU, peak {record['peak'] / MEBIBYTE:.0f} MiB")
