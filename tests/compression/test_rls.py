"""Recursive least squares against what it is defined by, and pruning by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.compressible import Mobile, made
from support.compressible import images as pictures
from support.pooled import pooled
from support.state import state_of
from torch import Tensor, nn
from torch.nn import functional

from pyablate import compression
from pyablate.compression.rls import ROWS, Inverses, _scored, input_rows

LABELS = torch.arange(48) % 4
X = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


@pytest.mark.parametrize("forgetting", [1.0, 0.9])
def test_inverse_of_the_accumulated_autocorrelation(forgetting):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    ).double()
    inverses = Inverses(model, forgetting, start=4.0)
    autocorrelation = [torch.eye(27).double() / 4, torch.eye(64).double() / 4]
    for step in range(3):
        x = drawn(4, 3, 8, 8, seed=step)
        with inverses.applied(model):
            model.train()(x)
            model.eval()(2 * x)  # of this nothing is learnt
        rows = functional.unfold(x, 3, stride=2, padding=1).transpose(1, 2).flatten(0, 1)
        for number, read in enumerate((rows, model[:3](x).detach())):
            mean = sum(torch.outer(row, row) for row in read) / len(read)
            autocorrelation[number] = forgetting * autocorrelation[number] + mean
    model.train()(drawn(4, 3, 8, 8))  # nor of this: the hooks are gone
    for name, expected in zip(("0", "3"), autocorrelation, strict=True):
        torch.testing.assert_close(inverses.matrices[name], torch.linalg.inv(expected))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(5, 4), (6, 7, 5)),
        (nn.Conv1d(3, 4, 3, stride=2, dilation=2, padding=1), (4, 3, 11)),
        (
            nn.Conv2d(3, 4, (3, 2), padding="same", dilation=2, padding_mode="circular"),
            (2, 3, 6, 7),
        ),
        (nn.Conv3d(2, 4, (1, 2, 3), stride=(2, 1, 1)), (2, 2, 3, 4, 5)),
    ],
)
def test_rows_are_what_the_weights_meet(module, shape):
    module, x = module.double(), drawn(*shape)
    made = input_rows(module, x) @ module.weight.flatten(1).T + module.bias
    axis = -1 if isinstance(module, nn.Linear) else 1
    torch.testing.assert_close(made, module(x).movedim(axis, -1).flatten(0, -2))


def test_of_many_rows_some_are_drawn():
    rows = input_rows(nn.Conv2d(2, 3, 1), torch.arange(1000.0).reshape(5, 2, 10, 10))
    assert rows.shape == (ROWS, 2)
    assert torch.equal(rows[:, 1], rows[:, 0] + 100)  # the channels of one place
    assert len(rows[:, 0].unique()) > 100


def test_least_squares_are_reached_in_one_pass():
    x, y = drawn(60, 7), drawn(60, 3, seed=2)
    model = nn.Linear(7, 3, bias=False).double()
    network = nn.Sequential(model)
    inverses = Inverses(network, 1.0, start=1e9)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    with inverses.applied(network):
        for images, targets in zip(x.split(10), y.split(10), strict=True):
            optimizer.zero_grad()
            ((network(images) - targets).square().sum(1).mean() / 2).backward()
            optimizer.step()
    expected = torch.linalg.lstsq(x, y).solution.T
    torch.testing.assert_close(model.weight.detach(), expected, atol=1e-6, rtol=1e-6)
    # An input counts what the squared error grows by when it is gone and the others make up for it.
    best = (x @ expected.T - y).square().sum()
    for gone, found in enumerate(inverses.importance(network)["0"]):
        left = x[:, [i for i in range(7) if i != gone]]
        error = (left @ torch.linalg.lstsq(left, y).solution - y).square().sum()
        assert float(found) == pytest.approx(float(error - best) / 10, rel=1e-6)


def test_importance_of_a_channel_is_the_sum_over_its_kernel():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    inverses = Inverses(model, 1.0)
    inverses.update("0", drawn(50, 27))
    inverse, weight = inverses.matrices["0"].diagonal(), model[0].weight.detach().double()
    for channel in range(3):
        expected = sum(
            float(weight[o, channel, i, j]) ** 2 / float(inverse[9 * channel + 3 * i + j])
            for o in range(4)
            for i in range(3)
            for j in range(3)
        )
        assert float(inverses.importance(model)["0"][channel]) == pytest.approx(expected)


def test_the_channel_that_counts_least_is_missed_least():
    pytest.importorskip("torch_pruning")
    model = pooled(0, channels=6)
    with torch.no_grad():  # outgoing weights of one size: what tells is what the inputs are
        model.fc.weight.copy_(model.fc.weight.sign())
        model.conv.weight.mul_(torch.tensor([1, 0.7, 0.05, 0.4, 0.9, 0.5])[:, None, None, None])
        model.conv.bias.zero_()
    inverses = Inverses(model, 1.0)
    with inverses.applied(model):
        model.train()(X)
    ranking = _scored(model.eval(), X[:2], inverses)
    changes = {}
    with torch.no_grad():
        for unit in (f"relu:{number}" for number in range(6)):
            smaller = compression.remove(model, [unit], X[:2]).model
            changes[unit] = float((smaller(X) - model(X)).square().mean())
    assert ranking.order[0].label == min(changes, key=changes.__getitem__) == "relu:2"
    assert ranking.order[-1].label != "relu:2"


def test_what_is_removed_is_named_as_in_the_original():
    pytest.importorskip("torch_pruning")
    model, data = pooled(1, channels=9), (X, LABELS)
    before = state_of(model)
    # So slow that all weights stay what they were.
    options: dict[str, Any] = {"learning_rate": 1e-12, "weight_decay": 0.0, "batch_size": 16}
    found = compression.rls_pruning(model, X[:2], data, 0.7, rounds=3, epochs=2, **options)
    assert state_of(model) == before
    assert found.history is not None
    assert found.history["removed"].unique().tolist() == [0, 2, 4, 6]
    assert found.history["epoch"].tolist() == list(range(1, len(found.history) + 1))
    assert len(set(found.removed)) == 6
    kept = [n for n in range(9) if f"relu:{n}" not in found.removed]
    torch.testing.assert_close(found.model.conv.weight, model.conv.weight[kept])
    torch.testing.assert_close(found.model.fc.weight, model.fc.weight[:, kept])
    assert found.bits == 32 * sum(p.numel() for p in found.model.parameters())
    again = compression.rls_pruning(model, X[:2], data, 0.7, rounds=3, epochs=2, **options)
    assert state_of(found.model)["values"] == state_of(again.model)["values"]
    # With nothing gone one pass recovers.
    found = compression.rls_pruning(model, X[:2], data, 0.0, rounds=2, epochs=3, batch_size=16)
    assert found.removed == ()
    assert found.history is not None
    assert len(found.history) == 5


@pytest.mark.parametrize("rounds", [1, 3, 6])
def test_of_each_layer_the_fraction_goes_in_however_many_parts(rounds):
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 10, 3), nn.Conv2d(10, 4, 3)
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), *pool, nn.Linear(4, 4)).eval()
    options: dict[str, Any] = {"rounds": rounds, "epochs": 1, "batch_size": 48}
    found = compression.rls_pruning(model, X[:2], (X, LABELS), 0.3, **options)
    assert (found.model[0].out_channels, found.model[2].out_channels) == (7, 3)


def test_training_learns_and_takes_any_layer():
    pytest.importorskip("torch_pruning")
    model, x = made(Mobile), pictures(24)
    data = x, torch.arange(24) % 5
    options: dict[str, Any] = {"rounds": 1, "epochs": 2, "batch_size": 8, "forgetting": 0.9}
    found = compression.rls_pruning(model, x[:2], data, 0.3, **options)
    assert found.removed != ()
    assert found.history is not None
    assert found.history["cross_entropy"][1] < found.history["cross_entropy"][0]
    assert found.ratio > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 1.5}, "fraction: expected a number from 0 to 1"),
        ({"rounds": 0}, "rounds: expected at least 1"),
        ({"forgetting": 0.0}, "forgetting: expected a number above 0 and up to 1, got 0.0"),
        ({"forgetting": 1.01}, "forgetting"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"epochs": 1.5}, "epochs"),
        ({"data": X}, "data"),
        ({"model": 3}, "model"),
        ({"sample": "x"}, "sample"),
    ],
)
def test_bad_input(options, message):
    pytest.importorskip("torch_pruning")
    given = {"model": pooled(0), "sample": X[:2], "data": (X, LABELS), "fraction": 0.5} | options
    with pytest.raises((ValueError, TypeError), match=message):
        compression.rls_pruning(**given)


class Tied(nn.Module):
    """Two layers that share one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(c, 3, 3, padding=1) for c in (3, 3, 3))
        self.second.weight = self.first.weight
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.third(self.second(self.first(x).relu()).relu()).relu()
        return self.head(x.mean((2, 3)))


def test_shared_weights_are_refused_by_the_names_of_their_layers():
    with pytest.raises(ValueError, match="model: first and second share their weights"):
        compression.rls_pruning(Tied(), X[:2], (X, LABELS), 0.3, epochs=1, progress=False)


def test_weights_that_are_computed_from_others_are_refused_by_name():
    model = pooled(0)
    name = next(name for name, each in model.named_modules() if isinstance(each, nn.Conv2d))
    nn.utils.parametrizations.weight_norm(model.get_submodule(name))
    with pytest.raises(ValueError, match=f"the weights of {name} are computed from others"):
        compression.rls_pruning(model, X[:2], (X, LABELS), 0.3, epochs=1, progress=False)
