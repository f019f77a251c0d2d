"""1 x 1 convolutions of deltas with what follows in one pass: residual sum and ReLU's difference.

Between two such convolutions a delta crosses a GPU's memory four times: written, read and written
by the activation, read again. Here the product's own epilogue does the activation. The kernel is
in Triton, which comes with PyTorch on CUDA; where it is missing, or measured to be no faster than
the two steps one after the other, they are what runs.
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
from pyablate.engine.rule_context import Pairs, activation_behind
from pyablate.network.aten import two
from pyablate.ops import Activation, Quantized

logger = logging.getLogger("pyablate")

RELU = Activation("relu")

MEASURED = ((64, 64, 56), (256, 64, 56), (64, 256, 56), (512, 128, 28), (256, 1024, 14))
"""Input and output channels and side of the maps at which both ways are timed."""

GAIN = 1.05
"""How many times as fast it has to be for others of that size to be done like that."""

NUMBERS = 1 << 27
"""Numbers of a delta to measure with, about: what a slice on a GPU has."""


def fits(pairs: Pairs, node: fx.Node, weight: Tensor, geometry: tuple[object, ...]) -> bool:
    """Whether a convolution is 1 x 1, only ReLU reads it, perhaps after a sum, and this pays.

    Parameters
    ----------
    pairs : Pairs
        What is known of the slice.
    node : fx.Node
        The convolution, without groups.
    weight : Tensor
        ``[O, C, kh, kw]``.
    geometry : tuple
        Its stride, padding and dilation.

    Returns
    -------
    bool
        Never on a CPU.
    """
    device = pairs.image.device
    if not offered(device) or pairs.dtype != torch.bfloat16:
        return False
    outputs, inputs, *kernel = weight.shape
    stride, padding, _ = geometry
    if kernel != [1, 1] or two(stride) != [1, 1] or padding not in (0, [0], [0, 0]):
        return False
    if activation_behind(pairs, node) != RELU:
        return False
    return faster(device, inputs, outputs)


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
        ``[N, O, H, W]``, clean input of the activation, bfloat16 or float32.
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
        result = functional.conv2d(delta, weight)
        return result if addend is None else result + addend
    return one_pass(delta, weight, image, base, addend)


def one_pass(
    delta: Tensor, weight: Tensor, image: Tensor, base: Tensor, addend: Tensor | None = None
) -> Tensor:
    """Convolve, add and go through ReLU by the Triton kernel."""
    from pyablate.engine.pointwise_kernel import launch

    last = torch.channels_last
    delta = delta.contiguous(memory_format=last)
    if addend is not None:
        addend = addend.to(delta.dtype).contiguous(memory_format=last)
    shape = (len(delta), len(weight), *delta.shape[2:])
    out = torch.empty(shape, dtype=delta.dtype, device=delta.device, memory_format=last)
    flat = weight.reshape(weight.shape[:2]).contiguous()
    launch(delta, flat, image, base.contiguous(memory_format=last), addend, out)
    return out


def stepwise(
    delta: Tensor, weight: Tensor, image: Tensor, base: Tensor, addend: Tensor | None = None
) -> Tensor:
    """Do the same by a convolution and a pass."""
    result = functional.conv2d(delta, weight)
    addend = None if addend is None else addend.to(result.dtype)
    return ops.delta_activation(base, result, image, RELU, addend=addend, out=result)


def offered(device: torch.device) -> bool:
    """Whether there is a choice: a GPU, and Triton installed."""
    return device.type == "cuda" and _installed()


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None  # asked for at every convolution


def faster(device: torch.device, inputs: int, outputs: int) -> bool:
    """Whether the one pass was measured to be faster, at the size nearest to this one."""

    def far(size: tuple[int, int, int]) -> float:
        return abs(math.log(size[0] / inputs)) + abs(math.log(size[1] / outputs))

    return min(MEASURED, key=far) in worthwhile(device)


def worthwhile(device: torch.device) -> frozenset[tuple[int, int, int]]:
    """Return the sizes of :data:`MEASURED` that are faster in one pass.

    Measured once for a device, and to be asked for before anything is recorded as a CUDA graph.
    """
    if not offered(device):
        return frozenset()
    return _worthwhile(str(torch.empty(0, device=device).device))


@functools.cache
def _worthwhile(device: str) -> frozenset[tuple[int, int, int]]:
    return frozenset(size for size in MEASURED if gain(device, size) >= GAIN)


def gain(device: str, size: tuple[int, int, int]) -> float:
    """How many times as fast one pass is as two steps: input and output channels, side of maps."""
    inputs, outputs, side = size
    pairs = max(1, NUMBERS // (max(inputs, outputs) * side**2))
    maps = functools.partial(torch.ones, dtype=torch.bfloat16, device=device)
    last = torch.channels_last
    delta = maps(pairs, inputs, side, side).contiguous(memory_format=last)
    base = maps(4, outputs, side, side).float().contiguous(memory_format=last)
    weight = maps(outputs, inputs, 1, 1)
    image = torch.arange(pairs, dtype=torch.int32, device=device) % 4
    try:
        alone = microbenchmarks.best(lambda: stepwise(delta, weight, image, base), device)
        fused = microbenchmarks.best(lambda: one_pass(delta, weight, image, base), device)
    except Exception as error:  # whatever Triton raises where it cannot compile
        logger.info("1 x 1 convolutions are done in two steps: %s", error)
        return 0.0
    return alone / fused
