"""hrank, conductance, relevance and concepts; and what rescaling a unit leaves as it is."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
import xarray as xr
from support import networks
from support.state import state_of
from torch import Tensor, nn
from torch.nn import functional

import pyablate as pa
from pyablate.unit_attributes import _attributes

pytestmark = pytest.mark.usefixtures("exports_kept")

needs_captum = pytest.mark.skipif(
    not _attributes._installed("captum"), reason="Captum is not installed (pip install captum)"
)


def plain(bias: bool = False) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A chain of everything that Captum's LRP knows, without biases."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=bias), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, bias=bias), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(32, 7, bias=bias), nn.ReLU(), nn.Linear(7, 4, bias=bias),
    )  # fmt: skip
    model.known_as = "plain"
    return model.eval(), torch.randn(12, 2, 12, 12), torch.arange(12) % 4


# --- rank -----------------------------------------------------------------------------------------


def test_hrank_is_the_mean_rank_of_the_maps():
    model, images, labels = networks.network("residual")
    found = pa.attributes(model, (images, labels), "*", "hrank", sample=9)
    assert found["hrank"].attrs["sample"] == 9
    chosen = np.round(np.linspace(0, len(images) - 1, 9)).astype(int)
    for layer in ("body.2", "body.4.relu2"):
        maps = networks.outputs(model, layer, images[chosen]).numpy()
        expected = np.linalg.matrix_rank(maps).mean(axis=0)
        got = found["hrank"].to_numpy()[found["layer"].to_numpy() == layer]
        np.testing.assert_allclose(got, expected, atol=1e-9)
    assert float(found["hrank"].min()) > 0


def test_no_rank_without_maps():
    model, images, labels = networks.network("mlp")
    assert pa.attributes(model, (images, labels), "*", "hrank")["hrank"].isnull().all()


# --- conductance ----------------------------------------------------------------------------------


@needs_captum
def test_conductance_adds_up_to_the_change_of_the_logit():
    model, images, labels = plain(bias=True)
    found = pa.attributes(model, (images, labels), "*", "conductance", progress=False)
    with torch.no_grad():
        change = model(images) - model(torch.zeros_like(images))
    expected = change[torch.arange(12), labels]
    for layer in ("1", "4", "8"):
        here = found.isel(unit=found["layer"].to_numpy() == layer)
        assert abs(float(here["conductance"].sum()) - float(expected.mean())) < 0.05
        for k in range(4):
            own = float(expected[labels == k].mean())
            assert abs(float(here["conductance_per_class"][:, k].sum()) - own) < 0.1


@needs_captum
def test_conductance_by_the_path():
    model, images, labels = plain(bias=True)
    found = pa.attributes(model, (images, labels), "4", "conductance", progress=False)
    steps, total = 2000, torch.zeros(8, dtype=torch.float64)
    double, tail = copy.deepcopy(model).double(), copy.deepcopy(model[5:]).double()
    for image, label in zip(images.double(), labels, strict=True):
        path = torch.linspace(0, 1, steps + 1, dtype=torch.float64).reshape(-1, 1, 1, 1) * image
        h = networks.outputs(double, "4", path)
        middle = ((h[1:] + h[:-1]) / 2).requires_grad_()
        (gradient,) = torch.autograd.grad(tail(middle)[:, label].sum(), middle)
        total += (gradient * (h[1:] - h[:-1])).sum(dim=(0, 2, 3))
    np.testing.assert_allclose(found["conductance"], total / 12, atol=0.02)


# --- relevance ------------------------------------------------------------------------------------


def epsilon_rule(
    model: nn.Sequential, layer: int, image: Tensor, label: int, only: tuple[int, int] | None = None
) -> Tensor:
    """Relevance behind a layer, one step at a time, R_i = x_i sum_j w_ij R_j / z_j.

    With ``only``, (layer, unit), no other unit of that layer passes relevance on.
    """
    values = [image.unsqueeze(0).double()]
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        for module in double:
            values.append(module(values[-1]))
    R = torch.zeros_like(values[-1])
    R[0, label] = values[-1][0, label]
    for number in range(len(model) - 1, layer, -1):
        if isinstance(model[number], nn.ReLU):
            continue
        x = values[number].clone().requires_grad_()
        z = double[number](x)
        s = R / (z + 1e-9 * torch.where(z < 0, -1.0, 1.0))
        (c,) = torch.autograd.grad(z, x, s.detach())
        R = (x * c).detach()
        if only is not None and number - 1 == only[0]:
            R *= (torch.arange(R.shape[1]) == only[1]).reshape(-1, 1, 1)
    return R[0]


@needs_captum
@pytest.mark.parametrize("bias", [False, True])
def test_lrp_is_the_epsilon_rule(bias):
    model, images, labels = plain(bias)
    found = pa.attributes(model, (images, labels), "*", "lrp", progress=False)
    for layer in (1, 4, 8):
        each = [epsilon_rule(model, layer, x, int(y)) for x, y in zip(images, labels, strict=True)]
        per_image = torch.stack(each).flatten(2).sum(dim=2) if layer < 8 else torch.stack(each)
        here = found.isel(unit=found["layer"].to_numpy() == str(layer))
        np.testing.assert_allclose(here["lrp"], per_image.mean(dim=0), rtol=1e-3, atol=1e-4)
        of_one = per_image[labels == 2].mean(dim=0)
        np.testing.assert_allclose(here["lrp_per_class"][:, 2], of_one, rtol=1e-3, atol=1e-4)


@needs_captum
def test_crp_is_the_share_of_a_unit_in_what_its_layer_passes_on():
    """Relevance that goes through one unit only, as it arrives at the image."""
    model, images, labels = plain(bias=False)
    found = pa.attributes(model, (images, labels), "4", ["crp"], progress=False)
    assert "lrp" not in found
    each = torch.stack(
        [
            torch.stack(
                [
                    epsilon_rule(model, -1, x, int(y), only=(4, unit)).sum()
                    for unit in range(found.sizes["unit"])
                ]
            )
            for x, y in zip(images, labels, strict=True)
        ]
    )
    share = each / each.abs().sum(dim=1, keepdim=True)
    np.testing.assert_allclose(found["crp"], share.mean(dim=0), rtol=1e-3, atol=1e-4)
    of_one = share[labels == 2].mean(dim=0)
    np.testing.assert_allclose(found["crp_per_class"][:, 2], of_one, rtol=1e-3, atol=1e-4)
    assert (found["crp"] < 0).any()


class Residual(nn.Module):
    """Sums and averages as functions, one ReLU object for all, no bias anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.block = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.first = nn.Identity()
        self.last = nn.Identity()
        self.head = nn.Linear(12, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.relu(self.stem(x)))
        y = self.norm(self.block(x))
        x = self.last(torch.relu(y + x))
        x = torch.cat([x, functional.relu(x - 0.0)], dim=1)
        return self.head(x.mean(dim=(2, 3)))


