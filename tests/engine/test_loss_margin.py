"""Changes of loss and margin: the engine against the oracle, and what it says of its accuracy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support import networks
from support.shelled import invoke
from torch import nn
from torch.nn import functional

import pyablate as pa
from pyablate import reference
from pyablate.results.measures import Accuracy

pytestmark = pytest.mark.usefixtures("exports_kept")

BOTH = ["loss", "margin"]
VARIED = ["residual", "dense", "vit", "used_twice", "routed", "pooling"]
INTERVENTIONS = ["mean", "class_mean", "constant:0.3", "resample:3", "noise:3", "direction:3"]
# Largest error of a sum over a class, as a share of its images times the largest logit.
ROUNDING = {"fp64": 1e-12, "fp32": 1e-5}


def compare(
    model: nn.Module, data: Any, layers: Any = None, precision: str = "fp32", **options: Any
) -> tuple[pa.AblationResult, pa.AblationResult]:
    """Run engine and oracle, and hold them together within rounding."""
    ours = pa.ablate(
        model, data, layers, precision=precision, measures=BOTH, progress=False, **options
    )
    options.pop("strategy", None)
    options.pop("audit", None)
    theirs = reference.ablate(model, data, layers, measures=BOTH, progress=False, **options)
    with torch.no_grad():
        scale = float(model.eval()(data[0]).abs().max())
    for name in BOTH:
        difference = np.abs(ours.measures[name].change - theirs.measures[name].change)
        assert np.abs(theirs.measures[name].change).max() > 1e-3 * scale, "nothing to compare"
        allowed = ROUNDING[precision] * scale * np.maximum(ours.class_sizes, 1)
        assert (difference <= allowed).all(), (name, difference.max())
    return ours, theirs


@pytest.mark.parametrize("name", VARIED)
def test_changes_equal_the_oracles_on_every_unit(name):
    model, images, labels = networks.network(name)
    compare(model, (images, labels), list(networks.ARCHITECTURES[name].layers))


@pytest.mark.parametrize("intervention", INTERVENTIONS)
def test_every_intervention_in_the_models_own_precision(intervention):
    model, images, labels = networks.network("residual")
    layers = list(networks.ARCHITECTURES["residual"].layers)
    compare(model, (images, labels), layers, "fp64", intervention=intervention)


@pytest.mark.parametrize("strategy", ["auto", "replay"])
def test_every_strategy_and_groups(strategy):
    model, images, labels = networks.network("residual")
    early, middle, late = networks.ARCHITECTURES["residual"].layers
    groups = [[f"{early}:0", f"{early}:3"], [f"{early}:1", f"{late}:2", f"{middle}:1"]]
    ours, _ = compare(
        model, (images, labels), [late], groups=groups, strategy=strategy, batch_size=13
    )
    assert ("replay" in ours.strategy.values()) == (strategy == "replay")


def test_the_closed_form_counts_pairs_that_it_settles_without_looking():
    model, images, labels = networks.demo("vgg_bn", 40)
    units = [f"features.16:{unit}" for unit in range(0, 128, 16)]
    ours, _ = compare(model, (images, labels), units)
    assert set(ours.strategy.values()) == {"closed form"}
    untouched = np.diff(ours.flips.start) == 0
    assert untouched.any()
    assert (ours.loss_change[untouched] != 0).any(), "the loss moves before a prediction does"


@pytest.mark.parametrize("precision", ["bf16", "int8", "fp32"])
def test_the_stated_accuracy_is_the_accuracy(precision):
    """With all pairs audited, the stated error is that of the sums."""
    model, images, labels = networks.network("residual")
    layers = list(networks.ARCHITECTURES["residual"].layers)[:2]
    try:
        ours = pa.ablate(
            model,
            (images, labels),
            layers,
            precision=precision,
            measures=BOTH,
            audit=10**6,
            progress=False,
        )
    except ValueError as error:
        pytest.skip(str(error))
    theirs = reference.ablate(model, (images, labels), layers, measures=BOTH, progress=False)
    for name in BOTH:
        accuracy = ours.measures[name].accuracy
        assert accuracy.pairs == ours.audit.pairs == len(ours.units) * len(labels)
        wrong = (ours.measures[name].change - theirs.measures[name].change).sum()
        assert accuracy.error == pytest.approx(wrong, abs=1e-9)
        assert 0 < accuracy.relative_error < (1e-5 if precision == "fp32" else 0.1)
        assert accuracy.largest_error**2 <= accuracy.squared_error
        assert str(accuracy.pairs) in str(accuracy).replace(",", "")


def test_losses_are_those_of_pytorch():
    """One unit by hand: a hook, a forward pass, torch's own cross-entropy."""
    model, images, labels = networks.network("residual")
    layer = networks.ARCHITECTURES["residual"].layers[0]
    result = pa.ablate(model, (images, labels), [f"{layer}:1"], measures=["loss"], progress=False)
    site = next(site for site in pa.sites(model, images[:2]) if site.name == layer)

    def switch_off(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        changed[:, 1] = 0
        return changed

    with torch.no_grad():
        before = functional.cross_entropy(model(images), labels, reduction="none")
        handle = model.get_submodule(site.module).register_forward_hook(switch_off)
        after = functional.cross_entropy(model(images), labels, reduction="none")
        handle.remove()
    change = (after - before).numpy()
    assert result.loss_change == pytest.approx(change.mean(), rel=0.05)
    for k in np.unique(labels):
        expected = change[labels.numpy() == k].mean()
        assert result.class_loss_change[0, k] == pytest.approx(expected, rel=0.05, abs=1e-3)


def test_flips_are_the_same_with_and_without():
    model, images, labels = networks.network("dense")
    layers = list(networks.ARCHITECTURES["dense"].layers)[1:]
    plain = pa.ablate(model, (images, labels), layers, progress=False)
    measured = pa.ablate(model, (images, labels), layers, measures=BOTH, progress=False)
    np.testing.assert_array_equal(plain.flips.image, measured.flips.image)
    np.testing.assert_array_equal(plain.flips.prediction, measured.flips.prediction)
    assert plain.measures == {}


def test_batches_do_not_matter():
    model, images, labels = networks.network("residual")
    one, many = (
        pa.ablate(
            model,
            (images, labels),
            list(networks.ARCHITECTURES["residual"].layers)[1:],
            measures=BOTH,
            batch_size=size,
            precision="fp64",
            progress=False,
        )
        for size in (len(images), 7)
    )
    for name in BOTH:
        np.testing.assert_allclose(
            one.measures[name].change, many.measures[name].change, rtol=0, atol=1e-10
        )


def test_a_result_carries_them_everywhere(tmp_path):
    model, images, labels = networks.network("residual")
    result = pa.ablate(model, (images, labels), measures=BOTH, progress=False)
    result.save(tmp_path / "run.zarr")
    loaded = pa.load(tmp_path / "run.zarr")
    for name in BOTH:
        np.testing.assert_array_equal(loaded.measures[name].change, result.measures[name].change)
        assert loaded.measures[name].accuracy == result.measures[name].accuracy
    assert result.data["class_loss_change"].dims == ("unit", "class")
    assert "float64" in result.data["loss_change"].attrs["accuracy"]
    frame = result.to_dataframe()
    np.testing.assert_array_equal(frame["margin_change"], result.margin_change)
    np.testing.assert_array_equal(
        frame[f"loss change: {result.class_names[1]}"], result.class_loss_change[:, 1]
    )
    attribute = pd.DataFrame({"index": np.arange(float(len(result.units)))}, result.units["label"])
    found = pa.correlate(result, attribute, methods=["pearson"])
    assert {"loss_change", "margin_change"} <= set(found["target"])


def test_a_class_without_images_has_no_mean():
    model, images, labels = networks.network("residual")
    kept = labels != 0
    result = pa.ablate(model, (images[kept], labels[kept]), measures=["loss"], progress=False)
    assert np.isnan(result.class_loss_change[:, 0]).all()
    assert np.isfinite(result.class_loss_change[:, 1:]).all()
    assert np.isfinite(result.loss_change).all()


def test_what_was_not_recorded_is_refused_by_name():
    model, images, labels = networks.network("residual")
    result = pa.ablate(model, (images, labels), measures=["margin"], progress=False)
    with pytest.raises(ValueError, match='ablate with measures=\\["loss"\\]'):
        _ = result.loss_change
    attribute = pd.DataFrame({"index": np.arange(float(len(result.units)))}, result.units["label"])
    with pytest.raises(ValueError, match='ablate with measures=\\["loss"\\]'):
        pa.correlate(result, attribute, targets="loss_change")


def test_accuracies_add_up():
    draw = np.random.default_rng(0)
    change, error = draw.normal(size=(2, 50))
    parts = Accuracy.of(change[:20], error[:20]) + Accuracy.of(change[20:], error[20:])
    whole = Accuracy.of(change, error)
    assert parts.relative_error == pytest.approx(whole.relative_error)
    assert parts.largest_error == whole.largest_error
    assert whole.relative_error == pytest.approx(np.linalg.norm(error) / np.linalg.norm(change))
    assert np.isnan(Accuracy.of(np.zeros(3), np.zeros(3)).relative_error)
    assert str(Accuracy()) == "not audited"


def test_the_shell_records_and_states_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = ["run", "demo:alexnet", "--data", "demo", "--limit", "20", "--layers", "features.11"]
    code, said = invoke(*run, "--measures", "loss")
    assert code == 0, said
    loaded = pa.load("run.zarr")
    assert loaded.measures.keys() == {"loss"}
    assert f"Loss changes: {loaded.measures['loss'].accuracy}" in " ".join(said.split())
    code, said = invoke(*run, "--measures", "los")
    assert code != 0
    assert "nearest: loss" in said
