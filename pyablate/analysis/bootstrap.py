"""Correlation coefficients of thousands of resamples of the same units, as matrix products.

A resample is a vector of weights: how often it holds each unit. The rank of a unit is the weight
below it and half of the weight of its equals. With the matrix ``S[j, i] = sign(x_i - x_j)``
Kendall's sum over pairs is ``w S_x S_y w``; ties, which repeated units always bring, come out right
by themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from pyablate.results.arrays import Floats

METHODS = ("pearson", "spearman", "kendall")
Weights = NDArray[np.float32]


def resample(units: int, resamples: int, generator: np.random.Generator) -> Weights:
    """Draw units with replacement: float32 ``[resample, unit]``, how often each was drawn."""
    share = np.full(units, 1 / units)
    return generator.multinomial(units, share, size=resamples).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Variable:
    """One number for each unit, and what is needed of it in every resample.

    Attributes
    ----------
    values : float64 [unit]
        Finite and not all equal.
    weights : float32 [resample, unit]
        From :func:`resample`.
    """

    values: Floats
    weights: Weights

    @cached_property
    def standard(self) -> Floats:
        """The values with mean 0 and standard deviation 1."""
        scaled = self.values / np.abs(self.values).max()  # no overflow in the squares
        centred = scaled - scaled.mean()
        deviation: Floats = centred / centred.std()
        return deviation

    @property
    def signs(self) -> NDArray[np.float32]:
        """float32 [unit j, unit i]: sign of ``values[i] - values[j]``."""
        above: NDArray[np.bool_] = self.values[None, :] > self.values[:, None]
        return above.astype(np.float32) - above.T

    @cached_property
    def ranks(self) -> NDArray[np.float32]:
        """float32 [resample, unit]: twice the rank in the resample, centred."""
        distinct, place = np.unique(self.values, return_inverse=True)
        order = np.argsort(place, kind="stable")
        first = np.searchsorted(place[order], np.arange(len(distinct)))
        held = np.add.reduceat(self.weights[:, order], first, axis=1)
        upto = np.cumsum(held, axis=1)
        centred: NDArray[np.float32] = (2 * upto - held - upto[:, -1:])[:, place]
        return centred

    @cached_property
    def untied(self) -> Floats:
        """float64 [resample]: ordered pairs of drawn units with different values."""
        return _weighted(self.weights, self.weights @ np.abs(self.signs))


def coefficients(x: Variable, y: Variable, method: str) -> Floats:
    """Correlation in every resample, float64 [resample]; NaN where one of the two is constant.

    Both variables share their weights. Equal to scipy's on the drawn units.
    """
    weights = x.weights
    if method == "kendall":
        concordant = _weighted(weights, weights @ (x.signs * y.signs))
        return _ratio(concordant, x.untied, y.untied)
    if method == "spearman":
        a, b = x.ranks.astype(np.float64), y.ranks.astype(np.float64)
    else:
        share = weights / np.float64(weights.shape[1])
        a = x.standard - (share @ x.standard)[:, None]
        b = y.standard - (share @ y.standard)[:, None]
    return _ratio(*(_weighted(weights, product) for product in (a * b, a * a, b * b)))


def shuffled(x: Floats, y: Floats, method: str, orders: NDArray[np.int64]) -> Floats:
    """Correlation of ``x[order]`` with ``y`` for each order: float64 ``[order]``.

    Orders are permutations, int64 ``[order, unit]``; x and y float64 ``[unit]``, not constant.
    """
    if method == "kendall":
        return np.array(
            [stats.kendalltau(x[order], y, method="asymptotic").statistic for order in orders]
        )
    if method == "spearman":
        x, y = stats.rankdata(x), stats.rankdata(y)
    none = np.empty((0, len(x)), dtype=np.float32)
    a, b = Variable(x, none).standard, Variable(y, none).standard
    return a[orders] @ b / len(a)


def _weighted(weights: Weights, values: NDArray[np.floating]) -> Floats:
    sums: Floats = np.einsum("ri,ri->r", weights, values, dtype=np.float64)
    return sums


def _ratio(joint: Floats, first: Floats, second: Floats) -> Floats:
    scale = np.sqrt(first) * np.sqrt(second)
    # Below this the resample is constant: standardised values leave rounding, ranks leave 0.
    fine = scale > 1e-12
    return np.where(fine, np.clip(joint / np.where(fine, scale, 1.0), -1.0, 1.0), np.nan)
