"""What a delta rule may look at, and the rule that holds for every operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, fx

from pyablate import ops
from pyablate.engine.channel_delta import ChannelDelta
from pyablate.engine.lazy_delta import Pending
from pyablate.network.aten import DIVISIONS, FLOATS, SAME, SUMS, VIEWS, named_activation
from pyablate.network.graph import Graph, Value, operands, remembered, tensor
from pyablate.ops import Activation, Quantized
from pyablate.ops.reference import compute_dtype

aten = torch.ops.aten

KEPT, KEPT_IN_DOUBLE = 1e-2, 1e-6
"""Shares of a change that have to be left of base + delta where relative errors count."""


@dataclass(frozen=True)
class Recomputed:
    """A changed value itself, for tensors that have no difference: integers and booleans."""

    value: Tensor


DenseDelta = Tensor | Recomputed | list[Tensor | Recomputed | None] | None
"""The change of a node, one row per pair: of several results a list; None if it does not change."""

Delta = DenseDelta | ChannelDelta | Pending
"""The same as the rules hand it on: on its channel, or with some steps yet to be done."""


class Pairs(Protocol):
    """What a rule may look at: one slice of pairs."""

    graph: Graph
    dtype: torch.dtype  # of dense arithmetic; other operators keep what they get or widen it
    eight_bit: bool  # whether convolutions run in 8-bit integers
    quantized: dict[fx.Node, Quantized]  # of deltas that an 8-bit convolution will read
    steps: list[Tensor]  # of the quantized values that 8-bit convolutions have read
    lost: list[Tensor]  # bool [P]: see :class:`pyablate.engine.logit_change.Changed`
    image: Tensor  # int32 [P], position in the batch
    image_long: Tensor  # int64 [P], the same
    column: Tensor  # int64 [P], position in the job

    def raw(self, node: fx.Node) -> Delta:
        """Return the delta of a node as held."""

    def delta(self, node: fx.Node) -> DenseDelta:
        """Return the same, one row per pair."""

    def base(self, node: fx.Node) -> Tensor:
        """Return a tensor of the clean run, ``[N, ...]``."""

    def rows(self, node: fx.Node) -> Value:
        """Return it gathered per pair, ``[P, ...]``; constants as they are."""

    def plain(self, node: fx.Node) -> bool:
        """Whether the clean tensor has exactly one row per image, first."""


Rule = Callable[[Pairs, fx.Node], Delta]


def difference(pairs: Pairs, node: fx.Node) -> DenseDelta:
    """f(base + d) - f(base): right for every operator, at the price of a clean value."""
    after = pairs.graph.evaluate(node, lambda n: _perturbed(pairs, n), len(pairs.image))
    if isinstance(after, Tensor) and in_one_pass(pairs, node, after):
        rounded = compute_dtype(pairs.dtype) == after.dtype and _rounded_next(pairs.graph, node)
        dtype = pairs.dtype if rounded else after.dtype
        return ops.subtracted(after, pairs.base(node), pairs.image, dtype=dtype)
    before = pairs.rows(node)
    if isinstance(after, (list, tuple)):
        return [_subtract(a, b) for a, b in zip(after, before, strict=True)]
    return _subtract(after, tensor(before))


def _perturbed(pairs: Pairs, node: fx.Node) -> Value:
    delta = pairs.delta(node)
    if delta is None:
        return pairs.rows(node)
    if isinstance(delta, Recomputed):
        return delta.value
    if isinstance(delta, Tensor):
        return perturbed(pairs, node, delta)
    return [
        row if d is None else d.value if isinstance(d, Recomputed) else row + d
        for d, row in zip(delta, pairs.rows(node), strict=True)
    ]


def perturbed(pairs: Pairs, node: fx.Node, delta: Tensor) -> Tensor:
    """Add the change of a node to its intact tensor."""
    if in_one_pass(pairs, node, delta):
        return ops.perturbed(pairs.base(node), delta, pairs.image)
    return tensor(pairs.rows(node)) + delta


def in_one_pass(pairs: Pairs, node: fx.Node, rows: DenseDelta) -> bool:
    """Whether rows ``[P, ...]`` can meet the intact tensor of a node where that lies."""
    if not isinstance(rows, Tensor) or not pairs.plain(node):
        return False
    base = pairs.base(node)
    known = rows.dtype in FLOATS and compute_dtype(rows.dtype) == base.dtype
    return known and rows.shape == (len(pairs.image), *base.shape[1:])


@remembered
def _rounded_next(graph: Graph, node: fx.Node) -> bool:
    """Whether only linear layers read a node, which round to the dtype of dense arithmetic."""

    def rounds(reader: fx.Node) -> bool:
        if reader.target in VIEWS:
            return _rounded_next(graph, reader)
        moving = [source for source in reader.all_input_nodes if source not in graph.constants]
        layer = reader.target is aten.linear.default and graph.constant(reader, 1) is not None
        return layer and len(moving) == 1

    return all(rounds(reader) for reader in readers_of(node))


def _subtract(after: Tensor | None, before: Tensor) -> Tensor | Recomputed | None:
    if after is None:
        return None
    if not after.is_floating_point():
        return Recomputed(after)
    # Masked scores are minus infinity before and after: no change, rather than NaN.
    return torch.where(after == before, torch.zeros_like(after), after - before)


def changing(pairs: Pairs, node: fx.Node) -> list[fx.Node]:
    """Arguments that change; x * x names x twice."""
    return [source for source in operands(node) if pairs.raw(source) is not None]


def note_cancellation(pairs: Pairs, node: fx.Node) -> None:
    """Give up pairs that all but cancel in front of a function without a bounded slope.

    Of base + delta, the less is left the less is known: where 1 has become 1e-9, float32 knows no
    digit of that, and a division or a logarithm makes as much of it as of any other number. The
    same for what has left the range of float16: divided by it, anything is 0.
    """
    source = node.args[1] if node.target in DIVISIONS else node.args[0]
    delta = pairs.delta(source) if isinstance(source, fx.Node) else None
    if not isinstance(delta, Tensor) or not isinstance(source, fx.Node):
        return
    left = perturbed(pairs, source, delta).abs()
    share = KEPT_IN_DOUBLE if left.dtype == torch.float64 else KEPT
    lost = (left < share * delta.abs()) | ~delta.isfinite()
    if pairs.plain(source):
        pairs.lost.append(lost.flatten(1).any(dim=1) if lost.ndim > 1 else lost)
    else:
        pairs.lost.append(lost.any().expand(len(pairs.image)))


def dense(pairs: Pairs, node: fx.Node) -> Tensor:
    """Return the delta of a node that is a tensor and changes."""
    return tensor(pairs.delta(node))


def linear(pairs: Pairs, node: fx.Node) -> DenseDelta:
    """Apply a map that is linear in its one tensor argument."""
    change: DenseDelta = pairs.graph.evaluate(node, pairs.delta, len(pairs.image))
    return change


def full_shape(pairs: Pairs, node: fx.Node, delta: Tensor) -> Tensor:
    """Broadcast as the clean operands were broadcast."""
    shape = pairs.graph.shape(node, len(pairs.image))
    return delta if list(delta.shape) == shape else delta.expand(shape)


@remembered
def readers_of(node: fx.Node) -> list[fx.Node]:
    """Nodes that compute something from a node."""
    found: list[fx.Node] = []
    for user in node.users:
        found += readers_of(user) if user.target in SAME else [user]
    return found


def only_reader(node: fx.Node) -> fx.Node | None:
    """Return the one node that computes something from a node, or None if there are others."""
    readers = readers_of(node)
    return readers[0] if len(readers) == 1 else None


def reader_behind_sum(node: fx.Node) -> fx.Node | None:
    """Return the one node that reads a node, perhaps after a residual sum, or None."""
    reader = only_reader(node)
    return only_reader(reader) if reader is not None and reader.target in SUMS else reader


def activation_behind(pairs: Pairs, node: fx.Node) -> Activation | None:
    """Return the activation that alone reads a node, perhaps after a residual sum.

    An operation that gives the node's change may do it in the same pass.
    """
    reader = reader_behind_sum(node)
    return named_activation(reader) if reader is not None and pairs.plain(node) else None
