"""Transforms against their own definitions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.compressible import Mobile, images, made
from support.state import state_of
from torch import nn

import pyablate as pa
from pyablate import compression
from pyablate.compression import Transformed

NETWORK = pa.demo.network("vgg_bn")
PICTURES = pa.demo.images(4)[0]
CONVS = [f"features.{i}" for i in (0, 4, 7, 11, 14)]


def weight(model: nn.Module, name: str) -> torch.Tensor:
    return model.get_submodule(name).weight.detach()


def test_filters_with_the_smallest_norms_go():
    pytest.importorskip("torch_pruning")
    for criterion, power in (("l1", 1), ("l2", 2)):
        ranking = compression.filter_ranking(NETWORK, PICTURES, criterion)
        norms = weight(NETWORK, "features.4").flatten(1).norm(p=power, dim=1)
        mine = [one.label for one in ranking.within(("features.6",)).order]
        assert mine == [f"features.6:{unit}" for unit in norms.argsort().tolist()]
        found = compression.prune_filters(NETWORK, PICTURES, 0.25, criterion=criterion)
        assert weight(found.model, "features.4").shape[:2] == (48, 24)
        kept = norms.argsort()[16:].sort().values
        inputs = weight(NETWORK, "features.0").flatten(1).norm(p=power, dim=1).argsort()[8:]
        expected = weight(NETWORK, "features.4")[kept][:, inputs.sort().values]
        assert torch.equal(weight(found.model, "features.4"), expected)
        assert found.bits == 32 * sum(p.numel() for p in found.model.parameters())


def test_tied_filters_are_scored_together():
    pytest.importorskip("torch_pruning")
    model = pa.demo.network("resnet")
    ranking = compression.filter_ranking(model, PICTURES, "bn_scale")
    norms = ["stem.1", "stage1.0.bn2", "stage1.1.bn2"]
    mean = torch.stack([weight(model, name).abs() for name in norms]).mean(0)
    tied = ranking.within(("stem.2", "stage1.0.relu2", "stage1.1.relu2"))
    assert [int(one.units[0].rpartition(":")[2]) for one in tied.order] == mean.argsort().tolist()
    with pytest.raises(ValueError, match="criterion: no unit"):
        compression.filter_ranking(pa.demo.network("alexnet"), PICTURES, "bn_scale")
    with pytest.raises(ValueError, match="got 'l3'; nearest: l"):
        compression.filter_ranking(model, PICTURES, "l3")


@pytest.mark.parametrize("share", [0.1, 0.4])
@pytest.mark.parametrize("energy", [False, True])
def test_truncated_svd_is_the_best_of_its_rank(share, energy):
    found = compression.truncated_svd(NETWORK, share, energy_transfer=energy)
    matrix = weight(NETWORK, "features.11").flatten(1).double().numpy()
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    rank = int(np.ceil(share * len(s)))
    first, second = found.model.get_submodule("features.11")
    product = second.weight.detach()[:, :, 0, 0] @ first.weight.detach().flatten(1)
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    if energy:
        best *= np.linalg.norm(s) / np.linalg.norm(s[:rank])
        assert product.norm() == pytest.approx(np.linalg.norm(matrix), rel=1e-5)
    np.testing.assert_allclose(product.numpy(), best, atol=1e-5)
    assert first.out_channels == rank
    with torch.no_grad():
        assert found.model(PICTURES).shape == (4, 10)
    assert found.bits == 32 * sum(p.numel() for p in found.model.parameters())


def test_full_svd_of_strided_and_linear_layers_computes_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 5, stride=2, padding=2, dilation=1), nn.Flatten(), nn.Linear(32 * 16, 40)
    ).eval()
    # Low rank from the start, so that two layers are smaller and lose nothing.
    with torch.no_grad():
        for layer, rank in ((model[0], 3), (model[2], 5)):
            shape = layer.weight.shape
            low = torch.randn(shape[0], rank) @ torch.randn(rank, layer.weight[0].numel())
            layer.weight.copy_(low.reshape(shape) / 10)
    found = compression.truncated_svd(model, 0.2)
    assert all(isinstance(found.model[i], nn.Sequential) for i in (0, 2))
    with torch.no_grad():
        torch.testing.assert_close(found.model(images()), model(images()), atol=1e-4, rtol=1e-4)
    assert compression.truncated_svd(model, 1.0).bits == 32 * sum(
        p.numel() for p in model.parameters()
    )  # two layers would be larger than one


def test_codebook_has_so_many_kernels_and_each_is_the_nearest():
    found = compression.kernel_codebook(NETWORK, 16, layers=["features.7", "features.0"], seed=1)
    old = weight(NETWORK, "features.7").reshape(-1, 9)
    new = weight(found.model, "features.7").reshape(-1, 9)
    book = new.unique(dim=0)
    assert 2 <= len(book) <= 16
    nearest = torch.cdist(old.double(), book.double()).min(dim=1).values
    assert ((old - new).norm(dim=1).double() <= nearest * 1.3 + 1e-6).float().mean() > 0.99
    for row in book[:4]:  # a centre is about the mean of its kernels
        mine = old[(new == row).all(dim=1)]
        assert (mine.mean(0) - row).norm() <= 0.2 * (mine - row).norm(dim=1).mean() + 1e-6
    kernels = 64 * 64 + 32 * 1
    expected = found.original_bits - 32 * 9 * kernels + 4 * kernels + 2 * 32 * 9 * 16
    assert found.bits == expected
    again = compression.kernel_codebook(NETWORK, 16, layers=["features.7", "features.0"], seed=1)
    assert torch.equal(weight(again.model, "features.7"), weight(found.model, "features.7"))


def test_int8_has_so_many_steps_and_the_nearest_one():
    found = compression.int8_weights(NETWORK)
    for name in (*CONVS, "classifier"):
        old, new = weight(NETWORK, name).flatten(1), weight(found.model, name).flatten(1)
        scale = old.abs().amax(1, keepdim=True) / 127
        steps = new / scale
        assert (steps - steps.round()).abs().max() < 1e-3
        assert steps.abs().max() < 127.01
        assert ((old - new).abs() <= scale * 0.5001).all()
    weights = sum(weight(NETWORK, name).numel() for name in (*CONVS, "classifier"))
    channels = 32 + 64 + 64 + 128 + 128 + 10
    assert found.bits == found.original_bits - 24 * weights + 32 * channels


def test_int8_of_a_silent_channel():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        model[1].weight[1] = 0
    assert torch.isfinite(compression.int8_weights(model).model[1].weight).all()


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_smallest_weights_are_masked(scope):
    found = compression.magnitude_masks(NETWORK, 0.6, layers="features.*", scope=scope)
    old = [weight(NETWORK, name).flatten() for name in CONVS]
    new = [weight(found.model, name).flatten() for name in CONVS]
    if scope == "global":
        old, new = [torch.cat(old)], [torch.cat(new)]
    kept = 0
    for before, after in zip(old, new, strict=True):
        gone = after == 0
        assert int(gone.sum()) == round(0.6 * len(before))
        assert before[gone].abs().max() <= before[~gone].abs().min()
        assert torch.equal(before[~gone], after[~gone])
        kept += int((~gone).sum())
    total = sum(weight(NETWORK, name).numel() for name in CONVS)
    assert found.bits == found.original_bits - 31 * total + 32 * kept
    assert not any("mask" in name for name in found.model.state_dict())


def test_shuffled_blocks():
    found = compression.block_masks(NETWORK, 4, layers=["features.11", "classifier"], seed=3)
    new = weight(found.model, "features.11")
    kept = (new != 0).flatten(2).any(2)
    assert kept.sum() == 64 * 128 // 4
    patterns = {tuple(row.tolist()) for row in kept}
    assert len(patterns) == 4  # blocks share their columns
    assert torch.stack([torch.tensor(p) for p in patterns]).sum(0).tolist() == [1] * 64
    old = weight(NETWORK, "features.11")
    assert torch.equal(new[kept], old[kept])
    head = (weight(found.model, "classifier") != 0).sum(1)
    assert head.tolist() == [32] * 10
    assert sorted((weight(found.model, "classifier") != 0).sum(0).unique().tolist()) == [2, 3]
    moved = 64 + 128 + 10 + 128
    gone = 9 * (64 * 128 * 3 // 4) + 10 * 96
    assert found.bits == found.original_bits + 32 * (moved - gone)


ALL: list[Callable[[nn.Module], Transformed]] = [
    lambda model: compression.truncated_svd(model, 0.3),
    lambda model: compression.kernel_codebook(model, 4),
    lambda model: compression.int8_weights(model),
    lambda model: compression.magnitude_masks(model, 0.5),
    lambda model: compression.block_masks(model, 2),
    lambda model: compression.unify_weights(model, fraction=0.5),
]


@pytest.mark.parametrize("transform", ALL)
def test_the_model_is_left_alone(transform):
    model = made(Mobile)
    before = state_of(model)["values"]
    found = transform(model)
    assert state_of(model)["values"] == before
    with torch.no_grad():
        assert (found.model(images()) - model(images())).abs().max() > 1e-6
    assert found.bits < found.original_bits
    assert found.ratio > 1


class Tied(nn.Module):
    """Two convolutions that share their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.third, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)
        self.third.weight = self.second.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.third(self.second(self.first(x).relu()).relu()).relu()
        return self.fc(x.mean((2, 3)))


