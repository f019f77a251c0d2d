"""Statistics of pairs of units: what matrices over the same units have in common.

Used by sets_study.py. Numbers of pairs share their units and so are not independent: intervals draw
units, tests permute them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import adjusted_rand_score

from pyablate.analysis.bootstrap import Variable, coefficients, resample
from pyablate.analysis.clusters import _cut, _tree
from pyablate.analysis.statistics import mcnemar

CLUSTERS = 8
LEVEL = 0.05
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Halves = tuple[Floats, Floats]


def square(values: Floats, units: int) -> Floats:
    """Symmetric ``[unit, unit]`` of one number for each pair, zeros on the diagonal."""
    matrix = np.zeros((units, units))
    matrix[np.triu_indices(units, 1)] = values
    return matrix + matrix.T


def centred(matrix: Floats) -> Floats:
    """Take the units' own levels out of a symmetric matrix: what is left sums to 0 in every row.

    Least squares of a level for each unit over the numbers beside the diagonal.
    """
    units = len(matrix)
    off = matrix * (1 - np.eye(units))
    level = (off.sum(axis=1) - off.sum() / (2 * (units - 1))) / (units - 2)
    left = off - level[:, None] - level[None, :]
    np.fill_diagonal(left, 0.0)
    return left


def _standard_ranks(matrix: Floats) -> Floats:
    """Ranks of the pairs with mean 0 and length 1, ``[unit, unit]``; zeros on the diagonal."""
    ranks = stats.rankdata(matrix[np.triu_indices(len(matrix), 1)])
    ranks -= ranks.mean()
    return square(ranks / max(float(np.linalg.norm(ranks)), 1e-300), len(matrix))


def mantel(
    one: Sequence[Floats], other: Sequence[Floats], shuffles: int, seed: int = 0
) -> tuple[float, float]:
    """Rank correlation of matrices over the pairs of units, and its p by permuting the units.

    `one` and `other` are sequences of matrices ``[unit, unit]`` that are compared in turn, the
    first with the first; the statistic is the mean of their correlations (Mantel 1967). Units are
    permuted in all of `other` alike; two-sided.
    """
    firsts = [_standard_ranks(matrix) / 2 for matrix in one]  # each pair stands there twice
    seconds = [_standard_ranks(matrix) for matrix in other]

    def statistic(order: Ints) -> float:
        found = [
            float(np.vdot(a, b[np.ix_(order, order)])) for a, b in zip(firsts, seconds, strict=True)
        ]
        return float(np.mean(found))

    generator, units = np.random.default_rng(seed), len(firsts[0])
    value = statistic(np.arange(units))
    drawn = np.array([statistic(generator.permutation(units)) for _ in range(shuffles)])
    as_large = np.count_nonzero(np.abs(drawn) >= abs(value) - 1e-12)
    return value, (1 + as_large) / (1 + shuffles)


def clusters(distances: Floats, count: int = CLUSTERS) -> Ints:
    """Cluster of each unit by complete linkage, as `pa.cluster_units` numbers them."""
    condensed = distances[np.triu_indices(len(distances), 1)]
    return _cut(_tree(condensed - min(condensed.min(), 0.0), "complete"), len(distances), count)


def agreement(
    one: Sequence[Ints], other: Sequence[Ints], shuffles: int, seed: int = 0
) -> tuple[float, float]:
    """Return the mean adjusted Rand index of clusterings, and its p by permuting the units."""

    def statistic(order: Ints) -> float:
        found = [adjusted_rand_score(a, b[order]) for a, b in zip(one, other, strict=True)]
        return float(np.mean(found))

    generator, units = np.random.default_rng(seed), len(one[0])
    value = statistic(np.arange(units))
    drawn = np.array([statistic(generator.permutation(units)) for _ in range(shuffles)])
    return value, (1 + np.count_nonzero(drawn >= value - 1e-12)) / (1 + shuffles)


def repeated(one: Floats, other: Floats, units: int, resamples: int) -> tuple[float, float, float]:
    """Rank correlation over pairs, and its 95 % bootstrap interval over units."""
    drawn = resample(units, resamples, np.random.default_rng(0))
    first, second = np.triu_indices(units, 1)
    weights = drawn[:, first] * drawn[:, second]  # a pair is drawn with both of its units
    found = coefficients(Variable(one, weights), Variable(other, weights), "spearman")
    if np.isnan(found).all():  # nothing to rank: no set changes the accuracy
        return math.nan, math.nan, math.nan
    low, high = np.nanquantile(found, [0.025, 0.975])
    return float(stats.spearmanr(one, other).statistic), float(low), float(high)


def mean_of_pairs(values: Floats, units: int, resamples: int) -> tuple[float, float, float]:
    """Mean over pairs, and its 95 % bootstrap interval over units."""
    drawn = resample(units, resamples, np.random.default_rng(0)).astype(np.float64)
    first, second = np.triu_indices(units, 1)
    weights = drawn[:, first] * drawn[:, second]
    low, high = np.quantile((weights @ values) / weights.sum(axis=1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def tossed(by_image: NDArray[np.int8], shuffles: int, seed: int = 0) -> Ints:
    """Pairs with a sign test of at most `LEVEL` when each image's sign is tossed: int64 ``[toss]``.

    `by_image` holds the synergy of each pair on each image. The sign of an image is tossed for all
    pairs alike, so that pairs stay as dependent as they are.
    """
    signs = np.sign(by_image).astype(np.float32)
    changed = np.abs(signs).sum(axis=1, dtype=np.float64).astype(np.int64)[:, None]
    coins = np.random.default_rng(seed).choice(np.float32([-1, 1]), (signs.shape[1], shuffles))
    net = (signs @ coins).round().astype(np.int64)
    found: Ints = (mcnemar((changed + net) // 2, (changed - net) // 2) <= LEVEL).sum(axis=0)
    return found


@dataclass(frozen=True)
class Comparison:
    """Two ways to compare units: Mantel's correlation, without levels too, and their clusters'.

    Each value is a figure and its p.
    """

    one: str
    other: str
    mantel: tuple[float, float]
    centred: tuple[float, float]
    rand: tuple[float, float]


def compared(found: Mapping[str, Halves], shuffles: int) -> list[Comparison]:
    """Compare all ways with one another, each on one half with the other on the other half.

    So no image counts on both sides. A way with itself is what other images alone cost, and is not
    tested.
    """
    levelled = {name: [centred(half) for half in both] for name, both in found.items()}
    grouped = {name: [clusters(half) for half in both] for name, both in found.items()}
    names, lines = list(found), []
    for number, one in enumerate(names):
        for other in names[number:]:
            many = 0 if one == other else shuffles
            lines.append(
                Comparison(
                    one,
                    other,
                    mantel(found[one], found[other][::-1], many),
                    mantel(levelled[one], levelled[other][::-1], many),
                    agreement(grouped[one], grouped[other][::-1], many // 2),
                )
            )
    return lines
