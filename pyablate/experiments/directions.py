"""Directions in the space of a layer's units, to ablate in place of the units themselves.

Each function gives one matrix per layer, float64 ``[units, directions]`` with columns of length 1,
as :class:`pyablate.Intervention` takes them: ``Intervention("direction", directions=found)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyablate._validation import check_count, check_seed
from pyablate.attribution.conditional import check_class, propagation_of
from pyablate.engine.replacements import clean_maps
from pyablate.experiments._relevant import (
    Products,
    Rows,
    Sample,
    check_blocks,
    contexts,
    disentangled,
)
from pyablate.experiments.units import opened
from pyablate.interventions import random_rotation
from pyablate.network.capture import capture
from pyablate.network.channel_tracking import readers
from pyablate.network.graph import Graph
from pyablate.network.sites import Site, check_channels, select
from pyablate.runtime.determinism import undisturbed
from pyablate.unit_attributes.weights import columns_by_input

BATCH = 64
"""Images at a time, unless told otherwise."""


def rotations(
    model: nn.Module,
    data: Any,
    layers: str | Sequence[str],
    *,
    count: int = 1,
    seed: int = 0,
    device: str | torch.device | None = None,
    axis: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Random orthogonal axes of each layer, as many as it has units, ``count`` times over.

    Parameters
    ----------
    model, data, layers, device, axis
        As for :func:`pyablate.ablate`; only the first images are looked at.
    count : int
        Rotations, side by side: columns ``r * units`` to ``(r + 1) * units - 1`` are the r-th.
    seed : int
        Every rotation of every layer draws from a stream of its own.

    Returns
    -------
    dict of str to Tensor
        Float64 ``[units, count * units]`` by layer.

    Raises
    ------
    ValueError, TypeError
        Unknown layers, ``count`` below 1, a model or data that cannot be used.

    Examples
    --------
    >>> pa.directions.rotations(model, data, "features.16", count=2)["features.16"].shape
    torch.Size([128, 256])
    """
    check_count("count", count)
    check_seed(seed)
    found = select(opened(model, data, {"device": device, "axis": axis}).sites, layers)
    check_channels(found)
    turns = len(found) * count
    return {
        site.name: torch.cat(
            [
                random_rotation(site.channels, seed=seed * turns + place * count + turn)
                for turn in range(count)
            ],
            dim=1,
        )
        for place, site in enumerate(found)
    }


