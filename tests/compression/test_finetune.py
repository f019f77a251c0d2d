"""Short training: the penalty's gradient, the schedule, and filters that may come back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.compressible import Mobile, made
from support.compressible import images as pictures
from support.pooled import pooled
from support.state import state_of
from torch import Tensor, nn

import pyablate as pa
from pyablate import compression
from pyablate.attribution.collapsed import collapse, distances, map_site, tapped
from pyablate.compression._finetune import _preserving
from pyablate.compression.coupling import Coupling
from pyablate.compression.soft_pruning import set_to_zero

LABELS = torch.arange(48) % 4


def shapes() -> Tensor:
    """Images of four kinds: a bright quarter each."""
    x = 0.3 * torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for kind in range(4):
        row, column = 4 * (kind // 2), 4 * (kind % 2)
        x[kind == LABELS, :, row : row + 4, column : column + 4] += 1
    return x


@pytest.mark.parametrize("variant", ["weighted", "equal"])
def test_gradient_of_the_penalty_against_differences(variant):
    original, tuned = pooled(0, channels=3).double(), pooled(1, channels=2).double()
    x, target = shapes()[:3].double(), LABELS[:3]
    site, other = map_site(original, x), map_site(tuned, x)
    logits, output = tapped(original, site, x)
    kept = collapse(site, logits, output, target, variant).detach()

    def penalty() -> Tensor:
        logits, output = tapped(tuned, other, x)
        maps = collapse(other, logits, output, target, variant, create_graph=True)
        return distances(kept, maps).mean()

    for parameter in (tuned.conv.weight, tuned.fc.weight):
        (found,) = torch.autograd.grad(penalty(), parameter, allow_unused=True)
        if variant == "equal" and parameter is tuned.fc.weight:
            assert found is None  # the head has no part in these maps
            continue
        for rank in (0, 1):
            order = found.abs().flatten().argsort(descending=True)
            place = np.unravel_index(int(order[rank]), found.shape)
            values = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    parameter[place] += step
                values.append(float(penalty().detach()))
                with torch.no_grad():
                    parameter[place] -= step
            slope = (values[0] - values[1]) / 2e-6
            assert float(found[place]) == pytest.approx(slope, rel=1e-4, abs=1e-9)
            assert slope != 0


def test_penalty_of_silent_maps_has_a_gradient():
    original, tuned = pooled(0), pooled(1)
    with torch.no_grad():
        tuned.conv.bias.fill_(-100)
    x = shapes()[:4]
    layers = map_site(original, x), map_site(tuned, x)
    entropy, penalty = _preserving(original, tuned, layers, "weighted", 100.0, 0)(x, LABELS[:4])
    (entropy + penalty).backward()
    assert all(torch.isfinite(each.grad).all() for each in tuned.parameters())


def test_penalty_keeps_maps_and_the_rate_is_on_record():
    torch.manual_seed(5)
    original, data = pooled(0, channels=8), (shapes(), LABELS)
    original = compression.finetune(original, data, epochs=30, learning_rate=0.2).model
    other = pooled(7, channels=4)
    before = state_of(other)
    options: dict[str, Any] = {"epochs": 6, "learning_rate": 0.1, "batch_size": 16, "seed": 3}
    plain = pa.finetune(other, data, **options)
    kept = pa.finetune(other, data, original=original, preserve_attributions=True, **options)
    assert state_of(other) == before
    assert not kept.model.training
    rates = 0.1 * (1 + np.cos(np.pi * np.arange(6) / 6)) / 2
    np.testing.assert_allclose(kept.history["learning_rate"], rates)
    assert kept.schedule.learning_rate == 0.1
    assert (kept.history["penalty"] > 0).all()
    assert (plain.history["penalty"] == 0).all()
    assert plain.history["cross_entropy"].iloc[-1] < plain.history["cross_entropy"].iloc[0]
    far, near = (
        compression.attributions_preserved(original, each.model, data, methods=[]).distances
        for each in (plain, kept)
    )
    assert near["weighted"].mean() < 0.8 * far["weighted"].mean()
    again = pa.finetune(other, data, original=original, preserve_attributions=True, **options)
    assert again.history.equals(kept.history)
    assert state_of(again.model)["values"] == state_of(kept.model)["values"]


def test_augmentation_and_frozen_parameters():
    model = pooled(0)
    model.fc.requires_grad_(False)
    seen = []

    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(len(images))
        return images + torch.rand((), generator=generator)

    found = pa.finetune(model, (shapes(), LABELS), epochs=2, batch_size=20, augment=augment)
    assert seen == [20, 20, 20, 20]  # the incomplete batch of 8 is left out
    assert torch.equal(found.model.fc.weight, model.fc.weight)
    assert not torch.equal(found.model.conv.weight, model.conv.weight)
    with pytest.raises(ValueError, match="nothing to train"):
        pa.finetune(model.requires_grad_(False), (shapes(), LABELS))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"preserve_attributions": True}, ValueError, "original"),
        ({"preserve_attributions": True, "original": "x"}, TypeError, "original"),
        ({"variant": "weigthed"}, ValueError, "nearest: weighted"),
        ({"weight": -1.0}, ValueError, "weight"),
        ({"epochs": 0}, ValueError, "epochs"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate"),
        ({"learning_rate": 1e30, "epochs": 3}, ValueError, "no longer finite"),
        ({"momentum": 1.0}, ValueError, "momentum"),
        ({"weight_decay": -1}, ValueError, "weight_decay"),
        ({"model": 3}, TypeError, "model"),
    ],
)
def test_bad_input(options, error, message):
    given = {"model": pooled(0)} | options
    with pytest.raises(error, match=message):
        pa.finetune(given.pop("model"), (shapes(), LABELS), **given)


def test_other_classes_are_refused():
    other = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5))
    with pytest.raises(ValueError, match="original: expected 4 classes"):
        pa.finetune(pooled(0), (shapes(), LABELS), original=other, preserve_attributions=True)


def test_soft_pruning_removes_the_smallest_at_last():
    pytest.importorskip("torch_pruning")
    model = made(Mobile)
    x, labels = pictures(24), torch.arange(24) % 5
    before = state_of(model)
    options: dict[str, Any] = {"epochs": 1, "batch_size": 8, "learning_rate": 0.005}
    found = compression.soft_filter_pruning(model, x[:2], (x, labels), 0.25, **options)
    assert state_of(model) == before
    # One epoch is fine-tuning, and then the smallest filters go.
    tuned = pa.finetune(model, (x, labels), **options).model
    expected = compression.prune_filters(tuned, x[:2], 0.25, criterion="l2")
    assert found.removed == expected.removed != ()
    with torch.no_grad():
        torch.testing.assert_close(found.model(x), expected.model(x))
    assert found.bits == 32 * sum(p.numel() for p in found.model.parameters())
    assert found.history is not None
    assert found.history["learning_rate"].tolist() == [0.005]
    with pytest.raises(ValueError, match="fraction"):
        compression.soft_filter_pruning(model, x[:2], (x, labels), 1.5)
    with pytest.raises(ValueError, match="criterion"):
        compression.soft_filter_pruning(model, x[:2], (x, labels), 0.5, criterion="taylor")


def test_filters_at_zero_train_on():
    pytest.importorskip("torch_pruning")
    model, x, labels = pa.demo.load("vgg_bn", limit=16)
    coupling = Coupling(model, x[:2])
    chosen = []
    for conv, norm, relu, unit in ((0, 1, 2, 3), (7, 8, 9, 0), (14, 15, 16, 5)):
        with torch.no_grad():
            model.features[norm].bias[unit] = 0.5  # above zero gradients pass the ReLU
        chosen.append((model.features[conv], unit, f"features.{relu}:{unit}"))
    set_to_zero(model, coupling, [label for _, _, label in chosen])
    for layer, unit, _ in chosen:
        zero = layer.weight.detach().flatten(1).abs().amax(1) == 0
        assert zero.nonzero().flatten().tolist() == [unit]
    tuned = pa.finetune(model, (x, labels), epochs=1, batch_size=16, learning_rate=0.01).model
    for number, (_, unit, _) in zip((0, 7, 14), chosen, strict=True):
        assert tuned.features[number].weight[unit].abs().max() > 0
