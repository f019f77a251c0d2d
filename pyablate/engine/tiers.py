"""Exact answers at low-precision cost: the cheapest arithmetic first, doubtful pairs again.

A delta's rounding error is relative to the *change*, not to the activation, so a low-precision
suffix settles nearly every prediction. How far its logits can be off, as a share of the spread
of their change, is measured on pairs of the run itself; a pair whose new margin lies within
several times that is decided again one tier up, and what full precision leaves open in float64.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from pyablate import ops, shortage
from pyablate.engine.measures import Record
from pyablate.transfer import sent

logger = logging.getLogger("pyablate")

FULL = 1e-4
"""Share of a logit change's spread that rounding in float32 may reach, with much to spare."""

SAMPLE = 256
"""Pairs on which a job's low-precision error is measured, at most."""

LEAST_SAMPLE = 64
"""The same, at least; fewer pairs than that left open go to full precision at once."""

SHARE = 128
"""Of so many pairs one is measured: in full precision it costs several times the others."""

SAFETY = 4.0
"""How many times the largest error seen on :data:`SAMPLE` pairs is still doubted."""

FLOOR = {torch.int8: 0.05, torch.bfloat16: 0.02}
"""Least share of the spread that is doubted, however small the errors seen."""

USELESS = 0.5
"""Share of open pairs above which a tier is left out: most work would be done twice."""

Change = Callable[[Tensor, Tensor, torch.dtype], Tensor | None]
"""``change(row, image, dtype)``: the logit changes [P, K] of some pairs; None if there are none."""


class Known(Protocol):
    """What is known of the clean run."""

    @property
    def logits(self) -> Tensor:
        """``[N, K]``."""

    @property
    def prediction(self) -> Tensor:
        """int32 ``[N]``."""

    @property
    def tolerance(self) -> Tensor:
        """``[N]``: top-2 margins up to this are not trusted."""


def carried(dtype: torch.dtype) -> torch.dtype:
    """Floating-point dtype in which deltas are held between the convolutions of a tier."""
    return torch.bfloat16 if dtype == torch.int8 else dtype


