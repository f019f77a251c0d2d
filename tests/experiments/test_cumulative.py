"""Cumulative curves: every point is the ablation that it says it is, orders are as asked."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy import integrate
from support import networks

import pyablate as pa
from pyablate import reference
from pyablate.experiments.accuracies import balanced_accuracy, baseline_balanced_accuracy
from pyablate.experiments.orders import orders_of
from pyablate.experiments.split import split

pytestmark = pytest.mark.usefixtures("exports_kept")

LAYER = "body.2"
UNITS = 8
VALUES = np.array([3.0, -1.0, 2.0, 2.0, np.nan, 9.0, 0.0, 1.0])
FALLING = [5, 0, 2, 3, 7, 6, 1, 4]  # ties by unit, NaN last
RISING = [1, 6, 7, 2, 3, 0, 5, 4]


def test_numbers_of_many_units_take_no_quadratic_time():
    labels = [f"layer:{unit}" for unit in range(8000)]
    numbers = pd.Series(np.arange(8000.0), index=labels[::-1])
    begin = time.perf_counter()
    (found,) = orders_of(
        "x", numbers, labels, None, ascending=False, repeats=1, generator=np.random.default_rng(0)
    )
    assert time.perf_counter() - begin < 2.0  # 19 s where each label made a set of all
    assert found.ranks[0] == 0


def curves(order: Any, **options: Any) -> pa.Cumulative:
    model, images, labels = networks.network("residual", 40)
    quiet = {"audit": 5, "progress": False} | options
    return pa.cumulative(model, (images, labels), LAYER, order=order, **quiet)


def labels_at(found: pa.Cumulative, curve: int = 0) -> list[int]:
    return [int(label.rpartition(":")[2]) for label in found.data["removal"][curve].values]


def series(values: np.ndarray, name: str | None = None) -> pd.Series:
    table = pd.Series(values, index=[f"{LAYER}:{unit}" for unit in range(len(values))], name=name)
    return table.iloc[::-1]  # labels count, not places


def slow_balanced(predicted: np.ndarray, truth: np.ndarray, number: int) -> float:
    recall = (predicted[truth == number] == number).mean()
    return (recall + (predicted[truth != number] != number).mean()) / 2


def test_each_point_is_the_ablation_of_the_first_units():
    model, images, labels = networks.network("residual", 40)
    found = curves(series(VALUES))
    assert labels_at(found) == FALLING
    groups = [[f"{LAYER}:{unit}" for unit in FALLING[:n]] for n in range(1, UNITS + 1)]
    slow = reference.ablate(model, (images, labels), groups=groups, progress=False)
    expected = [slow.baseline_accuracy, *slow.accuracy]
    np.testing.assert_allclose(found.data["accuracy"][0], expected, rtol=0, atol=1e-12)
    assert np.ptp(expected) > 0.1, "curves that do not move prove nothing"
    assert found.data["removed"].values.tolist() == list(range(UNITS + 1))
    assert found.data["kept"].values.tolist() == list(range(UNITS, -1, -1))
    truth = labels.numpy()
    for step, predicted in enumerate([slow.baseline, *slow.predictions()]):
        for number in range(networks.CLASSES):
            cell = {"curve": 0, "step": step, "class": number}
            right = (predicted[truth == number] == number).mean()
            assert found.data["class_accuracy"][cell] == pytest.approx(right)
            balanced = slow_balanced(predicted, truth, number)
            assert found.data["balanced_accuracy"][cell] == pytest.approx(balanced)
    assert found.result.audit.mismatches + found.result.audit.mended == 0
    assert found.result.audit.pairs == 5


def test_balanced_accuracy_of_single_units():
    model, images, labels = networks.network("residual", 40)
    result = pa.ablate(model, (images, labels), LAYER, audit=0, progress=False)
    fast, truth = balanced_accuracy(result), labels.numpy()
    for row, predicted in enumerate(result.predictions()):
        for number in range(networks.CLASSES):
            assert fast[row, number] == pytest.approx(slow_balanced(predicted, truth, number))
    intact = [slow_balanced(result.baseline, truth, k) for k in range(networks.CLASSES)]
    np.testing.assert_allclose(baseline_balanced_accuracy(result), intact)


@pytest.mark.parametrize(
    "order",
    [
        VALUES,
        VALUES.tolist(),
        series(VALUES),
        xr.DataArray(
            VALUES[::-1],
            dims="unit",
            coords={"unit": [f"{LAYER}:{unit}" for unit in reversed(range(UNITS))]},
        ),
        [f"{LAYER}:{unit}" for unit in FALLING],
    ],
    ids=["array", "list", "Series", "DataArray", "labels"],
)
def test_orders_given_in_every_form(order):
    assert labels_at(curves(order, steps=1)) == FALLING


def test_ascending_and_the_columns_of_a_table():
    table = pd.DataFrame({"a": series(VALUES), "b": series(-VALUES)}).assign(layer=LAYER)
    found = curves(table, ascending=True, steps=[3])
    assert found.data["order"].values.tolist() == ["a", "b"]
    assert labels_at(found, 0) == RISING
    assert labels_at(found, 1) == FALLING
    assert found.data["removed"].values.tolist() == [0, 3, UNITS]


def test_keeping_the_first_units_removes_all_others():
    kept = curves(series(VALUES), keep=True)
    model, images, labels = networks.network("residual", 40)
    others = [f"{LAYER}:{unit}" for unit in range(UNITS) if unit not in FALLING[:3]]
    slow = reference.ablate(model, (images, labels), groups=[others], progress=False)
    at = int(np.flatnonzero(kept.data["kept"].values == 3)[0])
    assert kept.data["accuracy"][0, at] == pytest.approx(slow.accuracy[0])


def test_measured_drops_are_ranked_on_other_images():
    model, images, labels = networks.network("residual", 40)
    halves = split((images, labels), seed=3)
    both = [part.numpy() for part in (halves.choosing[0], halves.measuring[0])]
    whole = np.sort(images.flatten(1).numpy(), axis=0)
    np.testing.assert_array_equal(np.sort(np.concatenate(both).reshape(len(whole), -1), 0), whole)
    sizes = [np.bincount(part[1], minlength=networks.CLASSES) for part in (vars(halves).values())]
    assert np.abs(sizes[0] - sizes[1]).max() <= 1
    ranking = pa.ablate(model, halves.choosing, LAYER, audit=0, progress=False)
    drops = np.argsort(-ranking.accuracy_drop, kind="stable")
    found = curves("drop", seed=3)
    assert labels_at(found) == drops.tolist()
    again = pa.cumulative(
        model, halves.measuring, LAYER, order="drop", ranking=ranking, audit=0, progress=False
    )
    np.testing.assert_array_equal(found.data["accuracy"], again.data["accuracy"])
    assert found.data.attrs["images"] == len(halves.measuring[1])


def test_one_curve_for_each_class():
    model, images, labels = networks.network("residual", 40)
    ranking = pa.ablate(model, (images, labels), LAYER, audit=0, progress=False)
    found = curves("class", ranking=ranking, class_names=list("abcde"))
    assert found.data["target"].values.tolist() == list("abcde")
    for target in range(networks.CLASSES):
        order = np.argsort(-ranking.class_accuracy_drop[:, target], kind="stable")
        assert labels_at(found, target) == order.tolist()
    table = found.to_dataframe()
    own = table[(table["target"] == "c") & (table["removed"] == 2)].iloc[0]
    cell = {"curve": 2, "step": 2, "class": 2}
    assert own["target_accuracy"] == found.data["class_accuracy"][cell]
    assert own["target_balanced_accuracy"] == found.data["balanced_accuracy"][cell]
    assert own["accuracy"] == found.data["accuracy"][2, 2]


def test_random_orders_follow_the_seed_and_share_the_full_set():
    found = curves({"chance": "random", "size": VALUES}, repeats=3, seed=5)
    assert found.data["repeat"].values.tolist() == [0, 1, 2, 0]
    assert found.data["order"].values.tolist() == ["chance"] * 3 + ["size"]
    orders = {tuple(labels_at(found, curve)) for curve in range(4)}
    assert len(orders) == 4
    assert all(sorted(order) == list(range(UNITS)) for order in orders)
    same = curves({"chance": "random", "size": VALUES}, repeats=3, seed=5)
    np.testing.assert_array_equal(found.data["removal"], same.data["removal"])
    other = curves("random", repeats=3, seed=6)
    assert labels_at(found) != labels_at(other)
    assert found.data["accuracy"][:, -1].to_numpy().std() == 0
    assert len(found.result.units) <= 4 * UNITS - 3


def test_areas_are_those_of_the_trapezoid_rule():
    found = curves("random", repeats=2, steps=[1, 5])
    accuracy = found.data["accuracy"].to_numpy()
    assert found.area["area"].tolist() == pytest.approx(
        [integrate.trapezoid(line, [0, 1 / 8, 5 / 8, 1]) for line in accuracy]
    )
    assert found.area["target_area"].isna().all()
    assert len(found.to_dataframe()) == 2 * 4


def test_units_of_several_layers_make_one_order():
    model, images, labels = networks.network("residual", 16)
    layers = ["body.2", "body.4"]
    found = pa.cumulative(
        model,
        (images, labels),
        layers,
        order="random",
        repeats=1,
        steps=4,
        audit=20,
        progress=False,
    )
    assert found.data.sizes["rank"] == 8 + 12
    assert found.result.audit.mismatches + found.result.audit.mended == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "dropp"}, r"order: .*got 'dropp'; nearest: drop"),
        ({"order": {}}, "at least one order"),
        ({"order": VALUES[:3]}, r"order 'given': expected 8 numbers"),
        ({"order": series(VALUES[:7])}, r"'body.2:7' is missing"),
        ({"order": pd.concat([series(VALUES)] * 2)}, "there twice"),
        ({"order": ["body.2:1"]}, "each of the 8 units once"),
        ({"order": ["body.2:99"]}, r"no unit 'body.2:99' here; nearest: body.2"),
        ({"order": [object()]}, "expected numbers"),
        ({"repeats": 0}, "repeats: expected at least 1"),
        ({"seed": -1}, "seed: expected"),
        ({"steps": 0}, "steps: expected at least 1"),
        ({"steps": [9]}, "at most 8"),
        ({"steps": [0.5]}, "whole numbers"),
        ({"intervention": "direction", "order": VALUES}, "not in groups"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        curves(**({"order": "random"} | options))


def test_bad_layer_model_and_images():
    model, images, labels = networks.network("residual", 4)
    with pytest.raises(ValueError, match=r"body\.2"):
        pa.cumulative(model, (images, labels), "body.22", order="random")
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module"):
        pa.cumulative(None, (images, labels), LAYER)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the model fails"):
        pa.cumulative(model, (images[:, :1], labels), LAYER)
    with pytest.raises(ValueError, match="at least 2 images"):
        pa.cumulative(model, (images[:1], labels[:1]), LAYER)
