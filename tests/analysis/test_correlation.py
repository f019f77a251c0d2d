"""Correlations of attributes with importance: scipy on explicit resamples, planted relations."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support.simulated import simulate

import pyablate as pa
from pyablate.analysis import bootstrap, targets
from pyablate.analysis.unit_table import read_table

_SCIPY: dict[str, Any] = {
    "pearson": stats.pearsonr,
    "spearman": stats.spearmanr,
    "kendall": stats.kendalltau,
}
_FEW = {"resamples": 50, "shuffles": 20, "splits": 1}


@pytest.fixture(scope="module")
def result() -> pa.AblationResult:
    """Two layers of 30 units with planted damage of different size, and a layer of one unit."""
    random = np.random.default_rng(0)
    loss = random.random((61, 6)) ** 6 * 0.8
    layers = ["early"] * 30 + ["late"] * 30 + ["single"]
    return simulate(loss, 0.02, 60, random, layers)


@pytest.fixture
def table(result: pa.AblationResult) -> pd.DataFrame:
    random = np.random.default_rng(1)
    units = len(result.units)
    noise = random.random((units, 2))
    columns = {
        "good": result.accuracy_drop + 0.02 * noise[:, 0],
        "noise": noise[:, 1],
        "constant": np.full(units, 0.1),
        "gaps": np.where(np.arange(units) % 5 == 0, np.nan, noise[:, 0]),
        "class_selectivity_class": result.max_class,
    }
    # In another order, and with a unit that the result lacks.
    frame = pd.DataFrame(columns, index=pd.Index(result.units["label"], name="unit"))
    frame.loc["late:99"] = 7.0
    return frame.sample(frac=1, random_state=0).astype({"class_selectivity_class": np.int64})


def rows_of(found: pd.DataFrame, **values: str) -> pd.DataFrame:
    for name, value in values.items():
        found = found[found[name] == value]
    return found


def test_correlation_and_p_are_those_of_scipy(result, table):
    found = pa.correlate(result, table, **_FEW)
    assert len(found) == 3 * 5 * 4 * 3
    assert not found.duplicated(["layer", "target", "attribute", "method"]).any()
    wanted = targets.unit_targets(result, preferred=result.max_class, splits=1)
    assert set(wanted) == set(found["target"])
    ordered = table.loc[result.units["label"]]
    for line in found.itertuples():
        rows = (result.units["layer"] == line.layer).to_numpy()
        x, y = ordered[line.attribute].to_numpy()[rows], wanted[str(line.target)][rows]
        both = ~np.isnan(x) & ~np.isnan(y)
        assert (line.units, line.missing) == (both.sum(), (~both).sum())
        if line.attribute == "constant" or line.layer == "single":
            assert np.isnan([line.correlation, line.low, line.high, line.p, line.q]).all()
            continue
        expected = _SCIPY[str(line.method)](x[both], y[both])
        np.testing.assert_allclose(
            [line.correlation, line.p], [expected.statistic, expected.pvalue], rtol=1e-9, atol=1e-12
        )


def test_q_is_adjusted_over_the_attributes(result, table):
    found = pa.correlate(result, table, layers="early", **_FEW)
    for _, family in found.groupby(["target", "method"]):
        tested = family[family["attribute"] != "constant"]
        assert len(tested) == 3
        expected = stats.false_discovery_control(tested["p"].to_numpy())
        np.testing.assert_allclose(tested["q"], expected, rtol=1e-12)


def test_what_was_planted_is_found_and_noise_is_not(result, table):
    found = pa.correlate(result, table, targets=["accuracy_drop", "split_half_drop"], seed=3)
    good = rows_of(found, attribute="good", target="accuracy_drop")
    good = good[good["layer"] != "single"]
    assert (good["low"] > good["shuffled"]).all()
    assert (good["q"] < 1e-6).all()
    assert (good["low"] < good["correlation"]).all()
    assert (good["correlation"] < good["high"]).all()
    noise = rows_of(found, attribute="noise").dropna()
    assert ((noise["low"] < 0) & (noise["high"] > 0)).sum() >= 10  # of 12
    # Below 30 units, about 2 / sqrt(30).
    for name in ("shuffled", "random_order"):
        assert noise[name].between(0.15, 0.5).all()


def test_bootstrap_interval_covers_the_truth():
    """Bivariate normal samples with correlation 0.6: the 90 % interval holds it about as often."""
    random = np.random.default_rng(2)
    inside = []
    for _ in range(200):
        x, noise = random.standard_normal((2, 60))
        y = 0.6 * x + 0.8 * noise
        weights = bootstrap.resample(60, 300, random)
        some = bootstrap.coefficients(
            bootstrap.Variable(x, weights), bootstrap.Variable(y, weights), "pearson"
        )
        low, high = np.quantile(some, [0.05, 0.95])
        inside.append(low < 0.6 < high)
    assert 0.8 < np.mean(inside) < 0.97


@given(st.integers(0, 2**20), st.integers(3, 12), st.sampled_from([2, 5, 1000]))
@settings(deadline=None, max_examples=40)
def test_resamples_are_those_of_scipy_on_the_drawn_units(seed, units, kinds):
    random = np.random.default_rng(seed)
    x = random.integers(0, kinds, units) / 7 + 1e3
    y = random.integers(0, kinds, units) - x
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return
    weights = bootstrap.resample(units, 10, random)
    assert (weights.sum(axis=1) == units).all()
    variables = bootstrap.Variable(x, weights), bootstrap.Variable(y, weights)
    for method, function in _SCIPY.items():
        found = bootstrap.coefficients(*variables, method)
        for drawn, value in zip(weights.astype(int), found, strict=True):
            a, b = np.repeat(x, drawn), np.repeat(y, drawn)
            if np.ptp(a) == 0 or np.ptp(b) == 0:
                assert np.isnan(value)
            else:
                assert value == pytest.approx(function(a, b).statistic, abs=1e-7)


@pytest.mark.parametrize("method", bootstrap.METHODS)
def test_shuffles_are_those_of_scipy(method):
    random = np.random.default_rng(3)
    x, y = random.integers(0, 6, 15).astype(float), random.standard_normal(15)
    orders = random.permuted(np.tile(np.arange(15), (8, 1)), axis=1)
    expected = [_SCIPY[method](x[order], y).statistic for order in orders]
    np.testing.assert_allclose(bootstrap.shuffled(x, y, method, orders), expected, atol=1e-12)


def test_baseline_is_the_known_null_distribution():
    """Of many shuffles: Pearson's r has standard deviation 1 / sqrt(n - 1), tau its own."""
    random = np.random.default_rng(4)
    x, y = random.standard_normal((2, 40))
    orders = random.permuted(np.tile(np.arange(40), (2000, 1)), axis=1)
    spread = {m: bootstrap.shuffled(x, y, m, orders).std() for m in bootstrap.METHODS}
    assert spread["pearson"] == pytest.approx(1 / np.sqrt(39), rel=0.06)
    assert spread["spearman"] == pytest.approx(1 / np.sqrt(39), rel=0.06)
    assert spread["kendall"] == pytest.approx(np.sqrt(2 * 85 / (9 * 40 * 39)), rel=0.06)


