"""What a unit's activation tells about the class, in nats, from counts of binned activations."""

from __future__ import annotations

import torch
from torch import Tensor


def entropy(counts: Tensor) -> Tensor:
    """Plug-in entropy of the bins of ``[U, bins]``, ``[U]``."""
    share = counts.double() / counts.sum(dim=1, keepdim=True)
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
