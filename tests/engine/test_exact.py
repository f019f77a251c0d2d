"""The engine against the oracle: equal predictions for every unit and image, near ties apart."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from support import networks
from support.oracle import check
from torch import nn

import pyablate as pa
from pyablate import reference
from pyablate.engine import int8_conv
from pyablate.engine.float64 import Exact, exact
from pyablate.interventions import Intervention
from pyablate.runs import setup

pytestmark = pytest.mark.usefixtures("exports_kept")

INTERVENTIONS = ["mean", "class_mean", "constant:0.3", "resample:3", "noise:3", "direction:3"]
EXPORTABLE = [name for name, made in networks.ARCHITECTURES.items() if made.exports]
VARIED = [
    "residual",
    "inverted_residual",
    "vit",
    "conv1d",
    "in_place",
    "used_twice",
    "routed",
]


@pytest.mark.parametrize("name", EXPORTABLE)
def test_every_unit_of_every_architecture(name):
    model, images, labels = networks.network(name)
    layers = networks.ARCHITECTURES[name].layers
    result = check(model, (images, labels), ["*", *layers])
    assert set(layers) <= set(result.units["layer"])
    assert len(result.flips.image) > 0
    assert "replay" not in result.strategy.values(), "this network exports"


@pytest.mark.parametrize("intervention", INTERVENTIONS)
@pytest.mark.parametrize("name", VARIED)
def test_every_intervention(name, intervention):
    model, images, labels = networks.network(name)
    layers = list(networks.ARCHITECTURES[name].layers)
    check(model, (images, labels), layers, intervention=intervention)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", ["dense", "shuffle", "convnext", "vit_library", "pooling"])
def test_every_precision(name, precision):
    if precision == "int8" and not int8_conv.available():
        pytest.skip("this processor has no 8-bit arithmetic that is exact (VNNI)")
    model, images, labels = networks.network(name)
    layers = list(networks.ARCHITECTURES[name].layers)
    result = pa.ablate(model, (images, labels), layers, precision=precision, progress=False)
    agreement = reference.compare(result, model, (images, labels), layers)
    assert agreement.mismatches == 0, agreement


def test_replay_on_request_gives_the_same_flips():
    model, images, labels = networks.network("residual")
    fast = pa.ablate(model, (images, labels), progress=False)
    slow = pa.ablate(model, (images, labels), strategy="replay", progress=False)
    assert set(slow.strategy.values()) == {"replay"}
    assert "replay" not in fast.strategy.values()
    np.testing.assert_array_equal(fast.predictions(), slow.predictions())


@pytest.mark.parametrize(
    ("name", "intervention"),
    [
        *[("residual", kind) for kind in ("zero", "mean", "class_mean", "resample", "noise")],
        *[(name, kind) for name in ("dense", "vit", "routed") for kind in ("zero", "resample")],
        ("in_place", "class_mean"),
        ("used_twice", "noise"),
    ],
)
def test_groups_within_and_across_layers(name, intervention):
    model, images, labels = networks.network(name)
    early, middle, late = networks.ARCHITECTURES[name].layers
    groups = [
        [f"{early}:0", f"{early}:3"],
        [f"{early}:1", f"{late}:2"],
        [f"{late}:0", f"{middle}:1", f"{early}:2"],
        [f"{late}:{unit}" for unit in range(5)],
        [f"{late}:3", f"{late}:0"],
    ]
    result = check(model, (images, labels), groups=groups, intervention=intervention)
    assert list(result.units["label"]) == ["+".join(group) for group in groups]
    assert (result.units["unit"] == -1).all()


@pytest.mark.parametrize("name", EXPORTABLE)
def test_groups_within_each_layer_of_every_architecture(name):
    """Groups of one layer stay on their channels as far as single units do."""
    model, images, labels = networks.network(name)
    channels = {site.name: site.channels for site in pa.sites(model, images[:2])}
    groups = [
        [f"{layer}:{unit}" for unit in range(1, last)]
        for layer in networks.ARCHITECTURES[name].layers
        for last in sorted({3, channels[layer] // 2 + 1, channels[layer]})
    ]
    check(model, (images[:16], labels[:16]), groups=groups, ties=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "fp64"])
def test_groups_in_every_precision(precision):
    if precision == "int8" and not int8_conv.available():
        pytest.skip("no 8-bit arithmetic that is exact on this processor")
    model, images, labels = networks.demo("vgg_bn", 24)
    groups = [["features.9:3"], ["features.9:3", "features.9:60"]]
    groups += [[f"features.9:{unit}" for unit in range(0, 64, step)] for step in (1, 2, 9)]
    options = {"groups": groups, "precision": precision}
    result = pa.ablate(model, (images, labels), progress=False, **options)
    agreement = reference.compare(result, model, (images, labels), groups=groups)
    assert agreement.mismatches == 0, agreement


def test_layers_and_groups_together():
    model, images, labels = networks.network("residual")
    groups = [["body.2:0", "body.4:3"], ["body.3:1", "body.3:2"]]
    both = check(model, (images, labels), ["body.3.relu1"], groups=groups)
    assert list(both.units["label"])[8:] == ["+".join(group) for group in groups]
    alone = pa.ablate(model, (images, labels), groups=groups, progress=False)
    np.testing.assert_array_equal(both.predictions(slice(8, None)), alone.predictions())


def test_all_pairs_of_a_layer():
    model, images, labels = networks.network("mlp")
    groups = [[f"4:{i}", f"4:{j}"] for i in range(12) for j in range(i)]
    check(model, (images, labels), groups=groups)


def test_a_whole_layer_at_once():
    """Nothing of the image is left: every prediction is the same."""
    model, images, labels = networks.network("grouped_dilated")
    result = check(model, (images, labels), groups=[[f"body.1:{unit}" for unit in range(8)]])
    assert len(np.unique(result.predictions())) == 1


def test_single_units_in_layers():
    model, images, labels = networks.network("conv1d")
    result = check(model, (images, labels), ["relu3:9", "relu1:2", "relu3:0"])
    assert list(result.units["label"]) == ["relu1:2", "relu3:0", "relu3:9"]
    whole = pa.ablate(model, (images, labels), ["relu1", "relu3"], progress=False)
    np.testing.assert_array_equal(
        result.predictions(), whole.predictions(["relu1:2", "relu3:0", "relu3:9"])
    )


@pytest.mark.parametrize("columns", [1, 3, 12])
def test_given_directions(columns):
    """Neither orthogonal nor of length 1, one matrix for each layer."""
    model, images, labels = networks.network("inception")
    generator = torch.Generator().manual_seed(0)
    directions = {
        "body.3": torch.randn(12, columns, generator=generator) * 3,
        "body.1": torch.randn(8, columns, generator=generator),
    }
    intervention = Intervention("direction", directions=directions)
    result = check(model, (images, labels), ["body.1", "body.3"], intervention=intervention)
    assert len(result.units) == 2 * columns


@pytest.mark.parametrize("name", [*VARIED, "vit"])
def test_given_constants(name):
    """A number of its own for each unit, by layer; of attention heads for each feature."""
    model, images, labels = networks.network(name)
    layers = list(networks.ARCHITECTURES[name].layers)
    found = pa.select(pa.sites(model, images[:2]), layers)
    draw = torch.Generator().manual_seed(0)
    values = {site.name: torch.randn(site.features, generator=draw) for site in found}
    groups = [[f"{site.name}:{unit}" for site in found for unit in (0, 2)]]
    groups += [[f"{found[-1].name}:{unit}" for unit in range(3)]]
    intervention = Intervention("constant", values=values)
    check(model, (images, labels), layers, groups=groups, intervention=intervention)


def test_constants_that_do_not_fit_are_refused_beforehand():
    model, images, labels = networks.network("residual")
    short = Intervention("constant", values=torch.ones(7))
    with pytest.raises(ValueError, match=r"values: layer 'body.3' needs 8 numbers"):
        pa.ablate(model, (images, labels), "body.3", intervention=short, progress=False)
    with pytest.raises(ValueError, match=r"values: layer 'body.3' needs 8 numbers"):
        pa.plan(model, (images, labels), "body.3", intervention=short)


def test_one_direction_along_a_unit_is_zeroing_it():
    model, images, labels = networks.network("residual")
    axes = Intervention("direction", directions=torch.eye(8))
    turned = pa.ablate(model, (images, labels), "body.3", intervention=axes, progress=False)
    zeroed = pa.ablate(model, (images, labels), "body.3", progress=False)
    np.testing.assert_array_equal(turned.predictions(), zeroed.predictions())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_networks_in_other_precisions(dtype):
    model, images, labels = networks.network("inverted_residual")
    other = copy.deepcopy(model).to(dtype)
    check(other, (images, labels), list(networks.ARCHITECTURES["inverted_residual"].layers))
    assert next(other.parameters()).dtype == dtype


@pytest.mark.parametrize("intervention", ["zero", "mean", "noise"])
def test_one_image(intervention):
    model, images, labels = networks.network("residual")
    check(model, (images[:1], labels[:1]), ["*"], intervention=intervention)


def test_a_class_without_images():
    model, images, labels = networks.network("residual")
    kept = labels != 2
    check(model, (images[kept], labels[kept]), ["body.2"], intervention="class_mean")


def test_equal_logits_give_the_first_class():
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        model[3].weight.zero_()
        model[3].bias.copy_(torch.tensor([0.0, 1.0, 1.0]))
    data = torch.randn(7, 6), torch.zeros(7, dtype=torch.int64)
    result = pa.ablate(model, data, "2", progress=False)
    assert (result.baseline == 1).all()
    assert (result.predictions() == 1).all()


def test_two_classes_and_dead_units():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2))
    with torch.no_grad():
        model[0].bias[:3] = -100.0  # silent on every image
        model[3].bias.copy_(-model[2:](model[1](model[0](torch.randn(64, 1, 4, 4)))).mean(dim=0))
    data = torch.randn(40, 1, 4, 4), torch.randint(2, (40,))
    result = check(model, data, "1")
    flips = np.diff(result.flips.start)
    assert (flips[:3] == 0).all()
    assert flips[3:].sum() > 0


@pytest.mark.parametrize("intervention", ["zero", *INTERVENTIONS])
@pytest.mark.parametrize("name", pa.demo.NETWORKS)
def test_shipped_networks(name, intervention):
    """Two units of every layer; ``benchmarks/exactness.py`` does all of them."""
    model, images, labels = networks.demo(name, 40)
    found = pa.select(pa.sites(model, images[:1]))
    chosen = [site.label(unit) for site in found for unit in (1, site.channels - 2)]
    result = check(model, (images, labels), chosen, intervention=intervention)
    assert len(result.units) == 2 * len(found)


class TwoNorms(nn.Module):
    """Both are folded into the same filters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3)
        self.norms = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norms(self.second(self.first(x).relu())).relu().mean((2, 3)))


