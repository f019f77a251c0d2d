"""Convolutions of 8-bit codes, and the networks on which they could go wrong."""

import numpy as np
import pytest
import torch
from support import networks
from support.runs import measured_pairs
from torch import nn
from torch.nn import functional

import pyablate as pa
from pyablate import reference
from pyablate.engine import int8_conv, precision_cascade, weighted_rules

measured = pytest.fixture(measured_pairs)
needs_eight_bits = pytest.mark.skipif(
    not int8_conv.available(), reason="this processor has no exact 8-bit products"
)


def test_eight_bits_where_they_are_exact(monkeypatch):
    model, images, labels = networks.network("residual", 4)
    monkeypatch.setattr(int8_conv, "available", lambda: False)
    with pytest.raises(ValueError, match=r'precision: .*VNNI.* for "int8"'):
        pa.ablate(model, (images, labels), precision="int8")


@needs_eight_bits
def test_eight_bit_convolution_is_right_to_its_rounding():
    torch.manual_seed(0)
    delta = torch.randn(40, 32, 9, 9).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(24, 32, 3, 3)
    geometry = ([2, 1], [1, 1], [1, 2])
    filters = int8_conv.prepare(weight, geometry, list(delta.shape))
    codes = pa.ops.encode(delta)
    result = int8_conv.convolve(codes.values, filters).float() * codes.scale.reshape(-1, 1, 1, 1)
    exact = nn.functional.conv2d(delta.double(), weight.double(), None, *geometry)
    error = (result - exact).abs().amax() / exact.std()
    assert 1e-4 < error < 0.05
    # as many pairs as there are: the filters were prepared for 40
    few = int8_conv.convolve(codes.values[:3], filters)
    assert torch.equal(few, int8_conv.convolve(codes.values, filters)[:3])


class Shared(nn.Module):
    """A convolution, behind something that passes it on, is read twice."""

    def __init__(self, twice):
        super().__init__()
        self.twice = twice
        self.first, self.relu = nn.Conv2d(2, 16, 3, padding=1), nn.ReLU()
        self.second, self.third, self.fourth = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(16, 5)

    def forward(self, x):
        x = functional.relu(self.second(self.relu(self.first(x))))
        y = self.drop(self.third(x))
        if self.twice == "sum":
            return self.head(functional.elu(y + y).mean((2, 3)))
        return self.head(functional.relu(self.fourth(functional.relu(y)) + y).mean((2, 3)))


@needs_eight_bits
@pytest.mark.parametrize("twice", ["branches", "sum"])
def test_a_convolution_read_twice_is_not_overwritten(twice, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(precision_cascade, "USELESS", 0.9)  # half of these pairs are close calls
    data = networks.network("residual")[1:]
    model = networks.made(Shared(twice), data[0])
    result = pa.ablate(model, data, "relu", precision="int8")
    assert reference.compare(result, model, data, "relu").mismatches == 0
    assert (
        result.effort.error_bounds["relu"]["int8"] < 0.6
    )  # garbage was off by more than the change
    assert result.effort.pairs_by_precision["int8"] > 100


class Outlier(nn.Module):
    """One unit has a large effect on a channel of which the network makes nothing."""

    def __init__(self, times):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 32, 3, padding=1)
        self.third, self.head = nn.Conv2d(32, 32, 3, padding=1), nn.Linear(32, 10)
        with torch.no_grad():
            self.second.weight[0] = 0
            self.second.weight[0, 1] = times * self.second.weight[1:].abs().mean()
            self.third.weight[:, 0] = 0

    def forward(self, x):
        x = self.second(self.first(x).relu()).relu()
        return self.head(self.third(x).relu().mean((2, 3)))


@needs_eight_bits
@pytest.mark.parametrize("times", [100, 1000])
def test_a_number_that_dwarfs_all_others_of_a_pair(times):
    """In 8 bits the others are rounded to nothing, and the logits seem not to change."""
    torch.manual_seed(0)
    model, images = Outlier(times).eval(), torch.randn(128, 3, 8, 8)
    networks.spread_logits(model, images)
    labels = torch.zeros(128, dtype=torch.int64)
    found = pa.ablate(model, (images, labels), "first", precision="int8", audit=0)
    exact = pa.ablate(model, (images, labels), "first", precision="fp64", audit=0)
    assert np.array_equal(found.predictions()[1], exact.predictions()[1])
    assert found.effort.pairs_by_precision["int8"] > 0.5 * 64 * 128


