"""Moments and sparsity of the activations, and the rank of the maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyablate.network.forward import forward
from pyablate.network.sites import Site, hooked
from pyablate.ops.moments import ClassMoments
from pyablate.unit_attributes.observe import Observed


def moments(layer: Observed, by_class: ClassMoments) -> dict[str, Tensor]:
    """Mean, variance, maximum and sparsity of each unit, float64 ``[C]``."""
    maps = layer.maps
    images = maps.pooled.shape[1]
    total, square = by_class.total.sum(dim=1), by_class.square.sum(dim=1)
    variance = ((square - total.square() / images) / images).clamp(min=0)
    everywhere = images * layer.positions
    return {
        "mean": total / images,
        # Rounding leaves a constant a tiny variance.
        "variance": torch.where(constant(maps.pooled), 0.0, variance),
        "max": by_class.maximum.amax(dim=1),
        "sparsity": 1 - maps.positive.double() / everywhere,
        "active_images": by_class.active_images.sum(dim=1).double() / images,
    }


def constant(pooled: Tensor) -> Tensor:
    """Bool ``[C]``: units whose A ``[C, N]`` is the same on every image."""
    return pooled.amax(dim=1) == pooled.amin(dim=1)


def ranks(model: nn.Module, images: Tensor, sites: Sequence[Site], size: int) -> dict[str, Tensor]:
    """Mean rank of each unit's H x W map over some images, float64 ``[C]`` by site.

    The rank counts singular values above max(H, W) times the machine epsilon of the maps' dtype
    times the largest. Sites must have maps with a height and a width.
    """
    totals: dict[str, Tensor] = {}
    calls: dict[str, int] = {}

    def see(site: Site, _call: int, output: Tensor) -> Tensor:
        found = torch.linalg.matrix_rank(output[:held].movedim(site.axis, 1))
        totals[site.name] = totals.get(site.name, 0) + found.double().sum(dim=0)
        calls[site.name] = calls.get(site.name, 0) + held
        return output

    with torch.no_grad(), hooked(model, sites, see):
        for part in images.split(size):
            held = len(part)
            forward(model, part)
    return {name: (total / calls[name]).cpu() for name, total in totals.items()}
