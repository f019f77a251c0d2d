"""Attributes of activations and gradients against slow formulas written for one unit at a time."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from scipy import stats
from support import networks
from support.state import state_of
from torch import Tensor, nn
from torch.nn import functional

import pyablate as pa
from pyablate.network.sites import copied
from pyablate.unit_attributes.catalog import CATALOG

pytestmark = pytest.mark.usefixtures("exports_kept")

FORWARD = ["activations", "selectivity", "information", "redundancy", "gradients"]
NAMES = ["residual", "conv1d", "used_twice", "in_place", "vit"]


@cache
def table(name: str) -> xr.Dataset:
    model, images, labels = networks.network(name)
    return pa.attributes(
        model, (images, labels), networks.ARCHITECTURES[name].layers, FORWARD, bins=5, top=7,
        batch_size=7, progress=False,
    )  # fmt: skip


@cache
def maps(name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Float64 maps and gradients ``[N, C, positions]`` by layer, image by image."""
    model, images, labels = networks.network(name)
    wanted = pa.select(pa.sites(model, images[:1]), networks.ARCHITECTURES[name].layers)
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {s.name: ([], []) for s in wanted}
    double = copied(model).double()
    for image, label in zip(images.double(), labels, strict=True):
        held: dict[str, list[Tensor]] = {site.name: [] for site in wanted}

        def hook(site: pa.Site, held: Any = held) -> Any:
            def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
                output = output.clone()
                output.retain_grad()
                held[site.name].append(output)
                return output.clone()

            return keep

        handles = [double.get_submodule(s.module).register_forward_hook(hook(s)) for s in wanted]
        logits = double(torch.stack([image, image]))[:1]
        for handle in handles:
            handle.remove()
        functional.cross_entropy(logits, label[None]).backward()
        for site in wanted:
            calls = held[site.name]
            calls = calls if site.call is None else [calls[site.call - 1]]

            def flat(x: Tensor, site: pa.Site = site) -> Tensor:
                return x[0].movedim(site.axis - 1, 0).flatten(1)

            found[site.name][0].append(torch.cat([flat(x.detach()) for x in calls], dim=1))
            found[site.name][1].append(torch.cat([flat(x.grad) for x in calls], dim=1))
    return {
        layer: (torch.stack(a).numpy(), torch.stack(g).numpy()) for layer, (a, g) in found.items()
    }


@cache
def probabilities(name: str) -> np.ndarray:
    model, images, _ = networks.network(name)
    with torch.no_grad():
        return model(images).double().softmax(dim=1).numpy()


