"""Attribution maps and what is kept of them: every figure against a slow formula."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from scipy import stats
from support.pooled import Pooled, pooled
from torch import Tensor, nn
from torch.nn import functional

import pyablate as pa
from pyablate import compression
from pyablate.attribution import similarity
from pyablate.attribution.collapsed import collapse, distances, map_site, tapped
from pyablate.attribution.maps import METHODS

pytest.importorskip("captum")
pytest.importorskip("skimage")


def pictures(count: int = 12, side: int = 10) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def maps() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.normal(size=(5, 9, 8)), random.normal(size=(5, 9, 8))


def test_figures_of_two_maps_against_scipy(maps):
    a, b = maps
    for i in range(5):
        one, two = a[i].ravel(), b[i].ravel()
        angle = one @ two / (np.linalg.norm(one) * np.linalg.norm(two))
        assert similarity.cosine(a, b)[i] == pytest.approx(angle)
        assert similarity.pearson(a, b)[i] == pytest.approx(stats.pearsonr(one, two).statistic)
        assert similarity.spearman(a, b)[i] == pytest.approx(stats.spearmanr(one, two).statistic)
        top = [set(np.argsort(each)[-8:]) for each in (one, two)]  # 72 pixels: 8 above 0.9
        overlap = len(top[0] & top[1]) / len(top[0] | top[1])
        assert similarity.top_overlap(a, b)[i] == pytest.approx(overlap)


def test_structural_similarity_of_one_window():
    random = np.random.default_rng(1)
    a, b = random.normal(size=(2, 1, 7, 7))
    one, two = a / np.abs(a).max(), b / np.abs(b).max()
    span = max(one.max(), two.max()) - min(one.min(), two.min())
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    shared = np.cov(one.ravel(), two.ravel())
    top = (2 * one.mean() * two.mean() + c1) * (2 * shared[0, 1] + c2)
    below = (one.mean() ** 2 + two.mean() ** 2 + c1) * (shared[0, 0] + shared[1, 1] + c2)
    assert similarity.structure(a, b)[0] == pytest.approx(top / below)
    assert similarity.structure(a, 5 * a)[0] == pytest.approx(1.0)  # the scale does not matter


def test_pixels_in_masks_against_all_pairs(maps):
    a, masks = np.round(maps[0], 1), maps[1] > 0.5  # rounded, so that there are ties
    for i in range(5):
        inside, outside = a[i][masks[i]], a[i][~masks[i]]
        wins = (inside[:, None] > outside).mean() + (inside[:, None] == outside).mean() / 2
        assert similarity.pixel_auc(a, masks)[i] == pytest.approx(wins)
        highest = np.unravel_index(maps[0][i].argmax(), (9, 8))
        assert similarity.points_inside(maps[0], masks)[i] == masks[i][highest]


def test_maps_without_direction_have_no_figures(maps):
    a = maps[0][:1]
    zero, flat, none = np.zeros_like(a), np.ones_like(a), np.zeros(a.shape, dtype=bool)
    for figure in (similarity.cosine, similarity.structure):
        assert np.isnan(figure(a, zero)[0])
    for figure in (similarity.pearson, similarity.spearman, similarity.top_overlap):
        assert np.isnan(figure(a, flat)[0])
    assert similarity.pixel_auc(flat, a > 0)[0] == 0.5
    assert np.isnan(similarity.pixel_auc(a, none)[0])
    assert np.isnan(similarity.points_inside(flat, a > 0)[0])
    assert np.isnan(similarity.structure(a[:, :2, :2], a[:, :2, :2])[0])  # too small


def test_grad_cam_weighs_maps_by_the_head():
    model, x = pooled(0), pictures()
    target = torch.arange(12) % 4
    found = compression.attribution_maps(model, x, target, "grad_cam", batch_size=5)
    with torch.no_grad():
        maps = torch.einsum("nc,nchw->nhw", model.fc.weight[target], model.relu(model.conv(x)))
    expected = maps.relu() / 100  # the gradient of the mean over 10 x 10 positions
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_integrated_gradients_add_up_to_the_change_of_the_logit():
    model, x = pooled(1), pictures()
    target = torch.arange(12) % 4
    found = compression.attribution_maps(model, x, target, "integrated_gradients", steps=64)
    with torch.no_grad():
        change = (model(x) - model(torch.zeros_like(x))).gather(1, target[:, None])[:, 0]
    np.testing.assert_allclose(found.sum((1, 2)), change, atol=0.02 * float(change.abs().max()))


def test_relevance_without_biases_is_gradient_times_image():
    model, x = pooled(2, bias=False), pictures().requires_grad_()
    target = torch.arange(12) % 4
    found = compression.attribution_maps(model, x.detach(), target, "lrp")
    logits = model(x).gather(1, target[:, None]).sum()
    expected = (torch.autograd.grad(logits, x)[0] * x).sum(1).detach()
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_collapsed_maps_against_their_formulas():
    model, x = pooled(0), pictures()
    target = torch.arange(12) % 4
    site = map_site(model, x)
    assert site.name == "relu"
    logits, output = tapped(model, site, x)
    features = output.detach()
    weight = model.fc.weight.detach()[target]  # the gradient, summed over the mean's positions
    weighted = torch.einsum("nc,nchw->nhw", weight, features).relu()
    dropped = torch.rand(12, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    left = torch.einsum("nc,nchw->nhw", weight * ~dropped, features).relu()
    for variant, expected in (
        ("equal", features.square().mean(1)),
        ("weighted", weighted),
        ("stochastic", left),
    ):
        logits, output = tapped(model, site, x)
        chosen = dropped if variant == "stochastic" else None
        found = collapse(site, logits, output, target, variant, dropped=chosen)
        torch.testing.assert_close(found[:, 0].detach(), expected, atol=1e-6, rtol=1e-5)


def test_distance_against_the_cosine():
    a, b = torch.rand(2, 4, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    cosine = functional.cosine_similarity(a.flatten(1), b.flatten(1))
    torch.testing.assert_close(distances(a, b), (2 - 2 * cosine) / 25)
    smaller = functional.interpolate(b, (3, 3))
    resized = functional.interpolate(smaller, (5, 5), mode="bilinear", align_corners=False)
    torch.testing.assert_close(distances(a, smaller), distances(a, resized))
    with pytest.raises(ValueError, match="layers"):
        distances(a.flatten(2), b.flatten(2)[..., :9])


def test_layers_that_hold_maps():
    model = pa.demo.network("alexnet")
    x = pa.demo.images(1)[0]
    assert map_site(model, x).name == "features.11"
    assert map_site(model, x, "features.4").name == "features.4"
    for layer, message in (("classifier.1", "expected one layer"), ("features.*", "expected one")):
        with pytest.raises(ValueError, match=message):
            map_site(model, x, layer)
    with pytest.raises(ValueError, match="no layer of this network has positions"):
        map_site(nn.Sequential(nn.Flatten(), nn.Linear(784, 9), nn.ReLU(), nn.Linear(9, 3)), x)


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    x = pictures(60)
    first, second = pooled(0), pooled(0)
    with torch.no_grad():
        second.fc.weight += 0.1 * torch.randn(
            second.fc.weight.shape, generator=torch.Generator().manual_seed(4)
        )
    return first, second, x, torch.arange(60) % 4


def test_preservation_looks_at_what_both_predict(pair):
    first, second, x, labels = pair
    masks = torch.zeros(60, 10, 10)
    masks[:, 2:7, 3:8] = 1
    found = compression.attributions_preserved(
        first, second, (x, labels), masks=masks, images=None, batch_size=7
    )
    with torch.no_grad():
        before, after = first(x).argmax(1), second(x).argmax(1)
    agreeing = (before == after).nonzero()[:, 0]
    assert 0 < len(agreeing) < 60
    target = before[agreeing]
    for method in METHODS:
        rows = found.maps[found.maps["method"] == method]
        assert rows["image"].tolist() == agreeing.tolist()
        assert rows["target"].tolist() == target.tolist()
        a, b = (
            compression.attribution_maps(model, x[agreeing], target, method)
            for model in (first, second)
        )
        inside = masks[agreeing].numpy() > 0
        expected = {
            "cosine": similarity.cosine(a, b),
            "ssim": similarity.structure(a, b),
            "iou": similarity.top_overlap(a, b, 0.9),
            "auc_before": similarity.pixel_auc(a, inside),
            "pointing_after": similarity.points_inside(b, inside),
        }
        for name, values in expected.items():
            np.testing.assert_allclose(rows[name], values, rtol=1e-4, atol=1e-5)
    assert found.distances["image"].tolist() == agreeing.tolist()
    summary = found.summary(resamples=200).set_index(["method", "figure"])
    row = summary.loc["lrp", "cosine"]
    mine = found.maps.loc[found.maps["method"] == "lrp", "cosine"]
    assert row["mean"] == pytest.approx(mine.mean())
    spread = 1.96 * mine.std() / np.sqrt(len(mine))
    assert row["high"] - row["low"] == pytest.approx(2 * spread, rel=0.3)
    assert summary.loc["collapsed", "weighted"]["images"] == len(agreeing)


def test_a_network_preserves_its_own_attributions(pair):
    first, _, x, labels = pair
    found = pa.compare(first, first, (x, labels), attributions="grad_cam").attributions
    assert found is not None
    assert found.maps["cosine"].dropna().to_numpy() == pytest.approx(1.0)
    assert found.distances[["weighted", "equal"]].max().max() < 1e-10
    assert found.distances["stochastic"].max() > 1e-6  # whose channels of the original are fewer
    again = pa.compare(first, first, (x, labels), attributions="grad_cam").attributions
    assert again is not None
    assert again.distances.equals(found.distances)
    assert pa.compare(first, first, (x, labels)).attributions is None


def test_some_images_are_drawn(pair):
    first, second, x, labels = pair
    some = [
        compression.attributions_preserved(
            first, second, (x, labels), methods=[], images=8, seed=seed
        ).distances
        for seed in (0, 0, 1)
    ]
    assert some[0].equals(some[1])
    assert len(some[2]) == 8
    assert some[2]["image"].tolist() != some[0]["image"].tolist()


def test_silent_maps_are_undefined(pair):
    _, _, x, labels = pair
    silent = pooled(0)
    with torch.no_grad():
        silent.conv.weight.zero_()
        silent.conv.bias.fill_(-1)
        silent.fc.bias.copy_(torch.tensor([9.0, 0, 0, 0]))
        first_class = pooled(0)
        first_class.fc.bias.copy_(torch.tensor([9.0, 0, 0, 0]))
    found = compression.attributions_preserved(
        first_class, silent, (x, labels), methods=["grad_cam"]
    )
    assert found.distances["weighted"].isna().all()
    summary = found.summary().set_index(["method", "figure"])
    assert summary.loc["grad_cam", "cosine"]["undefined"] == 60
    assert np.isnan(summary.loc["grad_cam", "cosine"]["mean"])


def test_relevance_without_a_rule_is_nan(caplog):
    class Gelu(Pooled):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.flatten(self.pool(functional.gelu(self.conv(x)))))

    torch.manual_seed(0)
    model, x = Gelu().eval(), pictures()
    with pytest.raises(ValueError, match="lrp has no rule"):
        compression.attribution_maps(model, x, torch.zeros(12, dtype=torch.long), "lrp")
    with caplog.at_level(logging.WARNING, logger="pyablate"):
        found = compression.attributions_preserved(
            model,
            model,
            (x, torch.zeros(12, dtype=torch.long)),
            methods=["lrp"],
            layers=("conv", "conv"),
        )
    assert found.maps["cosine"].isna().all()
    assert "lrp" in caplog.text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"methods": ["grad-cam"]}, ValueError, "nearest: grad_cam"),
        ({"masks": np.ones((3, 10, 10))}, ValueError, r"masks: expected \[60, 10, 10\]"),
        ({"quantile": 1.0}, ValueError, "quantile"),
        ({"images": 0}, ValueError, "images"),
        ({"layers": ("relu",)}, ValueError, "layers: expected two"),
        ({"layers": ("relu", "relo")}, ValueError, "relu"),
        ({"smaller": 3}, TypeError, "smaller"),
    ],
)
def test_bad_input(pair, options, error, message):
    first, second, x, labels = pair
    given = {"smaller": second, "methods": ["grad_cam"]} | options
    with pytest.raises(error, match=message):
        compression.attributions_preserved(first, given.pop("smaller"), (x, labels), **given)


def test_bad_maps_and_masks(pair):
    first, second, x, labels = pair
    with pytest.raises(ValueError, match="masks: they need"):
        pa.compare(first, second, (x, labels), masks=torch.ones(60, 10, 10))
    other = pooled(0)
    with torch.no_grad():
        other.fc.weight.neg_()
        other.fc.bias.neg_()
    with pytest.raises(ValueError, match="agree on no image"):
        compression.attributions_preserved(first, other, (x, labels), methods=[])
    with pytest.raises(ValueError, match="target"):
        compression.attribution_maps(first, x, labels[:3])
    with pytest.raises(TypeError, match="images"):
        compression.attribution_maps(first, x[0], labels)
    with pytest.raises(ValueError, match="steps"):
        compression.attribution_maps(first, x, labels, steps=0)
