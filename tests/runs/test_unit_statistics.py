"""Means and deviations that stand for units, where float32 falls on another side of a jump."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from pyablate.interventions import parse
from pyablate.runs.setup import SetupOptions, prepare


class Signs(nn.Module):
    """The sign of normalised images, whose offset leaves float32 few digits."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.InstanceNorm2d(1), nn.Conv2d(1, 4, 3)
        self.relu, self.head = nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.conv(self.norm(x).sign())).mean(dim=(2, 3)))


def test_statistics_behind_a_jump_are_those_of_float64() -> None:
    torch.manual_seed(0)
    model, images = Signs().eval(), 1e4 + torch.randn(60, 1, 8, 8)
    options = SetupOptions(layers=["relu"], groups=None, intervention=parse("mean"))
    setup = prepare(model, (images, torch.arange(60) % 3), options)
    (found,) = setup.statistics.values()

    def maps(network: nn.Module, x: Tensor) -> Tensor:
        return network.relu(network.conv(network.norm(x).sign())).detach().double()

    exact = maps(copy.deepcopy(model).double(), images.double()).mean(dim=(0, 2, 3))
    torch.testing.assert_close(found.mean, exact, rtol=1e-12, atol=0.0)
    assert (maps(model, images).mean(dim=(0, 2, 3)) - exact).abs().max() > 1e-6  # it matters here
