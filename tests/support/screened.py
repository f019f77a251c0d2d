"""Screened runs on small cases, which are computed as a whole by themselves, as that is faster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyablate.engine.job import Job
from pyablate.runs import screened_plan, thresholds
from pyablate.runs.screening_costs import Work, behind


def screen_anyway(monkeypatch: pytest.MonkeyPatch, backward: float = 0.0) -> None:
    """Screen all layers that can be, whatever it saves; an operation of gradients costs so much."""

    def all_of_them(
        works: Mapping[Job, Work], passes: float, _gain: float
    ) -> tuple[frozenset[Job], float]:
        gradients = backward * passes * behind(work.suffix for work in works.values())
        return frozenset(works), gradients + sum(work.screened for work in works.values())

    monkeypatch.setattr(thresholds, "worthwhile", all_of_them)
    for module in (thresholds, screened_plan):
        monkeypatch.setattr(module, "promising", lambda _setup, live, _images: frozenset(live))


def careless_thresholds(
    monkeypatch: pytest.MonkeyPatch, factor: float, chance: float = 0.3
) -> None:
    """Let thresholds be a factor of what was measured, 1 at most, and sample with this chance."""
    screen_anyway(monkeypatch)
    measure = thresholds.measure

    def lowered(*arguments: Any) -> thresholds.Thresholds:
        found = measure(*arguments)
        jobs = tuple(
            job
            and replace(
                job,
                stages=tuple(
                    replace(s, threshold=min(1.0, s.threshold * factor)) for s in job.stages
                ),
            )
            for job in found.jobs
        )
        return replace(found, jobs=jobs, near_chance=chance, far_chance=chance)

    monkeypatch.setattr("pyablate.runs._ablate.measure", lowered)


class Layers(nn.Module):
    """Twelve units, another layer behind them, three classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.act = nn.Linear(6, 12), nn.ReLU()
        self.mix, self.late, self.head = nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)
        with torch.no_grad():  # so that all classes are predicted
            self.mix.weight.mul_(3.0)
            self.head.weight.mul_(3.0)
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(self.mix(self.act(self.first(x)))))


def layers_case(images: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Such a network, and images with labels that it gets right mostly."""
    model = Layers().eval()
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(images, 6, generator=draw)
    with torch.no_grad():
        labels = model(x).argmax(1)
    labels[::7] = (labels[::7] + 1) % 3
    return model, (x, labels)
