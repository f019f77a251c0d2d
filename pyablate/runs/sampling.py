"""Drawing pairs in an estimated run, and what is recorded of those that were computed.

Each pair is drawn by a hash of row, image and seed, whatever the batch, the thread or the process.
What is recorded are the predicted flips, and corrections of them where drawn pairs were found to be
something else; see :mod:`pyablate.results.estimate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pyablate.data.dataset import Batch
from pyablate.engine.clean import Clean
from pyablate.engine.job import Job
from pyablate.engine.predicted_change import Predictor
from pyablate.engine.score import Prediction
from pyablate.engine.suffix import Suffix
from pyablate.interventions import uniform
from pyablate.results.estimate import Estimate
from pyablate.runs.blocks import FlipChunk
from pyablate.runs.sampling_design import Design, JobDesign, nearest
from pyablate.runs.screening_sample import predictor
from pyablate.runs.setup import Setup


@dataclass(frozen=True, eq=False)
class Drawn:
    """Pairs of a job on a batch, all ``[P]`` on the CPU.

    Attributes
    ----------
    level : Tensor
        int64: of its chance.
    chance : Tensor
        float64: to be computed.
    chosen : Tensor
        Bool: it is.
    predicted : Tensor
        int32: its class by prediction.
    """

    level: Tensor
    chance: Tensor
    chosen: Tensor
    predicted: Tensor


@dataclass(frozen=True, eq=False)
class Noted:
    """What was drawn of a job on a batch, and found.

    Attributes
    ----------
    flips : list of FlipChunk
        With weights.
    live, drawn, spread : ndarray
        Of the rows of the job; see :class:`pyablate.results.estimate.Estimate`.
    """

    flips: list[FlipChunk]
    live: np.ndarray
    drawn: np.ndarray
    spread: np.ndarray


@dataclass(eq=False)
class Drawing:
    """Draws pairs of one run.

    Attributes
    ----------
    setup : Setup
        The run.
    design : Design
        Chances of its pairs.
    found : dict
        What was done with a job's pairs on the batch at work.
    """

    setup: Setup
    design: Design
    found: dict[Job, Noted] = field(default_factory=dict)

    @cached_property
    def _of(self) -> Mapping[Job, JobDesign]:
        pairs = zip(self.setup.jobs, self.design.jobs, strict=True)
        return {job: one for job, one in pairs if one is not None}

    @cached_property
    def _predictor(self) -> Predictor | None:
        graph, scored = self.setup.graph, [job for job, one in self._of.items() if one.scored]
        if graph is None or not scored:
            return None
        suffixes = {job: Suffix.of(graph, job) for job in scored}
        return predictor(self.setup, suffixes, [], [nearest(self.setup.classes)], rivals=True)

    def share(self, job: Job) -> float:
        """Share of a job's pairs that is computed, about."""
        return self._of[job].drawn if job in self._of else 1.0

    def predict(self, batch: Batch, clean: Clean, jobs: Iterable[Job]) -> Clean:
        """Add what gradients say on a batch on which everything is finite, if any job is scored."""
        scored = any(job in self._of and self._of[job].scored for job in jobs)
        if self._predictor is None or not scored:
            return clean
        return replace(clean, predicted_change=self._predictor.predict(batch, clean))

    def samples(self, job: Job) -> bool:
        """Whether pairs of a job are drawn without a look at them, where there are no scores."""
        return job in self._of and not self._of[job].scored

    def draw(self, job: Job, batch: Batch, clean: Clean, row: Tensor, image: Tensor) -> Drawn:
        """Draw pairs ``[P]`` (row in the job, place in the batch); all where nothing is known."""
        design, predicted = self._of.get(job), clean.predicted_change
        intact = clean.predicted[image]
        level, top, classes = torch.zeros(len(row), dtype=torch.int64), 1.0, intact
        if design is not None and not design.scored:
            top = design.top
        elif design is not None and predicted is not None:
            level, classes = _scored(design, predicted, job, row, image, intact)
        chance = top * 0.5 ** level.double()
        if top == 1.0 and not level.any():
            return Drawn(level, chance, torch.ones_like(level, dtype=torch.bool), classes)
        places = row.numpy() + job.rows.start, batch.index[image].numpy()
        chosen = torch.from_numpy(uniform(self.design.seed, *places)) < chance
        return Drawn(level, chance, chosen, classes)

    def take_note(
        self,
        job: Job,
        batch: Batch,
        clean: Clean,
        row: Tensor,
        image: Tensor,
        drawn: Drawn,
        found: Tensor,
    ) -> None:
        """Keep what drawn pairs were found to be; ``found`` is int32 ``[P]``, read of these."""
        intact, label = clean.predicted[image], batch.labels.cpu()[image]
        chosen, weight = drawn.chosen, 1.0 / drawn.chance
        rows, levels, classes = len(job.rows), self.design.levels, self.setup.classes
        guessed = drawn.predicted != intact
        right = found == drawn.predicted
        stands = torch.where(chosen & ~right, 1.0 - weight, 1.0)
        guessed &= stands != 0.0
        others = chosen & ~right & (found != intact)
        parts = ((guessed, drawn.predicted, stands), (others, found, weight))
        chance = drawn.chance
        self.found[job] = Noted(
            flips=[
                (
                    (row[which] + job.rows.start).numpy(),
                    batch.index[image[which]].numpy(),
                    new[which].numpy(),
                    value[which].numpy(),
                )
                for which, new, value in parts
            ],
            live=_sums(row * levels + drawn.level, rows * levels).reshape(rows, levels),
            drawn=_sums(row[chosen], rows),
            spread=_sums(row * classes + label, rows * classes, chance * (1.0 - chance)).reshape(
                rows, classes
            ),
        )

    def noted(self, job: Job, flips: list[FlipChunk]) -> Noted:
        """Return what was found of a job on a batch, of which these flips if all was computed."""
        rows = len(job.rows)
        known = [(*chunk, np.ones(len(chunk[0]))) for chunk in flips]
        nothing = Noted(
            known,
            np.zeros((rows, self.design.levels), np.int64),
            np.zeros(rows, np.int64),
            np.zeros((rows, self.setup.classes)),
        )
        return self.found.pop(job, nothing)

    def nothing(self) -> Estimate:
        """Begin to count."""
        rows = self.setup.rows
        top = np.ones(rows)
        for job, one in self._of.items():
            top[job.rows.start : job.rows.stop] = one.top
        return Estimate(
            budget=self.design.budget,
            expected=self.design.expected,
            factor=self.design.factor,
            top=top,
            live=np.zeros((rows, self.design.levels), np.int64),
            drawn=np.zeros(rows, np.int64),
            spread=np.zeros((rows, self.setup.classes)),
        )


def _scored(
    design: JobDesign,
    predicted: Prediction,
    job: Job,
    row: Tensor,
    image: Tensor,
    intact: Tensor,
) -> tuple[Tensor, Tensor]:
    """Levels of pairs by their scores, and their predicted classes."""
    [scores] = predicted.scores[job]
    known = scores.of(row, image)
    score = known.relative(design.scale)
    level = torch.from_numpy(design.level(score.double().numpy()))
    assert known.rival is not None
    return level, torch.where(score < 0, known.rival, intact)


def _sums(cell: Tensor, cells: int, of: Tensor | None = None) -> np.ndarray:
    """Count pairs by cell, or sum numbers; these are chances, whose sums are exact."""
    return np.bincount(cell.numpy(), None if of is None else of.numpy(), minlength=cells)