def two_norms() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Give the network with statistics of its own, and images."""
    torch.manual_seed(0)
    model = TwoNorms().eval()
    for norm in model.norms:
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return model, torch.randn(4, 3, 9, 9), torch.arange(4)


@pytest.mark.parametrize("name", ["vgg_bn", "inverted_residual", "two norms"])
def test_folding_leaves_float64_exact(name, monkeypatch):
    """Were folded filters rounded to float32, the slow replay would decide all close calls."""
    decides = []

    def noted(*arguments: Any) -> Any:
        decides.append(exact(*arguments))
        return decides[-1]

    monkeypatch.setattr(setup, "exact", noted)
    if name == "two norms":
        model, images, labels = two_norms()
    elif name in pa.demo.NETWORKS:
        model, images, labels = networks.demo(name, 4)
    else:
        model, images, labels = networks.network(name)
    pa.ablate(model, (images[:4], labels[:4]), "*", audit=4, progress=False)
    assert [type(each) for each in decides] == [Exact]


def test_shipped_network_in_groups_across_layers():
    model, images, labels = networks.demo("alexnet", 40)
    groups = [
        [f"features.9:{unit}" for unit in range(16)],
        ["features.4:3", "features.11:7", "classifier.1:100"],
        ["features.1:0", "features.1:5", "features.1:9"],
    ]
    check(model, (images, labels), groups=groups)


def test_a_group_of_one_unit_is_a_group():
    model, *data = networks.network("residual", 17)
    result = check(model, data, groups=[["body.2:1"], ["body.2:1", "body.2:2"]])
    assert result.units["unit"].tolist() == [-1, -1]
