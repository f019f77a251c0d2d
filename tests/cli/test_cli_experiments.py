"""The shell's experiments print and write what the library finds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.screened import screen_anyway
from support.shelled import invoke

import pyablate as pa

pytestmark = pytest.mark.usefixtures("empty_folder")

DATA = ["--data", "demo", "--limit", "40"]
LAYER = "features.11"


def loaded() -> tuple[object, tuple[object, object]]:
    model, images, labels = pa.demo.load("alexnet", limit=40)
    return model, (images, labels)


def test_cumulative() -> None:
    model, data = loaded()
    site = next(s for s in pa.sites(model, data[0][:2]) if s.name == LAYER)
    own = pd.Series(
        np.arange(float(site.channels)) % 7, [site.label(u) for u in range(site.channels)]
    )
    own.rename_axis("unit").rename("own").to_csv("own.csv")
    code, out = invoke(
        "cumulative", "demo:alexnet", *DATA, "--layers", LAYER, "--order", "own.csv",
        "--order", "random", "--column", "own", "--repeats", "2", "--steps", "4",
        "--ascending", "-o", "curves.csv",
    )  # fmt: skip
    assert code == 0, out
    expected = pa.cumulative(
        model,
        data,
        LAYER,
        order={"own": own, "random": "random"},
        repeats=2,
        steps=4,
        ascending=True,
        progress=False,
    )
    found = pd.read_csv("curves.csv", keep_default_na=False, na_values=[""])
    np.testing.assert_allclose(found["accuracy"], expected.to_dataframe()["accuracy"])
    area = expected.area.groupby("order")["area"].mean()
    assert f"{area['own']:.4f}" in out
    assert f"{area['random']:.4f}" in out
    assert "mean of 2" in out


def test_pairs() -> None:
    model, data = loaded()
    code, out = invoke(
        "pairs", "demo:alexnet", *DATA, "--layer", LAYER, "--units", "0,3,5,9", "-o", "p.json"
    )
    assert code == 0, out
    expected = pa.pairs(
        model, data, LAYER, units=[0, 3, 5, 9], class_names=pa.demo.CLASSES, progress=False
    )
    found = pd.DataFrame(json.loads(Path("p.json").read_text()))
    assert len(found) == 6
    assert found["second"].tolist() == expected.data["second"].to_numpy().tolist()
    for name in ("joint_drop", "interaction", "more", "less", "p", "q"):
        np.testing.assert_allclose(found[name], expected.data[name])
    drops = expected.data["drop"].sel(unit=found["second"].to_numpy())
    np.testing.assert_allclose(found["second_drop"], drops)
    label = expected.data["class"].to_numpy()[2]
    np.testing.assert_allclose(
        found[f"interaction: {label}"].astype(float), expected.data["class_interaction"][:, 2]
    )


def test_a_screened_experiment_prints_its_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    screen_anyway(monkeypatch)
    command = ("pairs", "demo:alexnet", *DATA, "--layer", "features.9", "--units", "0,3,5")
    code, out = invoke(*command, "--guarantee", "screened", "--risk", "0.01")
    assert code == 0, out
    assert "Screening: 240 pairs" in out
    assert "95 % upper bound" in out


def test_minimal_sets() -> None:
    model, data = loaded()
    code, out = invoke(
        "minimal-sets", "demo:alexnet", *DATA, "--layers", LAYER, "--class", "Bag",
        "--largest", "8", "-o", "sets.csv",
    )  # fmt: skip
    assert code == 0, out
    expected = pa.minimal_sets(
        model, data, LAYER, classes=["Bag"], largest=8, class_names=pa.demo.CLASSES, progress=False
    )
    found = pd.read_csv("sets.csv")
    assert found["units"].tolist() == [" ".join(units) for units in expected.table["units"]]
    assert found["accuracy"].tolist() == expected.table["accuracy"].tolist()
    assert "Bag" in out
    code, out = invoke("minimal-sets", "demo:alexnet", *DATA, "--layers", LAYER, "--class", "Bga")
    assert code == 2
    assert "nearest: Bag" in out


def test_shapley() -> None:
    model, data = loaded()
    code, out = invoke(
        "shapley", "demo:alexnet", *DATA, "--layers", LAYER, "--class", "Bag", "--top", "2",
        "--permutations", "3", "--interval", "student", "--truncation", "0.02", "-o", "values.csv",
    )  # fmt: skip
    assert code == 0, out
    expected = pa.shapley(
        model,
        data,
        LAYER,
        target="Bag",
        top=2,
        permutations=3,
        interval="student",
        truncation=0.02,
        class_names=pa.demo.CLASSES,
        progress=False,
    ).to_dataframe()
    pd.testing.assert_frame_equal(pd.read_csv("values.csv"), expected)
    shown = expected["unit"].map(lambda unit: f"{unit} " in out)
    assert shown.tolist() == (expected["value"].rank(ascending=False) <= 2).tolist()
    code, out = invoke("shapley", "demo:alexnet", *DATA, "--layers", LAYER, "--class", "Bga")
    assert code == 2
    assert "nearest: Bag" in out


def test_rotation() -> None:
    model, data = loaded()
    code, out = invoke(
        "rotation", "demo:alexnet", *DATA, "--layers", LAYER, "--rotations", "1",
        "--fewest", "1", "--output", "turned.csv",
    )  # fmt: skip
    assert code == 0, out
    expected = pa.rotation_control(model, data, LAYER, rotations=1, fewest=1, progress=False)
    pd.testing.assert_frame_equal(pd.read_csv("turned.csv"), expected.table)
    assert "split_half_drop" in out
    row = expected.table.set_index("figure").loc["max_class_drop"]
    assert f"{100 * row['units']:.2f}" in out  # in percentage points


def test_an_empty_row_of_the_rotation_is_explained() -> None:
    code, out = invoke(
        "rotation", "demo:alexnet", *DATA, "--layers", LAYER, "--rotations", "1",
        "--fewest", "100000",
    )  # fmt: skip
    assert code == 0, out
    for side in ("units", "rotated directions"):
        assert f"No gini of the {side} of {LAYER}: none of them loses 100000 images" in out
