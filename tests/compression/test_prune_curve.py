"""Curves and sensitivities: each point against a plain masked loop."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support import networks
from support.compressible import Shifted, images, made, silenced
from support.screened import careless_thresholds, layers_case
from torch import nn
from torch.nn import functional

import pyablate as pa
from pyablate.compression._remove import size

pytest.importorskip("torch_pruning")
pytestmark = pytest.mark.usefixtures("exports_kept")


@pytest.fixture(scope="module")
def shipped() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    return networks.demo("resnet", 120)


def slow(model: nn.Module, pictures: torch.Tensor, labels: torch.Tensor, units: Any) -> dict:
    """The figures of a curve, from the masked network in float64."""
    double = pa.demo.network("resnet").double()
    double.load_state_dict(model.state_dict())
    logits = silenced(double, pictures.double(), units)
    right = logits.argmax(1) == labels
    by_class = [float(right[labels == k].double().mean()) for k in range(10)]
    return {
        "accuracy": float(right.double().mean()),
        "worst_class_accuracy": min(by_class),
        "worst_class": pa.demo.CLASSES[int(np.argmin(by_class))],
        "mean_class_accuracy": sum(by_class) / 10,
        "loss": float(functional.cross_entropy(logits, labels)),
    }


def test_every_point_is_that_of_the_masked_network(shipped):
    model, pictures, labels = shipped
    rankings = [
        pa.rank(model, pictures[:1], "random", seed=5, name="chance"),
        pa.compression.filter_ranking(model, pictures[:1], "l1"),
    ]
    shares = [0.05, 0.5]
    curves = pa.prune_curve(
        model,
        (pictures, labels),
        rankings,
        fractions=shares,
        seeds=1,
        class_names=pa.demo.CLASSES,
    )
    assert len(curves) == 3 * (2 + 2)
    by_name = {ranking.name: ranking for ranking in rankings}
    first = {ranking.scope: ranking for ranking in reversed(rankings)}
    assert set(curves["ranking"]) == {"chance", "l1", "random (global)", "random (layer)"}
    for row in curves.to_dict("records"):
        ranking = by_name.get(row["ranking"])
        if ranking is None:
            scope = row["ranking"].removeprefix("random (").removesuffix(")")
            ranking = first[scope].shuffled(row["seed"])
        units = ranking.units(row["fraction"])
        assert row["units"] == len(units)
        expected = slow(model, pictures, labels, units)
        assert row["worst_class"] == expected.pop("worst_class")
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4)
        removal = pa.remove(model, units, pictures[:1])
        assert row["parameters"] == removal.after.parameters
        assert row["flops"] == removal.after.flops
    assert curves.groupby("ranking")["accuracy"].nunique().min() > 1


def test_units_are_held_at_zero_where_removal_is_something_else():
    model = made(Shifted)
    data = images(40), torch.arange(40) % 5
    ranking = pa.rank(model, data[0], "random")
    curve = pa.prune_curve(model, data, ranking, fractions=[0.5], seeds=0)
    logits = silenced(model, data[0], ranking.units(0.5))
    assert curve["loss"][1] == pytest.approx(float(functional.cross_entropy(logits, data[1])))
    assert curve["flops"][1] < curve["flops"][0]


def test_what_float32_cannot_tell_is_decided_in_float64():
    class Cancelling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
            self.fc = nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner = self.fc(self.relu(self.norm(self.conv(x))).mean((2, 3)))
            return (inner + 1e7) - 1e7  # float32 keeps whole numbers

    model = made(Cancelling)
    pictures = images(60)
    ranking = pa.rank(model, pictures, "random")
    double = made(Cancelling).double()
    double.load_state_dict(model.state_dict())
    gone = ranking.units(0.5)
    right = silenced(double, pictures.double(), gone).argmax(1)
    assert (silenced(model, pictures, gone).argmax(1) != right).sum() > 5
    curve = pa.prune_curve(model, (pictures, right), ranking, fractions=[0.5], seeds=0)
    assert curve["accuracy"][1] == 1.0


def test_plot(shipped):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    model, pictures, labels = shipped
    ranking = pa.rank(model, pictures[:1], "random", name="ours")
    data = pictures[:20], labels[:20]
    curves = pa.prune_curve(model, data, ranking, fractions=[0.3], seeds=2)
    axes = pa.plots.prune_curves(curves, x="flops")
    assert [line.get_label() for line in axes.lines] == [
        *("ours", "random (mean, range)", "chance"),
    ]
    pyplot.close("all")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"fractions": [1.5]}, ValueError, "fractions"),
        ({"rankings": []}, ValueError, "at least one"),
        ({"rankings": "random"}, TypeError, "rankings"),
        ({"class_names": ["a"]}, ValueError, "class_names: expected 10"),
        ({"model": 3}, TypeError, "model"),
        ({"guarantee": "screened"}, ValueError, "guarantee: expected 'exact', since each point"),
    ],
)
def test_bad_input(shipped, change, error, message):
    model, pictures, labels = shipped
    given: dict[str, Any] = {"model": model, "data": (pictures[:8], labels[:8]), "seeds": 0}
    given |= {"rankings": pa.rank(model, pictures[:1], "random"), "fractions": [0.1]} | change
    with pytest.raises(error, match=message):
        pa.prune_curve(given.pop("model"), given.pop("data"), given.pop("rankings"), **given)


def test_ranking_of_another_network_is_refused(shipped):
    model, pictures, labels = shipped
    ranking = pa.rank(pa.demo.network("vgg_bn"), pictures[:1], "random")
    with pytest.raises(ValueError, match="no layer that holds units"):
        pa.prune_curve(model, (pictures[:8], labels[:8]), ranking, fractions=[0.1], seeds=0)


@pytest.fixture(scope="module")
def late(shipped: Any) -> pa.Ranking:
    model, pictures, _ = shipped
    return pa.compression.filter_ranking(model, pictures[:1], "l1")


def test_sensitivity_is_that_of_the_masked_network(shipped, late):
    model, pictures, labels = shipped
    data = pictures, labels
    table = pa.sensitivity(
        model, data, late, fractions=[0.3], class_names=pa.demo.CLASSES, audit=20
    )
    layers = list(dict.fromkeys("+".join(one.layers) for one in late.order))
    assert set(table["layer"]) == set(layers)
    assert len(table) == len(layers)
    before = slow(model, pictures, labels, [])["accuracy"]
    for row in table[::3].to_dict("records"):
        units = late.within(tuple(row["layer"].split("+"))).units(row["fraction"])
        expected = slow(model, pictures, labels, units)
        assert row["units"] == len(units)
        assert row["accuracy"] == pytest.approx(expected["accuracy"])
        assert row["accuracy_drop"] == pytest.approx(before - expected["accuracy"])
        assert row["worst_class_accuracy"] == pytest.approx(expected["worst_class_accuracy"])


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_sensitivity_stops_early_and_resumes(shipped, suffix, tmp_path, monkeypatch):
    module = sys.modules["pyablate.compression._sensitivity"]
    model, pictures, labels = shipped
    data = pictures, labels
    two = pa.rank(
        model, pictures[:1], "random", layers=["stage1.0.relu1", "stage3.1.relu1"], scope="layer"
    )
    path = tmp_path / f"table{suffix}"
    whole = pa.sensitivity(model, data, two, fractions=[0.2, 0.5, 0.8], stop=0.1, audit=0)
    steep = whole[whole["layer"] == "stage1.0.relu1"]
    assert len(steep) < 3
    assert (steep["accuracy_drop"][:-1] <= 0.1).all()
    assert steep["accuracy_drop"].iloc[-1] > 0.1
    calls = []

    def counted(*given: Any, **options: Any) -> pa.AblationResult:
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(len(options["groups"]))
        return pa.ablate(*given, **options)

    monkeypatch.setattr(module, "ablate", counted)
    options: dict[str, Any] = {"fractions": [0.2, 0.5, 0.8], "stop": 0.1, "audit": 0, "path": path}
    with pytest.raises(KeyboardInterrupt):
        pa.sensitivity(model, data, two, **options)
    monkeypatch.setattr(module, "ablate", pa.ablate)
    resumed = pa.sensitivity(model, data, two, **options)
    pd.testing.assert_frame_equal(resumed, whole)
    monkeypatch.setattr(module, "ablate", counted)  # nothing is left to do
    pd.testing.assert_frame_equal(pa.sensitivity(model, data, two, **options), whole)
    if suffix == ".json":
        assert len(json.loads(path.read_text())) == len(whole)
    with pytest.raises(ValueError, match="another model, data, ranking or guarantee"):
        pa.sensitivity(model, (pictures[:50], labels[:50]), two, **options)


def test_a_screened_sensitivity_has_the_certificate_of_each_row(monkeypatch, tmp_path):
    careless_thresholds(monkeypatch, 0.1)
    model, data = layers_case(400)
    norms = pa.compression.filter_ranking(model, data[0][:2], "l1")
    options: dict[str, Any] = {"fractions": [0.1], "audit": 0, "progress": False}
    exact = pa.sensitivity(model, data, norms, **options)
    path = tmp_path / "table.csv"
    table = pa.sensitivity(model, data, norms, **options, guarantee="screened", path=path)
    assert not {"guarantee", "computed", "upper_bound"} & {*exact}
    assert table["layer"].tolist() == ["act", "late"]
    assert table["guarantee"].tolist() == ["screened", "exact"]  # a closed form
    assert table["computed"].iloc[0] < 400 == table["computed"].iloc[1]
    assert 0 < table["upper_bound"].iloc[0] < 0.3
    assert table["upper_bound"].iloc[1] == 0
    off = (table["accuracy"] - exact["accuracy"]).abs()
    assert (off <= table["upper_bound"]).all()
    resumed = pa.sensitivity(model, data, norms, **options, guarantee="screened", path=path)
    pd.testing.assert_frame_equal(resumed, table)
    for other in ({"guarantee": "exact"}, {"guarantee": "screened", "risk": 0.1}):
        with pytest.raises(ValueError, match="another model, data, ranking or guarantee"):
            pa.sensitivity(model, data, norms, **options, **other, path=path)


def test_bad_sensitivity(shipped, late, tmp_path):
    model, pictures, labels = shipped
    data = pictures[:8], labels[:8]
    for options, message in (
        ({"fractions": []}, "fractions"),
        ({"fractions": [0.0]}, "fractions"),
        ({"fractions": [0.001]}, "large enough"),
        ({"stop": -1}, "stop"),
        ({"path": tmp_path / "table.txt"}, "path"),
        ({"guarantee": "screend"}, "guarantee"),
        ({"guarantee": "screened", "risk": 0}, "risk"),
    ):
        with pytest.raises(ValueError, match=message):
            pa.sensitivity(model, data, late, **options)
    with pytest.raises(TypeError, match="ranking"):
        pa.sensitivity(model, data, {"stem.2:0": 1.0})


def test_sizes_of_the_shipped_network(shipped):
    model, pictures, _ = shipped
    assert size(model, pictures[:3]) == size(model, pictures[:1])
