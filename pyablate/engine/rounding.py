"""Error bounds of the clean run's logits, measured on images of every batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyablate.network import near_tie
from pyablate.runtime.chunking import NUMBERS

MARGIN = 3e-5
"""Share of the spread of an image's logits that float32 rounding may reach, with much to spare."""

ULPS = 4
"""Least error bound of the competing logits, in units in the last place."""

SAFETY = 8.0
"""The bound is so many times the largest rounding error seen."""


@dataclass(frozen=True)
class Rounding:
    """Error bound of the clean run's logits.

    Attributes
    ----------
    share : float
        Of the largest magnitude among an image's logits that compete.
    least : float
        In logits. An image whose logits all but cancel is rounded no better than others.
    """

    share: float = 0.0
    least: float = 0.0

    @classmethod
    def measured(cls, logits: Tensor, exact: Tensor) -> Rounding:
        """Measure on a few images, ``[N, K]``; ``exact`` are the logits in float64.

        Where logits come about by cancellation, float32 can be far worse than usual.
        """
        # What is not finite the clean run will name.
        error = near_tie.difference(logits, exact).nan_to_num(0.0, 0.0, 0.0)
        share = float((error / near_tie.largest(exact).clamp(min=1e-300)).max())
        return cls(SAFETY * share, SAFETY * float(error.max()))

    @property
    def known(self) -> bool:
        """Whether anything has been measured."""
        return self != Rounding()

    def __or__(self, other: Rounding) -> Rounding:
        """Return the larger of two bounds."""
        return Rounding(max(self.share, other.share), max(self.least, other.least))

    def tolerance(self, logits: Tensor) -> Tensor:
        """Top-2 margins up to which these logits ``[N, K]`` decide nothing, ``[N]``."""
        share = max(self.share, ULPS * torch.finfo(logits.dtype).eps)
        by_size = share * near_tie.largest(logits)
        return torch.maximum(by_size, MARGIN * near_tie.spread(logits)).clamp(min=self.least)


def outlying(images: Tensor, count: int) -> Tensor:
    """Choose ``count`` of some images: the most unusual in offset, contrast and size, and others.

    What rounds worst is often a regime of its own: images of low contrast, which a normalisation
    blows up, or far from zero. An even choice would miss a few such images among many.

    Parameters
    ----------
    images : Tensor
        ``[N, ...]``.
    count : int
        At most.

    Returns
    -------
    Tensor
        int64, ascending, on the CPU: positions, the same each time.
    """
    if len(images) <= count:
        return torch.arange(len(images))
    flat = images.flatten(1)
    parts = flat.split(max(1, NUMBERS // max(1, flat.shape[1])))
    unusual = torch.cat([_oddity(part) for part in parts], dim=1).argmax(dim=1)
    draw = torch.Generator().manual_seed(len(images))
    others = torch.randperm(len(images), generator=draw)[:count]
    chosen = dict.fromkeys(unusual.tolist()[:count] + others.tolist())
    return torch.tensor(sorted(list(chosen)[:count]))


def _oddity(flat: Tensor) -> Tensor:
    """How unusual images ``[N, numbers]`` are in offset, contrast and size, ``[3, N]``."""
    mean = flat.mean(dim=1, keepdim=True)
    contrast = torch.linalg.vector_norm(flat - mean, dim=1)  # ten times as fast as Tensor.std
    offset = mean.squeeze(1).abs() / contrast.clamp(min=torch.finfo(flat.dtype).tiny)
    return torch.stack([offset, -contrast, flat.abs().amax(dim=1)])
