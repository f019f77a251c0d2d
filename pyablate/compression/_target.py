"""How many places of a ranking go until a target is met: FLOPs, latency, accuracy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pandas as pd

from pyablate._validation import check_fraction


@dataclass(frozen=True)
class Target:
    """What a smaller network has to be like.

    Attributes
    ----------
    flops, latency : float or None
        Share of the original's that may be left.
    accuracy : float or None
        Lowest accuracy, a share.
    """

    flops: float | None = None
    latency: float | None = None
    accuracy: float | None = None

    def __post_init__(self) -> None:
        """Refuse what is no share."""
        for name, share in self.wanted.items():
            check_fraction(name, share)

    @property
    def wanted(self) -> dict[str, float]:
        """What is asked for, by name."""
        every = {"flops": self.flops, "latency": self.latency, "accuracy": self.accuracy}
        return {name: share for name, share in every.items() if share is not None}


Measure = Callable[[int], float]
"""A figure of the network without so many places."""


def search(target: Target, most: int, measures: dict[str, Measure]) -> tuple[int, pd.DataFrame]:
    """Find how many of at most ``most`` places go; tell what was tried.

    As few as meet the targets of FLOPs and latency; without these as many as the accuracy allows.
    Where it does not allow so many, the most that it does. By bisection, as if each figure fell
    with every place that goes.

    Parameters
    ----------
    target : Target
        What is asked for.
    most : int
        Places that may go.
    measures : dict of str to callable
        What of the target can be measured, by name.

    Returns
    -------
    int
        How many go.
    pandas.DataFrame
        One row per number tried: ``places``, what was measured, and ``chosen``.

    Raises
    ------
    ValueError
        The whole network is less accurate than asked for.
    """
    wanted, known = target.wanted, {name: cache(measures[name]) for name in target.wanted}
    tried: dict[int, dict[str, float]] = {}

    def figure(name: str, places: int) -> float:
        found = known[name](places)
        tried.setdefault(places, {})[name] = found
        return found

    def small(places: int) -> bool:
        costs = [name for name in wanted if name != "accuracy"]
        return all(figure(name, places) <= wanted[name] for name in costs)

    count = most if set(wanted) == {"accuracy"} else _least(small, most)
    floor = target.accuracy
    if floor is not None and figure("accuracy", count) < floor:
        whole = figure("accuracy", 0)
        if whole < floor:
            raise ValueError(
                f"accuracy: expected at most {whole:.4f}, that of the whole network, got {floor}"
            )
        count = _least(lambda places: figure("accuracy", places) < floor, count) - 1
    for name in wanted:
        figure(name, count)
    rows = [{"places": places} | tried[places] for places in sorted(tried)]
    steps = pd.DataFrame(rows, columns=["places", *wanted])
    return count, steps.assign(chosen=steps["places"] == count)


def _least(holds: Callable[[int], bool], most: int) -> int:
    """Return the least number for which something holds, if it holds for all above; else most."""
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
