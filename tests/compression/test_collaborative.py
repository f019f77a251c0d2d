"""Collaborative compression against its definition: units removed one at a time, in slow loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from support.compressible import Mobile, Written, images, made
from support.state import state_of
from torch import Tensor, nn
from torch.nn import functional

import pyablate as pa
from pyablate.compression import collaborative_compression
from pyablate.compression.collaborative import (
    Layer,
    Left,
    Select,
    _exponential,
    _gradients,
    best_rates,
)
from pyablate.data.dataset import Data

pytest.importorskip("torch_pruning")

PICTURES, LABELS = images(24), torch.arange(24) % 5
DATA = PICTURES, LABELS


def layer(outputs: int = 5, inputs: int = 4, kernel: int = 2, seed: int = 0) -> Layer:
    draw = torch.Generator().manual_seed(seed)
    weight, gradient = torch.randn(2, outputs, inputs, kernel, generator=draw)
    return Layer.of(weight, gradient)


def lost(weight: Tensor, one: Layer) -> float:
    """``sum (g (W_new - W))^2``, entry by entry."""
    pairs = zip(weight.flatten(), one.weight.flatten(), one.squared.flatten(), strict=True)
    return float(sum(g * (new - old) ** 2 for new, old, g in pairs))


def removals(left: Left) -> list[tuple[str, int, Tensor]]:
    """Every channel and singular value that is left, with the weights once it has gone."""
    found = []
    for channel in range(len(left.reads)):
        if left.reads[channel]:
            weight = left.weight.clone()
            weight[:, channel] = 0
            found.append(("channel", channel, weight))
    u, s, v = np.linalg.svd(left.weight.flatten(1).numpy(), full_matrices=False)
    for value in range(left.rank):
        values = s.copy()
        values[value] = 0
        product = torch.from_numpy((u * values) @ v).reshape(left.weight.shape)
        found.append(("value", value, product))
    return found


def slow_scores(one: Layer, left: Left) -> list[float]:
    scores = []
    for kind, number, weight in removals(left):
        reads = left.reads.clone()
        if kind == "channel":
            reads[number] = False
        rank = left.rank - (kind == "value")
        after = Left(weight, reads, min(rank, int(reads.sum()) * weight.shape[2]))
        ahead = [lost(further, one) for _, _, further in removals(after)]
        scores.append(lost(weight, one) + 0.9 * np.mean(ahead))
    return scores


@pytest.mark.parametrize("shape", [(5, 4, 2), (3, 4, 2), (6, 3, 1)])
def test_scores_against_removing_every_unit_and_one_more(shape):
    one = layer(*shape)
    left = one.intact()
    for channels, values in (([], []), ([2], []), ([], [0]), ([1], [1])):
        if len(values) >= left.rank:
            break
        left = left.without(channels, values)
        mine = one.scores(left)
        kept = torch.cat([left.reads, torch.ones(left.rank, dtype=torch.bool)])
        if left.reads.sum() > 1 and left.rank > 1:
            np.testing.assert_allclose(mine[kept].numpy(), slow_scores(one, left), rtol=1e-8)
        assert (mine[~kept] == torch.inf).all()


def test_gradients_are_those_of_the_mean_loss():
    model = made(Mobile)
    model.requires_grad_(False)
    weights = [model.fc.weight, model.blocks[0].expand[0].weight]
    data = Data(DATA, dtype=torch.float32, device=torch.device("cpu"))
    found = _gradients(model, data, weights, 7)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.requires_grad_(True)
    loss = functional.cross_entropy(model(PICTURES), LABELS)
    for mine, expected in zip(found, torch.autograd.grad(loss, weights), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rate", [0.3, 0.7])
def test_what_scores_lowest_goes_until_enough_is_gone(rate):
    one = layer(4, 4, 2)
    left = one.intact()
    while left.size() > (1 - rate) * 32:
        scores = slow_scores(one, left)
        kind, number, _ = removals(left)[int(np.argmin(scores))]
        left = left.without([number], []) if kind == "channel" else left.without([], [number])
    found = one.compressed(rate, 1e-9)
    assert torch.equal(found.reads, left.reads)
    assert found.size() <= (1 - rate) * 32
    if left.whole > (1 - rate) * 32:
        torch.testing.assert_close(found.weight, left.weight)
        assert torch.linalg.matrix_rank(found.weight.flatten(1)) <= found.rank == left.rank
    else:
        assert torch.equal(found.weight, one.weight * found.reads[:, None])
    assert not found.weight[:, ~found.reads].any()


def test_channels_that_cost_nothing_go_alone_and_so_do_singular_values():
    one = layer(6, 5, 2)
    one.squared[:, [1, 3]] = 0
    found = one.compressed(0.4, 0.05)
    assert found.reads.tolist() == [True, False, True, False, True]
    assert torch.equal(found.weight[:, found.reads], one.weight[:, found.reads])
    u, v = torch.randn(2, 12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    low = Layer((u @ v.T).reshape(12, 6, 2), torch.ones(12, 6, 2, dtype=torch.float64))
    found = low.compressed(0.6, 0.05)
    assert (found.rank, found.reads.all()) == (2, True)
    torch.testing.assert_close(found.weight, low.weight)
    assert torch.equal(one.compressed(0.0, 0.05).weight, one.weight)
    least = one.compressed(0.999, 1.0)
    assert (int(least.reads.sum()), least.size()) == (1, 8)  # one channel and one value stay


def test_the_curve_ends_with_all_that_there_is():
    one = layer(6, 5, 2)
    rates, losses = one.curve(0.1)
    assert (rates[0], losses[0], rates[-1]) == (0, 0, 1)
    assert losses[-1] == pytest.approx(lost(torch.zeros(6, 5, 2), one))
    alone = [lost(weight, one) for _, _, weight in removals(one.intact())]
    order = np.argsort(alone)  # the first three, which may still take as many weights as before
    left = one.intact().without(
        [int(u) for u in order[:8] if u < 5], [int(u) - 5 for u in order[:8] if u >= 5]
    )
    rate = 1 - left.size() / 60
    assert rate == 0 or losses[rates.index(rate)] == pytest.approx(lost(left.weight, one))


def test_rates_are_the_best_for_what_was_fitted():
    rates = np.linspace(0, 1, 21)
    curves = [(rates, np.exp(b * rates + a)) for a, b in ((-9, 9), (-4, 4), (-6, 5))]
    sizes = np.array([100, 900, 400])
    fits = np.array([_exponential(*curve) for curve in curves])
    np.testing.assert_allclose(fits[:, 1], [9, 4, 5], rtol=1e-3)
    np.testing.assert_allclose(fits[:, 0], [-9, -4, -5], atol=1e-3)  # the largest loss is 1

    def total(chosen):
        return np.exp(fits[:, 0] + fits[:, 1] * chosen).sum()

    for fraction in (0.0, 0.2, 0.6, 0.95):
        found = best_rates(curves, sizes, fraction)
        assert found @ sizes == pytest.approx(fraction * 1400, abs=1e-6)
        assert found.min() >= 0
        assert found.max() <= 0.95
        wanted = {
            "type": "eq",
            "fun": lambda x, fraction=fraction: x @ sizes / 1400 - fraction,
        }
        best = minimize(total, [0.4] * 3, bounds=[(0, 0.95)] * 3, constraints=wanted)
        assert total(found) <= best.fun + 1e-6
    # A layer whose weights cost nothing gives all that it may.
    free = best_rates([*curves, (rates, np.zeros(21))], np.array([100, 900, 400, 100]), 0.05)
    assert free[3] > 10 * free[:3].max()


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_the_network_computes_what_its_weights_say(fraction):
    model = made(Mobile)
    before = state_of(model)
    found = collaborative_compression(model, PICTURES[:2], DATA, fraction, step=0.2)
    assert state_of(model) == before
    assert found.bits <= found.original_bits
    if fraction == 0:
        assert found.removed == ()
        with torch.no_grad():
            torch.testing.assert_close(found.model(PICTURES), model(PICTURES))
        assert found.bits == found.original_bits
        return
    chosen = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    chosen = {n: m for n, m in chosen.items() if getattr(m, "groups", 1) == 1}
    loss = functional.cross_entropy(model(PICTURES), LABELS)
    gradients = torch.autograd.grad(loss, [module.weight for module in chosen.values()])
    layers = [Layer.of(m.weight, g) for m, g in zip(chosen.values(), gradients, strict=True)]
    sizes = np.array([one.weight.numel() for one in layers])
    rates = best_rates([one.curve(0.2) for one in layers], sizes, fraction)
    other = made(Mobile)
    for name, one, rate in zip(chosen, layers, rates, strict=True):
        weight = other.get_submodule(name).weight
        with torch.no_grad():
            weight.copy_(one.compressed(float(rate), 0.2).weight.reshape(weight.shape))
    with torch.no_grad():
        torch.testing.assert_close(found.model(PICTURES), other(PICTURES), rtol=1e-3, atol=1e-4)
    parts = list(found.model.modules())
    selected = [part for part in parts if isinstance(part, Select)]
    assert selected
    assert any(
        isinstance(part, nn.Sequential) and isinstance(part[-1], nn.Conv2d) and len(part) == 2
        for part in parts
    )
    parameters = 32 * sum(p.numel() for p in found.model.parameters())
    assert parameters < found.bits <= parameters + sum(m.weight.shape[1] for m in chosen.values())
    right = (found.model(PICTURES).argmax(1) == LABELS).double().mean()
    assert pa.compare(model, found.model, DATA).after.accuracy == pytest.approx(float(right))


class Chain(nn.Module):
    """Two convolutions; ``sums`` adds the maps between them to the logits, without weights."""

    def __init__(self, sums: bool = False) -> None:
        super().__init__()
        self.sums = sums
        self.first, self.relu = nn.Conv2d(3, 8, 3), nn.ReLU()
        self.second, self.last, self.fc = nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.first(x))
        logits = self.fc(self.last(self.second(h)).mean((2, 3)))
        return logits + h.sum((1, 2, 3))[:, None] * logits if self.sums else logits


@pytest.mark.parametrize("sums", [False, True])
def test_units_that_nobody_reads_go(sums):
    torch.manual_seed(0)
    model = Chain(sums).eval()
    with torch.no_grad():
        model.second.weight[:, [2, 5]] *= 1e-4
    found = collaborative_compression(model, PICTURES[:2], DATA, 0.25, layers="second")
    with torch.no_grad():
        model.second.weight[:, [2, 5]] = 0
        torch.testing.assert_close(found.model(PICTURES), model(PICTURES), rtol=1e-4, atol=1e-5)
    if sums:
        assert found.removed == ()
        assert found.model.second[0].channels.tolist() == [0, 1, 3, 4, 6, 7]
    else:
        assert found.removed == ("relu:2", "relu:5")
        assert found.model.first.out_channels == 6
        assert isinstance(found.model.second, nn.Conv2d)
        assert found.bits == 32 * sum(p.numel() for p in found.model.parameters())


class Transposed(nn.Module):
    """A transposed convolution reads eight channels and makes four."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu = nn.Conv2d(3, 8, 3), nn.ReLU()
        self.up, self.last = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.ReLU()
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.up(self.relu(self.first(x)))).mean((2, 3)))


