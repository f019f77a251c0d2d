"""The last tier: the delta engine in float64, on the few images that have pairs left open.

Where the intact network hesitates between two classes, it does so for nearly every unit: one
float64 pass over such an image serves all of its pairs.
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
from pyablate.engine.discontinuous import may_be_infinite
from pyablate.engine.job import Job
from pyablate.engine.pair_slice import logit_change
from pyablate.engine.replay import Replay
from pyablate.engine.suffix import Suffix
from pyablate.engine.sweep import Sweep
from pyablate.network import near_tie
from pyablate.network.graph import Graph, Value, tensor
from pyablate.runtime.chunking import DOUBLE_SLICE, LARGEST
from pyablate.runtime.host_to_device import sent

logger = logging.getLogger("pyablate")

IMAGES = 32
"""Images whose float64 tensors are held at a time, fewer where these are large."""

AGREE = 1e-9
"""Share of the largest competing logit by which the graph may differ from the model in float64."""


@dataclass(eq=False)
class Exact:
    """The captured network in float64.

    Attributes
    ----------
    graph : Graph
        With constants in float64.
    replay : Replay
        The model itself in float64, for donors and statistics.
    recomputed : set of Job
        Jobs of which the perturbed values are computed instead of differences: base + (after -
        before) is not after where numbers that are equal are compared, where something is NaN or
        infinite, or where 1 becomes 1e-20 and counts as that.
    """

    graph: Graph
    replay: Replay
    recomputed: set[Job] = field(default_factory=set)
    _watched: tuple[Tensor, dict[fx.Node, Value]] | None = None

    def watch(self, batch: Batch, image: Tensor, keep: Iterable[fx.Node]) -> Tensor:
        """Hold the clean run of a few images of a batch, which all jobs are going to read.

        Parameters
        ----------
        batch : Batch
            Where the images are.
        image : Tensor
            int64, ascending, on the CPU: their positions.
        keep : iterable of fx.Node
            What the jobs read.

        Returns
        -------
        Tensor
            Their logits, float64 on the CPU.
        """
        few = batch.take(image).to(torch.float64)
        with torch.no_grad():
            tensors = self.graph.run(few.images, {self.graph.logits, *keep})
        self._watched = few.index, tensors
        return tensor(tensors[self.graph.logits]).cpu()

    def logits(self, batch: Batch, job: Job | None, row: Tensor, image: Tensor) -> Tensor:
        """Logits of each pair, float64 ``[P, K]``; as of :class:`pyablate.engine.replay.Replay`."""
        used, inverse = image.unique(return_inverse=True)
        size = self._images
        parts = [
            (batch.take(some).to(torch.float64), inverse - start)
            for start, some in zip(range(0, len(used), size), used.split(size), strict=True)
        ]
        with torch.no_grad():
            found = [self._few(few, job, row, position) for few, position in parts]
        rows = torch.cat([where for where, _ in found])
        logits = torch.cat([logits for _, logits in found]).cpu()[rows.argsort()]
        lost = (~near_tie.usable(logits)).nonzero().squeeze(1)
        if len(lost):  # what is infinite inside the intact network has no difference
            logits[lost] = self.replay.logits(batch, job, row[lost], image[lost])
        return logits

    def _few(
        self, few: Batch, job: Job | None, row: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Which pairs lie on these images (``position`` within them), and their logits."""
        mine = ((position >= 0) & (position < len(few))).nonzero().squeeze(1)
        rows, images = sent(row[mine], few.device), sent(position[mine], few.device)
        suffix = None if job is None else self._suffix(job)
        tensors = self._clean(few, {self.graph.logits, *(suffix.reads if suffix else ())})
        clean_logits = tensor(tensors[self.graph.logits])
        logits = clean_logits[images]
        if suffix is not None and self.graph.logits in suffix.nodes:
            prediction = clean_logits.argmax(dim=1).to(torch.int32)
            clean = Clean(tensors, clean_logits, prediction, torch.zeros_like(clean_logits[:, 0]))
            sweep = Sweep(suffix, clean, self.replay.replacements(few, suffix.job))
            self._ablate(sweep, rows, images, logits)
        return mine, logits

    def _ablate(self, sweep: Sweep, row: Tensor, image: Tensor, logits: Tensor) -> None:
        """Change the clean logits ``[P, K]`` of some pairs to those without their units."""
        job, device = sweep.suffix.job, sweep.clean.logits.device
        size = sweep.suffix.pairs_in(DOUBLE_SLICE, device)(torch.float64)
        parts = zip(*(whole.split(size) for whole in (row, image, logits)), strict=True)
        if job in self.recomputed:
            for rows, images, part in parts:
                part.copy_(sweep.recompute(rows, images))
            return
        if job.channelwise:
            sweep.advance()
        for rows, images, part in parts:
            change = logit_change(sweep, rows, images, torch.float64)
            if change is None:
                continue
            part += change.logits  # in place: a view
            if change.lost is not None and bool(change.lost.any()):
                lost = change.lost
                part[lost] = sweep.recompute(rows[lost], images[lost])
        # Replay decides them; a look at it here would be a wait for the device.
        logits.masked_fill_(_is_irregular(sweep.clean.tensors), torch.nan)

    def _clean(self, few: Batch, keep: set[fx.Node]) -> dict[fx.Node, Value]:
        """Run the intact network on a few images, or take what is held of them."""
        if self._watched is not None:
            index, tensors = self._watched
            place = torch.searchsorted(index, few.index).clamp(max=len(index) - 1)
            if keep <= tensors.keys() and torch.equal(index[place], few.index):
                place = sent(place, few.device)
                return {node: self.graph.pick(node, tensors[node], place) for node in keep}
        return self.graph.run(few.images, keep)

    def _suffix(self, job: Job) -> Suffix:
        if job not in self._suffixes:
            self._suffixes[job] = Suffix.of(self.graph, job)
        return self._suffixes[job]

    @cached_property
    def _images(self) -> int:
        return max(1, min(IMAGES, LARGEST // (8 * self.graph.widest)))

    @cached_property
    def _suffixes(self) -> dict[Job, Suffix]:
        return {}


def _is_irregular(tensors: Mapping[fx.Node, Value]) -> Tensor:
    """Whether the clean run holds NaN, or infinity where no mask stands: no delta is right there.

    A bool ``[]`` on the device. The sum of what is masked by minus infinity is minus infinity.
    """
    totals = {
        node: value.sum()
        for node, value in tensors.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    bad = [t.isnan() if not may_be_infinite(n) else ~t.isfinite() for n, t in totals.items()]
    return torch.stack(bad).any()


def exact(graph: Graph | None, replay: Replay, sample: Batch) -> Exact | Replay:
    """Decide by the captured network where it computes in float64 what the model does."""
    if graph is None or replay.dtype != torch.float64:
        return replay
    constants = {
        node: graph.in_double(node) if value.is_floating_point() else value
        for node, value in graph.constants.items()
        if isinstance(value, Tensor)
    }
    found = Exact(replace(graph, constants={**graph.constants, **constants}), replay)
    every = torch.arange(len(sample))
    expected = replay.logits(sample, None, every, every)
    try:
        logits = found.logits(sample, None, every, every)
    except RuntimeError as error:  # an operator with a dtype of its own
        logger.debug("the graph does not run in float64: %s", error)
        return replay
    close = near_tie.disagreement(logits, expected) <= AGREE
    return found if logits.dtype == torch.float64 and close else replay
