"""The audit of a run: random pairs recomputed by replay of the model itself.

In the model's own precision first. Float64 decides what that leaves open: pairs whose margin is
within its rounding, which is measured on some of them, and every pair that differs from what the
run found.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pyablate.data.dataset import Batch
from pyablate.engine.care import AuditError, Mismatch
from pyablate.engine.clean import Clean
from pyablate.engine.clean_run import close_calls
from pyablate.engine.job import Job
from pyablate.engine.loss_margin import Measured
from pyablate.engine.replay import Decision, Replay, decision
from pyablate.engine.rounding import Rounding
from pyablate.engine.suffix import Suffix, multiply_adds
from pyablate.network import near_tie
from pyablate.results.measures import Accuracy
from pyablate.runs.blocks import FlipChunk
from pyablate.runs.setup import Setup

logger = logging.getLogger("pyablate")

SHARE = 0.05
"""Of a run's time, which its audit may take unless a number of pairs is asked for."""

LEAST, MOST = 30, 300
"""Pairs of such an audit: 300 without a mismatch leave 1 % wrong ones plausible, 30 leave 10 %."""

FASTER = 10.0
"""Times as fast as in a forward pass a pair's arithmetic is done in the sweep, at most about."""

PASSES = 3.0
"""Forward passes in the model's precision that an audited pair costs: two images at least in each
call, and some calls in float64."""

RATE = 2e10
"""Operations per second of a forward pass, and :data:`CALL` the seconds that its calls cost."""

CALL = 2e-3

FIRST, LATER = 4, 8
"""The first audited pairs, and every eighth later one, are recomputed in both precisions."""


def usual_pairs(setup: Setup, images: int | None = None) -> int:
    """Pairs that take about :data:`SHARE` of a run's time.

    Counted from the sizes and the network's arithmetic at rates that are written down here, not
    taken with a stopwatch: a result must not depend on what else the machine did. ``images`` may be
    others than the data have.
    """
    images = images or len(setup.data)
    everything, graph = setup.rows * images, setup.graph
    if graph is None:  # every pair is a forward pass itself
        run, audited = float(images + everything), PASSES
    else:
        whole = sum(multiply_adds(graph, node) for node in graph.graph.nodes)
        behind = sum(len(job.rows) * Suffix.of(graph, job).mixed_work for job in setup.jobs)
        run = images * (whole + behind / FASTER) / RATE
        audited = CALL + PASSES * whole / RATE
    return min(everything, max(LEAST, min(MOST, int(SHARE * run / audited))))


@dataclass(frozen=True)
class Audited:
    """What the audit found on a job and a batch."""

    pairs: int
    wrong: list[Mismatch]
    accuracy: Sequence[Accuracy]  # of each measure


