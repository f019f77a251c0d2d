"""The part of the network after a site, run on differences from the clean run.

Two phases per image batch. First all units of the job at once, for as long as each delta stays
on its channel. Then slices of pairs (unit, image): only those whose unit the ablation changes at
all on that image, spelt out by the first operator that mixes channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from pyablate import ops
from pyablate.engine import channel_delta as channelwise
from pyablate.engine import constant_delta, cuda_graph, rules
from pyablate.engine.channel_delta import Channel
from pyablate.engine.constant_delta import Replaced
from pyablate.engine.cuda_graph import Repeated
from pyablate.engine.job import Job, StandIns
from pyablate.engine.lazy_delta import Pending
from pyablate.engine.loss_margin import Record
from pyablate.engine.precision_cascade import FULL, Changed, Ladder, Truth, carried
from pyablate.engine.rounding import Rounding
from pyablate.network.graph import MARKER, BatchLayout, Graph, operands
from pyablate.ops.quantized import Codes

aten = torch.ops.aten


@dataclass(frozen=True)
class Clean:
    """The clean run of one image batch.

    Attributes
    ----------
    tensors : mapping
        The tensors that the suffixes read.
    logits : Tensor
        ``[N, K]``.
    prediction : Tensor
        int32 ``[N]``, exact.
    tolerance : Tensor
        ``[N]``: top-2 margins up to this are not trusted.
    rounding : Rounding
        What the tolerance rests on.
    watched : Tensor
        int64, on the CPU: positions of the images on which errors are measured first.
    irregular : frozenset of fx.Node
        Nodes whose tensors hold NaN or infinity, of which there are no differences.
    """

    tensors: Mapping[fx.Node, Any]
    logits: Tensor
    prediction: Tensor
    tolerance: Tensor
    rounding: Rounding = field(default_factory=Rounding)
    watched: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    irregular: frozenset[fx.Node] = frozenset()

    @cached_property
    def predicted(self) -> Tensor:
        """``prediction`` on the CPU."""
        return self.prediction.cpu()


@dataclass(frozen=True, eq=False)
class Suffix:
    """What lies between a job's sites and the logits.

    Attributes
    ----------
    graph : Graph
        The network.
    job : Job
        The ablations.
    nodes : list of fx.Node
        Nodes that the ablations can change, in order.
    """

    graph: Graph
    job: Job
    nodes: list[fx.Node]

    @classmethod
    def of(cls, graph: Graph, job: Job) -> Suffix:
        """Cut the network behind a job's sites."""
        names = {site.name for site in job.sites}
        return cls(graph, job, graph.after([m for m in graph.markers if m.args[1] in names]))

    @cached_property
    def reads(self) -> set[fx.Node]:
        """Tensors of the clean run that the rules read."""
        changed = set(self.nodes)
        needed: set[fx.Node] = set()
        for node in self.nodes:
            still = [s for s in node.all_input_nodes if s not in changed]
            needed.update(s for s in still if s not in self.graph.constants)
            if node.target is MARKER:
                needed.add(node)
            elif rules.reads_base(self.graph, node):
                needed.update([node, *node.all_input_nodes])
        needed |= constant_delta.reaches(self.job, self.nodes)
        return {
            node
            for node in needed
            if node not in self.graph.constants and self.graph.size(node, 1) is None
        }

    def predict(
        self,
        clean: Clean,
        standins: StandIns,
        ladder: Ladder,
        *,
        slice_bytes: int,
        record: Record | None = None,
        truth: Truth | None = None,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Predictions of every (ablation, image) that can differ from the clean run's.

        All that changes the logits is told to ``record``, if there is one. The device is waited
        for where pairs are counted: those that are live, those whose prediction changed. What
        lies between is launched without a look at what came out.

        Yields
        ------
        row, image, prediction : Tensor
            int64, int64 and int32 ``[P]``, on the CPU: position in the job, position in the batch,
            class or -1 where it is too close to call in this precision.
        """
        if self.graph.logits not in self.nodes:
            return
        sweep = Sweep(self, clean, standins)
        if self.job.channelwise:
            sweep.advance()
            if isinstance(sweep.head, Channel):
                ladder.strategy = "closed form"
                if record is not None:
                    sweep.record_closed_form(record, self.pairs_in(slice_bytes)(torch.float64))
                yield sweep.closed_form()
                return
        row, image = sweep.live_pairs()
        if len(row):
            recorder = cuda_graph.recorder(clean.logits.device)
            change = sweep.change if recorder is None else Repeated(sweep.change, recorder)
            size = self.pairs_in(slice_bytes)
            yield (
                row,
                image,
                ladder.settle(
                    change, row, image, clean, size, record, truth, watched=clean.watched
                ),
            )

    def pairs_in(self, slice_bytes: int) -> Callable[[torch.dtype], int]:
        """As many pairs as let the widest tensor fit, by precision."""
        return lambda dtype: usual(max(1, slice_bytes // (self.widest * carried(dtype).itemsize)))

    def columns(self, weight: Tensor, channel: Tensor) -> Tensor:
        """Columns ``[K, U]`` of the last layer that the units reach, laid out by unit once."""
        if weight.dtype not in self._columns:
            self._columns[weight.dtype] = weight.t().index_select(0, channel).contiguous()
        return self._columns[weight.dtype].t()

    @cached_property
    def _columns(self) -> dict[torch.dtype, Tensor]:
        return {}

    @cached_property
    def widest(self) -> int:
        """Largest number of elements that one pair needs in one tensor of the suffix."""
        return max((self.graph.elements(node) for node in self.nodes), default=1)


@dataclass(eq=False)
class Sweep:
    """One job on one batch: the deltas that are still on their channels."""

    suffix: Suffix
    clean: Clean
    standins: StandIns
    values: dict[fx.Node, Channel] = field(default_factory=dict)
    deferred: list[fx.Node] = field(default_factory=list)
    replaced: dict[fx.Node, Replaced] = field(default_factory=dict)
    _lowered: dict[tuple[fx.Node, torch.dtype], Channel] = field(default_factory=dict)

    @property
    def graph(self) -> Graph:
        """Return the network."""
        return self.suffix.graph

    @property
    def head(self) -> Channel | None:
        """Input of the final linear layer, if that is all that is left and units are alone."""
        head = self.graph.logits
        if (
            not self.suffix.job.single
            or self.deferred != [head]
            or head.target is not aten.linear.default
        ):
            return None
        if self.graph.constant(head, 1) is None:
            return None
        source, *others = operands(head)
        if any(self.changes(other) for other in others):
            return None
        delta = self.value(source)
        fits = isinstance(delta, Channel) and delta.values.ndim == 2 and delta.axis == 1
        return delta if fits else None

    def advance(self) -> None:
        """Carry deltas as far as they stay on their channels; the rest is deferred."""
        if not self.suffix.nodes:
            return
        start, *rest = self.suffix.nodes
        if constant_delta.possible(self.suffix.job):
            self.replaced[start] = self._replacement(start)
        else:
            self.values[start] = self._difference(start)
        waiting: set[fx.Node] = set()
        for node in rest:
            delta: Channel | Replaced | None = None
            blocked = any(source in waiting for source in node.all_input_nodes)
            if not blocked and not self.ablates(node):
                delta = constant_delta.advance(self.replaced, node) or channelwise.advance(
                    self, node
                )
            if isinstance(delta, Replaced):
                self.replaced[node] = delta
            elif isinstance(delta, Channel):
                self.values[node] = delta
            else:
                waiting.add(node)
                self.deferred.append(node)

    def ablates(self, node: fx.Node) -> bool:
        """Whether the job acts at this node."""
        if node.target is not MARKER:
            return False
        return any(node.args[1] == site.name for site in self.suffix.job.sites)

    def value(self, node: fx.Node) -> Channel | None:
        """Return the delta of a node, if it is on its channel and changed."""
        if node not in self.values and node in self.replaced:
            self.values[node] = self.replaced[node].change(self.base(node))
        return self.values.get(node)

    def changes(self, node: fx.Node) -> bool:
        """Whether a node has a delta that is on its channel."""
        return node in self.values or node in self.replaced

    def base(self, node: fx.Node) -> Tensor:
        """Return a tensor of the clean run."""
        tensor: Tensor = self.clean.tensors[node]
        return tensor

    def _difference(self, marker: fx.Node) -> Channel:
        """Take replacement minus activation, for every unit of the job and image of the batch."""
        site, unit = self.suffix.job.sites[0], self._units
        base = self.base(marker)
        image = torch.arange(base.shape[0], device=base.device).unsqueeze(1)
        value = self._standins(marker, image).to(base.dtype)
        whole = self.suffix.job.whole
        held = Channel(value, site.axis, unit, site.channels, whole=whole)
        return held.with_values(value - held.of(base))

    def _replacement(self, marker: fx.Node) -> Replaced:
        """Take the numbers that stand in for the units."""
        site, base = self.suffix.job.sites[0], self.base(marker)
        images = base.shape[0] if self.suffix.job.intervention.kind == "class_mean" else 1
        image = torch.arange(images, device=base.device).unsqueeze(1)
        value = self._standins(marker, image).to(base.dtype)
        whole = self.suffix.job.whole
        return Replaced(value.flatten(1), site.axis, self._units, site.channels, whole=whole)

    @property
    def _units(self) -> Tensor:
        return self.suffix.job.on(self.clean.logits.device).units

    def _standins(self, marker: fx.Node, image: Tensor) -> Tensor:
        call = marker.args[2]
        assert isinstance(call, int)
        return self.standins.values(self.suffix.job.sites[0], call, image, self._units.unsqueeze(0))

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

    def _alive(self) -> Tensor:
        """Bool ``[N, row]``: whether anything that the rest of the network reads has changed."""
        read = {source for node in self.deferred for source in node.all_input_nodes}
        read.add(self.graph.logits)
        deltas = [self.value(node) for node in read if self.changes(node)]
        later = [node for node in self.deferred if self.ablates(node)]
        maps = [delta.values for delta in deltas if delta is not None]
        maps += [self._difference(node).values for node in later]
        alive = torch.stack([_any_position(values) for values in maps]).any(dim=0)
        if self.suffix.job.single:
            return alive
        belongs = self.suffix.job.on(alive.device).columns.mask
        return alive.float() @ belongs.t().float() > 0

    def change(self, row: Tensor, image: Tensor, dtype: torch.dtype) -> Changed | None:
        """Logit changes of some pairs, with the dense suffix in ``dtype``."""
        pairs = len(row)
        more = usual(pairs, up=True) - pairs
        if more:
            row, image = (torch.cat([of, of[-1:].expand(more)]) for of in (row, image))
        change = _Slice(self, row, image, dtype).change()
        return change if change is None else change.first(pairs)

    def recompute(self, row: Tensor, image: Tensor) -> Tensor:
        """Logits ``[P, K]`` of some pairs, all values computed anew behind the site.

        Every operator sees the perturbed tensors themselves, in the precision of the clean run, so
        that what is equal, infinite or NaN in a plain forward pass is so here.
        """
        values: dict[fx.Node, Any] = {}

        def value(node: fx.Node) -> Any:
            if node not in values:
                return self.graph.pick(node, self.clean.tensors[node], image)
            return values[node]

        for node, sources, last in self._steps_of(self.suffix.nodes):
            if self.ablates(node):
                reached = sources[0] in values  # by the ablation at an earlier site
                before = value(sources[0] if reached else node)
                values[node] = self.ablated(node, before, row, image)
            else:
                values[node] = self.graph.evaluate(node, value, len(row))
            for source in last:
                values.pop(source, None)
        logits: Tensor = values[self.graph.logits]
        return logits

    def ablated(self, marker: fx.Node, values: Tensor, row: Tensor, image: Tensor) -> Tensor:
        """Replace the units of some pairs in a site's tensor ``[P, ...]``."""
        job = self.suffix.job
        site = next(site for site in job.sites if site.name == marker.args[1])
        call = marker.args[2]
        assert isinstance(call, int)

        def standin(pair: Tensor, unit: Tensor) -> Tensor:
            return self.standins.values(site, call, image[pair], unit)

        return job.change(site, values, row, standin)

    @cached_property
    def steps(self) -> list[tuple[fx.Node, list[fx.Node], list[fx.Node]]]:
        """Nodes of the dense part, what each of them reads, and what is then of no more use."""
        return self._steps_of(self.deferred if self.suffix.job.channelwise else self.suffix.nodes)

    def _steps_of(
        self, nodes: Sequence[fx.Node]
    ) -> list[tuple[fx.Node, list[fx.Node], list[fx.Node]]]:
        steps = []
        later = {self.graph.logits}
        for node in reversed(nodes):
            sources = node.all_input_nodes
            steps.append((node, sources, [source for source in sources if source not in later]))
            later.update(sources)
        return steps[::-1]

    def lowered(self, node: fx.Node, dtype: torch.dtype) -> Channel:
        """Return a channelwise delta in another precision, converted once per batch."""
        delta = self.value(node)
        assert delta is not None
        if delta.values.dtype == dtype:
            return delta
        if (node, dtype) not in self._lowered:
            self._lowered[node, dtype] = delta.with_values(delta.values.to(dtype))
        return self._lowered[node, dtype]


class _Slice:
    """Some pairs of a sweep: dense deltas, one row per pair."""

    def __init__(self, sweep: Sweep, row: Tensor, image: Tensor, dtype: torch.dtype) -> None:
        self.sweep = sweep
        self.dtype = carried(dtype)
        self.eight_bit = dtype == torch.int8
        self.codes: dict[fx.Node, Codes] = {}
        self.steps: list[Tensor] = []
        self.lost: list[Tensor] = []
        self.graph = sweep.graph
        self.column = row
        self.image_long = image
        self.image = image.to(torch.int32)
        self._deltas: dict[fx.Node, Any] = {}
        self._spelt: dict[fx.Node, Tensor] = {}

    def change(self) -> Changed | None:
        """Logit changes; None if the pairs cannot change them."""
        for node, sources, last in self.sweep.steps:
            if self.sweep.ablates(node):
                self._deltas[node] = self._ablate(node)
            elif any(self.raw(source) is not None for source in sources):
                self._deltas[node] = rules.advance(self, node)
            for source in last:
                self._deltas.pop(source, None)
                self.codes.pop(source, None)
                self._spelt.pop(source, None)
        change: Tensor | None = self.delta(self.graph.logits)
        if change is None:
            return None
        lost = torch.stack(self.lost).any(dim=0) if self.lost else None
        return Changed(change, torch.stack(self.steps) if self.steps else None, lost)

    def raw(self, node: fx.Node) -> Any:
        delta = self._deltas.get(node)
        if delta is None and self.sweep.changes(node):
            held = self.sweep.lowered(node, self.dtype)
            if self.sweep.suffix.job.single:
                return held
            pair, column = self._members
            image = self.image_long[pair]
            delta = self._deltas[node] = held.joined(len(self.column), pair, image, column)
        return delta

    def delta(self, node: fx.Node) -> Any:
        raw = self.raw(node)
        if isinstance(raw, Pending):
            raw = self._deltas[node] = raw.spell()
        if not isinstance(raw, Channel):
            return raw
        if node not in self._spelt:
            self._spelt[node] = raw.dense(self.image_long, self.column)
        return self._spelt[node]

    def base(self, node: fx.Node) -> Tensor:
        return self.sweep.base(node)

    def rows(self, node: fx.Node) -> Any:
        if node in self.graph.constants:
            return self.graph.constants[node]
        return self.graph.pick(node, self.sweep.clean.tensors[node], self.image_long)

    def plain(self, node: fx.Node) -> bool:
        layout = self.graph.layout.get(node)
        return isinstance(layout, BatchLayout) and layout.plain

    @cached_property
    def _members(self) -> tuple[Tensor, Tensor]:
        """(pair, column) of every unit that the pairs' groups consist of."""
        return self.sweep.suffix.job.on(self.column.device).columns.of(self.column)

    def _ablate(self, marker: fx.Node) -> Any:
        """Replace the units in the perturbed tensor, whatever has already changed in it."""
        base = self.rows(marker)
        incoming = self.delta(marker.all_input_nodes[0])
        values = base if incoming is None else base + incoming
        return self.sweep.ablated(marker, values, self.column, self.image_long) - base


def usual(pairs: int, *, up: bool = False) -> int:
    """Round a number of pairs to one of few: three leading bits, the others 0.

    oneDNN and cuDNN prepare each convolution anew for every number of pairs that they have not met,
    for half a millisecond or more. What is left over of a batch is filled up with a pair's copies.
    """
    step = 1 << max(0, pairs.bit_length() - 3)
    return -(-pairs // step) * step if up else pairs // step * step


def _any_position(maps: Tensor) -> Tensor:
    """Whether any entry of each map ``[N, U, *rest]`` is not 0, bool ``[N, U]``."""
    return maps.any(dim=tuple(range(2, maps.ndim))) if maps.ndim > 2 else maps != 0


def needed(suffixes: Iterable[Suffix]) -> set[fx.Node]:
    """Clean tensors that any of the suffixes reads."""
    return set().union(*(suffix.reads for suffix in suffixes))
