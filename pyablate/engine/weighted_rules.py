"""Delta rules of layers with weights: convolutions, linear layers, batch norm."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, fx

from pyablate import ops
from pyablate.engine import int8_conv, pointwise, winograd
from pyablate.engine.channel_delta import ChannelDelta
from pyablate.engine.lazy_delta import Scaled, WaitingConvolution
from pyablate.engine.rule_context import (
    Delta,
    DenseDelta,
    Pairs,
    activation_behind,
    changing,
    dense,
    difference,
    readers_of,
)
from pyablate.network.aten import two
from pyablate.network.batch_norm import norm_scale
from pyablate.network.graph import (
    Graph,
    function,
    operand,
    remembered,
    settings,
    tensor,
)
from pyablate.ops import Quantized

aten = torch.ops.aten

Setting = int | list[int]
Geometry = tuple[Setting, Setting, Setting]
"""Stride, padding and dilation of a convolution as an operator was given them."""

LEAST_CHANNELS = 16
"""Input channels below which an 8-bit convolution is no faster than one in bfloat16."""

WORTH_GATHERING = 1 << 19
"""Weights of a linear layer from which on leaving out columns pays."""

LEAST_RUN = 48
"""Pairs of one image, on average, that pay for gathering its weights."""

MOST_ACTIVE = 0.75
"""Share of columns that change above which all are multiplied."""


def convolution(pairs: Pairs, node: fx.Node) -> Delta:
    """Convolve: one channel, quantized values, or dense."""
    source = operand(node)
    weight = pairs.graph.constant(node, 1)
    if weight is None or pairs.raw(source) is None:
        return difference(pairs, node)
    stride, padding, dilation, groups = settings(node, 3, [1], [0], [1], 1)
    delta = pairs.raw(source)
    plain = groups == 1 and node.target is aten.conv2d.default
    if isinstance(delta, ChannelDelta) and delta.axis == 1 and delta.inner == 1 and plain:
        return _first_convolution(pairs, node, delta, weight, (stride, padding, dilation))
    if pairs.eight_bit and takes_quantized(pairs.graph, node):
        return _quantized_convolution(pairs, node, weight, (stride, padding, dilation))
    convolve, lowered = function(node), _weight(pairs, node, weight)
    change = dense(pairs, source).to(lowered.dtype)
    if plain and _pointwise(pairs.graph, node):
        if pointwise.fits(pairs, node, weight):
            run = functools.partial(pointwise.convolve, change, lowered, pairs.image)
            return WaitingConvolution(run, True)
        if pointwise.by_products(change.device):
            return pointwise.product(change, lowered)
    if winograd.fits(pairs, node, weight):
        filters = winograd.filters(pairs, node, weight)
        run = functools.partial(winograd.convolve, change, weight, filters, pairs.image, padding)
        return run() if activation_behind(pairs, node) is None else WaitingConvolution(run, True)
    return tensor(convolve(change, lowered, None, stride, padding, dilation, groups))


@remembered
def takes_quantized(graph: Graph, node: fx.Node) -> bool:
    """Whether this convolution can run in 8 bits: constant filters, no groups, enough channels."""
    if node.target is not aten.conv2d.default:
        return False
    weight = graph.constant(node, 1)
    groups = settings(node, 6, 1)[0]
    if weight is None or groups != 1:
        return False
    return weight.shape[1] >= LEAST_CHANNELS


def _quantized_convolution(
    pairs: Pairs, node: fx.Node, weight: Tensor, geometry: Geometry
) -> Scaled:
    source = operand(node)
    quantized = pairs.quantized.get(source)
    if quantized is None:
        fine = _read_by_position(pairs.graph, source)
        quantized = ops.encode(dense(pairs, source), by_position=fine)
        pairs.quantized[source] = quantized
    values = quantized.values.contiguous(memory_format=torch.channels_last)

    def prepare() -> int8_conv.Filters:
        stride, padding, dilation = (two(value) for value in geometry)
        return int8_conv.prepare(weight, (stride, padding, dilation), list(values.shape))

    pairs.steps.append(_steps(quantized))
    result = int8_conv.convolve(values, pairs.graph.prepared((node, torch.int8), prepare))
    return Scaled(result, quantized.scale, fresh=len(readers_of(node)) == 1)


def _steps(quantized: Quantized) -> Tensor:
    """Return the step of each pair, ``[P]``: of positions the root of their mean square.

    Roundings are independent, so that sums of them grow like that. What a maximum makes of a single
    one is in the factor that is measured (``gain`` of the precision cascade).
    """
    if not quantized.by_position:
        return quantized.scale
    squares = quantized.scale.double().square()  # in which the least do not vanish
    return squares.flatten(1).mean(dim=1).sqrt().float()


@remembered
def _read_by_position(graph: Graph, node: fx.Node) -> bool:
    """Whether all 8-bit convolutions that read a node read one position for each that they give."""
    readers = [reader for reader in readers_of(node) if takes_quantized(graph, reader)]
    return bool(readers) and all(_pointwise(graph, reader) for reader in readers)


@remembered
def _pointwise(graph: Graph, node: fx.Node) -> bool:
    weight = graph.constant(node, 1)
    stride, padding = settings(node, 3, [1], [0])[:2]
    kernel = None if weight is None else list(weight.shape[2:])
    return kernel == [1, 1] and two(stride) == [1, 1] and two(padding) == [0, 0]


def new_quantized(
    pairs: Pairs, node: fx.Node, layout: torch.memory_format, *, by_position: bool = False
) -> Quantized | None:
    """Memory for the quantized values of a node's delta, if an 8-bit convolution will read them.

    With a factor for each position where that is allowed, and read by 1 x 1 convolutions alone.
    """
    reads = [takes_quantized(pairs.graph, reader) for reader in readers_of(node)]
    if not pairs.eight_bit or not any(reads):
        return None
    shape = pairs.graph.shape(node, len(pairs.image))
    fine = by_position and layout == torch.channels_last and _read_by_position(pairs.graph, node)
    quantized = Quantized.empty(
        shape, layout, pairs.image.device, alone=all(reads), by_position=fine
    )
    pairs.quantized[node] = quantized
    return quantized


def _weight(pairs: Pairs, node: fx.Node, weight: Tensor) -> Tensor:
    """Weights in the precision of the dense arithmetic, converted once."""
    if pairs.dtype == weight.dtype:
        return weight

    def lower() -> Tensor:
        exact = weight
        if node is pairs.graph.logits:
            # What all logits share decides nothing, and must not cost their difference digits.
            exact = weight.double() - weight.double().mean(dim=0)
        return exact.to(pairs.dtype)

    return pairs.graph.prepared((node, pairs.dtype), lower)


def _first_convolution(
    pairs: Pairs, node: fx.Node, delta: ChannelDelta, weight: Tensor, geometry: Geometry
) -> Tensor | WaitingConvolution:
    """Convolve one input channel per pair: 1/C of the work."""
    filters = _by_input(pairs.graph, node, weight.permute(1, 2, 3, 0))
    run = functools.partial(_single_channel, pairs, delta, delta.values, filters, geometry)
    # A shortcut that is added in between mostly stands still.
    return WaitingConvolution(run) if activation_behind(pairs, node) is not None else run()


def fully_connected(pairs: Pairs, node: fx.Node) -> DenseDelta:
    """Multiply by the weights: the columns of one channel, those that change, or all."""
    source = operand(node)
    weight = pairs.graph.constant(node, 1)
    delta = pairs.raw(source)
    if weight is None or changing(pairs, node) != [source]:  # a bias may have a row per image
        return difference(pairs, node)
    lowered = _weight(pairs, node, weight)
    if isinstance(delta, ChannelDelta) and delta.axis == source.meta["val"].ndim - 1:
        return _first_linear(pairs, node, delta, weight, lowered.dtype)
    change = dense(pairs, source).to(lowered.dtype)
    runs = _runs(pairs, change, lowered) if pairs.plain(node) else None
    if runs is None:
        return tensor(aten.linear.default(change, lowered))
    rows = _by_input(pairs.graph, node, lowered.t())
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
    pairs: Pairs, node: fx.Node, delta: ChannelDelta, weight: Tensor, dtype: torch.dtype
) -> Tensor:
    """Only the columns of the changed channel count: a convolution over its entries."""
    blocks = weight.unflatten(1, (1, delta.size, delta.inner))  # [O, 1, C, inner]
    filters = _by_input(pairs.graph, node, blocks.permute(2, 1, 3, 0))
    values = delta.values.to(dtype)  # [N, U, inner], or [N, U, *rest] with one entry per position
    maps = values.reshape(*values.shape[:2], 1, -1)
    out = _single_channel(pairs, delta, maps, filters).permute(0, 2, 3, 1)
    rest = values.shape[2:] if delta.inner == 1 else ()
    return out.reshape(len(out), *rest, len(weight))


def _by_input(graph: Graph, node: fx.Node, filters: Tensor) -> Tensor:
    """Lay filters out by input channel, ``[I, kh, kw, O]``, once."""
    # A linear map may be seen by maps or by single numbers.
    return graph.prepared((node, filters.dtype, filters.shape), filters.contiguous)


def _single_channel(
    pairs: Pairs,
    delta: ChannelDelta,
    maps: Tensor,
    filters: Tensor,
    geometry: Geometry = (1, 0, 1),
    *,
    activation: ops.Activation | None = None,
    base: Tensor | None = None,
    quantized: Quantized | None = None,
) -> Tensor:
    """Convolve each pair's one changed map ``[H, W]`` of ``maps`` ``[N, U, H, W]``."""
    stride, padding, dilation = geometry
    return ops.unit_delta(
        maps,
        filters,
        delta.channel.to(torch.int32),
        pairs.image,
        pairs.column.to(torch.int32),
        stride=stride,
        padding=padding,
        dilation=dilation,
        activation=activation,
        base=base,
        quantized=quantized,
    )


def batch_norm(pairs: Pairs, node: fx.Node) -> DenseDelta:
    """Scale; the shift drops out."""
    source = operand(node)
    scale = norm_scale(pairs.graph, node)[0]
    delta = dense(pairs, source)
    shape = (1, -1, *[1] * (delta.ndim - 2))
    return [delta * scale.to(delta.dtype).reshape(shape), None, None]
