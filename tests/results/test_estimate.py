"""Intervals of estimated runs hold the truth as often as they say, and sums are what they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pyablate.analysis.statistics import mcnemar
from pyablate.plots import ResultPlots
from pyablate.result import AblationResult
from pyablate.results.estimate import WIDTH, Estimate
from pyablate.results.flips import Flips

UNITS, IMAGES, CLASSES, LEVELS = 48, 400, 5, 8


class Planted:
    """Pairs with known chances to be predicted wrongly, and a design that knows them more or less.

    ``off`` is by how much the design errs, ``spread`` how much units differ in that.
    """

    def __init__(self, seed: int, *, off: float, spread: float, share: float = 0.04) -> None:
        draw = np.random.default_rng(seed)
        self.labels = draw.integers(0, CLASSES, IMAGES)
        self.baseline = np.where(draw.random(IMAGES) < 0.8, self.labels, (self.labels + 1) % 5)
        reckoned = np.minimum(0.5, 0.4 * np.exp(-2 * draw.exponential(2.0, (UNITS, IMAGES))))
        factor = draw.gamma(1 / spread, spread, (UNITS, 1)) if spread else 1.0
        wrong = draw.random(reckoned.shape) < np.minimum(0.9, off * factor * reckoned)
        self.guess = draw.random(reckoned.shape) < 0.01
        self.flips = self.guess ^ wrong
        other = (self.labels + draw.integers(1, CLASSES, (UNITS, IMAGES))) % CLASSES
        right = self.baseline == self.labels
        self.new = np.where(right, other, np.where(wrong | self.guess, self.labels, other))
        self.factor, self.level = 1.0, np.zeros(reckoned.shape, np.int64)
        for step in range(200, -400, -1):
            self.factor = 1.03**step
            wanted = np.rint(-np.log2(self.factor * np.sqrt(reckoned)))
            self.level = np.clip(wanted, 0, LEVELS - 1).astype(np.int64)
            if (0.5**self.level).mean() <= share:
                break
        self.chance = 0.5**self.level

    def result(self, chosen: Any = None) -> AblationResult:
        """Make the result of a run that computed these pairs, or all."""
        row, image = np.nonzero(self.flips)
        pieces: list[tuple[Any, ...]] = [(row, image, self.new[row, image])]
        estimate = None
        if chosen is not None:
            weight = 1 / self.chance
            wrong = chosen & (self.flips != self.guess)
            stands = np.where(wrong, 1 - weight, 1.0)
            pieces = []
            for which, value in (
                (self.guess & (stands != 0), stands),
                (wrong & self.flips, weight),
            ):
                at = np.nonzero(which)
                pieces.append((*at, self.new[at], value[at]))
            spread = self.chance * (1 - self.chance)
            estimate = Estimate(
                "4%",
                0,
                self.factor,
                np.ones(UNITS),
                np.stack([(self.level == n).sum(axis=1) for n in range(LEVELS)], axis=1),
                chosen.sum(axis=1),
                np.stack([spread[:, self.labels == k].sum(axis=1) for k in range(CLASSES)], axis=1),
            )
        units = pd.DataFrame(
            {
                "label": [f"a:{u}" for u in range(UNITS)],
                "layer": ["a"] * (UNITS // 2) + ["b"] * (UNITS // 2),
                "unit": np.arange(UNITS),
            }
        )
        return AblationResult(
            units=units,
            labels=self.labels,
            baseline=self.baseline,
            flips=Flips.gather(UNITS, pieces, weighted=chosen is not None),
            class_names=tuple("abcde"),
            estimate=estimate,
        )


FIGURES = ("accuracy", "accuracy_drop", "class_accuracy_drop", "lost", "gained")


@pytest.mark.parametrize(("off", "spread"), [(1.0, 0.0), (4.0, 0.5), (0.25, 2.0), (100.0, 0.0)])
def test_estimates_have_no_bias_and_intervals_hold_the_truth(off, spread):
    planted = Planted(3, off=off, spread=spread)
    exact, draw = planted.result(), np.random.default_rng(7)
    repeats = 50
    held = {name: 0.0 for name in FIGURES}
    errors = {name: [] for name in FIGURES}
    widths = []
    for _ in range(repeats):
        found = planted.result(draw.random(planted.chance.shape) < planted.chance)
        for name in FIGURES:
            error = np.asarray(getattr(found, name) - getattr(exact, name))
            width = found.half_width(name)
            held[name] += float((np.abs(error) <= width + 1e-9).mean()) / repeats
            errors[name].append(error)
        widths.append(found.half_width())
    for name in FIGURES:
        assert held[name] >= 0.93, name
        totals = np.array([error.sum() for error in errors[name]])
        assert abs(totals.mean()) < 3.5 * totals.std() / np.sqrt(repeats), name
    spread_of_errors = WIDTH * np.std(errors["accuracy_drop"])
    assert 0.6 * spread_of_errors < np.mean(widths) < 1.7 * spread_of_errors


def test_all_pairs_computed_is_exact():
    planted = Planted(1, off=1.0, spread=0.0)
    planted.chance, planted.level = np.ones(planted.chance.shape), 0 * planted.level
    found, exact = planted.result(np.ones(planted.chance.shape, bool)), planted.result()
    for name in FIGURES:
        assert np.array_equal(getattr(found, name), getattr(exact, name))
        assert not found.half_width(name).any()
    assert np.allclose(found.significance()["p"], exact.significance()["p"], equal_nan=True)
    assert np.array_equal(found.flip_count, exact.flip_count)


@pytest.fixture(scope="module")
def sampled() -> AblationResult:
    planted = Planted(5, off=1.0, spread=1.0)
    return planted.result(np.random.default_rng(1).random(planted.chance.shape) < planted.chance)


def test_tables_have_the_intervals(sampled):
    frame, width = sampled.to_dataframe(), sampled.half_width()
    assert np.allclose(frame["accuracy_drop_high"] - frame["accuracy_drop"], width)
    assert np.allclose(frame["accuracy_drop"] - frame["accuracy_drop_low"], width)
    of_class = sampled.half_width("class_accuracy_drop")[:, 2]
    assert np.allclose(frame["high: c"] - frame["low: c"], 2 * of_class)
    assert np.allclose(sampled.data["accuracy_drop_high"], frame["accuracy_drop_high"])
    assert np.allclose(frame["flips"], sampled.flip_count)
    layers = sampled.estimate.to_dataframe(sampled.units["layer"])
    assert layers["layer"].tolist() == ["a", "b"]
    assert layers["drawn"].sum() == sampled.estimate.drawn.sum()
    assert "estimated from" in repr(sampled)
    assert "were computed (budget 4%)" in str(sampled.estimate)


def test_what_needs_every_prediction_says_so(sampled):
    calls = {
        "predictions": sampled.predictions,
        "confusion": sampled.confusion,
        "noise_floor": sampled.noise_floor,
        "split_half_drop": sampled.split_half_drop,
        "max_class_test": sampled.max_class_test,
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"{name}: needs the prediction of every"):
            call()
    with pytest.raises(ValueError, match="of: expected one of accuracy"):
        sampled.half_width("flips")


def test_significance_reckons_with_the_sample(sampled):
    tests = sampled.significance()
    as_if_all = mcnemar(np.maximum(sampled.lost, 0), np.maximum(sampled.gained, 0))
    assert (tests["p"].to_numpy() >= as_if_all - 1e-9).mean() > 0.95
    assert (tests["p"].to_numpy() > as_if_all + 1e-3).mean() > 0.2


def test_mcnemar_with_a_variance():
    lost, gained = np.array([9.0, 0.0, 40.0]), np.array([1.0, 0.0, 0.0])
    exact = mcnemar(lost.astype(int), gained.astype(int))
    assert np.allclose(mcnemar(lost, gained, np.array([1e-12, 0.0, 1e-12])), exact)
    # One image of weight 40 is one image: variance 40 * 39.
    assert mcnemar(lost[2:], gained[2:], np.array([40.0 * 39])) == pytest.approx(1.0)


def test_pictures_show_the_intervals(sampled):
    pytest.importorskip("matplotlib")
    axes = ResultPlots(sampled).drops("accuracy_drop", names=0)
    assert "95 % interval" in axes.get_legend_handles_labels()[1]
    axes = ResultPlots(sampled).profile(0)
    assert "95 % interval" in axes.get_legend_handles_labels()[1]
    with pytest.raises(ValueError, match="max_class_test: needs"):
        ResultPlots(sampled).drops()


def test_stored_and_damaged(sampled, tmp_path):
    from pyablate.results import store

    place = tmp_path / "run.zarr"
    sampled.save(place)
    known = store.read(place, AblationResult)
    assert known.guarantee == "estimated"
    assert known.estimate.to_json() == sampled.estimate.to_json()
    for name in FIGURES:
        assert np.array_equal(getattr(known, name), getattr(sampled, name))
        assert np.array_equal(known.half_width(name), sampled.half_width(name))
    short = replace(sampled.estimate, drawn=sampled.estimate.drawn[1:])
    replace(sampled, estimate=short).save(place)
    with pytest.raises(OSError, match="estimate_drawn does not fit"):
        store.read(place, AblationResult)
