"""Permutations of small games: values are Shapley's, intervals hold what they promise."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from scipy import stats
from support.games import Game, shapley_values

from pyablate.experiments.permutations import Estimates, Rules, estimate

RULES = Rules(
    permutations=200,
    top=None,
    truncation=None,
    tolerance=0.0,
    confidence=0.95,
    interval="bernstein",
)


def random_game(seed: int, units: int = 6, spread: float = 0.5) -> Game:
    """What is lost grows with the number of units that are gone, more or less."""
    generator = np.random.default_rng(seed)
    gone = np.array([bits.bit_count() for bits in range(2**units)]) / units
    table = np.clip(gone + spread * generator.normal(size=2**units), 0, 1)
    table[0] = 0.0
    return Game(table)


def clear_game() -> Game:
    """Units 0 and 1 are worth 0.35 each, units 2 to 9 share the rest."""
    worth = np.array([0.35, 0.35, *[0.3 / 8] * 8])
    sets = (np.arange(2**10)[:, None] >> np.arange(10)) & 1
    return Game(sets @ worth)


def run(game: Game, seed: int = 0, **changed: object) -> Estimates:
    rules = dataclasses.replace(RULES, **changed)
    return estimate(game, game.units, rules, np.random.default_rng(seed))


def test_the_values_of_small_games_are_known():
    # Two of three suffice to win: all alike. A glove game: unit 0 is the only left glove.
    majority = Game(np.array([0, 0, 0, 1, 0, 1, 1, 1]))
    np.testing.assert_allclose(shapley_values(majority), [1 / 3] * 3)
    gloves = Game(np.array([0, 0, 0, 1, 0, 1, 0, 1]))
    np.testing.assert_allclose(shapley_values(gloves), [2 / 3, 1 / 6, 1 / 6])


def test_all_orders_together_give_the_exact_values():
    game = random_game(1, units=4)

    class EveryOrder:
        def permuted(self, x: np.ndarray, axis: int) -> np.ndarray:
            del x, axis
            return np.array(list(itertools.permutations(range(4))))

    rules = dataclasses.replace(RULES, permutations=24)
    found = estimate(game, 4, rules, EveryOrder())  # type: ignore[arg-type]
    np.testing.assert_allclose(found.value, shapley_values(game), atol=1e-14)


@pytest.mark.parametrize("interval", ["bernstein", "student"])
@pytest.mark.parametrize("options", [{"tolerance": 0.08}, {"top": 2}])
def test_all_intervals_hold_at_once_as_often_as_promised(interval, options):
    game = random_game(2, units=5)
    exact = shapley_values(game)
    held = 0
    for seed in range(200):
        found = run(game, seed, interval=interval, confidence=0.8, permutations=300, **options)
        held += bool(((found.lower <= exact) & (exact <= found.upper)).all())
    assert held >= stats.binom.ppf(0.001, 200, 0.8)


def test_estimates_are_unbiased_and_their_standard_errors_true():
    game = random_game(3)
    exact = shapley_values(game)
    every = [run(game, seed, permutations=40) for seed in range(300)]
    values = np.stack([each.value for each in every])
    error = values.std(axis=0, ddof=1)
    assert (np.abs(values.mean(axis=0) - exact) < 4.5 * error / math.sqrt(300)).all()
    stated = np.sqrt(np.mean([each.standard_error**2 for each in every], axis=0))
    np.testing.assert_allclose(stated, error, rtol=0.2)


def test_an_interval_is_that_of_maurer_and_pontil():
    game = random_game(4, units=3)
    found = run(game, permutations=5000)
    samples, units, looks = 5000, 3, 1
    risk = 0.05 / (units * looks) / 2
    variance = found.standard_error**2 * samples
    width = np.sqrt(2 * variance * math.log(2 / risk) / samples)
    width += 2 * 7 * math.log(2 / risk) / (3 * (samples - 1))
    np.testing.assert_allclose(found.upper - found.value, width)
    np.testing.assert_allclose(found.value - found.lower, width)
    exact = shapley_values(game)
    assert ((found.lower < exact) & (exact < found.upper)).all()


def test_looks_and_units_share_the_risk():
    game = random_game(4, units=3)
    found = run(game, interval="student", tolerance=1e-9)
    risk = 0.05 / (3 * 10)
    width = stats.t.isf(risk / 2, 199) * found.standard_error
    np.testing.assert_allclose(found.upper - found.value, width)


def test_rounds_add_up_to_one_sample():
    game = random_game(9)
    once, rounds = run(game), run(game, tolerance=1e-12)
    assert not rounds.decided.any()
    np.testing.assert_allclose(rounds.value, once.value, rtol=1e-12)
    np.testing.assert_allclose(rounds.standard_error, once.standard_error, rtol=1e-12)


def test_values_add_up_to_what_all_are_worth():
    for seed in range(5):
        game = random_game(seed)
        found = run(game, seed, permutations=7)
        assert found.value.sum() == pytest.approx(game.table[-1], abs=1e-12)
        assert found.total == game.table[-1]


def test_a_unit_that_changes_nothing_is_worth_nothing():
    table = random_game(5, units=5).table
    found = run(Game(np.concatenate([table, table])))  # unit 5 is the highest bit
    assert found.value[5] == 0 == found.standard_error[5]
    assert (found.value[:5] != 0).any()


def test_the_top_units_cost_less_than_all():
    rules = {"permutations": 3000, "confidence": 0.9}
    clear, every = clear_game(), clear_game()
    some = run(clear, top=2, **rules)
    whole = run(every, **rules)
    assert some.decided.all()
    assert set(np.argsort(some.value)[-2:]) == {0, 1}
    assert some.permutations < whole.permutations == 3000
    assert clear.asked < every.asked / 2


def test_sampling_stops_unit_by_unit():
    """Unit 0 never varies, the others do: it is known long before them."""
    base = random_game(6, units=5, spread=0.3).table
    table = np.stack([base / 2, base / 2 + 0.5], axis=1).ravel()  # unit 0 is the lowest bit
    found = run(Game(table), interval="student", tolerance=0.01, permutations=400)
    assert found.samples[0] == 40 < found.samples[1:].min()
    assert found.value[0] == pytest.approx(0.5)
    assert found.standard_error[0] < 1e-15
    exact = shapley_values(Game(table))
    assert (np.abs(found.value - exact) < 5 * found.standard_error + 1e-12).all()


def test_orders_end_where_everything_is_lost():
    """Three of eight gone, and all is lost: five eighths of each order are never asked."""
    gone = np.array([bits.bit_count() for bits in range(2**8)])
    table = np.minimum(gone / 3, 1.0)
    full, short = Game(table), Game(table)
    expected, found = run(full), run(short, truncation=0.01)
    np.testing.assert_allclose(found.value, expected.value, atol=1e-14)
    assert short.asked < 0.6 * full.asked
    bent = Game(np.where(gone > 0, np.maximum(table, 0.9), 0) + gone / 1000)
    cut = run(bent, truncation=0.2)
    assert abs(cut.value.sum() - cut.total) <= 0.2
    assert cut.value.sum() != pytest.approx(cut.total)


def test_more_stages_do_not_change_a_value(monkeypatch):
    game = random_game(7, spread=0.2)
    expected = run(game, truncation=0.1).value
    monkeypatch.setattr("pyablate.experiments.permutations.STAGES", 1)
    np.testing.assert_array_equal(run(game, truncation=0.1).value, expected)


def test_one_unit_is_worth_everything():
    found = run(Game(np.array([0.0, 0.4])), truncation=0.1)
    assert found.value.tolist() == [0.4]


def test_one_permutation_says_nothing_of_errors():
    found = run(random_game(8), permutations=1)
    assert np.isnan(found.standard_error).all()
    assert (found.lower == -1).all()
    assert (found.upper == 1).all()
    unbounded = run(random_game(8), permutations=1, interval="student")
    assert np.isinf(unbounded.upper).all()


def test_rounds_make_up_the_permutations():
    for permutations in (1, 9, 10, 19, 25, 99, 100, 101, 1234):
        rules = dataclasses.replace(RULES, permutations=permutations, top=1)
        rounds = rules.rounds
        assert sum(rounds) == permutations
        assert len(rounds) <= 10
        assert len(set(rounds[1:])) <= 1
        assert rounds[0] >= min(10, permutations)
