"""Predicted changes of the logits: what gradients of the intact network say of every ablation.

For a direction v over the classes, the change of ``v . logits`` is to first order the scalar
product of its gradient at a tensor and the exact change of that tensor. One backward pass per
direction and image serves all units of all layers and all interventions, at the cost of about two
forward passes, whatever the number of units. A unit's change is known exactly, for all units at
once, as long as it stays on its channel (:mod:`pyablate.engine.channel_delta`): the gradient is
taken behind that, where the first operators mix channels.

Directions are y - k for the predicted class y and its nearest competitors k, and, where these are
not all classes, random signs: the mean square of their changes estimates that of the change of the
logits over the classes (Johnson and Lindenstrauss 1984; Achlioptas 2003).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx

from pyablate.data.dataset import Batch
from pyablate.engine.channel_delta import ChannelDelta
from pyablate.engine.clean import Clean
from pyablate.engine.job import Job
from pyablate.engine.replacements import Replacements
from pyablate.engine.score import Score, joined
from pyablate.engine.suffix import Suffix, needed
from pyablate.engine.sweep import Sweep
from pyablate.network.graph import CONVOLUTIONS, MARKER, Graph, Value, tensor
from pyablate.runtime.host_to_device import sent

FEW_CLASSES = 32
"""Classes up to which every other class is a direction: no more passes than :data:`COMPETITORS`
and :data:`RANDOM` together, and nothing is left to estimate."""

COMPETITORS = 8
RANDOM = 16

IMAGES = 64
"""Images of one backward pass, fewer where their activations are large."""


@dataclass(frozen=True, eq=False)
class Directions:
    """Directions over the classes, for some images.

    Attributes
    ----------
    prediction : Tensor
        int64 ``[N]``: the intact network's classes.
    competitors : Tensor
        int64 ``[N, M]``: other classes, nearest first.
    margins : Tensor
        ``[N, M]``: lead of the prediction over each of them, in logits.
    rest : Tensor
        ``[N]``: lead over the nearest class that is none of them; infinite where there is none.
    signs : Tensor
        ``[R, K]``: random signs less their mean; none where the competitors are all classes.
    """

    prediction: Tensor
    competitors: Tensor
    margins: Tensor
    rest: Tensor
    signs: Tensor

    @classmethod
    def of(cls, logits: Tensor, prediction: Tensor) -> Directions:
        """Choose directions for images with these logits ``[N, K]`` and predictions ``[N]``."""
        images, classes = logits.shape
        few = classes <= FEW_CLASSES
        count = classes - 1 if few else COMPETITORS
        chosen = prediction.long()
        others = logits.scatter(1, chosen.unsqueeze(1), -torch.inf)
        best = others.topk(min(count + 1, classes), dim=1)
        own = logits.gather(1, chosen.unsqueeze(1))
        margins = own - best.values
        rest = logits.new_full((images,), torch.inf) if few else margins[:, count]
        signs = logits.new_zeros(0, classes) if few else _signs(classes, logits)
        return cls(chosen, best.indices[:, :count], margins[:, :count], rest, signs)

    def __len__(self) -> int:
        return self.competitors.shape[1] + len(self.signs)

    def vectors(self) -> Iterable[Tensor]:
        """Give one ``[N, K]`` after the other."""
        images, classes = len(self.prediction), self.signs.shape[1]
        zeros = self.margins.new_zeros(images, classes)
        own = zeros.scatter(1, self.prediction.unsqueeze(1), 1.0)
        for number in range(self.competitors.shape[1]):
            yield own.scatter(1, self.competitors[:, number : number + 1], -1.0)
        for sign in self.signs:
            yield sign.expand(images, -1)

    def project(self, change: Tensor, image: Tensor) -> Tensor:
        """Take the changes ``[P, D]`` along the directions of logit changes ``[P, K]``."""
        own = change.gather(1, self.prediction[image].unsqueeze(1))
        margins = own - change.gather(1, self.competitors[image])
        return torch.cat([margins, change @ self.signs.t()], dim=1)

    def score(self, changes: Tensor, image: Tensor | None = None) -> Score:
        """Lowest margin that changes leave, and their size.

        Parameters
        ----------
        changes : Tensor
            ``[N, ..., D]``, or ``[P, D]`` with ``image``.
        image : Tensor, optional
            int64 ``[P]``: which image each row belongs to.
        """
        margins, rest = self.margins, self.rest
        if image is not None:
            margins, rest = margins[image], rest[image]
        between = [1] * (changes.ndim - 2)
        margins = margins.reshape(len(margins), *between, -1)
        count = margins.shape[-1]
        lowest = (margins + changes[..., :count]).amin(dim=-1)
        lowest = torch.minimum(lowest, rest.reshape(len(rest), *between))
        if len(self.signs):
            return Score(lowest, changes[..., count:].square().mean(dim=-1).sqrt())
        high, low = changes.amax(dim=-1).clamp(min=0), changes.amin(dim=-1).clamp(max=0)
        return Score(lowest, high - low)


def _signs(classes: int, like: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(classes)
    signs = torch.randint(0, 2, (RANDOM, classes), generator=draw).to(like) * 2 - 1
    return signs - signs.mean(dim=1, keepdim=True)


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
        found = (self.read(gradient) * self.values).sum(dim=2)
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
    memory : int
        Bytes that may be held.
    """

    graph: Graph
    suffixes: Mapping[Job, Suffix]
    replacements: Callable[[Batch, Job], Replacements]
    memory: int

    def scores(self, batch: Batch, clean: Clean) -> dict[Job, Score]:
        """Predict every pair of a batch; ``lowest`` and ``size`` are ``[N, row]``, on the CPU.

        Raises
        ------
        RuntimeError
            An operator of the network has no derivative.
        """
        found: dict[Job, list[Score]] = {job: [] for job in self.suffixes}
        for image in torch.arange(len(batch)).split(self._images):
            there = sent(image, clean.logits.device)
            directions = Directions.of(clean.logits[there], clean.prediction[there])
            for job, changes in self._changes(batch.take(image), directions).items():
                found[job].append(directions.score(changes))
        return {job: joined(parts) for job, parts in found.items()}

    def _changes(self, batch: Batch, directions: Directions) -> dict[Job, Tensor]:
        """Predicted changes of each job's pairs, ``[N, row, D]``."""
        tensors = self._run(batch.images)
        logits = tensor(tensors[self.graph.logits])
        with torch.no_grad():
            still = {node: _detached(value) for node, value in tensors.items()}
            clean = Clean(still, logits.detach(), directions.prediction.int(), directions.rest)
            parts = {
                job: self._parts(Sweep(suffix, clean, self.replacements(batch, job)))
                for job, suffix in self.suffixes.items()
            }
        inputs = {
            node: value
            for node in dict.fromkeys(node for some in parts.values() for node in some)
            if (value := tensor(tensors[node])).requires_grad
        }
        found: dict[Job, list[Tensor]] = {job: [] for job in parts}
        for vector in directions.vectors():
            gradients = _gradients(logits, inputs, vector)
            with torch.no_grad():
                for job, some in parts.items():
                    along = [some[node].along(gradients[node]) for node in some if node in inputs]
                    none = logits.new_zeros(len(batch), len(job.members))
                    found[job].append(sum(along, none))
        return {job: torch.stack(changes, dim=2) for job, changes in found.items()}

    def _run(self, images: Tensor) -> dict[fx.Node, Value]:
        """Run the intact network for backward passes, which end at the first site."""
        if images.ndim == 4 and any(n.target in CONVOLUTIONS for n in self.graph.graph.nodes):
            images = images.contiguous(memory_format=torch.channels_last)

        def begin(node: fx.Node, value: Value) -> None:
            if node.target is MARKER and isinstance(value, Tensor) and not value.requires_grad:
                value.requires_grad_()

        with torch.enable_grad():
            return self.graph.run(images.detach(), self._kept, begin)

    @cached_property
    def _kept(self) -> set[fx.Node]:
        suffixes = self.suffixes.values()
        behind = set().union(*(suffix.nodes for suffix in suffixes))
        channels = {node for node in behind if _may_be_read(node)}
        return {self.graph.logits, *channels, *needed(suffixes)}

    @cached_property
    def _images(self) -> int:
        """Images whose activations, gradients and changes of all layers fit."""
        total = sum(self.graph.elements(node) for node in self.graph.graph.nodes)
        return int(max(1, min(IMAGES, self.memory // 4 // (12 * max(total, 1)))))

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


def _flat(maps: Tensor) -> Tensor:
    return maps.reshape(*maps.shape[:2], -1)


def _may_be_read(node: fx.Node) -> bool:
    """Whether a node gives one tensor, at which a gradient can be taken."""
    return isinstance(node.meta.get("val"), Tensor)


def _detached(value: Value) -> Value:
    if isinstance(value, (list, tuple)):
        return [item.detach() for item in value]
    return value.detach()
