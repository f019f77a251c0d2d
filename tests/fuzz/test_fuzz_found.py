"""What random networks have found, reduced; each was wrong before it was mended."""

from __future__ import annotations

import pytest
import torch
from support.fuzzing.cases import Case, check
from support.fuzzing.parts import Act, Awkward, Conv, Network, Residual
from torch import nn

import pyablate as pa

IN_PLACE = (Act("ELU", inplace=True), Conv(out=4), Act("ReLU"))


@pytest.mark.parametrize("strategy", ["auto", "replay"])
@pytest.mark.parametrize("double", [False, True])
def test_a_network_that_works_in_place_on_its_input(strategy: str, double: bool) -> None:
    """Each pass changed the images that the next one saw, in the oracle and in float64 runs."""
    network = Network(parts=IN_PLACE, shape=(2, 5, 4), classes=4, seed=254)
    check(Case(network, images=8, double=double, strategy=strategy, intervention="mean"))


def test_a_network_that_works_in_place_on_its_input_leaves_the_images_alone() -> None:
    model, images, labels = Case(Network(IN_PLACE, classes=4), images=8, double=True).subject()
    before = images.clone()
    pa.ablate(model, (images, labels), progress=False)
    pa.reference.ablate(model, (images, labels), progress=False)
    pa.attributes(model, (images, labels), which=["mean", "l1_norm"], progress=False)
    pa.compare(model, model, (images, labels))
    assert torch.equal(images, before)


def test_a_network_that_works_in_place_on_its_input_is_captured() -> None:
    model, images, labels = Case(Network(IN_PLACE, classes=4), images=8).subject()
    result = pa.ablate(model, (images, labels), progress=False)
    assert "replay" not in result.strategy.values()


@pytest.mark.parametrize("name", ["ReLU", "Hardswish"])
def test_a_network_that_works_in_place_on_its_own_shortcut(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The shortcut reads what the branch has changed; captured, it read what was there before."""
    branch = Residual(inner=(Act(name, inplace=True), Conv(out=4)), operation="sub")
    check(Case(Network((Conv(out=4), branch), classes=4, seed=3), images=24))
    assert "works in place on a tensor that is read elsewhere" in caplog.text


def test_pairs_that_are_all_of_watched_images() -> None:
    """The share of the sample that is of other images was empty."""
    check(Case(Network((Act(),), (1, 2), 2, seed=11), images=48, precision="bf16", batch_size=3))


def test_what_is_tiny_behind_a_hard_softmax_counts() -> None:
    """Base + (after - before) is 0 where after is 1e-20, and the next operator divides by it."""
    parts = (
        Act("LeakyReLU"),
        Awkward("steep", "hard softmax"),
        Awkward("swallowed", "share of two"),
    )
    check(Case(Network(parts, (3, 7, 7), seed=3977), images=128))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile's own
def test_a_compiled_network_is_taken_as_it_was() -> None:
    model, images, labels = Case(Network((Conv(out=4), Act("ReLU")), classes=4), images=8).subject()
    plain = pa.ablate(model, (images, labels), progress=False)
    compiled = pa.ablate(torch.compile(model), (images, labels), progress=False)
    assert list(compiled.units["label"]) == list(plain.units["label"])
    assert (compiled.predictions() == plain.predictions()).all()


def test_a_network_that_counts_its_calls_is_replayed() -> None:
    """What changes other state than the images must not be captured as if it stood still."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.relu = nn.ReLU()
            self.head = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.head(self.relu(x.flatten(1)))

    images, labels = torch.randn(6, 4), torch.arange(6) % 3
    result = pa.ablate(Counting(), (images, labels), progress=False)
    assert set(result.strategy.values()) == {"replay"}


@pytest.mark.parametrize("strategy", ["auto", "replay"])
@pytest.mark.parametrize("large", [float("inf"), float("nan")])
def test_logits_that_are_not_finite_are_named(strategy: str, large: float) -> None:
    """The checks before the clean run failed first, in PyTorch's words."""

    class Overflowing(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.flatten(1)) + large

    model = Overflowing(nn.ReLU(), nn.Linear(4, 3))
    images, labels = torch.randn(6, 4), torch.arange(6) % 3
    with pytest.raises(ValueError, match="model: the logits of image 0 are NaN or infinite"):
        pa.ablate(model, (images, labels), strategy=strategy, progress=False)