def test_a_dataset_serves_as_well_as_a_frame(result, table):
    dataset = table.to_xarray()
    dataset["per_class"] = (("unit", "class"), np.zeros((len(table), 6)))
    pd.testing.assert_frame_equal(
        pa.correlate(result, dataset, **_FEW), pa.correlate(result, table, **_FEW)
    )


def test_same_seed_same_table(result, table):
    one, again, other = (pa.correlate(result, table, seed=seed, **_FEW) for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(one, again)
    assert not one["low"].equals(other["low"])


def test_selections(result, table):
    found = pa.correlate(
        result,
        table,
        attributes=["noise", "class_selectivity_class"],  # whole numbers only by name
        targets={"mine": np.arange(61.0)},
        methods="kendall",
        layers="*a*",
        **_FEW,
    )
    assert set(found["attribute"]) == {"noise", "class_selectivity_class"}
    assert set(found["target"]) == {"mine"}
    assert set(found["method"]) == {"kendall"}
    assert list(dict.fromkeys(found["layer"])) == ["early", "late"]
    without = table.drop(columns="class_selectivity_class")
    assert "preferred_class_drop" not in set(pa.correlate(result, without, **_FEW)["target"])
    raw = pa.correlate(result, table, targets="max_class_drop", **_FEW)
    assert set(raw["target"]) == {"max_class_drop"}


def test_preferred_class_by_number_or_by_name(result, table):
    named = table.copy()
    numbers = table["class_selectivity_class"]
    named["favourite"] = [f"class {k}" if k < 6 else None for k in numbers]
    options = {"targets": "preferred_class_drop", **_FEW}
    pd.testing.assert_frame_equal(
        pa.correlate(result, named, preferred="favourite", **options),
        pa.correlate(result, table, **options),
    )


def test_preferred_class_drop():
    result = simulate(np.array([[0.0, 1.0]] * 3), 0.0, 10, np.random.default_rng(0))
    found = targets.preferred_class_drop(result, np.array([1, 0, -1]))
    np.testing.assert_array_equal(found, [0.5, 0.0, np.nan])


def slow_gini(harm: np.ndarray) -> float:
    pairs = [abs(a - b) for a, b in itertools.product(harm, repeat=2)]
    return float(np.mean(pairs) / (2 * harm.mean())) if harm.sum() else np.nan


def slow_entropy(harm: np.ndarray) -> float:
    shares = [h / harm.sum() for h in harm if h > 0]
    return -sum(s * np.log(s) for s in shares) if shares else np.nan


def test_gini_and_entropy_by_their_definitions():
    drops = np.random.default_rng(5).normal(size=(20, 7))
    drops[0] = -1.0
    drops[1] = [0.3] * 7
    drops[2] = [0, 0, 0, 0.4, 0, 0, 0]
    drops = np.insert(drops, 2, np.nan, axis=1)  # a class without images
    harm = np.maximum(np.delete(drops, 2, axis=1), 0)
    np.testing.assert_allclose(targets.gini(drops), [slow_gini(h) for h in harm], atol=1e-12)
    np.testing.assert_allclose(targets.entropy(drops), [slow_entropy(h) for h in harm], atol=1e-12)
    assert targets.gini(drops)[2] == pytest.approx(6 / 7)
    assert targets.entropy(drops)[1] == pytest.approx(np.log(7))


def test_tables_come_back_from_files(result, table, tmp_path):
    table.to_csv(tmp_path / "table.csv")
    table.rename_axis("label").assign(unit=3).to_csv(tmp_path / "numbered.csv")
    expected = pa.correlate(result, table, **_FEW)
    for name in ("table.csv", "numbered.csv"):
        found = pa.correlate(result, read_table(tmp_path / name), **_FEW)
        pd.testing.assert_frame_equal(found, expected)


def with_duplicate(table: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([table, table.loc[["late:3"]]])


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda t: t.drop("early:3"), {}, r"table: 1 of 61 units .*first is 'early:3'; nearest"),
        (with_duplicate, {}, r"table: unit 'late:3' is there more than once"),
        (lambda t: t[["class_selectivity_class"]], {}, r"table: expected at least one attribute"),
        (lambda t: t.to_xarray().rename(unit="u"), {}, r"table: expected a coordinate 'unit'"),
        (None, {"attributes": "nois"}, r"attributes: no attribute 'nois'; nearest: noise"),
        (lambda t: t.assign(a="x"), {"attributes": "a"}, r"attributes: 'a' holds no numbers"),
        (None, {"targets": "acuracy_drop"}, r"targets: .*'acuracy_drop'; nearest: accuracy_drop"),
        (None, {"targets": {"a": [1.0]}}, r"targets: expected 61 numbers for 'a'.*\(1,\)"),
        (
            None,
            {"targets": "preferred_class_drop", "preferred": "no"},
            r"targets: 'preferred_class_drop' needs the preferred class",
        ),
        (lambda t: t.assign(p=8), {"preferred": "p"}, r"preferred: expected classes 0 to 5, got 8"),
        (lambda t: t.assign(p="cat"), {"preferred": "p"}, r"table: 'cat' in 'p' is no class"),
        (None, {"methods": "kendal"}, r"methods: .*got 'kendal'; nearest: kendall"),
        (None, {"methods": []}, r"methods: .*got none"),
        (None, {"layers": "erly"}, r"layers: .*'erly'; nearest: early"),
        (None, {"layers": []}, r"targets, layers: expected at least one of each, got none"),
        (None, {"resamples": 0}, r"resamples: expected at least 1, got 0"),
        (None, {"shuffles": 0}, r"shuffles: expected at least 1, got 0"),
        (None, {"confidence": 95}, r"confidence: .*between 0 and 1, got 95"),
        (None, {"splits": 0}, r"splits: expected at least 1, got 0"),
        (None, {"seed": -1}, r"seed: .*got -1"),
    ],
)
def test_bad_input(result, table, change, options, message):
    given_table = change(table) if change else table
    with pytest.raises(ValueError, match=message) as caught:
        pa.correlate(result, given_table, **{**_FEW, **options})
    assert "\n" not in str(caught.value)


def test_a_table_of_another_type(result):
    with pytest.raises(TypeError, match=r"table: expected an xarray\.Dataset or .*got dict"):
        pa.correlate(result, {"a": [1.0]})  # type: ignore[arg-type]


def test_infinite_attributes_count_as_missing(result, table):
    table.loc["early:0", "noise"] = np.inf
    found = pa.correlate(result, xr.Dataset.from_dataframe(table), layers="early", **_FEW)
    line = rows_of(found, attribute="noise", target="accuracy_drop")
    assert set(line["missing"]) == {1}


# Zarr has no settled encoding of text; xarray's is the one there is.
@pytest.mark.filterwarnings("ignore:.*Zarr V3 specification")
def test_tables_come_back_from_zarr(result, table, tmp_path):
    dataset = table.to_xarray()
    dataset["unit"] = dataset["unit"].astype(str)
    dataset.to_zarr(tmp_path / "table.zarr", consolidated=False)
    names = ["good", "noise", "gaps"]  # a Zarr group keeps no order
    pd.testing.assert_frame_equal(
        pa.correlate(result, read_table(tmp_path / "table.zarr"), attributes=names, **_FEW),
        pa.correlate(result, table, attributes=names, **_FEW),
    )
