"""Convolutions in 8-bit integers: oneDNN, by PyTorch's quantised operators.

A pair's delta comes as quantized values with a factor of its own, or of each of its positions
(:class:`pyablate.ops.quantized.Quantized`); a filter has one factor per output channel. Sums are
exact integers, so all of the error is in the two roundings.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from pyablate.ops.quantized import MOST, ZERO

Geometry = tuple[list[int], list[int], list[int]]
"""Stride, padding and dilation, each (height, width)."""


@dataclass(frozen=True, eq=False)
class Filters:
    """Filters of a convolution, prepared once.

    Attributes
    ----------
    packed : Tensor
        In oneDNN's own layout.
    scale : Tensor
        float32 ``[O]``.
    zero : Tensor
        int32 ``[O]``, zeros.
    geometry : tuple
        Stride, padding, dilation.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor
    geometry: Geometry


def prepare(weight: Tensor, geometry: Geometry, size: list[int]) -> Filters:
    """Round filters ``[O, I, kh, kw]`` to 8 bits, for deltas of ``size`` ``[P, I, H, W]``."""
    scale = weight.float().abs().amax(dim=(1, 2, 3)) / MOST
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    rounded = (weight.float() / scale.reshape(-1, 1, 1, 1)).round().to(torch.int8)
    packed = torch.ops.onednn.qconv_prepack(rounded, scale, 1.0, ZERO, *geometry, 1, size)
    return Filters(packed, scale, torch.zeros(len(weight), dtype=torch.int32), geometry)


def convolve(quantized: Tensor, filters: Filters, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Convolve values ``[P, I, H, W]``; ``[P, O, Ho, Wo]``, without the pairs' factors."""
    result: Tensor = torch.ops.onednn.qconv2d_pointwise(
        quantized,
        1.0,
        ZERO,
        filters.packed,
        filters.scale,
        filters.zero,
        None,
        *filters.geometry,
        1,
        1.0,
        0,
        dtype,
        "none",
        [],
        "",
    )
    return result


@functools.cache
def available() -> bool:
    """Whether this processor and this PyTorch add up products of 8-bit numbers without overflow.

    Processors without VNNI add pairs of products in 16 bits, which the largest ones do not fit.
    """
    quantized = torch.full((1, 32, 4, 4), ZERO + MOST, dtype=torch.uint8)
    quantized = quantized.contiguous(memory_format=torch.channels_last)
    weight = torch.full((16, 32, 1, 1), 1.0)
    try:
        filters = prepare(weight, ([1, 1], [0, 0], [1, 1]), list(quantized.shape))
        result = convolve(quantized, filters, torch.float32)
    except (RuntimeError, AttributeError, TypeError):
        return False
    return bool((result - 32.0 * MOST).abs().max() < 1e-2)
