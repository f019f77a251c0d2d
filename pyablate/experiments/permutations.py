"""Shapley values of a game, estimated from random permutations of its units.

A game is a function of sets of units: what is lost without them. The Shapley value of a unit is
what is lost when it goes, on average over all orders in which the units can go. Which game it is
does not matter here; nothing here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from pyablate._validation import check_choice, check_count, check_level
from pyablate.results.arrays import Floats, Ints

Bools = NDArray[np.bool_]
Lost = Callable[[Ints, Ints, Ints], Floats]
"""``lost(ranks, order, count)``: what is lost without the first ``count[i]`` units of the order
``order[i]``, in which unit ``u`` is at place ``ranks[order[i], u]``; int64 [order, unit], [set] and
[set] to float64 [set]."""

INTERVALS = ("bernstein", "student")

RANGE = 2.0
"""Width of what a unit may add to a share: from -1 to 1."""

LOOKS = 10
"""How often it is asked which units are decided, at most."""

BETWEEN = 10
"""Permutations from one look to the next, at least: of fewer no variance is known."""

STAGES = 4
"""In how many parts the sets of an order are evaluated where it may be truncated."""


@dataclass(frozen=True)
class Rules:
    """How long to sample, and what counts as known; see :func:`pyablate.shapley`."""

    permutations: int
    top: int | None
    truncation: float | None
    tolerance: float
    confidence: float
    interval: str

    def check(self, units: int) -> None:
        """Refuse what is out of range, for so many units."""
        check_count("permutations", self.permutations)
        check_level("confidence", self.confidence)
        check_choice("interval", self.interval, INTERVALS)
        _check_distance("tolerance", self.tolerance)
        if self.truncation is not None:
            _check_distance("truncation", self.truncation)
        if self.top is not None:
            check_count("top", self.top)
            if self.top >= units:
                raise ValueError(f"top: expected fewer than all {units} units, got {self.top}")

    @property
    def rounds(self) -> list[int]:
        """Permutations between one look and the next.

        All but the first are of one size. So a unit that takes part in some rounds, whichever, has
        one of as many numbers of samples as there are rounds, and its intervals for all of these
        hold together.
        """
        looks = max(1, min(LOOKS, self.permutations // BETWEEN))
        if self.top is None and self.tolerance == 0:  # nothing to decide on the way
            looks = 1
        size = self.permutations // looks
        return [self.permutations - (looks - 1) * size] + [size] * (looks - 1)


def _check_distance(argument: str, given: Any) -> None:
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given < math.inf:
        raise ValueError(f"{argument}: expected a number of at least 0, got {given!r}")


@dataclass(frozen=True, eq=False)
class Estimates:
    """Estimated Shapley values, one of each unit.

    Attributes
    ----------
    value, standard_error, lower, upper : float64 [unit]
        Mean over the samples, its standard error (NaN for a single sample) and interval.
    samples : int64 [unit]
        Permutations in which the unit was evaluated, or counted as 0 since they were truncated.
    decided : bool [unit]
        Whether the unit is known as well as was asked for.
    permutations : int
        Permutations drawn.
    total : float
        What is lost without all units.
    """

    value: Floats
    standard_error: Floats
    lower: Floats
    upper: Floats
    samples: Ints
    decided: Bools
    permutations: int
    total: float


def estimate(lost: Lost, units: int, rules: Rules, generator: np.random.Generator) -> Estimates:
    """Sample permutations until all units are decided or as many are drawn as the rules allow.

    Parameters
    ----------
    lost : callable
        The game.
    units : int
        How many there are.
    rules : Rules
        When to stop.
    generator : numpy.random.Generator
        Of the permutations.

    Raises
    ------
    ValueError
        Every permutation would be truncated at once.
    """
    everything = float(lost(np.arange(units)[None], np.array([0]), np.array([units]))[0])
    if rules.truncation is not None and abs(everything) <= rules.truncation:
        raise ValueError(
            f"truncation: expected less than {abs(everything):.4g}, the change of performance "
            f"without all units, got {rules.truncation!r}"
        )
    count = np.zeros(units, dtype=np.int64)
    value, squares = np.zeros((2, units))  # means, and sums of squared deviations from them
    active = np.ones(units, dtype=bool)
    drawn = 0
    for size in rules.rounds:
        orders = generator.permuted(np.tile(np.arange(units), (size, 1)), axis=1)
        added = _marginals(lost, everything, orders, active, rules.truncation)
        mean = added.mean(axis=0)
        apart, share = mean - value[active], size / (count[active] + size)
        value[active] += apart * share
        squares[active] += np.square(added - mean).sum(axis=0)
        squares[active] += np.square(apart) * share * count[active]
        count[active] += size
        drawn += size
        error, width = _errors(count, squares, rules)
        lower, upper = value - width, value + width
        if rules.interval == "bernstein":
            lower, upper = np.maximum(lower, -RANGE / 2), np.minimum(upper, RANGE / 2)
        decided = _decided(value, lower, upper, rules)
        active = ~decided
        if not active.any():
            break
    return Estimates(value, error, lower, upper, count, decided, drawn, everything)


def _marginals(
    lost: Lost, everything: float, orders: Ints, active: Bools, truncation: float | None
) -> Floats:
    """Take what is lost when each active unit goes, float64 [permutation, active unit]."""
    drawn, units = orders.shape
    ranks = np.argsort(orders, axis=1)
    asked = active[orders]
    needed = np.zeros((drawn, units + 1), dtype=bool)  # the sets before and after each of them
    needed[:, 1:] |= asked
    needed[:, :-1] |= asked
    known = np.full((drawn, units + 1), np.nan)
    known[:, 0], known[:, -1] = 0.0, everything
    needed[:, [0, -1]] = False
    ended = np.zeros_like(needed)
    for some in _stages(units, 1 if truncation is None else STAGES):
        here = np.zeros_like(needed)
        here[:, some] = needed[:, some] & ~ended[:, some.start - 1, None]
        order, length = np.nonzero(here)
        if len(order):
            known[order, length] = lost(ranks, order, length)
        if truncation is not None:
            near = np.abs(known - everything) <= truncation  # never where nothing is known
            ended = np.logical_or.accumulate(near, axis=1)
    steps = np.where(ended[:, :-1], 0.0, known[:, 1:] - known[:, :-1])
    return np.take_along_axis(steps, ranks, axis=1)[:, active]


def _stages(units: int, count: int) -> Iterator[slice]:
    """Yield parts of the sizes from 1 to units - 1, small ones first."""
    bounds = np.unique(np.linspace(1, units, count + 1).round().astype(int)).tolist()
    for start, stop in pairwise(bounds):
        yield slice(start, stop)


def _errors(count: Ints, squares: Floats, rules: Rules) -> tuple[Floats, Floats]:
    """Give standard errors of means, and half-widths of their intervals, float64 [unit]."""
    degrees = np.where(count > 1, count - 1, np.nan)
    error = np.sqrt(squares / degrees / count)
    risk = (1 - rules.confidence) / (len(count) * len(rules.rounds))  # of one interval
    if rules.interval == "bernstein":
        term = math.log(4 / risk)  # of one side
        width = np.sqrt(2 * term) * error + 7 * RANGE * term / (3 * degrees)
    else:
        width = stats.t.isf(risk / 2, degrees) * error
    return error, np.where(count > 1, width, np.inf)


def _decided(value: Floats, lower: Floats, upper: Floats, rules: Rules) -> Bools:
    """Which units are known as well as was asked for, bool [unit]."""
    if rules.top is None:
        known: Bools = (upper - lower) / 2 < rules.tolerance
        return known
    largest = np.sort(value)[::-1]
    between = (largest[rules.top - 1] + largest[rules.top]) / 2
    apart: Bools = (lower > between - rules.tolerance) | (upper < between + rules.tolerance)
    return apart
