"""1 x 1 convolutions of deltas on a GPU: matrix products, with what follows in one pass.

Between two such convolutions a delta crosses the memory four times: written, read and written by
the activation, read again. Where it pays, the product's own epilogue does residual sum and ReLU's
difference. That kernel is in Triton, which comes with PyTorch on CUDA; where it is missing, or
measured to be no faster than the two steps one after the other, they are what runs.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math

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
from pyablate.ops import Activation, Quantized

logger = logging.getLogger("pyablate")

RELU = Activation("relu")

aten = torch.ops.aten

POOLS = {aten.max_pool2d.default, aten.adaptive_avg_pool2d.default, aten.mean.dim}
"""What may do the activation before it in its own pass."""

Size = tuple[int, int, int]
"""Input and output channels of a convolution, side of its maps."""

MEASURED: tuple[Size, ...] = (
    (64, 64, 56),
    (256, 64, 56),
    (64, 256, 56),
    (512, 128, 28),
    (256, 1024, 14),
)
"""Sizes at which both ways are timed."""

GAIN = 1.05
"""How many times as fast it has to be for others of that size to be done like that."""

NUMBERS = 1 << 28
"""Numbers of a delta to measure with, about: what a slice on a GPU has."""


def product(delta: Tensor, weight: Tensor) -> Tensor:
    """Convolve ``[P, C, H, W]`` with ``[O, C, 1, 1]`` as a product of matrices.

    Unlike cuDNN's convolutions, products are not prepared for a number of pairs.
    """
    positions = delta.permute(0, 2, 3, 1)
    return functional.linear(positions, weight.flatten(1)).permute(0, 3, 1, 2)


def by_products(device: torch.device) -> bool:
    """Whether 1 x 1 convolutions are products of matrices: oneDNN's are as fast as its products."""
    return device.type == "cuda"


def fits(pairs: Pairs, node: fx.Node, weight: Tensor) -> bool:
    """Whether only ReLU reads a 1 x 1 convolution, perhaps after a sum, and one pass pays.

    Parameters
    ----------
    pairs : Pairs
        What is known of the slice.
    node : fx.Node
        The convolution, without groups, stride and padding.
    weight : Tensor
        ``[O, C, 1, 1]``.

    Returns
    -------
    bool
        Never on a CPU.
    """
    device = pairs.image.device
    if not offered(device) or pairs.dtype not in (torch.float16, torch.bfloat16):
        return False
    if activation_behind(pairs, node) != RELU or _pooled(node):
        return False
    outputs, inputs = weight.shape[:2]
    return nearest(inputs, outputs) in worthwhile(device)


def _pooled(node: fx.Node) -> bool:
    """Whether a pooling alone reads the activation behind: there is nothing to be saved then."""
    reader = reader_behind_sum(node)
    pooling = None if reader is None else only_reader(reader)
    return pooling is not None and pooling.target in POOLS


def convolve(
    delta: Tensor,
    weight: Tensor,
    image: Tensor,
    *,
    activation: Activation | None = None,
    base: Tensor | None = None,
    addend: Tensor | None = None,
    quantized: Quantized | None = None,
) -> Tensor:
    """Convolve a delta by ``[O, C, 1, 1]``, add another to it, and take it through ReLU.

    Parameters
    ----------
    delta : Tensor
        ``[P, C, H, W]``.
    weight : Tensor
        ``[O, C, 1, 1]``, dtype of ``delta``.
    image : Tensor
        int32 ``[P]``, row of ``base`` for each pair.
    activation : Activation, optional
        ReLU. Without, only convolution and sum are done, by PyTorch.
    base : Tensor, optional
        ``[N, O, H, W]``, clean input of the activation, in half precision or float32.
    addend : Tensor, optional
        ``[P, O, H, W]``.
    quantized : Quantized, optional
        Not filled here: 8 bits are not for GPUs.

    Returns
    -------
    Tensor
        ``[P, O, H, W]``.
    """
    assert quantized is None
    if activation is None or base is None:
        result = product(delta, weight)
        return result if addend is None else result + addend
    return one_pass(delta, weight, image, base, addend)


def one_pass(
    delta: Tensor, weight: Tensor, image: Tensor, base: Tensor, addend: Tensor | None = None
) -> Tensor:
    """Convolve, add and go through ReLU by the Triton kernel."""
    from pyablate.engine.pointwise_kernel import launch

    last = torch.channels_last
    delta, base = (t.contiguous(memory_format=last) for t in (delta, base))
    if addend is not None:
        addend = addend.to(delta.dtype).contiguous(memory_format=last)
    shape = (len(delta), len(weight), *delta.shape[2:])
    out = torch.empty(shape, dtype=delta.dtype, device=delta.device, memory_format=last)
    launch(delta, weight.flatten(1).contiguous(), image, base, addend, out)
    return out


def stepwise(
    delta: Tensor, weight: Tensor, image: Tensor, base: Tensor, addend: Tensor | None = None
) -> Tensor:
    """Do the same by a product and a pass."""
    result = product(delta, weight)
    addend = None if addend is None else addend.to(result.dtype)
    return ops.delta_activation(base, result, image, RELU, addend=addend, out=result)


def offered(device: torch.device) -> bool:
    """Whether there is a choice: a GPU, and Triton installed."""
    return device.type == "cuda" and _installed()


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None  # asked for at every convolution


def nearest(inputs: int, outputs: int) -> Size:
    """Return the size of :data:`MEASURED` that stands for a convolution."""

    def far(size: Size) -> float:
        return abs(math.log(size[0] / inputs)) + abs(math.log(size[1] / outputs))

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
    inputs, outputs, side = size
    pairs = max(1, NUMBERS // (max(inputs, outputs) * side**2))

    def ones(*shape: int) -> Tensor:
        made = torch.ones(shape, dtype=torch.float16, device=device)
        return made.contiguous(memory_format=torch.channels_last)

    delta, weight = ones(pairs, inputs, side, side), ones(outputs, inputs, 1, 1)
    base = ones(4, outputs, side, side).float()
    image = torch.arange(pairs, dtype=torch.int32, device=device) * len(base) // pairs
    given = (delta, weight, image, base)
    try:
        alone = microbenchmarks.best(functools.partial(stepwise, *given), device)
        fused = microbenchmarks.best(functools.partial(one_pass, *given), device)
    except Exception as error:  # whatever Triton raises where it cannot compile
        logger.info("1 x 1 convolutions are done in two steps: %s", error)
        return 0.0
    return alone / fused
