"""Exact answers at low-precision cost: the cheapest arithmetic first, doubtful pairs again.

A delta's rounding error is relative to the *change*, not to the activation, so a low-precision
suffix settles nearly every prediction. How far its logits can be off, as a share of the spread
of their change, is measured on pairs of the run itself; a pair whose new margin lies within
several times that is recomputed in full precision, and what is doubtful there in float64.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyablate import ops

logger = logging.getLogger("pyablate")

FULL = 1e-4
"""Share of a logit change's spread that rounding in float32 may reach, with much to spare."""

SAMPLE = 256
"""Pairs on which a job's low-precision error is measured."""

SAFETY = 4.0
"""How many times the largest error seen is still doubted."""

FLOOR = 0.02
"""Least share of the spread that is doubted, however small the errors seen."""

Change = Callable[[Tensor, Tensor, torch.dtype], Tensor | None]
"""``change(row, image, dtype)``: the logit changes [P, K] of some pairs; None if there are none."""


@dataclass(eq=False)
class Ladder:
    """Precisions of one job, from cheap to full.

    Attributes
    ----------
    full : torch.dtype
        The model's own.
    low : torch.dtype or None
        Cheaper arithmetic for the dense suffix, if it is worth it.
    doubt : float or None
        Share of the change's spread within which ``low`` is not trusted; None until measured.
    strategy : str
        How the pairs were settled: "delta", or "closed form" where that was all it took.
    repeated : int
        Pairs so far that needed full precision after ``low``.
    """

    full: torch.dtype
    low: torch.dtype | None = None
    doubt: float | None = None
    strategy: str = "delta"
    repeated: int = 0

    def predict(
        self, change: Change, row: Tensor, image: Tensor, logits: Tensor, tolerance: Tensor
    ) -> Tensor | None:
        """Class of each pair, -1 where full precision leaves it open; None if none changes.

        Parameters
        ----------
        change : callable
            Gives logit changes.
        row, image : Tensor
            int64 ``[P]``: the pairs.
        logits, tolerance : Tensor
            ``[N, K]`` and ``[N]``, of the clean run.
        """

        def decide(row: Tensor, image: Tensor, dtype: torch.dtype, doubt: float) -> Tensor | None:
            delta = change(row, image, dtype)
            if delta is None:
                return None
            short = image.to(torch.int32)
            return ops.classify(logits, delta, short, tolerance, relative=doubt)

        if self.low is None or self.doubt is None:
            return decide(row, image, self.full, FULL)
        prediction = decide(row, image, self.low, self.doubt)
        if prediction is None:
            return None
        open_ = (prediction < 0).nonzero().squeeze(1)
        if len(open_):
            self.repeated += len(open_)
            again = decide(row[open_], image[open_], self.full, FULL)
            assert again is not None
            prediction[open_] = again
        return prediction

    def calibrate(self, change: Change, row: Tensor, image: Tensor, tolerance: Tensor) -> None:
        """Measure the low precision's error on a spread of pairs; give it up if it is useless."""
        if self.low is None or self.doubt is not None or not len(row):
            return
        chosen = torch.linspace(0, len(row) - 1, min(SAMPLE, len(row)), device=row.device).long()
        row, image = row[chosen], image[chosen]
        exact, rough = change(row, image, self.full), change(row, image, self.low)
        if exact is None or rough is None:
            return
        error = _spread(rough.to(exact.dtype) - exact)
        counts = error > tolerance[image]  # smaller ones are within what is doubted anyway
        worst = float((error / _spread(exact))[counts].amax()) if bool(counts.any()) else 0.0
        self.doubt = max(FLOOR, SAFETY * worst)
        if not self.doubt < 1.0:
            logger.info("%s is too coarse for this layer (error %.2g)", self.low, worst)
            self.low = None


def _spread(change: Tensor) -> Tensor:
    """Largest difference that a change makes between two classes, [P]."""
    return change.amax(dim=1) - change.amin(dim=1)
