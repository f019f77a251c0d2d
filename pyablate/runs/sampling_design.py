"""Which pairs of an estimated run are computed: a chance for each, reckoned before the first block.

Random pairs of the whole data are computed (:mod:`pyablate.runs.screening_sample`). How far off
their scores were tells the chance that a pair is predicted wrongly, as a function of its score: one
with a score above 0 is predicted to keep its class, one below to lose it. The variance of an
estimate is least where pairs are drawn with chances in proportion to the root of that (Neyman
1934); a factor, one for the run, makes the number of drawn pairs what was asked for.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyablate.analysis.tail import Tail
from pyablate.engine.job import Job
from pyablate.engine.score import DirectionCount, Scale
from pyablate.results.arrays import Floats
from pyablate.runs.screening_sample import LOW, MOST, Sample, Samples, samples
from pyablate.runs.setup import Setup

logger = logging.getLogger("pyablate")

NEAREST = 2
"""Competing classes along which changes are predicted: more cost more than they tell here."""

BEFORE = 0.2
"""Share of the budget for the pairs that are computed beforehand."""

TIMED = 256
"""Pairs of each layer that are computed beforehand where the budget is a time."""

FLOOR = 0.1
"""Chance of the surest pairs over that of all pairs: nothing is believed without a look."""

STEP = 1.02
"""Of factors and budgets that are tried."""


@dataclass(frozen=True)
class Budget:
    """What an estimated run may take.

    Attributes
    ----------
    value : float
        A share of the pairs, seconds, or a number of pairs.
    unit : str
        "%", "s" or "pairs".
    """

    value: float
    unit: str

    @classmethod
    def of(cls, given: str | int | None) -> Budget:
        """Read a budget as :func:`pyablate.ablate` takes it.

        Raises
        ------
        ValueError
            It is none.
        """
        text = str(given).strip()
        found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(%|s|min|h|)", text)
        value = float(found[1]) if found and not isinstance(given, bool) else 0.0
        unit = found[2] if found else ""
        if unit == "%" and 0 < value <= 100:
            return cls(value, unit)
        if unit in _SECONDS and value > 0:
            return cls(value * _SECONDS[unit], "s")
        if unit == "" and value >= 1 and value.is_integer():
            return cls(value, "pairs")
        raise ValueError(
            'budget: expected a share of the pairs such as "2%", a time such as "90s", "10min" or '
            f'"2h", or a number of pairs, got {given!r}'
        )

    def __str__(self) -> str:
        """Write it as it may be given."""
        return f"{self.value:.0f} pairs" if self.unit == "pairs" else f"{self.value:g}{self.unit}"


_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class JobDesign:
    """Chances of a job's pairs: ``top / 2**level``, all of few binary digits.

    Attributes
    ----------
    top : float
        That of level 0.
    scale : Scale
        Of the scores.
    above, below : tuple of float
        Scores from which on pairs are of the next level: of those from 0 on, and of those below 0,
        without their sign. None where there are no scores.
    drawn : float
        Share of the job's pairs that is drawn, about; 1 where nobody wrote it down.
    """

    top: float
    scale: Scale = field(default_factory=lambda: Scale(0.0, 0.0))
    above: tuple[float, ...] = ()
    below: tuple[float, ...] = ()
    drawn: float = 1.0

    @classmethod
    def of(cls, known: Mapping[str, Any]) -> JobDesign:
        """Undo :func:`dataclasses.asdict`."""
        scale, above, below = Scale(**known["scale"]), tuple(known["above"]), tuple(known["below"])
        return cls(**{**known, "scale": scale, "above": above, "below": below})

    @property
    def scored(self) -> bool:
        """Whether chances depend on scores."""
        return bool(self.above)

    def level(self, score: Floats) -> NDArray[np.int64]:
        """int64 ``[P]``: of pairs with these scores; 0 where a score is not a number."""
        up, down = (
            np.searchsorted(np.array(some), np.abs(score), side="right")
            for some in (self.above, self.below)
        )
        return np.where(np.isnan(score), 0, np.where(score < 0, down, up)).astype(np.int64)


@dataclass(frozen=True)
class Design:
    """What was reckoned before the first block.

    Attributes
    ----------
    budget : str
        As it was given.
    seed : int
        Of the draws.
    expected : int
        Pairs of the whole data that are to be computed, those computed beforehand included.
    factor : float
        See :class:`pyablate.results.estimate.Estimate`.
    levels : int
        How many there are.
    jobs : tuple of JobDesign or None
        One per job; None where everything is computed.
    """

    budget: str
    seed: int
    expected: int
    factor: float
    levels: int
    jobs: tuple[JobDesign | None, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON; Python's own reads and writes infinity."""
        return asdict(self)

    @classmethod
    def of(cls, known: Mapping[str, Any]) -> Design:
        """Undo :meth:`to_json`."""
        jobs = tuple(one and JobDesign.of(one) for one in known["jobs"])
        return cls(**{**known, "jobs": jobs})


