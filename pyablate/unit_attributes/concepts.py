"""How well a unit's strongest activations cover a labelled concept (network dissection)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyablate._validation import check_names
from pyablate.data.dataset import Data
from pyablate.network.forward import forward
from pyablate.network.sites import Site, hooked

TOP = 0.005
"""Share of all positions above a unit's threshold."""

DETECTOR = 0.04
"""IoU above which a unit counts as a detector of the concept."""


@dataclass(frozen=True)
class Masks:
    """Where the concepts are: ``[N, M, H, W]``, not 0 where present, and one name per concept."""

    values: Any
    names: tuple[str, ...]


def check_masks(masks: Any, names: Sequence[str] | None, images: int) -> Masks:
    """Check what the caller gave."""
    shape = tuple(getattr(masks, "shape", ()))
    if not hasattr(masks, "__getitem__") or not shape:
        raise TypeError(
            f"masks: expected an array [images, concepts, H, W], got {type(masks).__name__}"
        )
    if len(shape) != 4 or shape[0] != images or 0 in shape:
        raise ValueError(
            f"masks: expected shape [{images}, concepts, H, W], one for each image, got "
            f"{list(shape)}"
        )
    return Masks(masks, check_names("concept_names", names, shape[1]))


def concept_iou(
    model: nn.Module, data: Data, sites: Sequence[Site], masks: Masks, *, batch_size: int
) -> dict[str, Tensor]:
    """Intersection over union of each unit with each concept, float64 ``[C, M]`` by site.

    Two passes: the first finds each unit's threshold, the second counts. Sites must have maps with
    a height and a width. NaN where neither the unit nor the concept is ever present.
    """
    limits = _thresholds(model, data, sites, batch_size)
    counts = {
        site.name: torch.zeros(2, site.channels, len(masks.names), dtype=torch.float64)
        for site in sites
    }
    first = 0
    for batch in data.batches(batch_size):
        part = torch.as_tensor(masks.values[first : first + len(batch)]) != 0
        part = part.to(batch.images.device)
        first += len(batch)

        def see(site: Site, _call: int, output: Tensor, part: Tensor = part) -> Tensor:
            maps = output.movedim(site.axis, 1)[: len(part)]
            counts[site.name] += _overlaps(maps, limits[site.name], part)
            return output

        with torch.no_grad(), hooked(model, sites, see):
            forward(model, batch.images)
    return {name: both / either for name, (both, either) in counts.items()}


def _thresholds(
    model: nn.Module, data: Data, sites: Sequence[Site], batch_size: int
) -> dict[str, Tensor]:
    """Value that a share of at most TOP of each unit's positions exceeds, ``[C]`` by site.

    The largest values seen so far are kept, as many as can still matter: an exact quantile in one
    pass over the data.
    """
    kept = {site.name: math.floor(TOP * len(data) * math.prod(_size(site))) + 1 for site in sites}
    held: dict[str, Tensor] = {}

    def see(site: Site, _call: int, output: Tensor) -> Tensor:
        values = output.movedim(site.axis, 0)[:, :count].flatten(1)
        if site.name in held:
            values = torch.cat([held[site.name], values], dim=1)
        held[site.name] = values.topk(min(kept[site.name], values.shape[1]), dim=1).values
        return output

    with torch.no_grad(), hooked(model, sites, see):
        for batch in data.batches(batch_size):
            count = len(batch)
            forward(model, batch.images)
    return {name: values[:, -1] for name, values in held.items()}


def _size(site: Site) -> tuple[int, ...]:
    """Height and width of a site's maps."""
    return tuple(length for axis, length in enumerate(site.shape, 1) if axis != site.axis)


def _overlaps(maps: Tensor, limit: Tensor, masks: Tensor) -> Tensor:
    """Positions in both and in either, float64 ``[2, C, M]`` over a batch."""
    size = masks.shape[2:]
    if maps.shape[2:] != size:
        maps = functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    above = (maps > limit.reshape(1, -1, 1, 1)).flatten(2).double()
    there = masks.flatten(2).double()
    both = torch.einsum("ncp,nmp->cm", above, there)
    sizes = above.sum(dim=(0, 2)).unsqueeze(1) + there.sum(dim=(0, 2))
    return torch.stack([both, sizes - both]).cpu()
