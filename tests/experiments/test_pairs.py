"""Pairs of units: interactions are what full forward passes say, image by image."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from support import networks

import pyablate as pa
from pyablate import reference

pytestmark = pytest.mark.usefixtures("exports_kept")

LAYER = "body.2"


@pytest.fixture(scope="module")
def found() -> pa.Pairs:
    model, images, labels = networks.network("residual", 40)
    return pa.pairs(model, (images, labels), LAYER, audit=30, progress=False)


def test_interactions_are_joint_minus_single_drops(found):
    model, images, labels = networks.network("residual", 40)
    names = [f"{LAYER}:{unit}" for unit in range(8)]
    pairs = list(itertools.combinations(names, 2))
    assert list(zip(found.data["first"].values, found.data["second"].values, strict=True)) == pairs
    truth = labels.numpy()
    slow = reference.ablate(model, (images, labels), LAYER, groups=pairs, progress=False)
    intact = slow.baseline == truth
    right = {
        row["label"]: predicted == truth
        for (_, row), predicted in zip(slow.units.iterrows(), slow.predictions(), strict=True)
    }
    moved = 0
    for place, (a, b) in enumerate(pairs):
        joint = right["+".join((a, b))]
        drops = [intact.mean() - each.mean() for each in (joint, right[a], right[b])]
        interaction = drops[0] - drops[1] - drops[2]
        assert found.data["joint_drop"][place] == pytest.approx(drops[0])
        assert found.data["interaction"][place] == pytest.approx(interaction, abs=1e-12)
        x = right[a].astype(int) + right[b] - joint - intact
        assert x.mean() == pytest.approx(interaction, abs=1e-12)
        assert found.data["more"][place] == (x > 0).sum()
        assert found.data["less"][place] == (x < 0).sum()
        changed = int((x != 0).sum())
        moved += changed
        expected = stats.binomtest(int((x > 0).sum()), changed).pvalue if changed else 1.0
        assert found.data["p"][place] == pytest.approx(expected)
        for number in range(networks.CLASSES):
            of_class = x[truth == number].mean()
            assert found.data["class_interaction"][place, number] == pytest.approx(of_class)
    assert moved > 20, "pairs that never interact prove nothing"
    np.testing.assert_allclose(
        found.data["q"], stats.false_discovery_control(found.data["p"].values)
    )
    assert found.result.audit.mismatches + found.result.audit.mended == 0


def test_single_drops_stand_beside_them(found):
    model, images, labels = networks.network("residual", 40)
    alone = pa.ablate(model, (images, labels), LAYER, audit=0, progress=False)
    np.testing.assert_array_equal(found.data["drop"], alone.accuracy_drop)
    np.testing.assert_array_equal(found.data["class_drop"], alone.class_accuracy_drop)


def test_the_matrix_is_symmetric(found):
    square = found.matrix()
    np.testing.assert_array_equal(square, square.T)
    assert np.isnan(np.diag(square)).all()
    at = {"unit": f"{LAYER}:2", "other": f"{LAYER}:5"}
    chosen = (found.data["first"] == at["unit"]) & (found.data["second"] == at["other"])
    assert square.sel(at) == found.data["interaction"].values[chosen.values][0]
    by_class = found.matrix("class_interaction")
    assert by_class.dims == ("unit", "other", "class")
    with pytest.raises(ValueError, match="name: expected one of"):
        found.matrix("drop")


def test_units_that_back_each_other_up_interact_fully():
    """Two units say the same, and either alone is enough; the third says nothing."""
    weight = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    model = networks.on_inputs(weight, torch.tensor([0.0, 0.5]))
    images = torch.ones(6, 3)
    images[4:] = -1.0
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    found = pa.pairs(model, (images, labels), "units", audit=18)
    assert found.data["drop"].values.tolist() == [0, 0, 0]
    assert found.data["interaction"].values.tolist() == pytest.approx([4 / 6, 0, 0])
    assert found.data["class_interaction"].values.tolist() == [[1, 0], [0, 0], [0, 0]]
    assert found.data["more"].values.tolist() == [4, 0, 0]


def test_only_some_units():
    model, images, labels = networks.network("residual", 12)
    few = pa.pairs(model, (images, labels), LAYER, units=[7, 2, 4], audit=0, progress=False)
    assert few.data["unit"].values.tolist() == [f"{LAYER}:{unit}" for unit in (2, 4, 7)]
    assert few.data.sizes["pair"] == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "body.*"}, "layer: expected one layer, .*selects"),
        ({"layer": "body.22"}, r"body\.2"),
        ({"units": [1]}, "at least two different units"),
        ({"units": [1, 1, 2]}, "at least two different units"),
        ({"units": [1, 99]}, "out of range"),
        ({"intervention": "direction"}, "not in groups"),
    ],
)
def test_bad_arguments(options, message):
    model, images, labels = networks.network("residual", 4)
    with pytest.raises(ValueError, match=message):
        pa.pairs(model, (images, labels), **({"layer": LAYER, "progress": False} | options))


def test_a_plan_of_pairs_counts_what_is_live():
    model, images, labels = networks.network("residual", 12)
    groups = [[f"{LAYER}:1", f"{LAYER}:2"], [f"{LAYER}:3", f"{LAYER}:4"]]
    row = pa.plan(model, (images, labels), groups=groups).table.iloc[0]
    assert row["pairs"] == 24
    assert row["strategy"] == "delta"
    assert 0 < row["live"] <= 1