def nearest(classes: int) -> DirectionCount:
    """Count the directions of a network with so many classes."""
    return DirectionCount(min(NEAREST, classes - 1), 0)


def design(setup: Setup, budget: Budget, seed: int, *, images: int, processes: int) -> Design:
    """Reckon the chances of all jobs' pairs; see the module.

    ``images`` are those of this run, a part of the data under ``shard``; as many ``processes`` have
    the time of a budget each.

    Raises
    ------
    ValueError
        The budget is a time that does not suffice, or one for what cannot be timed beforehand.
    """
    choice = [nearest(setup.classes)]
    known = samples(setup, seed, partial(_before, setup, budget), choice, in_depth=False)
    if known.unscored:
        logger.warning("pairs are drawn with one chance for all, since %s", known.unscored)
    curves = {job: _Curve.of(one) for job, [one] in known.scored.items() if _tells(one)}
    open_ = [job for job in setup.jobs if job not in known.closed]
    scale = len(setup.data)
    done = sum(curve.computed for curve in curves.values())
    plan = partial(_plan, curves, {job: len(job.rows) * scale for job in open_}, done)
    if budget.unit == "s":
        pairs = _within_time(known, plan, budget.value * processes, images / scale, images)
    elif budget.unit == "%":
        pairs = budget.value / 100 * scale * sum(len(job.rows) for job in open_)
    else:
        pairs = budget.value
    factor, share, expected = plan(pairs)
    deepest = _deepest(share)
    designs = {
        job: curves[job].design(factor, deepest)
        if job in curves
        else JobDesign(_dyadic(share), drawn=share)
        for job in open_
    }
    for job in setup.jobs:
        logger.debug("%s: %s", job.name, designs.get(job, "computed exactly, without a sample"))
    total = round(sum(expected.values())) + done
    return Design(
        str(budget), seed, total, factor, deepest + 1, tuple(map(designs.get, setup.jobs))
    )


@dataclass(frozen=True, eq=False)
class _Curve:
    """Chance that pairs of a job are predicted wrongly, by their scores.

    Attributes
    ----------
    scale : Scale
        Of the scores.
    pairs, computed : int
        That were looked at, silent ones included; those that were computed.
    above, below : (ndarray, ndarray, ndarray)
        Distinct scores ascending, without their sign, chances of these, and how many have them.
    """

    scale: Scale
    pairs: int
    computed: int
    above: tuple[Floats, Floats, Floats]
    below: tuple[Floats, Floats, Floats]

    @classmethod
    def of(cls, sample: Sample) -> _Curve:
        """Take it from a sample: low scores and others have errors with tails of their own."""
        scale = sample.scale(None)
        live = sample.scores_of_live(scale)
        score, error = sample.scores(None, scale), sample.errors(None, scale)
        live = live[~np.isnan(live)]
        cut = float(np.quantile(live, LOW)) if len(live) else 0.0
        low, others = (Tail.of(error[some]) for some in (score <= cut, score > cut))
        too_low = Tail.of(-error[score <= max(cut, 0.0)])

        def side(scores: Floats, chance: Callable[[Floats], Floats]) -> Any:
            distinct, count = np.unique(scores, return_counts=True)
            return distinct, np.minimum.accumulate(chance(distinct)), count.astype(np.float64)

        return cls(
            scale,
            sample.pairs,
            len(score),
            side(live[live >= 0], lambda q: np.where(q <= cut, low.chance(q), others.chance(q))),
            side(-live[live < 0], too_low.chance),
        )

    def levels(self, chance: Floats, factor: float, deepest: int) -> NDArray[np.int64]:
        """int64: levels at which chances of being wrong are drawn."""
        with np.errstate(divide="ignore"):
            found = np.rint(-np.log2(factor * np.sqrt(chance)))
        return np.clip(found, 0, deepest).astype(np.int64)

    def drawn(self, factor: float, deepest: int) -> float:
        """Share of all pairs that are drawn."""
        found = sum(
            float(count @ 0.5 ** self.levels(chance, factor, deepest))
            for _, chance, count in (self.above, self.below)
        )
        return found / max(1, self.pairs)

    def design(self, factor: float, deepest: int) -> JobDesign:
        """Return the chances with a factor."""
        limits = []
        for score, chance, _ in (self.above, self.below):
            level = self.levels(chance, factor, deepest)
            first = np.searchsorted(level, np.arange(1, deepest + 1))
            limits.append(tuple(_short(s) for s in np.append(score, np.inf)[first].tolist()))
        above, below = limits
        return JobDesign(1.0, self.scale, above, below, self.drawn(factor, deepest))


