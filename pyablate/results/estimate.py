"""What an estimated run drew, and how far off the figures are that follow from it.

Gradients predict of every pair (unit, image) whether its class changes, and to which. Pairs were
drawn independently of one another, each with a chance that was known before, and only these were
computed. Counts of flips are those of the predicted ones, corrected by what the drawn pairs were
found to be: each stands for ``1 / chance`` pairs. That is the difference estimator (Cassel, Särndal
and Wretman 1976) with the weights of Horvitz and Thompson (1952), without bias whatever was
predicted; its variance comes from wrong predictions alone. Nothing here needs torch.

The chance of a pair is ``top / 2**level``: ``top`` is of its unit, the level grows with the
distance of its score from where nothing is certain. A level of a layer is thus a stratum, and the
share of wrong predictions found in it tells how many there are of each unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyablate.results.arrays import Floats, Ints

WIDTH = 1.959963984540054
"""Half-width of a 95 % interval in standard deviations."""

RARE = 0.005
"""Chance to find a wrong prediction of a unit in its deepest levels up to which their weights are
left out of its interval: what happens so seldom does not belong into one of 95 %."""

SHAPE = 2.0
"""Of the gamma distribution of how much units differ in their share of wrong predictions."""

ARRAYS = ("top", "live", "drawn", "spread")
"""Arrays of an estimate."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """What an estimated run drew.

    Attributes
    ----------
    budget : str
        As it was given.
    expected : int
        Pairs of the whole data that it came to, those included that were computed beforehand.
    factor : float
        Chance of a pair to be drawn over the root of its chance to be predicted wrongly, as that
        was reckoned beforehand.
    top : float64 [unit]
        Chance of the pairs of level 0; below 1 where there are no scores, and all are of level 0.
    live : int64 [unit, level]
        Pairs that the ablation changes, computed or not; all pairs where there are no scores. None
        of those with a closed form, of which all are computed.
    drawn : int64 [unit]
        Those of them that were computed.
    spread : float64 [unit, class]
        Sum of ``chance * (1 - chance)`` over the pairs of each class. As chances grow with the
        root of the chance of a wrong prediction, the variance of an estimate is about in proportion
        to it.

    Examples
    --------
    >>> found = pa.ablate(model, data, "features.0", guarantee="estimated", budget="10%")
    >>> bool(0 < found.estimate.drawn.sum() < found.estimate.live.sum())
    True
    """

    budget: str
    expected: int
    factor: float
    top: Floats
    live: Ints
    drawn: Ints
    spread: Floats

    def __add__(self, other: Estimate) -> Estimate:
        """Join what two parts of a run drew.

        Of shards with a time each, designs differ: what tells of less is taken.
        """
        levels = max(self.live.shape[1], other.live.shape[1])
        mine, theirs = (
            np.pad(part.live, ((0, 0), (0, levels - part.live.shape[1]))) for part in (self, other)
        )
        return replace(
            self,
            expected=max(self.expected, other.expected),
            factor=min(self.factor, other.factor),
            top=np.minimum(self.top, other.top),
            live=mine + theirs,
            drawn=self.drawn + other.drawn,
            spread=self.spread + other.spread,
        )

    def nothing(self) -> Estimate:
        """Return the same of no pairs."""
        counts = {name: np.zeros_like(getattr(self, name)) for name in ARRAYS if name != "top"}
        return replace(self, **counts)

    def updated(self, again: Estimate, rows: NDArray[np.bool_]) -> Estimate:
        """Take what was drawn of some rows, bool ``[unit]``, from another run of these images."""
        arrays = {
            name: np.where(rows if mine.ndim == 1 else rows[:, None], again.arrays[name], mine)
            for name, mine in self.arrays.items()
        }
        return Estimate.of(self.to_json(), arrays)

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays by name."""
        return {name: getattr(self, name) for name in ARRAYS}

    def to_json(self) -> dict[str, Any]:
        """All but the arrays."""
        return {"budget": self.budget, "expected": self.expected, "factor": self.factor}

    @classmethod
    def of(cls, known: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Estimate:
        """Undo ``to_json`` and ``arrays``."""
        return cls(**{**known, **{name: arrays[name] for name in ARRAYS}})

    @property
    def chance(self) -> Floats:
        """float64 [unit, level]: of a pair to be computed."""
        return self.top[:, None] * 0.5 ** np.arange(self.live.shape[1])

    def half_width(self, layer: Ints, row: Ints, image: Ints, weight: Floats) -> Floats:
        """Half of the 95 % interval of each unit's number of some flips.

        Parameters
        ----------
        layer : ndarray
            int64 ``[unit]``: the layer of each unit, as a number.
        row, image, weight : ndarray
            int64, int64 and float64 ``[flip]``: entries of those flips in the record, in its order.

        Returns
        -------
        ndarray
            float64 ``[unit]``, in images; see :meth:`half_width_by_class`.
        """
        every = np.zeros(len(row), dtype=np.int64)
        return self._half_width(layer, row, image, weight, every, np.ones((len(self.top), 1)))[:, 0]

    def half_width_by_class(
        self, layer: Ints, row: Ints, image: Ints, weight: Floats, label: Ints
    ) -> Floats:
        """Half of the 95 % interval of each unit's number of some flips of each class.

        The variance of an estimate is the sum of ``(1 - chance) / chance`` over all wrong
        predictions, of which those of a unit that were found give a noisy sum, none where none was
        found. So what was found of all units of a layer tells what share of the pairs of a level is
        predicted wrongly; a unit is taken to have that, times how many more were found of it than
        so were to be expected (what is known of that before is a gamma distribution). The larger of
        the two counts.

        Parameters
        ----------
        layer : ndarray
            int64 ``[unit]``: the layer of each unit, as a number.
        row, image, weight, label : ndarray
            int64, int64, float64 and int64 ``[flip]``: entries of those flips in the record, in its
            order, and the classes of their images.

        Returns
        -------
        ndarray
            float64 ``[unit, class]``, in images.
        """
        total = self.spread.sum(axis=1, keepdims=True)
        share = np.divide(self.spread, total, out=np.zeros_like(self.spread), where=total > 0)
        return self._half_width(layer, row, image, weight, label, share)

    def _half_width(
        self, layer: Ints, row: Ints, image: Ints, weight: Floats, column: Ints, share: Floats
    ) -> Floats:
        """Half-widths ``[unit, column]``; ``share`` is what each has of its unit's pairs."""
        first, weight = _wrong(row, image, weight)
        row, column = row[first], column[first]
        level = np.rint(np.log2(self.top[row] * weight)).astype(np.int64)
        level = level.clip(0, self.live.shape[1] - 1)
        found = np.zeros(self.live.shape, dtype=np.int64)
        np.add.at(found, (row, level), 1)
        chance = self.chance
        wrong = self.live * self._wrong_chance(layer, found, chance) * (chance < 1.0)
        expected = wrong * chance  # to be found
        rare = (_from_below(expected) <= RARE) & (_from_below(found) == 0)
        unseen = np.where(rare, wrong, 0.0).sum(axis=1, keepdims=True) * share
        usual = np.where(rare, 0.0, wrong * (1.0 - chance) / chance).sum(axis=1, keepdims=True)
        own, seen = np.zeros(share.shape), np.zeros(share.shape)
        np.add.at(own, (row, column), 1.0)
        np.add.at(seen, (row, column), weight * (weight - 1.0))
        more = (SHAPE + own) / (SHAPE + expected.sum(axis=1, keepdims=True) * share)
        variance = np.maximum(usual * share * more + unseen + unseen**2, seen)
        return np.asarray(WIDTH * np.sqrt(variance))

    def _wrong_chance(self, layer: Ints, found: Ints, chance: Floats) -> Floats:
        """Share of wrong predictions of each level, float64 ``[unit, level]``, pooled by layer.

        Before anything was found it is as the chances suggest, with an exponential distribution;
        1 where the pairs were not scored. Where some were found, no less than these say by
        themselves: what was reckoned beforehand may be wrong for a whole layer.
        """
        pooled = np.zeros((int(layer.max(initial=-1)) + 1, found.shape[1]))
        drawn = np.zeros_like(pooled)
        np.add.at(pooled, layer, found)
        np.add.at(drawn, layer, self.live * chance)
        scored = (self.top == 1.0)[:, None]
        before = np.where(scored, np.minimum(1.0, (chance / self.factor) ** 2), 1.0)
        reckoned = (1.0 + pooled[layer]) / (1.0 / before + drawn[layer])
        seen = np.where(pooled[layer] > 0, (1.0 + pooled[layer]) / (1.0 + drawn[layer]), 0.0)
        return np.minimum(1.0, np.maximum(reckoned, seen))

    def to_dataframe(self, layers: pd.Series[str]) -> pd.DataFrame:
        """One row per layer: units, pairs that an ablation changes, those drawn, their share.

        ``layers`` is the column ``layer`` of the result's ``units``.
        """
        frame = pd.DataFrame(
            {"layer": layers.to_numpy(), "pairs": self.live.sum(axis=1), "drawn": self.drawn}
        )
        found = frame.groupby("layer", sort=False, as_index=False).sum()
        return found.assign(share=found["drawn"] / np.maximum(found["pairs"], 1))

    def __str__(self) -> str:
        """Say in one line what was drawn."""
        return (
            f"{int(self.drawn.sum()):,} of {int(self.live.sum()):,} pairs that an ablation changes "
            f"were computed (budget {self.budget}); figures are estimates with 95 % intervals"
        )


def _wrong(row: Ints, image: Ints, weight: Floats) -> tuple[Ints, Floats]:
    """Find pairs that were predicted wrongly: their first entries, and how many each stands for.

    The entries of a pair sum to 0 or 1 where it was predicted rightly or not drawn; to the weight
    where it was found to flip in the way in question, one less the weight where it was not.
    """
    new = np.ones(len(row), dtype=bool)
    new[1:] = (row[1:] != row[:-1]) | (image[1:] != image[:-1])
    first = np.flatnonzero(new)
    total = np.add.reduceat(weight, first) if len(first) else weight[:0]
    wrong = (total != 0.0) & (total != 1.0)
    total = total[wrong]
    return first[wrong], np.where(total > 1.0, total, 1.0 - total)


def _from_below(levels: NDArray[Any]) -> NDArray[Any]:
    """Sum each level and those below it, ``[unit, level]``."""
    return np.cumsum(levels[:, ::-1], axis=1)[:, ::-1]
