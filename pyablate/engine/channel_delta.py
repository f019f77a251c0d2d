"""Deltas that are still on one channel, and the operators that leave them there.

Ablating one unit changes one channel of one tensor. Until something mixes channels, the deltas
of *all* units of a layer fit into one tensor of the layer's own size: entry ``[n, j]`` is the
change of channel ``channel[j]`` of image n when unit j is ablated. Carrying all units through
these operators costs as much as one clean pass through them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor, fx

from pyablate.network.aten import (
    DIVISIONS,
    ELEMENTWISE,
    LINEAR_POOLS,
    MAX_POOLS,
    SAME,
    SUBTRACTIONS,
)
from pyablate.network.batch_norm import norm_scale
from pyablate.network.graph import (
    BATCH_NORM,
    CONVOLUTIONS,
    PADS,
    Graph,
    function,
    integers,
    operand,
    pads_with_zeros,
    settings,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class ChannelDelta:
    """One changed channel per (image, column).

    Attributes
    ----------
    values : Tensor
        ``[N, U, *rest]``: the change of one channel's map; ``rest`` is the full tensor's shape
        without the batch and the channel axis.
    axis : int
        Axis of the channels in the full tensor.
    channel : Tensor
        int64 ``[U]``: which channel of the full tensor each column is.
    size : int
        Number of channels of the full tensor.
    inner : int
        Consecutive entries of ``axis`` that belong to one channel: 1, or after flattening
        ``[N, C, H, W]`` to ``[N, C * H * W]`` the H * W positions (then ``rest`` is ``[H * W]``).
    whole : bool
        Whether the columns are all channels in order.
    """

    values: Tensor
    axis: int
    channel: Tensor
    size: int
    inner: int = 1
    whole: bool = False

    def dense(self, image: Tensor, column: Tensor) -> Tensor:
        """Spell out ``[P, ...]`` for pairs (image, column), zero on all other channels."""
        return self.joined(len(image), torch.arange(len(image), device=image.device), image, column)

    def joined(self, pairs: int, pair: Tensor, image: Tensor, column: Tensor) -> Tensor:
        """Spell out ``[pairs, ...]`` with any number of changed channels in each pair.

        Parameters
        ----------
        pairs : int
            Number of rows.
        pair, image, column : Tensor
            int64 ``[M]``: row ``pair`` has the change of ``column`` on ``image``, which stays on
            its channel whatever the others do.
        """
        chosen = self.values[image, column]
        full = chosen.new_zeros(pairs, self.size, *chosen.shape[1:])
        if full.ndim == 4 and self.axis == 1:
            full = full.contiguous(memory_format=torch.channels_last)
        full[pair, self.channel[column]] = chosen
        return full.flatten(1, 2) if self.inner > 1 else full.movedim(1, self.axis)

    def add_to(self, dense: Tensor, image: Tensor, column: Tensor, factor: Tensor) -> None:
        """Add this delta, times factors, to one ``[P, ...]``.

        Factors are ``[P]`` or ``[1]``, or ``[P, H, W]``, one for each position of a map.
        """
        view = (
            dense.unflatten(1, (self.size, -1)) if self.inner > 1 else dense.movedim(self.axis, 1)
        )
        pair = torch.arange(len(image), device=image.device)
        own = self.values[image, column]
        own = own * (factor if factor.ndim > 1 else factor.reshape(-1, *[1] * (own.ndim - 1)))
        view[pair, self.channel[column]] += own.to(view.dtype)

    def of(self, full: Tensor) -> Tensor:
        """Read the same channels of a full tensor ``[N, ...]``, as ``[N, U, *rest]``."""
        if self.inner > 1:
            full = full.unflatten(1, (self.size, self.inner))
        full = full.movedim(self.axis, 1)
        return full if self.whole else full.index_select(1, self.channel)

    def with_values(self, values: Tensor) -> ChannelDelta:
        """Return other values on the same channels."""
        return replace(self, values=values)


class Reader(Protocol):
    """What a rule may look at."""

    @property
    def graph(self) -> Graph:
        """Return the network."""

    def value(self, node: fx.Node) -> ChannelDelta | None:
        """Return the delta of a node, or None if it does not change."""

    def base(self, node: fx.Node) -> Tensor:
        """Return a tensor of the clean run."""


Rule = Callable[[Reader, fx.Node], ChannelDelta | None]


def advance(reader: Reader, node: fx.Node) -> ChannelDelta | None:
    """Carry deltas through a node, or return None where they must be spelt out."""
    rule = RULES.get(node.target)
    return None if rule is None else rule(reader, node)


def _only_first_changes(reader: Reader, node: fx.Node) -> ChannelDelta | None:
    """Delta of the first argument, if it is the only one that changes."""
    if not isinstance(node.args[0], fx.Node):
        return None
    delta = reader.value(node.args[0])
    others = [source for source in node.all_input_nodes if source is not node.args[0]]
    return None if any(reader.value(other) is not None for other in others) else delta


def _getitem(reader: Reader, node: fx.Node) -> ChannelDelta | None:
    """Batch norm returns a tuple whose first item is all that anyone reads."""
    norm = operand(node)
    delta = reader.value(norm)
    return delta if norm.target is BATCH_NORM and node.args[1] == 0 else None


def _elementwise(reader: Reader, node: fx.Node) -> ChannelDelta | None:
    """f(base + d) - f(base) for a function of one tensor and numbers."""
    delta = _only_first_changes(reader, node)
    if delta is None or len(node.all_input_nodes) > 1 or has_unbounded_slope(node):
        return None
    base = delta.of(reader.base(operand(node)))
    call, rest, named = function(node), node.args[1:], dict(node.kwargs)
    return delta.with_values(call(base + delta.values, *rest, **named) - call(base, *rest, **named))


def has_unbounded_slope(node: fx.Node) -> bool:
    """Whether pairs have to be looked at one by one; a power of 1 or more has a bounded slope."""
    exponent = node.args[1] if node.target is aten.pow.Tensor_Scalar else 0
    return node.target in UNBOUNDED and not (isinstance(exponent, (int, float)) and exponent >= 1)


def _spatial(reader: Reader, node: fx.Node) -> ChannelDelta | None:
    """Pool ``[N, C, *space]``: channels are independent, if the axes are just these."""
    delta = _only_first_changes(reader, node)
    if delta is None or delta.axis != 1 or delta.inner > 1:
        return None
    if delta.values.ndim != (3 if node.target in POOLS_1D else 4):
        return None
    call, rest = function(node), node.args[1:]
    if node.target in LINEAR_POOLS:
        return delta.with_values(call(delta.values, *rest, **node.kwargs))
    base = delta.of(reader.base(operand(node)))
    pooled = call(base + delta.values, *rest, **node.kwargs) - call(base, *rest, **node.kwargs)
    return delta.with_values(pooled)


def _pad(reader: Reader, node: fx.Node) -> ChannelDelta | None:
    """Pad the two axes of the maps ``[N, C, H, W]`` with zeros."""
    delta = _only_first_changes(reader, node)
    margins = integers(node.args[1])
    if delta is None or delta.axis != 1 or delta.inner > 1 or delta.values.ndim != 4:
        return None
    if len(margins) > 4 or not pads_with_zeros(node):
        return None
    return delta.with_values(aten.constant_pad_nd.default(delta.values, margins))


def _mean(reader: Reader, node: fx.Node) -> ChannelDelta | None:
    """Average over axes other than the channels'."""
    delta = _only_first_changes(reader, node)
    if delta is None or delta.inner > 1:
        return None
    dims = averaged_axes(node, delta.axis, delta.values.ndim)
    if dims is None:
        return None
    keep = bool(node.args[2]) if len(node.args) > 2 else False
    moved = [dim + 1 if dim < delta.axis else dim for dim in dims]
    values = delta.values.mean(moved, keepdim=keep)
    axis = delta.axis if keep else delta.axis - sum(dim < delta.axis for dim in dims)
    return replace(delta, values=values, axis=axis)


