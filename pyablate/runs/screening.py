"""Screening: which pairs (unit, image) are computed, and which keep their class by prediction.

A pair's score is the lead that its class is predicted to keep, in units of how large errors of
predictions are for changes like its own (:class:`pyablate.engine.score.Scale`). It is settled where
the score is above a threshold (:mod:`pyablate.runs.thresholds`).

Of the settled pairs a random sample is computed all the same. It is drawn by a hash of row, image
and seed, and bounds how many of the others are wrong (:mod:`pyablate.results.screening`). A pair of
the sample that is wrong raises its layer's thresholds above its score by steps, and what was done
with lower ones is done again: pairs between the two are computed then.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, fx

from pyablate.data.dataset import Batch
from pyablate.engine.clean import Clean
from pyablate.engine.job import Job
from pyablate.engine.pair_slice import carry
from pyablate.engine.predicted_change import Predictor
from pyablate.engine.score import Prediction
from pyablate.engine.suffix import Suffix
from pyablate.engine.sweep import Sweep
from pyablate.interventions import uniform
from pyablate.results.screening import LayerScreening, Sampled, Screening
from pyablate.runs.screening_sample import predictor
from pyablate.runs.setup import Setup
from pyablate.runs.thresholds import NEAR, JobThresholds, Stage, Thresholds

logger = logging.getLogger("pyablate")


@dataclass(frozen=True, eq=False)
class Choice:
    """Live pairs of a job on a batch, all ``[P]`` on the CPU.

    Attributes
    ----------
    stage : Tensor
        int64: which of the job's stages settled it by its first threshold; -1 for none.
    score : Tensor
        float32: its score there.
    near : Tensor
        Bool: that is close to the threshold.
    sampled : Tensor
        Bool: it is settled, and computed all the same.
    """

    stage: Tensor
    score: Tensor
    near: Tensor
    sampled: Tensor

    @classmethod
    def none(cls, pairs: int) -> Choice:
        """Begin with pairs that nothing has settled."""
        no = torch.zeros(pairs, dtype=torch.bool)
        return cls(torch.full((pairs,), -1), torch.zeros(pairs), no, no.clone())

    @property
    def settled(self) -> Tensor:
        """Bool: by a first threshold."""
        return self.stage >= 0


@dataclass(eq=False)
class Screen:
    """Settles pairs of one run by prediction.

    Attributes
    ----------
    setup : Setup
        The run.
    thresholds : Thresholds
        Of its jobs.
    raised : dict
        How often each job's thresholds have been raised.
    found : dict
        What was done with a job's pairs on the batch at work.
    """

    setup: Setup
    thresholds: Thresholds
    raised: dict[Job, int] = field(init=False)
    found: dict[Job, LayerScreening] = field(default_factory=dict)
    _predictors: dict[frozenset[Job], Predictor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.raised = dict.fromkeys(self.setup.jobs, 0)

    @cached_property
    def _of(self) -> Mapping[Job, JobThresholds]:
        pairs = zip(self.setup.jobs, self.thresholds.jobs, strict=True)
        return {job: one for job, one in pairs if one is not None}

    @cached_property
    def _nodes(self) -> Mapping[str, fx.Node]:
        """Narrow places by name."""
        assert self.setup.graph is not None
        names = {stage.place for one in self._of.values() for stage in one.stages if stage.place}
        return {node.name: node for node in self.setup.graph.graph.nodes if node.name in names}

    def _predictor(self, jobs: frozenset[Job]) -> Predictor:
        """Make what predicts some of the jobs: fewer of them may need fewer layers' gradients."""
        if jobs not in self._predictors:
            graph = self.setup.graph
            assert graph is not None
            suffixes = {job: Suffix.of(graph, job) for job in self._of if job in jobs}
            names = {stage.place for job in suffixes for stage in self._of[job].stages}
            places = [node for name, node in self._nodes.items() if name in names]
            directions = [self.thresholds.directions]
            self._predictors[jobs] = predictor(self.setup, suffixes, places, directions)
        return self._predictors[jobs]

    def share(self, job: Job) -> float:
        """Share of a job's pairs that is computed, about, silent ones included."""
        if job not in self._of:
            return 1.0
        settled = self._of[job].settled
        return 1.0 - settled * (1.0 - self.thresholds.far_chance)

    def predict(self, batch: Batch, clean: Clean, jobs: Iterable[Job]) -> Clean:
        """Add what gradients say of some jobs on a batch on which everything is finite."""
        screened = frozenset(job for job in jobs if job in self._of)
        if not screened:
            return clean
        return replace(clean, predicted_change=self._predictor(screened).predict(batch, clean))

    def choose(self, sweep: Sweep, batch: Batch, row: Tensor, image: Tensor) -> Choice | None:
        """Look which live pairs ``[P]`` of a job are settled; None if all are to be computed."""
        job, predicted = sweep.suffix.job, sweep.clean.predicted_change
        if predicted is None or job not in self._of:
            return None
        first, *later = self._of[job].stages
        draw = torch.from_numpy(
            uniform(self.thresholds.seed, row.numpy() + job.rows.start, batch.index[image].numpy())
        )
        choice = Choice.none(len(row))
        [known] = predicted.scores[job]
        scores = known.of(row, image).relative(first.scale)
        self._settle(choice, torch.arange(len(row)), 0, first, scores, draw)
        if later:
            self._carry(sweep, predicted, row, image, choice, later, draw)
        return choice

    def _carry(
        self,
        sweep: Sweep,
        predicted: Prediction,
        row: Tensor,
        image: Tensor,
        choice: Choice,
        later: list[Stage],
        draw: Tensor,
    ) -> None:
        """Carry open pairs to narrow places, and look again there."""
        stages = {self._nodes[stage.place]: (n, stage) for n, stage in enumerate(later, start=1)}
        dtype = self.setup.data.dtype
        size = sweep.suffix.pairs_in(self.setup.slice_bytes, self.setup.data.device)(dtype)
        for pairs in (~choice.settled).nonzero().squeeze(1).split(size):

            def look(
                place: fx.Node, some: Tensor, change: Tensor | None, own: Tensor = pairs
            ) -> Tensor:
                number, stage = stages[place]
                mine = own[some]
                [known] = predicted.at(place, image[mine], change)
                self._settle(choice, mine, number, stage, known.relative(stage.scale), draw)
                return ~choice.settled[mine]

            carry(sweep, row[pairs], image[pairs], dtype, list(stages), look)

    def _settle(
        self,
        choice: Choice,
        pairs: Tensor,
        number: int,
        stage: Stage,
        scores: Tensor,
        draw: Tensor,
    ) -> None:
        """Take note of the pairs that a stage settles."""
        chosen = scores > stage.threshold
        pairs, scores = pairs[chosen], scores[chosen]
        near = scores <= NEAR * stage.threshold
        known = self.thresholds
        chance = torch.where(near, known.near_chance, known.far_chance)
        choice.stage[pairs], choice.score[pairs] = number, scores
        choice.near[pairs], choice.sampled[pairs] = near, draw[pairs] < chance

    def settles(self, job: Job, choice: Choice) -> Tensor:
        """Bool ``[P]``: pairs that need not be computed, by the thresholds as they are now."""
        stages = self._of[job].stages
        now = torch.tensor([*(stage.at(self.raised[job]) for stage in stages), torch.inf])
        return (choice.score > now[choice.stage]) & ~choice.sampled

    def learn(self, job: Job, choice: Choice, wrong: Tensor) -> bool:
        """Raise thresholds above the scores of wrong pairs, bool ``[P]``; whether they were."""
        stages, found = self._of[job].stages, wrong & choice.sampled
        pairs = zip(choice.stage[found].tolist(), choice.score[found].tolist(), strict=True)
        steps = max((stages[stage].steps(score) for stage, score in pairs), default=0)
        if steps <= self.raised[job]:
            return False
        self.raised[job] = steps
        logger.debug("%s: %d settled pairs were wrong: thresholds raised", job.name, found.sum())
        return True

    def take_note(
        self, job: Job, pairs: int, choice: Choice, computed: Tensor, wrong: Tensor
    ) -> None:
        """Count what was done with a job's pairs on a batch."""
        drawn = choice.sampled
        near, far = (
            Sampled(*(int((of & which).sum()) for which in (choice.settled, drawn, drawn & wrong)))
            for of in (choice.near, ~choice.near)
        )
        stages = self._of[job].stages
        self.found[job] = LayerScreening(
            pairs=pairs,
            silent=pairs - len(choice.score),
            computed=int(computed.sum()),
            near=near,
            far=far,
            by_stage={
                stage.place: int((choice.stage == number).sum())
                for number, stage in enumerate(stages)
            },
            threshold=stages[0].at(self.raised[job]),
            raised=self.raised[job],
        )

    def nothing(self) -> Screening:
        """Begin to count."""
        known = self.thresholds
        return Screening(
            risk=known.risk,
            near_chance=known.near_chance,
            far_chance=known.far_chance,
            competitors=known.directions.nearest,
            random=known.directions.random,
        )
