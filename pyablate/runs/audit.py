"""The audit of a run: random pairs recomputed by replay of the model itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyablate.data.dataset import Batch
from pyablate.engine.care import AuditError, Mismatch
from pyablate.engine.clean import Clean
from pyablate.engine.job import Job
from pyablate.engine.loss_margin import Measured
from pyablate.engine.replay import decision
from pyablate.results.measures import Accuracy
from pyablate.runs.blocks import FlipChunk
from pyablate.runs.setup import Setup

logger = logging.getLogger("pyablate")


@dataclass(frozen=True)
class Audited:
    """What the audit found on a job and a batch."""

    pairs: int
    wrong: list[Mismatch]
    accuracy: Sequence[Accuracy]  # of each measure


@dataclass(frozen=True, eq=False)
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
    """

    setup: Setup
    drawn: np.ndarray
    on_mismatch: str

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
        logits = replay.logits(batch, job, rows, images)
        exact = decision(logits)
        accuracy: Sequence[Accuracy] = []
        if measured is not None:
            used, which = images.unique(return_inverse=True)
            before = replay.logits(batch, None, used, used)[which]
            accuracy = measured.audit(rows, images, before, logits)
        expected = exact.prediction.numpy()
        wrong = (expected != found) & ~exact.near_tie.numpy()
        named = zip(*(part[wrong].tolist() for part in (row, image, found, expected)), strict=True)
        return Audited(len(found), [Mismatch(*pair) for pair in named], accuracy)

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
