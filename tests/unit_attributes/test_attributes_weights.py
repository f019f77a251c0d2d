"""Attributes of the weights: each unit's filters found by hand in networks of every family."""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import stats
from support import networks
from support.related_networks import orthogonality_loss, related
from torch import Tensor, nn
from torch.nn import functional

import pyablate as pa

pytestmark = pytest.mark.usefixtures("exports_kept")


def attributes_of(model: nn.Module, images: Tensor, which: str, layers: str = "*") -> xr.Dataset:
    labels = torch.zeros(len(images), dtype=torch.int64)
    return pa.attributes(model, (images, labels), layers, which, progress=False)


def weights_of(name: str, layer: str) -> tuple[nn.Module, xr.Dataset]:
    model, images, _ = networks.network(name)
    return model, attributes_of(model, images, "weights", layer)


def check_made(found: xr.Dataset, filters: Tensor) -> None:
    """Filters ``[units, anything]`` make the units."""
    flat = filters.detach().double().flatten(1).numpy()
    np.testing.assert_allclose(found["l1_norm"], np.abs(flat).sum(axis=1), rtol=1e-6)
    np.testing.assert_allclose(found["l2_norm"], np.linalg.norm(flat, axis=1), rtol=1e-6)


def check_read(found: xr.Dataset, columns: Tensor) -> None:
    """Weights ``[units, anything]`` read the units."""
    flat = columns.detach().double().flatten(1).numpy()
    np.testing.assert_allclose(found["l1_norm_outgoing"], np.abs(flat).sum(axis=1), rtol=1e-6)
    np.testing.assert_allclose(found["l2_norm_outgoing"], np.linalg.norm(flat, axis=1), rtol=1e-6)


def columns(weight: Tensor, groups: int = 1) -> Tensor:
    """Weights by input channel, spelt out."""
    per_group = weight.shape[0] // groups
    inputs = weight.shape[1] * groups
    out = []
    for c in range(inputs):
        group, place = divmod(c, weight.shape[1])
        out.append(weight[group * per_group : (group + 1) * per_group, place].flatten())
    return torch.stack(out)


def joined(*weights: Tensor) -> Tensor:
    return torch.cat([weight.flatten(1) for weight in weights], dim=1)


Find = Callable[[nn.Module], Tensor]


def test_plain_chain_through_batch_norm():
    model, found = weights_of("residual", "body.2")
    body = model.body
    check_made(found, body[0].weight)
    check_read(found, columns(body[3].inner[0].weight))
    gamma, beta = body[1].weight.detach().double().numpy(), body[1].bias.detach().double().numpy()
    size = np.abs(gamma)
    np.testing.assert_allclose(found["bn_scale"], size, rtol=1e-6)
    np.testing.assert_allclose(found["bn_active"], stats.norm.cdf(beta / size), rtol=1e-6)
    draws = beta[:, None] + size[:, None] * stats.norm.ppf((np.arange(100_000) + 0.5) / 100_000)
    np.testing.assert_allclose(
        found["bn_mean_relu"], np.maximum(draws, 0).mean(axis=1), rtol=1e-3, atol=1e-5
    )


# Layer: the filters that make its units, and the weights that read them.
FOUND: dict[tuple[str, str], tuple[Find | None, Find]] = {
    ("residual", "body.4.relu2"): (  # summed filters count together
        lambda m: joined(m.body[4].outer[0].weight, m.body[4].project[0].weight),
        lambda m: columns(m.head.weight),
    ),
    ("residual", "body.3.relu2"): (  # an identity shortcut has no filter
        lambda m: m.body[3].outer[0].weight,
        lambda m: joined(*(columns(p[0].weight) for p in (m.body[4].inner, m.body[4].project))),
    ),
    ("grouped_dilated", "body.1"): (
        lambda m: m.body[0].weight,
        lambda m: columns(m.body[2].weight, groups=4),
    ),
    ("grouped_dilated", "body.5"): (
        lambda m: m.body[4].weight,
        lambda m: columns(m.head.weight),
    ),
    ("inverted_residual", "body.3.act1"): (
        lambda m: m.body[3].expand[0].weight,
        lambda m: columns(m.body[3].depthwise[0].weight, groups=12),
    ),
    ("inverted_residual", "body.3.act2"): (
        lambda m: m.body[3].depthwise[0].weight,
        lambda m: joined(
            *map(columns, (m.body[3].excite.reduce.weight, m.body[3].project[0].weight))
        ),
    ),
    # 20 features are the maps [10, 2, 1], flattened; 10 are maxima, which are not followed.
    ("pooling", "features.7"): (
        None,
        lambda m: m.head.weight[:, :20].unflatten(1, (10, 2)).transpose(0, 1),
    ),
    ("mlp", "2"): (lambda m: m[1].weight, lambda m: columns(m[3].weight)),
    ("vit", "blocks.0.mlp.1"): (
        lambda m: m.blocks[0].mlp[0].weight,
        lambda m: columns(m.blocks[0].mlp[2].weight),
    ),
    ("used_twice", "act@1"): (lambda m: m.stem.weight, lambda m: columns(m.conv.weight)),
    ("conv1d", "relu2"): (lambda m: m.conv2.weight, lambda m: columns(m.conv3.weight)),
}


