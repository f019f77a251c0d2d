"""How often an error exceeds what has been seen of it: a tail fitted to the largest of a sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]

SHARE = 0.05
"""Share of the sample that counts as its tail, of :data:`LEAST` errors at least."""

LEAST = 10
CONFIDENCE = 0.95
STEEPEST = 8.0
"""Largest exponent that a sample can make plausible."""


@dataclass(frozen=True)
class Tail:
    """Upper bound of the chance that an error is larger than a number.

    Beyond ``start`` the chance falls with a power of the number (Pareto), the exponent by Hill's
    estimator (1975); both it and the share of errors beyond ``start`` are taken at the careful end
    of their confidence interval, so that few errors give a wide tail.

    Attributes
    ----------
    errors : ndarray
        float64 ``[n]``, ascending; infinite where nothing is known.
    start : float
        Where the tail begins.
    share : float
        Upper bound of the chance to be in it.
    exponent : float
        Lower bound of that of the power.

    Examples
    --------
    >>> from pyablate.analysis.tail import Tail
    >>> errors = np.random.default_rng(0).pareto(3.0, 1000)
    >>> tail = Tail.of(errors)
    >>> bool(tail.chance(100.0) > 101.0**-3)
    True
    """

    errors: Floats
    start: float
    share: float
    exponent: float

    @classmethod
    def of(cls, errors: ArrayLike) -> Tail:
        """Fit a tail to errors ``[n]``; NaN counts as infinite, n may be 0."""
        known = np.sort(np.nan_to_num(np.asarray(errors, np.float64), nan=np.inf, posinf=np.inf))
        positive = int((known > 0).sum())
        count = min(max(LEAST, int(np.ceil(SHARE * len(known)))), positive)
        if count < 2:  # no tail to be seen: the least that can be said of those not seen
            start = float(known[-1]) if positive else 0.0
            return cls(known, start, float(_upper(positive, len(known))), 0.0)
        tail = known[-count:]
        with np.errstate(invalid="ignore"):
            mean = float(np.nan_to_num(np.log(tail / tail[0]).mean(), nan=np.inf))
        careful = max(0.0, 1.0 - stats.norm.ppf(CONFIDENCE) / np.sqrt(count))
        exponent = careful * min(STEEPEST, 1.0 / max(mean, 1e-9))
        return cls(known, float(tail[0]), float(_upper(count, len(known))), exponent)

    def chance(self, larger: ArrayLike) -> Floats:
        """Upper bound of the chance that an error is larger than each of some numbers."""
        number = np.asarray(larger, np.float64)
        above = len(self.errors) - np.searchsorted(self.errors, number, side="right")
        seen = _upper(above, len(self.errors))
        if self.start <= 0:
            return np.where(number < 0, 1.0, seen)
        with np.errstate(divide="ignore", invalid="ignore"):
            power = (np.maximum(number, self.start) / self.start) ** -self.exponent
        beyond = self.share * np.nan_to_num(power, nan=1.0)
        return np.where(number < self.start, seen, beyond)

    def threshold(self, scores: ArrayLike, risk: float) -> float:
        """Smallest score above which as few scores as ``risk`` are expected below their error.

        Parameters
        ----------
        scores : array-like
            float64 ``[m]``: a sample of scores, each wrong where its error is larger.
        risk : float
            Expected share of the sample that is above the threshold and wrong.

        Returns
        -------
        float
            0 or more; infinite where no score is safe.
        """
        ordered = np.sort(np.asarray(scores, np.float64))
        ordered = ordered[np.isfinite(ordered) & (ordered > 0)][::-1]
        wrong = np.cumsum(self.chance(ordered)) / max(1, np.size(scores))
        safe = int(np.searchsorted(wrong, risk, side="right"))
        if safe == len(ordered):
            return 0.0
        return float(ordered[safe]) if safe else float("inf")


def _upper(count: ArrayLike, of: int) -> Floats:
    """One-sided upper bound of a share, ``count`` of ``of`` seen (Clopper and Pearson 1934)."""
    seen = np.asarray(count, np.float64)
    if not of:
        return np.ones_like(seen)
    return np.where(seen >= of, 1.0, stats.beta.ppf(CONFIDENCE, seen + 1, np.maximum(of - seen, 1)))
