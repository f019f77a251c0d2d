"""How carefully the ablations of a layer are computed, and what a mismatch in the audit leads to.

Nothing here needs torch.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

ON_MISMATCH = ("error", "warn")


class Care(IntEnum):
    """Ways to compute the same predictions, each more careful than the one before it."""

    USUAL = 0
    """The whole precision cascade; see :mod:`pyablate.engine.precision_cascade`."""

    FULL = 1
    """No pair decided in less than the network's own precision."""

    FLOAT64 = 2
    """Every pair on differences in float64; see :mod:`pyablate.engine.float64`."""

    REPLAY = 3
    """Every pair by a plain float64 forward pass of the model itself with hooks."""

    def describe(self, strategy: str) -> str:
        """Say how a layer was computed, whose strategy is this with the usual care."""
        return {
            Care.USUAL: strategy,
            Care.FULL: f"{strategy} (full precision)",
            Care.FLOAT64: "delta (float64)",
            Care.REPLAY: "replay (float64)",
        }[self]


class Mismatch(NamedTuple):
    """An audited pair whose recomputed prediction is another one."""

    row: int
    image: int
    found: int
    expected: int


class AuditError(RuntimeError):
    """Predictions differ from those of a plain float64 forward pass, whatever was tried.

    Examples
    --------
    >>> try:
    ...     audited = pa.ablate(model, data, "features.16").audit
    ... except pa.AuditError as error:  # a fault that replay does not mend either: please report it
    ...     print(error)
    >>> audited.mismatches
    0
    """


def check_on_mismatch(choice: str) -> None:
    """Check what is to happen when mismatches stay.

    Raises
    ------
    ValueError
        No such choice.
    """
    if choice not in ON_MISMATCH:
        expected = " or ".join(f'"{name}"' for name in ON_MISMATCH)
        raise ValueError(f"on_mismatch: expected {expected}, got {choice!r}")
