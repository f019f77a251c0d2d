"""Tests of tests: p values, false discovery, noise floor and split halves against slow formulas."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from support.simulated import from_predictions, simulate

import pyablate as pa
from pyablate.analysis import statistics
from pyablate.analysis.statistics import adjusted, mcnemar


def small_result(seed: int, sizes: list[int], units: int, share: float) -> pa.AblationResult:
    """Random predictions for classes of the given sizes (0 allowed)."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    classes = len(sizes)
    baseline = np.where(random.random(len(labels)) < 0.6, labels, random.integers(0, classes))
    flipped = random.random((units, len(labels))) < share
    predictions = np.where(flipped, random.integers(0, classes, flipped.shape), baseline)
    layers = [f"layer{unit % 2}" for unit in range(units)]
    return from_predictions(predictions, baseline, labels, classes, layers)


results = st.builds(
    small_result,
    st.integers(0, 2**20),
    st.lists(st.integers(0, 9), min_size=2, max_size=4).filter(any),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.2, 0.9]),
)


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_exact_binomial_test(lost, gained):
    found = mcnemar(np.array([lost]), np.array([gained]))
    expected = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    np.testing.assert_allclose(found, [expected], rtol=1e-10)


def test_mcnemar_keeps_small_p_values():
    found = mcnemar(np.array([[300], [0]]), np.array([[0], [900]]))
    np.testing.assert_allclose(found, [[2.0**-299], [2.0**-899]], rtol=1e-9)


def slow_adjusted(p: list[float]) -> list[float]:
    """Smallest level at which Benjamini and Hochberg's step-up procedure rejects each test."""
    ranked = sorted(p)
    return [
        min(
            min(1.0, bound * len(p) / (rank + 1)) for rank, bound in enumerate(ranked) if bound >= x
        )
        for x in p
    ]


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=12))
def test_adjustment_is_benjamini_hochberg(p):
    np.testing.assert_allclose(adjusted(np.array(p)), slow_adjusted(p), rtol=1e-12)
    with_gap = adjusted(np.array([np.nan, *p, np.nan]))
    np.testing.assert_array_equal(with_gap[1:-1], adjusted(np.array(p)))
    assert np.isnan(with_gap[[0, -1]]).all()


@given(results)
@settings(deadline=None)
def test_significance_tests_each_class_of_each_unit(result):
    found = result.significance(fdr=0.2)
    assert dict(found.sizes) == {"unit": len(result.units), "class": result.classes}
    assert list(found["unit"].to_numpy()) == list(result.units["label"])
    assert list(found["class"].to_numpy()) == list(result.class_names)
    p = np.full(found["p"].shape, np.nan)
    predictions = result.predictions()
    for u, k in itertools.product(range(len(p)), range(result.classes)):
        of_class = result.labels == k
        if of_class.any():
            was = result.baseline[of_class] == k
            now = predictions[u, of_class] == k
            lost, gained = int((was & ~now).sum()), int((~was & now).sum())
            assert (found["lost"][u, k], found["gained"][u, k]) == (lost, gained)
            p[u, k] = stats.binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    np.testing.assert_allclose(found["p"], p, rtol=1e-10)
    for layer in set(result.units["layer"]):
        rows = np.flatnonzero(result.units["layer"] == layer)
        cells = np.argwhere(~np.isnan(p[rows]))
        expected = slow_adjusted([p[rows[u], k] for u, k in cells])
        np.testing.assert_allclose([found["q"][rows[u], k] for u, k in cells], expected)
    np.testing.assert_array_equal(found["significant"], found["q"].fillna(1) <= 0.2)
    np.testing.assert_array_equal(found["drop"], result.class_accuracy_drop)


