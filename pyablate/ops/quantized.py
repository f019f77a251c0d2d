"""A delta in 8 bits per number, as 8-bit convolutions read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ZERO = 128
"""The code of 0."""

MOST = 127
"""Quantized values reach from ``ZERO - MOST`` to ``ZERO + MOST``."""


@dataclass(frozen=True, eq=False)
class Quantized:
    """A delta ``[P, ...]`` as 8-bit numbers with a factor per pair, so that small ones keep digits.

    The delta is about ``scale[p] * (values[p] - 128)``; the error is at most half the factor. A
    pair without any change has factor 0, one with a NaN or an infinity has factor NaN. Maps that
    1 x 1 convolutions read may have a factor for each position, and lie channels_last: what such a
    convolution gives at a position depends on that position alone.

    Attributes
    ----------
    values : Tensor
        uint8 ``[P, ...]``.
    scale : Tensor
        float32 ``[P]``: the largest magnitude of the pair, divided by 127; or ``[P, H, W]``, that
        of each position.
    alone : bool
        Whether they are all that is wanted: what fills them then leaves the delta itself unwritten.

    Examples
    --------
    >>> codes = pa.ops.encode(torch.tensor([[1.0, -2.0]]))
    >>> codes.values.dtype, codes.scale.shape
    (torch.uint8, torch.Size([1]))
    """

    values: Tensor
    scale: Tensor
    alone: bool = False

    @classmethod
    def empty(
        cls,
        shape: Sequence[int],
        layout: torch.memory_format,
        device: torch.device | str,
        *,
        alone: bool = False,
        by_position: bool = False,
    ) -> Quantized:
        """Memory for the quantized values of a delta of this shape and layout, to be filled."""
        values = torch.empty(shape, dtype=torch.uint8, device=device, memory_format=layout)
        factors = (shape[0], *shape[2:]) if by_position else shape[:1]
        return cls(values, torch.empty(factors, dtype=torch.float32, device=device), alone)

    def spell(self, dtype: torch.dtype) -> Tensor:
        """Return the delta as the quantized values have it."""
        steps = self.values.float() - ZERO
        return (steps * spread(self.scale, steps.ndim)).to(dtype)

    @property
    def by_position(self) -> bool:
        """Whether each position has a factor of its own."""
        return self.scale.ndim > 1

    def rows(self) -> Quantized:
        """Return the same memory with each position as a row, ``[P * H * W, C]``.

        Raises
        ------
        ValueError
            The maps do not lie channels_last.
        """
        if not self.values.is_contiguous(memory_format=torch.channels_last):
            strides = self.values.stride()
            raise ValueError(f"quantized: expected channels_last values, got strides {strides}")
        return Quantized(rows(self.values), self.scale.view(-1), self.alone)

    def fill(self, delta: Tensor) -> None:
        """Encode, in plain PyTorch."""
        if self.by_position:
            self.rows().fill(rows(delta))
            return
        flat = delta.float().flatten(1)
        finite = torch.isfinite(flat).all(dim=1)
        most = flat.abs().amax(dim=1) if flat.shape[1] else flat.new_zeros(len(flat))
        most = torch.where(most > 1e-30, most, torch.zeros_like(most))
        self.scale.copy_(torch.where(finite, most / MOST, torch.nan))
        inverse = torch.where(most > 0, MOST / most, torch.zeros_like(most))
        steps = (flat * inverse.unsqueeze(1)).round().nan_to_num(0.0).clamp(-MOST, MOST)
        self.values.copy_((steps + ZERO).to(torch.uint8).reshape(delta.shape))


def spread(scale: Tensor, dims: int) -> Tensor:
    """Return factors ``[P]`` or ``[P, H, W]`` so that they multiply a tensor of so many axes."""
    if scale.ndim > 1:
        return scale.unsqueeze(1)
    return scale.reshape(-1, *[1] * (dims - 1))


def rows(maps: Tensor) -> Tensor:
    """See maps ``[P, C, H, W]`` as ``[P * H * W, C]``, copied unless they lie channels_last."""
    last = maps.contiguous(memory_format=torch.channels_last)
    return last.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
