"""Random pairs of a screened run, computed before the first block to see how good predictions are.

Of random images of the whole data, so that what follows depends on the seed and the data, not on
how the images are cut into batches, shards or processes. Errors of predictions grow with the
change, so that they are larger where scores are low, which is where thresholds lie: half of the
pairs are drawn among those with the lowest scores.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from pyablate.data.dataset import Batch
from pyablate.engine import clean_run
from pyablate.engine.clean import Clean
from pyablate.engine.job import Job
from pyablate.engine.narrow_places import narrow_places, passed_by_all
from pyablate.engine.pair_slice import carry, logit_change
from pyablate.engine.precision_cascade import PrecisionCascade
from pyablate.engine.predicted_change import Predictor
from pyablate.engine.rounding import Rounding
from pyablate.engine.score import Prediction, Scale, Score, directions, joined
from pyablate.engine.suffix import Suffix, needed
from pyablate.engine.sweep import Sweep
from pyablate.interventions import uniform
from pyablate.runs.setup import Setup
from pyablate.runtime import out_of_memory
from pyablate.runtime.chunking import GRADIENTS

logger = logging.getLogger("pyablate")

IMAGES, TOGETHER = 128, 16
"""Images on which thresholds are measured, all where there are fewer; and how many at a time."""

SHARE = 0.01
LEAST, MOST = 1024, 4096
"""Pairs of each layer on which its thresholds are measured: a share of all, within these limits."""

LOW = 0.1
"""Share of a layer's pairs whose scores are called low."""

Floats = NDArray[np.float64]


def predictor(setup: Setup, suffixes: Mapping[Job, Suffix], places: Sequence[fx.Node]) -> Predictor:
    """Make what predicts some jobs of a captured network."""
    assert setup.graph is not None
    return Predictor(setup.graph, suffixes, setup.own.replacements, places, setup.memory)


@dataclass(eq=False)
class Sample:
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
    lowest : list of Tensor
        Bool: whether these are among the lowest of their images.
    drawn : list of Tensor
        Bool: whether these were computed.
    scored : dict of lists of Score
        Of the pairs computed, by place; None for the units.
    actual : list of Tensor
        Leads that they keep in fact.
    """

    suffix: Suffix
    places: list[fx.Node]
    pairs: int = 0
    live: list[Score] = field(default_factory=list)
    lowest: list[Tensor] = field(default_factory=list)
    drawn: list[Tensor] = field(default_factory=list)
    scored: dict[fx.Node | None, list[Score]] = field(default_factory=dict)
    actual: list[Tensor] = field(default_factory=list)

    @cached_property
    def low_of_live(self) -> NDArray[np.bool_]:
        """Bool ``[live]``: whether scores at the units are low."""
        found: NDArray[np.bool_] = torch.cat(self.lowest).numpy()
        return found

    @cached_property
    def low(self) -> NDArray[np.bool_]:
        """The same of the pairs computed."""
        found: NDArray[np.bool_] = self.low_of_live[torch.cat(self.drawn).numpy()]
        return found

    @cached_property
    def weight(self) -> Floats:
        """float64: share of the live pairs for which each that was computed stands."""
        low = self.low
        found: Floats = np.where(low, LOW / max(1, low.sum()), (1 - LOW) / max(1, (~low).sum()))
        return found

    @cached_property
    def _all_live(self) -> Score:
        return joined(self.live)

    @cached_property
    def _computed(self) -> dict[fx.Node | None, Score]:
        return {place: joined(parts) for place, parts in self.scored.items()}

    @cached_property
    def _wrong_by(self) -> dict[fx.Node | None, Score]:
        """How much too high the predicted leads were, in place of them."""
        actual = torch.cat(self.actual)
        return {p: replace(one, lowest=one.lowest - actual) for p, one in self._computed.items()}

    def scale(self, place: fx.Node | None) -> Scale:
        """Take errors to be as large as the changes that are predicted."""
        return _typical_scale(self._all_live if place is None else self._computed[place])

    def scores_of_live(self, scale: Scale) -> Floats:
        """Scores at the units of all live pairs."""
        return _relative(self._all_live, scale)

    def scores(self, place: fx.Node | None, scale: Scale) -> Floats:
        """Scores of the pairs computed."""
        return _relative(self._computed[place], scale)

    def errors(self, place: fx.Node | None, scale: Scale) -> Floats:
        """How far these were too high: a pair is wrong where that is more than its score."""
        return _relative(self._wrong_by[place], scale)


def pairs_wanted(rows: int, images: int) -> float:
    """How many pairs of a job its thresholds are measured on."""
    return min(MOST, max(LEAST, SHARE * rows * images))


def samples(setup: Setup, seed: int) -> dict[Job, Sample]:
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
        job: Sample(suffix, [place for place in places if place in passed_by_all(suffix)])
        for job, suffix in suffixes.items()
    }
    guess = predictor(setup, suffixes, places)
    for batch, clean in _batches(setup, seed, needed(suffixes.values())):
        try:
            predicted = guess.predict(batch, clean)
        except RuntimeError as error:
            if out_of_memory.is_shortage(error):
                raise
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
    setup: Setup, sweep: Sweep, batch: Batch, predicted: Prediction, seed: int, found: Sample
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
    found.lowest.append(low)
    wanted = pairs_wanted(len(job.rows), len(setup.data))
    every = len(job.rows) * min(IMAGES, len(setup.data))
    chance = wanted / 2 / every * torch.where(low, 1.0 / LOW, 1.0 / (1 - LOW))
    places = row.numpy() + job.rows.start, batch.index[image].numpy()
    drawn = torch.from_numpy(uniform(seed + 1, *places)) < chance
    found.drawn.append(drawn)
    row, image = row[drawn], image[drawn]
    if not len(row):
        return
    found.scored.setdefault(None, []).append(scores.only(drawn))
    found.actual.append(_leads(setup, sweep, row, image))
    for place, score in carried_scores(setup, sweep, predicted, row, image, found.places).items():
        found.scored.setdefault(place, []).append(score)


def _lowest(scores: Score) -> Tensor:
    """Bool ``[P]``: the pairs of some images that have the lowest scores."""
    ranked = scores.relative(_typical_scale(scores)).argsort(stable=True)
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
    found = {place: Score(*torch.full((3, len(row)), torch.nan)) for place in places}
    dtype = setup.data.dtype  # low ones are chosen by a stopwatch, and scores must not depend on it
    size = sweep.suffix.pairs_in(setup.slice_bytes)(dtype)
    for pairs in torch.arange(len(row)).split(size):

        def look(
            place: fx.Node, some: Tensor, change: Tensor | None, own: Tensor = pairs
        ) -> Tensor:
            score = predicted.at(place, image[own[some]], change)
            found[place].lowest[own[some]] = score.lowest
            found[place].size[own[some]] = score.size
            found[place].norm[own[some]] = score.norm
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


def _relative(score: Score, scale: Scale) -> Floats:
    found: Floats = score.relative(scale).double().numpy()
    return found


def _typical_scale(score: Score) -> Scale:
    """Take errors to be as large as the changes that are predicted."""
    return Scale(_typical(score.size), _typical(score.norm))


def _typical(changes: Tensor) -> float:
    """Root of the mean square of changes."""
    finite = changes[torch.isfinite(changes)].double()
    return float(finite.square().mean().sqrt().nan_to_num(0.0))