class Pointwise(nn.Module):
    """1 x 1 convolutions, and one of each kind of reader behind them."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.first, self.relu = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()
        self.widen, self.narrow = nn.Conv2d(16, 48, 1), nn.Conv2d(48, 16, 1)
        self.spread, self.again = nn.Conv2d(48, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.step, self.head = nn.Conv2d(48, 16, 1, stride=2), nn.Linear(16, 5)

    def forward(self, x):
        x = self.relu(self.first(x))
        y = self.widen(functional.relu(self.again(x)))
        if self.kind == "pooled":
            y = self.narrow(functional.max_pool2d(functional.relu(y), 2))
        elif self.kind == "pooled bare":
            y = self.narrow(functional.max_pool2d(y, 2).relu())
        elif self.kind == "averaged bare":
            return self.head(self.narrow(y.relu()).mean((2, 3)))
        elif self.kind == "residual":
            y = self.again(functional.relu(self.narrow(functional.relu(y)) + self.again(x)))
        elif self.kind == "onto the unit":
            y = self.narrow(functional.relu(y)) + x
        elif self.kind == "3 x 3":
            y = self.again(functional.relu(self.spread(functional.relu(y))))
        elif self.kind == "both":
            y = functional.relu(y)
            y = self.spread(y) + self.narrow(y)
        elif self.kind == "stride":
            y = self.step(functional.relu(y))
        return self.head(functional.relu(y).mean((2, 3)))


BY_POSITION = {  # whether each 8-bit convolution reads factors of positions, in order
    "pooled": [False, False],
    "pooled bare": [False, True],
    "averaged bare": [False, True],
    "residual": [False, True, True],
    "onto the unit": [False, True],
    "3 x 3": [False, False, True],
    "both": [False, False, False],
    "stride": [False, False],
}


@needs_eight_bits
@pytest.mark.parametrize("kind", BY_POSITION)
def test_1_x_1_convolutions_read_factors_of_positions(kind, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(precision_cascade, "USELESS", 0.95)
    fine = []
    real = weighted_rules._steps

    def seen(quantized):
        fine.append(quantized.by_position)
        return real(quantized)

    monkeypatch.setattr(weighted_rules, "_steps", seen)
    images = torch.randn(96, 3, 10, 10)
    model = networks.made(Pointwise(kind), images)
    data = images, torch.randint(5, (96,))
    result = pa.ablate(model, data, "relu", precision="int8")
    assert reference.compare(result, model, data, "relu").mismatches == 0
    assert result.effort.pairs_by_precision["int8"] > 100
    assert result.effort.error_bounds["relu"]["int8"] < 0.6
    assert fine[: len(BY_POSITION[kind])] == BY_POSITION[kind]


class Across(nn.Module):
    """Units are columns of the maps onto which a 1 x 1 convolution is added."""

    def __init__(self):
        super().__init__()
        self.relu, self.inner, self.outer = nn.ReLU(), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.relu(x)
        y = self.inner(functional.relu(self.outer(x))) + x
        return self.head(functional.relu(y).mean((2, 3)))


@needs_eight_bits
def test_units_along_another_axis_are_added_at_their_places(monkeypatch):
    torch.manual_seed(2)
    monkeypatch.setattr(precision_cascade, "USELESS", 0.95)
    images = torch.randn(64, 16, 16, 16)  # channels, rows and columns are as many
    model = networks.made(Across(), images)
    data = images, torch.randint(5, (64,))
    result = pa.ablate(model, data, "relu", precision="int8", axis={"relu": 3}, audit=0)
    exact = pa.ablate(model, data, "relu", precision="fp64", axis={"relu": 3}, audit=0)
    assert np.array_equal(result.predictions(), exact.predictions())
    assert result.effort.pairs_by_precision["int8"] > 100
    assert result.effort.error_bounds["relu"]["int8"] < 0.6


@needs_eight_bits
def test_factors_of_positions_leave_fewer_pairs_open(monkeypatch, measured):
    """A unit speaks at a few places: the changes of all others were rounded to nothing."""
    torch.manual_seed(1)
    images = torch.randn(96, 3, 12, 12) * torch.logspace(-2, 1, 12).reshape(1, 1, 12, 1)
    model = networks.made(Pointwise("residual"), images)
    data = images, torch.randint(5, (96,))
    # As many are measured either way, so that what they say is doubted alike.
    monkeypatch.setattr(precision_cascade, "LEAST_SAMPLE", precision_cascade.SAMPLE)
    found, left = [], []
    for pointwise in (weighted_rules._pointwise, lambda graph, node: False):
        monkeypatch.setattr(weighted_rules, "_pointwise", pointwise)
        measured.clear()
        found.append(pa.ablate(model, data, "relu", precision="int8", audit=0))
        pairs = found[-1].effort.pairs_by_precision
        left.append(sum(pairs.values()) - pairs["int8"] - sum(measured))
    assert np.array_equal(found[0].predictions(), found[1].predictions())
    assert left[0] < 0.9 * left[1]