DATA = images(24), torch.arange(24) % 4
IN_PLACE: dict[str, Callable[[nn.Module], Transformed]] = {
    "int8": compression.int8_weights,
    "codebook": lambda m: compression.kernel_codebook(m, 4),
    "masks": lambda m: compression.magnitude_masks(m, 0.5),
    "masks by layer": lambda m: compression.magnitude_masks(m, 0.5, scope="layer"),
    "blocks": lambda m: compression.block_masks(m, 2),
    "unified": lambda m: compression.unify_weights(m, (1, 4)),
    "connections": lambda m: compression.learn_connections(m, DATA, epochs=2, learning_rate=0.1),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_shared_weights_are_changed_and_counted_once(name):
    """As where one module is called twice."""
    model, same = made(Tied), made(Tied)
    model.third.bias, same.third = model.second.bias, same.second
    found, once = IN_PLACE[name](model), IN_PLACE[name](same)
    assert found.model.third.weight is found.model.second.weight
    torch.testing.assert_close(weight(found.model, "second"), weight(once.model, "second"))
    assert found.bits == once.bits


@pytest.mark.parametrize("name", IN_PLACE)
def test_weights_that_are_computed_are_refused(name):
    model = made(Mobile)
    nn.utils.parametrizations.weight_norm(model.fc)
    with pytest.raises(ValueError, match="layers: the weights of fc are computed from others"):
        IN_PLACE[name](model)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compression.truncated_svd(NETWORK, 0.0), "share"),
        (lambda: compression.kernel_codebook(NETWORK, 1), "kernels"),
        (lambda: compression.magnitude_masks(NETWORK, 1.5), "fraction"),
        (lambda: compression.magnitude_masks(NETWORK, 0.5, scope="all"), "scope"),
        (lambda: compression.block_masks(NETWORK, 0), "blocks"),
        (lambda: compression.int8_weights(NETWORK, layers="features.1"), "nearest: features.1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
