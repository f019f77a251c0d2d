"""Curves and minimal sets in a report: from objects, tables and files of this package."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pyablate.result import AblationResult

_KINDS = {
    "ranking": ("fraction", "share of the units removed", "seed"),
    "order": ("removed", "units removed", "repeat"),
    "layer": ("fraction", "share of the layer's units ablated", None),
}
"""Column that names a curve: its x axis, what that is, and the column that tells repeats apart."""

_NO_MEASURE = {"fraction", "seed", "removed", "kept", "repeat", "places", "units"}


def curve_charts(curves: Any) -> list[dict[str, Any]]:
    """Turn curves into what the page draws.

    Parameters
    ----------
    curves : pandas.DataFrame, Cumulative, path of a CSV file, or sequence or mapping of these
        From :func:`pyablate.prune_curve`, :func:`pyablate.sensitivity` and
        :func:`pyablate.cumulative` (or its ``to_dataframe``). A mapping names the charts.

    Returns
    -------
    list of dict
        One per chart: ``title``, ``x`` (what it is), ``measures`` (columns, accuracy first), and
        ``series``: ``name``, ``random``, ``x`` and one list of numbers per measure.

    Raises
    ------
    ValueError
        A table that is none of these.
    OSError
        A file that cannot be read.
    """
    if curves is None:
        return []
    if isinstance(curves, Mapping):
        named = {str(name): each for name, each in curves.items()}
    else:
        several = curves if isinstance(curves, Sequence) and not isinstance(curves, str) else [curves]
        named = {_title(each, number): each for number, each in enumerate(several, start=1)}
    return [_chart(title, _frame(each)) for title, each in named.items()]


def sets_by_class(given: Any, result: AblationResult) -> list[dict[str, Any] | None]:
    """Arrange minimal sets by the classes of a result.

    Parameters
    ----------
    given : MinimalSets, pandas.DataFrame, path of a CSV file, or None
        From :func:`pyablate.minimal_sets`; of a table the columns ``class`` and ``units`` are needed
        (labels in a sequence, or in one text with spaces, commas or semicolons between).
    result : AblationResult
        Whose classes.

    Returns
    -------
    list of (dict or None)
        One per class: ``units`` (labels), and as far as known ``reached``, ``baseline_accuracy``,
        ``accuracy`` and ``others_drop``.

    Raises
    ------
    ValueError
        Columns are missing, or a class is none of the result's.
    OSError
        A file that cannot be read.
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


_SET_FIGURES = ("baseline_accuracy", "accuracy", "others_drop")


def _title(curves: Any, number: int) -> str:
    return Path(curves).name if isinstance(curves, str | Path) else f"Curves {number}"


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
    for name, (x, label, repeat) in _KINDS.items():
        if name in table and x in table and "accuracy" in table:
            break
    else:
        raise ValueError(
            f"curves: {title}: expected the columns ranking and fraction (prune_curve), order and "
            f"removed (cumulative) or layer and fraction (sensitivity), and accuracy, got "
            f"{_listed(table)}"
        )
    numeric = [str(c) for c in table.select_dtypes("number") if c not in _NO_MEASURE]
    measures = ["accuracy", *(c for c in numeric if c != "accuracy" and table[c].notna().any())]
    keys = [name, *([repeat] if repeat in table else []), *(["target"] if "target" in table else [])]
    series = []
    for key, lines in table.groupby(keys, sort=False, dropna=False):
        first = str(key[0])
        target = str(key[-1]) if "target" in table and pd.notna(key[-1]) and key[-1] else ""
        ordered = lines.sort_values(x)
        series.append(
            {
                "name": f"{first}: {target}" if target else first,
                "random": first.startswith("random"),
                "x": _numbers(ordered[x]),
                "values": {measure: _numbers(ordered[measure]) for measure in measures},
            }
        )
    return {"title": title, "x": label, "measures": measures, "series": series}


def _labels(units: Any) -> list[str]:
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