def units(name: str) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Label, maps and gradients ``[N, positions]`` of every unit."""
    return [
        (f"{layer}:{c}", a[:, c], g[:, c])
        for layer, (a, g) in maps(name).items()
        for c in range(a.shape[1])
    ]


def agree(name: str, attribute: str, expected: list[float], *, rtol: float = 1e-4) -> None:
    found = table(name)[attribute].to_numpy()
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-6, err_msg=attribute)


def labels_of(name: str) -> np.ndarray:
    return networks.network(name)[2].numpy()


@pytest.mark.parametrize("name", NAMES)
def test_units_have_the_labels_of_the_ablation_result(name):
    model, images, labels = networks.network(name)
    layers = networks.ARCHITECTURES[name].layers
    result = pa.ablate(model, (images[:2], labels[:2]), layers, audit=0, strategy="replay")
    found = table(name)
    assert found["unit"].to_numpy().tolist() == result.units["label"].tolist()
    assert found["layer"].to_numpy().tolist() == result.units["layer"].tolist()
    assert found["index"].to_numpy().tolist() == result.units["unit"].tolist()
    assert found["class"].to_numpy().tolist() == list(result.class_names)


@pytest.mark.parametrize("name", NAMES)
def test_moments(name):
    pooled = [a.mean(axis=1) for _, a, _ in units(name)]
    agree(name, "mean", [A.mean() for A in pooled])
    agree(name, "variance", [A.var() for A in pooled])
    agree(name, "max", [A.max() for A in pooled])
    agree(name, "sparsity", [(a <= 0).mean() for _, a, _ in units(name)], rtol=1e-9)
    agree(name, "active_images", [(a > 0).any(axis=1).mean() for _, a, _ in units(name)], rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_class_selectivity(name):
    y = labels_of(name)
    expected = []
    for _, a, _ in units(name):
        means = [a[y == k].mean() for k in range(networks.CLASSES)]
        row = []
        for k, mean in enumerate(means):
            rest = np.mean(means[:k] + means[k + 1 :])
            known = a.min() >= 0 and mean + rest > 0
            row.append((mean - rest) / (mean + rest) if known else np.nan)
        expected.append(row)
    found = table(name)
    np.testing.assert_allclose(found["class_selectivity_per_class"], expected, rtol=1e-4, atol=1e-6)
    best = [np.max(row) for row in expected]
    np.testing.assert_allclose(found["class_selectivity"], best, rtol=1e-4, atol=1e-6)
    where = [-1 if np.isnan(row).any() else np.argmax(row) for row in expected]
    assert found["class_selectivity_class"].to_numpy().tolist() == where


@pytest.mark.parametrize("name", NAMES)
def test_class_correlation_and_redundancy(name):
    p = probabilities(name)
    found = table(name)
    for label, a, _ in units(name):
        A = a.mean(axis=1)
        if np.ptp(A) == 0:
            assert np.isnan(found["class_correlation"].sel(unit=label))
            continue
        r = [stats.pearsonr(A, p[:, k]).statistic for k in range(networks.CLASSES)]
        one = found.sel(unit=label)
        np.testing.assert_allclose(one["class_correlation_per_class"], r, rtol=1e-3, atol=1e-5)
        assert abs(float(one["class_correlation"]) - max(r)) < 1e-5
        layer = label.rpartition(":")[0]
        others = [b.mean(axis=1) for other, b, _ in units(name) if other.startswith(f"{layer}:")]
        others.pop(int(label.rpartition(":")[2]))
        best = max(abs(stats.pearsonr(A, B).statistic) for B in others if np.ptp(B) > 0)
        assert abs(float(one["redundancy"]) - best) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    products = [g * a for _, a, g in units(name)]
    agree(name, "taylor", [abs(p.mean(axis=1)).mean() for p in products], rtol=2e-3)
    agree(name, "fisher", [(p.sum(axis=1) ** 2).mean() for p in products], rtol=2e-3)
    labels = networks.network(name)[2].numpy()
    slow = [
        [abs(p[labels == k].mean(axis=1)).mean() for k in range(networks.CLASSES)] for p in products
    ]
    found = table(name)["taylor_per_class"].to_numpy()
    np.testing.assert_allclose(found, slow, rtol=2e-3, atol=1e-7)


def test_gradients_are_left_alone():
    model, images, labels = networks.network("residual")
    before = state_of(model)
    images = images.clone().requires_grad_()
    pa.attributes(model, (images, labels), which="gradients", progress=False)
    assert state_of(model) == before
    assert images.grad is None


# --- what follows from ranks, on activations with ties --------------------------------------------


class Scores(nn.Module):
    """A network whose units' activations are the inputs themselves."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.units = nn.Identity()
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.units(x))


def scores(A: np.ndarray, y: np.ndarray, classes: int, **options: Any) -> xr.Dataset:
    torch.manual_seed(0)
    data = (torch.from_numpy(A).float(), torch.from_numpy(y))
    model = Scores(A.shape[1], classes)
    which = ["selectivity", "information", "redundancy", "activations"]
    return pa.attributes(model, data, "units", which, progress=False, **options)


@pytest.fixture(scope="module")
def tied() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(3)
    A = np.maximum(draw.normal(size=(90, 12)), 0).round(1)  # many equal values
    A[:, 10] = 0.0
    A[:, 11] = np.where(draw.random(90) < 0.5, 0.0, -0.0)
    y = draw.integers(0, 4, size=90)
    A[y == 2, 0] += 3
    return A.astype(np.float32), y


def test_auc(tied):
    A, y = tied
    found = scores(A, y, 4)["auc_per_class"].to_numpy()
    for u in range(A.shape[1]):
        for k in range(4):
            own, others = A[y == k, u], A[y != k, u]
            share = (own[:, None] > others).mean() + (own[:, None] == others).mean() / 2
            assert abs(found[u, k] - share) < 1e-12
            statistic = float(stats.mannwhitneyu(own, others).statistic)
            assert abs(found[u, k] - statistic / len(own) / len(others)) < 1e-12


def test_informedness(tied):
    A, y = tied
    found = scores(A, y, 4)["informedness_per_class"].to_numpy()
    for u in range(A.shape[1]):
        for k in range(4):
            own, others = A[y == k, u], A[y != k, u]
            gain = max((own >= t).mean() - (others >= t).mean() for t in A[:, u])
            assert abs(found[u, k] - gain) < 1e-12


