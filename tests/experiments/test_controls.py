"""Controls: planted differences are found, equal networks do not differ, figures are the units'."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support import networks
from support.simulated import simulate

import pyablate as pa
from pyablate.analysis.targets import gini

pytestmark = pytest.mark.usefixtures("exports_kept")

CLASSES, UNITS, IMAGES = 8, 30, 60


def damaged(concentrated: bool, seed: int, layers: list[str] | None = None) -> pa.AblationResult:
    """Each unit harms one class a lot, or all classes an eighth of that."""
    random = np.random.default_rng(seed)
    rates = np.full((UNITS, CLASSES), 0.05)
    if concentrated:
        rates = np.zeros((UNITS, CLASSES))
        rates[np.arange(UNITS), random.integers(0, CLASSES, UNITS)] = 0.4 * 2
    return simulate(rates * 2, 0.0, IMAGES, random, layers)


def row(table: Any, figure: str) -> Any:
    return table[table["figure"] == figure].iloc[0]


def test_concentrated_damage_is_told_from_spread_damage():
    narrow, wide = damaged(True, 1), damaged(False, 2)
    table = pa.compare_damage(narrow, wide, names=("narrow", "wide"), fewest=5)
    found = row(table, "gini")
    expected = gini(narrow.class_accuracy_drop)[narrow.lost.sum(axis=1) >= 5].mean()
    assert found["narrow"] == pytest.approx(expected)
    assert found["narrow"] > 0.8 > 0.6 > found["wide"]
    assert found["difference"] == pytest.approx(found["narrow"] - found["wide"])
    assert found["difference_low"] > 0.2
    assert found["p"] < 1e-6
    assert found["narrow_low"] <= found["narrow"] <= found["narrow_high"]
    assert row(table, "accuracy_drop")["narrow"] == pytest.approx(narrow.accuracy_drop.mean())
    assert row(table, "max_class_drop")["wide_units"] == UNITS


def test_networks_of_one_kind_seldom_differ():
    outside = 0
    for turn in range(30):
        table = pa.compare_damage(damaged(False, 2 * turn), damaged(False, 2 * turn + 1), seed=turn)
        found = row(table, "accuracy_drop")
        outside += not found["difference_low"] <= 0 <= found["difference_high"]
    assert outside <= 6, "1.5 expected at 95 %, 7 or more in 1 of 1,000"


def test_several_networks_widen_the_interval():
    """Networks that differ among themselves say less than their many units pretend."""
    alike = pa.compare_damage(damaged(True, 1), damaged(True, 2), fewest=5)
    mixed = pa.compare_damage(
        [damaged(True, 1), damaged(False, 3)], [damaged(True, 2), damaged(False, 4)], fewest=5
    )

    def width(table: Any) -> float:
        return float(row(table, "gini")["difference_high"] - row(table, "gini")["difference_low"])

    assert width(mixed) > 3 * width(alike)
    means = [
        gini(r.class_accuracy_drop)[r.lost.sum(axis=1) >= 5].mean()
        for r in (damaged(True, 1), damaged(False, 3))
    ]
    assert row(mixed, "gini")["first"] == pytest.approx(np.mean(means))


def test_units_with_few_lost_images_have_no_say_on_concentration():
    result = damaged(True, 1)
    lost = result.lost.sum(axis=1)
    table = pa.compare_damage(result, damaged(True, 2), fewest=int(np.median(lost)))
    assert row(table, "gini")["first_units"] == (lost >= np.median(lost)).sum()
    none = row(pa.compare_damage(result, result, fewest=10_000), "gini")
    assert none["first_units"] == 0
    assert np.isnan([none["first"], none["difference"], none["difference_low"], none["p"]]).all()


def test_layers_are_matched_by_name_or_as_told():
    first = damaged(True, 1, ["a"] * 10 + ["b"] * 20)
    second = damaged(False, 2, ["b"] * 15 + ["c"] * 15)
    assert pa.compare_damage(first, second)["layer"].unique().tolist() == ["b"]
    told = pa.compare_damage(first, second, layers={"a": "c"})
    assert row(told, "accuracy_drop")[["layer", "layer_second", "first_units"]].tolist() == [
        "a",
        "c",
        10,
    ]
    with pytest.raises(ValueError, match="layers: no layer 'd' there; nearest"):
        pa.compare_damage(first, second, layers={"a": "d"})
    with pytest.raises(ValueError, match="no layer of the same name"):
        pa.compare_damage(first, damaged(True, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ("a", "a")}, "two different names"),
        ({"fewest": 0}, "fewest: expected"),
        ({"resamples": 0}, "resamples: expected"),
        ({"confidence": 1.0}, "confidence: expected"),
        ({"seed": -1}, "seed: expected"),
    ],
)
def test_bad_options(options, message):
    result = damaged(True, 1)
    with pytest.raises(ValueError, match=message):
        pa.compare_damage(result, result, **options)


def test_what_is_no_result():
    result = damaged(True, 1)
    with pytest.raises(TypeError, match="second: expected an AblationResult, got int"):
        pa.compare_damage(result, [3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="first: expected at least one"):
        pa.compare_damage([], result)


def test_special_axes_are_told_from_random_ones():
    torch.manual_seed(0)
    labels = torch.arange(160) % 8
    images = torch.nn.functional.one_hot(labels, 8) * 0.35 + 0.3 * torch.rand(160, 8)
    # Unit k speaks for class k, so axes of units are as special as can be.
    model = networks.on_inputs(torch.eye(8), torch.zeros(8))
    found = pa.rotation_control(model, (images, labels), "units", fewest=5, audit=50)
    concentrated = row(found.table, "gini")
    assert concentrated["units"] > 0.85, "at most 1 - 1/8"
    assert concentrated["difference_low"] > 0
    assert len(found.rotated.units) == 3 * len(found.units.units) == 24
    assert found.units.audit.mismatches == found.rotated.audit.mismatches == 0


def test_units_are_directions_along_their_axes():
    """What the control compares differs in the axes alone."""
    model, images, labels = networks.network("residual", 30)
    axes = pa.Intervention("direction", directions=torch.eye(8).double())
    along = pa.ablate(model, (images, labels), "body.2", intervention=axes, audit=0, progress=False)
    units = pa.ablate(model, (images, labels), "body.2", audit=0, progress=False)
    np.testing.assert_array_equal(along.predictions(), units.predictions())


def test_bad_rotations():
    model, images, labels = networks.network("residual", 4)
    with pytest.raises(ValueError, match="rotations: expected at least 1"):
        pa.rotation_control(model, (images, labels), "body.2", rotations=0)
