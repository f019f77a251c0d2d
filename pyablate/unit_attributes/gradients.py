"""Gradient attributes: first-order estimates of a unit's effect on the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pyablate.network.sites import Site


def contributions(
    logits: Tensor, labels: Tensor, maps: Mapping[Site, Sequence[Tensor]]
) -> dict[Site, Tensor]:
    """Gradient of each image's cross-entropy times activation, summed over positions.

    From logits ``[N, K]`` with the graph that made them, and tensors of that graph by site, one per
    call, ``[>= N, ...]``: float64 ``[N, C]`` by site; 0 where the logits do not depend on the maps.
    """
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    flat = [(site, one) for site, calls in maps.items() for one in calls]
    gradients = torch.autograd.grad(loss, [one for _, one in flat], allow_unused=True)
    sums: dict[Site, Tensor] = {}
    for (site, a), g in zip(flat, gradients, strict=True):
        product = torch.zeros_like(a) if g is None else g * a.detach()
        summed = per_unit(product[: len(labels)], site)
        sums[site] = sums[site] + summed if site in sums else summed
    return sums


def per_unit(maps: Tensor, site: Site) -> Tensor:
    """Sum over the positions of a site's maps, float64 ``[N, C]``."""
    other = [axis for axis in range(1, maps.ndim) if axis != site.axis]
    return maps.double().sum(dim=other) if other else maps.double()


def taylor(per_image: Tensor, positions: int) -> Tensor:
    """Absolute mean over positions, ``[N, C]`` from sums over positions."""
    return per_image.abs() / positions


def fisher(per_image: Tensor) -> Tensor:
    """Squared sum over positions, ``[N, C]`` from sums over positions."""
    return per_image.square()


def by_class(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Sum over the images of each class, ``[C, K]`` from ``[N, C]`` and labels ``[N]``."""
    sums = values.new_zeros(classes, values.shape[1])
    return sums.index_add_(0, labels, values).t()
