"""What a unit's activation tells about the class, in nats, from binned activations."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyablate.moments import joint_histogram


def equal_numbers(at_least: Tensor, bins: int) -> Tensor:
    """Bin of each image in bins of equal numbers of images, int32 ``[U, N]``.

    Equal activations share the bin of the lowest of them, so a silent unit has one bin.

    Parameters
    ----------
    at_least : Tensor
        int32 ``[U, N]``, number of images with A at least as great.
    bins : int
        How many.
    """
    images = at_least.shape[1]
    # numpy divides by a number in vectors
    dtype = np.int32 if images * bins < 2**31 else np.int64
    below = images - at_least.numpy().astype(dtype, copy=False)
    return torch.from_numpy((below * bins // images).astype(np.int32, copy=False))


def equal_widths(pooled: Tensor, bins: int) -> Tensor:
    """Bin of each image in bins of equal width from the smallest A to the largest, int32."""
    low, high = pooled.amin(dim=1, keepdim=True), pooled.amax(dim=1, keepdim=True)
    place = (pooled.double() - low.double()) / (high.double() - low.double())
    place = torch.where(high > low, place, 0.0)
    return (place * bins).int().clamp(max=bins - 1)


def joint(code: Tensor, labels: Tensor, bins: int, classes: int) -> Tensor:
    """Count images by bin and class, float64 ``[U, bins, K]``."""
    return joint_histogram(code, labels.int(), bins, classes).double()


def entropy(counts: Tensor) -> Tensor:
    """Plug-in entropy of the bins of ``[U, bins, K]``, ``[U]``."""
    share = counts.sum(dim=2) / counts.sum(dim=(1, 2)).unsqueeze(1)
    return -torch.xlogy(share, share).sum(dim=1)


def mutual_information(counts: Tensor) -> Tensor:
    """Plug-in information between bin and class less its Miller-Madow bias, ``[U]``."""
    images = counts.sum(dim=(1, 2))
    both = counts / images[:, None, None]
    bin_, label = both.sum(dim=2), both.sum(dim=1)

    def negative_entropy(p: Tensor) -> Tensor:
        return torch.xlogy(p, p).flatten(1).sum(dim=1)

    plain = negative_entropy(both) - negative_entropy(bin_) - negative_entropy(label)
    cells = [(p > 0).flatten(1).sum(dim=1) for p in (both, bin_, label)]
    return plain - (cells[0] - cells[1] - cells[2] + 1) / (2 * images)


def kl_selectivity(counts: Tensor) -> Tensor:
    """KL(P(T | class), P(T)) by class, ``[U, K]``; NaN for a class without images."""
    overall = counts.sum(dim=2, keepdim=True) / counts.sum(dim=(1, 2), keepdim=True)
    within = counts / counts.sum(dim=1, keepdim=True)
    # Where a class has images in a bin the whole data has them too.
    ratio = torch.where(counts > 0, within / overall, 1.0)
    found = (within * ratio.log()).sum(dim=1)
    empty = counts.sum(dim=1) == 0
    return torch.where(empty, torch.nan, found)
