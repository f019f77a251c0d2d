"""The studies of examples/ that write pages: what their verdicts follow from."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from support.simulated import simulate

import pyablate as pa
from pyablate.analysis.shrinkage import shrunken_drop

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module(request.param)


@pytest.mark.parametrize("study", ["interventions_study"], indirect=True)
def test_the_share_that_is_the_replacements_own(study):
    random = np.random.default_rng(0)
    optimal = random.uniform(1, 2, 200)
    share, low, high = study.own_share(optimal / 0.3, optimal)
    assert (share, low, high) == pytest.approx((0.7, 0.7, 0.7))
    assert study.word(low, high) == "most of it"
    noisy = optimal + random.normal(0, 3, 200)
    share, low, high = study.own_share(noisy, optimal)
    assert low < 0 < high
    assert study.word(low, high) == "none seen"
    assert study.word(0.1, 0.4) == "part of it"
    assert study.word(-0.4, -0.1).startswith("none, the constants did worse")
    assert [study.alike(r) for r in (0.95, 0.6, 0.1)] == ["the same", "a similar", "another"]


@pytest.mark.parametrize("study", ["ranking_study"], indirect=True)
def test_readings_of_the_same_counts(study):
    random = np.random.default_rng(0)
    chance = random.uniform(0, 0.1, (30, 4))
    result = simulate(chance, 0.02, 400, random, ["a"] * 18 + ["b"] * 12)
    counts = pd.DataFrame(
        {
            "layer": result.units["layer"],
            "lost": result.lost.sum(axis=1),
            "gained": result.gained.sum(axis=1),
            "loss": random.normal(size=30),
        }
    )
    noise = random.uniform(0, 0.5, 30)
    read = {name: np.asarray(score(counts, noise)) for name, score in study.READINGS.items()}
    images = len(result.labels)
    np.testing.assert_allclose(read["accuracy drop"], images * result.accuracy_drop)
    np.testing.assert_allclose(read["shrunken"], images * shrunken_drop(result), atol=1e-6)
    # The noise breaks ties and nothing else: counts are whole numbers.
    for name in ("ties at random", "changed"):
        np.testing.assert_allclose(read[name] - np.floor(read[name]), noise)
    assert (read["helpful as harmless"] >= 0).all()
    assert set(read) == set(study.WHAT)


@pytest.mark.parametrize("study", ["ranking_study"], indirect=True)
def test_differences_are_paired_by_block(study):
    lines = [
        {"reading": name, "images": 500, "part": part, "area": 0.1 * part + gain + noise}
        for part, noise in enumerate((0.0, 0.001, -0.001))
        for name, gain in (("accuracy drop", 0.0), ("loss", 0.05))
    ]
    lines[1]["area"] += 0.003  # the blocks do not agree wholly
    mean, half = study.difference(pd.DataFrame(lines), "loss", "accuracy drop", 500)
    assert mean == pytest.approx(0.051)
    assert half == pytest.approx(4.303 * 0.001, rel=1e-3)  # t of two degrees of freedom
    assert study.told(mean, half) == "better"
    assert study.told(-mean, half) == "worse"
    assert study.told(0.5 * half, half) == "not told from 0"
    assert study.told(mean, float("nan")) == "not told from 0"


@pytest.mark.parametrize("study", ["ranking_study"], indirect=True)
def test_parts_are_disjoint_and_as_many_as_asked(study):
    tables = [
        pd.DataFrame({"label": ["a"], "lost": [2**i], "gained": [1], "loss": [0.5]})
        for i in range(31)
    ]
    parts = study.parts_of(tables, 5 * study.BLOCK)
    assert [int(part["lost"].iloc[0]) for part in parts] == [31 << 5 * i for i in range(6)]
    assert [int(part["gained"].iloc[0]) for part in parts] == [5] * 6
    assert len(study.parts_of(tables, study.BLOCK)) == study.PARTS
    assert tables[0]["lost"].iloc[0] == 1


@pytest.mark.slow
@pytest.mark.parametrize("study", ["compression_study"], indirect=True)
def test_curves_of_the_page_are_what_is_measured_now(study, tmp_path):
    """Rankings that depend on no images: the page has one figure of each, rounded to a tenth."""
    pytest.importorskip("torch_pruning")
    settings = study.Settings()
    made = study.Study(tmp_path / "study", settings)
    names = ("l1", "bn_scale")
    table = pa.prune_curve(
        pa.demo.network("vgg_bn"),
        made.measuring,
        {name: study.ranking_of(made, "vgg_bn", name, 0) for name in names},
        fractions=settings.fractions,
        seeds=0,
        progress=False,
    )
    page = (EXAMPLES.parent / "docs" / "results" / "compression.md").read_text().splitlines()
    for name in names:
        row = next(line for line in page if line.startswith(f"| vgg_bn | {name} |"))
        curve = table[(table["ranking"] == name) & (table["fraction"] > 0)]
        assert 100 * curve["accuracy"].mean() == pytest.approx(float(row.split("|")[3]), abs=0.051)
