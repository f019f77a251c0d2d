"""Runs of a small network, and ways to end them before their time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pyablate as pa
from pyablate.engine.precision_cascade import PrecisionCascade
from pyablate.runs import executor

IMAGES, BATCH = 60, 2
SOME = 23
"""Images of a run that does not take all of them."""


class Killed(BaseException):
    """Nobody catches it: the end of the process, as far as the folder can tell."""


def network() -> tuple[nn.Module, Tensor, Tensor]:
    """Three linear layers, of which the first two have eight units each; images and labels."""
    draw = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    model.known_as = "small"
    images = torch.randn(IMAGES, 6, generator=draw)
    return model.eval(), images, torch.randint(4, (IMAGES,), generator=draw)


def told_cascades(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of pairs that the cascades of precisions of a run are told of."""
    numbers = []

    def noted(tiers: Any, pairs: int) -> PrecisionCascade:
        numbers.append(pairs)
        return PrecisionCascade(tiers, pairs)

    monkeypatch.setattr(executor, "PrecisionCascade", noted)
    return numbers


def measured_pairs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of pairs that were decided in full precision since low ones were measured on them."""
    numbers, real = [], PrecisionCascade._measure

    def measure(self: PrecisionCascade, live: Any, size: int) -> list[torch.dtype]:
        before = self.classified.get(self.full, 0)
        found = real(self, live, size)
        numbers.append(self.classified.get(self.full, 0) - before)
        return found

    monkeypatch.setattr(PrecisionCascade, "_measure", measure)
    return numbers


def stopping(at: int | None) -> Callable[[int, int, str], None]:
    """A report that ends the process, in a manner of speaking, at its ``at``-th call."""
    calls = iter(range(10**9))

    def report(done: int, total: int, layer: str) -> None:
        if next(calls) == at:
            raise Killed

    return report


def run(
    place: Path | None, stop_at: int | None = None, images: int = SOME, **options: Any
) -> pa.AblationResult:
    """Ablate the small network in blocks of five; by replay, as a capture takes longer than it."""
    model, x, labels = network()
    plain = {"batch_size": 5, "audit": 20, "strategy": "replay", "progress": stopping(stop_at)}
    given = {"model": model, "data": (x[:images], labels[:images]), "layers": "*"}
    return pa.ablate(**{**plain, **given, **options}, output=place)


def same(one: pa.AblationResult, other: pa.AblationResult) -> bool:
    """Whether two results, or two blocks of them, predict the same everywhere, in one way."""
    arrays = [(one.baseline, other.baseline)]
    arrays += [(getattr(one.flips, n), getattr(other.flips, n)) for n in vars(one.flips)]
    said = [[getattr(it, n, None) for n in ("strategy", "audit")] for it in (one, other)]
    return said[0] == said[1] and all(np.array_equal(*pair) for pair in arrays)
