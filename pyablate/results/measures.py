"""Measures that a run may record: the change of the loss and of the margin, and its error.

Sums over the images of each class, in float64, of what each pair's arithmetic gave; and how far
that is off, by the pairs that the audit recomputed. Nothing here needs torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pyablate.results.arrays import Floats

MEASURES = ("loss", "margin")
"""``loss``: cross-entropy in nats. ``margin``: the largest logit minus the second largest."""


@dataclass(frozen=True)
class Accuracy:
    """How far the recorded changes of a measure are from those of a float64 forward pass.

    Attributes
    ----------
    pairs : int
        Audited (unit, image) pairs.
    squared_change : float
        Sum of the squared exact changes of these pairs.
    squared_error : float
        Sum of their squared errors, recorded minus exact.
    error : float
        Sum of the errors: how far a sum over these pairs is off.
    largest_error : float
        Largest error, without its sign.
    """

    pairs: int = 0
    squared_change: float = 0.0
    squared_error: float = 0.0
    error: float = 0.0
    largest_error: float = 0.0

    @classmethod
    def of(cls, change: Floats, error: Floats) -> Accuracy:
        """Sum up the exact changes and the errors of some pairs."""
        return cls(
            len(change),
            float(np.square(change).sum()),
            float(np.square(error).sum()),
            float(error.sum()),
            float(np.abs(error).max(initial=0.0)),
        )

    def __add__(self, other: Accuracy) -> Accuracy:
        """Accuracy on the pairs of both."""
        return Accuracy(
            self.pairs + other.pairs,
            self.squared_change + other.squared_change,
            self.squared_error + other.squared_error,
            self.error + other.error,
            max(self.largest_error, other.largest_error),
        )

    @property
    def relative_error(self) -> float:
        """Root mean square of the errors as a share of that of the changes; NaN if none changed."""
        if self.squared_change == 0:
            return math.nan
        return math.sqrt(self.squared_error / self.squared_change)

    def __str__(self) -> str:
        """One line for people."""
        if self.pairs == 0:
            return "not audited"
        return (
            f"error {100 * self.relative_error:.2g} % of the change (rms of {self.pairs:,} pairs "
            f"recomputed in float64), largest {self.largest_error:.2g}, "
            f"mean {self.error / self.pairs:.2g}"
        )


@dataclass(frozen=True, eq=False)
class Measure:
    """Change of one measure by each ablation, after minus before.

    Attributes
    ----------
    change : float64 [unit, class]
        Sum over the images of each class.
    accuracy : Accuracy
        Of the arithmetic that the run was carried in.
    """

    change: Floats
    accuracy: Accuracy = Accuracy()
