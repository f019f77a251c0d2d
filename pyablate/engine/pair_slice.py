"""The dense part of a job's suffix, on one slice of pairs (unit, image)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor, fx

from pyablate.engine import rules
from pyablate.engine.channel_delta import ChannelDelta
from pyablate.engine.lazy_delta import Pending
from pyablate.engine.logit_change import Changed, carried
from pyablate.engine.rule_context import Delta, DenseDelta
from pyablate.engine.suffix import usual
from pyablate.engine.sweep import Step, Sweep
from pyablate.network.graph import Value, tensor
from pyablate.network.layout import BatchLayout
from pyablate.ops.quantized import Quantized
from pyablate.runtime.host_to_device import sent


def logit_change(sweep: Sweep, row: Tensor, image: Tensor, dtype: torch.dtype) -> Changed | None:
    """Logit changes of some pairs, with the dense part in ``dtype``; None if there are none."""
    pairs = len(row)
    more = usual(pairs, row.device, up=True) - pairs
    if more:
        row, image = (torch.cat([of, of[-1:].expand(more)]) for of in (row, image))
    change = _PairSlice(sweep, row, image, dtype).change()
    return change if change is None else change.first(pairs)


Look = Callable[[fx.Node, Tensor, Tensor | None], Tensor]
"""``look(place, pairs, change)``: which of the pairs, int64 ``[P]`` on the CPU, whose change at a
place ``[P, ...]`` is known (None if there is none) are to go on, bool ``[P]`` on the CPU."""


def carry(
    sweep: Sweep,
    row: Tensor,
    image: Tensor,
    dtype: torch.dtype,
    places: Sequence[fx.Node],
    look: Look,
) -> None:
    """Carry the changes of some pairs to places that all of the job's changes pass, in order.

    ``row`` and ``image`` are int64 ``[P]`` on the CPU. Pairs that need not go on leave the slice.
    The last place may be the logits.
    """
    if not places or not len(row):
        return
    device = sweep.clean.logits.device
    steps = sweep.steps
    number = {node: at for at, (node, _, _) in enumerate(steps)}
    pairs = torch.arange(len(row))
    part, start = _PairSlice(sweep, sent(row, device), sent(image, device), dtype), 0
    for place in places:
        stop = number.get(place, len(steps) - 1) + 1  # the logits of a sweep without a dense part
        part.run(steps[start:stop])
        start = stop
        change = part.delta(place)
        kept = look(place, pairs, None if change is None else tensor(change)[: len(pairs)])
        chosen = kept.nonzero().squeeze(1)
        pairs = pairs[chosen]
        if not len(pairs) or change is None:
            return
        part = part.only(sent(chosen, device), place)


class _PairSlice:
    """Some pairs of a sweep: dense deltas, one row per pair."""

    def __init__(self, sweep: Sweep, row: Tensor, image: Tensor, dtype: torch.dtype) -> None:
        self.sweep = sweep
        self.dtype = carried(dtype)
        self.eight_bit = dtype == torch.int8
        self.quantized: dict[fx.Node, Quantized] = {}
        self.steps: list[Tensor] = []
        self.lost: list[Tensor] = []
        self.graph = sweep.graph
        self.column = row
        self.image_long = image
        self.image = image.to(torch.int32)
        self._deltas: dict[fx.Node, Delta] = {}
        self._spelt: dict[fx.Node, Tensor] = {}

    def change(self) -> Changed | None:
        """Logit changes; None if the pairs cannot change them."""
        if self.dtype == torch.float16 and self.sweep.faint is not None:
            self.lost.append(self.sweep.faint[self.image_long, self.column])
        self.run(self.sweep.steps)
        change = self.delta(self.graph.logits)
        if change is None:
            return None
        lost = torch.stack(self.lost).any(dim=0) if self.lost else None
        return Changed(tensor(change), torch.stack(self.steps) if self.steps else None, lost)

    def run(self, steps: Sequence[Step]) -> None:
        """Carry the changes through some nodes."""
        for node, sources, last in steps:
            if self.sweep.ablates(node):
                self._deltas[node] = self._ablate(node)
            elif any(self.raw(source) is not None for source in sources):
                self._deltas[node] = rules.advance(self, node)
            for source in last:
                self._deltas.pop(source, None)
                self.quantized.pop(source, None)
                self._spelt.pop(source, None)

    def only(self, pairs: Tensor, place: fx.Node) -> _PairSlice:
        """Go on with some of the pairs, behind a place that all their changes pass."""
        more = usual(len(pairs), pairs.device, up=True) - len(pairs)
        chosen = torch.cat([pairs, pairs[-1:].expand(more)])
        dtype = torch.int8 if self.eight_bit else self.dtype
        part = _PairSlice(self.sweep, self.column[chosen], self.image_long[chosen], dtype)
        part._deltas[place] = tensor(self.delta(place))[chosen]
        return part

    def raw(self, node: fx.Node) -> Delta:
        delta = self._deltas.get(node)
        if delta is None and self.sweep.changes(node):
            held = self.sweep.lowered(node, self.dtype)
            if self.sweep.suffix.job.single:
                return held
            pair, column = self._members
            image = self.image_long[pair]
            delta = self._deltas[node] = held.joined(len(self.column), pair, image, column)
        return delta

    def delta(self, node: fx.Node) -> DenseDelta:
        raw = self.raw(node)
        if isinstance(raw, Pending):
            raw = self._deltas[node] = raw.spell()
        if not isinstance(raw, ChannelDelta):
            return raw
        if node not in self._spelt:
            self._spelt[node] = raw.dense(self.image_long, self.column)
        return self._spelt[node]

    def base(self, node: fx.Node) -> Tensor:
        return self.sweep.base(node)

    def rows(self, node: fx.Node) -> Value:
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

    def _ablate(self, marker: fx.Node) -> Tensor:
        """Replace the units in the perturbed tensor, whatever has already changed in it."""
        base = tensor(self.rows(marker))
        incoming = self.delta(marker.all_input_nodes[0])
        values = base if incoming is None else base + tensor(incoming)
        return self.sweep.ablated(marker, values, self.column, self.image_long) - base
