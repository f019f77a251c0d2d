"""Relevance conditional on units: heat maps of single units, and the images that they matter for.

Concept relevance propagation (CRP) and relevance maximisation (RelMax): Achtibat, Dreyer,
Eisenbraun, Bosse, Wiegand, Samek, Lapuschkin 2023, doi:10.1038/s42256-023-00711-8
(arXiv:2206.03208). Relevance is that of :mod:`pyablate.attribution.propagation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pyablate._validation import check_count
from pyablate.attribution.maps import check_classes, check_images, propagation
from pyablate.attribution.propagation import Propagation, Relevance, one_hot
from pyablate.network.classifier import giving_logits
from pyablate.network.forward import check_logits, forward, two_images
from pyablate.network.model_checks import Ready, open_up
from pyablate.network.sites import (
    Site,
    check_channels,
    check_model,
    evaluation,
    parse_label,
    select,
    sites,
)
from pyablate.results.arrays import Floats
from pyablate.runtime.determinism import undisturbed

if TYPE_CHECKING:
    import xarray as xr

BATCH = 64
"""Images at a time, unless told otherwise."""


def conditional_maps(
    model: nn.Module,
    images: Tensor,
    target: Tensor,
    units: Sequence[str],
    *,
    batch_size: int = BATCH,
) -> Floats:
    """Attribute the logit of a class to pixels, through one unit of a layer and no other.

    The relevance of the class is carried back to the unit's layer, masked to the unit, and carried
    on to the images (CRP). The maps of all units of a layer sum to the map that is not masked,
    where nothing passes the layer by.

    Parameters
    ----------
    model : nn.Module
        Images ``[N, C, H, W]`` to logits ``[N, classes]``; it stays as it is.
    images : Tensor
        ``[N, C, H, W]``. The box of the z^B rule is that of all of them.
    target : Tensor
        int64 ``[N]``, the class that is explained, with relevance 1 at its logit.
    units : sequence of str
        Labels ``"layer:unit"``.
    batch_size : int
        Images at a time.

    Returns
    -------
    float64 [N, unit, H, W]
        Signed, summed over the channels of the image.

    Raises
    ------
    ValueError, TypeError
        Bad arguments, unknown units, a network or a layer for which there are no rules.

    Examples
    --------
    >>> from pyablate.attribution import conditional_maps
    >>> conditional_maps(model, images[:4], labels[:4], ["features.16:3"]).shape
    (4, 1, 28, 28)
    """
    check_images(model, images, target, batch_size)
    if isinstance(units, str) or not len(units):
        raise ValueError(f'units: expected labels "layer:unit", got {units!r}')
    known = sites(model, images[:1])
    chosen = [parse_label(known, label) for label in units]
    layers = list({site.name: site for site, _ in chosen}.values())
    check_channels(layers)
    parts = []
    with torch.inference_mode(False), evaluation(model), giving_logits(model):
        logits = forward(model, two_images(images))
        check_logits(logits, 2)
        check_classes(target, logits.shape[1])
        network = propagation(model, images, batch_size, layers)
        _check_found(layers, network.found)
        for part, classes in zip(images.split(batch_size), target.split(batch_size), strict=True):
            found = network.run(part)
            start = one_hot(classes.to(part.device), found.logits)
            maps = [_masked(found, start, site, torch.tensor([unit])) for site, unit in chosen]
            parts.append(torch.stack(maps, dim=1).double().cpu())
    joined: Floats = torch.cat(parts).numpy()
    return joined


def _masked(found: Relevance, start: Tensor, site: Site, units: Tensor) -> Tensor:
    """Carry relevance through one unit, that of each image or the same of all: ``[N, H, W]``."""
    activation = found.activations[site.name]
    shape = [len(units)] + [1] * (activation.ndim - 1)
    shape[site.axis] = site.channels
    mask = activation.new_zeros(len(units), site.channels)
    mask[torch.arange(len(units)), units] = 1
    found.masks[site.name] = mask.reshape(shape)
    maps = found.at_image(start).sum(1)
    found.masks.clear()
    return maps


def relmax(
    model: nn.Module,
    data: Any,
    layers: str | Sequence[str],
    *,
    target: int | None = None,
    count: int = 8,
    maps: bool = False,
    batch_size: int = BATCH,
    axis: Mapping[str, int] | None = None,
    device: str | torch.device | None = None,
) -> xr.Dataset:
    """Find the images for which a unit is most relevant, beside those that activate it most.

    Parameters
    ----------
    model, data, layers, axis, device
        As for :func:`pyablate.attributes`. The data are read twice.
    target : int, optional
        The class whose relevance counts; by default, of each image the one that is predicted.
    count : int
        Images per unit; at most as many as there are.
    maps : bool
        Whether to carry the relevance of each unit on to the images for which it is most relevant,
        as :func:`pyablate.attribution.conditional_maps` does; one more pass over so many images.
    batch_size : int
        Images at a time.

    Returns
    -------
    xarray.Dataset
        Over ``unit`` and ``rank``, the largest first, of equal ones the first image:
        ``relevant_image`` (int64) and ``relevance`` (float64), the sum over the unit's positions
        of a relevance of 1 at the logit; ``activating_image`` and ``activation``, the mean over
        the positions. With ``maps`` also ``relevant_map`` (float32 [unit, rank, y, x]), signed.

    Raises
    ------
    ValueError, TypeError
        Bad arguments, or a network or layers for which there are no rules.

    Examples
    --------
    >>> from pyablate.attribution import relmax
    >>> found = relmax(model, data, "features.16", count=3)
    >>> found["relevant_image"].shape, found["activating_image"].dims
    ((128, 3), ('unit', 'rank'))
    """
    import xarray as xr  # slow to import: half a second

    check_model(model)
    check_count("count", count)
    check_count("batch_size", batch_size)
    with undisturbed(model, device), torch.inference_mode(False):
        ready = open_up(model, data, None, device, axis=axis, unlabelled=True)
        check_class("target", target, ready.classes)
        if maps and ready.batch.images.ndim != 4:
            shape = list(ready.batch.images.shape)
            raise ValueError(f"maps: expected images [N, C, H, W], got shape {shape}")
        ready.data.hold_if_read_once()
        chosen = select(ready.sites, layers)
        check_channels(chosen)
        network = propagation_of(ready, chosen, batch_size)
        relevance: dict[str, list[Tensor]] = {site.name: [] for site in network.found}
        activation: dict[str, list[Tensor]] = {site.name: [] for site in network.found}
        for batch in ready.data.batches(batch_size):
            found = network.run(batch.images)
            carried = found.at_sites(predicted(found.logits, target))
            for site in network.found:
                values = found.activations[site.name].detach()[: len(batch)]
                relevance[site.name].append(_flat(carried[site.name], site).sum(2).cpu())
                activation[site.name].append(_flat(values, site).mean(2).cpu())
        largest, numbers = _largest(relevance, count)
        means, active = _largest(activation, count)
        drawn = _maps(ready, network, numbers, target, batch_size) if maps else None
    both = "unit", "rank"
    table = xr.Dataset(
        {
            "relevant_image": (both, numbers),
            "relevance": (both, largest),
            "activating_image": (both, active),
            "activation": (both, means),
        },
        coords={"unit": [s.label(unit) for s in network.found for unit in range(s.channels)]},
    )
    if drawn is not None:
        table["relevant_map"] = ((*both, "y", "x"), drawn)
    return table


def predicted(logits: Tensor, target: int | None = None) -> Tensor:
    """Relevance 1 at the class that is predicted, or at one class of all, ``[N, classes]``."""
    classes = logits.argmax(1)
    return one_hot(classes if target is None else torch.full_like(classes, target), logits)


def _maps(
    ready: Ready, network: Propagation, numbers: Any, target: int | None, size: int
) -> Floats:
    """Carry relevance to some images of each unit through it, ``[unit, rank, H, W]``."""
    ready.data.hold()
    first, rank, parts = 0, numbers.shape[1], []
    for site in network.found:
        images = torch.from_numpy(numbers[first : first + site.channels]).flatten()
        units = torch.arange(site.channels).repeat_interleave(rank)
        first += site.channels
        for some, unit in zip(images.split(size), units.split(size), strict=True):
            found = network.run(ready.data.at(some))
            parts.append(_masked(found, predicted(found.logits, target), site, unit).float().cpu())
    every: Floats = torch.cat(parts).unflatten(0, (-1, rank)).numpy()
    return every


def propagation_of(ready: Ready, chosen: Sequence[Site], size: int) -> Propagation:
    """Make a copy that carries relevance of all images, some at a time, to all layers chosen."""
    images = (batch.images for batch in ready.data.batches(size))
    network = propagation(ready.model, ready.batch.images, size, chosen, images)
    _check_found(chosen, network.found)
    return network


def check_class(argument: str, given: int | None, classes: int) -> None:
    """Refuse what is the number of no class."""
    if given is not None and not 0 <= given < classes:
        raise ValueError(f"{argument}: expected a class from 0 to {classes - 1}, got {given}")


def _flat(maps: Tensor, site: Site) -> Tensor:
    return maps.movedim(site.axis, 1).reshape(len(maps), site.channels, -1).double()


def _largest(parts: Mapping[str, Sequence[Tensor]], count: int) -> tuple[Floats, Any]:
    """Largest values of each unit and their images, ``[unit, rank]``."""
    every = torch.cat([torch.cat(list(part)) for part in parts.values()], dim=1).t()
    values, order = every.sort(dim=1, descending=True, stable=True)
    return values[:, :count].numpy(), order[:, :count].numpy().astype(np.int64)


def _check_found(wanted: Sequence[Site], found: Sequence[Site]) -> None:
    names = {site.name for site in found}
    missing = [site.name for site in wanted if site.name not in names]
    if missing:
        raise ValueError(
            f"layers: relevance cannot be followed to {', '.join(missing)}; choose the outputs of "
            "whole modules that are called once"
        )
