"""Targets: measures of a unit's importance that its attributes may predict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from pyablate._validation import nearest
from pyablate.analysis.shrinkage import shrunken_drop
from pyablate.analysis.statistics import split_half_drop
from pyablate.results.arrays import Floats, Ints
from pyablate.results.record import Record

PREFERRED = "preferred_class_drop"
TARGETS = ("accuracy_drop", "split_half_drop", PREFERRED, "gini", "entropy")
SHRUNKEN = "shrunken_drop"
NEEDS_ALL = {"split_half_drop", "gini", "entropy"}
"""Targets that an estimated run cannot give."""

CELL_TARGET = "class_accuracy_drop"
"""Target of cells of unit and class."""

# Only where a run recorded them.
MEASURES = ("loss_change", "margin_change")


def unit_targets(
    result: Record,
    targets: str | Sequence[str] | Mapping[str, ArrayLike] | None = None,
    *,
    preferred: Ints | None = None,
    splits: int = 10,
    seed: int = 0,
) -> dict[str, Floats]:
    """Compute one number per unit for each target.

    Parameters
    ----------
    result : AblationResult
        What was ablated.
    targets : str, sequence of str, or mapping of str to numbers [unit], optional
        ``accuracy_drop``; ``split_half_drop`` (the largest class drop without the bias of choosing
        its class); ``preferred_class_drop`` (drop of the class that the unit prefers); ``gini`` and
        ``entropy`` of the class drops; by name only ``shrunken_drop``
        (:func:`pyablate.analysis.shrinkage.shrunken_drop`); ``loss_change`` and ``margin_change``
        where the run recorded them; or any other variable of ``result.data`` over ``unit`` alone. A
        mapping brings numbers of its own. By default all that can be had.
    preferred : int64 [unit], optional
        Preferred class of each unit, -1 for none.
    splits, seed : int
        Of :func:`pyablate.analysis.statistics.split_half_drop`.

    Returns
    -------
    dict of str to float64 [unit]

    Raises
    ------
    ValueError
        Unknown target, preferred classes needed and not given, numbers of another length.

    Examples
    --------
    >>> from pyablate.analysis.targets import unit_targets
    >>> list(unit_targets(result, ["accuracy_drop", "gini"]))
    ['accuracy_drop', 'gini']
    """
    if isinstance(targets, Mapping):
        return {str(name): _given(result, name, values) for name, values in targets.items()}
    if targets is None:
        measured = [name for name in MEASURES if name in _recorded(result)]
        left_out = set() if preferred is not None else {PREFERRED}
        if result.estimate is not None:
            left_out |= NEEDS_ALL
        targets = [t for t in TARGETS if t not in left_out] + measured
    names = [targets] if isinstance(targets, str) else list(targets)
    return {name: _target(result, name, preferred, splits, seed) for name in names}


def cell_targets(
    result: Record, targets: str | Sequence[str] | Mapping[str, ArrayLike] | None = None
) -> dict[str, Floats]:
    """Take variables of the result over unit and class, by default ``class_accuracy_drop``.

    Returns
    -------
    dict of str to float64 [unit, class]
        NaN for classes without images.

    Raises
    ------
    ValueError
        The result has no such variable, or numbers are given, which have no class.

    Examples
    --------
    >>> from pyablate.analysis.targets import cell_targets
    >>> cell_targets(result)["class_accuracy_drop"].shape
    (128, 10)
    """
    if isinstance(targets, Mapping):
        raise ValueError("targets: expected names of variables over unit and class, got a mapping")
    names = [CELL_TARGET] if targets is None else targets
    known = [str(name) for name, of in result.data.items() if of.dims == ("unit", "class")]
    found = {}
    for name in [names] if isinstance(names, str) else names:
        if name not in known:
            raise ValueError(f"targets: no target {name!r} of unit and class{nearest(name, known)}")
        values = result.data[name].to_numpy().astype(np.float64)
        found[name] = np.where(result.class_sizes > 0, values, np.nan)
    return found


def preferred_class_drop(result: Record, preferred: Ints) -> Floats:
    """Accuracy drop of each unit's preferred class; NaN without one or without its images.

    Parameters
    ----------
    result : AblationResult
        What was ablated.
    preferred : int64 [unit]
        Class numbers, -1 for none.

    Returns
    -------
    ndarray
        float64 ``[unit]``.

    Raises
    ------
    ValueError
        A class number is out of range.

    Examples
    --------
    >>> from pyablate.analysis.targets import preferred_class_drop
    >>> preferred_class_drop(result, result.max_class).shape
    (128,)
    """
    if preferred.max(initial=-1) >= result.classes or preferred.min(initial=0) < -1:
        wrong = preferred[(preferred >= result.classes) | (preferred < -1)][0]
        raise ValueError(f"preferred: expected classes 0 to {result.classes - 1}, got {wrong}")
    drops = result.class_accuracy_drop[np.arange(len(preferred)), preferred]
    return np.where(preferred >= 0, drops, np.nan)


def gini(drops: Floats) -> Floats:
    """Gini coefficient of the harm over the classes: 0 if all suffer alike, near 1 if one does.

    ``sum_jk |h_j - h_k| / (2 K^2 mean(h))`` with the harm ``h = max(drop, 0)``: gains are no
    harm, and the coefficient has no meaning below zero. The largest value is ``1 - 1/K``.

    Parameters
    ----------
    drops : float64 [unit, class]
        Class accuracy drops; NaN for classes that do not count.

    Returns
    -------
    ndarray
        float64 ``[unit]``; NaN for a unit that harms no class.

    Examples
    --------
    >>> from pyablate.analysis.targets import gini
    >>> gini(np.array([[0.1, 0.1, 0.1, 0.1], [0.4, 0, 0, 0]])).round(2).tolist()
    [0.0, 0.75]
    """
    harm = np.sort(_harm(drops), axis=1)
    classes = harm.shape[1]
    total = harm.sum(axis=1)
    ranked = harm @ np.arange(1, classes + 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        coefficient: Floats = 2 * ranked / (classes * total) - (classes + 1) / classes
    return np.where(total > 0, coefficient, np.nan)


def entropy(drops: Floats) -> Floats:
    """Entropy of the harm over the classes, in nats: small if few classes suffer.

    ``-sum_k s_k log s_k`` with the shares ``s = h / sum(h)`` of the harm ``h = max(drop, 0)``; from
    0 (one class) to ``log K``.

    Parameters
    ----------
    drops : float64 [unit, class]
        Class accuracy drops; NaN for classes that do not count.

    Returns
    -------
    ndarray
        float64 ``[unit]``; NaN for a unit that harms no class.

    Examples
    --------
    >>> from pyablate.analysis.targets import entropy
    >>> entropy(np.array([[0.1, 0.1], [0.4, 0]])).round(2).tolist()
    [0.69, 0.0]
    """
    harm = _harm(drops)
    harmful = harm.sum(axis=1) > 0
    found = np.full(len(harm), np.nan)
    found[harmful] = stats.entropy(harm[harmful], axis=1)
    return found


def _target(result: Record, name: str, preferred: Ints | None, splits: int, seed: int) -> Floats:
    if name == PREFERRED:
        if preferred is None:
            raise ValueError(f"targets: {name!r} needs the preferred class of each unit")
        return preferred_class_drop(result, preferred)
    if name == "accuracy_drop":
        return result.accuracy_drop
    if name == SHRUNKEN:
        return shrunken_drop(result)
    if name == "split_half_drop":
        return split_half_drop(result, splits=splits, seed=seed)
    if name in ("gini", "entropy"):
        result.check_complete(name)
        return (gini if name == "gini" else entropy)(result.class_accuracy_drop)
    if name in MEASURES:
        changes: Floats = getattr(result, name)  # says what is missing where it was not recorded
        return changes
    known = [*TARGETS, SHRUNKEN, *_recorded(result)]
    if name not in known:
        raise ValueError(f"targets: no target {name!r}{nearest(name, known)}")
    return result.data[name].to_numpy().astype(np.float64)


def _recorded(result: Record) -> list[str]:
    return [str(name) for name, data in result.data.items() if data.dims == ("unit",)]


def _given(result: Record, name: str, values: ArrayLike) -> Floats:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.shape != (len(result.units),):
        raise ValueError(
            f"targets: expected {len(result.units)} numbers for {name!r}, one for each unit, "
            f"got shape {numbers.shape}"
        )
    return numbers


def _harm(drops: Floats) -> Floats:
    counted = drops[:, ~np.isnan(drops).all(axis=0)]
    return np.maximum(counted, 0.0)
