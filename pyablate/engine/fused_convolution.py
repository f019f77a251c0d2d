"""Convolutions of deltas with what follows in one pass: residual sum and ReLU's difference.

Between two convolutions a delta crosses a GPU's memory four times: written, read and written by the
activation, read again. Here the product's own epilogue does the activation. The kernel is in
Triton, which comes with PyTorch on CUDA; where it is missing, or measured to be no faster than the
two steps one after the other, they are what runs.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import functional

from pyablate import ops
from pyablate.engine import microbenchmarks
from pyablate.engine.rule_context import (
    Pairs,
    activation_behind,
    only_reader,
    reader_behind_sum,
)
from pyablate.network.aten import two
from pyablate.ops import Activation, Quantized

logger = logging.getLogger("pyablate")

Setting = int | list[int]
Geometry = tuple[Setting, Setting, Setting]
"""Stride, padding and dilation of a convolution as an operator was given them."""

RELU = Activation("relu")

aten = torch.ops.aten

POOLS = {aten.max_pool2d.default, aten.adaptive_avg_pool2d.default, aten.mean.dim}
"""What may do the activation before it in its own pass."""


class Size(NamedTuple):
    """Of a convolution at which both ways are timed.

    Attributes
    ----------
    inputs, outputs : int
        Channels.
    side : int
        Of the maps that it reads.
    kernel, stride : int
        On both axes.
    """

    inputs: int
    outputs: int
    side: int
    kernel: int = 1
    stride: int = 1


MEASURED = (
    Size(64, 64, 56),
    Size(256, 64, 56),
    Size(64, 256, 56),
    Size(512, 128, 28),
    Size(256, 1024, 14),
    Size(64, 64, 56, 3),
    Size(128, 128, 28, 3),
    Size(256, 256, 14, 3),
    Size(512, 512, 7, 3),
    Size(128, 128, 56, 3, 2),
)

GAIN = 1.05
"""How many times as fast it has to be for others of that size to be done like that."""

NUMBERS = 1 << 27
"""Numbers of a delta to measure with, about: what a slice on a GPU has."""


def fits(pairs: Pairs, node: fx.Node, weight: Tensor, stride: Setting) -> bool:
    """Whether only ReLU reads a convolution, perhaps after a sum, and doing both at once pays.

    Parameters
    ----------
    pairs : Pairs
        What is known of the slice.
    node : fx.Node
        The convolution, without groups.
    weight : Tensor
        ``[O, C, kh, kw]``.
    stride : int or list of int
        Of the convolution.

    Returns
    -------
    bool
        Never on a CPU.
    """
    device = pairs.image.device
    if not offered(device) or pairs.dtype != torch.bfloat16:
        return False
    if activation_behind(pairs, node) != RELU or _pooled(node):
        return False
    return nearest(weight, stride) in worthwhile(device)


def _pooled(node: fx.Node) -> bool:
    """Whether a pooling alone reads the activation behind: there is nothing to be saved then."""
    reader = reader_behind_sum(node)
    pooling = None if reader is None else only_reader(reader)
    return pooling is not None and pooling.target in POOLS


def convolve(
    delta: Tensor,
    weight: Tensor,
    image: Tensor,
    geometry: Geometry,
    *,
    activation: Activation | None = None,
    base: Tensor | None = None,
    addend: Tensor | None = None,
    quantized: Quantized | None = None,
) -> Tensor:
    """Convolve a delta, add another to it, and take it through ReLU.

    Parameters
    ----------
    delta : Tensor
        ``[P, C, H, W]``.
    weight : Tensor
        ``[O, C, kh, kw]``, dtype of ``delta``.
    image : Tensor
        int32 ``[P]``, row of ``base`` for each pair.
    geometry : tuple
        Stride, padding and dilation.
    activation : Activation, optional
        ReLU. Without, only convolution and sum are done, by PyTorch.
    base : Tensor, optional
        ``[N, O, Ho, Wo]``, clean input of the activation, bfloat16 or float32.
    addend : Tensor, optional
        ``[P, O, Ho, Wo]``.
    quantized : Quantized, optional
        Not filled here: 8 bits are not for GPUs.

    Returns
    -------
    Tensor
        ``[P, O, Ho, Wo]``.
    """
    assert quantized is None
    if activation is None or base is None:
        result = functional.conv2d(delta, weight, None, *geometry)
        return result if addend is None else result + addend
    return one_pass(delta, weight, image, base, addend, geometry)


def one_pass(
    delta: Tensor,
    weight: Tensor,
    image: Tensor,
    base: Tensor,
    addend: Tensor | None = None,
    geometry: Geometry = (1, 0, 1),
) -> Tensor:
    """Convolve, add and go through ReLU by the Triton kernel."""
    from pyablate.engine.fused_convolution_kernel import launch

    last = torch.channels_last
    delta, weight, base = (t.contiguous(memory_format=last) for t in (delta, weight, base))
    if addend is not None:
        addend = addend.to(delta.dtype).contiguous(memory_format=last)
    shape = (len(delta), *base.shape[1:])
    out = torch.empty(shape, dtype=delta.dtype, device=delta.device, memory_format=last)
    launch(delta, weight, image, base, addend, out, [two(value) for value in geometry])
    return out


def stepwise(
    delta: Tensor,
    weight: Tensor,
    image: Tensor,
    base: Tensor,
    addend: Tensor | None = None,
    geometry: Geometry = (1, 0, 1),
) -> Tensor:
    """Do the same by a convolution and a pass."""
    result = functional.conv2d(delta, weight, None, *geometry)
    addend = None if addend is None else addend.to(result.dtype)
    return ops.delta_activation(base, result, image, RELU, addend=addend, out=result)


def offered(device: torch.device) -> bool:
    """Whether there is a choice: a GPU, and Triton installed."""
    return device.type == "cuda" and _installed()


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None  # asked for at every convolution


def nearest(weight: Tensor, stride: Setting) -> Size:
    """Return the size of :data:`MEASURED` that stands for a convolution.

    Kernels are compared first, then strides, then channels.
    """
    outputs, inputs, *kernel = weight.shape

    def apart(one: float, other: float) -> float:
        return abs(math.log(one / other))

    def far(size: Size) -> tuple[float, float, float]:
        channels = apart(size.inputs, inputs) + apart(size.outputs, outputs)
        taps, steps = size.kernel**2, size.stride**2
        return apart(taps, math.prod(kernel)), apart(steps, math.prod(two(stride))), channels

    return min(MEASURED, key=far)


def worthwhile(device: torch.device) -> frozenset[Size]:
    """Return the sizes of :data:`MEASURED` that are faster in one pass.

    Measured once for a device, and to be asked for before anything is recorded as a CUDA graph.
    """
    if not offered(device):
        return frozenset()
    return _worthwhile(str(torch.empty(0, device=device).device))


@functools.cache
def _worthwhile(device: str) -> frozenset[Size]:
    return frozenset(size for size in MEASURED if gain(device, size) >= GAIN)


def gain(device: str, size: Size) -> float:
    """How many times as fast one pass is as two steps."""
    inputs, outputs, side, kernel, stride = size
    geometry = (stride, kernel // 2, 1)
    pairs = max(1, NUMBERS // (max(inputs, outputs) * side**2))

    def ones(*shape: int) -> Tensor:
        made = torch.ones(shape, dtype=torch.bfloat16, device=device)
        return made.contiguous(memory_format=torch.channels_last)

    delta, weight = ones(pairs, inputs, side, side), ones(outputs, inputs, kernel, kernel)
    base = functional.conv2d(delta[:4], weight, None, *geometry).float()
    image = torch.arange(pairs, dtype=torch.int32, device=device) % len(base)
    given = (delta, weight, image, base, None, geometry)
    try:
        alone = microbenchmarks.best(functools.partial(stepwise, *given), device)
        fused = microbenchmarks.best(functools.partial(one_pass, *given), device)
    except Exception as error:  # whatever Triton raises where it cannot compile
        logger.info("convolutions are done in two steps: %s", error)
        return 0.0
    return alone / fused
