"""Relevance by z+ and z^B, contrastive and conditional: against the rules written out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from support import networks
from torch import Tensor, nn

import pyablate as pa
from pyablate.attribution import attribution_maps, conditional_maps, relmax
from pyablate.attribution.propagation import Propagation, one_hot


def small(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1, bias=bias),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 4, 3, bias=bias),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 3, bias=bias),
    )
    return model.eval()


def draw(count: int = 6) -> Tensor:
    return torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def box_rule(layer: nn.Conv2d, x: Tensor, low: Tensor, high: Tensor, relevance: Tensor) -> Tensor:
    """z^B of one image; the layer is a matrix, which images of a single 1 give."""
    size = x.numel()
    with torch.no_grad():
        none = layer(torch.zeros_like(x)[None]).flatten()
        rows = layer(torch.eye(size).reshape(size, *x.shape)).flatten(1) - none  # [input, output]
        low, high = low.expand_as(x).flatten()[:, None], high.expand_as(x).flatten()[:, None]
        z = x.flatten()[:, None] * rows - low * rows.clamp(min=0) - high * rows.clamp(max=0)
        return (z / z.sum(0) * relevance.flatten()).sum(1).reshape(x.shape)


def plus_rule(layer: nn.Module, x: Tensor, relevance: Tensor) -> Tensor:
    size = x.numel()
    with torch.no_grad():
        none = layer(torch.zeros_like(x)[None]).flatten()
        rows = layer(torch.eye(size).reshape(size, *x.shape)).flatten(1) - none
        z = (x.flatten()[:, None] * rows).clamp(min=0)
        total = z.sum(0)
        share = torch.where(total > 0, z / total.clamp(min=1e-12), 0)
        return (share * relevance.flatten()).sum(1).reshape(x.shape)


def by_hand(
    model: nn.Sequential, images: Tensor, start: Tensor, *, negated: bool = False
) -> Tensor:
    """Relevance at the pixels of each image, layer by layer."""
    low = images.amin((0, 2, 3), keepdim=True)[0]
    high = images.amax((0, 2, 3), keepdim=True)[0]
    found = []
    for x, r in zip(images, start, strict=True):
        values = [x]
        with torch.no_grad():
            for layer in model:
                values.append(layer(values[-1][None])[0])
        head = model[6]
        if negated:
            head = nn.Linear(16, 3)
            head.weight, head.bias = nn.Parameter(-model[6].weight), model[6].bias
        r = plus_rule(head, values[6], r).reshape(values[5].shape)
        r = plus_rule(model[3], values[3], r)
        pooled = values[2].clone().requires_grad_()
        (taken,) = torch.autograd.grad(model[2](pooled[None])[0], pooled, r)
        found.append(box_rule(model[0], x, low, high, taken))
    return torch.stack(found)


def normalised(values: Tensor) -> Tensor:
    return values / values.flatten(1).sum(1).reshape(-1, 1, 1)


@pytest.mark.parametrize("contrast", ["others", "negated"])
@pytest.mark.parametrize("bias", [True, False])
def test_contrastive_relevance_layer_by_layer(contrast, bias):
    model, images = small(bias), draw()
    target = torch.arange(6) % 3
    start = torch.eye(3)[target]
    first = by_hand(model, images, start).sum(1)
    if contrast == "others":
        second = by_hand(model, images, (1 - start) / 2).sum(1)
    else:
        second = by_hand(model, images, start, negated=True).sum(1)
    expected = (normalised(first) - normalised(second)).clamp(min=0)
    found = attribution_maps(model, images, target, "clrp", contrast=contrast, batch_size=5)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    assert (found > 0).any()


def test_relevance_is_kept_from_the_logit_to_the_images():
    model, images, labels = pa.demo.load("resnet", limit=6)
    layers = pa.select(pa.sites(model, images[:1]), "*")
    network = Propagation(model, images[:2], [images], layers)
    found = network.run(images)
    torch.testing.assert_close(found.logits, model(images))
    start = one_hot(labels, found.logits)
    image = found.at_image(start)
    torch.testing.assert_close(image.flatten(1).sum(1), torch.ones(6), atol=1e-2, rtol=0)
    last = found.at_sites(start)[network.found[-1].name]
    torch.testing.assert_close(last.flatten(1).sum(1), torch.ones(6), atol=1e-2, rtol=0)


def test_masks_of_all_units_of_a_layer_sum_to_the_unmasked_map():
    model, images = small(), draw()
    target = torch.arange(6) % 3
    units = [f"1:{unit}" for unit in range(5)]
    found = conditional_maps(model, images, target, units, batch_size=5)
    whole = by_hand(model, images, torch.eye(3)[target]).sum(1)
    np.testing.assert_allclose(found.sum(1), whole, rtol=1e-3, atol=1e-5)
    network = Propagation(model, images[:2], [images], pa.sites(model, images[:1]))
    run = network.run(images)
    at_units = run.at_sites(one_hot(target, run.logits))["1"].flatten(2).sum(2)
    np.testing.assert_allclose(found.sum((2, 3)), at_units, rtol=1e-3, atol=1e-5)
    single = conditional_maps(model, images[:1], target[:1], ["3:2", "1:4"])
    assert single.shape == (1, 2, 8, 8)


def test_relmax_ranks_images_by_relevance_and_by_activation():
    model, images = small(), draw(40)
    found = relmax(model, (images, torch.zeros(40, dtype=torch.long)), ["1", "4"], count=5)
    with torch.no_grad():
        classes, maps = model(images).argmax(1), model[:2](images)
    each = conditional_maps(model, images, classes, [f"1:{unit}" for unit in range(5)])
    each_map, relevance = each, each.sum((2, 3))
    order = np.argsort(-relevance, axis=0, kind="stable")[:5].T
    assert found["relevant_image"].sel(unit=[f"1:{u}" for u in range(5)]).values.tolist() == (
        order.tolist()
    )
    np.testing.assert_allclose(found["relevance"][0], relevance[order[0], 0], rtol=1e-3, atol=1e-6)
    active = maps.mean((2, 3)).argsort(0, descending=True)[:5].t()
    assert found["activating_image"][:5].values.tolist() == active.tolist()
    assert found["relevant_image"][:5].values.tolist() != active.tolist()
    drawn = relmax(model, images, ["1", "4"], count=2, maps=True, batch_size=7)
    assert drawn["relevant_map"].shape == (9, 2, 8, 8)
    for unit in range(5):
        for rank, number in enumerate(drawn["relevant_image"].values[unit]):
            expected = each_map[number, unit]
            np.testing.assert_allclose(
                drawn["relevant_map"][unit, rank], expected, rtol=1e-3, atol=1e-6
            )
    of_one = relmax(model, images, "1", target=2, count=50)
    assert of_one["relevant_image"].shape == (5, 40)
    each = conditional_maps(model, images, torch.full((40,), 2), ["1:0"])[:, 0].sum((1, 2))
    np.testing.assert_allclose(of_one["relevance"][0], np.sort(each)[::-1], rtol=1e-3, atol=1e-6)


def test_units_contrast_the_shares_of_their_layer():
    model, images = small(), draw()
    labels = torch.arange(6) % 3
    found = pa.attributes(model, (images, labels), "1", "clrp", progress=False)
    units = [f"1:{unit}" for unit in range(5)]
    own = conditional_maps(model, images, labels, units).sum((2, 3))
    rest = [conditional_maps(model, images, (labels + k) % 3, units) for k in (1, 2)]
    against = sum(each.sum((2, 3)) for each in rest)
    share = own / own.sum(1, keepdims=True) - against / against.sum(1, keepdims=True)
    np.testing.assert_allclose(found["clrp"], share.clip(0).mean(0), rtol=1e-3, atol=1e-6)
    of_one = share.clip(0)[labels == 2].mean(0)
    np.testing.assert_allclose(found["clrp_per_class"][:, 2], of_one, rtol=1e-3, atol=1e-6)


def z_plus(model: nn.Module, images: Tensor, target: Tensor) -> np.ndarray:
    found = Propagation(model, images[:2], [images]).run(images)
    return found.at_image(one_hot(target, found.logits)).sum(1).numpy()


def epsilon(model: nn.Module, images: Tensor, target: Tensor) -> np.ndarray:
    pytest.importorskip("captum")
    return attribution_maps(model, images, target, "lrp")


def contrastive(model: nn.Module, images: Tensor, target: Tensor) -> np.ndarray:
    return attribution_maps(model, images, target, "clrp")


@pytest.mark.parametrize(("name", "other"), [("vgg_bn", epsilon), ("alexnet", z_plus)])
def test_the_pointing_game(name, other):
    """Two images side by side: the map of a class points at the half that holds it."""
    _, images, labels = pa.demo.load(name, limit=60)
    first, second = labels[:30], labels[30:]
    apart = first != second
    both = torch.cat([images[:30], images[30:]], dim=3)[apart]
    both = torch.nn.functional.interpolate(both, (28, 28), mode="area")
    model = pa.demo.network(name)

    def right(method: Callable[..., np.ndarray]) -> float:
        halves = [
            method(model, both, target[apart]).reshape(len(both), -1).argmax(1) % 28 // 14
            for target in (first, second)
        ]
        return float(np.concatenate([halves[0] == 0, halves[1] == 1]).mean())

    assert right(contrastive) > right(other) + 0.1


def test_what_has_no_rule_is_refused():
    model, images, labels = networks.network("inverted_residual", 4)
    with pytest.raises(ValueError, match=r"model: relevance has no rule .*Hardswish"):
        attribution_maps(model, images, labels, "clrp")
    with pytest.raises(ValueError, match=r"model: relevance has no rule .*Hardswish"):
        relmax(model, (images, labels), "body.2")
    squared = nn.Sequential(*small(), nn.ReLU()).eval()
    with pytest.raises(ValueError, match="contrast: the logits are not the output of one linear"):
        attribution_maps(squared, draw(), torch.zeros(6).long(), "clrp", contrast="negated")
    with pytest.raises(ValueError, match="a layer with weights"):
        attribution_maps(nn.Sequential(nn.Flatten()), draw(), torch.zeros(6).long(), "clrp")


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda m, x, y: attribution_maps(m, x, y, "clpr"), ValueError, "nearest: clrp"),
        (
            lambda m, x, y: attribution_maps(m, x, y, "clrp", contrast="other"),
            ValueError,
            "contrast: expected one of .*nearest: others",
        ),
        (lambda m, x, y: conditional_maps(m, x, y, ["1:5"]), ValueError, "unit 5 .* out of range"),
        (lambda m, x, y: conditional_maps(m, x, y, ["12:5"]), ValueError, "layers: no layer"),
        (lambda m, x, y: conditional_maps(m, x, y, "1:1"), ValueError, "units: expected labels"),
        (lambda m, x, y: conditional_maps(m, x, y, []), ValueError, "units: expected labels"),
        (lambda m, x, y: conditional_maps(m, x, y[:2], ["1:1"]), ValueError, "target"),
        (lambda m, x, y: conditional_maps(m, x[0], y, ["1:1"]), TypeError, "images"),
        (lambda m, x, y: relmax(m, (x, y), "1", count=0), ValueError, "count"),
        (lambda m, x, y: relmax(m, (x, y), "1", target=3), ValueError, "target: .* 0 to 2, got 3"),
        (lambda m, x, y: relmax(m, (x, y), "9"), ValueError, "layers: no layer"),
    ],
)
def test_bad_input(run, error, message):
    with pytest.raises(error, match=message):
        run(small(), draw(), torch.arange(6) % 3)


def test_fully_connected_networks_have_maps_of_the_images() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    images, target = draw(4), torch.tensor([0, 1, 2, 0])
    assert attribution_maps(model, images, target, "clrp").shape == (4, 8, 8)
    found = conditional_maps(model, images, target, [f"2:{unit}" for unit in range(6)])
    assert found.shape == (4, 6, 8, 8)
    total = found.sum(axis=(1, 2, 3))  # nothing where no unit speaks for the class
    assert ((np.abs(total - 1) < 1e-5) | (total == 0)).all()
    assert total.max() > 0.99


@pytest.mark.parametrize("first", [nn.AvgPool2d(2), nn.MaxPool2d(2)])
def test_layers_that_read_other_sizes_than_the_images_are_refused(first: nn.Module) -> None:
    model = nn.Sequential(first, nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    model = nn.Sequential(model, nn.Flatten(), nn.Linear(3, 3)).eval()
    with pytest.raises(ValueError, match=r"model: relevance .* of shape \[2, 8, 8\]"):
        attribution_maps(model, draw(3), torch.tensor([0, 1, 2]), "clrp")


def test_layers_before_the_first_weights_have_no_relevance() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), *small()).eval()
    with pytest.raises(ValueError, match="0"):
        conditional_maps(model, draw(3), torch.tensor([0, 1, 2]), ["0:1"])


def test_conditional_maps_in_bfloat16_and_odd_targets() -> None:
    images, target = draw(3), torch.tensor([0, 1, 2])
    low = conditional_maps(small().bfloat16(), images.bfloat16(), target, ["1:2"])
    np.testing.assert_allclose(low, conditional_maps(small(), images, target, ["1:2"]), atol=0.05)
    with pytest.raises(ValueError, match="target: expected classes 0 to 2, got 0 to 5"):
        conditional_maps(small(), images, torch.tensor([0, 1, 5]), ["1:2"])
    with pytest.raises(TypeError, match="target: expected numbers of classes"):
        attribution_maps(small(), images, target.float(), "clrp")
