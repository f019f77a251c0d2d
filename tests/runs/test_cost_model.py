"""What layers cost at given rates: no clock is read."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import nn

import pyablate as pa
from pyablate.runs import Peaks, _plan, cost_model

TOKENS, WIDTH, CLASSES = 6, 8, 5
ONE_EACH = Peaks(**{each.name: 1.0 for each in fields(Peaks)})
FREE = Peaks(**{each.name: 1e30 for each in fields(Peaks)})


class Block(nn.Module):
    """Tokens through what transformers are made of, behind a layer that mixes channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(WIDTH, WIDTH), nn.ReLU()
        self.mixed = nn.Linear(WIDTH, WIDTH)
        self.norm, self.gelu = nn.LayerNorm(WIDTH), nn.GELU()
        self.wide, self.head = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, CLASSES)

    def forward(self, x):
        x = self.norm(self.mixed(self.act(self.first(x))))
        x = x + nn.functional.scaled_dot_product_attention(x, x, x)
        return self.head(self.gelu(self.wide(x)).mean(1))


class Maps(nn.Module):
    """Convolutions of every kind behind one that mixes channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
        self.mixed, self.square = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise, self.head = nn.Conv2d(8, 16, 1), nn.Linear(16, CLASSES)

    def forward(self, x):
        x = self.mixed(self.act(self.first(x)))
        x = self.pointwise(self.depthwise(self.square(x).relu()).relu()).relu()
        return self.head(x.mean((2, 3)))


def _planned(monkeypatch, model, images, peaks, layers="act"):
    torch.manual_seed(0)
    monkeypatch.setattr(_plan, "peaks_of", lambda _: peaks)
    monkeypatch.setattr(cost_model, "CALL", 0.0)
    return pa.plan(model.eval(), images, layers, precision="fp32")


def _work(monkeypatch, model, images, kind):
    """Operations or bytes of a kind for one live pair: with that rate 1 and others free."""
    plan = _planned(monkeypatch, model, images, replace(FREE, **{kind: 1.0}))
    row = plan.table.iloc[0]
    return row["seconds"] / (row["pairs"] * row["live"])


def test_linear_layers_and_attention_go_by_the_rate_of_matrix_products(monkeypatch):
    images = torch.randn(4, TOKENS, WIDTH)
    behind = 2 * TOKENS * WIDTH * 4 * WIDTH + 2 * 4 * WIDTH * CLASSES
    attention = 4 * TOKENS * TOKENS * WIDTH
    found = _work(monkeypatch, Block(), images, "matrix")
    assert found == pytest.approx(behind + attention)
    assert _work(monkeypatch, Block(), images, "floating") == pytest.approx(0, abs=1e-9)


def test_what_has_no_rule_of_its_own_goes_by_the_rate_of_differences(monkeypatch):
    images = torch.randn(4, TOKENS, WIDTH)
    tensor = TOKENS * WIDTH * 4  # bytes
    found = _work(monkeypatch, Block(), images, "difference")
    # A norm reads one and writes one; attention of x, x, x reads one node and writes one.
    assert found == pytest.approx((2 + 2) * tensor)
    assert _work(monkeypatch, Block(), images, "gelu") == pytest.approx(2 * 4 * tensor)


def test_kernels_are_told_apart(monkeypatch):
    images = torch.randn(4, 3, 5, 5)
    area = 25
    square, single = 2 * area * 8 * 8 * 9, 2 * area * 8 * 9
    found = _work(monkeypatch, Maps(), images, "floating")
    assert found == pytest.approx(square / cost_model.ATTAINED_IN_FULL)
    pointwise = 2 * area * 8 * 16 + 2 * 16 * CLASSES
    assert _work(monkeypatch, Maps(), images, "matrix") == pytest.approx(pointwise)
    # The first convolution behind the unit has one changed map, as each filter of a depthwise one.
    found = _work(monkeypatch, Maps(), images, "unit")
    assert found == pytest.approx(2 * single / cost_model.ATTAINED)


def test_views_cost_nothing(monkeypatch):
    class Turned(Block):
        def forward(self, x):
            x = self.mixed(self.act(self.first(x)))
            x = x.transpose(1, 2).reshape(len(x), WIDTH, TOKENS).transpose(1, 2)
            return self.head(self.wide(x).mean(1))

    class Straight(Block):
        def forward(self, x):
            return self.head(self.wide(self.mixed(self.act(self.first(x)))).mean(1))

    images = torch.randn(4, TOKENS, WIDTH)
    plans = [_planned(monkeypatch, model(), images, ONE_EACH) for model in (Turned, Straight)]
    turned, straight = (plan.table.iloc[0] for plan in plans)
    assert turned["seconds"] / turned["live"] == pytest.approx(
        straight["seconds"] / straight["live"]
    )


def test_the_total_of_a_plan_follows_the_rates(monkeypatch):
    images, model = torch.randn(4, TOKENS, WIDTH), Block()
    table = _planned(monkeypatch, model, images, ONE_EACH).table
    slow = _planned(monkeypatch, model, images, replace(ONE_EACH, matrix=0.5)).table
    work = _work(monkeypatch, model, images, "matrix") * (table["pairs"] * table["live"])
    assert (slow["seconds"] - table["seconds"]).item() == pytest.approx(work.item(), rel=1e-6)
