"""Thresholds of a screened run: which scores settle a pair, measured before the first block.

Random pairs of random images of the whole data are computed, and how far their scores were off is
compared with the scores: see :mod:`pyablate.analysis.tail`. Errors grow with the change, so that
they are larger where scores are low, which is where thresholds lie: half of the pairs are drawn
among those with the lowest scores, and these and the others have a tail of errors each. Thresholds
depend on the seed and the data, not on how the images are cut into batches, shards or processes.

A pair is scored by the gradient at its unit first. Where that does not settle it, its exact change
is carried to narrow places of the network and scored again, the gradient there being nearer to the
logits: which places pay follows from the shares of pairs that stay open and the arithmetic.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from pyablate.analysis.tail import Tail, safe_above
from pyablate.data.dataset import Batch
from pyablate.engine import clean_run
from pyablate.engine.clean import Clean
from pyablate.engine.job import Job
from pyablate.engine.logit_change import carried
from pyablate.engine.narrow_places import multiply_adds, narrow_places, passed_by_all, shares
from pyablate.engine.pair_slice import carry, logit_change
from pyablate.engine.precision_cascade import PrecisionCascade
from pyablate.engine.predicted_change import Predictor
from pyablate.engine.rounding import Rounding
from pyablate.engine.score import Prediction, Score, directions
from pyablate.engine.suffix import Suffix, needed
from pyablate.engine.sweep import Sweep
from pyablate.interventions import uniform
from pyablate.runs.setup import Setup
from pyablate.runtime.chunking import GRADIENTS

logger = logging.getLogger("pyablate")

IMAGES, TOGETHER = 128, 16
"""Images on which thresholds are measured, all where there are fewer; and how many at a time."""

SHARE = 0.01
LEAST, MOST = 1024, 4096
"""Pairs of each layer on which its thresholds are measured: a share of all, within these limits."""

LOW = 0.1
"""Share of a layer's pairs whose scores are called low."""

FLOOR = 0.1
"""Share of a layer's typical predicted change below which a change counts as that: where a gradient
vanishes, a prediction of no change is worth no more than one of this."""

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

