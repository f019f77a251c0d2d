"""Winograd's convolution in the engine: where it is used, and that predictions stay exact."""

import numpy as np
import pytest
import torch
from support import networks
from torch import nn

import pyablate as pa
from pyablate import _native, ops, reference
from pyablate.engine import winograd

pytestmark = pytest.mark.skipif(_native.core is None, reason="the extension is missing")

UNTIMED = {"progress": False, "audit": 0}


@pytest.fixture
def used(monkeypatch):
    """Take it to be fast at any size that there is; return the shapes that it was called with."""
    calls = []
    real = ops.delta_winograd

    def counted(delta, *arguments, **options):
        calls.append((delta.shape, options["activation"], options["addend"] is not None))
        return real(delta, *arguments, **options)

    monkeypatch.setattr(winograd, "GAINS", {32: 10.0})
    monkeypatch.setattr(winograd, "LEAST_CHANNELS", 1)
    monkeypatch.setattr(ops, "delta_winograd", counted)
    return calls


class Plain(nn.Module):
    """A unit's convolution, and one of each kind behind it."""

    def __init__(self, **options):
        super().__init__()
        options = {"padding": 1} | options
        self.first, self.relu = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()
        self.second = nn.Conv2d(16, 32, 3, padding=1)
        self.third = nn.Conv2d(32, 32, 3, **options)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.second(self.relu(self.first(x))).relu()
        return self.head(self.third(x).relu().mean((2, 3)))


class Residual(Plain):
    """The same with a shortcut around the third."""

    def forward(self, x):
        x = self.second(self.relu(self.first(x))).relu()
        return self.head((self.third(x) + x).relu().mean((2, 3)))


class Unread(Plain):
    """No activation reads the third."""

    def forward(self, x):
        x = self.second(self.relu(self.first(x))).relu()
        return self.head(self.third(x).mean((2, 3)))


def data_of(model, side=11, images=40):
    torch.manual_seed(0)
    x = torch.randn(images, 3, side, side) + torch.randn(images, 3, 1, 1)
    return networks.made(model, x), x, torch.randint(5, (images,))


@pytest.mark.parametrize(
    ("build", "activated", "added"),
    [(Plain, "relu", False), (Residual, "relu", True), (Unread, None, False)],
)
def test_predictions_are_exact(used, build, activated, added):
    model, x, labels = data_of(build())
    result = pa.ablate(model, (x, labels), "relu", **UNTIMED)
    assert reference.compare(result, model, (x, labels), "relu").mismatches == 0
    assert sum(shape[0] for shape, _, _ in used) > 0
    for shape, activation, addend in used:
        assert shape[1:] == (32, 11, 11)
        assert (activation and activation.name) == activated
        assert addend is added


@pytest.mark.parametrize(
    "options",
    [{"stride": 2}, {"dilation": 2}, {"groups": 2}, {"kernel_size": 1}, {"kernel_size": 5}],
    ids=str,
)
def test_other_convolutions_go_their_way(used, options):
    model, x, labels = data_of(Plain())
    options = {"kernel_size": 3} | options
    model.third = nn.Conv2d(32, 32, **options)
    model = networks.made(model, x)
    result = pa.ablate(model, (x, labels), "relu", **UNTIMED)
    assert reference.compare(result, model, (x, labels), "relu").mismatches == 0
    assert not used


def test_float64_is_left_alone(used):
    model, x, labels = data_of(Plain())
    pa.ablate(model.double(), (x.double(), labels), "relu", **UNTIMED)
    assert not used


def test_it_has_to_pay(used, monkeypatch):
    model, x, labels = data_of(Plain(), side=9)  # 3 x 3 tiles of 4 x 4 for 9 x 9 positions
    least = winograd.GAIN * 16 * 9 / 81
    monkeypatch.setattr(winograd, "GAINS", {32: least - 0.01})
    pa.ablate(model, (x, labels), "relu", **UNTIMED)
    assert not used
    model, x, labels = data_of(Plain(), side=9)
    monkeypatch.setattr(winograd, "GAINS", {32: least + 0.01})
    pa.ablate(model, (x, labels), "relu", **UNTIMED)
    assert used


class DeadBeside(nn.Module):
    """Where an image is dark the third convolution stays far below 0, whatever a unit does there.

    The changes there are many times those beside them, and share tiles with them.
    """

    def __init__(self, times):
        super().__init__()
        self.times = times
        self.first, self.relu = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()
        self.second = nn.Conv2d(16, 32, 3, padding=1)
        self.third, self.head = nn.Conv2d(32, 32, 3, padding=1), nn.Linear(32, 5)

    def forward(self, x):
        dark = (x[:, :1] > 1.5).to(x.dtype)
        y = self.second(self.relu(self.first(x))).relu() * (1 + self.times * dark)
        near = nn.functional.max_pool2d(dark, 3, stride=1, padding=1)
        return self.head((self.third(y) - 1e4 * self.times * near).relu().mean((2, 3)))


@pytest.mark.parametrize("times", [100.0, 1e4])
def test_large_changes_of_which_nothing_comes(used, times):
    model, x, labels = data_of(DeadBeside(times), images=150)
    found = pa.ablate(model, (x, labels), "relu", **UNTIMED)
    exact = pa.ablate(model, (x, labels), "relu", precision="fp64", **UNTIMED)
    assert used
    assert np.array_equal(found.predictions(), exact.predictions())
    assert (exact.predictions() != exact.baseline).sum() > 50


class OddShapes(nn.Module):
    """Convolutions whose settings come in other forms, and results that are read twice."""

    def __init__(self):
        super().__init__()
        self.first, self.relu = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()
        self.second = nn.Conv2d(16, 32, 3, padding="same")
        self.third, self.fourth = (nn.Conv2d(32, 32, 3, padding=1) for _ in range(2))
        self.line, self.head = nn.Conv1d(32, 32, 3, padding=1), nn.Linear(32, 5)

    def forward(self, x):
        x = self.second(self.relu(self.first(x))).relu()
        left, right = self.third(x), self.fourth(x)
        x = (left + right).relu() + (left + left).relu()
        return self.head(self.line(x.flatten(2)).relu().mean(2))


def test_read_twice_and_given_in_other_forms(used):
    model, x, labels = data_of(OddShapes(), side=8)
    result = pa.ablate(model, (x, labels), "relu", **UNTIMED)
    assert reference.compare(result, model, (x, labels), "relu").mismatches == 0
    assert used


def test_losses_and_screened_runs_are_the_same_every_time(used):
    model, x, labels = data_of(Plain(), images=64)
    for options in ({"measures": ["loss"]}, {"guarantee": "screened"}):
        one, other, cut = (
            pa.ablate(model, (x, labels), "relu", batch_size=size, **options, **UNTIMED)
            for size in (64, 64, 16)
        )
        assert np.array_equal(one.predictions(), other.predictions())
        assert np.array_equal(one.predictions(), cut.predictions())
        if "measures" in options:
            assert np.array_equal(one.loss_change, other.loss_change)
