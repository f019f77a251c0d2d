"""Delta rules of layers with weights: convolutions, linear layers, batch norm."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx

from pyablate import ops
from pyablate.engine import int8_conv
from pyablate.engine.channel_delta import Channel
from pyablate.engine.lazy_delta import FirstMap, Scaled
from pyablate.engine.rule_context import Pairs, changing, difference, only_reader, readers_of
from pyablate.network.aten import SUMS, named_activation, two
from pyablate.network.batch_norm import norm_scale
from pyablate.network.graph import Graph, function, remembered, settings
from pyablate.ops import Codes

aten = torch.ops.aten


LEAST_CHANNELS = 16
"""Input channels below which an 8-bit convolution is no faster than one in bfloat16."""

WORTH_GATHERING = 1 << 19
"""Weights of a linear layer from which on leaving out columns pays."""

LEAST_RUN = 48
"""Pairs of one image, on average, that pay for gathering its weights."""

MOST_ACTIVE = 0.75
"""Share of columns that change above which all are multiplied."""


def convolution(pairs: Pairs, node: fx.Node) -> Any:
    """Convolve: one channel, codes, or dense."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    weight = pairs.graph.constant(node, 1)
    if weight is None or pairs.raw(source) is None:
        return difference(pairs, node)
    stride, padding, dilation, groups = settings(node, 3, [1], [0], [1], 1)
    delta = pairs.raw(source)
    single = isinstance(delta, Channel) and delta.axis == 1 and delta.inner == 1
    if single and groups == 1 and node.target is aten.conv2d.default:
        return _first_convolution(pairs, node, delta, weight, (stride, padding, dilation))
    if pairs.eight_bit and takes_codes(pairs.graph, node):
        return _coded_convolution(pairs, node, weight, (stride, padding, dilation))
    convolve, lowered = function(node), _weight(pairs, node, weight)
    change = pairs.delta(source).to(lowered.dtype)
    return convolve(change, lowered, None, stride, padding, dilation, groups)


@remembered
def takes_codes(graph: Graph, node: fx.Node) -> bool:
    """Whether this convolution can run in 8 bits: constant filters, no groups, enough channels."""
    if node.target is not aten.conv2d.default:
        return False
    weight = graph.constant(node, 1)
    padding, groups = settings(node, 3, [1], [0], [1], 1)[1::2]
    if weight is None or groups != 1 or isinstance(padding, str):
        return False
    return weight.shape[1] >= LEAST_CHANNELS


def _coded_convolution(
    pairs: Pairs, node: fx.Node, weight: Tensor, geometry: tuple[Any, Any, Any]
) -> Scaled:
    source = cast(fx.Node, node.args[0])
    codes = pairs.codes.get(source)
    if codes is None:
        codes = pairs.codes[source] = ops.encode(pairs.delta(source))
    values = codes.values.contiguous(memory_format=torch.channels_last)
    if "filters" not in node.meta:
        stride, padding, dilation = (two(value) for value in geometry)
        size = list(values.shape)
        node.meta["filters"] = int8_conv.prepare(weight, (stride, padding, dilation), size)
    pairs.steps.append(codes.scale)
    result = int8_conv.convolve(values, node.meta["filters"])
    return Scaled(result, codes.scale, fresh=len(readers_of(node)) == 1)


def new_codes(pairs: Pairs, node: fx.Node, layout: torch.memory_format) -> Codes | None:
    """Memory for the codes of a node's delta, if an 8-bit convolution will read them."""
    coded = [takes_codes(pairs.graph, reader) for reader in readers_of(node)]
    if not pairs.eight_bit or not any(coded):
        return None
    shape = pairs.graph.shape(node, len(pairs.image))
    codes = Codes.empty(shape, layout, pairs.image.device, alone=all(coded))
    pairs.codes[node] = codes
    return codes


def _weight(pairs: Pairs, node: fx.Node, weight: Tensor) -> Tensor:
    """Weights in the precision of the dense arithmetic, converted once."""
    if pairs.dtype == weight.dtype:
        return weight
    held: dict[torch.dtype, Tensor] = node.meta.setdefault("weight", {})
    if pairs.dtype not in held:
        if node is pairs.graph.logits:
            # What all logits share decides nothing, and must not cost their difference digits.
            weight = weight.double() - weight.double().mean(dim=0)
        held[pairs.dtype] = weight.to(pairs.dtype)
    return held[pairs.dtype]


