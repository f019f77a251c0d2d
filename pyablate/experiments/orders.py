"""In which order units are removed: by a number of their own, by what they do, or at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from pyablate._validation import nearest
from pyablate.experiments.units import best_first
from pyablate.result import AblationResult
from pyablate.results.arrays import Ints

DROP, CLASS, RANDOM = "drop", "class", "random"
BY_NAME = (DROP, CLASS, RANDOM)


@dataclass(frozen=True, eq=False)
class Order:
    """One order of all units.

    Attributes
    ----------
    name : str
        Of what it is made by.
    ranks : int64 [unit]
        Positions of the units, the one to remove first in front.
    repeat : int
        Of random orders, which.
    target : int
        Class whose drop it is made by; -1 for none.
    """

    name: str
    ranks: Ints
    repeat: int = 0
    target: int = -1


def named(order: Any) -> dict[str, Any]:
    """Give every order a name: a single one, a mapping, or the columns of a table."""
    if isinstance(order, Mapping):
        found = {str(name): each for name, each in order.items()}
    elif isinstance(order, pd.DataFrame):
        numeric = order.select_dtypes("number")
        found = {str(name): numeric[name] for name in numeric}
    elif isinstance(order, str):
        found = {order: order}
    else:
        name = getattr(order, "name", None)
        found = {"given" if name is None else str(name): order}
    for each in found.values():
        if isinstance(each, str) and each not in BY_NAME:
            raise ValueError(
                f"order: expected {', '.join(map(repr, BY_NAME))}, numbers by unit label or a list "
                f"of labels, got {each!r}{nearest(each, BY_NAME, 1)}"
            )
    if not found:
        raise ValueError("order: expected at least one order, got none")
    return found


def measured(orders: Mapping[str, Any]) -> bool:
    """Whether any of them needs the units ablated one by one first."""
    return any(isinstance(each, str) and each in (DROP, CLASS) for each in orders.values())


def orders_of(
    name: str,
    spec: Any,
    labels: Sequence[str],
    ranking: AblationResult | None,
    *,
    ascending: bool,
    repeats: int,
    generator: np.random.Generator,
) -> list[Order]:
    """Turn one specification into orders of the units ``labels``."""
    if isinstance(spec, str) and spec == RANDOM:
        return [Order(name, generator.permutation(len(labels)), turn) for turn in range(repeats)]
    sign = -1.0 if ascending else 1.0
    if isinstance(spec, str):
        assert ranking is not None
        rows = ranking.rows(list(labels))
        if spec == DROP:
            return [Order(name, best_first(sign * ranking.accuracy_drop[rows]))]
        drops = ranking.class_accuracy_drop[rows]
        return [
            Order(name, best_first(sign * drops[:, target]), target=target)
            for target in np.flatnonzero(ranking.class_sizes > 0).tolist()
        ]
    listed = _listed(name, spec, labels)
    if listed is not None:
        return [Order(name, listed)]
    return [Order(name, best_first(sign * _numbers(name, spec, labels)))]


def _listed(name: str, spec: Any, labels: Sequence[str]) -> Ints | None:
    """Positions of units that are given as a list of labels; None if it is something else."""
    if not isinstance(spec, (list, tuple, np.ndarray, pd.Index)):
        return None
    if not all(isinstance(item, str) for item in spec) or not len(spec):
        return None
    place = {label: position for position, label in enumerate(labels)}
    for label in spec:
        if label not in place:
            hint = nearest(label, labels, 1)
            raise ValueError(f"order {name!r}: no unit {label!r} here{hint}")
    if len(set(spec)) < len(spec) or len(spec) < len(labels):
        raise ValueError(
            f"order {name!r}: expected each of the {len(labels)} units once, got {len(spec)} "
            f"labels, {len(set(spec))} of them different"
        )
    return np.array([place[label] for label in spec])


def _numbers(name: str, spec: Any, labels: Sequence[str]) -> np.ndarray:
    """One number for each unit: by label where there are labels, by position otherwise."""
    if hasattr(spec, "coords") and "unit" in spec.coords:  # an xarray.DataArray
        if spec.ndim != 1:
            raise ValueError(f"order {name!r}: expected one number per unit, got {spec.dims}")
        spec = pd.Series(spec.to_numpy(), index=spec["unit"].to_numpy())
    if isinstance(spec, pd.Series):
        index = spec.index.astype(str)
        there = set(index)
        missing = [label for label in labels if label not in there]
        twice = index[index.duplicated()]
        if missing or len(twice):
            what = f"{missing[0]!r} is missing" if missing else f"{twice[0]!r} is there twice"
            raise ValueError(
                f"order {name!r}: expected one number for each of {len(labels)} units by label, "
                f"but {what}"
            ) from None
        spec = spec.set_axis(index).loc[list(labels)]
    try:
        numbers = np.asarray(spec, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"order {name!r}: expected numbers, got {type(spec).__name__}") from None
    if numbers.shape != (len(labels),):
        raise ValueError(
            f"order {name!r}: expected {len(labels)} numbers, one for each unit, got shape "
            f"{numbers.shape}"
        )
    return numbers
