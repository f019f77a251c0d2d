"""Criteria, decompositions and latency against their own definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import networks
from support.compressible import Mobile, made
from support.compressible import images as pictures
from torch import nn

import pyablate as pa
from pyablate import compression

pytest.importorskip("torch_pruning")
pytestmark = pytest.mark.usefixtures("exports_kept")


@pytest.fixture(scope="module")
def shipped() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    return networks.demo("vgg_bn", 24)


@pytest.mark.parametrize("criterion", ["hrank", "taylor", "nisp"])
def test_units_are_ranked_by_their_attribute(shipped, criterion):
    model, x, labels = shipped
    ranking = compression.filter_ranking(model, x[:1], criterion, data=(x, labels))
    table = pa.attributes(model, (x, labels), which=criterion)[criterion]
    for layer in ("features.9", "features.16"):
        mine = ranking.within((layer,))
        expected = table.sel(unit=[one.label for one in mine.order])
        np.testing.assert_allclose(mine.scores, expected, rtol=1e-6)
        assert np.all(np.diff(mine.scores) >= 0)
        assert np.ptp(mine.scores) > 0


def test_units_that_hang_together_get_the_mean():
    model = pa.demo.network("resnet")
    x, labels = pa.demo.images(12)
    ranking = compression.filter_ranking(model, x[:1], "taylor", data=(x, labels))
    table = pa.attributes(model, (x, labels), which="taylor", progress=False)["taylor"]
    tied = ranking.within(("stem.2", "stage1.0.relu2", "stage1.1.relu2"))
    for one, score in zip(tied.order[:5], tied.scores[:5], strict=True):
        assert score == pytest.approx(np.mean([float(table.sel(unit=unit)) for unit in one.units]))


def test_a_criterion_without_maps_leaves_these_layers_alone():
    model, x, labels = pa.demo.load("alexnet", limit=8)
    found = compression.prune_filters(model, x[:1], 0.5, criterion="hrank", data=(x, labels))
    sizes = [m.out_features for m in found.model.modules() if isinstance(m, nn.Linear)]
    assert sizes == [256, 256, 10]
    channels = [m.out_channels for m in found.model.modules() if isinstance(m, nn.Conv2d)]
    assert channels == [12, 24, 32, 32, 24]
    assert len(found.removed) == 124


def test_data_is_asked_for(shipped):
    model, x, _ = shipped
    with pytest.raises(ValueError, match="data: criterion 'hrank' is measured on images"):
        compression.prune_filters(model, x[:1], 0.5, criterion="hrank")


def test_rectified_svd_is_the_best_behind_batch_norm(shipped):
    model = shipped[0]
    norm = model.features[12]
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().double()[:, None]
    weight = model.features[11].weight.detach().flatten(1).double()
    found = {}
    for rectify in (False, True):
        changed = compression.truncated_svd(model, 0.3, layers="features.11", rectify=rectify)
        first, second = changed.model.get_submodule("features.11")
        product = second.weight.detach()[:, :, 0, 0] @ first.weight.detach().flatten(1)
        found[rectify] = product.double()
    u, s, v = torch.linalg.svd(scale * weight, full_matrices=False)
    best = (u[:, :39] * s[:39]) @ v[:39]
    torch.testing.assert_close(scale * found[True], best, atol=1e-4, rtol=1e-3)
    errors = {key: (scale * (each - weight)).norm() for key, each in found.items()}
    assert errors[True] < 0.99 * errors[False]
    energy = compression.truncated_svd(
        model, 0.3, layers="features.11", rectify=True, energy_transfer=True
    )
    first, second = energy.model.get_submodule("features.11")
    product = (
        second.weight.detach()[:, :, 0, 0].double() @ first.weight.detach().flatten(1).double()
    )
    torch.testing.assert_close((scale * product).norm(), (scale * weight).norm(), rtol=1e-4, atol=0)


def test_rectified_svd_of_silent_channels_and_other_networks():
    model = made(Mobile)
    with torch.no_grad():
        model.blocks[1].expand[1].weight[0] = 0
    found = compression.truncated_svd(model, 0.3, rectify=True)
    assert all(torch.isfinite(p).all() for p in found.model.parameters())
    plain = nn.Sequential(nn.Flatten(), nn.Linear(20, 30))
    same = [compression.truncated_svd(plain, 0.3, rectify=r).model for r in (False, True)]
    x = torch.randn(3, 20)
    assert torch.equal(same[0](x), same[1](x))

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(20, 30)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x) if x.sum() > 0 else self.fc(-x)

    with pytest.raises(ValueError, match="rectify"):
        compression.truncated_svd(Branching(), 0.3, rectify=True)


def test_pruning_and_decomposition_is_one_behind_the_other(shipped):
    model, x, _ = shipped
    both = compression.prune_and_decompose(model, x[:1], 0.25, 0.3, criterion="bn_scale")
    pruned = compression.prune_filters(model, x[:1], 0.25, criterion="bn_scale")
    second = compression.truncated_svd(pruned.model, 0.3, rectify=True)
    with torch.no_grad():
        assert torch.equal(both.model(x), second.model(x))
    assert both.removed == pruned.removed
    assert both.bits == second.bits < pruned.bits < both.original_bits == pruned.original_bits


def test_latency_is_measured_in_turn():
    turns = []

    class Noting(nn.Module):
        def __init__(self, name: str, work: int) -> None:
            super().__init__()
            self.name, self.work = name, work

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            turns.append(self.name)
            for _ in range(self.work):
                x = x @ x
            return x

    networks = {"large": Noting("large", 60).train(), "small": Noting("small", 1)}
    table = compression.latency(networks, torch.eye(128), repeats=5, warmup=1)
    assert turns == ["large", "small"] * 6
    assert networks["large"].training
    assert table["network"].tolist() == ["large", "small"]
    assert table["speedup"][0] == 1.0
    assert table["speedup"][1] > 2
    assert (table["low"] <= table["milliseconds"]).all()
    with pytest.raises(ValueError, match="networks"):
        compression.latency({}, torch.eye(3))
    with pytest.raises(TypeError, match="networks"):
        compression.latency({"a": 3}, torch.eye(3))
    with pytest.raises(ValueError, match="repeats"):
        compression.latency(networks, torch.eye(3), repeats=0)


def test_filters_of_a_mobile_network():
    model, x = made(Mobile), pictures(8)
    data = x, torch.arange(8) % 5
    for criterion in compression.filters.CRITERIA:
        found = compression.prune_filters(model, x[:1], 0.3, criterion=criterion, data=data)
        with torch.no_grad():
            assert found.model(x).shape == (8, 5)
        assert found.bits < found.original_bits
