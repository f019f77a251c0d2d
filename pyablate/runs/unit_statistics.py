"""Statistics of the units: means and variances of each over the data, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyablate.data.dataset import Data
from pyablate.engine.replacements import Key, Statistics, clean_maps
from pyablate.network.sites import Site
from pyablate.runtime.distributed import Ranks


def measure_units(
    model: nn.Module,
    data: Data,
    sites: Sequence[Site],
    classes: int,
    *,
    batch_size: int,
    dtype: torch.dtype,
    ranks: Ranks,
) -> dict[Key, Statistics]:
    """Means and variances of every unit over the whole data, accumulated in float64.

    The model runs in ``dtype``, its own.
    Each of several processes reads its own part of the data.
    """
    totals: dict[Key, list[Tensor]] = {}
    shapes: dict[Key, tuple[int, ...]] = {}
    part = ranks.range_part(len(data)) if ranks.count > 1 else None
    if part is not None and not part:
        raise ValueError(f"data: {len(data)} images are too few for {ranks.count} processes")
    for batch in data.batches(batch_size, part):
        for key, maps in clean_maps(model, batch.images.to(dtype), sites).items():
            shapes[key] = tuple(maps.shape[2:])
            flat = maps.double().flatten(2) if maps.ndim > 2 else maps.double().unsqueeze(2)
            moments = torch.stack([flat.mean(2), flat.square().mean(2)])  # [2, N, channels]
            sums = torch.zeros(2, classes, flat.shape[1]).to(moments)
            sums.index_add_(1, batch.labels, moments)
            count = torch.bincount(batch.labels, minlength=classes)
            held = totals.setdefault(key, [torch.zeros_like(sums), torch.zeros_like(count)])
            held[0] += sums
            held[1] += count
    for held in totals.values():
        for sums in held:
            ranks.add(sums)
    return {key: _statistics(sums, count, shapes[key]) for key, (sums, count) in totals.items()}


def _statistics(sums: Tensor, count: Tensor, shape: tuple[int, ...]) -> Statistics:
    images = count.sum()
    mean, square = sums.sum(dim=1) / images
    class_mean = sums[0] / count.clamp(min=1).unsqueeze(1)
    deviation = (square - mean.square()).clamp(min=0).sqrt()
    return Statistics(mean, deviation, class_mean, shape)