def _before(setup: Setup, budget: Budget, job: Job) -> float:
    """Pairs of a job to compute beforehand."""
    share = budget.value / 100 * len(job.rows) * len(setup.data)
    if budget.unit == "s":
        return TIMED
    return min(
        MOST, BEFORE * (share if budget.unit == "%" else budget.value * len(job.rows) / setup.rows)
    )


def _tells(sample: Sample) -> bool:
    """Whether a sample tells anything."""
    return bool(sample.actual) and sample.scale(None).size > 0


def _deepest(share: float) -> int:
    """Level of the surest pairs, where a share of all is drawn."""
    return max(1, math.floor(-math.log2(FLOOR * share)))


def _plan(
    curves: Mapping[Job, _Curve], pairs: Mapping[Job, int], done: int, budget: float
) -> tuple[float, float, dict[Job, float]]:
    """Find the factor with which so many pairs are drawn.

    Returns
    -------
    float, float, dict
        It, the share of all pairs that this comes to, and the pairs of each job.
    """
    total = max(1, sum(pairs.values()))
    share = min(1.0, max(1.0, budget - done) / total)
    deepest = _deepest(share)

    def expected(step: int) -> dict[Job, float]:
        factor = STEP**step
        return {
            job: count * (curves[job].drawn(factor, deepest) if job in curves else share)
            for job, count in pairs.items()
        }

    low, high = -1000, 1000
    while high - low > 1:
        middle = (low + high) // 2
        enough = sum(expected(middle).values()) <= share * total
        low, high = (middle, high) if enough else (low, middle)
    return STEP**low, share, expected(low)


def _within_time(
    known: Samples,
    plan: Callable[[float], tuple[float, float, dict[Job, float]]],
    seconds: float,
    part: float,
    images: int,
) -> float:
    """Find how many pairs can be computed in so many seconds, on a part of the images.

    Raises
    ------
    ValueError
        None, or nothing is known of what they take.
    """
    if known.unscored:
        raise ValueError(
            f"budget: no pair could be timed beforehand, since {known.unscored}; expected a share "
            "of the pairs or a number of them"
        )
    took, of = _sums(known.batch_seconds)
    left = seconds - images * took / of
    each = {
        job: _sums([(s, len(n)) for s, n in zip(one.seconds, one.actual, strict=True)])
        for job, [one] in known.scored.items()
    }

    def enough(step: int) -> bool:
        _, _, expected = plan(STEP**step)
        return part * sum(n * each[job][0] / each[job][1] for job, n in expected.items()) <= left

    low, high = 0, 2000
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    if not enough(low):
        raise ValueError(
            f"budget: {seconds:.3g} s are not enough for the images alone, which take about "
            f"{images * took / of:.3g} s; expected more"
        )
    return STEP**low


def _sums(took: Sequence[tuple[float, int]]) -> tuple[float, int]:
    """Seconds, and for how many; without the first ones, which have to get ready."""
    some = took[1:] or took
    return sum(seconds for seconds, _ in some), max(1, sum(count for _, count in some))


def _dyadic(number: float) -> float:
    """Eight binary digits, so that sums of chances are exact, whatever their order."""
    mantissa, exponent = math.frexp(number)
    return math.ldexp(math.floor(256 * mantissa), exponent - 8)


def _short(number: float) -> float:
    """Three digits: the last bits of a sum depend on the machine."""
    return float(f"{number:.2e}") if math.isfinite(number) else number