@pytest.mark.parametrize("top", [1, 7, 60, 500])
def test_precision_at(tied, top):
    A, y = tied
    found = scores(A, y, 4, top=top)["precision_at_per_class"]
    for u in range(A.shape[1]):
        best = sorted(range(len(A)), key=lambda n, u=u: (-A[n, u], n))[:top]
        np.testing.assert_allclose(found[u], [(y[best] == k).mean() for k in range(4)], rtol=1e-12)
    assert found.attrs["top"] == top


def _cells(code: np.ndarray, y: np.ndarray, bins: int, classes: int) -> np.ndarray:
    counts = np.zeros((bins, classes))
    np.add.at(counts, (code, y), 1)
    return counts


@pytest.mark.parametrize("bins", [1, 5, 16, 200])
def test_information(tied, bins):
    A, y = tied
    images = len(A)
    found = scores(A, y, 4, bins=bins)
    for u in range(A.shape[1]):
        below = np.array([(A[:, u] < a).sum() for a in A[:, u]])
        cells = _cells(below * bins // images, y, bins, 4)
        p = cells / images
        marginal = p.sum(axis=1, keepdims=True) * p.sum(axis=0)
        plain = stats.entropy(p.ravel(), marginal.ravel())  # KL of joint and product
        occupied = [(part > 0).sum() for part in (p, p.sum(axis=1), p.sum(axis=0))]
        bias = (occupied[0] - occupied[1] - occupied[2] + 1) / (2 * images)
        assert abs(float(found["mutual_information"][u]) - (plain - bias)) < 1e-10
        kl = [stats.entropy(cells[:, k], cells.sum(axis=1)) for k in range(4)]
        np.testing.assert_allclose(found["kl_selectivity_per_class"][u], kl, atol=1e-10)
        low, high = A[:, u].min(), A[:, u].max()
        widths = np.histogram(A[:, u], bins=bins, range=(low, max(high, low + 1)))[0]
        assert abs(float(found["entropy"][u]) - stats.entropy(widths)) < 1e-10
    assert found["entropy"].attrs["bins"] == bins


def test_a_constant_unit_says_nothing(tied):
    A, y = tied
    for u in (10, 11):  # zeros of one sign and of both
        one = scores(A, y, 4).isel(unit=u)
        for name in ("class_selectivity", "class_correlation", "redundancy"):
            assert np.isnan(one[name])
            assert f"{name}_class" not in one or int(one[f"{name}_class"]) == -1
        assert float(one["auc"]) == 0.5
        for name in ("informedness", "mutual_information", "kl_selectivity", "entropy", "variance"):
            assert float(one[name]) == 0


def test_a_class_without_images(tied):
    A, y = tied
    found, shifted = scores(A, y, 4), scores(A, y + (y > 1), 5)  # nobody is in class 2 now
    for name in ("class_selectivity", "auc", "informedness", "kl_selectivity"):
        assert np.isnan(shifted[f"{name}_per_class"][:, 2]).all(), name
        np.testing.assert_allclose(shifted[name], found[name], rtol=1e-12)
    assert (shifted["precision_at_per_class"][:, 2] == 0).all()
    np.testing.assert_allclose(shifted["mutual_information"], found["mutual_information"])


def test_a_single_class_with_images(tied):
    A, y = tied
    found = scores(A, np.zeros_like(y), 2)
    for name in ("class_selectivity", "auc", "informedness"):
        assert np.isnan(found[name]).all(), name
    np.testing.assert_allclose(found["mutual_information"], 0, atol=1e-12)


def test_one_unit_in_the_layer(tied):
    A, y = tied
    found = scores(A[:, :1], y, 4)
    assert found.sizes["unit"] == 1
    assert np.isnan(found["redundancy"]).all()
    assert float(found["auc"][0]) > 0.9


@pytest.mark.parametrize("count", [1, 2])
def test_few_images(tied, count):
    A, y = tied
    found = scores(A[:count], y[:count], 4)
    np.testing.assert_allclose(found["mean"], A[:count].mean(axis=0), rtol=1e-6)
    assert (found["class_correlation"].isnull() == (np.ptp(A[:count], axis=0) == 0)).all()


def test_ranks_of_float64_maps_do_not_lose_digits():
    A = 1 + 1e-12 * np.arange(20)[:, None]
    y = (np.arange(20) >= 10).astype(np.int64)
    model = Scores(1, 2).double()
    data = (torch.from_numpy(A), torch.from_numpy(y))
    found = pa.attributes(model, data, "units", "auc", progress=False)
    assert float(found["auc_per_class"][0, 1]) == 1.0


def test_signed_activations_warn_once_and_give_nan(tied, caplog):
    A, y = tied
    A = A.copy()
    A[5, 3] = -1e-3
    with caplog.at_level(logging.WARNING, logger="pyablate"):
        found = scores(A, y, 4)
    assert [r.message for r in caplog.records if "class_selectivity" in r.message] == [
        "class_selectivity is NaN for units whose activation is negative somewhere, in units"
    ]
    assert np.flatnonzero(found["class_selectivity"].isnull()).tolist() == [3, 10, 11]
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="pyablate"):
        pa.attributes(Scores(12, 4), (torch.from_numpy(A), torch.from_numpy(y)), "units", "auc")
    assert not caplog.records


