"""Curves and minimal sets in a report: from objects, tables and files of this package."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pyablate.plots.curves import guessing
from pyablate.plots.drawing import label_of
from pyablate.results.record import Record


@dataclass(frozen=True)
class _Kind:
    """A table of curves: which column names a curve, is its x axis, tells repeats apart."""

    name: str
    x: str
    label: str
    repeat: str


_KINDS = (
    _Kind("ranking", "fraction", "share of the units removed", "seed"),
    _Kind("order", "removed", "units removed", "repeat"),
    _Kind("layer", "fraction", "share of the layer's units ablated", ""),
)
_NO_MEASURE = ("fraction", "seed", "removed", "kept", "repeat", "places", "units", "chance")
_SET_FIGURES = ("baseline_accuracy", "accuracy", "others_drop")


def curve_charts(curves: Any) -> list[dict[str, Any]]:
    """Turn curves into what the page draws; a mapping names the charts.

    Curves are a table or CSV file, or several, of :func:`pyablate.prune_curve`,
    :func:`pyablate.sensitivity` or :func:`pyablate.cumulative`. Each chart has a ``title``, ``x``
    (what it is), ``measures`` (columns, accuracy first: ``name``, ``label``, ``scale`` to multiply
    by, and ``chance``, what guessing gets, or None), and ``series``: ``name``, ``random``, ``x``
    and one list of numbers per measure.
    """
    if curves is None:
        return []
    if isinstance(curves, Mapping):
        return [_chart(str(title), _frame(each)) for title, each in curves.items()]
    several = curves if isinstance(curves, list | tuple) else [curves]
    titles = _titles(several)
    return [_chart(title, _frame(each)) for title, each in zip(titles, several, strict=True)]


def sets_by_class(given: Any, result: Record) -> list[dict[str, Any] | None]:
    """Arrange minimal sets by the classes of a result.

    A table needs the columns ``class`` and ``units`` (labels in a sequence, or in one text with
    spaces, commas or semicolons between). Each class has None or ``units`` (labels), and as far as
    known ``reached``, ``baseline_accuracy``, ``accuracy`` and ``others_drop``.
    """
    sets: list[dict[str, Any] | None] = [None] * result.classes
    if given is None:
        return sets
    table = _frame(getattr(given, "table", given))
    for column in ("class", "units"):
        if column not in table:
            raise ValueError(f"minimal_sets: expected a column {column!r}, got {_listed(table)}")
    number = {name: k for k, name in enumerate(result.class_names)}
    for line in table.to_dict("records"):
        name = str(line["class"])
        if name not in number:
            raise ValueError(f"minimal_sets: {name!r} is no class of the result")
        figures = {key: _number(line.get(key)) for key in _SET_FIGURES}
        reached = line.get("reached")
        sets[number[name]] = {
            "units": _labels(line["units"]),
            "reached": None if reached is None else str(reached).lower() in ("true", "1", "1.0"),
            **figures,
        }
    return sets


def _titles(several: Sequence[Any]) -> list[str]:
    """Name curves by their files, with as many folders as tell them apart, or by numbers."""
    titles = [f"Curves {number}" for number in range(1, len(several) + 1)]
    paths = {i: Path(each) for i, each in enumerate(several) if isinstance(each, str | Path)}
    for i, path in paths.items():
        others = [other for j, other in paths.items() if j != i]
        depths = range(1, len(path.parts) + 1)
        apart = (n for n in depths if path.parts[-n:] not in [o.parts[-n:] for o in others])
        tail = next(apart, None)
        shown = path.name if tail is None else "/".join(path.parts[-tail:])
        titles[i] = f"{shown} ({i + 1})" if tail is None else shown
    return titles


def _frame(given: Any) -> pd.DataFrame:
    if isinstance(given, str | Path):
        path = Path(given)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such table")
        try:
            return pd.read_csv(path, keep_default_na=True)
        except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
            raise OSError(f"{path}: not a CSV file: {error}") from None
    if isinstance(given, pd.DataFrame):
        return given
    if callable(getattr(given, "to_dataframe", None)):
        made: pd.DataFrame = given.to_dataframe()
        return made
    raise TypeError(
        f"curves, minimal_sets: expected a table or the path of one, got {type(given).__name__}"
    )


def _chart(title: str, table: pd.DataFrame) -> dict[str, Any]:
    kind = next((k for k in _KINDS if {k.name, k.x, "accuracy"} <= set(table.columns)), None)
    if kind is None:
        raise ValueError(
            f"curves: {title}: expected the columns ranking and fraction (prune_curve), order and "
            f"removed (cumulative) or layer and fraction (sensitivity), and accuracy, got "
            f"{_listed(table)}"
        )
    figures = table.drop(columns=[*_NO_MEASURE, "accuracy"], errors="ignore")
    numeric = figures.select_dtypes("number").dropna(axis="columns", how="all")
    measures = ["accuracy", *map(str, numeric.columns)]
    keys = [name for name in (kind.name, kind.repeat, "target") if name in table]
    series = []
    for _, lines in table.groupby(keys, sort=False, dropna=False):
        ordered = lines.sort_values(kind.x)
        name = str(ordered[kind.name].iloc[0])
        target = ordered["target"].iloc[0] if "target" in ordered else ""
        series.append(
            {
                "name": f"{name}: {target}" if isinstance(target, str) and target else name,
                "random": name.startswith("random"),
                "x": _numbers(ordered[kind.x]),
                "values": {measure: _numbers(ordered[measure]) for measure in measures},
            }
        )
    described = [_measure(table, name) for name in measures]
    return {"title": title, "x": kind.label, "measures": described, "series": series}


def _measure(table: pd.DataFrame, name: str) -> dict[str, Any]:
    label, scale = label_of(name)
    return {"name": name, "label": label, "scale": scale, "chance": guessing(table, name)}


def _labels(units: Any) -> list[str]:
    if isinstance(units, float):  # an empty cell of a CSV file
        return []
    if not isinstance(units, str):
        return [str(unit) for unit in units]
    if units.startswith(("(", "[")):  # as a tuple of labels comes out of a CSV file
        try:
            return [str(unit) for unit in ast.literal_eval(units)]
        except (ValueError, SyntaxError):
            raise ValueError(f"minimal_sets: cannot read the units {units!r}") from None
    return units.replace(",", " ").replace(";", " ").split()


def _numbers(column: pd.Series) -> list[float | None]:
    return [_number(value) for value in column]


def _number(value: Any) -> float | None:
    """Return a finite number, None for anything else: JSON has no NaN."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) else None


def _listed(table: pd.DataFrame) -> str:
    return ", ".join(map(repr, table.columns))
