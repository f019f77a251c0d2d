"""Cells of unit and class: how well an attribute of both foretells the drops of classes.

Three figures of two matrices ``[unit, class]``, one of an attribute and one of drops:

- ``within_unit``: Spearman's correlation over the classes, mean over units: which class suffers;
- ``within_class``: Spearman's correlation over the units, mean over classes: which unit matters;
- ``precision``: of the cells where the attribute is largest, the share that are also among as many
  cells with the largest drops; equal cells are told apart by chance, and this is the expectation.

Rows without a correlation, all of whose values are equal, are left out of the means.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from pyablate.analysis.bootstrap import Variable, Weights, coefficients, resample
from pyablate.analysis.statistics import changes, net_by_cell, random_half
from pyablate.results.arrays import Floats, Ints
from pyablate.results.record import Record

FIGURES = ("within_unit", "within_class", "precision")
FEWEST = 3
"""Units and classes: two points always lie on a line."""


@dataclass(frozen=True, eq=False)
class Cells:
    """Attribute and drops of the same units and classes, both finite everywhere.

    Attributes
    ----------
    attribute, drop : float64 [unit, class]
        At least three units and three classes.
    top : float
        Share of the cells that ``precision`` looks at.
    """

    attribute: Floats
    drop: Floats
    top: float

    def measured(self) -> Floats:
        """All units and classes as they are: float64 [figure]."""
        return _agreement(*self._scores())

    def shuffled(self, shuffles: int, generator: np.random.Generator, axis: int) -> Floats:
        """Attribute shuffled among the units (axis 0) or the classes (1): [shuffle, figure].

        Whole rows or columns move: what units (classes) have in common in all classes (units) stays
        with the other axis.
        """
        attribute, drop = self._scores()
        rows = self.drop.shape[axis]
        orders = (generator.permutation(rows) for _ in range(shuffles))
        return np.array(
            [_agreement([np.take(x, order, axis) for x in attribute], drop) for order in orders]
        )

    def resampled(self, resamples: int, generator: np.random.Generator) -> Floats:
        """Units and classes drawn with replacement, both at once: float64 [resample, figure]."""
        units, classes = (resample(n, resamples, generator) for n in self.drop.shape)
        return np.column_stack(
            [
                _mean_correlation(self.attribute, self.drop, units, classes),
                _mean_correlation(self.attribute.T, self.drop.T, classes, units),
                self._precisions(units, classes),
            ]
        )

    def _scores(self) -> tuple[list[Floats], list[Floats]]:
        """Ranks by row and by column, and top cells, of attribute and drop."""
        return tuple(  # type: ignore[return-value]  # of two
            [_ranks(x, 1), _ranks(x, 0), _Descending(x).top(self.top)]
            for x in (self.attribute, self.drop)
        )

    def _precisions(self, units: Weights, classes: Weights) -> Floats:
        attribute, drop = _Descending(self.attribute), _Descending(self.drop)
        found = np.empty(len(units))
        for number, (of_units, of_classes) in enumerate(zip(units, classes, strict=True)):
            weight = np.outer(of_units, of_classes).ravel()
            first, second = (x.top(self.top, weight).ravel() for x in (attribute, drop))
            found[number] = weight @ (first * second) / (weight @ first)
        return found


class _Descending:
    """Which cells are the largest, of whatever resample: equal ones share the places left."""

    def __init__(self, values: Floats) -> None:
        self.shape = values.shape
        self.place = np.unique(-values, return_inverse=True)[1].ravel()

    def top(self, share: float, weight: Floats | None = None) -> Floats:
        """Chance of each cell, float64 of the shape of the values, to be among the largest."""
        held = np.bincount(self.place, weight).astype(np.float64)
        upto = np.cumsum(held)
        wanted = max(1, round(share * upto[-1]))
        left = np.clip(wanted - (upto - held), 0, held)
        chance = np.divide(left, held, out=np.zeros(len(held)), where=held > 0)
        found: Floats = chance[self.place].reshape(self.shape)
        return found


def half_drops(result: Record, rows: Ints, splits: int, seed: int) -> Iterator[list[Floats]]:
    """Class drops of some units, [unit, class], measured on random halves of each class's images.

    One pair of matrices for each split; NaN for a class that has no image in a half.
    """
    generator = np.random.default_rng(seed)
    span = slice(int(rows.min()), int(rows.max()) + 1)
    image, cell, net = changes(result, span)
    shape = span.stop - span.start, result.classes
    for _ in range(splits):
        half = random_half(result.labels, result.classes, generator)
        pair = []
        for chosen in (half, ~half):
            inside = chosen[image]
            lost = net_by_cell(cell[inside], net[inside], shape)[rows - span.start]
            sizes = np.bincount(result.labels[chosen], minlength=result.classes)
            pair.append(np.where(sizes > 0, lost / np.maximum(sizes, 1), np.nan))
        yield pair


def agreement_of_halves(pairs: Sequence[Sequence[Floats]], top: float) -> Floats:
    """Figures between the drops of two halves, mean over the pairs; classes that both know."""
    every = np.full((len(pairs), len(FIGURES)), np.nan)
    for figures, (one, two) in zip(every, pairs, strict=True):
        known = np.isfinite(one).all(axis=0) & np.isfinite(two).all(axis=0)
        if known.any():
            figures[:] = Cells(one[:, known], two[:, known], top).measured()
    return np.array([_mean(column) for column in every.T])


def within_units(attribute: Floats, drop: Floats) -> Floats:
    """Each unit's correlation over the classes, [unit], of two matrices that may hold NaN.

    Classes that no unit has on both sides are left out; NaN for a unit that lacks another one, or
    all of whose values are equal.
    """
    classes = (np.isfinite(attribute) & np.isfinite(drop)).any(axis=0)
    if classes.sum() < FEWEST:
        return np.full(len(drop), np.nan)
    one, other = (_ranks(x[:, classes], 1) for x in (attribute, drop))
    found: Floats = (one * other).sum(axis=1)
    return found


def ceiling(halves: Floats) -> Floats:
    """Correlation of a perfect attribute with drops whose halves agree so: sqrt(2 h / (1 + h)).

    ``2 h / (1 + h)`` is the reliability of both halves together (Spearman 1910, Brown 1910), and
    its root the correlation of a measurement with what it measures. 0 where halves do not agree.
    """
    agreeing = np.maximum(halves, 0.0)
    found: Floats = np.sqrt(2 * agreeing / (1 + agreeing))
    return found


def _agreement(attribute: list[Floats], drop: list[Floats]) -> Floats:
    """Figures from the scores of both sides: float64 [figure]."""
    by_unit = (attribute[0] * drop[0]).sum(axis=1)
    by_class = (attribute[1] * drop[1]).sum(axis=0)
    precision = (attribute[2] * drop[2]).sum() / attribute[2].sum()
    return np.array([_mean(by_unit), _mean(by_class), precision])


def _ranks(values: Floats, axis: int) -> Floats:
    """Ranks along an axis with mean 0 and length 1, so that products add up to a correlation."""
    ranks = stats.rankdata(values, axis=axis)
    ranks -= ranks.mean(axis=axis, keepdims=True)
    length = np.sqrt((ranks**2).sum(axis=axis, keepdims=True))
    found: Floats = np.divide(ranks, length, out=np.full_like(ranks, np.nan), where=length > 0)
    return found


def _mean_correlation(x: Floats, y: Floats, rows: Weights, columns: Weights) -> Floats:
    """Mean over the drawn rows of their correlation over the drawn columns: [resample]."""
    total, count = np.zeros(len(rows)), np.zeros(len(rows))
    for number, pair in enumerate(zip(x, y, strict=True)):
        if any(one.min() == one.max() for one in pair):
            continue
        one, other = (Variable(side, columns) for side in pair)
        r = coefficients(one, other, "spearman")
        drawn = np.where(np.isnan(r), 0.0, rows[:, number])
        total += drawn * np.nan_to_num(r)
        count += drawn
    found: Floats = np.divide(total, count, out=np.full(len(rows), np.nan), where=count > 0)
    return found


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan
