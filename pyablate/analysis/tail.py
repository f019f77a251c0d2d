"""How often an error exceeds what has been seen of it: a tail fitted to the largest of a sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from pyablate.results.arrays import Floats

SHARE = 0.05
"""Share of the sample that counts as its tail, of :data:`LEAST` errors at least."""

LEAST = 10


@dataclass(frozen=True)
class Tail:
    """Chance that the next error is larger than a number, as a sample of errors suggests.

    Beyond ``start`` errors are taken to be of Pareto kind: the chance falls with a power of the
    number. The exponent is not known but for what ``count`` errors tell of it, whose posterior is a
    gamma distribution (of Hill's likelihood, 1975, with the prior 1 / exponent). Averaged over that
    the chance is ``share * (1 + log(number / start) / logs) ** -count``: Pareto's where the errors
    are many, and with a wider tail where they are few.

    Attributes
    ----------
    errors : ndarray
        float64 ``[n]``, ascending; infinite where nothing is known.
    start : float
        Where the tail begins.
    share : float
        Chance to be in it.
    count : int
        Errors of the sample beyond its start.
    logs : float
        Sum of the logarithms of their ratios to it.

    Examples
    --------
    >>> from pyablate.analysis.tail import Tail
    >>> tail = Tail.of(np.random.default_rng(0).pareto(3.0, 10_000))
    >>> bool(0.5 < tail.chance(20.0) * 21.0**3 < 3)  # of this distribution it is (1 + x)^-3
    True
    """

    errors: Floats
    start: float
    share: float
    count: int
    logs: float

    @classmethod
    def of(cls, errors: ArrayLike) -> Tail:
        """Fit a tail to errors ``[n]``; NaN counts as infinite, n may be 0."""
        known = np.sort(np.nan_to_num(np.asarray(errors, np.float64), nan=np.inf, posinf=np.inf))
        count = min(max(LEAST, int(np.ceil(SHARE * len(known)))), int((known > 0).sum()) - 1)
        if count < 1:  # no tail is to be seen
            return cls(known, 0.0, float(_next(0, len(known))), 0, 0.0)
        start, tail = known[-count - 1], known[-count:]
        with np.errstate(invalid="ignore"):
            logs = float(np.nan_to_num(np.log(tail / start).sum(), nan=np.inf))
        return cls(known, float(start), float(_next(count, len(known))), count, logs)

    def chance(self, larger: ArrayLike) -> Floats:
        """Chance that the next error is larger than each of some numbers."""
        number = np.asarray(larger, np.float64)
        above = len(self.errors) - np.searchsorted(self.errors, number, side="right")
        seen = _next(above, len(self.errors))
        if not self.count:
            return seen
        with np.errstate(divide="ignore", invalid="ignore"):
            beyond = np.log(np.maximum(number, self.start) / self.start) / self.logs
            power = (1.0 + np.nan_to_num(beyond, nan=0.0)) ** -self.count
        return np.where(number < self.start, seen, self.share * power)

    def exceeded(self, chance: float) -> float:
        """Find what the next error exceeds with this chance or less; it may be infinite."""
        if not self.count:
            return float("inf")
        if chance >= self.share:
            place = len(self.errors) - int(chance * (len(self.errors) + 1))
            return float(self.errors[min(max(0, place), len(self.errors) - 1)])
        power = (self.share / chance) ** (1.0 / self.count) - 1.0
        return float(self.start * np.exp(min(self.logs * power, 700.0)))


def safe_above(scores: ArrayLike, chance: ArrayLike, weight: ArrayLike, risk: float) -> float:
    """Smallest score above which no more than a share of ``risk`` is expected to be wrong.

    Parameters
    ----------
    scores, chance, weight : array-like
        float64 ``[m]``: scores, the chance of each to be wrong, and how many it stands for.
    risk : float
        Expected share of all that is above the score and wrong.

    Returns
    -------
    float
        0 or more; infinite where no score is safe.
    """
    known, total = np.asarray(scores, np.float64), np.sum(weight)
    able = np.isfinite(known) & (known > 0)
    order = np.argsort(-known[able])
    wrong = np.cumsum((np.asarray(chance) * np.asarray(weight))[able][order])
    safe = int(np.searchsorted(wrong, risk * total, side="right"))
    if safe == len(order):
        return 0.0
    return float(known[able][order[safe]]) if safe else float("inf")


def _next(count: ArrayLike, of: int) -> Floats:
    """Chance that the next of ``of`` numbers is among the ``count`` largest, or above them."""
    return np.minimum(1.0, (np.asarray(count, np.float64) + 1) / (of + 1))
