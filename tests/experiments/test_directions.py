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
from pyablate import interventions
from pyablate.attribution.propagation import Propagation, one_hot
from pyablate.experiments import directions
from pyablate.experiments._relevant import Products, Rows, Sample, contexts, disentangled
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


# --- relevant directions --------------------------------------------------------------------------


def kept(rows: Rows, basis: torch.Tensor) -> torch.Tensor:
    """Share of the relevance that the first 1, 2, ... directions keep."""
    a, c = rows
    return ((a @ basis) * (c @ basis)).sum(0).cumsum(0) / (a * c).sum()


def planted(subspaces: int, noise: float) -> tuple[Rows, torch.Tensor]:
    """Each position has relevance in one of some planes; elsewhere activations are larger."""
    draw = torch.Generator().manual_seed(0)
    basis = interventions.random_rotation(12, seed=5)
    planes = basis[:, : 2 * subspaces].unflatten(1, (subspaces, 2))
    which = torch.arange(600) % subspaces
    parts = torch.randn(600, 2, generator=draw, dtype=torch.float64)
    parts *= (0.5 + torch.rand(600, 1, generator=draw)) / parts.norm(dim=1, keepdim=True)
    c = torch.einsum("nd,und->nu", parts, planes[:, which])
    loud = torch.randn(600, 12 - 2 * subspaces, generator=draw, dtype=torch.float64)
    return (c + noise * loud @ basis[:, 2 * subspaces :].T, c), planes


def overlap(first: torch.Tensor, second: torch.Tensor) -> float:
    """Of two planes: 1 if they are the same, 0 if they are at right angles."""
    return float((first.T @ second).square().sum() / 2)


def components(rows: Rows) -> torch.Tensor:
    """Principal components, largest first."""
    return torch.from_numpy(np.linalg.eigh(np.cov(rows[0].T.numpy()))[1][:, ::-1].copy())


def test_the_planted_subspace_is_found():
    rows, planes = planted(1, 1.5)
    products = Products(12)
    for first in range(0, 600, 100):
        products.add((rows[0][first : first + 100], rows[1][first : first + 100]))
    assert overlap(products.axes()[:, :2], planes[:, 0]) > 0.98
    assert overlap(components(rows)[:, :2], planes[:, 0]) < 0.1


def test_planted_subspaces_come_apart():
    rows, planes = planted(3, 0.7)
    found = disentangled(rows, 3, 2, seed=1)
    assert orthonormal(found)
    each = torch.tensor(
        [[overlap(found[:, 2 * k : 2 * k + 2], planes[:, j]) for j in range(3)] for k in range(3)]
    )
    assert each.max(1).values.min() > 0.9
    assert sorted(each.argmax(1).tolist()) == [0, 1, 2]


def test_on_other_positions_more_relevance_is_kept_at_every_number():
    rows, _ = planted(3, 0.7)
    first, other = (tuple(part[half] for part in rows) for half in (slice(300), slice(300, None)))
    products = Products(12)
    products.add(first)
    rivals = components(first), interventions.random_rotation(12, seed=9)
    for found in (products.axes()[:, :6], disentangled(first, 3, 2, seed=1)):
        for rival in rivals:
            assert (kept(other, found) > kept(other, rival[:, :6])).all()


def test_a_sample_is_drawn_from_all_positions():
    held, whole = Sample(50, 3), torch.arange(600.0).double()[:, None]
    for part in whole.split(70):
        held.add((part, -part))
    assert held.rows is not None
    a, c = held.rows
    assert torch.equal(a, -c)
    assert len(a.unique()) == 50
    assert 200 < a.mean() < 400


def test_relevant_directions_keep_more_relevance_than_others_at_every_number():
    model, images, labels = pa.demo.load("vgg_bn", limit=24)
    data, layer = (images, labels), "features.16"
    found = directions.relevant(model, data, layer, batch_size=10)[layer]
    assert orthonormal(found)
    site = pa.select(pa.sites(model, images[:1]), layer)
    network = Propagation(model, images[:2], [images], site)
    (rows,) = contexts(network, iter([images]), None)
    classes = torch.stack([model(x[None])[0] for x in images]).argmax(1)
    run = network.run(images)
    relevance = run.at_sites(one_hot(classes, run.logits))[layer]
    a, c = rows[layer]
    torch.testing.assert_close((a * c).sum(), relevance.double().sum(), rtol=1e-4, atol=0)
    mine = kept((a, c), found)
    others = [
        directions.principal_components(model, data, layer)[layer],
        directions.rotations(model, data, layer)[layer],
        torch.eye(128, dtype=torch.float64)[:, (a * c).sum(0).argsort(descending=True)],
    ]
    for other in others:
        assert (mine >= kept((a, c), other) - 1e-9).all()
        assert (mine[:8] > kept((a, c), other)[:8]).all()
    blocks = directions.relevant(model, data, layer, subspaces=2, dimensions=3, sample=300)[layer]
    assert orthonormal(blocks)
    parts = kept((a, c), blocks).diff(prepend=torch.zeros(1))
    assert parts[:3].sum() > 0.05


@pytest.mark.slow
def test_ablating_relevant_directions_changes_more_than_principal_components():
    model, images, labels = pa.demo.load("resnet", limit=24)
    layer, changed = "stage3.1.relu1", []
    for axes in (directions.relevant, directions.principal_components):
        first = axes(model, (images, labels), layer)[layer][:, :4]
        along = pa.Intervention("direction", directions=first)
        result = pa.ablate(
            model, (images, labels), layer, intervention=along, audit=0, progress=False
        )
        changed.append(np.abs(result.lost + result.gained).sum())
    assert changed[0] > changed[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 5}, "target: expected a class from 0 to 4, got 5"),
        ({"subspaces": 0}, "subspaces"),
        ({"subspaces": 5, "dimensions": 2}, r"subspaces: 5 of 2 dimensions .* 8 units"),
        ({"dimensions": 0}, "dimensions"),
        ({"sample": 0}, "sample"),
        ({"seed": -1}, "seed"),
        ({"layers": "body.99"}, "layers"),
    ],
)
def test_bad_input_of_relevant_directions(options, message):
    model, images, labels = networks.network("residual", 4)
    given = {"layers": "body.2"} | options
    with pytest.raises(ValueError, match=message):
        directions.relevant(model, (images, labels), **given)
