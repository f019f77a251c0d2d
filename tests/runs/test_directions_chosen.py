"""Along how many directions a screened run predicts: as many as cost least, told and kept."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from support.runs import Killed, stopping
from support.screened import screen_anyway
from support.stores import contents
from torch import Tensor, nn

import pyablate as pa
from pyablate.engine.score import DirectionCount
from pyablate.runs import screening_sample, thresholds

pytestmark = pytest.mark.usefixtures("exports_kept")

MOST, FEWEST = DirectionCount(8, 16), DirectionCount(2, 8)


class Wide(nn.Module):
    """Many units, each of which does little."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act = nn.Linear(16, 96), nn.Softplus()
        self.mix, self.late, self.head = nn.Linear(96, 64), nn.Softplus(), nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(self.mix(self.act(self.first(x)))))


def wide(classes: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Such a network that predicts most of its classes, and images."""
    model = Wide(classes).eval()
    x = 2.0 * torch.randn(100, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.head.bias -= model(x).mean(dim=0)
        return model, (x, model(x).argmax(dim=1))


@pytest.fixture(scope="module")
def case() -> Any:
    return wide(40)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample less than a small run would, so that something is settled."""
    screen_anyway(monkeypatch)
    monkeypatch.setattr(thresholds, "ENOUGH", 300)
    monkeypatch.setattr(screening_sample, "LEAST", 1400)


def dear(monkeypatch: pytest.MonkeyPatch, backward: float) -> None:
    """Let an operation of a backward pass cost as much as so many of open pairs."""
    screen_anyway(monkeypatch, backward)


def ablate(case: Any, **options: Any) -> pa.AblationResult:
    plain = {"audit": 0, "progress": False, "guarantee": "screened", "risk": 1e-3, **options}
    return pa.ablate(*case, "act", **plain)


def directions(result: pa.AblationResult) -> DirectionCount:
    return DirectionCount(result.screening.competitors, result.screening.random)


def flips(result: pa.AblationResult) -> set[tuple[int, int, int]]:
    found = result.flips
    return {*zip(found.row.tolist(), found.image.tolist(), found.prediction.tolist(), strict=True)}


def test_dear_gradients_leave_few_directions_and_dear_pairs_all(case, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, logger="pyablate"):
        dear(monkeypatch, 1e6)
        few = ablate(case)
        dear(monkeypatch, 1e-6)
        many = ablate(case)
    assert directions(few) == FEWEST
    assert directions(many) == MOST
    assert few.screening.computed > many.screening.computed
    assert f"predicted along {FEWEST}" in caplog.text
    assert f"predicted along {MOST}" in caplog.text


@pytest.mark.parametrize("classes", [40, 9])
def test_a_run_along_few_directions_misses_no_flip(classes, monkeypatch):
    dear(monkeypatch, 1e6)
    case = wide(classes)
    exact, screened = ablate(case, guarantee="exact"), ablate(case)
    assert directions(screened) == DirectionCount.choices(classes)[-1]
    assert screened.screening.settled > 0.2 * screened.screening.pairs
    assert len(flips(exact)) > 100
    assert flips(screened) <= flips(exact)
    assert len(flips(exact) - flips(screened)) <= screened.screening.missed_bound
    assert screened.screening.wrong <= 1


def test_batches_memory_and_shards_choose_alike(case, tmp_path):
    whole = ablate(case)
    for options in ({"batch_size": 7}, {"batch_size": 33, "memory": 1 << 24}):
        other = ablate(case, **options)
        assert flips(other) == flips(whole)
        assert other.screening == whole.screening
    for number in (1, 2):
        ablate(case, shard=(number, 2), output=tmp_path / f"{number}.zarr")
    merged = pa.merge([tmp_path / "1.zarr", tmp_path / "2.zarr"])
    assert merged.screening == whole.screening


def test_a_run_that_goes_on_keeps_its_directions(case, tmp_path, monkeypatch):
    dear(monkeypatch, 1e6)
    ablate(case, output=tmp_path / "whole.zarr", batch_size=25)
    place = tmp_path / "killed.zarr"
    with pytest.raises(Killed):
        ablate(case, output=place, batch_size=25, progress=stopping(2))
    assert (place / "blocks").exists()
    monkeypatch.setattr("pyablate.runs._ablate.measure", None)  # they are read, not chosen again
    result = ablate(case, output=place, batch_size=25)
    assert directions(result) == directions(pa.load(place)) == FEWEST
    assert contents(place) == contents(tmp_path / "whole.zarr")


def test_a_plan_tells_the_directions_that_a_run_takes(case, monkeypatch):
    dear(monkeypatch, 1e6)
    plain = pa.plan(*case, "act").screened
    assert plain.directions == MOST
    plan = pa.plan(*case, "act", measure=True, risk=1e-3)
    assert plan.screened.directions == FEWEST
    assert f"predictions along {FEWEST}" in plan.explain()
    dear(monkeypatch, 1e-6)
    told = plan.explain(ablate(case)).splitlines()
    assert f"  predictions: along {MOST}" in told


def test_runs_that_are_joined_tell_the_most(case, monkeypatch):
    many = ablate(case).screening
    dear(monkeypatch, 1e6)
    few = ablate(case).screening
    both = few + many
    assert (both.competitors, both.random) == (many.competitors, many.random)