@needs_captum
def test_relevance_is_kept_by_sums_joins_and_averages():
    torch.manual_seed(0)
    model, images, labels = Residual().eval(), torch.randn(8, 2, 9, 9), torch.arange(8) % 4
    found = pa.attributes(model, (images, labels), ["first", "last"], "lrp", progress=False)
    with torch.no_grad():
        logits = model(images)[torch.arange(8), labels]
    for layer in ("first", "last"):
        here = found.isel(unit=found["layer"].to_numpy() == layer)
        assert abs(float(here["lrp"].sum()) - float(logits.mean())) < 1e-4


@needs_captum
def test_no_rule_gives_nan_and_one_warning(caplog):
    model, images, labels = networks.network("inverted_residual")
    with caplog.at_level(logging.WARNING, logger="pyablate"):
        found = pa.attributes(model, (images, labels), "body.2", "lrp", progress=False)
    assert found["lrp"].isnull().all()
    assert (found["lrp_class"] == -1).all()
    assert [r.message for r in caplog.records] == [
        "lrp is NaN: no rule for this network (Hardswish at body.2)"
    ]


@needs_captum
def test_captum_leaves_the_model_alone():
    model, images, labels = plain()
    before = state_of(model)
    pa.attributes(model, (images, labels), "*", ["lrp", "conductance"], progress=False)
    assert state_of(model) == before


def test_without_captum(monkeypatch, caplog):
    model, images, labels = plain()
    monkeypatch.setattr(_attributes, "_installed", lambda name: False)
    with pytest.raises(ImportError, match=r"lrp is computed by Captum.*pip install"):
        pa.attributes(model, (images, labels), which=["mean", "lrp"])
    with caplog.at_level(logging.INFO, logger="pyablate"):
        found = pa.attributes(model, (images, labels), sample=4)
    assert "lrp" not in found
    assert "auc" in found
    assert "conductance is left out" in caplog.text


# --- concepts -------------------------------------------------------------------------------------


def concept_data() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    model, images, labels = networks.network("residual", images=60)
    torch.manual_seed(3)
    masks = torch.rand(60, 3, 24, 18) < torch.tensor([0.02, 0.3, 0.0]).reshape(3, 1, 1)
    return model, images, labels, masks