def averaged_axes(node: fx.Node, channels: int, ndim: int) -> list[int] | None:
    """Axes over which a mean is taken, if they are neither the images' nor the channels'."""
    if len(node.args) < 2 or node.args[1] is None or node.kwargs:
        return None
    axes = [axis % ndim for axis in integers(node.args[1])]
    return None if not axes or 0 in axes or channels in axes else axes


def _reshape(reader: Reader, node: fx.Node) -> ChannelDelta | None:
    """Flatten ``[N, C, *rest]`` to ``[N, C * prod(rest)]``."""
    delta = _only_first_changes(reader, node)
    if delta is None:
        return None
    rest = flattened(node, operand(node).meta["val"].shape, delta.axis, delta.inner)
    if rest is None:
        return None
    values = delta.values.flatten(2) if rest > 1 else delta.values.flatten(1)
    return replace(delta, values=values, inner=rest)


def flattened(node: fx.Node, before: Sequence[int], axis: int, inner: int) -> int | None:
    """Positions per channel after ``[N, C, *rest]`` became ``[N, C * prod(rest)]``; None if not."""
    after = node.meta["val"].shape
    rest = math.prod(int(size) for size in before[2:])
    flat = len(after) == 2 and axis == 1 and inner == 1 and after[1] == before[1] * rest
    return rest if flat else None


