"""How much a unit prefers one class: selectivity, correlation, AUC, informedness, precision."""

from __future__ import annotations

import torch
from torch import Tensor

from pyablate.ops.moments import ClassRanks
from pyablate.runtime.chunking import CACHED_NUMBERS
from pyablate.unit_attributes.activations import constant


def class_selectivity(total: Tensor, least: Tensor, count: Tensor) -> Tensor:
    """Index of each class against the mean of the others, float64 ``[C, K]``.

    From the sums of A over the ``count`` images of each class and the least value of the maps.
    NaN for units that are negative anywhere, for classes without images, where both means are 0,
    and where there is no other class.
    """
    seen = count > 0
    mean = total / count  # NaN for a class without images
    others = int(seen.sum()) - 1
    everything = mean[:, seen].sum(dim=1, keepdim=True)
    rest = (everything - mean) / others if others else torch.full_like(mean, torch.nan)
    index = (mean - rest) / (mean + rest)
    return torch.where((least < 0).unsqueeze(1), torch.nan, index)


def standardised(a: Tensor) -> Tensor:
    """Rows of ``[C, N]`` centred and of length 1, in the dtype of ``a``; NaN where constant.

    Pearson's r of two rows is their product then. Centred in float64: a mean far above the
    deviation would leave float32 nothing.
    """
    out = torch.empty(a.shape, dtype=a.dtype)
    step = max(1, CACHED_NUMBERS // max(a.shape[1], 1))
    for part, into in zip(a.split(step), out.split(step), strict=True):
        wide = part.double()
        wide -= wide.mean(dim=1, keepdim=True)
        length = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        wide /= torch.where(constant(part).unsqueeze(1), torch.nan, length)
        into.copy_(wide)
    return out


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


def auc(ranks: ClassRanks, count: Tensor) -> Tensor:
    """Area under the one-against-rest ROC curve, float64 ``[U, K]``, of classes of so many images.

    NaN for a class without images and for one that has them all.
    """
    images = count.sum()
    # Twice the rank from above, where equal values share the mean of theirs, less one: whole.
    below = (count * (2 * images + 1) - ranks.rank_sum).double() / 2  # sums of ranks from below
    above = below - count * (count + 1) / 2
    return above / (count * (images - count))  # 0 / 0 where there is nothing to compare


def informedness(ranks: ClassRanks, count: Tensor) -> Tensor:
    """Largest true positive rate minus false positive rate over thresholds, ``[U, K]``.

    The best threshold lies at an activation of the class itself. NaN as in :func:`auc`.
    """
    # hits / count - (passing - hits) / (images - count), over one denominator
    return ranks.gain.double() / (count * (count.sum() - count))


def precision_at(ranks: ClassRanks) -> Tensor:
    """Share of each class among the first images, float64 ``[U, K]``."""
    return ranks.first.double() / ranks.first.sum(dim=1, keepdim=True)


def largest(values: Tensor) -> tuple[Tensor, Tensor]:
    """Largest of each row, NaN left out, and its column; NaN and -1 where all are NaN."""
    known = torch.where(values.isnan(), -torch.inf, values)
    if values.shape[1] == 0:
        return values.new_full((len(values),), torch.nan), torch.full((len(values),), -1)
    best, where = known.max(dim=1)
    none = values.isnan().all(dim=1)
    return torch.where(none, torch.nan, best), torch.where(none, -1, where)
