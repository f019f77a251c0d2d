"""Thresholds of a screened run: which scores settle a pair, measured before the first block.

Random pairs of the whole data are computed (:mod:`pyablate.runs.screening_sample`), and how far
their scores were off is compared with the scores: see :mod:`pyablate.analysis.tail`.

A pair is scored by the gradient at its unit first. Where that does not settle it, its exact change
is carried to narrow places of the network and scored again, the gradient there being nearer to the
logits: which places pay follows from the shares of pairs that stay open and the arithmetic.

So does the number of directions along which changes are predicted. The pairs are scored along all
that there may be, and by parts of these from the same gradients: fewer directions are fewer
backward passes for each image, and more open pairs.

Layers that gain nothing by all that are computed: :mod:`pyablate.runs.screening_costs`.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from torch import fx

from pyablate.analysis.tail import Tail, safe_above
from pyablate.engine.job import Job
from pyablate.engine.narrow_places import shares
from pyablate.engine.score import DirectionCount, Scale
from pyablate.engine.suffix import Suffix, multiply_adds
from pyablate.results.arrays import Floats
from pyablate.runs.screening_costs import DEARER, GAIN, LAYER, Work, faster, worthwhile
from pyablate.runs.screening_sample import IMAGES, Sample, pairs_wanted, samples
from pyablate.runs.setup import Setup

logger = logging.getLogger("pyablate")

STEP = 1.25
"""Factor by which a threshold is raised."""

WORST = 1e-3
"""Largest chance to be wrong at which a pair is settled, however few such pairs there are: how many
is not known well, as they lie on few images."""

NEAR = 2.0
"""Multiple of the threshold up to which settled pairs are near it."""

FAR_SHARE, NEAR_SHARE = 0.01, 0.05
"""Chances of settled pairs to be sampled, beyond that and up to it, larger where pairs are few."""

ENOUGH = 3000
"""Sampled pairs of a run at least: as many as bound the share of wrong ones by a thousandth."""

POWERS = [(size / 2, norm / 2) for norm in range(5) for size in range(3) if size or norm]
"""Powers of size and norm of a change with which its error may grow, up to the second order."""

OPEN = 0.05
"""Share of the pairs that stays open in layers that gain by being screened, about."""

STAGES = 2
"""Narrow places at which the pairs of one layer are scored again, at most."""


@dataclass(frozen=True)
class Stage:
    """Where pairs are scored, and which score settles one.

    Attributes
    ----------
    place : str
        Node of the graph; empty for the units themselves.
    threshold : float
        Score above which a pair is settled.
    scale : Scale
        Unit of scores.
    cost : float
        Of a pair that gets here from the stage before, in passes through the suffix as an exact run
        makes them.
    open : float
        Share of the live pairs that are open behind it, as the measured ones suggest.
    """

    place: str
    threshold: float
    scale: Scale
    cost: float = 0.0
    open: float = 1.0

    @classmethod
    def of(cls, known: Mapping[str, Any]) -> Stage:
        """Undo :func:`dataclasses.asdict`."""
        return cls(**{**known, "scale": Scale(**known["scale"])})

    def at(self, raised: int) -> float:
        """Return the threshold once it has been raised so often."""
        return self.threshold * STEP**raised

    def steps(self, score: float) -> int:
        """How often to raise it so that it is above a score."""
        if score <= self.threshold:
            return 0
        return 1 + math.floor(math.log(score / self.threshold, STEP))


@dataclass(frozen=True)
class JobThresholds:
    """Which of a job's pairs are settled, and where.

    Attributes
    ----------
    stages : tuple of Stage
        In order, the units themselves first.
    measured : int
        Pairs on which this rests.
    settled : float
        Share of all pairs that are settled, as these suggest.
    """

    stages: tuple[Stage, ...]
    measured: int
    settled: float

    @property
    def passes(self) -> float:
        """What a live pair costs, in passes through the suffix: stages, and the rest if open."""
        reach = [1.0, *(stage.open for stage in self.stages)]
        return sum(n * stage.cost for n, stage in zip(reach, self.stages, strict=False)) + reach[-1]


@dataclass(frozen=True)
class Thresholds:
    """What was measured before the first block.

    Attributes
    ----------
    risk : float
        See :func:`pyablate.ablate`.
    seed : int
        Of the sample.
    near_chance, far_chance : float
        Of settled pairs to be in it.
    directions : DirectionCount
        Along which changes are predicted.
    jobs : tuple of JobThresholds or None
        One per job; None where everything is computed.
    """

    risk: float
    seed: int
    near_chance: float
    far_chance: float
    directions: DirectionCount
    jobs: tuple[JobThresholds | None, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON; Python's own reads and writes infinity."""
        return asdict(self)

    @classmethod
    def of(cls, known: Mapping[str, Any]) -> Thresholds:
        """Undo :meth:`to_json`."""
        jobs = tuple(
            one and JobThresholds(**{**one, "stages": tuple(map(Stage.of, one["stages"]))})
            for one in known["jobs"]
        )
        return cls(**{**known, "directions": DirectionCount(**known["directions"]), "jobs": jobs})