def _permute(reader: Reader, node: fx.Node) -> ChannelDelta | None:
    delta = _only_first_changes(reader, node)
    if delta is None or delta.inner > 1:
        return None
    ndim = delta.values.ndim
    order = list(range(ndim))
    if node.target is aten.permute.default:
        order = [dim % ndim for dim in integers(node.args[1])]
    else:
        first, second = (int(dim) % ndim for dim in node.args[1:3])  # type: ignore[arg-type]
        order[first], order[second] = order[second], order[first]
    if order[0] != 0:
        return None
    moved = [dim + 1 if dim < delta.axis else dim for dim in order[1:] if dim != delta.axis]
    values = delta.values.permute(0, 1, *moved)
    return replace(delta, values=values, axis=order.index(delta.axis))


def _batch_norm(reader: Reader, node: fx.Node) -> ChannelDelta | None:
    delta = _only_first_changes(reader, node)
    if delta is None or delta.axis != 1 or delta.inner > 1:
        return None
    scale = norm_scale(reader.graph, node)[0].to(delta.values.dtype)[delta.channel]
    return delta.with_values(delta.values * _along(scale, delta.values))


def _depthwise(reader: Reader, node: fx.Node) -> ChannelDelta | None:
    """Convolve each channel by its own filter: it stays where it is."""
    delta = _only_first_changes(reader, node)
    weight = reader.graph.constant(node, 1)
    groups = settings(node, 3, 1, 0, 1, 1)[3]
    if delta is None or weight is None or delta.axis != 1:
        return None
    if not delta.size == groups == len(weight):
        return None
    geometry = list(node.args[3:6])
    convolve = function(node)
    filters = weight[delta.channel]
    # By name: export leaves out arguments at the end that have their default.
    values = convolve(delta.values, filters, None, *geometry, groups=len(filters))
    return delta.with_values(values)


def _scale(reader: Reader, node: fx.Node) -> ChannelDelta | None:
    """Multiply or divide by something that does not change."""
    if node.kwargs:
        return None
    changed = [a for a in node.args if isinstance(a, fx.Node) and reader.value(a) is not None]
    if len(changed) != 1 or (node.target in DIVISIONS and changed[0] is not node.args[0]):
        return None
    delta = reader.value(changed[0])
    other = node.args[1] if changed[0] is node.args[0] else node.args[0]
    if delta is None or delta.inner > 1:
        return None
    factor: Tensor | float
    if isinstance(other, fx.Node):
        constants, ndim = reader.graph.constants, delta.values.ndim
        full = constants[other] if other in constants else reader.base(other)
        full = full.reshape(*[1] * (ndim - full.ndim), *full.shape).movedim(delta.axis, 1)
        factor = full if full.shape[1] == 1 else full.index_select(1, delta.channel)
    else:
        factor = cast(float, other)
    values = delta.values / factor if node.target in DIVISIONS else delta.values * factor
    return delta.with_values(values) if values.shape == delta.values.shape else None


