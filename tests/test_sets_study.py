"""examples/sets_study.py: synergies are those of `pa.pairs`, tests tell truth from noise."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from support.screened import screen_anyway

import pyablate as pa
from pyablate.analysis.statistics import mcnemar

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
EXAMPLES = Path(__file__).parent.parent / "examples"
UNITS, SHUFFLES = 24, 99


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("sets_study")


@pytest.fixture
def statistics(study: ModuleType) -> ModuleType:
    return importlib.import_module("sets_statistics")


@pytest.fixture
def page(study: ModuleType) -> ModuleType:
    return importlib.import_module("sets_page")


def symmetric(random: np.random.Generator, units: int = UNITS) -> np.ndarray:
    matrix = np.triu(random.normal(size=(units, units)), 1)
    return matrix + matrix.T


def groups(units: int = UNITS, count: int = 4) -> np.ndarray:
    """Distance 0 within a group and 1 between groups."""
    group = np.arange(units) % count
    return (group[:, None] != group).astype(float)


def test_mantel_is_the_rank_correlation_over_pairs(statistics):
    random = np.random.default_rng(0)
    one, other, third, fourth = (symmetric(random) for _ in range(4))
    pairs = np.triu_indices(UNITS, 1)
    both = [stats.spearmanr(a[pairs], other[pairs]).statistic for a in (one, third)]
    assert statistics.mantel([one], [other], 9)[0] == pytest.approx(both[0])
    assert statistics.mantel([one, third], [other, other], 9)[0] == pytest.approx(np.mean(both))
    assert statistics.mantel([one], [one], 9) == (pytest.approx(1), 0.1)
    assert statistics.mantel([one], [-one], 9) == (pytest.approx(-1), 0.1)  # two-sided
    constant = statistics.mantel([np.zeros_like(one)], [fourth], 9)
    assert constant == (0, 1)


def test_mantel_rejects_true_nulls_as_often_as_it_says(statistics):
    """Units have levels of their own, as strong units do: pairs are far from independent."""
    random, found = np.random.default_rng(1), []
    for number in range(300):
        levels = random.normal(size=(2, 12))
        one, other = (symmetric(random, 12) + level[:, None] + level[None, :] for level in levels)
        found.append(statistics.mantel([one], [other], 59, seed=number)[1])
    rejected = np.mean(np.array(found) <= 0.05)
    assert 0.015 < rejected < 0.095  # 0.05 and 3.5 standard errors
    assert stats.kstest(found, "uniform").pvalue > 1e-4


def test_mantel_finds_a_planted_structure(statistics):
    random = np.random.default_rng(2)
    planted = [symmetric(random) + groups() for _ in range(2)]
    again = [symmetric(random) + groups() for _ in range(2)]
    r, p = statistics.mantel(planted, again, SHUFFLES)
    assert r > 0.05
    assert p <= 0.02


def test_levels_of_units_are_taken_out(statistics):
    random = np.random.default_rng(3)
    level, rest = random.normal(size=UNITS), symmetric(random)
    added = level[:, None] + level[None, :]
    np.fill_diagonal(added, 0)
    left = statistics.centred(rest)
    np.testing.assert_allclose(left.sum(axis=1), 0, atol=1e-10)
    np.testing.assert_allclose(statistics.centred(rest + added), left, atol=1e-10)
    np.testing.assert_allclose(statistics.centred(added), 0, atol=1e-10)
    # Shared levels look like agreement of pairs until they are taken out.
    one, other = symmetric(random) + 2 * added, symmetric(random) + 2 * added
    assert statistics.mantel([one], [other], SHUFFLES)[1] <= 0.02
    apart = [statistics.centred(matrix) for matrix in (one, other)]
    assert statistics.mantel(apart[:1], apart[1:], SHUFFLES)[1] > 0.05


def test_clusters_find_planted_groups(statistics):
    random = np.random.default_rng(4)
    noisy = [groups() + 0.1 * symmetric(random) for _ in range(2)]
    found = [statistics.clusters(matrix, 4) for matrix in noisy]
    value, p = statistics.agreement(found[:1], found[1:], SHUFFLES)
    assert (value, p) == (1, 0.01)
    # Distances below 0, as those of synergies are, give the same tree as those moved above it.
    assert np.array_equal(statistics.clusters(noisy[0] - 5, 4), found[0])


def test_clusters_of_noise_agree_by_chance(statistics):
    random, found = np.random.default_rng(5), []
    for _ in range(60):
        both = [statistics.clusters(symmetric(random), 4) for _ in range(2)]
        found.append(statistics.agreement(both[:1], both[1:], 19))
    values, p = np.array(found).T
    assert abs(values.mean()) < 0.03
    assert np.mean(p <= 0.05) < 0.16  # 0.05 and 3.5 standard errors


def test_intervals_draw_units(statistics):
    random = np.random.default_rng(6)
    pairs = UNITS * (UNITS - 1) // 2
    first, second = np.triu_indices(UNITS, 1)
    one, noise = random.normal(size=(2, pairs))
    same, low, high = statistics.repeated(one, one, UNITS, 100)
    assert (same, low, high) == pytest.approx((1, 1, 1))
    _, low, high = statistics.repeated(one, noise, UNITS, 200)
    assert low < 0 < high
    # Numbers that come from the units' levels are as uncertain as units are few.
    level = random.normal(size=UNITS)
    value, low, high = statistics.mean_of_pairs(level[first] + level[second], UNITS, 400)
    assert value == pytest.approx(2 * level.mean())
    assert high - low > 4 * level.std() / np.sqrt(UNITS)


def test_tossed_signs_keep_the_level(statistics):
    random = np.random.default_rng(7)
    by_image = random.choice([-1, 0, 0, 1], (200, 400)).astype(np.int8)
    more, less = (by_image > 0).sum(axis=1), (by_image < 0).sum(axis=1)
    tossed = statistics.tossed(by_image, 200)
    counted = (mcnemar(more, less) <= 0.05).sum()
    assert 4 < tossed.mean() < 10  # exact tests of whole numbers stay below 5 % of 200
    assert tossed.min() <= counted <= tossed.max()
    # One and the same pair 200 times: all or none.
    same = np.repeat(by_image[:1], 200, axis=0)
    assert set(statistics.tossed(same, 50)) <= {0, 200}
    planted = np.where(random.random(by_image.shape) < 0.3, 1, by_image).astype(np.int8)
    found = mcnemar((planted > 0).sum(axis=1), (planted < 0).sum(axis=1)) <= 0.05
    assert found.sum() > statistics.tossed(planted, 200).max()


def test_words_follow_from_rules(page):
    assert page.together(0.1, 0.2) == "back each other up"
    assert page.together(-0.2, -0.1) == "do less together than apart"
    assert page.together(-0.1, 0.1) == "do neither"
    words = [page.repeats(low) for low in (0.6, 0.1, -0.1)]
    assert words == ["repeat well", "repeat in part", "do not repeat"]
    assert page.exceeds(9, np.arange(9)) == "more than"
    assert page.exceeds(7, np.arange(9)) == "no more than"
    assert page.origin(-0.1, 0.1) == "no synergy by loss repeats on other images"
    assert page.origin(0.1, -0.1).endswith("is not told from the curvature of the loss")
    assert page.origin(0.2, 0.1).endswith("is more than the curvature of the loss")
    assert page.origin(np.nan, 0.1) == page.origin(-0.1, 0.1)
    assert page.origin(0.1, np.nan) == page.origin(0.1, -0.1)
    told = [page.alike(*figures) for figures in ((0.5, 0.01), (-0.1, 0.05), (0.9, 0.06))]
    assert told == ["alike", "weakly opposite", "not seen"]


def test_the_figure_with_itself_is_not_tested(page):
    def way(one: str, other: str, p: float) -> SimpleNamespace:
        return SimpleNamespace(one=one, other=other, mantel=(0.5, p))

    found = [way("a", "a", 0.001), way("a", "b", 0.02), way("b", "b", 0.001), way("a", "c", 0.5)]
    q = page.adjusted_over(found, "mantel")
    assert q == {("a", "b"): pytest.approx(0.04), ("a", "c"): pytest.approx(0.5)}


@pytest.mark.slow
def test_a_small_study_writes_the_page(study, tmp_path, monkeypatch):
    screen_anyway(monkeypatch)
    units, images, shuffles = 8, 60, 19
    setting = study.Setting(images, units, shuffles)
    results, screened = study.measured(setting, tmp_path)
    model = pa.demo.network(study.NETWORK)
    first, second = study.halves(setting)
    pairs = pa.pairs(model, first, study.LAYER, units=range(units), progress=False, audit=0)
    by_image = study.broken(results[0])
    np.testing.assert_allclose(by_image.mean(axis=1), pairs.data["interaction"])
    assert ((by_image > 0).sum(axis=1) == pairs.data["more"]).all()
    assert ((by_image < 0).sum(axis=1) == pairs.data["less"]).all()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured twice")

    monkeypatch.setattr(pa, "pairs", never)
    output = tmp_path / "page" / "sets.md"
    output.parent.mkdir()
    options = ["--images", str(images), "--units", str(units), "--shuffles", str(shuffles)]
    study.main([*options, "--folder", str(tmp_path), "--page", str(output)])
    text = output.read_text()
    total = screened.screening
    exact = np.concatenate([result.predictions() for result in results], axis=1)
    other = (exact != screened.predictions()).sum()
    assert other <= total.pairs - total.computed
    assert f"**{other} of {total.pairs:,}** predictions" in text
    assert f"All {units * (units - 1) // 2} pairs" in text
    assert "nan" not in text
    assert (output.parent / "images" / "sets.png").stat().st_size > 10_000
    # The first of the strongest pairs on the other half, by hooks that take both units away.
    row = study.strongest(results, "loss").iloc[0]
    both = [int(row[side].split(":")[1]) for side in ("first", "second")]

    def loss(without: list[int]) -> float:
        def hook(_module, _inputs, output):
            output = output.clone()
            output[:, without] = 0
            return output

        handle = model.get_submodule(study.LAYER).register_forward_hook(hook)
        with torch.no_grad():
            logits = model(second[0]).double()
        handle.remove()
        return -logits.log_softmax(1)[range(len(second[1])), second[1]].mean().item()

    by_hand = loss(both) - loss(both[:1]) - loss(both[1:]) + loss([])
    assert row["measured"] == pytest.approx(by_hand, abs=1e-5)
    assert row["joint"] == pytest.approx(loss(both) - loss([]), abs=1e-5)


def test_logits_add_up_in_front_of_the_last_layer(study, monkeypatch):
    monkeypatch.setattr(study, "LAYER", "classifier.3")
    images, labels = study.halves(study.Setting(40))[0]
    model = pa.demo.network(study.NETWORK)
    options = {"measures": ["loss"], "precision": "fp32", "progress": False}
    found = pa.pairs(model, (images, labels), study.LAYER, units=range(6), **options)
    expected = study.beyond(found.result.loss_change, 6)
    assert np.abs(expected).max() > 1e-6
    np.testing.assert_allclose(study.added(images, labels, 6), expected, atol=1e-6)


def test_too_few_active_units(study):
    seen = {"activations": (np.zeros((5, 9)), np.zeros((5, 9)))}
    with pytest.raises(ValueError, match="at least 4 that are ever active, got 0"):
        study.distances(5, {}, seen)


def test_a_reading_without_a_correlation_repeats_worst(study):
    def readings(accuracy: float, loss: float) -> dict[str, SimpleNamespace]:
        both = {"accuracy": accuracy, "loss": loss}
        return {name: SimpleNamespace(repeat=(r, r, r)) for name, r in both.items()}

    assert study.best_of(readings(np.nan, -0.9)) == "loss"
    assert study.best_of(readings(-0.9, np.nan)) == "accuracy"
    assert study.best_of(readings(0.2, 0.1)) == "accuracy"
