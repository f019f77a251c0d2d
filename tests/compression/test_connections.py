"""Learnt connections: the masks' gradients by hand, what is counted, and what stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.pooled import pooled
from support.state import state_of
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

import pyablate as pa
from pyablate import compression
from pyablate.compression.connections import Mask, _counting, connections
from pyablate.compression.sgd import cross_entropy

LABELS = torch.arange(64) % 4


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted() -> Tensor:
    """Of twenty features the first four tell the class."""
    return drawn(64, 20) + 4 * functional.one_hot(LABELS, 20)


def test_straight_through_gradient_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=False)).double()
    weight = model[0].weight.detach().clone()
    mask = Mask(model[0])
    torch.testing.assert_close(
        mask.steps.detach(), weight.abs() / weight.abs().mean(1, keepdim=True)
    )
    with torch.no_grad():
        mask.steps[1, 2] = -0.5
        mask.steps[3] = -1.0  # a whole output, which may come back
    parametrize.register_parametrization(model[0], "weight", mask)
    x, labels = drawn(5, 6).double(), torch.tensor([0, 1, 2, 3, 0])
    entropy, penalty = _counting(cross_entropy(model), [mask], 3.0)(x, labels)
    assert penalty.item() == pytest.approx(3 * (24 - 7) / 24)
    (entropy + penalty).backward()
    kept = (mask.steps.detach() > 0).double()
    effective = (weight * kept).requires_grad_()
    (slope,) = torch.autograd.grad(functional.cross_entropy(x @ effective.T, labels), effective)
    own = model[0].parametrizations.weight.original.grad
    torch.testing.assert_close(own, slope * kept)
    through = slope * weight + 3 / 24
    size = through.square().mean(1, keepdim=True).sqrt()
    assert mask.steps.grad is not None
    torch.testing.assert_close(mask.steps.grad, through / size)


def test_masks_of_transposed_and_silent_channels():
    layer = nn.ConvTranspose2d(3, 2, 2)
    with torch.no_grad():
        layer.weight[:, 1] = 0
    mask = Mask(layer)
    mean = layer.weight[:, 0].abs().mean()
    torch.testing.assert_close(mask.steps[:, 0], layer.weight[:, 0].abs() / mean)
    assert connections([mask]).item() == 12
    (mask(layer.weight).sum() + 0 * connections([mask])).backward()
    assert mask.steps.grad is not None
    assert torch.isfinite(mask.steps.grad).all()


def test_connections_are_counted_and_stored():
    model, x = pooled(0), drawn(64, 3, 8, 8)
    before = state_of(model)
    options: dict[str, Any] = {"epochs": 2, "batch_size": 16, "learning_rate": 0.05}
    found = compression.learn_connections(model, (x, LABELS), layers="conv", **options)
    assert state_of(model) == before
    assert set(found.model.state_dict()) == set(model.state_dict())
    assert type(found.model.conv) is nn.Conv2d
    kept = int((found.model.conv.weight != 0).sum())
    total = model.conv.weight.numel()
    assert found.history is not None
    assert found.history["connections"].iloc[-1] == kept < total
    assert found.bits == found.original_bits - 31 * total + 32 * kept
    assert (found.model.fc.weight != 0).all()
    assert pa.compare(model, found.model, (x, LABELS)).after.accuracy > 0
    again = compression.learn_connections(model, (x, LABELS), layers="conv", **options)
    assert state_of(again.model)["values"] == state_of(found.model)["values"]
    free = compression.learn_connections(model, (x, LABELS), weight=0.0, **options)
    assert (free.history["penalty"] == 0).all()


def test_connections_that_tell_nothing_go():
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Flatten(), nn.Linear(20, 4)), (planted(), LABELS)
    model = pa.finetune(model, data, epochs=20, batch_size=16, learning_rate=0.1).model
    options: dict[str, Any] = {"epochs": 20, "batch_size": 16, "learning_rate": 0.05}
    found = compression.learn_connections(model, data, weight=2.0, **options)
    kept = found.model[1].weight != 0
    assert kept[:, 4:].float().mean() < 0.2
    assert kept[:, :4].diagonal().all()
    assert pa.compare(model, found.model, data).after.accuracy > 0.9
    counts = found.history["connections"].to_numpy()
    assert counts[-1] < 0.5 * counts[0]
    # The dearer they are, the fewer stay.
    dear = compression.learn_connections(model, data, weight=8.0, **options)
    assert dear.history["connections"].iloc[-1] <= counts[-1]
    assert np.isfinite(dear.history["loss"]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "weight: expected 0 or more, got -1.0"),
        ({"weight": float("nan")}, "weight"),
        ({"layers": "convv"}, "layers: .* nearest: conv"),
        ({"epochs": 0}, "epochs"),
        ({"momentum": 1.0}, "momentum"),
        ({"data": drawn(4, 3, 8, 8)}, "data"),
        ({"model": 3}, "model"),
    ],
)
def test_bad_input(options, message):
    given = {"model": pooled(0), "data": (drawn(64, 3, 8, 8), LABELS)} | options
    with pytest.raises((ValueError, TypeError), match=message):
        compression.learn_connections(**given)
