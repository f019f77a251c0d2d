"""Channel tracking: which filters make a unit, and which weights read it, in a captured network.

Every channel of a tensor gets a number of its own, its tag, and the tags are carried along the
graph through everything that keeps channels apart: activations, norms, pools, sums, views. Where
a tag arrives at weights or at a site, it says which channel became which, however the network
splits, joins, flattens or shuffles its channels in between.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from pyablate.network.aten import (
    DIVISIONS,
    ELEMENTWISE,
    LINEAR_POOLS,
    MAX_POOLS,
    NAMED,
    SAME,
    STRUCTURE,
    SUMS,
)
from pyablate.network.graph import BATCH_NORM, CONVOLUTIONS, MARKER, Graph, function

aten = torch.ops.aten

ACTIVATIONS = ELEMENTWISE | NAMED | {aten.prelu.default}
NORMS = frozenset({aten.layer_norm.default, aten.group_norm.default})
PRODUCTS = frozenset({aten.mul.Tensor, aten.mul.Scalar}) | DIVISIONS
WEIGHTED = CONVOLUTIONS | {aten.linear.default}
AVERAGES = frozenset({aten.mean.dim, aten.sum.dim_IntList, aten.amax.default})
ROWS = 2  # images of the tagged tensors; networks may squeeze a single one away


@dataclass(frozen=True)
class Tagged:
    """A tensor that carries tags: 0 where it holds none, NaN where two meet.

    ``tags`` are float64, in the shape of the node's tensor for two images; ``activations`` counts
    those passed on the way, and ``summed`` tells of a sum with something else.
    """

    tags: Tensor
    activations: int = 0
    summed: bool = False


def weighted(graph: Graph) -> list[fx.Node]:
    """Convolutions and linear maps whose weights are constants, in order."""
    return [
        node
        for node in graph.graph.nodes
        if node.target in WEIGHTED and graph.constant(node, 1) is not None
    ]


def channel_axis(node: fx.Node) -> int:
    """Axis of the output of weights or batch norm that holds their channels."""
    if node.target is aten.linear.default:
        return cast(int, node.meta["val"].ndim) - 1
    return 1


def follow(
    graph: Graph, start: fx.Node, axis: int, onwards: Callable[[fx.Node, Tagged], bool]
) -> dict[fx.Node, Tagged]:
    """Carry one tag per channel of ``start`` (from 1 on) as far as channels stay apart.

    ``onwards`` is told a node and what arrived there, and says whether to go on behind it. Returns
    what arrived at each node: the tags of its output; for weights, which are not passed, those of
    their input.
    """
    shape = graph.shape(start, ROWS)
    line = [1] * len(shape)
    line[axis] = -1
    tags = torch.arange(1, shape[axis] + 1, dtype=torch.float64).reshape(line).expand(shape)
    found: dict[fx.Node, Any] = {start: Tagged(tags)}
    open_ends = {start}
    behind = False
    for node in graph.graph.nodes:
        behind = behind or node is start
        sources = [source for source in node.all_input_nodes if source in open_ends]
        if node is start or not behind or not sources:
            continue
        arrived = _step(graph, node, {source: found[source] for source in sources})
        if arrived is None:
            continue
        found[node] = arrived
        if node.target not in WEIGHTED and onwards(node, arrived):
            open_ends.add(node)
    return found


def tags_along(tagged: Tagged, axis: int) -> Tensor:
    """Tag of each entry of an axis, int64: 0 where there is none, -1 where several meet."""
    rows = tagged.tags.movedim(axis, 0).flatten(1)
    top = rows.amax(dim=1)  # NaN where tags have met
    mixed = top.isnan() | ((rows != 0) & (rows != top.unsqueeze(1))).any(dim=1)
    mixed |= top != top.round()
    return torch.where(mixed, -1.0, top).long()


def _step(graph: Graph, node: fx.Node, inputs: dict[fx.Node, Tagged]) -> Tagged | None:
    """Carry the tags through one node; None where channels mix or nothing is known."""
    first = next(iter(inputs.values()))
    target = node.target
    if target in WEIGHTED:
        return inputs.get(cast(fx.Node, node.args[0]))
    if target in SAME or target in NORMS or target is BATCH_NORM:
        return first if node.args[0] in inputs else None
    if target is operator.getitem:
        return _item(graph, node, first)
    if target in ACTIVATIONS:
        return Tagged(first.tags, first.activations + 1, first.summed)
    if target in LINEAR_POOLS or target in MAX_POOLS:
        return _pooled(graph, node, first)
    if target in SUMS or target in PRODUCTS:
        return _joined(graph, node, inputs)
    if target in AVERAGES:
        return _averaged(graph, node, first)
    if target in STRUCTURE or target in (aten.cat.default, aten.constant_pad_nd.default):
        return _evaluated(graph, node, inputs)
    return None


def _item(graph: Graph, node: fx.Node, first: Tagged) -> Tagged | None:
    """One of several results: the only one of batch norm, or one part of a split tensor."""
    source = node.all_input_nodes[0]
    if source.target is BATCH_NORM:
        return first if node.args[1] == 0 else None
    parts = with_zeros(graph, source, {source.all_input_nodes[0]: first.tags})
    return Tagged(parts[cast(int, node.args[1])], first.activations, first.summed)


def _pooled(graph: Graph, node: fx.Node, first: Tagged) -> Tagged:
    """Give all positions of a channel its tag, whatever the pool does with them."""
    shape = graph.shape(node, ROWS)
    dims = list(range(2, len(shape)))
    return Tagged(_common(first.tags, dims).expand(shape), first.activations, first.summed)


def _averaged(graph: Graph, node: fx.Node, first: Tagged) -> Tagged:
    given = node.args[1] if len(node.args) > 1 else None
    dims = [given] if isinstance(given, int) else list(cast(Sequence[int], given or ()))
    dims = dims or list(range(first.tags.ndim))
    common = _common(first.tags, [dim % first.tags.ndim for dim in dims])
    return Tagged(common.reshape(graph.shape(node, ROWS)), first.activations, first.summed)


def _common(tags: Tensor, dims: list[int]) -> Tensor:
    """Find the one tag along some axes, NaN where there are several."""
    top, low = tags.amax(dim=dims, keepdim=True), tags.amin(dim=dims, keepdim=True)
    return torch.where(top == low, top, torch.nan)


def _joined(graph: Graph, node: fx.Node, inputs: dict[fx.Node, Tagged]) -> Tagged | None:
    """Sum or product of a tagged tensor and another."""
    shape = graph.shape(node, ROWS)
    others = [n for n in node.all_input_nodes if n not in inputs and n not in graph.constants]
    tagged = list(inputs.values())
    if node.target in DIVISIONS and node.args[0] not in inputs:
        return None
    if any(one.tags.numel() < torch.Size(shape).numel() for one in tagged):
        tagged = [one for one in tagged if list(one.tags.shape) == shape]  # a gate has no say
        if not tagged:
            return None
    tags = tagged[0].tags
    for one in tagged[1:]:
        tags = torch.where(one.tags == tags, tags, torch.nan)
    more = len(node.all_input_nodes) == 2 and (bool(others) or len(tagged) > 1)
    summed = more and node.target in SUMS
    return Tagged(
        tags,
        max(one.activations for one in tagged),
        summed or any(one.summed for one in tagged),
    )


def _evaluated(graph: Graph, node: fx.Node, inputs: dict[fx.Node, Tagged]) -> Tagged:
    """Do with tags what views, joins and pads do with values."""
    first = next(iter(inputs.values()))
    out = with_zeros(graph, node, {source: one.tags for source, one in inputs.items()})
    if isinstance(out, (list, tuple)):  # the part that is wanted is cut out by getitem
        return first
    activations = max(one.activations for one in inputs.values())
    return Tagged(out, activations, any(one.summed for one in inputs.values()))


def with_zeros(graph: Graph, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """Evaluate a node on values of ``ROWS`` images, with zeros for tensors that have none."""

    def value(source: fx.Node) -> Any:
        size = graph.size(source, ROWS)
        if size is not None:
            return size
        if source in values:
            return values[source]
        return torch.zeros(graph.shape(source, ROWS), dtype=torch.float64)

    args = fx.node.map_arg(node.args, value)
    return function(node)(*args, **fx.node.map_arg(node.kwargs, value))


@dataclass(frozen=True)
class Link:
    """Weights that make or read units.

    Attributes
    ----------
    node : fx.Node
        Convolution, linear map or batch norm.
    channel : Tensor
        int64. Of makers ``[units]``: the node's output channel that became each unit; of readers
        ``[input channels]``: the unit that each input channel is. -1 where there is none, -2
        where several have been mixed.
    summed : bool
        Whether a sum with something else lies between.
    """

    node: fx.Node
    channel: Tensor
    summed: bool


def makers(graph: Graph, starts: Sequence[fx.Node], axes: dict[str, int]) -> dict[str, list[Link]]:
    """Links from weights or batch norms, ``starts``, to the sites that their channels become.

    Batch norm must not be folded; ``axes`` gives the axis of each site's units by name. A way ends
    at the second activation function, and behind the first one at a sum: what is added there
    belongs to an earlier unit, which has been activated already.
    """

    def onwards(node: fx.Node, arrived: Tagged) -> bool:
        return arrived.activations < 1 or (arrived.activations == 1 and node.target not in SUMS)

    found: dict[str, list[Link]] = {name: [] for name in axes}
    for start in starts:
        for node, arrived in follow(graph, _output(start), channel_axis(start), onwards).items():
            if node.target is MARKER and arrived.activations <= 1 and node.args[1] in axes:
                name = cast(str, node.args[1])
                _add(graph, found[name], start, tags_along(arrived, axes[name]), arrived.summed)
    return found


def readers(graph: Graph, name: str, axis: int) -> list[Link]:
    """Links from a site to the weights that read its units first.

    A way ends behind a sum at the next activation function: what follows reads other units. Where
    some weights are reached without a sum, those behind sums are left out.
    """

    def onwards(_node: fx.Node, arrived: Tagged) -> bool:
        return not (arrived.summed and arrived.activations)

    links: list[Link] = []
    for marker in graph.markers:
        if marker.args[1] != name:
            continue
        for node, arrived in follow(graph, marker, axis, onwards).items():
            legal = node.target in WEIGHTED and graph.constant(node, 1) is not None
            if legal and onwards(node, arrived):
                linear = node.target is aten.linear.default
                tags = tags_along(arrived, arrived.tags.ndim - 1 if linear else 1)
                _add(graph, links, node, tags, arrived.summed)
    direct = [link for link in links if not link.summed]
    return direct or links


def _output(node: fx.Node) -> fx.Node:
    """Return the node that holds the tensor: batch norm returns several."""
    if node.target is not BATCH_NORM:
        return node
    return next(user for user in node.users if user.args[1] == 0)


def _add(graph: Graph, links: list[Link], node: fx.Node, tags: Tensor, summed: bool) -> None:
    """Note a link once: a module that is called twice has one set of weights."""
    if bool((tags > 0).any()) or bool((tags < 0).any()):
        same = [link for link in links if graph.constant(link.node, 1) is graph.constant(node, 1)]
        if not any(torch.equal(link.channel, tags - 1) for link in same):
            links.append(Link(node, tags - 1, summed))