# --- the table itself -----------------------------------------------------------------------------


def test_any_batch_size_and_chosen_units_give_the_same():
    model, images, labels = networks.network("residual")
    layers = ["body.4.relu2:3", "body.2:1", "body.4.relu2:0"]
    some = pa.attributes(model, (images, labels), layers, FORWARD, bins=5, top=7, batch_size=5)
    assert some["unit"].to_numpy().tolist() == ["body.2:1", "body.4.relu2:0", "body.4.relu2:3"]
    every = pa.attributes(model, (images, labels), "*", FORWARD, bins=5, top=7, batch_size=1)
    xr.testing.assert_allclose(some, every.sel(unit=some["unit"]), rtol=1e-4)


def test_data_that_can_be_read_once():
    model, images, labels = networks.network("residual")
    whole = pa.attributes(model, (images, labels), which=["mean", "auc"])
    once = pa.attributes(
        model,
        ((images[i : i + 5], labels[i : i + 5]) for i in range(0, 24, 5)),
        which=["mean", "auc"],
    )
    xr.testing.assert_allclose(once, whole, rtol=1e-4)


def test_every_variable_says_what_it_is():
    for name, variable in table("residual").data_vars.items():
        if str(name).endswith("_class") and "per_class" not in str(name):
            assert variable.dtype == np.int64
            continue
        assert variable.dtype == np.float64
        assert set(variable.attrs) >= {"formula", "source", "family", "rescaling_invariant"}


_ENDINGS = ("", "_class", "_per_class")


def test_which_by_name_and_family():
    model, images, labels = networks.network("residual")
    found = pa.attributes(model, (images, labels), which=["sparsity", "auc"])
    assert set(found.data_vars) == {"sparsity", "auc", "auc_class", "auc_per_class"}
    with_family = pa.attributes(model, (images, labels), which="gradients")
    both = {f"{name}{ending}" for name in ("taylor", "fisher") for ending in _ENDINGS}
    assert set(with_family.data_vars) == both


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"which": "acu"}, ValueError, "no attribute 'acu'; nearest: auc"),
        ({"which": []}, ValueError, "which: expected names"),
        ({"which": [3]}, TypeError, "which: expected names"),
        ({"layers": "body.99"}, ValueError, "body.99"),
        ({"bins": 0}, ValueError, "bins: expected at least 1, got 0"),
        ({"top": 2.5}, ValueError, "top: expected an integer of at least 1, got 2.5"),
        ({"sample": -1}, ValueError, "sample"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"class_names": ["a"]}, ValueError, "class_names: expected 5 names, got 1"),
        ({"which": "concept_iou"}, ValueError, "masks: concept_iou needs masks"),
        ({"model": 3}, TypeError, "model: expected an nn.Module"),
        ({"data": 3}, TypeError, "data"),
    ],
)
def test_bad_input(options, error, named):
    model, images, labels = networks.network("residual")
    arguments = {"model": model, "data": (images, labels), "which": "mean", **options}
    with pytest.raises(error, match=named):
        pa.attributes(**arguments)


def test_a_label_that_is_no_class():
    model, images, labels = networks.network("residual")
    wrong = labels.clone()
    wrong[3] = 7
    with pytest.raises(ValueError, match="label 7 of image 3"):
        pa.attributes(model, (images, wrong), which="mean")


def test_the_documents_list_every_attribute():
    text = (Path(__file__).parents[2] / "docs" / "guides" / "attributes.md").read_text()
    for entry in CATALOG:
        row = next(line for line in text.splitlines() if line.startswith(f"| `{entry.name}`"))
        assert row.split("|")[-2].strip() == ("yes" if entry.invariant else "no")
        assert entry.formula.replace("|", "\\|") in row
