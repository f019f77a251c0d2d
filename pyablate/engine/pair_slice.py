"""The dense part of a job's suffix, on one slice of pairs (unit, image)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    part = _PairSlice(sweep, _filled_up(row), _filled_up(image), dtype)
    return part.change(sweep.steps, len(row))


@dataclass(frozen=True, eq=False)
class Held:
    """Pairs whose changes have been carried to a place that all of the job's changes pass.

    Attributes
    ----------
    place : fx.Node
        Where they are.
    pairs : Tensor
        int64 ``[P]``, on the CPU: which they are of those that set out.
    row, image : Tensor
        int64 ``[P]``.
    change : Tensor
        ``[P, ...]``, what they do to the place.
    lost : Tensor or None
        As of :class:`pyablate.engine.logit_change.Changed`.
    """

    place: fx.Node
    pairs: Tensor
    row: Tensor
    image: Tensor
    change: Tensor
    lost: Tensor | None

    @classmethod
    def joined(cls, parts: Sequence[Held]) -> Held:
        """Put pairs of several slices together, all of them at one place."""
        pairs, row, image, change = (
            torch.cat([getattr(part, name) for part in parts])
            for name in ("pairs", "row", "image", "change")
        )
        lost = [part.lost for part in parts if part.lost is not None]
        return cls(parts[0].place, pairs, row, image, change, torch.cat(lost) if lost else None)


def change_from(sweep: Sweep, held: Held, dtype: torch.dtype) -> Changed | None:
    """Logit changes of pairs that go on from a place, as :func:`logit_change` gives them."""
    number = next(n for n, (node, _, _) in enumerate(sweep.steps) if node is held.place)
    return _PairSlice.of(sweep, held, dtype).change(sweep.steps[number + 1 :], len(held.pairs))


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
) -> Held | None:
    """Carry the changes of some pairs to places that all of the job's changes pass, in order.

    ``row`` and ``image`` are int64 ``[P]`` on the CPU. Pairs that need not go on leave the slice.
    The last place may be the logits. Returns the pairs that are to go on from there, if any.
    """
    if not places or not len(row):
        return None
    device = sweep.clean.logits.device
    steps = sweep.steps
    number = {node: at for at, (node, _, _) in enumerate(steps)}
    pairs, held, start = torch.arange(len(row)), None, 0
    part = _PairSlice(sweep, sent(row, device), sent(image, device), dtype)
    for place in places:
        if held is not None:
            part = _PairSlice.of(sweep, held, dtype)
        stop = number.get(place, len(steps) - 1) + 1  # the logits of a sweep without a dense part
        part.run(steps[start:stop])
        start = stop
        change = part.delta(place)
        kept = look(place, pairs, None if change is None else tensor(change)[: len(pairs)])
        chosen = kept.nonzero().squeeze(1)
        pairs = pairs[chosen]
        if not len(pairs) or change is None:
            return None
        held = part.held(place, pairs, sent(chosen, device))
    return held


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

    @classmethod
    def of(cls, sweep: Sweep, held: Held, dtype: torch.dtype) -> _PairSlice:
        """Go on with pairs from the place where they are."""
        row, image, change = map(_filled_up, (held.row, held.image, held.change))
        part = cls(sweep, row, image, dtype)
        part._deltas[held.place] = change
        part.lost += [] if held.lost is None else [_filled_up(held.lost)]
        return part

    def held(self, place: fx.Node, pairs: Tensor, chosen: Tensor) -> Held:
        """Take some of the pairs, int64 ``[P]``, at a place that all their changes pass."""
        row, image, change = self.column, self.image_long, tensor(self.delta(place))
        lost = None if self._lost is None else self._lost[chosen]
        return Held(place, pairs, row[chosen], image[chosen], change[chosen], lost)

    def change(self, steps: Sequence[Step], pairs: int) -> Changed | None:
        """Logit changes of the first pairs, behind these steps; None if they cannot change."""
        self.run(steps)
        change = self.delta(self.graph.logits)
        if change is None:
            return None
        found = torch.stack(self.steps) if self.steps else None
        return Changed(tensor(change), found, self._lost).first(pairs)

    @property
    def _lost(self) -> Tensor | None:
        return torch.stack(self.lost).any(dim=0) if self.lost else None

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


def _filled_up(rows: Tensor) -> Tensor:
    """Repeat the last of some pairs, so that their number is a usual one."""
    more = usual(len(rows), up=True) - len(rows)
    return torch.cat([rows, rows[-1:].expand(more, *rows.shape[1:])]) if more else rows
