"""What is in a report: the numbers, the images, the page round them; bad input; the command."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from support import networks
from support.report_pages import (
    AWKWARD,
    attributes_of,
    cells_of,
    data_of,
    decoded,
    elements,
    shaded,
)
from support.shelled import invoke
from torch import nn

import pyablate as pa
from pyablate.report.numbers import MOST_MOVES
from pyablate.report.packed import packed
from pyablate.result import AblationResult
from pyablate.results.flips import Flips


@pytest.fixture(scope="module")
def page(result: AblationResult, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    result.report(path, attributes=attributes_of(result, 4), title="<b>T</b> {{ data }}")
    return path.read_text("utf-8")


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ([0, 255], "Uint8Array"),
        ([0, 256], "Uint16Array"),
        ([65535], "Uint16Array"),
        ([65536], "Uint32Array"),
        ([-1, 70000], "Int32Array"),
        ([], "Float32Array"),
        ([0.5, float("nan"), float("-inf")], "Float32Array"),
    ],
)
def test_packed_numbers_come_back(values, name):
    node = packed(values)
    assert node["type"] == name
    np.testing.assert_array_equal(decoded(node), np.array(values, dtype=np.float32))
    assert packed(values) == node


def test_numbers_of_the_result(result, page):
    data = data_of(page)
    tests = result.significance()
    np.testing.assert_array_equal(data["cells"]["lost"], result.lost)
    np.testing.assert_array_equal(data["cells"]["gained"], result.gained)
    np.testing.assert_allclose(data["cells"]["p"], tests["p"], rtol=1e-6)
    np.testing.assert_allclose(data["cells"]["q"], tests["q"], rtol=1e-6)
    assert data["units"]["label"] == result.units["label"].tolist()
    for name in ("accuracy_drop", "max_class_drop"):
        np.testing.assert_allclose(data["units"][name], getattr(result, name), rtol=1e-6)
    np.testing.assert_allclose(data["units"]["noise_floor"], result.noise_floor(), rtol=1e-6)
    np.testing.assert_array_equal(data["units"]["max_class"], result.max_class)
    assert data["classes"]["name"] == list(AWKWARD)
    assert [layer["name"] for layer in data["layers"]] == list(result.strategy)
    hurt = tests["significant"].to_numpy() & (result.lost > result.gained)
    assert 0 < data["summary"]["hurt_pairs"] == hurt.sum() < hurt.size
    assert data["summary"]["audit"]["upper_bound"] == pytest.approx(result.audit.upper_bound)


def test_changes_of_prediction_equal_a_plain_count(result, page):
    moves = data_of(page)["moves"]
    for row in range(len(result.units)):
        after = result.predictions(row)[0]
        expected: dict[tuple[int, int, int], int] = {}
        for image in np.flatnonzero(after != result.baseline):
            key = (int(result.labels[image]), int(result.baseline[image]), int(after[image]))
            expected[key] = expected.get(key, 0) + 1
        run = slice(moves["start"][row], moves["start"][row + 1])
        columns = (moves[name][run].tolist() for name in ("label", "before", "after", "count"))
        found = {(a, b, c): n for a, b, c, n in zip(*columns, strict=True)}
        assert found == expected
        assert moves["total"][row] == len(expected)


def test_the_most_frequent_changes_are_kept():
    classes, images = 20, 4000
    random = np.random.default_rng(0)
    labels = random.integers(0, classes, images)
    new = (labels + 1 + random.integers(0, classes - 1, images)) % classes
    flips = Flips.gather(1, [(np.zeros(images, int), np.arange(images), new)])
    units = pd.DataFrame({"label": ["l:0"], "layer": ["l"], "unit": [0]})
    names = tuple(map(str, range(classes)))
    from pyablate.report.numbers import _moves

    moves = decoded(_moves(AblationResult(units, labels, labels, flips, names)))
    counts = moves["count"]
    assert len(counts) == MOST_MOVES < moves["total"][0]
    assert (np.diff(counts.astype(int)) <= 0).all()
    every = np.unique(labels * classes + new, return_counts=True)[1]
    np.testing.assert_array_equal(counts, np.sort(every)[::-1][:MOST_MOVES])


def test_attributes_and_their_correlations(result, page):
    found = data_of(page)["attributes"]
    table = attributes_of(result, 4)
    for name, values in zip(found["name"], found["values"], strict=True):
        np.testing.assert_allclose(values, table[name], rtol=1e-6)
    expected = pa.correlate(
        result, table, targets="max_class_drop", methods="spearman", resamples=10
    )
    lines = found["correlations"]
    where = lines["target"] == found["targets"].index("max_class_drop")
    np.testing.assert_allclose(lines["correlation"][where], expected["correlation"], rtol=1e-6)
    names = [found["name"][i] for i in lines["attribute"][where]]
    assert names == expected["attribute"].tolist()


def test_what_attributes_say_of_each_class(result, page, tmp_path, monkeypatch, caplog):
    assert data_of(page)["attributes"]["cells"] is None  # a table of units alone
    table, drop = cells_of(result), result.class_accuracy_drop
    shuffled = table.isel(unit=np.random.default_rng(0).permutation(len(drop)))
    result.report(tmp_path / "r.html", attributes=shuffled)
    found = data_of((tmp_path / "r.html").read_text())["attributes"]["cells"]
    assert found["name"] == ["auc", "own"]
    assert found["formula"] == ["P(a > b)", ""]
    given = (table["auc_per_class"].to_numpy(), table["own"].to_numpy())
    for values, within, expected in zip(found["values"], found["within"], given, strict=True):
        np.testing.assert_allclose(values, expected, rtol=1e-6)
        for unit in range(len(drop)):
            r = np.nan
            if drop[unit].min() < drop[unit].max():
                r = stats.spearmanr(expected[unit], drop[unit]).statistic
            np.testing.assert_allclose(within[unit], r, atol=1e-6)
    # Its mean over the units of a layer is the figure that correlate gives.
    cells = pa.correlate(result, table, attributes="own", cells=True, resamples=2, shuffles=2)
    of_units = cells[cells["figure"] == "within_unit"].set_index("layer")["value"]
    for layer, value in of_units.items():
        rows = (result.units["layer"] == layer).to_numpy()
        assert np.nanmean(found["within"][1][rows]) == pytest.approx(value, abs=1e-6)
    # As many as fit.
    monkeypatch.setattr("pyablate.report.relations.MOST_CELLS", drop.size)
    result.report(tmp_path / "r.html", attributes=table)
    assert data_of((tmp_path / "r.html").read_text())["attributes"]["cells"]["name"] == ["auc"]
    assert "for the cells of own, left out" in caplog.text


def test_an_estimated_run(tmp_path):
    model, images, labels = networks.network("residual")
    options = {"guarantee": "estimated", "budget": "40%", "progress": False, "audit": 0}
    found = pa.ablate(model, (images, labels), **options)
    path = tmp_path / "report.html"
    attributes = attributes_of(found, 4)
    found.report(path, attributes=attributes, model=model, data=(images, labels))
    data = data_of(path.read_text("utf-8"))
    summary, units, cells = data["summary"], data["units"], data["cells"]
    assert summary["guarantee"] == "estimated"
    assert summary["known"] == str(found.estimate)
    assert ["Guarantee", "estimated"] in data["provenance"]
    np.testing.assert_allclose(units["half_width"], found.half_width(), rtol=1e-6)
    np.testing.assert_allclose(
        cells["half_width"], found.half_width("class_accuracy_drop"), rtol=1e-6
    )
    np.testing.assert_allclose(cells["lost"], found.lost, rtol=1e-6)
    assert np.isnan(units["noise_floor"]).all()
    assert not np.any(data["moves"]["total"])
    assert len(data["examples"]["image"]) == 0 < len(data["examples"]["activating"])
    assert data["attributes"]["targets"] == ["max_class_drop", "accuracy_drop"]
    # By Bonferroni the most hurt class of a unit is at least as likely a harmless unit's.
    hurt = np.where(found.lost > found.gained, found.significance()["p"], 1.0).min(axis=1)
    np.testing.assert_allclose(units["p"], np.minimum(1, found.classes * hurt), rtol=1e-5)


def test_a_class_without_images_and_a_unit_without_flips():
    labels = np.array([0, 0, 2, 2])
    flips = Flips.gather(2, [([0], [1], [2])])
    units = pd.DataFrame({"label": ["l:0", "l:1"], "layer": "l", "unit": [0, 1]})
    plain = AblationResult(units, labels, labels, flips, ("a", "b", "c"))
    from pyablate.report.numbers import contents

    data = decoded(contents(plain, title="t", fdr=0.05, provenance={}))
    assert np.isnan(data["cells"]["q"][:, 1]).all()
    assert np.isnan(data["classes"]["accuracy"][1])
    assert data["moves"]["start"].tolist() == [0, 1, 1]
    assert sorted(data["classes"]["position"].tolist()) == [0, 3, 3]


# --- the page -----------------------------------------------------------------------------------


def test_names_are_text_and_scripts_are_ours(page):
    assert page.isascii()
    found = elements(page)
    scripts = [attributes for tag, attributes in found.tags if tag == "script"]
    assert len(scripts) == 4
    assert not any("src" in attributes for attributes in scripts)
    assert "window.hurt" not in page.split('id="data"')[0]
    assert "<b>T</b>" not in page
    assert "&lt;b&gt;T&lt;/b&gt; {{ data }}" in page
    assert data_of(page)["title"] == "<b>T</b> {{ data }}"


def test_policy_allows_exactly_the_scripts_of_the_page(page):
    found = elements(page)
    policy = next(
        a["content"] for _, a in found.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    sums = {
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        for script in found.scripts[1:]
    }
    assert allowed == sums
    assert len(sums) == 3
    assert "default-src 'none'" in policy
    assert not re.search(r"https?:|\*|unsafe-eval", policy)


def test_nothing_is_loaded_from_elsewhere(page):
    for tag, attributes in elements(page).tags:
        for name in ("src", "href", "data", "action", "srcset", "poster"):
            value = attributes.get(name) or "#"
            assert value.startswith("#"), (tag, name, value)


def test_equal_results_give_equal_bytes(result, page, tmp_path):
    again = replace(result)
    again.report(
        tmp_path / "r.html", attributes=attributes_of(result, 4), title="<b>T</b> {{ data }}"
    )
    assert (tmp_path / "r.html").read_text() == page


def test_libraries_are_those_that_are_recorded():
    vendor = resources.files("pyablate.report") / "assets" / "vendor"
    recorded = dict(
        re.findall(r"`(\S+\.js)`.*`([0-9a-f]{64})`", (vendor / "README.md").read_text())
    )
    assert set(recorded) == {"d3.min.js", "plot.umd.min.js"}
    for name, digest in recorded.items():
        assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == digest


def test_every_script_is_on_the_page():
    from pyablate.report.page import SCRIPTS

    folder = resources.files("pyablate.report") / "assets" / "js"
    assert sorted(SCRIPTS) == sorted(entry.name for entry in folder.iterdir())


def test_a_failure_leaves_the_older_report(result, tmp_path):
    path = tmp_path / "r.html"
    path.write_text("older")
    with pytest.raises(ValueError, match="curves"):
        result.report(path, curves=pd.DataFrame({"x": [1]}))
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


# --- bad input, the command, and docs/guides/report.md -------------------------------------------


def test_data_of_another_run_are_refused(result, tmp_path):
    images, labels = shaded(result), torch.from_numpy(result.labels)
    path = tmp_path / "r.html"
    with pytest.raises(ValueError, match="labels differ"):
        result.report(path, data=(images, labels.flip(0)))
    with pytest.raises(ValueError, match="has 300 images, these are 299"):
        result.report(path, data=(images[1:], labels[:-1]))
    twice = torch.cat([images, images]), torch.cat([labels, labels])
    with pytest.raises(ValueError, match="these are more"):
        result.report(path, data=twice)
    with pytest.raises(ValueError, match=r"expected images \[N, C, H, W\]"):
        result.report(path, data=(images.flatten(1), labels))
    with pytest.raises(ValueError, match="data are needed"):
        result.report(path, model=nn.Identity())
    assert not path.exists()


def test_another_model_is_refused(result, tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(6000, 8), nn.ReLU(), nn.Linear(8, 5))
    data = shaded(result), torch.from_numpy(result.labels)
    with pytest.raises(ValueError, match=r"units of 'block0\.relu', the model does not"):
        result.report(tmp_path / "r.html", model=model, data=data)


def test_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, images, labels = pa.demo.load("resnet", limit=40)
    result = pa.ablate(model, (images, labels), ["stem.2"], class_names=pa.demo.CLASSES, audit=0)
    result.save("run.zarr")
    attributes_of(result, 2).reset_index().to_csv("attributes.csv", index=False)
    Path("curve.csv").write_text("layer,fraction,accuracy\na,0,0.9\na,1,0.1\n")
    options = "--model demo:resnet --data demo --limit 40 --attributes attributes.csv"
    code, said = invoke(*f"report run.zarr -o out/r.html --curves curve.csv {options}".split())
    assert code == 0, said
    assert "Written: out/r.html" in said
    data = data_of(Path("out/r.html").read_text())
    assert data["examples"]["activating"].shape == (16, 8)
    assert data["curves"][0]["title"] == "curve.csv"
    assert ["Model", "demo:resnet"] in data["provenance"]
    for wrong, message in [
        ("report nothing.zarr", "no such result"),
        ("report run.zarr --model demo:resnet", "--model needs --data"),
        ("report run.zarr --weights w.pth", "--weights needs --model"),
        ("report run.zarr --curves nothing.csv", "no such table"),
        ("report run.zarr --data demo --limit 39", "has 40 images, these are 39"),
        ("report run.zarr --fdr 2", "fdr"),
        ("report run.zarr -o run.zarr", "is a folder"),
    ]:
        code, said = invoke(*wrong.split())
        assert code == 2, wrong
        assert message in said, wrong


def test_python_in_the_page_on_reports_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "guides" / "report.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    code = block.replace("limit=200", "limit=40")
    assert code != block
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "report.md", "exec"), {})
    data = data_of(Path("report.html").read_text())
    facts = dict(data["provenance"])
    assert facts["Model"] == "vgg_bn"
    assert facts["data.count"] == "40"  # what the run recorded about itself
    assert data["examples"]["activating"].shape == (128, 8)
    assert len(data["examples"]["pictures"]) > 8
