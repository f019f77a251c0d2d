"""3 x 3 convolutions of deltas in float32 on a processor, by Winograd's minimal filtering.

What the model itself does by a sum over nine taps takes a quarter of the multiplications like this,
and ten times the rounding error: about 2e-5 of the largest sum of a tile, where predictions are
trusted beyond 5e-4 of a change. That bound is measured on pairs of the run as with any arithmetic.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, fx

from pyablate import _native, ops
from pyablate.engine.rule_context import Pairs
from pyablate.network.aten import two
from pyablate.network.graph import Graph, remembered, settings
from pyablate.ops import Activation, Quantized

aten = torch.ops.aten

GAINS = {32: 1.2, 64: 1.5, 128: 2.0, 256: 1.8, 512: 2.5}
"""How many times as fast as PyTorch's convolution and a pass for the activation it was measured to
be, by channels in and out, on one thread of an AMD EPYC with AVX2 (docs/development/notebook.md).
Written down, not measured anew: scores of screened runs and losses must not depend on a clock."""

LEAST_CHANNELS = 24
"""Geometric mean of input and output channels below which transforming costs what it saves."""

GAIN = 1.15
"""How many times as fast it has to be."""

SIDE = 4
"""Of a tile of outputs."""


def fits(pairs: Pairs, node: fx.Node, weight: Tensor) -> bool:
    """Whether a convolution is done like this: it can be, and it pays.

    Parameters
    ----------
    pairs : Pairs
        What is known of the slice.
    node : fx.Node
        The convolution.
    weight : Tensor
        ``[O, C, kh, kw]``.

    Returns
    -------
    bool
        Never on a GPU, whose libraries choose for themselves.
    """
    if pairs.image.device.type != "cpu" or not pairs.dtype == weight.dtype == torch.float32:
        return False
    return gain(pairs.graph, node) > 1.0


@functools.cache
def offered() -> bool:
    """Whether it is compiled for this processor, with vectors as wide as where it was measured."""
    return _native.core is not None and _native.core.build_info()["cpu_isa"] != "baseline"


@remembered
def gain(graph: Graph, node: fx.Node) -> float:
    """How many times as fast as by taps a convolution in float32 is done on a processor.

    By :data:`GAINS` at the size nearest to its own; 1 where it is not done like this.
    """
    weight = graph.constant(node, 1) if offered() else None
    if node.target is not aten.conv2d.default or weight is None or node.meta["val"].ndim != 4:
        return 1.0
    stride, _, dilation, groups = settings(node, 3, [1], [0], [1], 1)
    if list(weight.shape[2:]) != [3, 3] or groups != 1 or two(stride) + two(dilation) != [1] * 4:
        return 1.0
    outputs, height, width = graph.shape(node, 1)[1:]
    channels = math.sqrt(outputs * weight.shape[1])
    if channels < LEAST_CHANNELS or not height * width:
        return 1.0
    nearest = min(GAINS, key=lambda size: abs(math.log(size / channels)))
    tiles = math.ceil(height / SIDE) * math.ceil(width / SIDE)
    found = GAINS[nearest] * height * width / (SIDE**2 * tiles)
    return found if found >= GAIN else 1.0


def filters(pairs: Pairs, node: fx.Node, weight: Tensor) -> Tensor:
    """Transform filters, once."""
    transform = functools.partial(ops.winograd_filters, weight)
    return pairs.graph.prepared((node, "winograd"), transform)


def convolve(
    delta: Tensor,
    weight: Tensor,
    transformed: Tensor,
    image: Tensor,
    padding: int | list[int],
    *,
    activation: Activation | None = None,
    base: Tensor | None = None,
    addend: Tensor | None = None,
    quantized: Quantized | None = None,
) -> Tensor:
    """Convolve a delta, add another to it, and take it through the activation.

    Parameters
    ----------
    delta : Tensor
        float32 ``[P, C, H, W]``.
    weight, transformed : Tensor
        ``[O, C, 3, 3]`` and its :func:`filters`.
    image : Tensor
        ``[P]``, row of ``base`` for each pair.
    padding : int or list of int
        Of the convolution.
    activation, base, addend
        As in :func:`pyablate.ops.delta_winograd`.
    quantized : Quantized, optional
        Not filled here: full precision has none.

    Returns
    -------
    Tensor
        float32 ``[P, O, Ho, Wo]``.
    """
    assert quantized is None
    return ops.delta_winograd(
        delta,
        weight,
        transformed,
        padding=two(padding),
        activation=activation,
        base=base,
        image=None if base is None else image,
        addend=None if addend is None else addend.to(torch.float32),
    )
