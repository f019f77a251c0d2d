"""What becomes of a graph once it is captured: fewer nodes, filters in the layout that is fast."""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch import Tensor, fx

from pyablate.network.graph import (
    BATCH_NORM,
    CONVOLUTIONS,
    PADS,
    Graph,
    aten,
    norm_scale,
    pads_with_zeros,
    settings,
)


def fold_batch_norm(graph: Graph) -> None:
    """Scale the filters of a convolution by the batch norm that alone reads it."""
    for node in list(graph.graph.nodes):
        if node.target is not BATCH_NORM:
            continue
        conv = node.args[0]
        value = next((user for user in node.users if user.target is operator.getitem), None)
        foldable = (
            value is not None
            and len(node.users) == 1
            and len(conv.users) == 1
            and conv.target in CONVOLUTIONS
            and conv.args[1] in graph.constants
            and (len(conv.args) < 3 or conv.args[2] is None or conv.args[2] in graph.constants)
        )
        if foldable:
            _fold(graph, conv, node)
            cast(fx.Node, value).replace_all_uses_with(conv)
            graph.graph.erase_node(cast(fx.Node, value))
            graph.graph.erase_node(node)


def _fold(graph: Graph, conv: fx.Node, norm: fx.Node) -> None:
    scale, shift = norm_scale(graph, norm)
    weight = cast(fx.Node, conv.args[1])
    dtype = graph.constants[weight].dtype
    bias = conv.args[2] if len(conv.args) > 2 else None
    old = graph.in_double(bias) if isinstance(bias, fx.Node) else 0.0
    filters = graph.in_double(weight)
    folded = filters * scale.reshape(-1, *[1] * (filters.ndim - 1))
    new_weight = _add_constant(graph, f"{conv.name}_folded_weight", folded, dtype)
    new_bias = _add_constant(graph, f"{conv.name}_folded_bias", old * scale + shift, dtype)
    conv.args = (conv.args[0], new_weight, new_bias, *conv.args[3:])


def _add_constant(graph: Graph, name: str, exact: Tensor, dtype: torch.dtype) -> fx.Node:
    with graph.graph.inserting_before(graph.images):
        node = graph.graph.placeholder(name)
    node.meta["val"] = graph.constants[node] = exact.to(dtype)
    graph.unrounded[node] = exact
    return node


def fold_padding(graph: Graph) -> None:
    """Let convolutions do the zero padding in front of them; networks from TensorFlow pad apart."""
    for pad in list(graph.graph.nodes):
        if pad.target not in PADS or not pads_with_zeros(pad):
            continue
        readers = list(pad.users)
        unpadded = [_unpadded(graph, conv, pad) for conv in readers]
        if not readers or None in unpadded:
            continue
        for conv, (weight, padding) in zip(readers, filter(None, unpadded), strict=True):
            dtype = graph.constants[conv.args[1]].dtype
            filters = _add_constant(graph, f"{conv.name}_unpadded_weight", weight, dtype)
            bias, stride = settings(conv, 2, None, [1])[:2]
            conv.args = (pad.args[0], filters, bias, stride, padding, *conv.args[5:])
        graph.graph.erase_node(pad)


def _unpadded(graph: Graph, conv: fx.Node, pad: fx.Node) -> tuple[Tensor, list[int]] | None:
    """Give filters and symmetric padding with which a convolution needs no padded input.

    Padding that is wider behind than in front becomes symmetric with zeros in front of the filter.
    """
    margins = [int(m) for m in cast(list[int], pad.args[1])]
    if conv.target is not aten.conv2d.default or graph.constant(conv, 1) is None:
        return None
    weight = graph.in_double(cast(fx.Node, conv.args[1]))
    if len(margins) != 4 or min(margins) < 0 or conv.args[0] is not pad:
        return None
    stride, padding, dilation = settings(conv, 3, [1], [0], [1])[:3]
    if isinstance(padding, str):
        return None
    size = cast(fx.Node, pad.args[0]).meta["val"].shape[2:]
    symmetric, zeros = [], [0, 0, 0, 0]
    for i in (0, 1):
        own, step = (value[i % len(value)] for value in (padding, dilation))
        before, after = (m + own for m in margins[2 - 2 * i : 4 - 2 * i])
        width = max(before, after)
        shift, rest = divmod(width - before, step)
        reach = step * (weight.shape[2 + i] + shift - 1) + 1
        out = (int(size[i]) + 2 * width - reach) // stride[i % len(stride)] + 1
        if rest or out != int(conv.meta["val"].shape[2 + i]):
            return None
        symmetric.append(width)
        zeros[2 - 2 * i] = shift
    return (torch.nn.functional.pad(weight, zeros) if any(zeros) else weight), symmetric


def channels_last(graph: Graph) -> None:
    """Give 4-D filters the layout in which convolutions need no reordering."""
    for node in graph.graph.nodes:
        if node.target in CONVOLUTIONS:
            weight = graph.constants.get(node.args[1])
            if weight is not None and weight.ndim == 4:
                last = weight.contiguous(memory_format=torch.channels_last)
                graph.constants[node.args[1]] = last
