"""Importance propagated back from the classes through absolute weights (NISP)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.nn import functional

from pyablate.network.aten import DIVISIONS, LINEAR_POOLS, SAME, STRUCTURE, SUMS
from pyablate.network.batch_norm import norm_scale
from pyablate.network.channel_tracking import (
    ACTIVATIONS,
    PRODUCTS,
    ROWS,
    WEIGHTED,
    with_zeros,
)
from pyablate.network.graph import BATCH_NORM, Graph, function, settings
from pyablate.network.sites import Site
from pyablate.unit_attributes.gradients import per_unit

aten = torch.ops.aten


def nisp(graph: Graph, sites: Iterable[Site]) -> dict[str, Tensor]:
    """Propagate importance back to each unit, float64 ``[C]`` by site.

    The recursion s_k = abs(W_(k+1))^T s_(k+1) is the gradient of the summed outputs of the network
    that remains when weights are made absolute, biases dropped, activations passed and maxima
    averaged; so that network is run, and its gradient taken at the sites and summed over
    positions. NaN for units from which some way leads through anything else: attention, products
    of maps, layer norm.
    """
    with torch.enable_grad():
        # Linear throughout, so the gradient does not depend on the values.
        images = torch.zeros(graph.shape(graph.images, ROWS), dtype=torch.float64)
        images.requires_grad_()
        values: dict[fx.Node, Any] = {graph.images: images}
        for node in graph.graph.nodes:
            depends = any(source in values for source in node.all_input_nodes)
            if node.op == "call_function" and depends and graph.size(node, ROWS) is None:
                values[node] = _absolute(graph, node, values)
        marked = [node for node in graph.markers if node in values]
        total = values[graph.logits].sum()
        gradients = torch.autograd.grad(total, [values[m] for m in marked], allow_unused=True)
    found: dict[str, Tensor] = {}
    for site in sites:
        score = torch.zeros(site.channels, dtype=torch.float64)
        for marker, gradient in zip(marked, gradients, strict=True):
            if marker.args[1] == site.name and gradient is not None:
                score += per_unit(gradient[:1], site)[0]
        found[site.name] = score
    return found


def _absolute(graph: Graph, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """Value of a node in the absolute network."""
    rule = _RULES.get(node.target, _unknown)
    first = node.args[0] if node.args else None
    if rule not in (with_zeros, _combined) and (
        not isinstance(first, fx.Node) or first not in values
    ):
        rule = _unknown
    return rule(graph, node, values)


def _weights(graph: Graph, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    weight = graph.constant(node, 1)
    if weight is None:
        return _unknown(graph, node, values)
    weight = weight.double().cpu().abs()
    settings_ = () if node.target is aten.linear.default else (None, *node.args[3:])
    return function(node)(_input(node, values), weight, *settings_)


def _batch_norm(graph: Graph, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    x = _input(node, values)
    scale = norm_scale(graph, node)[0].cpu().abs()
    return [x * scale.reshape(1, -1, *[1] * (x.ndim - 2)), None, None]


def _same(_graph: Graph, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    return _input(node, values)


def _item(graph: Graph, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    item = _input(node, values)[cast(int, node.args[1])]
    return item if item.ndim else item.expand(graph.shape(node, ROWS))


def _input(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    return values[cast(fx.Node, node.args[0])]


def _max_pool(graph: Graph, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """Share a maximum's importance among all positions of its window."""
    kernel, stride, padding, dilation, ceil = settings(node, 1, [], [], 0, 1, False)
    plain = all(d == 1 for d in (dilation if isinstance(dilation, list) else [dilation]))
    if not plain:
        return _unknown(graph, node, values)
    flat = node.target is aten.max_pool1d.default
    pool: Any = functional.avg_pool1d if flat else functional.avg_pool2d
    return pool(
        _input(node, values), kernel, stride or kernel, padding, ceil, count_include_pad=False
    )


def _maximum(_graph: Graph, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    return aten.mean.dim(_input(node, values), *node.args[1:])


def _combined(graph: Graph, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """Add up what depends on the images; scale it by the size of what does not."""
    operands = list(node.args[:2])
    known = [one for one in operands if isinstance(one, fx.Node) and one in values]
    shape = graph.shape(node, ROWS)
    if node.target in SUMS:
        return sum((values[one] for one in known), torch.zeros(shape, dtype=torch.float64))
    if len(known) > 1 or (node.target in DIVISIONS and operands[0] is not known[0]):
        return _unknown(graph, node, values)
    other = operands[1] if operands[0] is known[0] else operands[0]
    if isinstance(other, fx.Node):
        if other not in graph.constants:
            return _unknown(graph, node, values)
        other = graph.constants[other].double().cpu()
    size = abs(cast(Any, other))
    return values[known[0]] / size if node.target in DIVISIONS else values[known[0]] * size


def _unknown(graph: Graph, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """Zeros whose gradient is NaN: no importance goes through here."""
    inputs = [values[source] for source in node.all_input_nodes if source in values]
    parts = [part for item in inputs for part in (item if isinstance(item, list) else [item])]
    poison = sum(torch.nan * part.sum() for part in parts if isinstance(part, Tensor))
    meta = node.meta.get("val")
    if isinstance(meta, Tensor):
        return torch.zeros(graph.shape(node, ROWS), dtype=torch.float64) + poison
    # Several results; whichever is taken, one number that broadcasts will do for the gradient.
    return [poison] * len(cast(Sequence[Any], meta))


_RULES: dict[Any, Callable[[Graph, fx.Node, dict[fx.Node, Any]], Any]] = {
    **dict.fromkeys(STRUCTURE | LINEAR_POOLS, with_zeros),
    **dict.fromkeys((aten.cat.default, aten.constant_pad_nd.default), with_zeros),
    **dict.fromkeys(PRODUCTS | SUMS, _combined),
    **dict.fromkeys(ACTIVATIONS | SAME | {aten.neg.default}, _same),
    **dict.fromkeys(WEIGHTED, _weights),
    **dict.fromkeys((aten.max_pool1d.default, aten.max_pool2d.default), _max_pool),
    BATCH_NORM: _batch_norm,
    aten.amax.default: _maximum,
    operator.getitem: _item,
}
