"""How often errors exceed what a sample of them suggests."""

import numpy as np
import pytest

from pyablate.analysis.tail import Tail, safe_above


def threshold(errors: object, scores: np.ndarray, risk: float) -> float:
    """Of scores that are wrong where an error of this kind is larger."""
    return safe_above(scores, Tail.of(errors).chance(scores), np.ones(len(scores)), risk)


@pytest.mark.parametrize("exponent", [1.5, 3.0])
@pytest.mark.parametrize("size", [50, 1000])
def test_the_chance_is_right_on_average_over_samples(exponent: float, size: int) -> None:
    """What is exceeded with a chance of 1e-4, by the sample, is exceeded about as often."""
    draw = np.random.default_rng(0)
    numbers = np.geomspace(0.1, 1e6, 500)
    true = []
    for _ in range(300):
        tail = Tail.of(draw.pareto(exponent, size))
        safe = numbers[tail.chance(numbers) <= 1e-4]
        true.append((1 + safe[0]) ** -exponent if len(safe) else 0.0)
    assert 2e-6 < np.mean(true) < 3e-4


def test_chances_fall_and_begin_at_one() -> None:
    tail = Tail.of(np.random.default_rng(1).standard_t(3, 400))
    chances = tail.chance(np.linspace(-50, 200, 1000))
    assert chances[0] == 1.0
    assert (np.diff(chances) <= 1e-12).all()


def test_fewer_errors_give_a_wider_tail() -> None:
    errors = np.random.default_rng(2).pareto(3.0, 4000)
    wide, narrow = (threshold(errors[:count], errors * 100, 1e-5) for count in (40, 4000))
    assert wide > narrow


@pytest.mark.parametrize("errors", [[np.inf] * 30, [np.nan] * 30, [*range(1, 20), np.inf]])
def test_what_is_not_known_settles_nothing(errors: list[float]) -> None:
    assert threshold(errors, np.linspace(0, 1e9, 100), 1e-5) == np.inf


@pytest.mark.parametrize("errors", [[], [-1.0], [0.0] * 5, [-1.0, 0.5]])
def test_hardly_any_errors_settle_nothing(errors: list[float]) -> None:
    assert threshold(errors, np.linspace(0, 1e9, 100), 1e-5) == np.inf


@pytest.mark.parametrize("chance", [1e-7, 1e-3, 0.04, 0.3])
def test_what_is_exceeded_with_a_chance(chance: float) -> None:
    tail = Tail.of(np.random.default_rng(5).pareto(2.0, 700))
    number = tail.exceeded(chance)
    assert tail.chance(number * (1 + 1e-9)) <= chance * (1 + 1e-6)
    assert tail.chance(number * 0.98) > chance
    assert Tail.of([]).exceeded(chance) == np.inf


def test_the_threshold_spends_the_risk() -> None:
    errors = np.random.default_rng(3).pareto(4.0, 2000)
    scores = np.random.default_rng(4).exponential(50.0, 5000)
    tail = Tail.of(errors)
    found = threshold(errors, scores, 1e-4)
    spent = tail.chance(scores[scores > found]).sum() / len(scores)
    next_lower = np.sort(scores[scores <= found])[-1]
    assert spent <= 1e-4 < spent + tail.chance(next_lower) / len(scores)
    assert threshold(errors, scores, 1e-3) < found
    doubled = safe_above(scores, tail.chance(scores), 2 + np.zeros(len(scores)), 1e-4)
    assert doubled == found
