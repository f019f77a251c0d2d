"""Minimal sets: for each class, few units whose removal takes it to chance."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from pyablate._validation import check_count
from pyablate.experiments.accuracies import (
    balanced_accuracy,
    baseline_balanced_accuracy,
    class_accuracy,
)
from pyablate.experiments.permutations import Bools
from pyablate.experiments.split import split
from pyablate.experiments.units import best_first, class_number, labels_of, opened
from pyablate.interventions import Intervention
from pyablate.network.capture_memory import same_network
from pyablate.network.sites import select
from pyablate.result import AblationResult
from pyablate.results.arrays import Floats
from pyablate.results.notebook import page
from pyablate.runs._ablate import ablate

logger = logging.getLogger("pyablate")

FIRST = 8
"""Sizes tried in the first run; each further run doubles the size reached."""

LARGEST = 64
"""Size of a set at which the search ends, unless told otherwise."""

TOGETHER = 4096
"""Sets that one run ablates while all are tried."""

MOST = 200_000
"""Sets that are tried at most."""

Set = frozenset[int]
Ablated = Callable[[Sequence[Set]], AblationResult]


@same_network()
def minimal_sets(
    model: nn.Module,
    data: Any,
    layers: str | Sequence[str],
    *,
    classes: str | int | Sequence[str | int] | None = None,
    chance: float | None = None,
    largest: int | None = None,
    prune: bool = True,
    exhaust: int = 1,
    seed: int = 0,
    intervention: str | Intervention = "zero",
    class_names: Sequence[str] | None = None,
    **options: Any,
) -> MinimalSets:
    """Find, for each class, a smallest set of units whose removal takes it to chance.

    Greedy, and each step an ablation: units are added by their single drops of the class, largest
    first (by what they add to its loss where no unit alone costs it an image), until the accuracy
    of the class is at most ``chance``; then, one at a time, units are put back without which the
    class stays at chance, the one that matters least first. What is left is *irreducible*: no unit
    of it can be put back. A smaller set of other units may exist: nothing that is known of single
    units or pairs bounds from below what three do together, so that only trying all sets of a size
    tells. Single units are tried all; ``exhaust=2`` tries all pairs as well, and so on, and takes
    the most harmful of those that take the class to chance in place of a larger set.

    A class that is at chance before anything is removed, by its accuracy or by its balanced
    accuracy (half, as where all images are taken for it), is not told apart, and has no set.

    The images are split at random into halves, class by class: sets are found on one half, and
    every figure but ``chosen_accuracy`` is measured on the other.

    Parameters
    ----------
    model, data
        As for :func:`pyablate.ablate`; the images are held in memory.
    layers : str or sequence of str
        Names or globs; sets may take units from all of them.
    classes : str, int, or sequence of these, optional
        Names or numbers; by default all classes with images.
    chance : float, optional
        Accuracy of a class that counts as lost; by default 1 / number of classes.
    largest : int, optional
        Size up to which sets are tried; by default 64, or all units if they are fewer.
    prune : bool
        Whether to put units back. Each round is a run of its own.
    exhaust : int
        Try all sets of up to so many units, where the set found is larger: C units have
        C (C - 1) / 2 pairs. 200,000 sets at most.
    seed : int
        Of the split, and as for :func:`pyablate.ablate`.
    intervention, class_names, **options
        As for :func:`pyablate.ablate`; directions cannot be removed together.

    Raises
    ------
    ValueError, TypeError
        Unknown layers or classes, options out of range, and whatever :func:`pyablate.ablate`
        raises.

    Examples
    --------
    >>> sets = pa.minimal_sets(model, data, "features.16", classes=8, largest=2, prune=False)
    >>> sets.table["class"].tolist()
    ['8']
    """
    if chance is not None and not 0 <= chance < 1:
        raise ValueError(f"chance: expected a share from 0 to below 1, got {chance!r}")
    if largest is not None:
        check_count("largest", largest)
    check_count("exhaust", exhaust)
    halves = split(data, seed=seed)
    ready = opened(model, halves.choosing, options)
    units = labels_of(select(ready.sites, layers))
    _check_all(len(units), exhaust)
    common = {"intervention": intervention, "class_names": class_names, "seed": seed, **options}

    def ablated(sets: Sequence[Set]) -> AblationResult:
        groups = [[units[unit] for unit in sorted(each)] for each in sets]
        return ablate(model, halves.choosing, groups=groups, **common)

    single = ablate(model, halves.choosing, layers, **common)
    level = 1 / single.classes if chance is None else chance
    asked = targets_of(single, classes)
    lost = _at_chance(single, level)
    targets = [target for target in asked if not lost[target]]
    rows = single.rows(units)
    harm = single.class_accuracy_drop[rows]
    # Without a class that any unit alone harms there is no order: units that back each other up.
    silent = [target for target in targets if not (harm[:, target] > 0).any()]
    if silent:
        measured = {**common, "measures": ["loss"], "guarantee": "exact"}
        losses = ablate(model, halves.choosing, layers, **measured).class_loss_change
        harm = np.where(np.isin(np.arange(single.classes), silent), losses[rows], harm)
    orders = {t: best_first(harm[:, t]).tolist() for t in targets}
    found = _grown(ablated, orders, level, min(largest or LARGEST, len(units)))
    if prune:
        _prune(ablated, found, level)
    for size in range(2, exhaust + 1):
        _try_all(ablated, found, level, len(units), size)
    distinct = list(dict.fromkeys(each.units for each in found.values()))
    groups = [[units[unit] for unit in sorted(each)] for each in distinct]
    # Where no class is told apart there are no sets; a single unit stands in for the baseline.
    result = ablate(model, halves.measuring, groups=groups or [units[:1]], **common)
    place = {each: row for row, each in enumerate(distinct)}
    lines = [
        _line(result, target, found[target], place[found[target].units], orders, units, exhaust)
        if target in found
        else _line_without(result, target, float(single.baseline_class_accuracy[target]))
        for target in asked
    ]
    return MinimalSets(pd.DataFrame(lines), level, result)


@dataclass(frozen=True, eq=False)
class MinimalSets:
    """Sets of units without which a class is lost.

    Attributes
    ----------
    table : pandas.DataFrame
        One row per class: ``class``; ``reached``, whether chance was reached on the half on which
        sets are chosen (if not, there is no set, and the rest of the row is about the most harmful
        units tried); ``told_apart``, whether the class was above chance on that half before
        anything was removed (if not, nothing is searched: ``units`` is empty and the figures are
        those of the intact network); ``size`` and ``units`` (tuple of labels, the largest single
        drop first);
        ``at_least``, units of any set that takes the class to chance on that half, as all smaller
        ones were tried, and ``minimal``, whether the set has no more than these;
        ``chosen_accuracy`` of the class on that half; and on the other half ``baseline_accuracy``,
        ``accuracy``, ``balanced_accuracy`` of the class and ``others_drop``, accuracy drop of the
        images of all other classes.
    chance : float
        Accuracy that counts as chance.
    result : AblationResult
        The ablations of the sets on the half on which they are measured, with their audit.

    Examples
    --------
    >>> sets = pa.minimal_sets(model, data, "features.16", classes=8, largest=2, prune=False)
    >>> sets.chance, bool(sets.table["size"].iloc[0] <= 2)
    (0.1, True)
    """

    table: pd.DataFrame
    chance: float
    result: AblationResult

    def __repr__(self) -> str:
        """Size in one line."""
        found = int(self.table["reached"].sum())
        return f"MinimalSets({found} sets for {len(self.table)} classes)"

    def _repr_html_(self) -> str:
        """Show the sets; a search that found none has tried some, which are none."""
        return page(repr(self), self.shown)

    @property
    def shown(self) -> pd.DataFrame:
        """The table as people read it, ``units`` as one text; of classes without a set it says so.

        Their ``size``, ``accuracy`` and ``others_drop`` are NaN.
        """
        table, reached = self.table, self.table["reached"].astype(bool)
        known = np.where(table["minimal"], "yes", [f"at least {n}" for n in table["at_least"]])
        failed = [
            f"none found: {size} units leave {100 * accuracy:.2f} %"
            if told
            else "not told apart before anything is removed"
            for size, accuracy, told in zip(
                table["size"], table["accuracy"], table["told_apart"], strict=True
            )
        ]
        figures = {
            name: table[name].astype(object).where(reached, np.nan)
            for name in ("size", "accuracy", "balanced_accuracy", "others_drop")
        }
        return table.assign(
            **figures,
            minimal=np.where(table["told_apart"], known, ""),
            units=table["units"].map(" ".join).where(reached, pd.Series(failed)),
        )


@dataclass(frozen=True)
class _Found:
    """A set for a class, and the accuracy of the class without it."""

    units: Set
    accuracy: float
    reached: bool


def targets_of(single: AblationResult, classes: Any) -> list[int]:
    """Numbers of the classes that are asked for, by default all that have images."""
    if classes is None:
        return np.flatnonzero(single.class_sizes > 0).tolist()
    given = [classes] if isinstance(classes, (str, int)) else list(classes)
    numbers = [class_number(single, each) for each in given]
    for number in numbers:
        if single.class_sizes[number] == 0:
            raise ValueError(f"classes: no images of class {single.class_names[number]!r}")
    if not numbers:
        raise ValueError("classes: expected at least one class, got none")
    return list(dict.fromkeys(numbers))


def _at_chance(single: AblationResult, level: float) -> Bools:
    """Whether each class is lost in the intact network already, bool ``[class]``.

    Of balanced accuracy half is chance, whatever accuracy the caller calls so.
    """
    balanced = baseline_balanced_accuracy(single)
    return (single.baseline_class_accuracy <= level) | (balanced <= 0.5)


def _grown(
    ablated: Ablated, orders: Mapping[int, list[int]], level: float, largest: int
) -> dict[int, _Found]:
    """Add units in order until each class is at chance; sizes by rounds that double."""
    best: dict[int, _Found] = {}
    done, size = 0, min(FIRST, largest)
    if not orders:
        return best
    while True:
        waiting = [t for t in orders if t not in best or not best[t].reached]
        sets = {t: [frozenset(orders[t][:n]) for n in range(done + 1, size + 1)] for t in waiting}
        accuracies = _accuracies(ablated, sets)
        for target in waiting:
            values = accuracies[target]
            at = np.flatnonzero(values <= level)
            place = int(at[0]) if len(at) else int(values.argmin())
            here = _Found(sets[target][place], float(values[place]), bool(len(at)))
            if target not in best or here.reached or here.accuracy < best[target].accuracy:
                best[target] = here
        if size == largest or all(each.reached for each in best.values()):
            return best
        done, size = size, min(2 * size, largest)


def _prune(ablated: Ablated, found: dict[int, _Found], level: float) -> None:
    """Put back units that are not needed, one for each class and round."""
    open_ = [target for target, each in found.items() if each.reached and len(each.units) > 1]
    while open_:
        sets = {t: [found[t].units - {unit} for unit in sorted(found[t].units)] for t in open_}
        accuracies = _accuracies(ablated, sets)
        shorter = []
        for target in open_:
            place = int(accuracies[target].argmin())
            accuracy = float(accuracies[target][place])
            if accuracy <= level:
                found[target] = _Found(sets[target][place], accuracy, reached=True)
                if len(found[target].units) > 1:
                    shorter.append(target)
        logger.debug("minimal sets: a unit less in %d of %d sets", len(shorter), len(open_))
        open_ = shorter


def _check_all(units: int, exhaust: int) -> None:
    count = sum(math.comb(units, size) for size in range(2, exhaust + 1))
    if count > MOST:
        raise ValueError(
            f"exhaust: {count:,} sets of up to {exhaust} of {units:,} units would be tried, at "
            f"most {MOST:,} can be; expected fewer, or fewer layers"
        )


def _try_all(
    ablated: Ablated, found: dict[int, _Found], level: float, units: int, size: int
) -> None:
    """Try all sets of a size, in place of larger ones and of none."""
    open_ = [t for t, each in found.items() if not each.reached or len(each.units) > size]
    best: dict[int, _Found] = {}
    every = map(frozenset, itertools.combinations(range(units), size))
    while open_ and (sets := list(itertools.islice(every, TOGETHER))):
        for target, accuracies in _accuracies(ablated, dict.fromkeys(open_, sets)).items():
            place = int(accuracies.argmin())
            accuracy = float(accuracies[place])
            if accuracy <= level and (target not in best or accuracy < best[target].accuracy):
                best[target] = _Found(sets[place], accuracy, reached=True)
    found.update(best)


def _accuracies(ablated: Ablated, sets: Mapping[int, Sequence[Set]]) -> dict[int, Floats]:
    """Accuracy of each class with each of its sets ablated; equal sets once."""
    distinct = list(dict.fromkeys(each for several in sets.values() for each in several))
    accuracy = class_accuracy(ablated(distinct))
    place = {each: row for row, each in enumerate(distinct)}
    return {
        target: accuracy[[place[each] for each in several], target]
        for target, several in sets.items()
    }


def _line(
    result: AblationResult,
    target: int,
    found: _Found,
    row: int,
    orders: Mapping[int, Sequence[int]],
    units: Sequence[str],
    exhaust: int,
) -> dict[str, Any]:
    # Of size 1 the largest single drop of the class is tried first, so that all of them are.
    at_least = min(len(found.units), exhaust + 1) if found.reached else exhaust + 1
    others = result.class_sizes.sum() - result.class_sizes[target]
    net = (result.lost - result.gained)[row]
    return {
        "class": result.class_names[target],
        "reached": found.reached,
        "told_apart": True,
        "size": len(found.units),
        "units": tuple(units[unit] for unit in orders[target] if unit in found.units),
        "at_least": at_least,
        "minimal": found.reached and len(found.units) <= at_least,
        "chosen_accuracy": found.accuracy,
        "baseline_accuracy": result.baseline_class_accuracy[target],
        "accuracy": class_accuracy(result)[row, target],
        "balanced_accuracy": balanced_accuracy(result)[row, target],
        "others_drop": (net.sum() - net[target]) / others if others else np.nan,
    }


def _line_without(result: AblationResult, target: int, chosen: float) -> dict[str, Any]:
    """Row of a class that is at chance before anything is removed."""
    accuracy = result.baseline_class_accuracy[target]
    return {
        "class": result.class_names[target],
        "reached": False,
        "told_apart": False,
        "size": 0,
        "units": (),
        "at_least": 0,
        "minimal": False,
        "chosen_accuracy": chosen,
        "baseline_accuracy": accuracy,
        "accuracy": accuracy,
        "balanced_accuracy": baseline_balanced_accuracy(result)[target],
        "others_drop": 0.0,
    }
