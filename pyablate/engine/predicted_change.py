"""Predicted changes of the logits: what gradients of the intact network say of every ablation.

For a direction v over the classes, the change of ``v . logits`` is to first order the scalar
product of its gradient at a tensor and the exact change of that tensor. One backward pass per
direction and image serves all units of all layers and all interventions, at the cost of about two
forward passes, whatever the number of units. A unit's change is known exactly, for all units at
once, as long as it stays on its channel (:mod:`pyablate.engine.channel_delta`): the gradient is
taken behind that, where the first operators mix channels.

Directions are y - k for the predicted class y and its nearest competitors k, and, where these are
not all classes, random signs: the mean square of their changes estimates that of the change of the
logits over the classes (Johnson and Lindenstrauss 1984; Achlioptas 2003). What fewer directions
would have predicted follows from the same gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, fx

from pyablate.data.dataset import Batch
from pyablate.engine.channel_delta import ChannelDelta
from pyablate.engine.clean import Clean
from pyablate.engine.clean_run import laid_out
from pyablate.engine.job import Job
from pyablate.engine.replacements import Replacements
from pyablate.engine.score import DirectionCount, Directions, Prediction, Score, joined
from pyablate.engine.suffix import Suffix, needed
from pyablate.engine.sweep import Sweep
from pyablate.network.graph import MARKER, Graph, Value, tensor
from pyablate.runtime.host_to_device import sent

IMAGES = 64
"""Images of one backward pass, fewer where their activations are large."""


@dataclass(frozen=True, eq=False)
class _Part:
    """Change of one tensor, from which a job's effect is predicted.

    Attributes
    ----------
    values : Tensor
        ``[N, columns, positions]``.
    read : callable
        Lays out a gradient ``[N, ...]`` as the values are.
    belongs : Tensor or None
        Bool ``[row, columns]``: whose change each column is part of; None if each row has its own.
    """

    values: Tensor
    read: Callable[[Tensor], Tensor]
    belongs: Tensor | None = None

    def along(self, gradient: Tensor) -> Tensor:
        """Change ``[N, row]`` along the direction of a gradient."""
        return self._by_row((self.read(gradient) * self.values).sum(dim=2))

    def squares(self) -> Tensor:
        """Sum ``[N, row]`` of the squares of the change."""
        return self._by_row(self.values.square().sum(dim=2))

    def _by_row(self, found: Tensor) -> Tensor:
        return found if self.belongs is None else found @ self.belongs.t().to(found.dtype)


_Parts = Mapping[fx.Node, _Part]


@dataclass(eq=False)
class Predictor:
    """Predicts what jobs do, batch after batch.

    Attributes
    ----------
    graph : Graph
        The network.
    suffixes : mapping
        What lies behind the sites of each job that is predicted.
    replacements : callable
        ``replacements(batch, job)``.
    places : sequence of fx.Node
        Narrow places where changes are looked at again.
    memory : int
        Bytes that may be held.
    choices : sequence of DirectionCount
        Gradients are taken along the directions of the first, of which the others are parts; there
        is a score for each.
    rivals : bool
        Whether to tell the likeliest other class of each pair besides.
    """

    graph: Graph
    suffixes: Mapping[Job, Suffix]
    replacements: Callable[[Batch, Job], Replacements]
    places: Sequence[fx.Node]
    memory: int
    choices: Sequence[DirectionCount]
    rivals: bool = False

    def predict(self, batch: Batch, clean: Clean) -> Prediction:
        """Predict every pair of a batch.

        Raises
        ------
        RuntimeError
            An operator of the network has no derivative.
        """
        whole = Directions.of(clean.logits, clean.prediction, self.choices[0])
        scores: dict[Job, list[list[Score]]] = {job: [] for job in self.suffixes}
        gradients: dict[fx.Node, list[Tensor]] = {place: [] for place in self.places}
        for image in torch.arange(len(batch)).split(self._images):
            some = whole.take(sent(image, clean.logits.device))
            changes, there = self._changes(batch.take(image), some)
            for job, (change, norm) in changes.items():
                known = some.scores(change, norm, self.choices)
                if self.rivals:
                    known = [replace(score, rival=some.rivals(change)) for score in known]
                scores[job].append(known)
            for place, gradient in there.items():
                gradients[place].append(gradient)
        return Prediction(
            self.choices,
            {job: [*map(joined, zip(*parts, strict=True))] for job, parts in scores.items()},
            whole,
            {place: torch.cat(parts) for place, parts in gradients.items()},
        )

    def _changes(
        self, batch: Batch, along: Directions
    ) -> tuple[dict[Job, tuple[Tensor, Tensor]], dict[fx.Node, Tensor]]:
        """Predict each job's changes ``[N, row, D]``; norms ``[N, row]``; gradients at places."""
        tensors = self._run(batch.images)
        logits = tensor(tensors[self.graph.logits])
        with torch.no_grad():
            still = {node: _detached(value) for node, value in tensors.items()}
            clean = Clean(still, logits.detach(), along.prediction.int(), along.rest)
            parts = {
                job: self._parts(Sweep(suffix, clean, self.replacements(batch, job)))
                for job, suffix in self.suffixes.items()
            }
            none = {job: logits.new_zeros(len(batch), len(job.members)) for job in parts}
            squares = {
                job: sum((part.squares() for part in some.values()), none[job])
                for job, some in parts.items()
            }
        nodes = dict.fromkeys([*self.places, *(node for some in parts.values() for node in some)])
        inputs = {node: value for node in nodes if (value := tensor(tensors[node])).requires_grad}
        found: dict[Job, list[Tensor]] = {job: [] for job in parts}
        there: dict[fx.Node, list[Tensor]] = {place: [] for place in self.places}
        for vector in along.vectors():
            gradients = _gradients(logits, inputs, vector)
            with torch.no_grad():
                for job, some in parts.items():
                    changes = [some[node].along(gradients[node]) for node in some if node in inputs]
                    found[job].append(sum(changes, none[job]))
                for place in self.places:
                    known = gradients.get(place)  # None where nothing is passed back
                    at = torch.zeros_like(tensor(tensors[place])) if known is None else known
                    there[place].append(at.flatten(1))
        along_all = {job: torch.stack(own, dim=2) for job, own in found.items()}
        scored = {job: (own, squares[job].sqrt()) for job, own in along_all.items()}
        return scored, {place: torch.stack(own, dim=1) for place, own in there.items()}

    def _run(self, images: Tensor) -> dict[fx.Node, Value]:
        """Run the intact network for backward passes, which end at the first site."""
        images = laid_out(self.graph, images)

        def begin(node: fx.Node, value: Value) -> None:
            if node.target is MARKER and isinstance(value, Tensor) and not value.requires_grad:
                value.requires_grad_()

        with torch.inference_mode(False), torch.enable_grad():  # a caller may be in that mode
            return self.graph.run(_plain(images), self._kept, begin)

    @cached_property
    def _kept(self) -> set[fx.Node]:
        # All of them: the backward passes hold nearly as many, and to keep only those at which
        # gradients are taken saved no memory that could be measured.
        suffixes = self.suffixes.values()
        behind = set().union(*(suffix.nodes for suffix in suffixes))
        channels = {node for node in behind if _may_be_read(node)}
        return {self.graph.logits, *channels, *needed(suffixes)}

    @cached_property
    def _images(self) -> int:
        """Images whose activations, gradients and changes of all layers fit."""
        activations = sum(self.graph.elements(node) for node in self.graph.graph.nodes)
        places = sum(self.graph.elements(place) for place in self.places)
        each = 12 * (activations + self.choices[0].total * places)
        return int(max(1, min(IMAGES, self.memory // 4 // max(each, 1))))

    def _parts(self, sweep: Sweep) -> _Parts:
        job = sweep.suffix.job
        if job.intervention.kind == "direction":
            return {node: _projected(sweep, node) for node in sweep.sites}
        if job.channelwise:
            sweep.advance()
            front = sweep.frontier()
            if front is not None:
                belongs = None if job.single else job.on(sweep.clean.logits.device).columns.mask
                return {node: _on_channels(delta, belongs) for node, delta in front.items()}
        return {node: _replaced(sweep, node) for node in sweep.sites}


def _gradients(
    logits: Tensor, inputs: Mapping[fx.Node, Tensor], vector: Tensor
) -> dict[fx.Node, Tensor]:
    """Gradients of ``vector . logits`` at some tensors."""
    if not inputs or not logits.requires_grad:
        return {node: torch.zeros_like(value) for node, value in inputs.items()}
    found = torch.autograd.grad(
        logits,
        list(inputs.values()),
        vector.to(logits.dtype),
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(inputs, found, strict=True))


def _on_channels(delta: ChannelDelta, belongs: Tensor | None) -> _Part:
    """Take a change that is still on its channel."""
    return _Part(_flat(delta.values), lambda gradient: _flat(delta.of(gradient)), belongs)


def _replaced(sweep: Sweep, marker: fx.Node) -> _Part:
    """Take replacement minus activation at a site, of all units that any row has there."""
    job, device = sweep.suffix.job, sweep.clean.logits.device
    site, call = sweep.at(marker)
    mask = job.masks[site.name]
    unit = sent(mask.any(dim=0).nonzero().squeeze(1), device)
    base = sweep.base(marker)
    image = torch.arange(len(base), device=device).unsqueeze(1)
    value = sweep.replacements.values(site, call, image, unit.unsqueeze(0)).to(base.dtype)
    held = ChannelDelta(value, site.axis, unit, site.features)
    return _on_channels(held.with_values(value - held.of(base)), sent(mask, device)[:, unit])


def _projected(sweep: Sweep, marker: fx.Node) -> _Part:
    """Take what is removed along each direction across the units: -(a . q) q."""
    site, _ = sweep.at(marker)
    base = sweep.base(marker)
    axes = sweep.suffix.job.on(base.device).axes(site, base.dtype)

    def along(values: Tensor) -> Tensor:
        last = values.movedim(site.axis, -1)
        return (last.reshape(len(last), -1, last.shape[-1]) @ axes.t()).transpose(1, 2)

    return _Part(-along(base), along)


def _plain(images: Tensor) -> Tensor:
    """Give images that an operator may keep for a backward pass."""
    return images.clone() if images.is_inference() else images.detach()


def _flat(maps: Tensor) -> Tensor:
    return maps.reshape(*maps.shape[:2], -1)


def _may_be_read(node: fx.Node) -> bool:
    """Whether a node gives one tensor, at which a gradient can be taken."""
    return isinstance(node.meta.get("val"), Tensor)


def _detached(value: Value) -> Value:
    if isinstance(value, (list, tuple)):
        return [item.detach() for item in value]
    return value.detach()
