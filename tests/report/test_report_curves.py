"""Curves and minimal sets in a report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.report_pages import AWKWARD

from pyablate.report.curves import curve_charts, sets_by_class


def test_curves_of_every_kind(tmp_path):
    prune = pd.DataFrame(
        {
            "ranking": ["l1", "l1", "random (layer)", "random (layer)"],
            "seed": [-1, -1, 0, 0],
            "fraction": [0.5, 0.0, 0.0, 0.5],
            "accuracy": [0.4, 0.9, 0.9, np.nan],
            "worst_class": ["a", "b", "c", "d"],
            "flops": [5, 10, 10, 5],
        }
    )
    prune.to_csv(tmp_path / "prune.csv", index=False)
    order = pd.DataFrame(
        {
            "order": ["class"] * 4,
            "repeat": 0,
            "target": ["cat", "cat", "dog", "dog"],
            "removed": [0, 8] * 2,
            "kept": [8, 0] * 2,
            "accuracy": [0.9, 0.1] * 2,
        }
    )
    layer = pd.DataFrame({"layer": ["a", "b"], "fraction": 0.1, "accuracy": [0.8, 0.7]})
    charts = curve_charts([tmp_path / "prune.csv", order, layer])
    assert [chart["title"] for chart in charts] == ["prune.csv", "Curves 2", "Curves 3"]
    accuracy, flops = charts[0]["measures"]
    assert accuracy == {"name": "accuracy", "label": "accuracy (%)", "scale": 100, "chance": None}
    assert (flops["label"], flops["scale"]) == ("FLOPs of one image", 1)
    guessed = curve_charts(prune.assign(chance=0.1))[0]["measures"]
    assert [each["chance"] for each in guessed] == [0.1, None]
    l1, random = charts[0]["series"]
    assert (l1["x"], l1["values"]["accuracy"]) == ([0.0, 0.5], [0.9, 0.4])
    assert random["random"]
    assert random["values"]["accuracy"] == [0.9, None]
    assert [series["name"] for series in charts[1]["series"]] == ["class: cat", "class: dog"]
    assert [series["name"] for series in charts[2]["series"]] == ["a", "b"]
    assert curve_charts({"mine": layer})[0]["title"] == "mine"
    json.dumps(charts, allow_nan=False)


@pytest.mark.parametrize(
    ("files", "titles"),
    [
        (["a/c.csv", "b/c.csv"], ["a/c.csv", "b/c.csv"]),
        (["a/c.csv", "b/d.csv"], ["c.csv", "d.csv"]),
        (["x/a/c.csv", "y/a/c.csv", "d.csv"], ["x/a/c.csv", "y/a/c.csv", "d.csv"]),
        (["a/c.csv", "a/c.csv"], ["c.csv (1)", "c.csv (2)"]),
    ],
)
def test_titles_tell_files_apart(files, titles, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in files:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("layer,fraction,accuracy\na,0,0.9\n")
    assert [chart["title"] for chart in curve_charts(files)] == titles


def test_minimal_sets_from_a_table_and_back_from_csv(result, tmp_path):
    table = pd.DataFrame(
        {
            "class": [AWKWARD[1], AWKWARD[0]],
            "reached": [True, False],
            "units": [("block0.relu:0", "block1.relu:3"), ("block0.relu:1",)],
            "accuracy": [0.1, np.nan],
        }
    )
    sets = sets_by_class(table, result)
    table.to_csv(tmp_path / "sets.csv", index=False)
    assert sets_by_class(tmp_path / "sets.csv", result) == sets
    assert sets[1] is not None
    assert sets[1]["units"] == ["block0.relu:0", "block1.relu:3"]
    assert (sets[1]["reached"], sets[1]["accuracy"]) == (True, 0.1)
    assert sets[0] is not None
    assert (sets[0]["reached"], sets[0]["accuracy"]) == (False, None)
    assert sets[2:] == [None, None, None]
    plain = table.assign(units=["block0.relu:0; block1.relu:3", "block0.relu:1"])
    assert sets_by_class(plain, result) == sets
    table.assign(units=["block0.relu:0", ""]).to_csv(tmp_path / "empty.csv", index=False)
    without = sets_by_class(tmp_path / "empty.csv", result)[0]
    assert without is not None
    assert without["units"] == []


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pd.DataFrame({"class": ["x"], "units": ["a:0"]}), "'x' is no class"),
        (pd.DataFrame({"units": ["a:0"]}), "expected a column 'class'"),
        (pd.DataFrame({"class": [AWKWARD[0]], "units": ["(__import__('os'),"]}), "cannot read"),
    ],
)
def test_bad_minimal_sets(result, table, message):
    with pytest.raises(ValueError, match=message):
        sets_by_class(table, result)
