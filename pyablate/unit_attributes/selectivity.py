"""How much a unit prefers one class: selectivity, correlation, AUC, informedness, precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyablate.unit_attributes.activations import constant
from pyablate.unit_attributes.observe import Observations, Observed

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


def standardised(a: Tensor) -> Tensor:
    """Rows of ``[C, N]`` centred and of length 1, in the dtype of ``a``; NaN where constant.

    Pearson's r of two rows is their product then. Centred in float64: a mean far above the
    deviation would leave float32 nothing.
    """
    wide = a.double()
    centred = wide - wide.mean(dim=1, keepdim=True)
    length = torch.linalg.vector_norm(centred, dim=1, keepdim=True)
    centred /= torch.where(constant(a).unsqueeze(1), torch.nan, length)
    return centred.to(a.dtype)


def class_correlation(units: Tensor, probabilities: Tensor) -> Tensor:
    """Pearson r of A with each class's probability, float64 ``[C, K]``; NaN for constants.

    Both :func:`standardised`, ``[C, N]`` and ``[K, N]``.
    """
    return (units @ probabilities.t().to(units.dtype)).double().clamp(-1, 1)


def redundancy(units: Tensor) -> Tensor:
    """Largest absolute correlation with another unit, float64 ``[C]``, of the standardised A.

    NaN for constant units and where no other unit varies.
    """
    r = (units @ units.t()).double().clamp(-1, 1).abs()
    r.fill_diagonal_(torch.nan)
    return largest(r)[0]


@dataclass(frozen=True)
class Ranked:
    """Order of the images by the activations of some units.

    Attributes
    ----------
    order : Tensor
        int64 ``[U, N]``, images by descending A, the first of equal ones first.
    greater, at_least : Tensor
        int32 ``[U, N]``, for each place of ``order`` the number of images with greater A, and with
        A at least as great (itself included).
    """

    order: Tensor
    greater: Tensor
    at_least: Tensor


def ranked(pooled: Tensor) -> Iterator[Ranked]:
    """Rank the images by A ``[C, N]``, a few units at a time."""
    units, images = pooled.shape
    step = max(1, _ELEMENTS // images)
    for first in range(0, units, step):
        values, order = _descending(pooled[first : first + step])
        places = torch.arange(images, dtype=torch.int32).expand(order.shape)
        starts = torch.ones_like(order, dtype=torch.bool)
        torch.ne(values[:, 1:], values[:, :-1], out=starts[:, 1:])
        ends = starts.roll(-1, dims=1)  # the last place is one, since the first is a start
        greater = np.maximum.accumulate(torch.where(starts, places, 0).numpy(), axis=1)
        last = torch.where(ends, places + 1, images).flip(1).numpy()
        at_least = np.minimum.accumulate(last, axis=1)
        yield Ranked(order, torch.from_numpy(greater), torch.from_numpy(at_least).flip(1))


def _descending(a: Tensor) -> tuple[Tensor, Tensor]:
    """Values of each row from the largest, and where they stood, the first of equal ones first."""
    if a.dtype != torch.float32:
        values, order = torch.sort(-a, dim=1, stable=True)
        return -values, order
    # One integer holds both: the bits of a float32, turned so that they compare as the values do,
    # above the position. Sorting 64-bit integers is several times faster than sorting pairs.
    bits = (a + 0.0).contiguous().view(torch.int32)  # + 0.0 makes -0.0 equal to 0.0
    falling = ~(bits ^ ((bits >> 31) & 0x7FFFFFFF))
    keys = (falling.long() << 32) | torch.arange(a.shape[1])
    order = torch.from_numpy(np.sort(keys.numpy(), axis=1)) & 0xFFFFFFFF
    return a.gather(1, order), order


@dataclass(frozen=True)
class ByClass:
    """The labels, ready for sums within classes.

    Attributes
    ----------
    small : Tensor
        Labels ``[N]``, int16 where that holds the classes: sorted faster.
    count : Tensor
        int64 ``[K]``, images of each class.
    """

    small: Tensor
    count: Tensor

    @classmethod
    def of(cls, seen: Observations) -> ByClass:
        """Read them off the observations."""
        dtype = torch.int16 if len(seen.count) < 2**15 else torch.int32
        return cls(seen.labels.to(dtype), seen.count)

    @property
    def sorted_labels(self) -> Tensor:
        """int64 ``[N]``, class after class."""
        return torch.repeat_interleave(self.count)


@dataclass(frozen=True)
class Grouped:
    """What :class:`Ranked` counts, in another order: the images of a class after those of another.

    Attributes
    ----------
    greater, at_least : Tensor
        int32 ``[U, N]``, within a class by descending A.
    classes : ByClass
        Whose images these are.
    """

    greater: Tensor
    at_least: Tensor
    classes: ByClass

    @classmethod
    def of(cls, ranks: Ranked, classes: ByClass) -> Grouped:
        """Sort the places of some units by class."""
        labels = classes.small[ranks.order].numpy()
        places = torch.from_numpy(np.argsort(labels, axis=1, kind="stable"))
        greater, at_least = ranks.greater.gather(1, places), ranks.at_least.gather(1, places)
        return cls(greater, at_least, classes)


def auc(ranks: Grouped) -> Tensor:
    """Area under the one-against-rest ROC curve, float64 ``[U, K]``.

    NaN for a class without images and for one that has them all.
    """
    images, own = ranks.at_least.shape[1], ranks.classes.count
    # Twice the rank from above, where equal values share the mean of theirs, less one: whole.
    twice = (ranks.greater + ranks.at_least).split(own.tolist(), dim=1)
    sums = torch.stack([part.sum(dim=1) for part in twice], dim=1)
    below = (own * (2 * images + 1) - sums).double() / 2  # sums of ranks from below
    above = below - own * (own + 1) / 2
    return above / (own * (images - own))  # 0 / 0 where there is nothing to compare


def informedness(ranks: Grouped) -> Tensor:
    """Largest true positive rate minus false positive rate over thresholds, ``[U, K]``.

    The best threshold lies at an activation of the class itself. NaN as in :func:`auc`.
    """
    units, images = ranks.at_least.shape
    counts = ranks.classes.count.tolist()
    out = torch.full((units, len(counts)), torch.nan, dtype=torch.float64)
    for k, passing in enumerate(ranks.at_least.split(counts, dim=1)):
        own = counts[k]
        if 0 < own < images:
            hits = torch.arange(1, own + 1, dtype=torch.float64)
            # hits / own - (passing - hits) / (images - own), in fewer passes over the images
            missed = passing.double().div_(own - images)
            out[:, k] = missed.add_(hits * (1 / own + 1 / (images - own))).amax(dim=1)
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
