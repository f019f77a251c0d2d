"""Representative interpretations: the region is what it says; greedy cover against a slow loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import pyablate as pa
from pyablate.experiments._representative import greedy


def bent() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Two classes parted by a bent line in the plane; the first fills a long band."""
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    images = torch.rand(400, 2, generator=draw) * torch.tensor([20.0, 2.0])
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        for layer, weight in (
            (model[0], [[1.0, 0], [0, 1], [1, 0], [0, 1]]),
            (model[2], torch.eye(6, 4)),
        ):
            layer.weight.copy_(torch.as_tensor(weight))
            layer.bias.zero_()
        model[0].bias.copy_(torch.tensor([0.0, 0, -10, 0]))
        # z_0 - z_1 = 1 + 0.02 x - 0.04 max(x - 10, 0) - y
        model[4].weight.zero_()
        model[4].weight[0] = torch.tensor([0.02, -1, -0.04, 0, 0, 0])
        model[4].bias.copy_(torch.tensor([1.0, 0.0]))
    return model.eval(), images, torch.zeros(400, dtype=torch.long)


def test_the_region_of_a_long_class_beats_nearest_neighbours():
    model, images, labels = bent()
    with torch.no_grad():
        decided = model(images).argmax(1).numpy()
    x = images.numpy()
    first = int(np.flatnonzero((decided == 0) & (x[:, 0] < 4) & (x[:, 1] > 0.8))[0])
    found = pa.representative(model, (images, labels), first, "1", boundaries=100)
    assert found.prediction == 0
    assert found.images[0] == first
    assert set(found.against) == {1}
    assert found.precision > 0.97
    assert found.coverage > 0.85
    assert found.precision > found.neighbour_precision + 0.1
    # The class is the meeting of two half planes, and few boundaries say so.
    assert len(found.against) <= 4
    inside = np.zeros(400, dtype=bool)
    inside[found.images] = True
    y = 1 + 0.02 * x[:, 0] - 0.04 * np.maximum(x[:, 0] - 10, 0)
    assert (inside == (x[:, 1] < y)).mean() > 0.95


def test_a_trained_network():
    model, images, labels = pa.demo.load("vgg_bn", limit=150)
    found = pa.representative(model, (images, labels), 2, boundaries=60)
    assert found.layer == "features.16"
    assert found.images[0] == 2
    assert found.precision > 0.8
    assert found.coverage > 0.3
    assert 0 <= found.neighbour_precision <= 1
    assert found.map.shape == (7, 7)
    with torch.no_grad():
        decided = model(images).argmax(1).numpy()
    assert found.prediction == decided[2]
    again = pa.representative(model, (images, labels), 2, boundaries=60)
    assert again.images.tolist() == found.images.tolist()


def test_greedy_cover_against_a_loop():
    random = np.random.default_rng(3)
    for allowed in (0.0, 0.3):
        inside, same = random.random((40, 15)) < 0.8, random.random(40) < 0.5
        picked = greedy(inside, same, allowed)
        left, expected = set(range(40)), []
        while sum(not same[n] for n in left) > allowed * (~same).sum():
            scores = []
            for column in range(15):
                out = [n for n in left if not inside[n, column]]
                gain = sum(not same[n] for n in out)
                scores.append((gain / (len(out) - gain + 1), gain))
            best = max(range(15), key=lambda column: scores[column][0])
            if scores[best][1] == 0:
                break
            expected.append(best)
            left -= {n for n in left if not inside[n, best]}
        assert picked == expected
        assert len(picked) > 1
    assert greedy(np.ones((5, 3), dtype=bool), np.zeros(5, dtype=bool), 0.0) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": 400}, "image: expected one of at least 4 images, got 400 of 400"),
        ({"image": -1}, "image"),
        ({"layer": "*"}, r"layer: expected one layer, '\*' names 2"),
        ({"layer": "8"}, "layers: no layer"),
        ({"boundaries": 0}, "boundaries"),
        ({"allowed": 2}, "allowed"),
        ({"seed": -1}, "seed"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_input(options, message):
    model, images, labels = bent()
    with pytest.raises(ValueError, match=message):
        pa.representative(model, (images, labels), **({"image": 0} | options))


def test_no_boundary_at_all_chooses_none():
    assert greedy(np.zeros((4, 0), dtype=bool), np.array([True, True, False, False]), 0.0) == []
