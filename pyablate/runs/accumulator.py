"""What has been found on one block so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyablate.data.dataset import Batch
from pyablate.engine.care import Care
from pyablate.engine.job import Job
from pyablate.engine.loss_margin import Measured
from pyablate.results.audit import Audit
from pyablate.results.estimate import Estimate
from pyablate.results.flips import Flips
from pyablate.results.measures import Accuracy, Measure
from pyablate.results.screening import LayerScreening, Screening
from pyablate.runs.audit import Audited
from pyablate.runs.blocks import Block, BlockMetadata, FlipChunk, PartialBlock
from pyablate.runs.sampling import Noted
from pyablate.runs.setup import Setup


@dataclass(eq=False)
class BlockAccumulator:
    """What the jobs have found on one block so far.

    Attributes
    ----------
    setup : Setup
        The run.
    measures : tuple of str
        What is recorded besides predictions.
    hashed : int
        Hash of the images.
    jobs : sequence of Job
        Those that are done.
    care : dict
        With which each job was done on the first part of the block, and how often its threshold
        had been raised.
    differed : dict
        Layers of audited pairs (row, image) that were wrong when they were first computed.
    audits : dict
        Per layer; mended pairs in it are those of an earlier process.
    screening : Screening or None
        What was settled by prediction, in a screened run.
    estimate : Estimate or None
        What was drawn, in an estimated run.
    sums : Tensor
        Float64 [measure, unit, class].
    """

    setup: Setup
    measures: tuple[str, ...]
    hashed: int
    jobs: Sequence[Job]
    differed: dict[tuple[int, int], str] = field(default_factory=dict)
    audits: dict[str, Audit] = field(default_factory=dict)
    skipped: int = 0  # jobs that an earlier process has done
    flips: list[FlipChunk] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    baseline: list[np.ndarray] = field(default_factory=list)
    strategy: dict[str, str] = field(default_factory=dict)
    care: dict[Job, tuple[Care, int]] = field(default_factory=dict)
    screening: Screening | None = None
    estimate: Estimate | None = None
    sums: Tensor = field(init=False)
    accuracy: list[Accuracy] = field(init=False)

    def __post_init__(self) -> None:
        shape = len(self.measures), self.setup.rows, self.setup.classes
        self.sums = torch.zeros(shape, dtype=torch.float64)
        self.accuracy = [Accuracy()] * len(self.measures)

    def go_on_from(self, partial: PartialBlock) -> None:
        """Take over what an earlier process has found."""
        self.skipped, self.flips = partial.jobs, list(partial.chunks)
        self.audits = dict(partial.metadata.audits)
        self.strategy = dict(partial.metadata.strategy)
        self.screening, self.estimate = partial.metadata.screening, partial.metadata.estimate
        for number, known in enumerate(partial.metadata.measures.values()):
            self.sums[number] = torch.from_numpy(known.change)
            self.accuracy[number] = known.accuracy

    def start_over(self) -> BlockAccumulator:
        """Begin again, remembering what was wrong."""
        nothing = None if self.screening is None else replace(self.screening, layers={})
        undrawn = None if self.estimate is None else self.estimate.nothing()
        return BlockAccumulator(
            self.setup,
            self.measures,
            self.hashed,
            self.jobs,
            self.differed,
            {name: Audit(0, 0, audit.mended) for name, audit in self.audits.items()},
            screening=nothing,
            estimate=undrawn,
        )

    def take(
        self,
        job: Job,
        flips: list[FlipChunk],
        measured: Measured | None,
        audited: Audited,
        *,
        care: Care,
        strategy: str,
        raised: int = 0,
        screened: LayerScreening | None = None,
        drawn: Noted | None = None,
    ) -> None:
        """Keep what a job has found on a batch, and how."""
        self.care.setdefault(job, (care, raised))
        if screened is not None and self.screening is not None:
            self.screening += replace(self.screening, layers={job.name: screened})
        if drawn is not None and self.estimate is not None:
            rows = slice(job.rows.start, job.rows.stop)
            for name in ("live", "drawn", "spread"):
                getattr(self.estimate, name)[rows] += getattr(drawn, name)
        self.flips += flips if drawn is None else drawn.flips
        audit = Audit(audited.pairs, len(audited.wrong))
        self.audits[job.name] = self.audits.get(job.name, Audit(0, 0)) + audit
        for pair in audited.wrong:
            self.differed.pop((pair.row, pair.image), None)
        if care or job.name not in self.strategy:  # two jobs may have one name
            self.strategy[job.name] = care.describe(strategy)
        if measured is not None:
            measured.add_to(self.sums[:, job.rows.start : job.rows.stop])
            pairs = zip(self.accuracy, audited.accuracy, strict=True)
            self.accuracy = [a + b for a, b in pairs]

    def metadata(self, state: list[Any]) -> BlockMetadata:
        """Return all but the predictions; ``state`` is that of the calibration."""
        measures = zip(self.measures, self.sums, self.accuracy, strict=True)
        mended = Counter(self.differed.values())
        return BlockMetadata(
            hash=self.hashed,
            audits={name: audit + Audit(0, 0, mended[name]) for name, audit in self.audits.items()},
            strategy=dict(self.strategy),
            state=state,
            measures={name: Measure(sums.numpy(), accuracy) for name, sums, accuracy in measures},
            screening=self.screening,
            estimate=self.estimate,
        )

    def partial(self, jobs: int, state: list[Any]) -> PartialBlock:
        """Return what the first jobs have found."""
        return PartialBlock(jobs, list(self.flips), self.metadata(state))

    def block(self, images: Batch, state: list[Any]) -> Block:
        """Return the finished block."""
        first = int(images.index[0])
        chunks = [(row, image - first, *rest) for row, image, *rest in self.flips]
        return Block(
            labels=_joined(self.labels),
            baseline=_joined(self.baseline),
            flips=Flips.gather(self.setup.rows, chunks, weighted=self.estimate is not None),
            metadata=self.metadata(state),
        )


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64)
