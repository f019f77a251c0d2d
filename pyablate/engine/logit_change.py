"""What pairs do to the logits, in some precision, and how far one precision is from another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FULL = 1e-4
"""Share of a logit change's spread that rounding in float32 may reach, with much to spare."""


@dataclass(frozen=True, eq=False)
class Changed:
    """Logit changes of some pairs.

    Attributes
    ----------
    logits : Tensor
        ``[P, K]``.
    steps : Tensor or None
        float32 ``[L, P]``: the step to which the delta was rounded before each convolution in 8
        bits, largest magnitude / 127; None where there were none.
    lost : Tensor or None
        Bool ``[P]``: pairs of which nothing is known, since an operator without a bounded slope
        read what had all but cancelled; None where there is no such operator.
    """

    logits: Tensor
    steps: Tensor | None = None
    lost: Tensor | None = None

    def first(self, count: int) -> Changed:
        """Leave out the pairs from ``count`` on."""
        steps = None if self.steps is None else self.steps[:, :count]
        return Changed(self.logits[:count], steps, None if self.lost is None else self.lost[:count])


Change = Callable[[Tensor, Tensor, torch.dtype], Changed | None]
"""``change(row, image, dtype)``: the logit changes of some pairs; None if there are none."""

Truth = Callable[[Tensor, Tensor], Tensor]
"""``truth(row, image)``: the logits of some pairs in float64, ``[P, K]`` on the CPU."""


def carried(dtype: torch.dtype) -> torch.dtype:
    """Floating-point dtype in which deltas are held between the convolutions of a tier."""
    return torch.bfloat16 if dtype == torch.int8 else dtype


def joined(parts: Sequence[Changed]) -> Changed:
    """Put the pairs of several slices together."""
    steps = [part.steps for part in parts if part.steps is not None]
    logits = torch.cat([part.logits for part in parts])
    lost = [part.lost for part in parts if part.lost is not None]
    return Changed(
        logits, torch.cat(steps, dim=1) if steps else None, torch.cat(lost) if lost else None
    )


def errors(rough: Changed, exact: Tensor, tolerance: Tensor) -> tuple[Tensor, Tensor]:
    """Errors of rough logit changes, [P], and the spreads of these; NaN counts as infinite.

    Errors within the tolerance, and of pairs that are lost, are left open anyway. Changes that are
    not finite in full precision say nothing about the rough one.
    """
    logits = rough.logits.to(exact.dtype)
    error, size = spread(logits - exact), spread(logits)
    counts = ~(error <= tolerance) & torch.isfinite(exact).all(dim=1)
    if rough.lost is not None:
        counts &= ~rough.lost
    return torch.where(counts, error.nan_to_num(torch.inf), torch.zeros_like(error)), size


def largest_share(part: Tensor, whole: Tensor) -> float:
    """Largest share of one number in another; of nothing, anything is infinite."""
    share = (part / whole).nan_to_num(torch.inf)
    return float(torch.where(part > 0, share, torch.zeros_like(share)).amax())


def spread(change: Tensor) -> Tensor:
    """Largest difference that a change makes between two classes, [P]."""
    return change.amax(dim=1) - change.amin(dim=1)
