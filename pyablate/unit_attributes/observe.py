"""One pass over the data with hooks: moments and gradients of the maps, for the attributes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from pyablate.data.dataset import Batch, Data
from pyablate.network.forward import forward
from pyablate.network.sites import Site, hooked
from pyablate.ops.moments import MapMoments, map_moments
from pyablate.runtime.allocator import keep_freed_blocks
from pyablate.unit_attributes.gradients import by_class, contributions, fisher, taylor


@dataclass(eq=False)
class Observed:
    """What the units of one layer did on all images; everything in host memory.

    Attributes
    ----------
    site : Site
        The layer.
    maps : MapMoments
        Of all images.
    positions : int
        Positions of one map.
    taylor, fisher : Tensor
        float64 ``[C, K]``, sums over the images of each class; zeros where no gradients were asked
        for.
    """

    site: Site
    maps: MapMoments
    positions: int
    taylor: Tensor
    fisher: Tensor


@dataclass(eq=False)
class Observations:
    """The whole pass.

    Attributes
    ----------
    layers : list of Observed
        In the order of the sites.
    labels : Tensor
        int64 ``[N]``.
    count : Tensor
        int64 ``[K]``, images of each class.
    probabilities : Tensor
        ``[N, K]``, predicted.
    """

    layers: list[Observed]
    labels: Tensor
    count: Tensor
    probabilities: Tensor


def observe(
    model: nn.Module,
    data: Data,
    sites: Sequence[Site],
    *,
    repeated: frozenset[str] = frozenset(),
    classes: int,
    batch_size: int,
    gradients: bool = False,
    report: Callable[[int], None] = lambda done: None,
) -> Observations:
    """Run the network, in evaluation mode, once over the data and watch the sites.

    Sites in ``repeated`` have a module that is called several times in a pass: the positions of all
    its calls are taken together. With ``gradients`` the pass goes backward as well; ``report`` gets
    the number of images done.
    """
    keep_freed_blocks()
    watched = _Watch(sites, repeated, len(data), classes, gradients)
    labels, probabilities = [], []
    for batch in data.batches(batch_size):
        logits = watched.run(model, batch)
        labels.append(batch.labels.cpu())
        probabilities.append(logits.detach().softmax(dim=1).cpu())
        report(watched.done)
    every = torch.cat(labels)
    count = torch.bincount(every, minlength=classes)
    return Observations(
        [watched.layers[site.name] for site in sites], every, count, torch.cat(probabilities)
    )


@dataclass(eq=False)
class _Watch:
    """Hooks that reduce each map while it is at hand."""

    sites: Sequence[Site]
    repeated: frozenset[str]
    images: int
    classes: int
    gradients: bool
    done: int = 0
    layers: dict[str, Observed] = field(default_factory=dict)
    held: dict[str, list[Tensor]] = field(default_factory=dict)  # maps that are needed later
    batch: Batch | None = None

    def run(self, model: nn.Module, batch: Batch) -> Tensor:
        """Forward, and backward where gradients are asked for; logits ``[N, K]``."""
        self.batch, self.held = batch, {}
        with torch.set_grad_enabled(self.gradients), hooked(model, self.sites, self._see):
            logits: Tensor = forward(model, batch.images)
            for name in self.repeated:
                calls = [_flat(maps, self._site(name)) for maps in self.held[name]]
                self._reduce(replace(self._site(name), axis=1), torch.cat(calls, dim=2))
            if self.gradients:
                self._backward(logits, batch)
        self.done += len(batch)
        return logits

    def _see(self, site: Site, _call: int, output: Tensor) -> Tensor:
        if site.name not in self.repeated:
            self._reduce(site, output)
        elif not self.gradients:
            # Calls are taken together at the end; an operation in place may follow.
            self.held.setdefault(site.name, []).append(output.clone())
        if not self.gradients:
            return output
        if not output.requires_grad:  # as nothing in front of it does
            output = output.detach().requires_grad_()
        self.held.setdefault(site.name, []).append(output)
        return output.clone()

    def _reduce(self, site: Site, maps: Tensor) -> None:
        batch = cast(Batch, self.batch)
        maps = maps.detach()[: len(batch)]
        layer = self.layers.get(site.name)
        if layer is None:
            layer = self.layers[site.name] = self._empty(self._site(site.name), maps)
        own = layer.maps.part(self.done, len(batch))
        if maps.device.type == "cpu":
            map_moments(maps, own, axis=site.axis)
            return
        there = MapMoments.empty(site.channels, len(batch), maps.dtype, maps.device)
        map_moments(maps, there, axis=site.axis)
        own.pooled.copy_(there.pooled)
        own.active.copy_(there.active)
        torch.minimum(own.least, there.least.cpu(), out=own.least)
        own.positive.add_(there.positive.cpu())

    def _backward(self, logits: Tensor, batch: Batch) -> None:
        maps = {self._site(name): calls for name, calls in self.held.items()}
        for site, per_image in contributions(logits, batch.labels, maps).items():
            layer = self.layers[site.name]
            labels = batch.labels.to(per_image.device)
            layer.taylor += by_class(taylor(per_image, layer.positions), labels, self.classes).cpu()
            layer.fisher += by_class(fisher(per_image), labels, self.classes).cpu()

    def _site(self, name: str) -> Site:
        return next(site for site in self.sites if site.name == name)

    def _empty(self, site: Site, maps: Tensor) -> Observed:
        return Observed(
            site=site,
            maps=MapMoments.empty(site.channels, self.images, maps.dtype),
            positions=maps[0].numel() // site.channels,
            taylor=torch.zeros(site.channels, self.classes, dtype=torch.float64),
            fisher=torch.zeros(site.channels, self.classes, dtype=torch.float64),
        )


def _flat(maps: Tensor, site: Site) -> Tensor:
    """Units first, all positions behind: ``[N, C, positions]``."""
    moved = maps.movedim(site.axis, 1)
    return moved.flatten(2) if moved.ndim > 2 else moved.unsqueeze(2)
