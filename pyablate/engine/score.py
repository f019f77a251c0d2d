"""What is predicted of pairs (unit, image), and whether that settles their class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Score:
    """What is predicted of some pairs.

    Attributes
    ----------
    lowest : Tensor
        Lead of the intact network's class over the best other one, once the unit is ablated.
    size : Tensor
        Of the change of the logits: largest difference that it makes between two classes where
        classes are few, else an estimate of the root of the sum of its squares.
    """

    lowest: Tensor
    size: Tensor

    def relative(self, floor: float) -> Tensor:
        """``lowest`` in units of ``size``, which counts as no less than about ``floor``."""
        return self.lowest / (self.size.square() + floor**2).sqrt()

    def of(self, row: Tensor, image: Tensor) -> Score:
        """Take those of some pairs, from what is known of all of them ``[N, row]``."""
        return Score(self.lowest[image, row], self.size[image, row])


def joined(parts: Sequence[Score]) -> Score:
    """Put the scores of parts of a batch together, on the CPU."""
    lowest, size = (torch.cat([getattr(p, name) for p in parts]) for name in ("lowest", "size"))
    return Score(lowest.float().cpu(), size.float().cpu())
