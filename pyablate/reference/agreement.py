"""Agreement of a result with the oracle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pyablate.interventions import Intervention
from pyablate.network.classifier import Choice
from pyablate.reference import loop
from pyablate.reference.loop import near_ties, predictions
from pyablate.result import AblationResult

_EXAMPLES = 5


@dataclass(frozen=True)
class Agreement:
    """Outcome of a comparison.

    Attributes
    ----------
    pairs : int
        (row, image) pairs compared, the intact network's included.
    near_ties : int
        Of these, pairs where the oracle's prediction is a near tie: see
        :mod:`pyablate.network.near_tie`.
    mismatches : int
        Pairs that are no near tie and whose predictions differ.
    examples : tuple of str
        The first few mismatches, for people.

    Examples
    --------
    >>> pa.reference.Agreement(pairs=100, near_ties=1, mismatches=0).mismatches
    0
    """

    pairs: int
    near_ties: int
    mismatches: int
    examples: tuple[str, ...] = ()

    def __add__(self, other: Agreement) -> Agreement:
        """Sum of two comparisons."""
        return Agreement(
            self.pairs + other.pairs,
            self.near_ties + other.near_ties,
            self.mismatches + other.mismatches,
            (self.examples + other.examples)[:_EXAMPLES],
        )


def compare(
    result: AblationResult,
    model: nn.Module,
    data: Any,
    layers: str | Sequence[str] | None = None,
    *,
    intervention: str | Intervention = "zero",
    groups: Sequence[Sequence[str]] | None = None,
    axis: Mapping[str, int] | None = None,
    logits: Choice = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> Agreement:
    """Compare a result with the oracle, row by row; the other arguments are those of the run.

    Raises
    ------
    ValueError
        The arguments do not give the result's rows.

    Examples
    --------
    >>> few = images[:5], labels[:5]
    >>> fast = pa.ablate(model, few, ["features.16:14"])
    >>> pa.reference.compare(fast, model, few, ["features.16:14"]).mismatches
    0
    """
    options = {
        "groups": groups,
        "axis": axis,
        "logits": logits,
        "device": device,
        "seed": seed,
        "batch_size": batch_size,
    }
    total = Agreement(0, 0, 0)
    last = -1
    rows = loop.logits(model, data, layers, intervention=intervention, **options)  # type: ignore[arg-type]
    for last, values in rows:
        if last >= len(result.units):
            break
        given = result.baseline if last < 0 else result.predictions([last])[0]
        expected, tie = predictions(values), near_ties(values)
        if len(given) != len(expected):
            raise ValueError(f"data: {len(expected)} images, but the result has {len(given)}")
        wrong = np.flatnonzero((given != expected) & ~tie)
        label = "the intact network" if last < 0 else result.units["label"].iloc[last]
        examples = tuple(
            f"{label}, image {image}: {given[image]}, oracle {expected[image]}"
            for image in wrong[:_EXAMPLES]
        )
        total += Agreement(len(given), int(tie.sum()), len(wrong), examples)
    if last != len(result.units) - 1:
        raise ValueError(f"layers: they do not give the result's {len(result.units)} rows")
    return total