@pytest.mark.parametrize(("name", "layer"), FOUND)
def test_filters_are_found(name, layer):
    model, found = weights_of(name, layer)
    made, read = FOUND[name, layer]
    if made is not None:
        check_made(found, made(model))
    check_read(found, read(model))
    if layer == "body.4.relu2":
        of_one_filter = ("bn_scale", "bn_active", "bn_mean_relu", "spectral", "orthogonality_loss")
        for attribute in of_one_filter:
            assert found[attribute].isnull().all(), attribute
    if name == "conv1d":
        np.testing.assert_allclose(found["bn_scale"], model.norm.weight.abs().detach(), rtol=1e-6)


def test_joined_branches():
    model, found = weights_of("inception", "body.3")
    one = model.body[3]
    check = [one.one[0], one.three[3], one.five[0], one.pool[1]]
    assert found.sizes["unit"] == sum(len(conv.weight) for conv in check)
    at = 0
    for conv in check:
        check_made(found.isel(unit=slice(at, at + len(conv.weight))), conv.weight)
        at += len(conv.weight)
    two = model.body[4]
    read = [columns(c.weight) for c in (two.one[0], two.three[0], two.five[0], two.pool[1])]
    check_read(found, torch.cat(read, dim=1))
    norms = torch.cat(
        [one.one[1].weight, one.three[4].weight, one.five[1].weight, one.pool[2].weight]
    )
    np.testing.assert_allclose(found["bn_scale"], norms.abs().detach(), rtol=1e-6)


def test_shuffled_channels():
    model, found = weights_of("shuffle", "body.3")
    block, after = model.body[3], model.body[4]
    # Half of the channels pass the block untouched; then the two halves are interleaved.
    order = torch.arange(8).reshape(2, 4).t().flatten()
    filters = [
        model.body[0].weight[int(c)] if c < 4 else block.right[3].weight[int(c) - 4] for c in order
    ]
    for unit, weight in enumerate(filters):
        check_made(found.isel(unit=[unit]), weight.unsqueeze(0))
    # The next block's branch reads the second half; the first half goes to the block after it.
    check_read(found.isel(unit=slice(4, 8)), columns(after.right[0].weight))


def test_spectral():
    model, found = weights_of("residual", "body.2")
    filters = model.body[0].weight.detach().double().flatten(1).numpy()
    _, s, vt = np.linalg.svd(filters)
    share = np.cumsum(s**2) / (s**2).sum()
    leading = vt[: int(np.argmax(share >= 0.9)) + 1]
    inside = ((filters @ leading.T) ** 2).sum(axis=1) / (filters**2).sum(axis=1)
    np.testing.assert_allclose(found["spectral"], inside, rtol=1e-6)


def toeplitz(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Matrix of a layer without padding and bias: its outputs on every image with a single 1."""
    count = math.prod(shape)
    out = layer(torch.eye(count, dtype=torch.float64).unflatten(1, shape))
    return out.flatten(2).permute(1, 2, 0)  # [filters, positions, inputs]


def orthogonality_by_hand(weight: Tensor, layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Inner products of each filter's middle row with all rows, less 1 with itself, squared."""
    layer = copy.deepcopy(layer).double().requires_grad_(False)
    layer.bias = None
    layer.padding = (0,) * (weight.ndim - 2)
    rows = toeplitz(layer, shape)
    middle = rows.shape[1] // 2
    products = torch.einsum("un,vpn->uvp", rows[:, middle], rows)
    products[:, :, middle] -= torch.eye(len(rows), dtype=torch.float64)
    return products.square().sum(dim=(1, 2))


def test_orthogonality_of_rows_of_the_toeplitz_matrix():
    """Odd numbers of positions, so that all that overlaps the middle one is there."""
    torch.manual_seed(0)
    convs = (
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Conv2d(4, 6, (3, 2), stride=2, groups=2),
        nn.Conv2d(6, 3, 3, dilation=2, padding=2),
        nn.Conv2d(3, 5, 3, stride=2, dilation=3, padding=3),
    )
    behind = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    between = itertools.chain.from_iterable((conv, nn.ReLU()) for conv in convs)
    model = nn.Sequential(*between, *behind).eval()
    found = attributes_of(model, torch.rand(2, 2, 12, 12), "orthogonality_loss")
    loss = found["orthogonality_loss"].to_series().groupby(found["layer"].to_numpy())
    shapes = [(2, 7, 7), (4, 11, 10), (6, 13, 13), (3, 23, 23)]
    for layer, (conv, shape) in enumerate(zip(convs, shapes, strict=True)):
        expected = orthogonality_by_hand(conv.weight, conv, shape)
        np.testing.assert_allclose(loss.get_group(str(2 * layer + 1)), expected)
    weight = model[10].weight.detach().double()
    linear = (weight @ weight.t() - torch.eye(4)).square().sum(dim=1)
    np.testing.assert_allclose(loss.get_group("11"), linear)


def test_orthogonality_adds_up_to_the_regulariser():
    model, images, _ = related("orthogonal_resnet")
    found = attributes_of(model, images, "orthogonality_loss", "body.2")["orthogonality_loss"]
    whole = orthogonality_loss(model.body[0].weight.detach(), 1)
    assert float(found.sum()) == pytest.approx(float(whole), rel=1e-5)


def test_a_batch_norm_channel_of_scale_zero():
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(3, 2),
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([-1.0, 0.0, 2.0]))
    found = attributes_of(model, torch.rand(4, 1, 6, 6), "weights", "2")
    assert found["bn_scale"].to_numpy().tolist() == [0, 0, 0]
    assert found["bn_active"].to_numpy().tolist() == [0, 0, 1]
    assert found["bn_mean_relu"].to_numpy().tolist() == [0, 0, 2]


