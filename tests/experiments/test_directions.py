"""Directions: against plain covariances and the weights that one can read off the network."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from support import networks
from support.oracle import check
from torch import nn

import pyablate as pa
from pyablate.experiments import directions
from pyablate.network.capture import CaptureError


def orthonormal(matrix: torch.Tensor) -> bool:
    gram = matrix.T @ matrix
    return torch.allclose(gram, torch.eye(len(gram), dtype=gram.dtype), atol=1e-10)


def same_axes(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal columns up to their signs."""
    return torch.allclose((first * second).sum(dim=0).abs(), torch.ones(1).double(), atol=1e-8)


@pytest.mark.parametrize(("name", "layer"), [("residual", "body.3"), ("vit", None)])
def test_principal_components_are_those_of_the_activations(name, layer):
    model, images, labels = networks.network(name, 20)
    layer = layer or networks.ARCHITECTURES[name].layers[1]
    site = next(site for site in pa.sites(model, images[:2]) if site.name == layer)
    rows = networks.outputs(model, layer, images).movedim(site.axis, -1).flatten(0, -2).double()
    found = directions.principal_components(model, (images, labels), layer, batch_size=7)[layer]
    values, vectors = np.linalg.eigh(np.cov(rows.T.numpy()))
    assert np.diff(values).min() > 1e-6, "equal variances have no axes of their own"
    assert orthonormal(found)
    assert same_axes(found, torch.from_numpy(vectors[:, ::-1].copy()))
    variance = (rows @ found).var(dim=0)
    assert bool((variance[:-1] >= variance[1:]).all())


def chain() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        OrderedDict(
            first=nn.Sequential(nn.Conv2d(1, 5, 3, padding=1), nn.ReLU()),
            pool=nn.MaxPool2d(2),
            second=nn.Sequential(nn.Conv2d(5, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
            flatten=nn.Flatten(),
            head=nn.Linear(4 * 4 * 4, 3),
        )
    ).eval()
    return model, (torch.randn(16, 1, 8, 8), torch.arange(16) % 3)


def test_next_weights_are_those_that_read_the_layer():
    model, data = chain()
    found = directions.next_weights(model, data, ["first", "second"])
    conv = model.get_submodule("second.0").weight.detach().double()
    unfolded = conv.movedim(1, 0).flatten(1)
    assert same_axes(found["first"], torch.linalg.svd(unfolded, full_matrices=False).U)
    head = model.get_submodule("head").weight.detach().double()
    by_unit = head.unflatten(1, (4, 16)).movedim(1, 0).flatten(1)
    assert same_axes(found["second"], torch.linalg.svd(by_unit, full_matrices=False).U)
    assert all(orthonormal(matrix) for matrix in found.values())
    heard = (found["first"].T @ unfolded).norm(dim=1)
    assert bool((heard[:-1] >= heard[1:]).all())


def test_directions_can_be_ablated():
    model, data = chain()
    for found in (
        directions.principal_components(model, data, "first"),
        directions.next_weights(model, data, "first"),
        directions.rotations(model, data, "first", count=2),
    ):
        chosen = pa.Intervention("direction", directions=found)
        result = check(model, data, ["first"], intervention=chosen, ties=0.05)
        assert len(result.units) == found["first"].shape[1]


def test_rotations_are_different_orthogonal_and_seeded():
    model, data = chain()
    found = directions.rotations(model, data, ["first", "second"], count=3, seed=1)
    assert {name: tuple(m.shape) for name, m in found.items()} == {
        "first": (5, 15),
        "second": (4, 12),
    }
    turns = found["first"].split(5, dim=1)
    assert all(orthonormal(turn) for turn in turns)
    assert not torch.allclose(turns[0], turns[1])
    again = directions.rotations(model, data, ["first", "second"], count=3, seed=1)
    assert torch.equal(found["second"], again["second"])
    other = directions.rotations(model, data, ["first", "second"], count=3, seed=2)
    assert not torch.allclose(found["first"], other["first"])


def test_bad_arguments():
    model, data = chain()
    with pytest.raises(ValueError, match="count: expected at least 1"):
        directions.rotations(model, data, "first", count=0)
    with pytest.raises(ValueError, match="seed: expected"):
        directions.rotations(model, data, "first", seed=-1)
    function: Any
    for function in (directions.principal_components, directions.next_weights):
        with pytest.raises(ValueError, match="first"):
            function(model, data, "firs")
        with pytest.raises(TypeError, match=r"model: expected an nn\.Module"):
            function("model", data, "first")


def test_what_no_weights_read_is_refused():
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.units = nn.Sequential(nn.Linear(4, 3), nn.ReLU())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            units = self.units(x)
            return units * 2 + 1

    data = torch.randn(8, 4), torch.arange(8) % 3
    with pytest.raises(ValueError, match="no constant weights read"):
        directions.next_weights(Product().eval(), data, "units")
    model, images, labels = networks.network("routed", 8)
    with pytest.raises(CaptureError):
        directions.next_weights(model, (images, labels), "relu1")