def test_what_a_transposed_convolution_reads_stays():
    model = made(Transposed)
    with torch.no_grad():
        model.up.weight[[1, 6]] = 0
        model.fc.weight[:, 2] = 0
    found = collaborative_compression(model, PICTURES[:2], DATA, 0.0)
    assert found.removed == ("relu:1", "relu:6", "last:2")
    with torch.no_grad():
        torch.testing.assert_close(found.model(PICTURES), model(PICTURES))


def test_sizes_in_the_code_and_features_of_a_flat_layer():
    model = made(Written)
    with torch.no_grad():
        model.fc.weight[:, 36:72] = 0  # the second channel, in all its features
    found = collaborative_compression(model, PICTURES[:2], DATA, 0.25, layers="fc", step=0.3)
    assert found.removed == ()  # with fewer channels the network would not run
    assert found.model.fc[0].channels.tolist() == [*range(36), *range(72, 144)]
    with torch.no_grad():
        torch.testing.assert_close(found.model(PICTURES), model(PICTURES))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fraction": 0.96}, ValueError, "fraction: expected a number from 0 to 0.95"),
        ({"fraction": -0.1}, ValueError, "fraction"),
        ({"step": 0.0}, ValueError, "step"),
        ({"step": 1.1}, ValueError, "step"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"layers": "fcc"}, ValueError, "nearest: fc"),
        ({"layers": "blocks.0.depthwise.0"}, ValueError, "neither in groups nor transposed"),
        ({"data": 3}, TypeError, "data"),
        ({"sample": 3}, TypeError, "sample"),
        ({"model": 3}, TypeError, "model"),
    ],
)
def test_bad_input(options, error, message):
    given = {"model": made(Mobile), "sample": PICTURES[:2], "data": DATA, "fraction": 0.1}
    given |= {"layers": "fc", **options}
    with pytest.raises(error, match=message):
        collaborative_compression(**given)
