"""Statistics of a result as large as that of a ResNet-50 on ImageNet's validation images."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import pytest
from made_up import random_result
from measure import Settings, in_turn, ratio, say, write
from scipy import stats

from pyablate.result import AblationResult

UNITS, CLASSES, IMAGES = 26_560, 1000, 50_000
FLIPPED = 0.005  # share of the images, per unit
SAMPLE = 200  # units whose answers are compared, and of which the slower rivals are timed
DRAWS = 200


@dataclass(frozen=True)
class Case:
    """A statistic, a plain way to it, and how far the two may be apart."""

    ours: Callable[[AblationResult], np.ndarray]
    plain: Callable[[AblationResult], np.ndarray]
    rival: str
    sample: bool  # the rival does a sample of the units and is scaled
    tolerance: float


@pytest.fixture(scope="session")
def result() -> AblationResult:
    return made_up(UNITS)


def made_up(units: int) -> AblationResult:
    return random_result(units, IMAGES, CLASSES, FLIPPED)


def scipy_everywhere(result: AblationResult) -> np.ndarray:
    """Compute p and q of every cell by scipy's functions, layer by layer."""
    lost, gained = result.lost, result.gained
    q = np.empty(lost.shape)
    for _, rows in result.units.groupby("layer").indices.items():
        fewer = np.minimum(lost[rows], gained[rows])
        p = np.minimum(1.0, 2 * stats.binom.cdf(fewer, lost[rows] + gained[rows], 0.5))
        q[rows] = stats.false_discovery_control(p.ravel()).reshape(p.shape)
    return q


def simulated_maximum(result: AblationResult) -> np.ndarray:
    """Mean largest drop of harmless units, drawn unit by unit."""
    draw = np.random.default_rng(1)
    changed = result.lost + result.gained
    drawn = ((2 * draw.binomial(n, 0.5, (DRAWS, CLASSES)) - n).max(axis=1) for n in changed)
    return np.array([each.mean() for each in drawn]) / (IMAGES // CLASSES)


CASES = {
    "significance": Case(
        lambda result: result.significance()["q"].to_numpy(),
        scipy_everywhere,
        "the formulas in scipy",
        sample=False,
        tolerance=1e-9,
    ),
    "noise_floor": Case(
        lambda result: result.noise_floor(),
        simulated_maximum,
        f"simulation with {DRAWS} draws",
        sample=True,
        tolerance=0.01,  # class accuracy; ten standard errors
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_statistic(benchmark: Any, settings: Settings, result: AblationResult, name: str) -> None:
    case = CASES[name]
    assert result.lost.shape == (UNITS, CLASSES), "counted once, before anything is timed"
    assert result.gained.any()
    few = made_up(SAMPLE)
    compared = few if case.sample else result
    np.testing.assert_allclose(case.ours(compared), case.plain(compared), atol=case.tolerance)
    scale = UNITS / SAMPLE if case.sample else 1.0
    ours, theirs = in_turn(
        benchmark,
        lambda: seconds(case.ours, result),
        {"plain": lambda: scale * seconds(case.plain, compared)},
        settings.rounds,
    )
    record(
        name,
        ours,
        settings,
        {case.rival: {"seconds": theirs["plain"], **ratio(theirs["plain"], ours)}},
    )


@pytest.mark.parametrize("name", ["split_half_drop", "max_class_test"])
def test_alone(benchmark: Any, settings: Settings, result: AblationResult, name: str) -> None:
    """Without a rival: what it takes."""
    found: list[float] = []
    benchmark.pedantic(
        lambda: found.append(seconds(lambda each: getattr(each, name)(), result)),
        rounds=settings.rounds,
    )
    record(name, found, settings, {})


def seconds(work: Callable[[AblationResult], Any], result: AblationResult) -> float:
    begin = time.perf_counter()
    work(result)
    return time.perf_counter() - begin


def record(name: str, ours: list[float], settings: Settings, rivals: dict[str, Any]) -> None:
    size = f"{UNITS:,} units x {CLASSES:,} classes, {IMAGES:,} images"
    write(
        f"statistics {name}",
        {"group": "statistics", "size": size, "seconds": ours, "rivals": rivals},
        settings,
    )
    told = "".join(f", {rival}: {found['ratio']:.1f} x" for rival, found in rivals.items())
    say(f"{name}: {median(ours):.3g} s{told}")
