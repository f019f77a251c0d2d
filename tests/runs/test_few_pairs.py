"""Few pairs of a large network: replayed where that is quicker than a capture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.runs import network
from torch import nn

import pyablate as pa
from pyablate import reference
from pyablate.network.forward import cost_of
from pyablate.runs import setup

pytestmark = pytest.mark.usefixtures("exports_kept")

MODEL, IMAGES, LABELS = network()


@pytest.fixture(autouse=True)
def _all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "LARGE", 0.0)


def ablate(images: int, **options: Any) -> pa.AblationResult:
    data = IMAGES[:images], LABELS[:images]
    return pa.ablate(MODEL, data, ["1"], audit=10, progress=False, **options)


def test_few_pairs_are_replayed_and_more_are_not(monkeypatch):
    monkeypatch.setattr(setup, "FEW", 8 * 20)
    few, more = ablate(20), ablate(21)
    assert few.strategy == {"1": "replay"}
    assert more.strategy == {"1": "delta"}
    assert (few.predictions() == more.predictions()[:, :20]).all()
    assert reference.compare(few, MODEL, (IMAGES[:20], LABELS[:20]), ["1"]).mismatches == 0
    assert few.audit.mismatches == 0


def test_it_is_decided_by_what_both_ways_cost(monkeypatch):
    cost = cost_of(MODEL, IMAGES[:2])
    assert cost.total == 2 * 2 * (6 * 8 + 8 * 8 + 8 * 4)
    assert cost.most == 2 * 2 * 8 * 8
    assert cost.calls >= 5
    pairs = 100
    monkeypatch.setattr(setup, "RATE", pairs * cost.total / 2 / (cost.calls * setup.CAPTURE))
    assert setup._replay_is_quicker(cost, pairs - 1)
    assert not setup._replay_is_quicker(cost, pairs)
    monkeypatch.setattr(setup, "LARGE", cost.total / 2)
    assert setup._replay_is_quicker(cost, pairs - 1)
    monkeypatch.setattr(setup, "LARGE", cost.total / 2 + 1)
    assert not setup._replay_is_quicker(cost, pairs - 1)


def test_the_plan_says_what_the_call_does():
    assert pa.plan(MODEL, IMAGES[:20], ["1"]).table["strategy"].tolist() == ["replay"]
    many = pa.plan(MODEL, IMAGES[:20], ["1"], images=10_000)
    assert many.table["strategy"].tolist() == ["delta"]


def test_a_screened_run_and_a_small_network_are_captured(monkeypatch):
    assert ablate(20, guarantee="screened").strategy == {"1": "delta"}
    monkeypatch.setattr(setup, "LARGE", 2e8)
    assert ablate(20).strategy == {"1": "delta"}


def test_a_convolution_is_counted_with_its_groups():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(8, 3)).eval()
    cost = cost_of(model, torch.zeros(2, 4, 3, 3))
    assert cost.total == 2 * 2 * (8 * 2 * 9 + 8 * 3)
