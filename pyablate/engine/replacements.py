"""Replacement values of units: numbers, statistics, noise, or maps of another image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from pyablate.data.dataset import Batch, Data
from pyablate.engine.job import Job
from pyablate.interventions import Intervention, donors, gaussian
from pyablate.network.sites import Site, hooked
from pyablate.runtime.host_to_device import sent

Key = tuple[str, int]  # (site name, call number)


@dataclass(frozen=True)
class Statistics:
    """Moments of a site's units over all images and positions.

    Attributes
    ----------
    mean, std : Tensor
        Float64 ``[channels]``.
    class_mean : Tensor
        Float64 ``[class, channels]``, over the images of each class.
    shape : tuple of int
        Of a unit's map; a module may be called with maps of several sizes.
    """

    mean: Tensor
    std: Tensor
    class_mean: Tensor
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Replacements:
    """Replacement values for one batch of images.

    Attributes
    ----------
    intervention : Intervention
        What replaces the units.
    batch : Batch
        The images.
    statistics : mapping
        Of each (site name, call), where the intervention needs them.
    donor_maps : mapping
        ``[N, channels, ...]`` of each (site name, call) on each image's donor, for resample.
    """

    intervention: Intervention
    batch: Batch
    statistics: Mapping[Key, Statistics]
    donor_maps: Mapping[Key, Tensor]

    def values(self, site: Site, call: int, image: Tensor, unit: Tensor) -> Tensor:
        """Give replacement maps of some units on some images.

        Parameters
        ----------
        site, call : Site, int
            Where.
        image, unit : Tensor
            int64, position in the batch and unit; shapes that broadcast together.

        Returns
        -------
        Tensor
            Their broadcast shape, then the shape of a map or as many ones.
        """
        kind, key = self.intervention.kind, (site.name, call)
        if kind == "resample":
            return self.donor_maps[key][image, unit]
        if kind == "noise":
            known = self.statistics[key]
            positions = math.prod(known.shape)
            draw = gaussian(self.intervention.seed, site.name, self._index[image], unit, positions)
            noise = known.mean[unit].unsqueeze(-1) + known.std[unit].unsqueeze(-1) * draw
            return noise.reshape(*noise.shape[:-1], *known.shape)
        if kind == "mean":
            value = self.statistics[key].mean[unit]
        elif kind == "class_mean":
            value = self.statistics[key].class_mean[self.batch.labels[image], unit]
        elif self.intervention.values is not None:
            constants = self.intervention.constants(site.name, site.features)
            value = sent(constants, unit.device)[unit]
        else:
            shape = torch.broadcast_shapes(image.shape, unit.shape)
            value = unit.new_full((), self.intervention.value, dtype=torch.float64).expand(shape)
        return value.reshape(*value.shape, *[1] * (len(site.shape) - 1))

    @cached_property
    def _index(self) -> Tensor:
        return sent(self.batch.index, self.batch.device)


def donor_maps(
    model: nn.Module, data: Data, batch: Batch, job: Job, *, at_a_time: int
) -> dict[Key, Tensor]:
    """Site tensors of a job on each image's donor, ``at_a_time`` donors at a time."""
    donor = torch.from_numpy(donors(job.intervention.seed, len(data)))
    images = data.at(donor[batch.index]).to(batch.images.dtype)
    parts = [clean_maps(model, some, job.sites) for some in images.split(at_a_time)]
    return {key: torch.cat([part.pop(key) for part in parts]) for key in list(parts[0])}


def clean_maps(model: nn.Module, images: Tensor, sites: Sequence[Site]) -> dict[Key, Tensor]:
    """Site tensors of a clean forward pass, units moved to axis 1."""
    maps: dict[Key, Tensor] = {}

    def keep(site: Site, call: int, output: Tensor) -> Tensor:
        maps[site.name, call] = output.detach().movedim(site.axis, 1).clone()
        return output

    rows = len(images)
    with hooked(model, sites, keep), torch.no_grad():
        # At least two rows: some networks squeeze a batch of one away.
        model(images.clone() if rows > 1 else torch.cat([images, images]))  # it may work in place
    return {key: value[:rows] for key, value in maps.items()}
