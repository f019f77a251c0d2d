"""Time rivals and pyablate in turn in one process, and write down what came out."""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from rivals import Agreement, Rival
from torch import Tensor, nn

import pyablate as pa
from pyablate.runtime.processor import processor

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Settings:
    """How much to measure; see the options in ``conftest.py``."""

    images: int
    rounds: int
    seconds: float
    device: str
    compiling: bool
    results: Path


@dataclass
class Job:
    """One call of `pyablate.ablate`.

    Rivals do not check themselves, so what is compared with them leaves our audit out; what a whole
    call with its preparation and its audit takes is told beside it.
    """

    model: nn.Module
    images: Tensor
    layers: str | list[str]
    audit: int = 300
    first: int = 64  # images of the run that is checked first and tells how many to time
    guarantee: str = "exact"

    def plan(self, count: int) -> pa.Plan:
        """Plan the same call on the first `count` images."""
        images = self.images[:count]
        labels = torch.zeros(len(images), dtype=torch.int64)
        return pa.plan(self.model, (images, labels), self.layers)

    def run(self, count: int, audit: int = 0) -> tuple[pa.AblationResult, float, float]:
        """Ablate on the first `count` images; result, seconds of the sweep, seconds of the call.

        The sweep is what comes between preparation and audit.
        """
        images = self.images[:count]
        labels = torch.zeros(len(images), dtype=torch.int64)  # predictions do not depend on them
        marks: list[float] = []
        begin = time.perf_counter()
        result = pa.ablate(
            self.model,
            (images, labels),
            self.layers,
            audit=audit,
            guarantee=self.guarantee,
            progress=lambda *_: marks.append(time.perf_counter()),
        )
        end = time.perf_counter()
        # The first report comes when all is prepared.
        sweep = end - marks[0] - result.effort.other_seconds["audit"]
        return result, sweep, end - begin


def fitting(job: Job, settings: Settings) -> tuple[pa.AblationResult, int, int]:
    """Run a few images; their result, and how many images and rounds the time allows."""
    limit = min(settings.images, len(job.images))
    first = min(job.first, limit)
    warm_up(settings.device)
    result, sweep, _ = job.run(first)
    rounds = settings.rounds if sweep < 10 * settings.seconds else 1
    return result, min(limit, first * max(1, int(settings.seconds / sweep))), rounds


@functools.cache
def warm_up(device: str) -> None:
    """Run once something small: the first run also loads libraries and measures the machine."""
    Job(pa.demo.network("vgg_bn").to(device), pa.demo.images(2)[0].to(device), "*", audit=0).run(2)


@functools.cache
def planned(network: str, device: str) -> pa.Plan:
    """Plan all layers of a shipped network for 1,000 images."""
    model = pa.demo.network(network).to(device)
    images, labels = pa.demo.images(256)
    return pa.plan(model, (images.to(device), labels), images=1000)


def floor(plan: pa.Plan, images: int, layers: Sequence[str] | None = None) -> dict[str, Any]:
    """Say what layers cost at least by the rates that the plan measured.

    Returns
    -------
    dict
        Arithmetic (`gflop`) and bytes (`gbyte`) of the differences of all pairs, the share of pairs
        that cost any (`live`), the measured rates, and the longer of the two times they lead to.
    """
    rows = plan.table if layers is None else plan.table[plan.table["layer"].isin(layers)]
    gflop, gbyte = rows[["gflop", "gbyte"]].sum() * images / plan.images
    bandwidth = plan.peaks.bandwidth / 1e9
    return {
        "gflop": gflop,
        "gbyte": gbyte,
        "live": (rows["live"] * rows["pairs"]).sum() / rows["pairs"].sum(),
        "peak_gflops": plan.gflops,
        "bandwidth_gbytes": bandwidth,
        "floor_seconds": max(gflop / plan.gflops, gbyte / bandwidth),
    }


def must_agree(rivals: Sequence[Rival], result: pa.AblationResult) -> dict[str, Agreement]:
    """Compare every rival's answers with a result.

    Raises
    ------
    AssertionError
        Predictions differ that are no near ties.
    """
    found = {rival.name: rival.check(result) for rival in rivals}
    for name, agreement in found.items():
        assert agreement.pairs > 0, f"{name}: nothing was compared"
        assert not agreement.mismatches, f"{name} and pyablate disagree: {agreement}"
    audit = result.audit
    assert not audit.mismatches + audit.mended, f"the audit found mismatches: {audit}"
    return found