def distribution_of_maximum(changed: np.ndarray, sizes: np.ndarray) -> dict[float, float]:
    """Chance of each value of the largest drop: all directions of all changed images."""
    owner = np.repeat(np.arange(len(sizes)), changed)
    chances: dict[float, float] = {}
    for signs in itertools.product((-1, 1), repeat=len(owner)):
        net = (
            np.bincount(owner, signs, minlength=len(sizes)) if len(owner) else np.zeros(len(sizes))
        )
        largest = round(float(max(net / sizes)), 12)
        chances[largest] = chances.get(largest, 0) + 0.5 ** len(owner)
    return chances


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=3),
    st.integers(0, 2**20),
)
@settings(deadline=None, max_examples=60)
def test_noise_floor_and_p_of_the_maximum_by_enumeration(classes, seed):
    # Each class: so many changed images, so many more that do not change.
    random = np.random.default_rng(seed)
    changed = np.array([n for n, _ in classes])
    sizes = changed + np.array([more for _, more in classes]) + 1
    labels = np.repeat(np.arange(len(sizes)), sizes)
    first = np.concatenate([np.arange(size) < n for n, size in zip(changed, sizes, strict=True)])
    right = random.random(len(labels)) < 0.5
    elsewhere = len(sizes)  # a further class without images
    baseline = np.where(right, labels, elsewhere)
    predictions = np.where(first, np.where(right, elsewhere, labels), baseline)[None]
    result = from_predictions(predictions, baseline, labels, len(sizes) + 1)
    chances = distribution_of_maximum(changed, sizes)
    expected = sum(value * chance for value, chance in chances.items())
    np.testing.assert_allclose(result.noise_floor(), [expected], atol=1e-12)
    observed = result.max_class_drop[0]
    p = sum(chance for value, chance in chances.items() if value >= observed - 1e-9)
    np.testing.assert_allclose(result.max_class_test(splits=1)["p"], [p], rtol=1e-9)


@pytest.mark.parametrize(
    ("classes", "images", "points"), [(1000, 50, 7.5), (100, 100, 3.7), (10, 1000, 0.7)]
)
def test_noise_floor_of_one_percent_of_flips_each_way(classes, images, points):
    """The figures of the documents, and the mean largest drop of simulated harmless units."""
    random = np.random.default_rng(1)
    result = simulate(np.full((60, classes), 0.02), 0.02, images, random)
    floor = 100 * result.noise_floor()
    assert floor.mean() == pytest.approx(points, abs=0.1)
    spread = 100 * result.max_class_drop.std() / np.sqrt(60)
    assert abs(100 * result.max_class_drop.mean() - floor.mean()) < 4 * spread


def test_noise_floor_with_many_flips_in_every_class():
    """No class without changes, and tails too small for a double: against simulation."""
    random = np.random.default_rng(2)
    rates = np.array([[1.0, 1.0, 1.0]])
    result = simulate(rates, 1.0, 3000, random)
    assert (result.lost + result.gained == 3000).all()
    drawn = (2 * random.binomial(3000, 0.5, (20_000, 3)) - 3000).max(axis=1) / 3000
    floor = result.noise_floor()
    assert floor[0] == pytest.approx(drawn.mean(), abs=4 * drawn.std() / np.sqrt(20_000))


def test_harmless_units_have_uniform_or_larger_p_of_the_maximum():
    result = simulate(np.full((2000, 8), 0.1), 0.1, 60, np.random.default_rng(3))
    p = result.max_class_test(splits=1)["p"].to_numpy()
    for level in (0.01, 0.05, 0.2):
        assert (p <= level).mean() <= level + 3 * np.sqrt(level * (1 - level) / 2000)
    assert (p <= 0.2).mean() > 0.05, "not so careful that it finds nothing"


def test_false_discovery_rate_of_harmless_units_stays_at_its_level():
    """All units harmless: any discovery is false, so layers with one are at most 5 %."""
    random = np.random.default_rng(4)
    layers = [f"layer{layer}" for layer in range(300) for _ in range(10)]
    result = simulate(np.full((3000, 10), 0.2), 0.2, 100, random, layers)
    found = result.significance(fdr=0.05)["significant"].to_numpy().any(axis=1)
    share = found.reshape(300, 10).any(axis=1).mean()
    assert share <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 300)


def test_false_discovery_rate_beside_planted_damage():
    """A tenth of the pairs is damaged: the mean share of false discoveries per layer is small."""
    random = np.random.default_rng(5)
    loss = np.full((2000, 10), 0.1)
    planted = random.random(loss.shape) < 0.1
    loss[planted] = 0.5
    layers = [f"layer{layer}" for layer in range(100) for _ in range(20)]
    result = simulate(loss, 0.1, 100, random, layers)
    found = result.significance(fdr=0.1)["significant"].to_numpy()
    wrong = (found & ~planted).reshape(100, -1).sum(axis=1)
    share = wrong / np.maximum(1, found.reshape(100, -1).sum(axis=1))
    assert share.mean() <= 0.1
    assert (found & planted).sum() > 0.5 * planted.sum()


