"""Weight unification against its definition: slow loops, brute force, and ADMM by hand."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from support.pooled import Pooled, pooled
from support.state import state_of
from torch import Tensor, nn
from torch.nn import functional

import pyablate as pa
from pyablate.compression import unify_weights
from pyablate.compression.unification import unified

LABELS = torch.arange(48) % 4
PICTURES = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PICTURES[torch.arange(48), LABELS % 3, :4, :4] += 1.5


def matrix(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def blocks_of(weight: np.ndarray, block: tuple[int, int]) -> list[tuple[slice, slice]]:
    rows, columns = weight.shape
    return [
        (slice(r, r + block[0]), slice(c, c + block[1]))
        for r in range(0, rows, block[0])
        for c in range(0, columns, block[1])
    ]


@pytest.mark.parametrize("block", [(1, 8), (4, 4), (3, 100), (1, 1)])
@pytest.mark.parametrize("shape", [(6, 3, 3, 3), (10, 7), (9, 2, 5)])
def test_a_block_has_the_mean_magnitude_and_its_signs(block, shape):
    weight = matrix(shape[0], int(np.prod(shape[1:]))).reshape(shape)
    values, taken, sizes = unified(weight, block, 1.0)
    old = weight.flatten(1).double().numpy()
    expected = np.empty_like(old)
    for place in blocks_of(old, block):
        expected[place] = np.sign(old[place]) * np.abs(old[place]).mean()
    np.testing.assert_allclose(values.flatten(1).numpy(), expected, rtol=1e-12)
    assert taken.all()
    assert sizes.tolist() == [old[place].size for place in blocks_of(old, block)]
    single = values.float()
    assert torch.equal(unified(single, block, 1.0)[0].float(), single)


def test_it_is_the_nearest_of_all_signs_and_magnitudes():
    weight = matrix(3, 8)
    weight[1, 2] = 0
    found = unified(weight, (1, 8), 1.0)[0]
    assert (found[1].abs() == found[1, 0].abs()).all()  # 0 takes part
    for row, new in zip(weight.double(), found, strict=True):
        least = min(
            float((row - signs * max(float((signs * row).mean()), 0)).square().sum())
            for signs in map(torch.tensor, itertools.product((-1.0, 1.0), repeat=8))
        )
        assert float((row - new).square().sum()) == pytest.approx(least, rel=1e-9)


def test_the_blocks_that_lose_least_are_taken():
    weight = matrix(4, 10)  # 8 blocks, half of them smaller
    old = weight.double().numpy()
    found, taken, sizes = unified(weight, (1, 6), 0.5)
    every = unified(weight, (1, 6), 1.0)[0].numpy()
    places = blocks_of(old, (1, 6))
    losses = [np.square(old[place] - every[place]).sum() for place in places]
    assert taken.sum() == 4
    assert np.square(old - found.numpy()).sum() == pytest.approx(
        min(sum(some) for some in itertools.combinations(losses, 4))
    )
    for place, one, size in zip(places, taken, sizes, strict=True):
        np.testing.assert_array_equal(found.numpy()[place], (every if one else old)[place])
        assert size == old[place].size
    assert torch.equal(unified(found.float(), (1, 6), 0.5)[0].float(), found.float())
    assert torch.equal(unified(weight, (1, 6), 0.0)[0], weight.double())


def test_bits():
    model = nn.Sequential(nn.Flatten(), nn.Linear(10, 4))
    whole = 32 * 44
    every = unify_weights(model, (1, 6))
    assert every.original_bits == whole
    assert every.bits == whole - 32 * 40 + 8 * 31 + 40
    some = unify_weights(model, (1, 6), fraction=0.5)
    sizes = unified(model[1].weight.detach(), (1, 6), 0.5)
    inside = int(sizes[2][sizes[1]].sum())
    assert some.bits == whole - 32 * inside + 4 * 31 + inside + 8
    assert unify_weights(model, (1, 1)).bits == whole
    assert every.history is None


def test_admm_by_hand():
    model = pooled(0)
    before = state_of(model)
    options: dict[str, Any] = {"epochs": 2, "batch_size": 48, "learning_rate": 0.2, "rho": 0.7}
    found = unify_weights(model, (2, 2), fraction=0.5, data=(PICTURES, LABELS), **options)
    assert state_of(model) == before

    def project(weight: Tensor) -> Tensor:
        return unified(weight.detach(), (2, 2), 0.5)[0].float()

    by_hand = pooled(0)
    weights = [by_hand.conv.weight, by_hand.fc.weight]
    z = [project(weight) for weight in weights]
    u = [torch.zeros_like(weight) for weight in weights]
    velocity = [torch.zeros_like(each) for each in by_hand.parameters()]
    for rate in (0.2, 0.1):  # one step an epoch
        penalty = sum(
            0.35 * (w - a + b).square().sum() for w, a, b in zip(weights, z, u, strict=True)
        )
        loss = functional.cross_entropy(by_hand(PICTURES), LABELS) + penalty
        gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
        with torch.no_grad():
            for each, v, g in zip(by_hand.parameters(), velocity, gradients, strict=True):
                v.mul_(0.9).add_(g + 5e-4 * each)
                each -= rate * v
            z = [project(w + b) for w, b in zip(weights, u, strict=True)]
            u = [b + w - a for w, a, b in zip(weights, z, u, strict=True)]
    with torch.no_grad():
        for weight in weights:
            weight.copy_(project(weight))
    for mine, theirs in zip(found.model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert found.history is not None
    assert found.history["penalty"].iloc[1] == pytest.approx(float(penalty.detach()), rel=1e-4)


def test_trained_it_loses_less_and_ends_unified():
    trained: Pooled = pa.finetune(
        pooled(0), (PICTURES, LABELS), epochs=40, batch_size=16, learning_rate=0.3
    ).model
    data = PICTURES, LABELS
    at_once = unify_weights(trained, (1, 8))
    options: dict[str, Any] = {"epochs": 12, "batch_size": 4, "momentum": 0.0, "rho": 0.1}
    found = unify_weights(trained, (1, 8), data=data, learning_rate=0.5, **options)
    losses = []
    for each in (at_once, found):
        with torch.no_grad():
            losses.append(float(functional.cross_entropy(each.model(PICTURES), LABELS)))
        for name in ("conv", "fc"):
            weight = each.model.get_submodule(name).weight.detach()
            assert torch.equal(unified(weight, (1, 8), 1.0)[0].float(), weight)
    assert losses[1] < 0.9 * losses[0]
    assert found.history is not None
    assert found.history["penalty"].iloc[-1] < 0.3 * found.history["penalty"].max()
    assert found.bits == at_once.bits < found.original_bits
    assert pa.compare(trained, found.model, data).summary() is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": (0, 8)}, "block: expected at least 1"),
        ({"block": (1, 2.5)}, "block: expected an integer"),
        ({"block": 8}, "block: expected two counts"),
        ({"block": (1, 2, 3)}, "block: expected two counts"),
        ({"fraction": 1.5}, "fraction"),
        ({"rho": 0.0}, "rho"),
        ({"layers": "convv"}, "nearest: conv"),
        ({"epochs": 0}, "epochs"),
        ({"data": (PICTURES, LABELS[:3])}, "data"),
        ({"data": (PICTURES, LABELS), "learning_rate": 1e30}, "no longer finite"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        unify_weights(pooled(0), **options)