def in_turn(
    benchmark: Any, ours: Callable[[], float], rivals: dict[str, Callable[[], float]], rounds: int
) -> tuple[list[float], dict[str, list[float]]]:
    """Time rival, pyablate, rival, pyablate, ...; each callable returns its seconds.

    pytest-benchmark keeps its own time of ours, which is that of the whole call.
    """
    mine: list[float] = []
    theirs: dict[str, list[float]] = {name: [] for name in rivals}

    def before_ours() -> None:
        for name, run in rivals.items():
            theirs[name].append(run())

    benchmark.pedantic(lambda: mine.append(ours()), setup=before_ours, rounds=rounds)
    return mine, theirs


def stopwatch(work: Callable[[], Any], device: str, calls: int) -> float:
    """Seconds of one of several calls in a row; on a GPU by its own events."""
    if device.startswith("cuda"):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / calls
    start = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - start) / calls


def ratio(rival: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Ratio of medians; the spread is that of the ratios within each round."""
    each = [theirs / mine for theirs, mine in zip(rival, ours, strict=True)]
    return {"ratio": median(rival) / median(ours), "least": min(each), "most": max(each)}


def compare(
    benchmark: Any,
    name: str,
    job: Job,
    rivals: Callable[[int], Sequence[Rival]],
    settings: Settings,
    *,
    group: str,
    extra: Callable[[int, float], dict[str, Any]] = lambda _images, _seconds: {},
) -> None:
    """Check the answers, measure one case, check all answers and write it down.

    Parameters
    ----------
    benchmark : pytest-benchmark's fixture
    name, group : str
        Of the case; cases of one group are one table.
    job : Job
        Ours.
    rivals : callable
        Given a number of images, the rivals made ready for them.
    settings : Settings
    extra : callable
        Further entries, given the images and the median seconds of our sweep.
    """
    first, count, rounds = fitting(job, settings)
    say(f"{name}: {count} images")
    ready = rivals(count)
    must_agree(ready, first)
    runs: list[tuple[pa.AblationResult, float, float]] = []

    def ours() -> float:
        last = len(runs) == rounds - 1
        # Of its own: it captures the network, whether or not the caller is within `same_network`.
        runs.append(Context().run(job.run, count, job.audit if last else 0))
        return runs[-1][1]

    seconds, theirs = in_turn(benchmark, ours, {r.name: r.seconds for r in ready}, rounds)
    result, _, call = runs[-1]
    agreed = must_agree(ready, result)
    units, typical = len(result.units), median(seconds)
    record = {
        "group": group,
        "images": count,
        "units": units,
        "strategy": sorted(set(result.strategy.values())),
        "seconds": seconds,
        "call_seconds": call,
        "pairs_per_second": count * units / typical,
        "flipped": len(result.flips.row) / (count * units),
        "audit": asdict(result.audit),
        "settled": result.effort.pairs_by_precision,
        "doubt": result.effort.error_bounds,
        **extra(count, typical),
        "rivals": {
            rival.name: {
                "seconds": theirs[rival.name],
                **ratio(theirs[rival.name], seconds),
                "units_timed": rival.units_timed,
                "note": rival.note,
                "checked": asdict(agreed[rival.name]),
            }
            for rival in ready
        },
    }
    write(name, record, settings)
    for rival, found in record["rivals"].items():
        benchmark.extra_info[rival] = round(found["ratio"], 2)
        say(
            f"  {typical:.3g} s; {rival} ({found['note']}) {found['ratio']:.1f} x "
            f"({found['least']:.1f} to {found['most']:.1f})"
        )


# --- the record -------------------------------------------------------------------------------


def machine(device: str) -> dict[str, Any]:
    """Describe what the figures were measured on."""
    found = {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "build": {key: str(value) for key, value in pa.build_info().items()},
    }
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def results_file(settings: Settings) -> Path:
    """Name the file after the machine."""
    known = machine(settings.device)
    name = known.get("gpu") or f"{known['cpu']} {known['cores']} cores"
    return settings.results / f"{re.sub(r'[^a-z0-9]+', '-', str(name).lower()).strip('-')}.json"


def write(name: str, record: dict[str, Any], settings: Settings) -> None:
    """Put one case into the machine's file; the other cases stay as they are."""
    path = results_file(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    known["machine"] = machine(settings.device)
    stamp = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "load": round(os.getloadavg()[0], 1),
    }
    known["cases"][name] = {**stamp, **record}
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    fresh.replace(path)


def say(line: str) -> None:
    """Show progress (``pytest -s``, as `make bench` calls it)."""
    print(line, flush=True)


def _commit() -> str:
    """Return the commit, with a + if the package or the benchmarks have changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "pyablate", "csrc", "benchmarks/*.py")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
