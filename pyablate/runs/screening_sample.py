"""Random pairs of a screened run, computed before the first block to see how good predictions are.

Of random images of the whole data, so that what follows depends on the seed and the data, not on
how the images are cut into batches, shards or processes. Errors of predictions grow with the
change, so that they are larger where scores are low, which is where thresholds lie: half of the
pairs are drawn among those with the lowest scores.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from pyablate.engine.pair_slice import carry
from pyablate.engine.predicted_change import Predictor
from pyablate.engine.rounding import Rounding
from pyablate.engine.score import DirectionCount, Prediction, Scale, Score, joined
from pyablate.engine.suffix import Suffix, needed
from pyablate.engine.sweep import Sweep
from pyablate.interventions import uniform
from pyablate.results.arrays import Floats
from pyablate.runs.screening_costs import faster
from pyablate.runs.setup import Setup
from pyablate.runtime import out_of_memory
from pyablate.runtime.chunking import GRADIENTS
from pyablate.runtime.host_to_device import sent

IMAGES, TOGETHER = 128, 16
"""Images on which thresholds are measured, all where there are fewer; and how many at a time."""

SHARE = 0.01
LEAST, MOST = 1024, 4096
"""Pairs of each layer on which its thresholds are measured: a share of all, within these limits."""

LOW = 0.1
"""Share of a layer's pairs whose scores are called low."""


def predictor(
    setup: Setup,
    suffixes: Mapping[Job, Suffix],
    places: Sequence[fx.Node],
    choices: Sequence[DirectionCount],
    *,
    rivals: bool = False,
) -> Predictor:
    """Make what predicts some jobs of a captured network."""
    assert setup.graph is not None
    own, memory = setup.own.replacements, setup.memory
    return Predictor(setup.graph, suffixes, own, places, memory, choices, rivals)


@dataclass(eq=False)
class Sample:
    """Random pairs of a job: what was predicted of them, and what came of it.

    Attributes
    ----------
    suffix : Suffix
        Of the job.
    directions : DirectionCount
        Along which that was predicted.
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
    wanted : float
        Pairs that are to be computed, about.
    faster : float
        How many times as fast a run computes pairs as they are computed here, in full precision.
    seconds : list of float
        What each batch of these took.
    """

    suffix: Suffix
    directions: DirectionCount
    places: list[fx.Node]
    wanted: float
    faster: float = 1.0
    pairs: int = 0
    live: list[Score] = field(default_factory=list)
    lowest: list[Tensor] = field(default_factory=list)
    drawn: list[Tensor] = field(default_factory=list)
    scored: dict[fx.Node | None, list[Score]] = field(default_factory=dict)
    actual: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

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

    @property
    def live_share(self) -> float:
        """Share of the pairs that the ablations change."""
        return sum(map(len, self.lowest)) / max(1, self.pairs)

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


@dataclass(eq=False)
class Samples:
    """What was found of all jobs.

    Attributes
    ----------
    scored : dict of lists of Sample
        Of the jobs whose pairs gradients tell of: the same pairs, by each choice of directions.
    closed : set
        Jobs with a closed form, or without effect on the logits: there is nothing to be saved.
    unscored : str
        Why there are no others, if so.
    batch_seconds : list of (float, int)
        What clean runs and predictions took, and of how many images.
    """

    scored: dict[Job, list[Sample]] = field(default_factory=dict)
    closed: set[Job] = field(default_factory=set)
    unscored: str = ""
    batch_seconds: list[tuple[float, int]] = field(default_factory=list)


def samples(
    setup: Setup,
    seed: int,
    wanted: Callable[[Job], float],
    choices: Sequence[DirectionCount],
    *,
    in_depth: bool = True,
    choose: Callable[[Mapping[Job, float]], Collection[Job]] = lambda live: live,
) -> Samples:
    """Predict and compute random pairs of the jobs that can be screened.

    Parameters
    ----------
    setup, seed
        The run, and what draws the pairs.
    wanted : callable
        How many of each job.
    choices : sequence of DirectionCount
        Of directions, all of them parts of the first, whose scores tell which are low.
    in_depth : bool
        Changes are carried to narrow places of the network as well.
    choose : callable
        Chooses among the jobs by the share of their pairs that the ablations change.
    """
    graph = setup.graph
    if graph is None or setup.abrupt:
        why = "was not captured" if graph is None else "jumps, and its gradient does not show that"
        return Samples(unscored=f"the network {why}")
    suffixes = {job: Suffix.of(graph, job) for job in setup.jobs}
    told = Samples(closed={j for j, one in suffixes.items() if graph.logits not in one.nodes})
    suffixes = {job: one for job, one in suffixes.items() if job not in told.closed}
    begin = time.perf_counter()
    batches = _batches(setup, seed, needed(suffixes.values()))
    first = next(batches, None)
    spent = time.perf_counter() - begin
    if first is None:
        return replace(told, unscored="no image was found of which all numbers inside are finite")
    live = _live_shares(setup, suffixes, *first)
    told.closed |= suffixes.keys() - live.keys()
    chosen = choose(live)
    suffixes = {job: one for job, one in suffixes.items() if job in chosen}
    if not suffixes:
        return told
    places = chosen_places(setup, suffixes) if in_depth else []
    found = told.scored
    for job, suffix in suffixes.items():
        passed = [place for place in places if place in passed_by_all(suffix)]
        speed = faster(setup, suffix)
        found[job] = [Sample(suffix, count, passed, wanted(job), speed) for count in choices]
    guess = predictor(setup, suffixes, places, choices)
    begin = time.perf_counter() - spent
    for batch, clean in itertools.chain([first], batches):
        try:
            predicted = guess.predict(batch, clean)
        except RuntimeError as error:
            if out_of_memory.is_shortage(error):
                raise
            reason = str(error).splitlines()[0]
            return replace(told, scored={}, unscored=f"the network has no gradient ({reason})")
        told.batch_seconds.append((time.perf_counter() - begin, len(batch)))
        for job, some in found.items():
            with torch.no_grad():
                sweep = _swept(setup, suffixes[job], batch, clean)
                _sample(setup, sweep, batch, predicted, seed, some)
        begin = time.perf_counter()
    return told