@dataclass(eq=False)
class Ladder:
    """Precisions of one job, from cheap to full.

    Attributes
    ----------
    tiers : list of torch.dtype
        Of the dense suffix, cheapest first; the last is the model's own, to which no doubt applies
        but :data:`FULL`. ``int8`` means convolutions in 8-bit integers, the rest in bfloat16.
    doubts : dict
        Share of the change's spread within which a tier is not trusted, once it has been measured
        on :data:`SAMPLE` pairs; see :meth:`doubt` for fewer.
    strategy : str
        How the pairs were settled: "delta", or "closed form" where that was all it took.
    settled : dict
        Pairs decided by each tier so far.
    measured : int
        Pairs on which the doubts rest; with too few, full precision does all the work.
    most : int
        Pairs at a time for which memory has been seen to suffice.
    """

    tiers: list[torch.dtype]
    doubts: dict[torch.dtype, float] = field(default_factory=dict)
    strategy: str = "delta"
    settled: dict[torch.dtype, int] = field(default_factory=dict)
    measured: int = 0
    most: int = 1 << 30

    @property
    def full(self) -> torch.dtype:
        """The model's own precision."""
        return self.tiers[-1]

    def doubt(self, tier: torch.dtype) -> float:
        """Share of a change's spread within which a tier is not trusted at present.

        The largest of few errors says less than that of many. It grows no faster than the root of
        their number where errors of more than s times a typical one are no more frequent than
        1 / s^2; by that root the doubt is wider while fewer than :data:`SAMPLE` have been measured.
        """
        if tier not in self.doubts:
            return FULL
        return self.doubts[tier] * math.sqrt(max(1.0, SAMPLE / max(self.measured, 1)))

    def settle(
        self,
        change: Change,
        row: Tensor,
        image: Tensor,
        clean: Known,
        size: Callable[[torch.dtype], int],
        record: Record | None = None,
    ) -> Tensor:
        """Class of each pair, -1 where full precision leaves it open.

        Parameters
        ----------
        change : callable
            Gives logit changes.
        row, image : Tensor
            int64 ``[P]``, on the CPU: the pairs.
        clean : Clean
            The clean run.
        size : callable
            Pairs to work on at a time, by precision.
        record : callable, optional
            Told the logit changes of every tier; of a pair's, the last are the most precise.

        Returns
        -------
        Tensor
            int32 ``[P]``, on the CPU. One wait for the device per tier that had anything to do.
        """
        self._calibrate(change, row, image, clean, size(self.full))
        prediction = torch.full((len(row),), -1, dtype=torch.int32)
        open_ = torch.arange(len(row))
        for tier in self.tiers if self.measured >= LEAST_SAMPLE else [self.full]:
            if tier not in (self.tiers[0], self.full) and len(open_) < LEAST_SAMPLE:
                continue
            device = clean.logits.device
            rows, images = sent(row[open_], device), sent(image[open_], device)
            found = clean.prediction[images]
            start = 0
            while start < len(open_):
                some = slice(start, start + min(size(tier), self.most))
                if self._fill(found[some], change, rows[some], images[some], clean, tier, record):
                    start = some.stop
            prediction[open_] = found.cpu()
            left = open_[prediction[open_] < 0]
            self.settled[tier] = self.settled.get(tier, 0) + len(open_) - len(left)
            open_ = left
            if not len(open_):
                break
        return prediction

    def _fill(
        self,
        found: Tensor,
        change: Change,
        row: Tensor,
        image: Tensor,
        clean: Known,
        tier: torch.dtype,
        record: Record | None,
    ) -> bool:
        """Decide some pairs; False, and fewer at a time from now on, if memory does not suffice."""
        try:
            delta = change(row, image, tier)
        except shortage.ERRORS as error:
            if len(row) == 1 or not shortage.is_shortage(error):
                raise
            self.most = len(row) // 2
            logger.warning("out of memory: going on with %d pairs at a time", self.most)
            return False
        if delta is not None:
            found.copy_(self._classify(delta, image, clean, tier))
            if record is not None:
                record(row, image, delta)
        return True

    def _classify(self, delta: Tensor, image: Tensor, clean: Known, tier: torch.dtype) -> Tensor:
        short = image.to(torch.int32)
        doubt = self.doubt(tier)
        return ops.classify(clean.logits, delta, short, clean.tolerance, relative=doubt)

    def _calibrate(
        self, change: Change, row: Tensor, image: Tensor, clean: Known, at_a_time: int
    ) -> None:
        """Measure the low tiers' errors on a spread of pairs; leave out those of no use.

        Goes on from batch to batch until enough pairs have been measured.
        """
        if len(self.tiers) == 1 or self.measured >= SAMPLE:
            return
        size = min(len(row), SAMPLE, max(LEAST_SAMPLE, len(row) // SHARE))
        useless = self._measure(change, row, image, clean, size, at_a_time)
        more = min(len(row), SAMPLE)
        if useless and more > size:  # not on the word of a few
            self.measured -= size
            useless = self._measure(change, row, image, clean, more, at_a_time)
        for tier in useless if self.measured >= LEAST_SAMPLE else []:
            logger.info("%s is too coarse here (doubt %.2g)", tier, self.doubt(tier))
            self.tiers.remove(tier)

    def _measure(
        self,
        change: Change,
        row: Tensor,
        image: Tensor,
        clean: Known,
        size: int,
        at_a_time: int,
    ) -> list[torch.dtype]:
        """Measure the low tiers' errors on some of the pairs; return the tiers of no use."""
        chosen = torch.linspace(0, len(row) - 1, size).long()
        row, image = (sent(pairs[chosen], clean.logits.device) for pairs in (row, image))

        def changes(tier: torch.dtype) -> Tensor | None:
            parts = zip(row.split(at_a_time), image.split(at_a_time), strict=True)
            found = [
                part.clone()  # what a recording gives stands until its next call
                for part in (change(rows, images, tier) for rows, images in parts)
                if part is not None
            ]
            return torch.cat(found) if found else None

        exact = changes(self.full)
        if exact is None:
            return []
        self.measured += size
        useless = []
        for tier in self.tiers[:-1]:
            rough = changes(tier)
            assert rough is not None
            worst = float(_worst_error(rough.to(exact.dtype), exact, clean.tolerance[image]))
            self.doubts[tier] = max(self.doubts.get(tier, FLOOR[tier]), SAFETY * worst)
            open_ = float((self._classify(rough, image, clean, tier) < 0).float().mean())
            if self.doubt(tier) >= 1.0 or open_ > USELESS:
                useless.append(tier)
        return useless


def _worst_error(rough: Tensor, exact: Tensor, tolerance: Tensor) -> Tensor:
    """Largest error of a rough logit change, as a share of its own spread; NaN counts as infinite.

    Errors within the tolerance are doubted anyway. Changes that are not finite in full precision
    say nothing about the rough one.
    """
    error, spread = _spread(rough - exact), _spread(rough)
    counts = ~(error <= tolerance) & torch.isfinite(exact).all(dim=1)
    share = (error / spread).nan_to_num(torch.inf)
    return torch.where(counts, share, torch.zeros_like(share)).amax()


def _spread(change: Tensor) -> Tensor:
    """Largest difference that a change makes between two classes, [P]."""
    return change.amax(dim=1) - change.amin(dim=1)