def measure(setup: Setup, risk: float, seed: int, images: int | None = None) -> Thresholds:
    """Measure the thresholds of all jobs, for as many images as the data have; see the module."""
    images, choices = images or len(setup.data), DirectionCount.choices(setup.classes)
    known = samples(
        setup,
        seed,
        lambda job: pairs_wanted(len(job.rows), images),
        choices,
        choose=lambda live: promising(setup, live, images),
    )
    directions, found = _cheapest(known.scored, choices, images, risk)
    if known.unscored:
        logger.warning("nothing is screened, everything is computed: %s", known.unscored)
    elif not found and len(known.closed) < len(setup.jobs):
        logger.info("nothing is screened: to compute all pairs is reckoned to take no longer")
    jobs = tuple(map(found.get, setup.jobs))
    for job, one in zip(setup.jobs, jobs, strict=True):
        stages = (
            ""
            if one is None
            else ", ".join(f"{s.place or 'unit'} {s.threshold}" for s in one.stages)
        )
        logger.debug("%s: %s", job.name, stages or "computed exactly, without screening")
    if found:
        told = "screened: %d of %d layers, the others are computed; predicted along %s"
        logger.info(told, len(found), len(jobs), directions)
    far = _far_chance(found, images)
    return Thresholds(risk, seed, max(NEAR_SHARE, far), far, directions, jobs)


def promising(setup: Setup, live: Mapping[Job, float], images: int) -> frozenset[Job]:
    """Choose the jobs that may be worth measuring, if few pairs are open along few directions.

    ``live`` is the share of each job's pairs that the ablations change.
    """
    assert setup.graph is not None
    choices, looked_at = DirectionCount.choices(setup.classes), min(IMAGES, images)
    layer = LAYER[setup.data.device.type]
    suffixes = {job: Suffix.of(setup.graph, job) for job in live}
    speed = {job: faster(setup, suffix) for job, suffix in suffixes.items()}

    def works(jobs: Collection[Job]) -> dict[Job, Work]:
        pairs = {job: images * len(job.rows) * live[job] for job in jobs}
        computed, found = DEARER * (OPEN + far_chance(sum(pairs.values()))), {}
        for job in jobs:
            each = suffixes[job].mixed_work
            exact = pairs[job] * each / speed[job]
            known = min(pairs_wanted(len(job.rows), images), looked_at / images * pairs[job])
            found[job] = Work(suffixes[job], exact, known * each + layer + computed * exact)
        return found

    passes = images * choices[-1].total + looked_at * choices[0].total
    return _chosen(works, live, passes, GAIN)[0]


def _chosen(
    works: Callable[[Collection[Job]], dict[Job, Work]],
    jobs: Collection[Job],
    passes: float,
    gain: float = 0.0,
) -> tuple[frozenset[Job], float]:
    """Choose the jobs to screen, as :func:`worthwhile`, until nothing changes.

    The fewer there are, the larger is the share of their pairs that is sampled.
    """
    others = 0.0
    while True:
        reckoned = works(jobs)
        chosen, operations = worthwhile(reckoned, passes, gain)
        if len(chosen) == len(reckoned):
            return chosen, operations + others
        others += sum(work.exact for job, work in reckoned.items() if job not in chosen)
        jobs = [job for job in reckoned if job in chosen]


def far_chance(settled: float) -> float:
    """Chance of settled pairs to be sampled, of which there will be about so many."""
    return max(FAR_SHARE, min(1.0, ENOUGH / max(1.0, settled)))


def _far_chance(jobs: Mapping[Job, JobThresholds], images: int) -> float:
    return far_chance(images * sum(one.settled * len(job.rows) for job, one in jobs.items()))


def _cheapest(
    scored: Mapping[Job, Sequence[Sample]],
    choices: Sequence[DirectionCount],
    images: int,
    risk: float,
) -> tuple[DirectionCount, dict[Job, JobThresholds]]:
    """Choose the directions with which a run takes least arithmetic, and the thresholds with these.

    The most directions of several that take as much, to three digits: the last bits of open shares
    depend on the machine. Jobs that do not gain by it have no thresholds.
    """
    found, cost = {}, {}
    for number, count in enumerate(choices):
        jobs = {job: _best(some[number], risk) for job, some in scored.items()}
        reckon = partial(_works, jobs, scored, images)
        chosen, operations = _chosen(reckon, jobs, images * count.total)
        found[count] = {job: one for job, one in jobs.items() if job in chosen}
        cost[count] = float(f"{operations:.3g}")
        logger.debug("predicted along %s: %g operations", count, cost[count])
    cheapest = min(cost, key=cost.__getitem__)
    return cheapest, found[cheapest]