def _live_shares(
    setup: Setup, suffixes: Mapping[Job, Suffix], batch: Batch, clean: Clean
) -> dict[Job, float]:
    """Share of a batch's pairs that each job changes, of jobs without a closed form.

    With one there is nothing to be saved: it is one comparison per pair.
    """
    found = {}
    for job, suffix in suffixes.items():
        with torch.no_grad():
            sweep = _swept(setup, suffix, batch, clean)
            if sweep.head is None:
                found[job] = sweep.live_share()
    return found


def _swept(setup: Setup, suffix: Suffix, batch: Batch, clean: Clean) -> Sweep:
    """Begin a job on a batch, as far as its changes stay on their channels."""
    sweep = Sweep(suffix, clean, setup.own.replacements(batch, suffix.job))
    if suffix.job.channelwise:
        sweep.advance()
    return sweep


def chosen_places(setup: Setup, suffixes: Mapping[Job, Suffix]) -> list[fx.Node]:
    """Narrow places, with no more gradients than :data:`GRADIENTS` together."""
    assert setup.graph is not None
    most = DirectionCount.most(setup.classes).total
    return narrow_places(setup.graph, suffixes.values(), GRADIENTS // (4 * most))


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
    setup: Setup,
    sweep: Sweep,
    batch: Batch,
    predicted: Prediction,
    seed: int,
    found: Sequence[Sample],
) -> None:
    """Compute some random pairs of a job in full precision, and carry them to all places."""
    job, first = sweep.suffix.job, found[0]
    row, image = sweep.live_pairs()
    dense = {node for node, _, _ in sweep.steps}  # before these, changes are on their channels
    places = [place for place in first.places if place in dense]
    scores = [score.of(row, image) for score in predicted.scores[job]]
    low = _lowest(scores[0])
    every = len(job.rows) * min(IMAGES, len(setup.data))
    chance = first.wanted / 2 / every * torch.where(low, 1.0 / LOW, 1.0 / (1 - LOW))
    pair = row.numpy() + job.rows.start, batch.index[image].numpy()
    drawn = torch.from_numpy(uniform(seed + 1, *pair)) < chance
    for sample, score in zip(found, scores, strict=True):
        sample.places = places
        sample.pairs += len(job.rows) * len(batch)
        sample.live.append(score)
        sample.lowest.append(low)
        sample.drawn.append(drawn)
    row, image = row[drawn], image[drawn]
    if not len(row):
        return
    begin = time.perf_counter()
    lead, there = _carried(setup, sweep, predicted, row, image, places)
    seconds = time.perf_counter() - begin
    there[None] = [score.only(drawn) for score in scores]
    for number, sample in enumerate(found):
        sample.seconds.append(seconds)
        sample.actual.append(lead)
        for place, known in there.items():
            sample.scored.setdefault(place, []).append(known[number])


def _lowest(scores: Score) -> Tensor:
    """Bool ``[P]``: the pairs of some images that have the lowest scores."""
    ranked = scores.relative(_typical_scale(scores)).argsort(stable=True)
    low = torch.zeros(len(ranked), dtype=torch.bool)
    low[ranked[: math.ceil(LOW * len(ranked))]] = True
    return low


def _carried(
    setup: Setup,
    sweep: Sweep,
    predicted: Prediction,
    row: Tensor,
    image: Tensor,
    places: Sequence[fx.Node],
) -> tuple[Tensor, dict[fx.Node | None, list[Score]]]:
    """Carry pairs through the network; leads that the intact network's class keeps, and scores.

    Leads over the best other class, float32 ``[P]``, are what the model's own precision says: near
    ties are of no account here. NaN, where logits are not finite, counts as the largest error.
    Scores are by place and choice of directions.
    """
    logits, own = sweep.clean.logits, sweep.clean.prediction.long()
    lead = _leads(logits, own).float().cpu()[image]
    found: dict[fx.Node | None, list[Score]] = {
        place: [Score(*torch.full((3, len(row)), torch.nan)) for _ in predicted.choices]
        for place in places
    }
    dtype = setup.data.dtype  # low ones are chosen by a stopwatch, and scores must not depend on it
    size = sweep.suffix.pairs_in(setup.slice_bytes, setup.data.device)(dtype)
    for pairs in torch.arange(len(row)).split(size):

        def look(
            place: fx.Node, some: Tensor, change: Tensor | None, mine: Tensor = pairs
        ) -> Tensor:
            which = mine[some]
            if place is sweep.graph.logits:
                of = sent(image[which], logits.device)
                after = logits[of] if change is None else logits[of] + change
                lead[which] = _leads(after, own[of]).float().cpu()
                return torch.zeros(len(some), dtype=torch.bool)
            scores = predicted.at(place, image[which], change)
            for known, score in zip(found[place], scores, strict=True):
                known.put(which, score)
            return torch.ones(len(some), dtype=torch.bool)

        carry(sweep, row[pairs], image[pairs], dtype, [*places, sweep.graph.logits], look)
    return lead, found


def _leads(logits: Tensor, own: Tensor) -> Tensor:
    """Lead ``[P]`` of a class over the best other one."""
    own = own.unsqueeze(1)
    others = logits.scatter(1, own, -torch.inf).amax(dim=1)
    return logits.gather(1, own).squeeze(1) - others


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
