"""What is captured as it is, what only looks so, and what runs by replay instead."""

from __future__ import annotations

import logging

import pytest
import torch
from support import networks
from support.fuzzing.cases import Case
from support.fuzzing.cases import check as check_case
from support.fuzzing.parts import Act, Conv, Network, Residual
from support.oracle import check
from torch import Tensor, nn

import pyablate as pa
from pyablate import ops
from pyablate.network.capture import capture

IN_PLACE = (Act("ELU", inplace=True), Conv(out=4), Act("ReLU"))


@pytest.mark.parametrize("strategy", ["auto", "replay"])
@pytest.mark.parametrize("double", [False, True])
def test_a_network_that_works_in_place_on_its_input(strategy, double):
    """Each pass changed the images that the next one saw, in the oracle and in float64 runs."""
    network = Network(parts=IN_PLACE, shape=(2, 5, 4), classes=4, seed=254)
    case = Case(network, images=8, double=double, strategy=strategy, intervention="mean")
    found = check_case(case)
    assert ("replay" in found.strategies) == (strategy == "replay")


@pytest.mark.parametrize("double", [False, True])
def test_a_network_that_works_in_place_on_its_input_leaves_the_images_alone(double):
    model, images, labels = Case(Network(IN_PLACE, classes=4), images=8, double=double).subject()
    before = images.clone()
    pa.ablate(model, (images, labels))
    pa.reference.ablate(model, (images, labels))
    pa.attributes(model, (images, labels), which=["mean", "l1_norm"])
    pa.compare(model, model, (images, labels))
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", ["ReLU", "Hardswish"])
def test_a_network_that_works_in_place_on_its_own_shortcut(name, caplog):
    """The shortcut reads what the branch has changed; captured, it read what was there before."""
    branch = Residual(inner=(Act(name, inplace=True), Conv(out=4)), operation="sub")
    check_case(Case(Network((Conv(out=4), branch), classes=4, seed=3), images=24))
    assert "works in place on a tensor that is read elsewhere" in caplog.text


@pytest.mark.parametrize("name", ["routed", "guarded"])
def test_what_defeats_export_is_replayed_and_says_so(name, caplog):
    model, images, labels = networks.network(name)
    with caplog.at_level(logging.WARNING, logger="pyablate"):
        result = check(model, (images, labels), ["*"])
    assert set(result.strategy.values()) <= {"replay", "replay (float64)"}  # routes are a jump
    assert set(result.strategy) == {"relu1", "relu2", "relu3"}
    assert any("replay" in record.message for record in caplog.records)


def test_a_network_that_counts_its_calls_is_replayed():
    """What changes other state than the images must not be captured as if it stood still."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.relu, self.head = nn.ReLU(), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.head(self.relu(x.flatten(1)))

    result = pa.ablate(Counting(), (torch.randn(6, 4), torch.arange(6) % 3))
    assert set(result.strategy.values()) == {"replay"}


class HalfPart(networks.Between):
    """Averages in half precision, as networks trained that way do."""

    def __init__(self, dtype: torch.dtype, behind: networks.Operator | None) -> None:
        super().__init__(behind=behind)
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        y = self.behind(self.conv2(self.relu(self.conv1(x))).to(self.dtype))
        return self.head(y.mean((2, 3)).to(x.dtype))


@pytest.mark.parametrize("behind", [None, nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_that_round_to_half_precision_run_by_replay(dtype, behind, caplog):
    """The network rounds the average of what is left, not the average of a difference."""
    torch.manual_seed(1)
    _, images, labels = networks.network("residual", 10)
    result = check(HalfPart(dtype, behind).eval(), (images, labels), ["relu"], ties=1.0)
    assert set(result.strategy.values()) == {"replay"}
    assert "half precision" in caplog.text


def test_complex_parameters_stay_complex():
    """Casting them to float32 would drop their imaginary parts."""

    class Fourier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(2, 8, 3, padding=1), nn.ReLU()
            draw = torch.Generator().manual_seed(3)
            self.mix = nn.Parameter(torch.randn(8, 12, 7, dtype=torch.complex64, generator=draw))
            self.head = nn.Linear(8, networks.CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.fft.rfft2(self.relu(self.conv(x))) * self.mix
            return self.head(torch.fft.irfft2(y, s=(12, 12)).relu().mean(dim=(2, 3)))

    _, images, labels = networks.network("residual", 17)
    model = Fourier().eval()
    with torch.no_grad():
        for tensor in (model.conv.weight, model.head.weight):
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
        expected = model(images).argmax(dim=1)
    result = check(model, (images, labels), "relu")
    assert (result.baseline == expected.numpy()).all()


@pytest.mark.parametrize(
    ("options", "dtype", "own"),
    [
        ({"groups": 8}, torch.float64, True),
        ({"groups": 8, "stride": 2, "padding": 1, "dilation": 2}, torch.float64, True),
        ({"groups": 8, "bias": False}, torch.float64, True),
        ({"groups": 8}, torch.float32, False),
        ({"groups": 4}, torch.float64, False),
        ({"groups": 8, "out_channels": 16}, torch.float64, False),
    ],
    ids=str,
)
def test_depthwise_convolutions_in_float64_are_our_own(options, dtype, own, monkeypatch):
    torch.manual_seed(0)
    options = {"in_channels": 8, "out_channels": 8, "kernel_size": 3} | options
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(**options)).to(dtype).eval()
    x = torch.randn(4, 3, 12, 12, dtype=dtype)
    graph = capture(nn.Sequential(*model, nn.Flatten()), x, [])
    calls = []
    real = ops.depthwise
    monkeypatch.setattr(ops, "depthwise", lambda *a, **b: calls.append(a) or real(*a, **b))
    with torch.no_grad():
        found = graph.run(x, [graph.logits])[graph.logits]
        torch.testing.assert_close(found, model(x).flatten(1))
    assert bool(calls) is own
    weighted = graph.run(x.clone().requires_grad_(), [graph.logits])[graph.logits]
    assert weighted.requires_grad