def test_planted_damage_is_found_with_the_power_of_the_binomial():
    images, loss, gain, level = 60, 0.35, 0.1, 0.05
    result = simulate(np.full((2000, 2), loss), gain, images, np.random.default_rng(6))
    found = (result.significance()["p"].to_numpy()[:, 0] <= level).mean()
    half = images // 2
    power = sum(
        stats.binom.pmf(lost, half, loss) * stats.binom.pmf(gained, half, gain)
        for lost in range(half + 1)
        for gained in range(half + 1)
        if lost + gained and stats.binomtest(lost, lost + gained).pvalue <= level
    )
    assert 0.3 < power < 0.95, "a case that tells something"
    assert abs(found - power) < 4 * np.sqrt(power * (1 - power) / 2000)


def slow_split_half(result: pa.AblationResult, half: np.ndarray) -> np.ndarray:
    """Both directions of one split, by comparing predictions."""
    predictions = result.predictions()
    drops = np.full((2, len(predictions), result.classes), np.nan)
    for side, k in itertools.product(range(2), range(result.classes)):
        chosen = (result.labels == k) & (half == bool(side))
        if chosen.any() and (result.labels == k).sum() > 1:
            before = (result.baseline[chosen] == k).mean()
            drops[side, :, k] = before - (predictions[:, chosen] == k).mean(axis=1)
    rows = np.arange(len(predictions))
    there = drops[1][rows, np.nanargmax(drops[0].round(12), axis=1)]
    back = drops[0][rows, np.nanargmax(drops[1].round(12), axis=1)]
    return (there + back) / 2


@given(results)
@settings(deadline=None)
def test_split_half_against_comparing_predictions(result):
    found = result.split_half_drop(splits=3, seed=5)
    if result.class_sizes.max() < 2:
        assert np.isnan(found).all()
        return
    generator = np.random.default_rng(5)
    halves = [statistics.random_half(result.labels, result.classes, generator) for _ in range(3)]
    for half in halves:
        sizes = np.bincount(result.labels[half], minlength=result.classes)
        assert (abs(2 * sizes - result.class_sizes) <= 1).all()
    expected = np.mean([slow_split_half(result, half) for half in halves], axis=0)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_split_half_is_unbiased_where_the_maximum_is_not():
    result = simulate(np.full((600, 20), 0.04), 0.04, 100, np.random.default_rng(7))
    estimate = result.split_half_drop(splits=4)
    assert abs(estimate.mean()) < 4 * estimate.std() / np.sqrt(600)
    assert result.max_class_drop.mean() > 10 * abs(estimate.mean())
    damaged = np.zeros((100, 20))
    damaged[:, 3] = 0.6  # of the half that is right
    planted = simulate(damaged, 0.0, 100, np.random.default_rng(8)).split_half_drop()
    assert planted.mean() == pytest.approx(0.3, abs=0.02)


def test_blocks_do_not_change_anything(monkeypatch):
    result = small_result(3, [9, 30, 0, 12], units=40, share=0.3)
    whole = result.max_class_test(splits=2)
    monkeypatch.setattr(statistics, "NUMBERS", 50)
    assert len(list(statistics.row_blocks(result, 4))) > 10
    parts = result.max_class_test(splits=2)
    for name in ("p", "q", "noise_floor", "split_half_drop", "mcnemar_p"):
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-12, atol=1e-15)


def test_max_class_test_names_the_class_and_its_p():
    result = small_result(11, [20, 20, 15], units=6, share=0.3)
    table = result.max_class_test()
    assert list(table["label"]) == list(result.units["label"])
    for row, line in enumerate(table.itertuples()):
        k = result.class_names.index(str(line.max_class))
        assert line.max_class_drop == result.class_accuracy_drop[row].max()
        lost, gained = result.lost[row, k], result.gained[row, k]
        assert line.mcnemar_p == pytest.approx(stats.binomtest(lost, lost + gained).pvalue)
    for layer in ("layer0", "layer1"):
        some = table[table["layer"] == layer]
        np.testing.assert_allclose(some["q"], slow_adjusted(list(some["p"])))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: r.significance(fdr=0), r"fdr: expected .*between 0 and 1, got 0"),
        (lambda r: r.significance(fdr=1.5), r"fdr: expected .*got 1\.5"),
        (lambda r: r.significance(fdr=float("nan")), r"fdr: expected .*got nan"),
        (lambda r: r.split_half_drop(splits=0), r"splits: expected at least 1, got 0"),
        (lambda r: r.max_class_test(seed=-1), r"seed: expected .*got -1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(small_result(0, [3, 3], units=2, share=0.2))


def test_no_units_at_all():
    result = small_result(0, [3, 3], units=0, share=0.2)
    assert result.significance()["p"].shape == (0, 2)
    assert result.noise_floor().shape == (0,)
    assert len(result.max_class_test()) == 0
