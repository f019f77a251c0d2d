"""Screened runs against exact ones, whole calls in turn; growth of what they predict.

Large networks are not among these: an exact run of all their units takes hours
(`screened_speed.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import pytest
import torch
from bench_growth import grow, shipped
from bench_layers import layers
from measure import Job, Settings, fitting, in_turn, must_agree, ratio, say, write
from rivals import Agreement, Cached, Rival
from subjects import SHIPPED, cut

import pyablate as pa
from pyablate.engine import clean_run
from pyablate.engine.rounding import Rounding
from pyablate.engine.score import DirectionCount
from pyablate.engine.suffix import Suffix, needed
from pyablate.interventions import parse
from pyablate.runs.screening_sample import chosen_places, predictor
from pyablate.runs.setup import SetupOptions, prepare

MORE, LONGER, LONGEST = 5, 25, 100
"""Thresholds are measured on some thousand pairs, which short runs do not earn back: how many times
more images there may be, and how many times longer conv layers and whole networks may take."""

FIRST = 512
"""Images that tell how long a run of conv layers takes: of fewer the start is most."""

OTHERWISE = 1e-5
"""Share of the pairs, at most, that both compute and decide otherwise: near ties."""

WHOLE = {"alexnet": 2000, "vgg_bn": 500, "resnet": 300, "vit": 300, "convnext": 200}
"""Networks of which all layers are ablated, and on how many images."""

CONVOLUTIONS = {
    network: [layer for of, layer in layers() if of == network and "classifier" not in layer]
    for network in SHIPPED
}


@dataclass(eq=False)
class CachedLayers:
    """`cached` for one layer after the other."""

    parts: Sequence[Cached]
    name: str = "cached"

    @property
    def note(self) -> str:
        """How many layers, and how they are run."""
        return f"{len(self.parts)} layers, eager"

    @property
    def units_timed(self) -> int:
        """Units of all layers that are timed."""
        return sum(part.units_timed for part in self.parts)

    def seconds(self) -> float:
        """Do the job once."""
        return sum(part.seconds() for part in self.parts)

    def check(self, result: pa.AblationResult) -> Agreement:
        """Compare the units of all layers."""
        found = [part.check(result) for part in self.parts]
        names = ("pairs", "near_ties", "mismatches")
        return Agreement(*(sum(getattr(one, name) for one in found) for name in names))


@pytest.mark.parametrize("network", CONVOLUTIONS)
def test_convolutions(benchmark: Any, settings: Settings, network: str) -> None:
    """All conv layers in one call, which shares gradients among them."""
    model, chosen = pa.demo.network(network).to(settings.device), CONVOLUTIONS[network]
    more = replace(settings, images=MORE * settings.images, seconds=LONGER * settings.seconds)
    images = pa.demo.images(more.images)[0].to(settings.device)

    def rivals(count: int) -> list[CachedLayers]:
        parts = [
            Cached(cut(model, layer), images[:count], layer, compiling=False) for layer in chosen
        ]
        return [CachedLayers(parts)]

    job = Job(model, images, chosen, first=FIRST)
    measure(benchmark, f"screened {network}, conv layers", job, more, rivals, kind="conv layers")


@pytest.mark.parametrize(("network", "count"), WHOLE.items(), ids=str)
def test_network(benchmark: Any, settings: Settings, network: str, count: int) -> None:
    images = pa.demo.images(count)[0].to(settings.device)
    job = Job(pa.demo.network(network).to(settings.device), images, "*")
    longer = replace(settings, seconds=LONGEST * settings.seconds)
    name = f"screened {network}, all layers"
    measure(benchmark, name, job, longer, lambda _images: (), kind="whole networks")


def test_predictions_by_images(benchmark: Any, settings: Settings) -> None:
    """Gradients for all units of one layer, on an eighth, a quarter, half and all of the images."""
    job = Predictions(shipped(settings, "features.6"))
    most = min(512, settings.images)
    counts = [max(1, most // part) for part in (8, 4, 2, 1)]
    jobs = {count: (job, count) for count in counts}
    grow(benchmark, settings, "images, predictions", counts, jobs)


def test_predictions_by_units(benchmark: Any, settings: Settings) -> None:
    """Gradients for an eighth, a quarter, half and all of its units, on the same images."""
    images, units = min(128, settings.images), 64
    counts = [units // part for part in (8, 4, 2, 1)]
    jobs = {
        count: (Predictions(shipped(settings, labels(units, count))), images) for count in counts
    }
    grow(benchmark, settings, "units, predictions", counts, jobs)


def labels(units: int, count: int) -> list[str]:
    return [f"features.6:{unit}" for unit in range(0, units, units // count)]


@dataclass
class Predictions:
    """The prediction stage of a screened run, without the rest of it."""

    job: Job

    def run(self, count: int) -> tuple[None, float]:
        """Predict the pairs of the first images; seconds."""
        images = self.job.images[:count]
        data = images, torch.zeros(len(images), dtype=torch.int64)
        options = SetupOptions(self.job.layers, None, parse("zero"), guarantee="screened")
        setup = prepare(self.job.model, data, options)
        suffixes = {job: Suffix.of(setup.graph, job) for job in setup.jobs}
        choices = [DirectionCount.most(setup.classes)]
        guess = predictor(setup, suffixes, chosen_places(setup, suffixes), choices)
        keep = needed(suffixes.values())
        seconds = 0.0
        for batch in setup.data.batches(setup.batch_size):
            clean = clean_run.run_graph(setup.graph, keep, setup.exact, batch, rounding=Rounding())
            begin = time.perf_counter()
            guess.predict(batch, clean)
            seconds += time.perf_counter() - begin
        return None, seconds


def measure(
    benchmark: Any,
    name: str,
    job: Job,
    settings: Settings,
    rivals: Callable[[int], Sequence[Rival]],
    kind: str,
) -> None:
    """Check a screened run against the exact one, time all in turn, check and write it down."""
    first, count, _ = fitting(job, settings)
    say(f"{name}: {count} images")
    ready = rivals(count)
    screened = replace(job, guarantee="screened")
    compared(first, screened.run(len(first.labels))[0])
    found: dict[str, pa.AblationResult] = {}

    def call(kind: str, one: Job) -> float:
        found[kind], _, seconds = one.run(count)
        return seconds

    seconds, theirs = in_turn(
        benchmark,
        lambda: call("screened", screened),
        {"exact": lambda: call("exact", job), **{rival.name: rival.seconds for rival in ready}},
        rounds=1,  # of so many long calls; what counts is their median
    )
    result = found["screened"]
    known = result.screening
    must_agree(ready, found["exact"])
    notes = {"exact": "whole calls", **{rival.name: rival.note for rival in ready}}
    against = {
        rival: {"seconds": took, "note": notes[rival], **ratio(took, seconds)}
        for rival, took in theirs.items()
    }
    record = {
        "group": "screening",
        "kind": kind,
        "images": count,
        "units": len(result.units),
        "strategy": sorted(set(result.strategy.values())),
        "seconds": seconds,
        "screened": len(known.layers),
        "computed": known.computed / (known.pairs - known.total.silent) if known.layers else 1.0,
        "sampled": known.sampled,
        "certificate": known.upper_bound,
        "layer_seconds": {kind: one.effort.layer_seconds for kind, one in found.items()},
        **compared(found["exact"], result),
        "rivals": against,
    }
    write(name, record, settings)
    times = {rival: round(one["ratio"], 2) for rival, one in against.items()}
    benchmark.extra_info.update(times)
    say(
        f"  {median(seconds):.3g} s; {', '.join(f'{r} {x:.1f} x' for r, x in times.items())}; "
        f"{record['missed']} of {record['flips']} flips missed, at most "
        f"{known.missed_bound:.0f} by the certificate"
    )


def compared(exact: pa.AblationResult, screened: pa.AblationResult) -> dict[str, int]:
    """Count the flips of an exact run, and those that a screened one misses.

    Raises
    ------
    AssertionError
        More are missed than the certificate says, or pairs that were computed differ.
    """
    right, found = flips(exact), flips(screened)
    missed, other = len(right - found), len(found - right)
    bound, pairs = screened.screening.missed_bound, len(exact.units) * len(exact.labels)
    assert missed <= bound + OTHERWISE * pairs, f"{missed} flips are missed, not {bound:.0f}"
    assert other <= OTHERWISE * pairs, f"{other} of {pairs:,} pairs differ"
    return {"flips": len(right), "missed": missed, "other": other}


def flips(result: pa.AblationResult) -> set[tuple[int, int, int]]:
    found = result.flips
    return {*zip(found.row.tolist(), found.image.tolist(), found.prediction.tolist(), strict=True)}