# --- NISP -----------------------------------------------------------------------------------------


def nisp_by_hand(model: nn.Sequential, layer: int, shape: tuple[int, ...]) -> np.ndarray:
    """The recursion of a chain, one layer at a time, with the transposed maps written out."""
    shapes = [shape]
    x = torch.zeros(1, *shape)
    for module in model:
        x = module(x)
        shapes.append(tuple(x.shape[1:]))
    s = torch.ones(1, *shapes[-1], dtype=torch.float64)
    for number in range(len(model) - 1, layer, -1):
        module, before = model[number], shapes[number]
        if isinstance(module, nn.Linear):
            s = s @ module.weight.detach().double().abs()
        elif isinstance(module, nn.Conv2d):
            weight = module.weight.detach().double().abs()
            rest = [
                (before[i] + 2 * module.padding[i - 1] - weight.shape[i + 1]) % module.stride[i - 1]
                for i in (1, 2)
            ]
            s = functional.conv_transpose2d(
                s, weight, stride=module.stride, padding=module.padding, output_padding=rest
            )
        elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d):  # stride = kernel, no padding
            k = module.kernel_size
            s = s.repeat_interleave(k, dim=2).repeat_interleave(k, dim=3) / k**2
        elif isinstance(module, nn.Flatten):
            s = s.reshape(1, *before)
        elif isinstance(module, nn.BatchNorm2d):
            scale = module.weight.double() / (module.running_var.double() + module.eps).sqrt()
            s = s * scale.detach().abs().reshape(1, -1, 1, 1)
    return s[0].flatten(1).sum(dim=1).numpy()


def test_nisp():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6), nn.Hardswish(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(6, 5),
        nn.Tanh(), nn.Linear(5, 3),
    )  # fmt: skip
    networks.randomise(model, seed=5)
    model.eval()
    found = attributes_of(model, torch.rand(3, 2, 12, 12), "nisp")
    for layer in (1, 5, 9):
        score = found["nisp"].to_numpy()[found["layer"].to_numpy() == str(layer)]
        expected = (
            nisp_by_hand(model, layer, (2, 12, 12))
            if layer < 9
            else model[10].weight.detach().double().abs().sum(dim=0).numpy()
        )
        np.testing.assert_allclose(score, expected, rtol=1e-6)


def test_nisp_adds_up_over_a_shortcut_and_stops_at_attention():
    model, images, _ = networks.network("residual")
    found = attributes_of(model, images, "nisp")
    late = found["nisp"].to_numpy()[found["layer"].to_numpy() == "body.4.relu2"]
    np.testing.assert_allclose(late, model.head.weight.detach().abs().sum(dim=0), rtol=1e-6)
    assert np.isfinite(found["nisp"]).all()
    model, images, _ = networks.network("vit")
    found = attributes_of(model, images, "nisp")
    assert found["nisp"].isnull().all()  # layer norm lies behind every unit


def test_no_graph_gives_nan_and_one_warning(caplog):
    model, images, _ = networks.network("guarded")
    with caplog.at_level(logging.WARNING, logger="pyablate"):
        found = attributes_of(model, images, "weights")
    assert found["l1_norm"].isnull().all()
    assert len(caplog.records) == 1
    assert "no graph" in caplog.text


@pytest.mark.parametrize("name", [n for n, a in networks.ARCHITECTURES.items() if a.exports])
def test_every_family_is_followed(name):
    model, images, _ = networks.network(name)
    found = attributes_of(model, images, "weights")
    made = found["l1_norm"].to_numpy()
    assert (made[np.isfinite(made)] > 0).all()
    assert np.isfinite(made).any() or name == "convnext"
