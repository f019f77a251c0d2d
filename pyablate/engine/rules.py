"""Delta rules per operator: how the change of a node follows from the changes of its inputs.

Two families. A *linear* node carries a delta as it carries a value, without its bias. Anything
else is a *difference*, f(base + d) - f(base). The rules here speak about dense deltas
``[P, ...]``, one row per pair; :mod:`pyablate.engine.channel_delta` has those for deltas that are
still on one channel.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, fx

from pyablate import ops
from pyablate.engine.channel_delta import has_unbounded_slope
from pyablate.engine.fused_rules import activation, add, average, max_pool
from pyablate.engine.rule_context import (
    Delta,
    DenseDelta,
    Pairs,
    Recomputed,
    Rule,
    changing,
    dense,
    difference,
    full_shape,
    in_one_pass,
    linear,
    note_cancellation,
)
from pyablate.engine.weighted_rules import batch_norm, convolution, fully_connected
from pyablate.network.aten import (
    DIVISIONS,
    LINEAR,
    LINEAR_POOLS,
    MATMULS,
    NAMED,
    SAME,
    STRUCTURE,
    SUMS,
)
from pyablate.network.graph import (
    BATCH_NORM,
    CONVOLUTIONS,
    PADS,
    Graph,
    Value,
    function,
    operands,
    remembered,
    settings,
    tensor,
)

aten = torch.ops.aten


def advance(pairs: Pairs, node: fx.Node) -> Delta:
    """Return the change of a node, from the changes of its inputs."""
    if has_unbounded_slope(node):
        note_cancellation(pairs, node)
    # Taking one of several results computes nothing: a recomputed one may stand beside the others.
    whole = node.target is not operator.getitem and _may_read_recomputed(node)
    if whole and any(_holds_recomputed(pairs.raw(source)) for source in node.all_input_nodes):
        return difference(pairs, node)
    return RULES.get(node.target, difference)(pairs, node)


@remembered
def _may_read_recomputed(node: fx.Node) -> bool:
    values = [source.meta.get("val") for source in node.all_input_nodes]
    return not all(isinstance(v, Tensor) and v.is_floating_point() for v in values)


def _holds_recomputed(delta: Delta) -> bool:
    items = delta if isinstance(delta, (list, tuple)) else [delta]
    return any(isinstance(item, Recomputed) for item in items)


def reads_base(graph: Graph, node: fx.Node) -> bool:
    """Whether the rule of a node may read the clean run at the node and its changed inputs."""
    values = [node.meta.get("val"), *(source.meta.get("val") for source in node.all_input_nodes)]
    if any(isinstance(value, Tensor) and not value.is_floating_point() for value in values):
        return True
    if node.target in SUMS:
        return bool(node.kwargs)
    if node.target in CONVOLUTIONS or node.target is aten.linear.default:
        return any(weight not in graph.constants for weight in operands(node)[1:])
    return node.target not in LINEAR


def _same(pairs: Pairs, node: fx.Node) -> Delta:
    source = node.all_input_nodes[0]
    if source in pairs.quantized:
        pairs.quantized[node] = pairs.quantized[source]
    return pairs.raw(source)


def _getitem(pairs: Pairs, node: fx.Node) -> Delta:
    several = pairs.delta(node.all_input_nodes[0])
    assert isinstance(several, (list, tuple))
    return several[cast(int, node.args[1])]


def _bilinear(pairs: Pairs, node: fx.Node) -> DenseDelta:
    """Multiply: linear while one factor stands still."""
    changed = changing(pairs, node)
    if len(changed) > 1 and node.target is aten.mul.Tensor:
        product = _product(pairs, *changed)
        return difference(pairs, node) if product is None else product
    if len(changed) > 1 or node.kwargs:
        return difference(pairs, node)
    if node.target in DIVISIONS and changed[0] is not node.args[0]:
        return difference(pairs, node)

    def value(source: fx.Node) -> Value:
        return dense(pairs, source) if source is changed[0] else pairs.rows(source)

    return full_shape(pairs, node, pairs.graph.evaluate(node, value, len(pairs.image)))


def _product(pairs: Pairs, first: fx.Node, second: fx.Node) -> Tensor | None:
    """Multiply where both factors change; None where one is not the whole of the product's shape.

    The gates of squeeze and excite are one number for each map.
    """
    deltas = [pairs.delta(source) for source in (first, second)]
    if not all(in_one_pass(pairs, n, d) for n, d in zip((first, second), deltas, strict=True)):
        return None
    one, other = map(tensor, deltas)
    if other.numel() > one.numel():
        first, second, one, other = second, first, other, one
    if one.ndim != other.ndim or torch.broadcast_shapes(one.shape, other.shape) != one.shape:
        return None
    dtype = torch.promote_types(one.dtype, other.dtype)
    if dtype == torch.float16:  # whose range squares leave
        dtype = torch.float32
    base, gate = pairs.base(first), pairs.base(second)
    if base.dtype != gate.dtype:
        return None
    return ops.delta_product(base, one.to(dtype), gate, other.to(dtype), pairs.image)


def _cat(pairs: Pairs, node: fx.Node) -> DenseDelta:
    """Join deltas, with zeros for what stands still."""
    parts = [
        torch.zeros_like(tensor(pairs.rows(part))) if delta is None else tensor(delta)
        for part in cast(list[fx.Node], node.args[0])  # the same tensor may come twice
        for delta in [pairs.delta(part)]
    ]
    if not all(part.is_floating_point() for part in parts):
        return difference(pairs, node)
    return tensor(function(node)(parts, *node.args[1:], **node.kwargs))


def _matmul(pairs: Pairs, node: fx.Node) -> DenseDelta:
    changed = changing(pairs, node)
    if len(changed) > 1:
        return difference(pairs, node)

    def value(source: fx.Node) -> Tensor:
        rows = tensor(pairs.rows(source))
        return dense(pairs, source).to(rows.dtype) if source is changed[0] else rows

    return tensor(pairs.graph.evaluate(node, value, len(pairs.image)))


def _addmm(pairs: Pairs, node: fx.Node) -> DenseDelta:
    bias, left, right = operands(node)
    if node.kwargs or pairs.raw(bias) is not None or pairs.raw(right) is not None:
        return difference(pairs, node)
    weight = tensor(pairs.rows(right))
    return dense(pairs, left).to(weight.dtype) @ weight


def _pad(pairs: Pairs, node: fx.Node) -> Tensor:
    """Pad: a constant border does not change, so its delta is 0; one of copies is linear."""
    delta = dense(pairs, node.all_input_nodes[0])
    constant = node.target is aten.constant_pad_nd.default
    mode = "constant" if constant else settings(node, 2, "constant")[0]
    return tensor(aten.pad.default(delta, node.args[1], mode))


RULES: Mapping[fx.node.Target, Rule] = {
    **dict.fromkeys(STRUCTURE | LINEAR_POOLS, linear),
    **dict.fromkeys((aten.adaptive_avg_pool2d.default, aten.mean.dim), average),
    **dict.fromkeys(SAME, _same),
    **dict.fromkeys(CONVOLUTIONS, convolution),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar, *DIVISIONS), _bilinear),
    **dict.fromkeys(SUMS, add),
    **dict.fromkeys(MATMULS, _matmul),
    **dict.fromkeys(NAMED, activation),
    operator.getitem: _getitem,
    aten.addmm.default: _addmm,
    aten.cat.default: _cat,
    **dict.fromkeys(PADS, _pad),
    aten.linear.default: fully_connected,
    aten.max_pool2d.default: max_pool,
    BATCH_NORM: batch_norm,
}
