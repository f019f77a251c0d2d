"""Spectral profiles against their formula, image by image; influence against plain hooks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import networks
from torch import nn

import pyablate as pa
from pyablate.experiments._spectral import leading


def test_profiles_follow_the_formula():
    model, images, labels = networks.network("residual", 12)
    layer = model.get_submodule("body.0")
    assert isinstance(layer, nn.Conv2d)
    found = pa.spectral_profile(model, (images, labels), "body.0", share=0.7, batch_size=5)
    u, s, v = np.linalg.svd(layer.weight.detach().double().flatten(1).numpy(), full_matrices=False)
    np.testing.assert_allclose(found["singular_value"], s, rtol=1e-5)
    vectors = found["direction_vectors"].to_numpy()
    signs = np.sign((vectors * u).sum(0))
    np.testing.assert_allclose(vectors, u * signs, atol=1e-5)
    patches = nn.functional.unfold(
        images.double(), layer.kernel_size, layer.dilation, layer.padding, layer.stride
    )
    # U^T (y - b) = S V^T x at each position; the mean over positions is that of the patches.
    expected = patches.mean(2).numpy() @ v.T * s * signs
    np.testing.assert_allclose(found["contribution"], expected, atol=1e-5)
    for image, values in enumerate(np.abs(expected)):
        order, held = np.argsort(-values), 0.0
        chosen = set()
        while held < 0.7 * values.sum():
            chosen.add(int(order[len(chosen)]))
            held = values[list(chosen)].sum()
        assert set(np.flatnonzero(found["kept"][image])) == chosen
    share = np.abs(expected) / np.abs(expected).sum(1, keepdims=True)
    for k in range(5):
        mean = share[labels.numpy() == k].mean(0)
        np.testing.assert_allclose(found["class_contribution"][k], mean, atol=1e-5)


def test_leading_columns():
    sizes = np.array([[1.0, 4, 2, 1], [0, 0, 0, 0], [2, 2, 2, 2]])
    assert leading(sizes, 0.75).astype(int).tolist() == [[0, 1, 1, 0], [0] * 4, [1, 1, 1, 0]]
    assert leading(sizes, 1.0)[0].all()
    assert not leading(sizes, 0.0).any()


def test_a_class_without_images_has_no_profile():
    model, images, labels = networks.network("residual", 12)
    found = pa.spectral_profile(model, (images, labels.clamp(max=2)), "body.3.inner.0")
    assert np.isnan(found["class_contribution"][3:]).all()
    assert not found["class_kept"][3:].any()


def test_influence_is_what_taking_a_direction_out_changes():
    model, images, labels = networks.network("residual", 10)
    layers, k = ("body.0", "body.3.inner.0"), 1
    found = pa.influence_graph(model, (images, labels), layers, target=k, share=0.8, batch_size=4)
    some = images[labels == k]
    profile = pa.spectral_profile(model, (some, labels[labels == k]), "body.0", share=0.8)
    sources = np.flatnonzero(profile["class_kept"][k])
    assert found["source"].values.tolist() == sources.tolist()
    assert len(sources) > 1
    first, second = (model.get_submodule(name) for name in layers)
    u = torch.linalg.svd(second.weight.detach().double().flatten(1), full_matrices=False).U
    seen = []
    second.register_forward_hook(lambda _m, _i, y: seen.append(y.double().mean((2, 3)) @ u))
    vectors = torch.from_numpy(profile["direction_vectors"].to_numpy()).float()
    bias = 0 if first.bias is None else first.bias[:, None, None]
    with torch.no_grad():
        model(some)
        for row, number in enumerate(sources):
            q = vectors[:, number]
            hook = first.register_forward_hook(
                lambda _m, _i, y, q=q: (
                    y - torch.einsum("nchw,c->nhw", y - bias, q)[:, None] * q[:, None, None]
                )
            )
            model(some)
            hook.remove()
            expected = (seen[0] - seen[-1]).mean(0)[found["sink"].values.copy()]
            mine = torch.from_numpy(found["influence"].to_numpy()[row])
            torch.testing.assert_close(mine.abs(), expected.abs(), atol=1e-5, rtol=1e-4)


def test_directions_of_a_profile_matter_more_than_random_ones():
    model, images, labels = pa.demo.load("vgg_bn", limit=40)
    data, layer = (images, labels), "features.14"
    found = pa.spectral_profile(model, data, layer, share=0.3)
    kept = np.flatnonzero(found["class_kept"].any("class"))
    axes = torch.from_numpy(found["direction_vectors"].to_numpy())[:, kept]
    random = pa.directions.rotations(model, data, layer)[layer][:, : len(kept)]
    changed = [
        pa.ablate(
            model,
            data,
            layer,
            intervention=pa.Intervention("direction", directions=each),
            audit=0,
            progress=False,
        ).flips.image.size
        for each in (axes, random)
    ]
    assert changed[0] > 2 * changed[1]


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        ("body.2", {}, "layer: expected a convolution or linear layer, 'body.2' is a ReLU"),
        ("body.99", {}, "layers: no layer"),
        ("body.*", {}, "layer: expected one layer"),
        ("body.0", {"share": 1.5}, "share"),
        ("body.0", {"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_input(layer, options, message):
    model, images, labels = networks.network("residual", 4)
    with pytest.raises(ValueError, match=message):
        pa.spectral_profile(model, (images, labels), layer, **options)


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ("body.0", {}, "layers: expected a pair"),
        (("body.0",), {}, "layers: expected a pair"),
        (("body.0", "body.3.inner.0"), {"target": 5}, "target: expected numbers 0 to 4"),
        (("body.0", "body.3.inner.0"), {"target": "x"}, "target: no class 'x'"),
        (("body.0", "body.3.inner.0"), {"target": 4}, "target: no images of class 4"),
    ],
)
def test_bad_input_of_the_graph(layers, options, message):
    model, images, _ = networks.network("residual", 4)
    with pytest.raises(ValueError, match=message):
        pa.influence_graph(model, (images, torch.arange(4)), layers, **options)


def test_influence_needs_the_earlier_layer_first():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    data = torch.randn(7, 6), torch.arange(7) % 3
    with pytest.raises(ValueError, match="layers: expected the earlier first"):
        pa.influence_graph(model.eval(), data, ("2", "0"))
    with pytest.raises(ValueError, match="layers: expected two layers, got '0' twice"):
        pa.influence_graph(model, data, ("0", "0"))
    assert pa.influence_graph(model, data, ("0", "2"), share=0.0)["influence"].size == 0
