"""Delta rules of what lies between convolutions: sums, activations and pooling, in one pass."""

from __future__ import annotations

import functools
from typing import cast

import torch
from torch import Tensor, fx

from pyablate import ops
from pyablate.engine import lazy_delta
from pyablate.engine.channel_delta import ChannelDelta, keeps_shape
from pyablate.engine.lazy_delta import Activated, QuantizedDelta, Scaled, Sum, WaitingConvolution
from pyablate.engine.rule_context import (
    Delta,
    Pairs,
    changing,
    dense,
    difference,
    full_shape,
    linear,
    only_reader,
    readers_of,
)
from pyablate.engine.weighted_rules import new_quantized
from pyablate.network.aten import FLOATS, NAMED, SUBTRACTIONS, named_activation, two
from pyablate.network.graph import CONVOLUTIONS, operand, remembered, settings, tensor
from pyablate.ops import Activation

aten = torch.ops.aten


def add(pairs: Pairs, node: fx.Node) -> Delta:
    """Add or subtract: deltas add up, what stands still drops out."""
    if node.kwargs:
        return difference(pairs, node)
    sign = -1.0 if node.target in SUBTRACTIONS else 1.0
    if sign > 0 and (waiting := _still_first(pairs, node) or _taken_up(pairs, node)) is not None:
        return waiting
    first, second = (_at_least_scaled(pairs, a) for a in node.args[:2])
    if isinstance(second, ChannelDelta) and _fit(first, second, node):
        return _onto(pairs, node, operand(node, 0), second, sign)
    if isinstance(first, ChannelDelta) and sign > 0 and _fit(second, first, node):
        return _onto(pairs, node, operand(node, 1), first, sign)
    if sign > 0 and (residual := _residual(pairs, node, first, second)) is not None:
        return residual
    left, right = (pairs.delta(a) if isinstance(a, fx.Node) else None for a in node.args[:2])
    if right is None:
        return full_shape(pairs, node, tensor(left))
    other = -tensor(right) if sign < 0 else tensor(right)
    return full_shape(pairs, node, other if left is None else tensor(left) + other)


def _still_first(pairs: Pairs, node: fx.Node) -> WaitingConvolution | None:
    """Let a first convolution go on waiting where only what stands still is added to it."""
    changed = changing(pairs, node)
    raw = pairs.raw(changed[0]) if len(changed) == 1 else None
    if not isinstance(raw, WaitingConvolution):
        return None
    return raw if changed[0].meta["val"].shape == node.meta["val"].shape else None


def _taken_up(pairs: Pairs, node: fx.Node) -> WaitingConvolution | None:
    """Let a convolution that waits take up the dense delta that is added to it."""
    for own, other in (node.args[:2], node.args[1::-1]):
        if own is other or not isinstance(own, fx.Node) or not isinstance(other, fx.Node):
            continue
        raw, delta = pairs.raw(own), pairs.raw(other)
        if not isinstance(raw, WaitingConvolution) or not raw.adds:
            continue
        if isinstance(delta, (WaitingConvolution, Scaled)):
            delta = pairs.delta(other)
        if isinstance(delta, Tensor) and list(delta.shape) == pairs.graph.shape(
            own, len(pairs.image)
        ):
            return WaitingConvolution(functools.partial(raw.run, addend=delta))
    return None


def _residual(pairs: Pairs, node: fx.Node, first: Delta, second: Delta) -> Sum | None:
    """Let a sum of two dense deltas wait for the activation that alone reads it."""
    if node.args[0] is node.args[1]:
        return None
    reader = only_reader(node)
    left, right = _waiting(first, node.args[0]), _waiting(second, node.args[1])
    if reader is None or left is None or right is None or reader.target not in NAMED:
        return None
    shape = pairs.graph.shape(node, len(pairs.image))
    a, b = left.values, right.values
    alike = list(a.shape) == list(b.shape) == shape and a.dtype == b.dtype
    return Sum(left, right) if alike and pairs.plain(node) else None


def _at_least_scaled(pairs: Pairs, node: fx.node.Argument) -> Delta:
    """Return a delta as held, but with all pending work done that is more than a factor."""
    if not isinstance(node, fx.Node):
        return None
    raw = pairs.raw(node)
    return pairs.delta(node) if isinstance(raw, (WaitingConvolution, Sum, Activated)) else raw


def _onto(
    pairs: Pairs, node: fx.Node, source: fx.Node, channel: ChannelDelta, sign: float
) -> Scaled:
    """Add a delta that is on its channel to the dense one of a node, in place where it may."""
    dense = _waiting(pairs.raw(source), source)
    assert dense is not None
    if channel.axis != 1 or channel.inner > 1:
        dense = dense.by_pair()  # its maps are not those that positions are counted on
    values = dense.values if dense.fresh else dense.values.clone()
    scale, factor = dense.scale, channel.values.new_full((1,), sign)
    if scale is not None:
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # of nothing but zeros
        factor = sign / scale
    channel.add_to(values, pairs.image_long, pairs.column, factor)
    return Scaled(values, scale, fresh=len(readers_of(node)) == 1)