def _first_convolution(
    pairs: Pairs, node: fx.Node, delta: Channel, weight: Tensor, geometry: tuple[Any, Any, Any]
) -> Tensor | FirstMap:
    """Convolve one input channel per pair: 1/C of the work."""
    stride, padding, dilation = geometry
    filters = _by_input(node, weight.permute(1, 2, 3, 0))

    def run(**fused: Any) -> Tensor:
        geometry = {"stride": stride, "padding": padding, "dilation": dilation}
        return _single_channel(pairs, delta, delta.values, filters, **geometry, **fused)

    reader = only_reader(node)
    if reader is not None and reader.target in SUMS:
        reader = only_reader(reader)  # with a shortcut that mostly stands still
    waits = reader is not None and named_activation(reader) is not None and pairs.plain(node)
    return FirstMap(run) if waits else run()


def fully_connected(pairs: Pairs, node: fx.Node) -> Any:
    """Multiply by the weights: the columns of one channel, those that change, or all."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    weight = pairs.graph.constant(node, 1)
    delta = pairs.raw(source)
    if weight is None or changing(pairs, node) != [source]:  # a bias may have a row per image
        return difference(pairs, node)
    dense = _weight(pairs, node, weight)
    if isinstance(delta, Channel) and delta.axis == source.meta["val"].ndim - 1:
        return _first_linear(pairs, node, delta, weight, dense.dtype)
    change = pairs.delta(source).to(dense.dtype)
    runs = _runs(pairs, change, dense) if pairs.plain(node) else None
    if runs is None:
        return aten.linear.default(change, dense)
    rows = _by_input(node, dense.t())
    return torch.cat([_active_columns(run, rows) for run in change.split(runs)])


def _runs(pairs: Pairs, change: Tensor, weight: Tensor) -> list[int] | None:
    """Pairs of each image in turn, where leaving out what no pair of an image changes pays.

    Behind an activation most features stand still, nearly the same ones in all pairs of an image.
    Gathering the rest of the weights costs as much as a few dozen pairs; on a GPU the number of
    features would have to be waited for.
    """
    if change.ndim != 2 or change.device.type != "cpu" or weight.numel() < WORTH_GATHERING:
        return None
    runs = torch.unique_consecutive(pairs.image, return_counts=True)[1].tolist()
    return runs if len(change) >= LEAST_RUN * len(runs) else None


def _active_columns(change: Tensor, rows: Tensor) -> Tensor:
    """Multiply ``[P, J]`` by ``[J, K]``, of which only columns of ``change`` that are not zero."""
    active = change.abs().amax(dim=0).nonzero().squeeze(1)
    if len(active) > MOST_ACTIVE * len(rows):
        return change @ rows
    # gather: four times as fast as index_select along rows of bfloat16.
    kept = change.gather(1, active.expand(len(change), -1))
    return kept @ rows.index_select(0, active)


def _first_linear(
    pairs: Pairs, node: fx.Node, delta: Channel, weight: Tensor, dtype: torch.dtype
) -> Tensor:
    """Only the columns of the changed channel count: a convolution over its entries."""
    blocks = weight.unflatten(1, (1, delta.size, delta.inner))  # [O, 1, C, inner]
    filters = _by_input(node, blocks.permute(2, 1, 3, 0))
    values = delta.values.to(dtype)  # [N, U, inner], or [N, U, *rest] with one entry per position
    maps = values.reshape(*values.shape[:2], 1, -1)
    out = _single_channel(pairs, delta, maps, filters).permute(0, 2, 3, 1)
    rest = values.shape[2:] if delta.inner == 1 else ()
    return out.reshape(len(out), *rest, len(weight))


def _by_input(node: fx.Node, filters: Tensor) -> Tensor:
    """Lay filters out by input channel, ``[I, kh, kw, O]``, once."""
    held: dict[Any, Tensor] = node.meta.setdefault("by_input", {})
    key = (filters.dtype, filters.shape)  # a linear map may be seen by maps or by single numbers
    if key not in held:
        held[key] = filters.contiguous()
    return held[key]


def _single_channel(
    pairs: Pairs, delta: Channel, maps: Tensor, filters: Tensor, **geometry: Any
) -> Tensor:
    """Convolve each pair's one changed map ``[H, W]`` of ``maps`` ``[N, U, H, W]``."""
    channel, column = delta.channel.to(torch.int32), pairs.column.to(torch.int32)
    return ops.unit_delta(maps, filters, channel, pairs.image, column, **geometry)


def batch_norm(pairs: Pairs, node: fx.Node) -> Any:
    """Scale; the shift drops out."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    scale = norm_scale(pairs.graph, node)[0]
    delta = pairs.delta(source)
    shape = (1, -1, *[1] * (delta.ndim - 2))
    return [delta * scale.to(delta.dtype).reshape(shape), None, None]
