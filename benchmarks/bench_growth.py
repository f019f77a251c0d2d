"""How time grows with images and with units, and peak memory against ``memory=``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from measure import Job, Settings, fitting, say, write

import pyablate as pa

NETWORK, LAYER = "vgg_bn", "features.6"
MEBIBYTE = 1 << 20


def test_images(benchmark: Any, settings: Settings) -> None:
    """All units of one layer on an eighth, a quarter, half and all of the images."""
    job = shipped(settings, LAYER)
    _, count, _ = fitting(job, settings)
    counts = [max(2, count // part) for part in (8, 4, 2, 1)]
    grow(benchmark, settings, "images", counts, {n: (job, n) for n in counts})


def test_units(benchmark: Any, settings: Settings) -> None:
    """An eighth, a quarter, half and all of a layer's units, evenly spread, on the same images."""
    whole = shipped(settings, LAYER)
    _, count, _ = fitting(whole, settings)
    units = whole.model.get_submodule("features.5").num_features
    counts = [units // part for part in (8, 4, 2, 1)]
    jobs = {
        n: (shipped(settings, [f"{LAYER}:{unit}" for unit in range(0, units, units // n)]), count)
        for n in counts
    }
    grow(benchmark, settings, "units", counts, jobs)


def shipped(settings: Settings, layers: str | list[str]) -> Job:
    model = pa.demo.network(NETWORK).to(settings.device)
    return Job(model, pa.demo.images(settings.images)[0].to(settings.device), layers)


def grow(
    benchmark: Any,
    settings: Settings,
    axis: str,
    counts: list[int],
    jobs: dict[int, tuple[Job, int]],
) -> None:
    """Time all sizes in turn and write them down."""
    seconds: dict[int, list[float]] = {count: [] for count in counts}

    def one_round() -> None:
        for count, (job, images) in jobs.items():
            seconds[count].append(job.run(images)[1])

    benchmark.pedantic(one_round, rounds=settings.rounds)
    typical = [median(seconds[count]) for count in counts]
    times = median(
        many / few for few, many in zip(seconds[counts[0]], seconds[counts[-1]], strict=True)
    )
    record = {
        "group": "growth",
        "axis": axis,
        "case": f"{NETWORK} {LAYER}",
        "at": counts,
        "seconds": typical,
        "all_seconds": list(seconds.values()),
        "growth": times,
        "images": jobs[counts[-1]][1],
    }
    write(f"growth with {axis}", record, settings)
    each = ", ".join(f"{n}: {t:.3g} s" for n, t in zip(counts, typical, strict=True))
    say(
        f"growth with {axis}: {each}; {counts[-1] / counts[0]:.0f} x as many, {times:.1f} x as long"
    )


def test_memory(benchmark: Any, settings: Settings) -> None:
    """Peak memory of whole calls in processes of their own, under several budgets."""
    if settings.device != "cpu":
        pytest.skip("measures the memory of the process, not that of a GPU")
    images = min(512, settings.images)
    budgets = [64 * MEBIBYTE, 128 * MEBIBYTE, 256 * MEBIBYTE, 512 * MEBIBYTE]
    grew: list[int] = []

    def run(budget: int) -> int:
        script = Path(__file__).with_name("peak_memory.py")
        arguments = [f"--memory={budget}", f"--images={images}", f"--layer={LAYER}"]
        done = subprocess.run(
            [sys.executable, str(script), f"--network={NETWORK}", *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        return int(json.loads(done.stdout)["grew"])

    benchmark.pedantic(lambda: grew.extend(run(budget) for budget in budgets), rounds=1)
    record = {
        "group": "memory",
        "case": f"{NETWORK} {LAYER}",
        "images": images,
        "budget": budgets,
        "grew": grew,
    }
    write("peak memory", record, settings)
    for budget, more in zip(budgets, grew, strict=True):
        say(f"memory={budget // MEBIBYTE} MiB: grew by {more / MEBIBYTE:.0f} MiB")