def _fit(dense: Delta, channel: ChannelDelta, node: fx.Node) -> bool:
    """Whether a dense delta can take up one on its channel: no broadcasting, no digits lost."""
    values = dense.values if isinstance(dense, Scaled) else dense
    if not isinstance(values, Tensor) or values.dtype not in FLOATS:
        return False
    alike = tuple(values.shape[1:]) == tuple(node.meta["val"].shape[1:])
    wide = torch.promote_types(values.dtype, channel.values.dtype) == values.dtype
    return alike and wide and keeps_shape(channel, node)


def _waiting(delta: Delta, source: fx.node.Argument = None) -> Scaled | None:
    """Return a dense delta as one that may be scaled; ``source`` is the node it comes from."""
    if isinstance(delta, Scaled):
        return delta
    if not isinstance(delta, Tensor) or delta.dtype not in FLOATS:
        return None
    # Results may go where a fresh delta stands that nobody else reads: views share memory.
    node = source if isinstance(source, fx.Node) and source.target in CONVOLUTIONS else None
    return Scaled(delta, fresh=node is not None and len(node.users) == 1 and _is_dense(delta))


def _is_dense(delta: Tensor) -> bool:
    if delta.is_contiguous():
        return True
    return delta.ndim == 4 and delta.is_contiguous(memory_format=torch.channels_last)


def activation(pairs: Pairs, node: fx.Node) -> Delta:
    """Activate, or wait for the pooling that alone reads it."""
    source = operand(node)
    named = named_activation(node)
    raw = pairs.raw(source)
    delta = raw if isinstance(raw, (WaitingConvolution, Sum)) else _waiting(raw, source)
    if named is None or delta is None or not pairs.plain(source):
        return difference(pairs, node)

    def run() -> Tensor | QuantizedDelta:
        quantized = new_quantized(
            pairs, node, _layout(delta), by_position=not isinstance(delta, WaitingConvolution)
        )
        return lazy_delta.activate(delta, pairs.base(source), pairs.image, named, quantized)

    reader = only_reader(node)
    pooled = reader is not None and reader.target is aten.max_pool2d.default and named.monotone
    averaged = reader is not None and _averages(pairs, reader)
    if (pooled or averaged) and not isinstance(delta, WaitingConvolution):
        return Activated(delta, source, named, run)
    return run()


def _layout(delta: Scaled | Sum | WaitingConvolution) -> torch.memory_format:
    """Layout that a native operation gives its result."""
    if isinstance(delta, WaitingConvolution):
        return torch.channels_last
    values = (delta.first if isinstance(delta, Sum) else delta).values
    last = values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not values.is_contiguous() else torch.contiguous_format


@remembered
def _averages(pairs: Pairs, node: fx.Node) -> bool:
    """Whether a node averages each map ``[H, W]`` as a whole."""
    source = node.args[0] if node.args else None
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    if not isinstance(value, Tensor) or value.ndim != 4 or not pairs.plain(operand(node)):
        return False
    if node.target is aten.adaptive_avg_pool2d.default:
        return two(node.args[1]) == [1, 1]
    if node.target is not aten.mean.dim or node.kwargs or len(node.args) < 2:
        return False
    dims = node.args[1]
    return isinstance(dims, (list, tuple)) and sorted(cast(int, d) % 4 for d in dims) == [2, 3]


def average(pairs: Pairs, node: fx.Node) -> Delta:
    """Pool globally, with the activation before it."""
    source = operand(node)
    raw = pairs.raw(source)
    if not isinstance(raw, (Activated, Scaled, Tensor)) or not _averages(pairs, node):
        return linear(pairs, node)
    if isinstance(raw, Activated):
        result = lazy_delta.mean(raw.source, pairs.base(raw.node), pairs.image, raw.activation)
    else:
        delta = _waiting(raw)
        if delta is None:
            return linear(pairs, node)
        each = torch.arange(len(pairs.image), dtype=torch.int32, device=pairs.image.device)
        # The identity reads no clean tensor: any of the right shape will do.
        result = lazy_delta.mean(delta, delta.values, each, Activation("identity"))
    return result.reshape(pairs.graph.shape(node, len(pairs.image)))


def max_pool(pairs: Pairs, node: fx.Node) -> Delta:
    """Pool, with the activation before it."""
    source = operand(node)
    raw = pairs.raw(source)
    activation, origin = None, source
    delta = _waiting(raw)
    if isinstance(raw, Activated) and isinstance(raw.source, Scaled):
        delta, origin, activation = raw.source, raw.node, raw.activation
    elif isinstance(raw, Activated):
        delta = Scaled(dense(pairs, source))
    if delta is None or delta.values.ndim != 4 or not pairs.plain(origin):
        return difference(pairs, node)
    delta = delta.by_pair()
    kernel, stride, padding, dilation = settings(node, 1, [], [], 0, 1)[:4]
    quantized = new_quantized(pairs, node, _layout(delta))
    result = ops.delta_max_pool(
        pairs.base(origin),
        delta.values,
        pairs.image,
        kernel=kernel,
        stride=stride or kernel,
        padding=padding,
        dilation=dilation,
        out_size=[int(size) for size in node.meta["val"].shape[2:]],
        activation=activation,
        scale=delta.scale,
        quantized=quantized,
    )
    return lazy_delta.held(result, quantized)