def principal_components(
    model: nn.Module,
    data: Any,
    layers: str | Sequence[str],
    *,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    axis: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Principal components of each layer's activations, largest variance first.

    Eigenvectors of the covariance of the units over all images and positions, in one pass.

    Parameters
    ----------
    model, data, layers, batch_size, device, axis
        As for :func:`pyablate.ablate`.

    Returns
    -------
    dict of str to Tensor
        Float64 ``[units, units]`` by layer. The sign of a column means nothing.

    Raises
    ------
    ValueError, TypeError
        Unknown layers, a model or data that cannot be used.

    Examples
    --------
    >>> pa.directions.principal_components(model, data, "features.16")["features.16"].shape
    torch.Size([128, 128])
    """
    with undisturbed(model, device), torch.inference_mode(False), torch.no_grad():
        ready = opened(model, data, {"device": device, "axis": axis})
        found = select(ready.sites, layers)
        moments = {site.name: _Moments(site.features) for site in found}
        for batch in ready.data.batches(batch_size or BATCH):
            for (name, _call), maps in clean_maps(ready.model, batch.images, found).items():
                moments[name].add(maps)
    return {name: held.axes() for name, held in moments.items()}


def next_weights(
    model: nn.Module,
    data: Any,
    layers: str | Sequence[str],
    *,
    device: str | torch.device | None = None,
    axis: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Directions to which the next layer listens most: singular vectors of its weights.

    The weights that read a layer's units first, all of them, unfolded to a matrix ``[units, rest]``
    (``rest``: filter positions and outputs); its left singular vectors, largest singular value
    first. What is along the last ones hardly reaches the next layer.

    Parameters
    ----------
    model, data, layers, device, axis
        As for :func:`pyablate.ablate`; only the first images are looked at, to follow the network.

    Returns
    -------
    dict of str to Tensor
        Float64 ``[units, min(units, rest)]`` by layer.

    Raises
    ------
    ValueError, TypeError
        Unknown layers, a layer whose units no constant weights read one by one, a model or data
        that cannot be used.
    pyablate.network.capture.CaptureError
        A model that ``torch.export`` cannot capture.

    Examples
    --------
    >>> pa.directions.next_weights(model, data, "features.9")["features.9"].shape
    torch.Size([64, 64])
    """
    with undisturbed(model, device), torch.inference_mode(False):
        ready = opened(model, data, {"device": device, "axis": axis})
        found = select(ready.sites, layers)
        graph = capture(ready.model, ready.batch.images, found, fold=False)
        return {site.name: _singular_vectors(graph, site) for site in found}


def relevant(
    model: nn.Module,
    data: Any,
    layers: str | Sequence[str],
    *,
    target: int | None = None,
    subspaces: int | None = None,
    dimensions: int = 1,
    sample: int = 2000,
    seed: int = 0,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    axis: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Directions of each layer that carry most relevance for a class (PRCA, DRSA).

    The relevance of a class's logit (z+ rule, z^B at the images) at one position of a layer is
    ``a . c``, with the activations a and their context c. Principal relevant components are the
    eigenvectors of ``E[a c^T + c a^T]``: the first d of them keep as much of the relevance as d
    directions can. With ``subspaces``, the directions are orthogonal blocks that maximise a soft
    mean of their rectified relevances instead: each block is relevant at positions of its own, so
    that concepts come apart; the best end of five random starts counts (Chormai, Herrmann,
    Mueller, Montavon 2022, arXiv:2212.14855).

    Parameters
    ----------
    model, data, layers, batch_size, device, axis
        As for :func:`pyablate.ablate`; the data are read twice.
    target : int, optional
        The class whose relevance counts; by default, of each image the one that is predicted.
    subspaces, dimensions : int, optional
        How many blocks of how many directions; by default principal components.
    sample, seed : int
        Of blocks: positions looked at, and what draws them and the first blocks.

    Returns
    -------
    dict of str to Tensor
        Float64 by layer, ``[units, units]``, largest eigenvalue first, or
        ``[units, subspaces * dimensions]``, the block with most relevance first. The sign of a
        column means nothing.

    Raises
    ------
    ValueError, TypeError
        Unknown layers, counts out of range, a model without rules for relevance, data that cannot
        be used.

    Examples
    --------
    >>> pa.directions.relevant(model, data, "features.16")["features.16"].shape
    torch.Size([128, 128])
    >>> found = pa.directions.relevant(model, data, "features.16", subspaces=3, dimensions=2)
    >>> found["features.16"].shape
    torch.Size([128, 6])
    """
    for name, number in (("dimensions", dimensions), ("sample", sample)):
        check_count(name, number)
    if subspaces is not None:
        check_count("subspaces", subspaces)
    check_seed(seed)
    size = batch_size or BATCH
    with undisturbed(model, device), torch.inference_mode(False):
        ready = opened(model, data, {"device": device, "axis": axis})
        check_class("target", target, ready.classes)
        ready.data.hold_if_read_once()
        found = select(ready.sites, layers)
        check_channels(found)
        check_blocks(found, subspaces or 1, dimensions if subspaces else 1)
        network = propagation_of(ready, found, size)
        held: dict[str, Products | Sample] = {
            site.name: Products(site.features) if subspaces is None else Sample(sample, seed)
            for site in found
        }
        parts = (batch.images for batch in ready.data.batches(size))
        for by_layer in contexts(network, parts, target):
            for name, rows in by_layer.items():
                held[name].add(rows)
    with torch.inference_mode(False), torch.enable_grad():
        return {
            name: one.axes()
            if isinstance(one, Products)
            else disentangled(cast(Rows, one.rows), subspaces or 1, dimensions, seed)
            for name, one in held.items()
        }


class _Moments:
    """Sums of a layer's units and of their products, shifted for precision."""

    def __init__(self, units: int) -> None:
        self.count = 0
        self.shift: Tensor | None = None
        self.sums = torch.zeros(units, dtype=torch.float64)
        self.products = torch.zeros(units, units, dtype=torch.float64)

    def add(self, maps: Tensor) -> None:
        """Take in ``[N, units, ...]``."""
        rows = maps.movedim(1, -1).flatten(0, -2).double().cpu()
        if self.shift is None:
            self.shift = rows.mean(dim=0)  # near the mean: nothing is lost in the difference
        rows = rows - self.shift
        self.count += len(rows)
        self.sums += rows.sum(dim=0)
        self.products += rows.t() @ rows

    def axes(self) -> Tensor:
        """Eigenvectors of the covariance, largest eigenvalue first."""
        mean = self.sums / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        vectors: Tensor = torch.linalg.eigh(covariance).eigenvectors
        return vectors.flip(1)


def _singular_vectors(graph: Graph, site: Site) -> Tensor:
    parts = []
    for link in readers(graph, site.name, site.axis):
        if bool((link.channel < -1).any()):
            raise ValueError(f"layers: weights read units of {site.name!r} mixed with one another")
        mine = (link.channel >= 0).nonzero().squeeze(1)
        order = mine[link.channel[mine].argsort(stable=True)]
        columns = columns_by_input(graph, link.node)[order]
        units, times = link.channel[order].unique(return_counts=True)
        if len(units) < site.features or bool((times != times[0]).any()):
            raise ValueError(f"layers: not all units of {site.name!r} are read alike")
        parts.append(columns.reshape(site.features, -1))
    if not parts:
        raise ValueError(f"layers: no constant weights read the units of {site.name!r}")
    vectors: Tensor = torch.linalg.svd(torch.cat(parts, dim=1), full_matrices=False).U
    return vectors