@dataclass(eq=False)
class Auditor:
    """Recomputes the pairs that were drawn when the run began.

    Attributes
    ----------
    setup : Setup
        The run.
    drawn : ndarray
        int64 ``[A, 2]``: row, image.
    on_mismatch : str
        What to do about predictions that stay wrong; see :func:`pyablate.ablate`.
    rounding : Rounding
        How far the model in its own precision was seen to be off on audited pairs.
    recomputed : int
        Audited pairs so far.
    """

    setup: Setup
    drawn: np.ndarray
    on_mismatch: str
    rounding: Rounding = field(default_factory=Rounding)
    recomputed: int = 0

    def check(
        self,
        job: Job,
        batch: Batch,
        clean: Clean,
        flips: Sequence[FlipChunk],
        measured: Measured | None,
    ) -> Audited:
        """Recompute the audited pairs of this job and batch, and compare with its flips."""
        first = int(batch.index[0])
        row, image = self._drawn(job, batch)
        if not len(row):
            return Audited(0, [], [Accuracy()] * (0 if measured is None else len(measured.names)))
        flipped = {
            (r, i): new
            for chunk in flips
            for r, i, new in zip(*(part.tolist() for part in chunk), strict=True)
        }
        intact = clean.predicted.numpy()[image - first]
        pairs = zip(row.tolist(), image.tolist(), intact.tolist(), strict=True)
        found = np.array([flipped.get((r, i), same) for r, i, same in pairs])
        replay = self.setup.replay
        rows, images = torch.from_numpy(row - job.rows.start), torch.from_numpy(image - first)
        accuracy: Sequence[Accuracy] = []
        if measured is not None:
            logits = replay.logits(batch, job, rows, images)
            used, which = images.unique(return_inverse=True)
            before = replay.logits(batch, None, used, used)[which]
            accuracy = measured.audit(rows, images, before, logits)
            exact = decision(logits)
        elif clean.irregular or not self._may_settle:
            exact = decision(replay.logits(batch, job, rows, images))
        else:
            exact = self._recompute(job, batch, clean, rows, images, torch.from_numpy(found))
        expected = exact.prediction.numpy()
        wrong = (expected != found) & ~exact.near_tie.numpy()
        named = zip(*(part[wrong].tolist() for part in (row, image, found, expected)), strict=True)
        return Audited(len(found), [Mismatch(*pair) for pair in named], accuracy)

    @property
    def _may_settle(self) -> bool:
        """Whether float32 may settle any pair: not where the run itself replays."""
        other = self.setup.replay.dtype != self.setup.data.dtype
        return other and self.setup.graph is not None and not self.setup.abrupt

    @cached_property
    def _own(self) -> Replay:
        return replace(self.setup.own, rows=self.setup.replay.rows)

    def _recompute(
        self, job: Job, batch: Batch, clean: Clean, row: Tensor, image: Tensor, found: Tensor
    ) -> Decision:
        """Decide pairs in the model's own precision where that settles them as they were found."""
        logits = self._own.logits(batch, job, row, image)
        prediction, tie = decision(logits).prediction, torch.zeros(len(row), dtype=torch.bool)
        number = self.recomputed + torch.arange(len(row))
        todo = (number < FIRST) | (number % LATER == 0) | (prediction != found)
        todo |= ~near_tie.usable(logits)
        done = torch.zeros_like(todo)
        self.recomputed += len(row)
        while True:
            # The clean run watches the most unusual images; its bound can but widen this one.
            bound = self.rounding | clean.rounding
            todo = (todo | close_calls(logits, bound.tolerance(logits))) & ~done
            if not bool(todo.any()):
                return Decision(prediction, tie)
            exact = self.setup.replay.logits(batch, job, row[todo], image[todo])
            usable = near_tie.usable(exact) & near_tie.usable(logits[todo])
            if bool(usable.any()):
                self.rounding |= Rounding.measured(logits[todo][usable], exact[usable])
            truth = decision(exact)
            prediction[todo], tie[todo] = truth.prediction, truth.near_tie
            done |= todo

    def _drawn(self, job: Job, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Rows and images of the audited pairs of a job on consecutive images."""
        first, last = int(batch.index[0]), int(batch.index[-1])
        row, image = self.drawn.T
        mine = (row >= job.rows.start) & (row < job.rows.stop) & (image >= first) & (image <= last)
        return row[mine], image[mine]

    def draws(self, job: Job, batch: Batch, row: Tensor, image: Tensor) -> Tensor:
        """Tell which pairs ``[P]`` (row in the job, place in the batch) are audited, bool."""
        rows, images = self._drawn(job, batch)
        number = (rows - job.rows.start) * len(batch) + images - int(batch.index[0])
        return torch.isin(row * len(batch) + image, torch.from_numpy(number))

    def check_intact(self, batch: Batch, clean: Clean, audited: Audited) -> None:
        """Look whether the clean run is at fault: no care that a job takes would mend that."""
        image = torch.tensor(sorted({pair.image for pair in audited.wrong})) - int(batch.index[0])
        exact = decision(self.setup.replay.logits(batch, None, image, image))
        found, names = clean.predicted[image], (*self.setup.class_names, "none")
        wrong = ((found != exact.prediction) & ~exact.near_tie).nonzero().flatten().tolist()
        for place in wrong[:1]:
            self.give_up(
                f"audit: with no unit ablated, image {int(batch.index[image[place]])} was found "
                f"to be {names[found[place]]}, expected {names[exact.prediction[place]]}"
            )

    def give_up(self, found: str) -> None:
        """Say what cannot be mended, in an error if that is wanted.

        Raises
        ------
        AuditError
            It is wanted.
        """
        found += (
            ". Please report this, with the model and what `pyablate doctor --json` prints; the "
            "other predictions of this run may be wrong too"
        )
        if self.on_mismatch == "error":
            raise AuditError(f'{found}. on_mismatch="warn" (--on-mismatch warn) gives them')
        logger.error("%s", found)

    def describe(self, job: Job, audited: Audited) -> str:
        """Name the first pair that differs."""
        pair, names = audited.wrong[0], (*self.setup.class_names, "none")  # by -1
        members = job.members[pair.row - job.rows.start]
        unit = "+".join(f"{name}:{unit}" for name, unit in members)
        return (
            f"audit: layer {job.name}: {len(audited.wrong)} of {audited.pairs} recomputed pairs "
            f"differ: without unit {unit}, image {pair.image} was found to be "
            f"{names[pair.found]}, expected {names[pair.expected]}"
        )
