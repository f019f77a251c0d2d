"""What a run took. Nothing here needs torch."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Effort:
    """What a run took, and how exact its cheap arithmetic was.

    Attributes
    ----------
    layer_seconds : dict
        Wall time of each layer's ablations, without capture, clean runs and audit.
    pairs_by_precision : dict
        Number of pairs decided by each precision of the dense part ("int8", "bfloat16", "float16",
        "float32", "float64"), cheapest first; pairs that the closed form decided and silent units
        are in none.
    error_bounds : dict
        Per layer and precision, the share of a logit change's spread within which its answer was
        not trusted: several times the largest error measured on pairs of this run. In 8 bits some
        multiple of a pair's rounding steps is added to that.
    other_seconds : dict
        Wall time of what stands beside the layers: "preparation" (checks, capture), "clean runs"
        and "audit".

    Examples
    --------
    >>> list(result.effort.layer_seconds)
    ['features.16']
    """

    layer_seconds: dict[str, float] = field(default_factory=dict)
    pairs_by_precision: dict[str, int] = field(default_factory=dict)
    error_bounds: dict[str, dict[str, float]] = field(default_factory=dict)
    other_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def settled(self) -> dict[str, int]:
        """Former name of ``pairs_by_precision``; deprecated."""
        _warn_renamed("settled", "pairs_by_precision")
        return self.pairs_by_precision

    @property
    def doubt(self) -> dict[str, dict[str, float]]:
        """Former name of ``error_bounds``; deprecated."""
        _warn_renamed("doubt", "error_bounds")
        return self.error_bounds


def _warn_renamed(old: str, new: str) -> None:
    message = f"Effort.{old} is now Effort.{new}; the old name will go"
    warnings.warn(message, DeprecationWarning, stacklevel=3)
