"""Passes over a captured graph: how convolutions are padded, filters with channels last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from pyablate.network.graph import CONVOLUTIONS, PADS, Graph, aten, pads_with_zeros, settings


def _padded_by_number(convolve: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Give the decomposition of a convolution whose padding is called "same" or "valid".

    An even extent is padded by one more behind than in front, apart, as torch does it.
    """

    def run(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sequence[int] = (1,),
        padding: str = "valid",
        dilation: Sequence[int] = (1,),
        groups: int = 1,
    ) -> Tensor:
        sizes = weight.shape[2:]
        steps = [dilation[axis % len(dilation)] for axis in range(len(sizes))]
        both = [s * (n - 1) if padding == "same" else 0 for s, n in zip(steps, sizes, strict=True)]
        if any(margin % 2 for margin in both):
            behind = [side for margin in reversed(both) for side in (0, margin % 2)]
            x = aten.constant_pad_nd.default(x, behind)
        return convolve(x, weight, bias, stride, [margin // 2 for margin in both], steps, groups)

    return run


PADDED_BY_NUMBER: dict[Any, Callable[..., Tensor]] = {
    aten.conv1d.padding: _padded_by_number(aten.conv1d.default),
    aten.conv2d.padding: _padded_by_number(aten.conv2d.default),
    aten.conv3d.padding: _padded_by_number(aten.conv3d.default),
}
"""Decompositions after which every convolution is an operator that the rules know."""


def add_constant(graph: Graph, name: str, exact: Tensor, dtype: torch.dtype) -> fx.Node:
    """Give a graph a weight that is computed from others."""
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
            filters = add_constant(graph, f"{conv.name}_unpadded_weight", weight, dtype)
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
