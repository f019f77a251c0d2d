"""One job on one image batch: the deltas of all units, for as long as each stays on its channel.

What the first operator that mixes channels makes of them is computed by slices of pairs (unit,
image), of those only whose unit the ablation changes at all on that image; see
:mod:`pyablate.engine.pair_slice`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, fx

from pyablate import ops
from pyablate.engine import channel_delta as channelwise
from pyablate.engine import constant_delta
from pyablate.engine.channel_delta import ChannelDelta
from pyablate.engine.clean import Clean
from pyablate.engine.constant_delta import ConstantDelta
from pyablate.engine.logit_change import FULL
from pyablate.engine.loss_margin import Record
from pyablate.engine.replacements import Replacements
from pyablate.engine.suffix import Suffix
from pyablate.network.graph import MARKER, Graph, Value, operands, tensor
from pyablate.network.sites import Site

aten = torch.ops.aten

FAINT = 2.0**-10
"""Largest change of a unit's maps below which float16 is not for them: below 2^-14 its numbers lose
digits, and an error that is large beside one unit's change may be in none of the measured pairs."""

Step = tuple[fx.Node, list[fx.Node], list[fx.Node]]
"""A node, what it reads, and what is then of no more use."""


@dataclass(eq=False)
class Sweep:
    """One job on one batch: the deltas that are still on their channels."""

    suffix: Suffix
    clean: Clean
    replacements: Replacements
    values: dict[fx.Node, ChannelDelta] = field(default_factory=dict)
    deferred: list[fx.Node] = field(default_factory=list)
    replaced: dict[fx.Node, ConstantDelta] = field(default_factory=dict)
    _lowered: dict[tuple[fx.Node, torch.dtype], ChannelDelta] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        """Return the network."""
        return self.suffix.graph

    @property
    def head(self) -> ChannelDelta | None:
        """Input of the final linear layer, if that is all that is left and units are alone."""
        head = self.graph.logits
        linear = head.target is aten.linear.default and self.graph.constant(head, 1) is not None
        if not (self.suffix.job.single and self.deferred == [head] and linear):
            return None
        source, *others = operands(head)
        if any(self.changes(other) for other in others):
            return None
        delta = self.value(source)
        fits = delta is not None and delta.values.ndim == 2 and delta.axis == 1
        return delta if fits else None

    def advance(self) -> None:
        """Carry deltas as far as they stay on their channels; the rest is deferred."""
        if not self.suffix.nodes:
            return
        start, *rest = self.suffix.nodes
        if constant_delta.possible(self.suffix.job):
            self.replaced[start] = self._constant(start)
        else:
            self.values[start] = self._difference(start)
        waiting: set[fx.Node] = set()
        for node in rest:
            delta: ChannelDelta | ConstantDelta | None = None
            blocked = any(source in waiting for source in node.all_input_nodes)
            if not blocked and not self.ablates(node):
                delta = constant_delta.advance(self.replaced, node) or channelwise.advance(
                    self, node
                )
            if isinstance(delta, ConstantDelta):
                self.replaced[node] = delta
            elif isinstance(delta, ChannelDelta):
                self.values[node] = delta
            else:
                waiting.add(node)
                self.deferred.append(node)

    def ablates(self, node: fx.Node) -> bool:
        """Whether the job acts at this node."""
        if node.target is not MARKER:
            return False
        return any(node.args[1] == site.name for site in self.suffix.job.sites)

    def value(self, node: fx.Node) -> ChannelDelta | None:
        """Return the delta of a node, if it is on its channel and changed."""
        if node not in self.values and node in self.replaced:
            self.values[node] = self.replaced[node].change(self.base(node))
        return self.values.get(node)

    def changes(self, node: fx.Node) -> bool:
        """Whether a node has a delta that is on its channel."""
        return node in self.values or node in self.replaced

    def base(self, node: fx.Node) -> Tensor:
        """Return a tensor of the clean run."""
        return tensor(self.clean.tensors[node])

    def _difference(self, marker: fx.Node) -> ChannelDelta:
        """Take replacement minus activation, for every unit of the job and image of the batch."""
        site, unit = self.suffix.job.sites[0], self._units
        base = self.base(marker)
        image = torch.arange(base.shape[0], device=base.device).unsqueeze(1)
        value = self._replacements(marker, image).to(base.dtype)
        whole = self.suffix.job.whole
        held = ChannelDelta(value, site.axis, unit, site.features, whole=whole)
        return held.with_values(value - held.of(base))

    def _constant(self, marker: fx.Node) -> ConstantDelta:
        """Take the numbers that replace the units."""
        site, base = self.suffix.job.sites[0], self.base(marker)
        images = base.shape[0] if self.suffix.job.intervention.kind == "class_mean" else 1
        image = torch.arange(images, device=base.device).unsqueeze(1)
        value = self._replacements(marker, image).to(base.dtype)
        whole = self.suffix.job.whole
        return ConstantDelta(value.flatten(1), site.axis, self._units, site.features, whole=whole)

    @property
    def _units(self) -> Tensor:
        return self.suffix.job.on(self.clean.logits.device).units

    def _replacements(self, marker: fx.Node, image: Tensor) -> Tensor:
        return self.replacements.values(*self.at(marker), image, self._units.unsqueeze(0))

    def closed_form(self) -> tuple[Tensor, Tensor, Tensor]:
        """All pairs by the closed form: logits + delta * weight column."""
        head, delta = self.graph.logits, self.head
        weight = self.graph.constant(head, 1)
        assert delta is not None
        assert weight is not None
        clean = self.clean
        reach = delta.values.abs().amax(dim=1) * weight.abs().max()
        prediction = ops.head_flips(
            clean.logits,
            delta.values,
            self.suffix.columns(weight, delta.channel),
            clean.prediction,
            (clean.tolerance + FULL * reach).nan_to_num(torch.inf),
        )
        differs = prediction != clean.prediction.unsqueeze(1)
        image, row = differs.nonzero(as_tuple=True)
        row, image, new = torch.stack([row, image, prediction[image, row].long()]).cpu()
        return row, image, new.to(torch.int32)

    def record_closed_form(self, record: Record, size: int) -> None:
        """Spell out the logit changes of the closed form, ``size`` pairs at a time."""
        delta, weight = self.head, self.graph.constant(self.graph.logits, 1)
        assert delta is not None
        assert weight is not None
        columns = self.suffix.columns(weight, delta.channel).t()
        image, row = delta.values.nonzero(as_tuple=True)
        for images, rows in zip(image.split(size), row.split(size), strict=True):
            record(rows, images, delta.values[images, rows].unsqueeze(1) * columns[rows])

    def live_pairs(self) -> tuple[Tensor, Tensor]:
        """Pairs (row, image), image by image, without those that the ablation does not change.

        On the CPU, where all else that has to be known of a block follows from them.
        """
        job = self.suffix.job
        alive = torch.ones(len(self.clean.logits), len(job.members), dtype=torch.bool)
        if self.graph.logits not in self.suffix.nodes:
            alive.fill_(False)
        elif job.channelwise:
            alive = self._alive().cpu()
        image, row = alive.nonzero(as_tuple=True)
        return row, image

    def live_share(self) -> float:
        """Share of all pairs that are among these."""
        pairs = len(self.clean.logits) * len(self.suffix.job.members)
        return len(self.live_pairs()[0]) / pairs

    def _alive(self) -> Tensor:
        """Bool ``[N, row]``: whether anything that the rest of the network reads has changed."""
        deltas = [self.value(node) for node in self._read]
        later = [node for node in self.deferred if self.ablates(node)]
        maps = [delta.values for delta in deltas if delta is not None]
        maps += [self._difference(node).values for node in later]
        alive = torch.stack([_any_position(values) for values in maps]).any(dim=0)
        return self._rows_with(alive)

    def _rows_with(self, units: Tensor) -> Tensor:
        """Bool ``[N, row]``: whether any unit of a row is among these, bool ``[N, U]``."""
        if self.suffix.job.single:
            return units
        belongs = self.suffix.job.on(units.device).columns.mask
        return units.float() @ belongs.t().float() > 0

    @cached_property
    def faint(self) -> Tensor | None:
        """Bool ``[N, row]``: whether float16 has few digits for all that changes; None: unknown."""
        deltas = [self.value(node) for node in self._read] if self.suffix.job.channelwise else []
        sizes = [_largest(delta.values) for delta in deltas if delta is not None]
        if not sizes:
            return None
        size = torch.stack(sizes).amax(dim=0)
        return self._rows_with((size > 0) & (size < FAINT)) & ~self._rows_with(size >= FAINT)

    @property
    def _read(self) -> list[fx.Node]:
        """Changed tensors that the rest of the network reads, or that are its logits."""
        read = {source for node in self.deferred for source in node.all_input_nodes}
        read.add(self.graph.logits)
        return [node for node in self.suffix.nodes if node in read and self.changes(node)]

    def frontier(self) -> dict[fx.Node, ChannelDelta] | None:
        """Deltas of the tensors that the rest of the network reads.

        None where they do not tell apart what comes by each of them: one follows from another, or
        the units are ablated again behind them.
        """
        if any(self.ablates(node) for node in self.deferred):
            return None
        front = {node: self.value(node) for node in self._read}
        behind: set[fx.Node] = set()
        for node in self.suffix.nodes:
            if any(source in front or source in behind for source in node.all_input_nodes):
                if node in front:
                    return None
                if self.changes(node):
                    behind.add(node)
        return {node: delta for node, delta in front.items() if delta is not None}

    @property
    def sites(self) -> list[fx.Node]:
        """Where the job acts, in order."""
        return [node for node in self.suffix.nodes if self.ablates(node)]

    def at(self, marker: fx.Node) -> tuple[Site, int]:
        """Site and call of a marker."""
        site = next(site for site in self.suffix.job.sites if site.name == marker.args[1])
        call = marker.args[2]
        assert isinstance(call, int)
        return site, call

    def recompute(self, row: Tensor, image: Tensor) -> Tensor:
        """Logits ``[P, K]`` of some pairs, all values computed anew behind the site.

        Every operator sees the perturbed tensors themselves, in the precision of the clean run, so
        that what is equal, infinite or NaN in a plain forward pass is so here.
        """
        values: dict[fx.Node, Value] = {}

        def value(node: fx.Node) -> Value:
            if node not in values:
                return self.graph.pick(node, self.clean.tensors[node], image)
            return values[node]

        for node, sources, last in self._steps_of(self.suffix.nodes):
            if self.ablates(node):
                reached = sources[0] in values  # by the ablation at an earlier site
                before = value(sources[0] if reached else node)
                values[node] = self.ablated(node, tensor(before), row, image)
            else:
                values[node] = self.graph.evaluate(node, value, len(row))
            for source in last:
                values.pop(source, None)
        return tensor(values[self.graph.logits])

    def ablated(self, marker: fx.Node, values: Tensor, row: Tensor, image: Tensor) -> Tensor:
        """Replace the units of some pairs in a site's tensor ``[P, ...]``."""
        job = self.suffix.job
        site, call = self.at(marker)

        def replacement(pair: Tensor, unit: Tensor) -> Tensor:
            return self.replacements.values(site, call, image[pair], unit)

        return job.change(site, values, row, replacement)

    @cached_property
    def steps(self) -> list[Step]:
        """Nodes of the dense part, what each of them reads, and what is then of no more use."""
        return self._steps_of(self.deferred if self.suffix.job.channelwise else self.suffix.nodes)

    def _steps_of(self, nodes: Sequence[fx.Node]) -> list[Step]:
        steps = []
        later = {self.graph.logits}
        for node in reversed(nodes):
            sources = node.all_input_nodes
            steps.append((node, sources, [source for source in sources if source not in later]))
            later.update(sources)
        return steps[::-1]

    def lowered(self, node: fx.Node, dtype: torch.dtype) -> ChannelDelta:
        """Return a channelwise delta in another precision, converted once per batch."""
        delta = self.value(node)
        assert delta is not None
        if delta.values.dtype == dtype:
            return delta
        if (node, dtype) not in self._lowered:
            self._lowered[node, dtype] = delta.with_values(delta.values.to(dtype))
        return self._lowered[node, dtype]


def _largest(maps: Tensor) -> Tensor:
    """Largest magnitude in each map ``[N, U, *rest]``, ``[N, U]``."""
    sizes = maps.abs()
    return sizes.amax(dim=tuple(range(2, maps.ndim))) if maps.ndim > 2 else sizes


def _any_position(maps: Tensor) -> Tensor:
    """Whether any entry of each map ``[N, U, *rest]`` is not 0, bool ``[N, U]``."""
    return maps.any(dim=tuple(range(2, maps.ndim))) if maps.ndim > 2 else maps != 0