STAGES = 2
"""Narrow places at which the pairs of one layer are scored again, at most."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Stage:
    """Where pairs are scored, and which score settles one.

    Attributes
    ----------
    place : str
        Node of the graph; empty for the units themselves.
    threshold : float
        Score above which a pair is settled.
    floor : float
        See :meth:`pyablate.engine.score.Score.relative`.
    """

    place: str
    threshold: float
    floor: float

    def at(self, raised: int) -> float:
        """Return the threshold once it has been raised so often."""
        return self.threshold * STEP**raised

    def steps(self, score: float) -> int:
        """How often to raise it so that it is above a score."""
        if score <= self.threshold:
            return 0
        known = self.threshold > 0
        return 1 + math.floor(math.log(score / self.threshold, STEP)) if known else _OPEN


_OPEN = 1000
"""Steps that no score survives."""


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
    jobs : tuple of JobThresholds or None
        One per job; None where everything is computed.
    """

    risk: float
    seed: int
    near_chance: float
    far_chance: float
    jobs: tuple[JobThresholds | None, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON; Python's own reads and writes infinity."""
        return asdict(self)

    @classmethod
    def of(cls, known: Mapping[str, Any]) -> Thresholds:
        """Undo :meth:`to_json`."""
        jobs = tuple(
            one and JobThresholds(**{**one, "stages": tuple(Stage(**s) for s in one["stages"])})
            for one in known["jobs"]
        )
        return cls(**{**known, "jobs": jobs})


def measure(setup: Setup, risk: float, seed: int) -> Thresholds:
    """Measure the thresholds of all jobs; see the module."""
    samples = _samples(setup, seed)
    jobs = tuple(samples[job].thresholds(risk) if job in samples else None for job in setup.jobs)
    for job, one in zip(setup.jobs, jobs, strict=True):
        stages = (
            ""
            if one is None
            else ", ".join(f"{s.place or 'unit'} {s.threshold}" for s in one.stages)
        )
        logger.info("%s: %s", job.name, stages or "computed exactly, without screening")
    settled = sum(
        one.settled * len(job.rows) for job, one in zip(setup.jobs, jobs, strict=True) if one
    )
    enough = min(1.0, ENOUGH / max(1.0, settled * len(setup.data)))
    far = max(FAR_SHARE, enough)
    return Thresholds(risk, seed, max(NEAR_SHARE, far), far, jobs)


def predictor(setup: Setup, suffixes: Mapping[Job, Suffix], places: Sequence[fx.Node]) -> Predictor:
    """Make what predicts some jobs of a captured network."""
    assert setup.graph is not None
    return Predictor(setup.graph, suffixes, setup.own.replacements, places, setup.memory)


def carried_in(setup: Setup) -> torch.dtype:
    """Precision in which changes are carried to narrow places."""
    return carried((*setup.low, setup.data.dtype)[0])


@dataclass(eq=False)
class _Sample:
    """Random pairs of a job: what was predicted of them, and what came of it.

    Attributes
    ----------
    suffix : Suffix
        Of the job.
    places : list of fx.Node
        Narrow places that its changes pass.
    pairs : int
        Pairs of the job on the images that were looked at.
    live : list of Score
        At the units, of all pairs that the ablations change.
    low_of_live : list of Tensor
        Bool: whether these are among the lowest of their images.
    scored : dict of lists of Score
        Of the pairs computed, by place; None for the units.
    actual : list of Tensor
        Leads that they keep in fact.
    low : list of Tensor
        Bool: the same of the pairs computed.
    """

    suffix: Suffix
    places: list[fx.Node]
    pairs: int = 0
    live: list[Score] = field(default_factory=list)
    low_of_live: list[Tensor] = field(default_factory=list)
    scored: dict[fx.Node | None, list[Score]] = field(default_factory=dict)
    actual: list[Tensor] = field(default_factory=list)
    low: list[Tensor] = field(default_factory=list)

    def thresholds(self, risk: float) -> JobThresholds:
        """Choose stages and their thresholds."""
        options = [
            list(some)
            for count in range(STAGES + 1)
            for some in itertools.combinations(self._worth_a_look, count)
        ]
        return min((self._with(some, risk) for some in options), key=lambda one: one[0])[1]

    @property
    def _worth_a_look(self) -> list[fx.Node]:
        done = dict(zip(self.places, shares(self.suffix, self.places), strict=True))
        return [place for place in self.places if 0.02 < done[place] < 0.9]

    def _with(self, places: Sequence[fx.Node], risk: float) -> tuple[float, JobThresholds]:
        """Cost of a pair with stages at these places, in passes through the suffix; thresholds."""
        if not self.actual:
            return 1.0, JobThresholds((Stage("", math.inf, 0.0),), 0, 0.0)
        live, each = joined(self.live), risk / (1 + len(places))
        actual, low = torch.cat(self.actual), torch.cat(self.low).numpy()
        low_of_live = torch.cat(self.low_of_live).numpy()
        weight = np.where(low, LOW / max(1, low.sum()), (1 - LOW) / max(1, (~low).sum()))
        open_, stages, cost, before = np.ones(len(low), bool), [], 0.0, 0.0
        for place in (None, *places):
            score = joined(self.scored[place])
            floor = FLOOR * _typical(live.size if place is None else score.size)
            known = _relative(score, floor)
            error = known - _relative(Score(actual, score.size), floor)
            tails = [Tail.of(error[of]) for of in (low, ~low)]
            if place is None:
                every = _relative(live, floor)
                safe = _safe(tails, every, low_of_live, np.ones(len(every)), each)
            else:
                safe = _safe(tails, known, low, weight, each)
            found = _rounded_up(safe) if floor else math.inf
            stages.append(Stage("" if place is None else place.name, found, floor))
            if place is not None:
                done = shares(self.suffix, [place])[0]
                cost += weight @ open_ * (done - before + self._look(place))
                before = done
            open_ = open_ & ~(known > found)
        left = float(weight @ open_)
        settled = (1.0 - left) * len(live.size) / max(1, self.pairs)
        return cost + left, JobThresholds(tuple(stages), len(low), settled)

    def _look(self, place: fx.Node) -> float:
        """Cost of a look at a place."""
        graph = self.suffix.graph
        whole = sum(multiply_adds(graph, node) for node in self.suffix.nodes)
        return 4.0 * directions(graph.shape(graph.logits, 1)[-1]) * graph.elements(place) / whole


def _safe(tails: Sequence[Tail], scores: Floats, low: Any, weight: Floats, risk: float) -> float:
    """Find the score above which pairs are settled, with tails of low scores and of others."""
    chance = np.where(low, *(tail.chance(scores) for tail in tails))
    worst = max(tail.exceeded(WORST) for tail in tails)
    return max(worst, safe_above(scores, chance, weight, risk))


def _samples(setup: Setup, seed: int) -> dict[Job, _Sample]:
    """Predict and compute random pairs of the jobs that can be screened."""
    graph = setup.graph
    if graph is None or setup.abrupt:
        logger.warning(
            "nothing is screened, everything is computed: the network %s",
            "was not captured" if graph is None else "jumps, and its gradient does not show that",
        )
        return {}
    suffixes = {job: Suffix.of(graph, job) for job in setup.jobs}
    suffixes = {job: one for job, one in suffixes.items() if graph.logits in one.nodes}
    places = chosen_places(setup, suffixes)
    found = {
        job: _Sample(suffix, [place for place in places if place in passed_by_all(suffix.nodes)])
        for job, suffix in suffixes.items()
    }
    guess = predictor(setup, suffixes, places)
    for batch, clean in _batches(setup, seed, needed(suffixes.values())):
        try:
            predicted = guess.predict(batch, clean)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            logger.warning(
                "nothing is screened, everything is computed: the network has no gradient (%s)",
                reason,
            )
            return {}
        for job in list(found):
            sweep = Sweep(suffixes[job], clean, setup.own.replacements(batch, job))
            with torch.no_grad():
                if job.channelwise:
                    sweep.advance()
                if sweep.head is not None:  # one comparison per pair: nothing to be saved
                    del found[job]
                    continue
                _sample(setup, sweep, batch, predicted, seed, found[job])
    return found


def chosen_places(setup: Setup, suffixes: Mapping[Job, Suffix]) -> list[fx.Node]:
    """Narrow places, with no more gradients than :data:`GRADIENTS` together."""
    assert setup.graph is not None
    return narrow_places(
        setup.graph, suffixes.values(), GRADIENTS // (4 * directions(setup.classes))
    )


def _batches(setup: Setup, seed: int, keep: set[fx.Node]) -> Iterator[tuple[Batch, Clean]]:
    """Random images of the data, with their clean runs."""
    draw = np.random.Generator(np.random.Philox(seed))
    count = len(setup.data)
    index = np.sort(draw.choice(count, size=min(IMAGES, count), replace=False))
    rounding = Rounding()
    assert setup.graph is not None
    for batch in setup.data.chosen(index.tolist(), TOGETHER):
        clean = clean_run.run_graph(setup.graph, keep, setup.exact, batch, rounding=rounding)
        rounding = clean.rounding
        if not clean.irregular:
            yield batch, clean


def _sample(
    setup: Setup, sweep: Sweep, batch: Batch, predicted: Prediction, seed: int, found: _Sample
) -> None:
    """Compute some random pairs of a job in full precision, and carry them to all places."""
    job = sweep.suffix.job
    row, image = sweep.live_pairs()
    dense = {node for node, _, _ in sweep.steps}  # before these, changes are on their channels
    found.places = [place for place in found.places if place in dense]
    scores = predicted.scores[job].of(row, image)
    found.pairs += len(job.rows) * len(batch)
    found.live.append(scores)
    low = _lowest(scores)
    found.low_of_live.append(low)
    wanted = min(MOST, max(LEAST, SHARE * len(job.rows) * len(setup.data)))
    every = len(job.rows) * min(IMAGES, len(setup.data))
    chance = wanted / 2 / every * torch.where(low, 1.0 / LOW, 1.0 / (1 - LOW))
    places = row.numpy() + job.rows.start, batch.index[image].numpy()
    drawn = torch.from_numpy(uniform(seed + 1, *places)) < chance
    row, image = row[drawn], image[drawn]
    if not len(row):
        return
    found.low.append(low[drawn])
    found.scored.setdefault(None, []).append(scores.only(drawn))
    found.actual.append(_leads(setup, sweep, row, image))
    for place, score in carried_scores(setup, sweep, predicted, row, image, found.places).items():
        found.scored.setdefault(place, []).append(score)


def _lowest(scores: Score) -> Tensor:
    """Bool ``[P]``: the pairs of some images that have the lowest scores."""
    ranked = scores.relative(FLOOR * _typical(scores.size)).argsort(stable=True)
    low = torch.zeros(len(ranked), dtype=torch.bool)
    low[ranked[: math.ceil(LOW * len(ranked))]] = True
    return low


def carried_scores(
    setup: Setup,
    sweep: Sweep,
    predicted: Prediction,
    row: Tensor,
    image: Tensor,
    places: Sequence[fx.Node],
) -> dict[fx.Node, Score]:
    """Score pairs at each of some places."""
    none = torch.full((len(row),), torch.nan)
    found = {place: Score(none.clone(), none.clone()) for place in places}
    dtype = carried_in(setup)
    size = sweep.suffix.pairs_in(setup.slice_bytes)(dtype)
    for pairs in torch.arange(len(row)).split(size):

        def look(
            place: fx.Node, some: Tensor, change: Tensor | None, own: Tensor = pairs
        ) -> Tensor:
            score = predicted.at(place, image[own[some]], change)
            found[place].lowest[own[some]] = score.lowest
            found[place].size[own[some]] = score.size
            return torch.ones(len(some), dtype=torch.bool)

        carry(sweep, row[pairs], image[pairs], dtype, places, look)
    return found


def _leads(setup: Setup, sweep: Sweep, row: Tensor, image: Tensor) -> Tensor:
    """Lead that the intact network's class keeps over the best other one, float32 ``[P]``."""
    clean = sweep.clean
    change = torch.zeros(len(row), setup.classes, dtype=clean.logits.dtype)
    pairs = zip(row.tolist(), image.tolist(), strict=True)
    place = {pair: number for number, pair in enumerate(pairs)}

    def record(rows: Tensor, images: Tensor, changed: Tensor) -> None:
        where = [place[pair] for pair in zip(rows.tolist(), images.tolist(), strict=True)]
        change[where] = changed.cpu().to(change.dtype)

    cascade = PrecisionCascade([setup.data.dtype])
    size = sweep.suffix.pairs_in(setup.slice_bytes)
    cascade.classify(
        lambda *pairs: logit_change(sweep, *pairs), row, image, clean, size, record=record
    )
    logits = clean.logits.cpu()[image] + change
    own = clean.predicted[image].long().unsqueeze(1)
    others = logits.scatter(1, own, -torch.inf).amax(dim=1)
    return (logits.gather(1, own).squeeze(1) - others).float()


def joined(parts: Sequence[Score]) -> Score:
    """Put scores together, also none."""
    none = torch.zeros(0)
    return Score(
        torch.cat([none, *(part.lowest for part in parts)]),
        torch.cat([none, *(part.size for part in parts)]),
    )


def _relative(score: Score, floor: float) -> Floats:
    found: Floats = score.relative(floor).double().numpy()
    return found


def _typical(size: Tensor) -> float:
    """Root of the mean square of predicted changes."""
    finite = size[torch.isfinite(size)].double()
    return float(finite.square().mean().sqrt().nan_to_num(0.0))


def _rounded_up(number: float) -> float:
    """Two leading digits: the last bits of a sum over pairs depend on the machine."""
    if number <= 0 or not math.isfinite(number):
        return number
    digits = 1 - math.floor(math.log10(number))
    return round(math.ceil(number * 10.0**digits) / 10.0**digits, digits)
