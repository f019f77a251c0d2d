"""Shrunken drops: the posterior on a grid, and better estimates where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from support.simulated import simulate

from pyablate.analysis.shrinkage import beta_prior, shrunken_drop
from pyablate.analysis.targets import unit_targets


def planted(seed: int, units: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chances of units, and lost images of the changed ones: beta-binomial with a = 6, b = 4."""
    random = np.random.default_rng(seed)
    chance = random.beta(6, 4, units)
    changed = random.integers(0, 30, units)
    return chance, random.binomial(changed, chance), changed


def test_the_prior_is_recovered():
    found = np.mean([beta_prior(*planted(seed)[1:]) for seed in range(6)], axis=0)
    assert found[0] / found.sum() == pytest.approx(0.6, abs=0.02)
    assert found[0] == pytest.approx(6, rel=0.3)
    # No likelihood nearby is larger.
    _, lost, changed = planted(0)
    best = beta_prior(lost, changed)

    def likelihood(a: float, b: float) -> float:
        return float(stats.betabinom.logpmf(lost, changed, a, b).sum())

    others = [likelihood(best[0] * x, best[1] * y) for x in (0.9, 1.1) for y in (0.9, 1.1)]
    assert likelihood(*best) > max(others)


def test_the_estimate_is_the_posterior_mean():
    random = np.random.default_rng(0)
    result = simulate(random.uniform(0, 0.4, (12, 3)), 0.2, 20, random, ["a"] * 6 + ["b"] * 6)
    found = shrunken_drop(result)
    lost, gained = result.lost.sum(axis=1), result.gained.sum(axis=1)
    grid = np.linspace(0, 1, 20001)[1:-1]
    for layer in ("a", "b"):
        rows = np.flatnonzero(result.units["layer"] == layer)
        prior = stats.beta.logpdf(grid, *beta_prior(lost[rows], (lost + gained)[rows]))
        for row in rows:
            log = prior + lost[row] * np.log(grid) + gained[row] * np.log1p(-grid)
            weight = np.exp(log - log.max())
            chance = (weight * grid).sum() / weight.sum()
            expected = (lost + gained)[row] * (2 * chance - 1) / len(result.labels)
            assert found[row] == pytest.approx(expected, abs=1e-4)


def test_it_is_nearer_to_the_truth_than_the_drop():
    errors = []
    for seed in range(5):
        chance, lost, changed = planted(seed)
        a, b = beta_prior(lost, changed)
        truth = changed * (2 * chance - 1)
        shrunken = changed * (2 * (lost + a) / (changed + a + b) - 1)
        errors.append([np.square(one - truth).mean() for one in (2 * lost - changed, shrunken)])
    plain, better = np.mean(errors, axis=0)
    assert better < 0.65 * plain  # 10 / (10 + m) of the noise goes


def test_units_that_differ_by_chance_alone_keep_little_difference():
    random = np.random.default_rng(3)
    result = simulate(np.full((200, 2), 0.3), 0.1, 40, random)
    share = shrunken_drop(result) / (result.lost + result.gained).sum(axis=1)
    assert np.ptp(share) < 0.1
    plain = result.accuracy_drop / (result.lost + result.gained).sum(axis=1)
    assert np.ptp(plain) > 5 * np.ptp(share)


def test_nothing_changed():
    result = simulate(np.zeros((3, 2)), 0.0, 10, np.random.default_rng(0))
    assert shrunken_drop(result).tolist() == [0, 0, 0]
    assert beta_prior(np.zeros(2), np.zeros(2)) == (1, 1)


def test_it_is_a_target():
    random = np.random.default_rng(1)
    result = simulate(random.uniform(0, 0.4, (8, 3)), 0.2, 20, random)
    found = unit_targets(result, "shrunken_drop")
    assert found["shrunken_drop"].tolist() == shrunken_drop(result).tolist()
    assert "shrunken_drop" not in unit_targets(result)
