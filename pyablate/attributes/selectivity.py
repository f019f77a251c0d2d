"""How much a unit prefers one class: selectivity, correlation, AUC, informedness, precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyablate.attributes.activations import constant
from pyablate.attributes.observe import Observations, Observed

_ELEMENTS = 1 << 22  # values that are ranked at a time


def class_selectivity(layer: Observed, count: Tensor) -> Tensor:
    """Index of each class against the mean of the others, float64 ``[C, K]``.

    NaN for units that are negative anywhere, for classes without images, where both means are 0,
    and where there is no other class.
    """
    seen = count > 0
    mean = layer.total / count  # NaN for a class without images
    others = int(seen.sum()) - 1
    everything = mean[:, seen].sum(dim=1, keepdim=True)
    rest = (everything - mean) / others if others else torch.full_like(mean, torch.nan)
    index = (mean - rest) / (mean + rest)
    return torch.where((layer.least < 0).unsqueeze(1), torch.nan, index)


def class_correlation(layer: Observed, probabilities: Tensor) -> Tensor:
    """Pearson r of A with each class's probability, float64 ``[C, K]``; NaN for constants."""
    return _pearson(layer.pooled, probabilities.t())


def redundancy(layer: Observed) -> Tensor:
    """Largest absolute correlation with another unit, float64 ``[C]``.

    NaN for constant units and where no other unit varies.
    """
    r = _pearson(layer.pooled, layer.pooled).abs()
    r.fill_diagonal_(torch.nan)
    return largest(r)[0]


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlations of the rows of ``[A, N]`` with those of ``[B, N]``."""
    x, y = _standard(a), _standard(b)
    return (x @ y.t()).clamp(-1, 1)


def _standard(a: Tensor) -> Tensor:
    centred = a.double() - a.double().mean(dim=1, keepdim=True)
    centred = torch.where(constant(a).unsqueeze(1), torch.nan, centred)
    return centred / torch.linalg.vector_norm(centred, dim=1, keepdim=True)


@dataclass(frozen=True)
class Ranked:
    """Order of the images by the activations of some units.

    Attributes
    ----------
    units : slice
        Which.
    order : Tensor
        int64 ``[U, N]``, images by descending A, the first of equal ones first.
    greater, at_least : Tensor
        int64 ``[U, N]``, for each image the number of images with greater A, and with A at least
        as great (itself included).
    """

    units: slice
    order: Tensor
    greater: Tensor
    at_least: Tensor


def ranked(pooled: Tensor) -> Iterator[Ranked]:
    """Rank the images by A ``[C, N]``, a few units at a time."""
    units, images = pooled.shape
    step = max(1, _ELEMENTS // images)
    for first in range(0, units, step):
        part = slice(first, min(first + step, units))
        falling = -pooled[part]
        values, order = torch.sort(falling, dim=1, stable=True)
        greater = torch.searchsorted(values, falling)
        at_least = torch.searchsorted(values, falling, right=True)
        yield Ranked(part, order, greater, at_least)


@dataclass(frozen=True)
class ByClass:
    """Images gathered by class, for sums within each."""

    order: Tensor
    bounds: list[tuple[int, int, int]]  # class, first and last position in `order`
    classes: int

    @classmethod
    def of(cls, seen: Observations) -> ByClass:
        """Sort the labels once for all units."""
        ends = seen.count.cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        bounds = [(k, a, b) for k, (a, b) in enumerate(zip(starts, ends, strict=True)) if b > a]
        return cls(seen.labels.argsort(stable=True), bounds, len(ends))


def auc(ranks: Ranked, classes: ByClass) -> Tensor:
    """Area under the one-against-rest ROC curve, float64 ``[U, K]``.

    NaN for a class without images and for one that has them all.
    """
    units, images = ranks.greater.shape
    # Rank from below; equal values share the mean of theirs.
    rank = images - (ranks.greater + ranks.at_least - 1).double() / 2
    rank = rank[:, classes.order]
    out = torch.full((units, classes.classes), torch.nan, dtype=torch.float64)
    for k, first, last in classes.bounds:
        own = last - first
        if own < images:
            above = rank[:, first:last].sum(dim=1) - own * (own + 1) / 2
            out[:, k] = above / (own * (images - own))
    return out


def informedness(ranks: Ranked, classes: ByClass) -> Tensor:
    """Largest true positive rate minus false positive rate over thresholds, ``[U, K]``.

    The best threshold lies at an activation of the class itself. NaN as in :func:`auc`.
    """
    units, images = ranks.greater.shape
    rank = ranks.at_least[:, classes.order]
    out = torch.full((units, classes.classes), torch.nan, dtype=torch.float64)
    for k, first, last in classes.bounds:
        own = last - first
        if own < images:
            passing = rank[:, first:last].sort(dim=1).values.double()
            hits = torch.arange(1, own + 1, dtype=torch.float64)
            gain = hits / own - (passing - hits) / (images - own)
            out[:, k] = gain.amax(dim=1)
    return out


def precision_at(ranks: Ranked, labels: Tensor, classes: int, top: int) -> Tensor:
    """Share of each class among the ``top`` images, float64 ``[U, K]``."""
    best = labels[ranks.order[:, :top]]
    counts = torch.zeros(len(best), classes, dtype=torch.float64)
    counts.scatter_add_(1, best, torch.ones_like(best, dtype=torch.float64))
    return counts / best.shape[1]


def largest(values: Tensor) -> tuple[Tensor, Tensor]:
    """Largest of each row, NaN left out, and its column; NaN and -1 where all are NaN."""
    known = torch.where(values.isnan(), -torch.inf, values)
    if values.shape[1] == 0:
        return values.new_full((len(values),), torch.nan), torch.full((len(values),), -1)
    best, where = known.max(dim=1)
    none = values.isnan().all(dim=1)
    return torch.where(none, torch.nan, best), torch.where(none, -1, where)
