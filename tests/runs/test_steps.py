"""Progress inside a block: it follows the pairs, never goes back and ends with all of them."""

from __future__ import annotations

import io
import json

import pytest
import torch
from torch import nn

import pyablate as pa
from pyablate.runs import job_steps
from pyablate.runtime.progress import JsonLines


@pytest.fixture
def network(monkeypatch) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    monkeypatch.setattr(job_steps, "SECONDS", -1.0)  # tell every slice
    torch.manual_seed(0)
    convolution = nn.Conv2d(8, 8, 3, padding=1)
    tail = nn.Conv2d(8, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), convolution, nn.SiLU(), *tail)
    return model.eval(), (torch.rand(12, 3, 8, 8), torch.arange(12) % 3)


@pytest.mark.parametrize(
    "options", [{"precision": "fp32"}, {"strategy": "replay"}, {"precision": "fp64"}]
)
def test_progress_follows_slices_of_pairs(network, options):
    calls: list[tuple[int, int, str]] = []
    model, data = network
    # A slice has so little memory that it holds few pairs.
    result = pa.ablate(
        model,
        data,
        layers=["1", "3"],
        memory=1 << 20,
        audit=4,
        progress=lambda *call: calls.append(call),
        **options,
    )
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert {call[1] for call in calls} == {len(result.units) * 12}
    assert done[-1] == len(result.units) * 12
    inside = [number for number in set(done) if number % (8 * 12)]
    assert len(inside) >= 2  # one in each layer at least


def test_no_more_than_all_pairs_are_counted_whatever_is_done_twice():
    told: list[int] = []
    steps = job_steps.Steps(None, 10, lambda pairs, job: told.append(pairs))  # type: ignore[arg-type]
    steps.told -= 1.0
    steps(8)
    steps(8)  # again with more care
    steps.told -= 1.0
    steps(8)
    steps.finish()
    assert told == [0, 8, 2]


def test_what_comes_before_the_pairs_is_told(network):
    lines = JsonLines(io.StringIO())
    model, data = network
    pa.ablate(model, data, ["1"], intervention="mean", audit=4, progress=lines)
    events = [json.loads(line) for line in lines.stream.getvalue().splitlines()]
    told = [event["what"] for event in events if event["event"] == "preparing"]
    assert told[:2] == ["checking the model and the data", "capturing the network"]
    assert "means of the units" in told
    assert events[-1]["event"] == "progress"