def _works(
    thresholds: Mapping[Job, JobThresholds],
    scored: Mapping[Job, Sequence[Sample]],
    images: int,
    jobs: Collection[Job],
) -> dict[Job, Work]:
    """Tell what the pairs of these jobs take, in an exact run and with these thresholds."""
    far, found = _far_chance({job: thresholds[job] for job in jobs}, images), {}
    for job in jobs:
        known = thresholds[job]
        sample = scored[job][0]
        each = images * len(job.rows) * sample.suffix.mixed_work / sample.faster
        screened = sample.live_share * known.passes + known.settled * far
        found[job] = Work(sample.suffix, each * sample.live_share, DEARER * each * screened)
    return found


def _best(sample: Sample, risk: float) -> JobThresholds:
    """Choose the places that save most arithmetic, and the thresholds there."""
    if not sample.actual:
        return JobThresholds((Stage("", math.inf, Scale(0.0, 0.0)),), 0, 0.0)
    done = dict(zip(sample.places, shares(sample.suffix, sample.places), strict=True))
    able = [place for place in sample.places if 0.02 < done[place] < 0.9]
    found = []
    scales = {place: _scale(sample, place, risk) for place in (None, *able)}
    for count in range(min(STAGES, len(able)) + 1):
        stages = {
            place: _stage(sample, place, scale, risk / (1 + count))
            for place, scale in scales.items()
        }
        for some in itertools.combinations(able, count):
            found.append(_with(sample, {place: stages[place] for place in (None, *some)}, done))
    return min(found, key=lambda one: one.passes)


def _with(
    sample: Sample, stages: Mapping[fx.Node | None, Stage], done: Mapping[fx.Node, float]
) -> JobThresholds:
    """Follow the pairs through these stages."""
    weight = sample.weight
    open_ = np.ones(len(weight), bool)
    left, before, known = 1.0, 0.0, []
    for place, stage in stages.items():
        cost = 0.0
        if place is not None:
            cost = sample.faster * (done[place] - before + _look(sample, place))
            before = done[place]
        open_ = open_ & ~(sample.scores(place, stage.scale) > stage.threshold)
        left = float(weight @ open_)
        known.append(replace(stage, cost=cost, open=left))
    return JobThresholds(tuple(known), len(weight), (1.0 - left) * sample.live_share)


def _scale(sample: Sample, place: fx.Node | None, risk: float) -> Scale:
    """Choose the powers of the changes with which fewest pairs stay open."""
    plain = sample.scale(place)
    if not plain.size:
        return plain
    powers = [replace(plain, size_power=size, norm_power=norm) for size, norm in POWERS]

    def left(scale: Scale) -> float:
        scores = sample.scores(place, scale)
        safe = _safe(sample, place, scale, scores, risk)
        if safe <= 0:  # nothing would be settled: see `_stage`
            return 1.0
        # The last bits of scores depend on the machine; what they choose must not.
        return round(float(sample.weight @ ~(scores > safe)), 3)

    return min(powers, key=left)


def _stage(sample: Sample, place: fx.Node | None, scale: Scale, risk: float) -> Stage:
    """Find the score at a place above which pairs are settled.

    At the units all live pairs are scored, and tell how many are concerned; elsewhere those that
    were computed do.
    """
    name = "" if place is None else place.name
    if not scale.size:
        return Stage(name, math.inf, scale)
    scores = sample.scores_of_live(scale) if place is None else sample.scores(place, scale)
    safe = _safe(sample, place, scale, scores, risk)
    return Stage(name, _rounded_up(safe) if safe > 0 else math.inf, scale)


def _safe(
    sample: Sample, place: fx.Node | None, scale: Scale, scores: Floats, risk: float
) -> float:
    """Find the score above which pairs with these scores, all or those computed, are settled.

    Low scores and others have tails of their own.
    """
    error = sample.errors(place, scale)
    tails = [Tail.of(error[of]) for of in (sample.low, ~sample.low)]
    every = len(scores) > len(sample.low)
    low = sample.low_of_live if every else sample.low
    weight = np.ones(len(scores)) if every else sample.weight
    chance = np.where(low, *(tail.chance(scores) for tail in tails))
    worst = max(tail.exceeded(WORST) for tail in tails)
    return max(worst, safe_above(scores, chance, weight, risk))


def _look(sample: Sample, place: fx.Node) -> float:
    """Cost of a look at a place, in passes through the suffix."""
    graph = sample.suffix.graph
    whole = sum(multiply_adds(graph, node) for node in sample.suffix.nodes)
    return 4.0 * sample.directions.total * graph.elements(place) / whole


def _rounded_up(number: float) -> float:
    """Two leading digits: the last bits of a sum over pairs depend on the machine."""
    if number <= 0 or not math.isfinite(number):
        return number
    digits = 1 - math.floor(math.log10(number))
    return round(math.ceil(number * 10.0**digits) / 10.0**digits, digits)