def test_concept_iou():
    model, images, labels, masks = concept_data()
    found = pa.attributes(
        model, (images, labels), ["body.2", "body.4.relu2"], "concept_iou",
        masks=masks, concept_names=["rare", "often", "never"], batch_size=7, progress=False,
    )  # fmt: skip
    assert found["concept"].to_numpy().tolist() == ["rare", "often", "never"]
    row = 0
    for layer in ("body.2", "body.4.relu2"):
        maps = networks.outputs(model, layer, images)
        large = functional.interpolate(maps, size=(24, 18), mode="bilinear").numpy()
        for c in range(maps.shape[1]):
            values = np.sort(maps[:, c].flatten().numpy())[::-1]
            limit = values[int(0.005 * len(values))]
            assert (values > limit).mean() <= 0.005
            above = large[:, c] > limit
            expected = []
            for m in range(3):
                there = masks[:, m].numpy()
                expected.append((above & there).sum() / (above | there).sum())
            got = found["concept_iou_per_concept"][row]
            np.testing.assert_allclose(got, expected, atol=0.003)
            assert float(found["concept_iou"][row]) == float(got.max())
            assert int(found["concept_iou_concept"][row]) == int(got.to_numpy().argmax())
            row += 1


def test_a_unit_that_is_its_concept():
    class Copy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.units = nn.Identity()
            self.head = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.units(x).mean(dim=(2, 3)))

    torch.manual_seed(0)
    images = torch.rand(40, 2, 10, 10)
    peak = images[:, 0] > torch.quantile(images[:, 0].flatten(), 0.995)
    masks = torch.stack([peak, ~peak], dim=1)
    labels = torch.arange(40) % 2
    found = pa.attributes(Copy(), (images, labels), "units", "concepts", masks=masks)
    assert float(found["concept_iou_per_concept"][0, 0]) == 1
    assert float(found["concept_iou"][1]) < 0.1
    assert found["concept_iou"].attrs["detector_above"] == 0.04


@pytest.mark.parametrize(
    ("masks", "names", "error", "named"),
    [
        ([1, 2], None, TypeError, "masks: expected an array"),
        (np.zeros((24, 8, 8)), None, ValueError, r"masks: expected shape \[24, concepts, H, W\]"),
        (np.zeros((23, 1, 8, 8)), None, ValueError, "one for each image"),
        (np.zeros((24, 1, 8, 8)), ["a", "b"], ValueError, "concept_names: expected 1 names, got 2"),
        (np.zeros((24, 1, 8, 8)), "a", TypeError, "concept_names: expected a sequence"),
    ],
)
def test_bad_masks(masks, names, error, named):
    model, images, labels = networks.network("residual")
    with pytest.raises(error, match=named):
        pa.attributes(
            model, (images, labels), which="concept_iou", masks=masks, concept_names=names
        )


# --- rescaling ------------------------------------------------------------------------------------


def test_rescaling_a_relu_unit_changes_what_the_table_says_it_changes():
    """Units scaled by powers of two and their readers by the inverse: not a bit of rounding."""
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    networks.randomise(model, seed=3)
    model.eval()
    images, labels = torch.randn(40, 2, 10, 10), torch.arange(40) % 3
    scaled = copy.deepcopy(model)
    scale = 2.0 ** torch.tensor([1, -2, 3, 0, -1, 2])
    with torch.no_grad():
        scaled[1].weight *= scale
        scaled[1].bias *= scale
        scaled[3].weight /= scale.reshape(1, -1, 1, 1)
        filters = 2.0 ** torch.tensor([2, -1, 0, 1, -3, 1, 2, -2])
        scaled[3].weight *= filters.reshape(-1, 1, 1, 1)
        scaled[3].bias *= filters
        scaled[7].weight /= filters
    assert torch.equal(model(images), scaled(images))
    masks = torch.rand(40, 2, 20, 20) < 0.1
    before, after = (
        pa.attributes(net, (images, labels), masks=masks, sample=8, progress=False)
        for net in (model, scaled)
    )
    seen = set()
    for name, values in before.data_vars.items():
        invariant = values.attrs.get("rescaling_invariant")
        if invariant is None:
            continue
        same = np.allclose(values, after[name], rtol=1e-4, atol=1e-6, equal_nan=True)
        assert same == invariant, name
        assert not values.isnull().all(), name
        seen.add(invariant)
    assert seen == {True, False}


def test_catalogue_and_result_agree():
    from pyablate.unit_attributes.catalog import CATALOG

    model, images, labels = plain()
    masks = torch.ones(12, 1, 4, 4)
    found: xr.Dataset = pa.attributes(model, (images, labels), masks=masks, sample=4)
    assert {e.name for e in CATALOG if e.family not in ("conductance", "lrp")} <= set(
        found.data_vars
    )
