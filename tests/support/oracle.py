"""The check that most tests of the engine come down to."""

from __future__ import annotations

from typing import Any

from torch import nn

import pyablate as pa
from pyablate import reference


def check(
    model: nn.Module,
    data: Any,
    layers: Any = None,
    *,
    ties: float = 0.01,
    audit: int = 10,
    precision: str = "auto",
    **options: Any,
) -> pa.AblationResult:
    """Run the engine, compare every pair with the oracle, and return the engine's result."""
    result = pa.ablate(
        model, data, layers, audit=audit, precision=precision, progress=False, **options
    )
    agreement = reference.compare(result, model, data, layers, **options)
    assert agreement.mismatches == 0, agreement
    # A comparison in which everything is a near tie would prove nothing.
    assert agreement.near_ties <= ties * agreement.pairs
    # Nothing mended either: that would hide a fault of the engine.
    assert result.audit == pa.Audit(min(audit, len(result.units) * len(result.labels)), 0)
    return result
