"""Screening: which pairs (unit, image) are computed, and which keep their class by prediction.

A pair's score is the lead that its class is predicted to keep, in units of the predicted change of
the logits (:mod:`pyablate.engine.predicted_change`). It is settled where the score is above a
threshold of its layer. Thresholds are measured before the first block, on random pairs of random
images of the whole data, by the largest errors of their scores; they depend on the seed and the
data, not on how the images are cut into batches, shards or processes.

Of the settled pairs a random sample is computed all the same. It is drawn by a hash of row, image
and seed, and bounds how many of the others are wrong (:mod:`pyablate.results.screening`). A pair of
the sample that is wrong raises its layer's threshold above its score by steps of :data:`STEP`, and
what was done with the lower one is done again: pairs between the two are computed then.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyablate.analysis.tail import Tail
from pyablate.data.dataset import Batch
from pyablate.engine import clean_run
from pyablate.engine.clean import Clean
from pyablate.engine.job import Job
from pyablate.engine.pair_slice import logit_change
from pyablate.engine.precision_cascade import PrecisionCascade
from pyablate.engine.predicted_change import COMPETITORS, FEW_CLASSES, RANDOM, Predictor
from pyablate.engine.rounding import Rounding
from pyablate.engine.score import Score
from pyablate.engine.suffix import Suffix, needed
from pyablate.engine.sweep import Sweep
from pyablate.interventions import uniform
from pyablate.results.screening import LayerScreening, Sampled, Screening
from pyablate.runs.setup import Setup

logger = logging.getLogger("pyablate")

IMAGES = 128
"""Images on which thresholds are measured, all where there are fewer."""

SHARE = 0.01
LEAST, MOST = 512, 4096
"""Pairs of each layer on which its threshold is measured: a share of all, within these limits."""

FLOOR = 0.1
"""Share of a layer's typical predicted change below which a change counts as that: where a gradient
vanishes, a prediction of no change is worth no more than one of this."""

STEP = 1.25
"""Factor by which a threshold is raised."""

NEAR = 2.0
"""Multiple of the threshold up to which settled pairs are near it."""

FAR_SHARE, NEAR_SHARE = 0.01, 0.05
"""Chances of settled pairs to be sampled, beyond that and up to it, larger where pairs are few."""

ENOUGH = 3000
"""Sampled pairs of a run at least: as many as bound the share of wrong ones by a thousandth."""


@dataclass(frozen=True)
class JobThreshold:
    """Which of a job's pairs are settled.

    Attributes
    ----------
    threshold : float
        Score above which a pair is.
    floor : float
        See :meth:`pyablate.engine.score.Score.relative`.
    measured : int
        Pairs on which this rests.
    settled : float
        Share of all pairs that are settled, in those images.
    """

    threshold: float
    floor: float
    measured: int
    settled: float

    def at(self, raised: int) -> float:
        """Return the threshold once it has been raised so often."""
        return self.threshold * STEP**raised

    def steps(self, score: float) -> int:
        """How often to raise it so that it is above a score."""
        if score <= self.threshold or self.threshold <= 0:
            return 0 if score <= self.threshold else _OPEN
        return 1 + math.floor(math.log(score / self.threshold, STEP))


_OPEN = 1000
"""Steps that no score survives."""


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
    jobs : tuple of JobThreshold or None
        One per job; None where everything is computed.
    """

    risk: float
    seed: int
    near_chance: float
    far_chance: float
    jobs: tuple[JobThreshold | None, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON; Python's own reads and writes infinity."""
        return asdict(self)

    @classmethod
    def of(cls, known: Mapping[str, Any]) -> Thresholds:
        """Undo :meth:`to_json`."""
        jobs = tuple(None if one is None else JobThreshold(**one) for one in known["jobs"])
        return cls(**{**known, "jobs": jobs})


@dataclass(eq=False)
class Screen:
    """Settles pairs of one run by prediction.

    Attributes
    ----------
    setup : Setup
        The run.
    thresholds : Thresholds
        Of its jobs.
    predictor : Predictor
        Of the jobs that have one.
    raised : dict
        How often each job's threshold has been raised.
    found : dict
        What was done with a job's pairs on the batch at work.
    """

    setup: Setup
    thresholds: Thresholds
    predictor: Predictor = field(init=False)
    raised: dict[Job, int] = field(init=False)
    found: dict[Job, LayerScreening] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._of = {
            job: one
            for job, one in zip(self.setup.jobs, self.thresholds.jobs, strict=True)
            if one is not None
        }
        self.predictor = predictor(self.setup, list(self._of))
        self.raised = dict.fromkeys(self.setup.jobs, 0)

    def scores(self, batch: Batch, clean: Clean) -> dict[Job, Score]:
        """Predict the pairs of a batch; none where the clean run is not finite."""
        return {} if clean.irregular or not self._of else self.predictor.scores(batch, clean)

    def choose(self, job: Job, batch: Batch, clean: Clean, row: Tensor, image: Tensor) -> Choice:
        """Look at the scores of some live pairs ``[P]`` of a job that has any."""
        known = self._of[job]
        score = clean.scores[job].of(row, image).relative(known.floor)
        at_first = score > known.threshold
        near = at_first & (score <= NEAR * known.threshold)
        places = row.numpy() + job.rows.start, batch.index[image].numpy()
        draw = torch.from_numpy(uniform(self.thresholds.seed, *places))
        chance = torch.where(near, self.thresholds.near_chance, self.thresholds.far_chance)
        return Choice(score, near, at_first & ~near, at_first & (draw < chance))

    def settles(self, job: Job, choice: Choice) -> Tensor:
        """Bool ``[P]``: pairs that need not be computed, by the threshold as it is now."""
        return (choice.score > self._of[job].at(self.raised[job])) & ~choice.sampled

    def learn(self, job: Job, choice: Choice, wrong: Tensor) -> bool:
        """Raise a threshold above the scores of wrong pairs, bool ``[P]``; whether it was."""
        scores = choice.score[wrong & choice.sampled].tolist()
        steps = max((self._of[job].steps(score) for score in scores), default=0)
        if steps <= self.raised[job]:
            return False
        self.raised[job] = steps
        logger.info("%s: %d settled pairs were wrong: threshold raised", job.name, len(scores))
        return True

    def take_note(
        self, job: Job, pairs: int, choice: Choice, computed: Tensor, wrong: Tensor
    ) -> None:
        """Count what was done with a job's pairs on a batch."""
        near, far = (
            Sampled(int(of.sum()), int((of & choice.sampled).sum()), int((of & wrong).sum()))
            for of in (choice.near, choice.far)
        )
        self.found[job] = LayerScreening(
            pairs=pairs,
            silent=pairs - len(choice.score),
            computed=int(computed.sum()),
            near=near,
            far=far,
            threshold=self._of[job].at(self.raised[job]),
            raised=self.raised[job],
        )

    def nothing(self) -> Screening:
        """Begin to count."""
        few = self.setup.classes <= FEW_CLASSES
        return Screening(
            self.thresholds.risk,
            self.thresholds.near_chance,
            self.thresholds.far_chance,
            self.setup.classes - 1 if few else COMPETITORS,
            0 if few else RANDOM,
        )


@dataclass(frozen=True, eq=False)
class Choice:
    """Live pairs of a job on a batch, all ``[P]``.

    Attributes
    ----------
    score : Tensor
        float32.
    near, far : Tensor
        Bool: settled by the first threshold, close to it or beyond.
    sampled : Tensor
        Bool: of these, those that are computed all the same.
    """

    score: Tensor
    near: Tensor
    far: Tensor
    sampled: Tensor


def predictor(setup: Setup, jobs: Sequence[Job]) -> Predictor:
    """Make what predicts some jobs of a run."""
    assert setup.graph is not None or not jobs
    graph = setup.graph
    suffixes = {job: Suffix.of(graph, job) for job in jobs} if graph is not None else {}
    return Predictor(graph, suffixes, setup.own.replacements, setup.memory)  # type: ignore[arg-type]


def measure(setup: Setup, risk: float, seed: int) -> Thresholds:
    """Measure the thresholds of all jobs; see the module."""
    errors = _measured(setup, seed)
    jobs = tuple(None if job not in errors else errors[job].threshold(risk) for job in setup.jobs)
    for job, one in zip(setup.jobs, jobs, strict=True):
        if one is None:
            logger.info("%s: computed exactly, without screening", job.name)
    settled = sum(
        one.settled * len(job.rows) for job, one in zip(setup.jobs, jobs, strict=True) if one
    )
    enough = min(1.0, ENOUGH / max(1.0, settled * len(setup.data)))
    far = max(FAR_SHARE, enough)
    return Thresholds(risk, seed, max(NEAR_SHARE, far), far, jobs)


@dataclass(eq=False)
class _Errors:
    """Scores of a job's pairs on the images that are looked at, and how wrong some of them are."""

    pairs: int = 0
    live: list[Score] = field(default_factory=list)
    decided: list[Score] = field(default_factory=list)
    actual: list[Tensor] = field(default_factory=list)

    def threshold(self, risk: float) -> JobThreshold:
        """Find the threshold that this suggests."""
        live, decided = _joined(self.live), _joined(self.decided)
        typical = live.size[torch.isfinite(live.size)].square().mean().sqrt()
        floor = FLOOR * float(typical.nan_to_num(0.0))
        if not len(decided.size) or floor == 0:
            return JobThreshold(math.inf, floor, len(decided.size), 0.0)
        actual = Score(torch.cat(self.actual), decided.size)
        error = decided.relative(floor).double() - actual.relative(floor).double()
        scores = live.relative(floor).double()
        found = Tail.of(error.numpy()).threshold(scores.numpy(), risk)
        settled = float((scores > found).sum()) / max(1, self.pairs)
        return JobThreshold(_rounded_up(found), floor, len(error), settled)


def _measured(setup: Setup, seed: int) -> dict[Job, _Errors]:
    """Predict and compute random pairs of the jobs that can be screened."""
    graph = setup.graph
    if graph is None or setup.abrupt:
        return {}
    suffixes = {job: Suffix.of(graph, job) for job in setup.jobs}
    jobs = [job for job, suffix in suffixes.items() if graph.logits in suffix.nodes]
    guess = predictor(setup, jobs)
    found = {job: _Errors() for job in jobs}
    for batch, clean in _batches(setup, seed, needed(suffixes.values())):
        try:
            scores = guess.scores(batch, clean)
        except RuntimeError as error:
            logger.warning(
                "nothing is screened, everything is computed: the network has no gradient (%s)",
                str(error).splitlines()[0],
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
                _measure(setup, sweep, batch, scores[job], seed, found[job])
    return found


def _batches(setup: Setup, seed: int, keep: set[Any]) -> Iterator[tuple[Batch, Clean]]:
    """Random images of the data, with their clean runs."""
    draw = np.random.Generator(np.random.Philox(seed))
    count = len(setup.data)
    index = np.sort(draw.choice(count, size=min(IMAGES, count), replace=False))
    rounding = Rounding()
    assert setup.graph is not None
    for batch in setup.data.chosen(index.tolist(), setup.batch_size):
        clean = clean_run.run_graph(setup.graph, keep, setup.exact, batch, rounding=rounding)
        rounding = clean.rounding
        if not clean.irregular:
            yield batch, clean


def _measure(
    setup: Setup, sweep: Sweep, batch: Batch, scores: Score, seed: int, found: _Errors
) -> None:
    """Compute some random pairs of a job in full precision."""
    job, clean = sweep.suffix.job, sweep.clean
    row, image = sweep.live_pairs()
    found.pairs += len(job.rows) * len(batch)
    found.live.append(scores.of(row, image))
    wanted = min(MOST, max(LEAST, SHARE * len(job.rows) * len(setup.data)))
    chance = wanted / (len(job.rows) * min(IMAGES, len(setup.data)))
    places = row.numpy() + job.rows.start, batch.index[image].numpy()
    drawn = torch.from_numpy(uniform(seed + 1, *places) < chance)
    row, image = row[drawn], image[drawn]
    if not len(row):
        return
    change = torch.zeros(len(row), setup.classes, dtype=clean.logits.dtype)
    place = {
        pair: number for number, pair in enumerate(zip(row.tolist(), image.tolist(), strict=True))
    }

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
    found.decided.append(scores.of(row, image))
    found.actual.append((logits.gather(1, own).squeeze(1) - others).float())


def _joined(parts: Sequence[Score]) -> Score:
    none = torch.zeros(0)
    return Score(
        torch.cat([none, *(part.lowest for part in parts)]),
        torch.cat([none, *(part.size for part in parts)]),
    )


def _rounded_up(number: float) -> float:
    """Two leading digits: the last bits of a sum over pairs depend on the machine."""
    if number <= 0 or not math.isfinite(number):
        return number
    unit = 10.0 ** (math.floor(math.log10(number)) - 1)
    return math.ceil(number / unit) * unit
