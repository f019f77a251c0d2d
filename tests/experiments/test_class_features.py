"""Class-specific features: few of them keep a class's decisions; planted ones are found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import pyablate as pa


def planted() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Class k is decided by features 2 k and 2 k + 1, which the images show directly."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    images = 0.1 * torch.rand(60, 8, generator=draw)
    images[torch.arange(60), 2 * labels] += 1
    images[torch.arange(60), 2 * labels + 1] += 1
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(8))
        model[0].bias.zero_()
        model[2].bias.copy_(torch.tensor([0.0, 0.0, 2.5]))  # class 2 needs no feature at all
        model[2].weight.fill_(0.05)
        for k in range(3):
            model[2].weight[k, 2 * k : 2 * k + 2] = 2
    return model.eval(), images, labels


def test_planted_features_are_found():
    model, images, labels = planted()
    found = pa.class_features(model, (images, labels), keep=1.0, class_names=["a", "b", "c"])
    assert [set(each) for each in found.table["features"]] == [{0, 1}, {2, 3}, set()]
    assert found.table["decisions"].tolist() == [10, 10, 10]
    assert found.table["kept"].tolist() == [1.0, 1.0, 1.0]
    assert found.mask.sum(1).tolist() == [2, 2, 0]
    assert found.accuracy == found.baseline_accuracy == 1.0
    shared = found.overlap({"b": ["1:2", "1:7"], "a": [5]})
    assert shared["shared"].tolist() == [1, 0]
    assert shared["expected"].tolist() == [0.5, 0.25]


def test_few_features_of_a_trained_network_keep_its_decisions():
    model, images, labels = pa.demo.load("vgg_bn", limit=600)
    names = pa.demo.CLASSES
    found = pa.class_features(model, (images, labels), keep=0.95, class_names=names)
    assert found.table["size"].max() < 0.3 * 128
    assert np.average(found.table["kept"], weights=found.table["decisions"]) > 0.88
    random = np.random.default_rng(0)
    weight = model.classifier.weight.detach().double().numpy()
    with torch.no_grad():
        h = model.features(model.normalize(images)).mean((2, 3)).double().numpy()
    decided = (h @ weight.T + model.classifier.bias.detach().numpy()).argmax(1)
    by_chance = []
    for k, size in enumerate(found.table["size"]):
        some = random.choice(128, size, replace=False)
        mine = h[decided == k][:, some] @ weight[:, some].T + model.classifier.bias.detach().numpy()
        by_chance.append((mine.argmax(1) == k).mean())
    assert np.mean(by_chance) < found.table["kept"].mean() - 0.3
    # Irreducible on the half on which they were chosen, and the mask does what it says.
    apart = (h @ (weight * found.mask).T + model.classifier.bias.detach().numpy()).argmax(1)
    assert abs((apart == labels.numpy()).mean() - found.accuracy) < 0.1
    every = pa.class_features(model, (images, labels), keep=1.0)
    assert (every.mask.sum(1) >= found.mask.sum(1)).mean() >= 0.8


@pytest.mark.slow
def test_features_are_units_that_the_class_is_lost_without():
    """Far more of them than of sets drawn at random, by single units and by minimal sets."""
    model, images, labels = pa.demo.load("vgg_bn", limit=240)
    data, names, layer = (images, labels), pa.demo.CLASSES, "features.16"
    options = {"class_names": names, "audit": 0, "progress": False}
    found = pa.class_features(model, data, keep=0.99, class_names=names)
    single = pa.ablate(model, data, layer, measures=["loss"], **options)
    worst = np.argsort(-single.class_loss_change, axis=0)
    sizes = zip(names, found.table["size"], strict=True)
    harmful = {name: worst[:size, k].tolist() for k, (name, size) in enumerate(sizes)}
    sets = pa.minimal_sets(model, data, layer, classes=["Bag", "Trouser"], prune=False, **options)
    assert sets.table["reached"].all()
    for others in (harmful, dict(zip(sets.table["class"], sets.table["units"], strict=True))):
        overlap = found.overlap(others)
        assert overlap["shared"].sum() > 5 * overlap["expected"].sum()


def test_no_linear_layer_returns_the_logits():
    model, images, labels = planted()
    with pytest.raises(ValueError, match="model: expected logits that one linear layer returns"):
        pa.class_features(nn.Sequential(model, nn.Softplus()), (images, labels))


def test_bad_input():
    model, images, labels = planted()
    with pytest.raises(ValueError, match="keep"):
        pa.class_features(model, (images, labels), keep=1.1)
    with pytest.raises(ValueError, match="seed"):
        pa.class_features(model, (images, labels), seed=-1)
    found = pa.class_features(model, (images, labels))
    with pytest.raises(ValueError, match="others: no class 'x'"):
        found.overlap({"x": [1]})
    with pytest.raises(ValueError, match="others: expected units 0 to 7"):
        found.overlap({"1": [8]})