def _add(reader: Reader, node: fx.Node) -> ChannelDelta | None:
    """Add or subtract something that does not change, or the same channels of a second delta."""
    if node.kwargs:
        return None
    first, second = (reader.value(a) if isinstance(a, fx.Node) else None for a in node.args[:2])
    sign = -1.0 if node.target in SUBTRACTIONS else 1.0
    if first is not None and second is None:
        return first if keeps_shape(first, node) else None
    if second is not None and first is None:
        return second.with_values(sign * second.values) if keeps_shape(second, node) else None
    if first is not None and second is not None:
        same = first.channel is second.channel or torch.equal(first.channel, second.channel)
        alike = first.axis == second.axis and same
        if alike and keeps_shape(first, node) and keeps_shape(second, node):
            return first.with_values(first.values + sign * second.values)
    return None


def keeps_shape(delta: ChannelDelta, node: fx.Node) -> bool:
    """Check that the other operand did not broadcast the delta."""
    shape = node.meta["val"].shape
    rest = [size for axis, size in enumerate(shape) if axis not in (0, delta.axis)]
    if delta.inner > 1:
        return len(shape) == 2 and shape[1] == delta.size * delta.inner
    return list(delta.values.shape[2:]) == rest and shape[delta.axis] == delta.size


def _cat(reader: Reader, node: fx.Node) -> ChannelDelta | None:
    """Concatenate along the channels with tensors that do not change: the numbers shift."""
    parts = node.args[0]
    assert isinstance(parts, (list, tuple))
    deltas = [reader.value(part) for part in parts if isinstance(part, fx.Node)]
    changed = [(i, delta) for i, delta in enumerate(deltas) if delta is not None]
    if len(changed) != 1:
        return None
    [(place, delta)] = changed
    dim = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    meta = node.meta["val"]
    if dim % meta.ndim != delta.axis or delta.inner > 1:
        return None
    before = [part.meta["val"].shape[delta.axis] for part in parts[:place]]  # type: ignore[union-attr]
    channel = delta.channel + int(sum(before))
    return replace(delta, channel=channel, size=int(meta.shape[delta.axis]), whole=False)


def _along(vector: Tensor, values: Tensor) -> Tensor:
    """Shape [U] for broadcasting with [N, U, *rest]."""
    return vector.reshape(1, -1, *[1] * (values.ndim - 2))


POOLS_1D = frozenset(
    {aten.avg_pool1d.default, aten.adaptive_avg_pool1d.default, aten.max_pool1d.default}
)
UNBOUNDED: frozenset[fx.node.Target] = frozenset(
    {
        aten.div.Tensor,
        aten.log.default,
        aten.log10.default,
        aten.log1p.default,
        aten.log2.default,
        aten.pow.Tensor_Scalar,
        aten.pow.Tensor_Tensor,
        aten.reciprocal.default,
        aten.rsqrt.default,
        aten.sqrt.default,
    }
)
"""Functions without a bounded slope, in the second argument for a division."""
RESHAPES = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.squeeze.dims,
        aten.squeeze.dim,
    }
)
RULES: Mapping[fx.node.Target, Rule] = {
    **dict.fromkeys(SAME, _only_first_changes),
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(LINEAR_POOLS | MAX_POOLS, _spatial),
    **dict.fromkeys(CONVOLUTIONS, _depthwise),
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys((aten.permute.default, aten.transpose.int), _permute),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar, *DIVISIONS), _scale),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar, *SUBTRACTIONS), _add),
    operator.getitem: _getitem,
    BATCH_NORM: _batch_norm,
    aten.mean.dim: _mean,
    aten.cat.default: _cat,
    **dict.fromkeys(PADS, _pad),
}
