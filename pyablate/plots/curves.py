"""Curves: accuracy against what was removed."""

from __future__ import annotations

import math
from itertools import cycle
from typing import TYPE_CHECKING, Any, Protocol

import pandas as pd

from pyablate._validation import check_choice
from pyablate.plots.drawing import (
    CHANCE,
    COLOURS,
    MARKERS,
    entry,
    label_of,
    legend,
    new_axes,
    plain,
    stretch,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Curves(Protocol):
    """Curves that can be had as a table."""

    def to_dataframe(self) -> pd.DataFrame:
        """One row per point."""


def cumulative_curves(
    curves: Curves | pd.DataFrame,
    *,
    x: str = "removed",
    y: str = "accuracy",
    log: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw accuracy against units removed; several random orders as a band from worst to best.

    A dotted line is what guessing gets.

    Parameters
    ----------
    curves : Cumulative or pandas.DataFrame
        From :func:`pyablate.cumulative`, or its ``to_dataframe()``.
    x : str
        ``"removed"`` or ``"kept"``.
    y : str
        ``"accuracy"``, or of curves made for a class ``"target_accuracy"`` or
        ``"target_balanced_accuracy"``; curves without a class are then left out.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default a new figure.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    ValueError, TypeError
        Other curves, no such column, or nothing in it.

    Examples
    --------
    >>> curves = pa.cumulative(model, data, "features.16", order="random", steps=2, repeats=1)
    >>> axes = pa.plots.cumulative_curves(curves)
    >>> len(axes.lines) > 0
    True
    """
    table = _table(curves, "pa.cumulative", ("order", "target", "removed"))
    order = table["order"].astype(str)
    target = table["target"].fillna("").astype(str)  # empty cells of a CSV file come as NaN
    name = order.where(target == "", order + ": " + target)
    return _curves(table.assign(name=name), "removed", x, y, log, ax)


def prune_curves(
    curves: pd.DataFrame,
    *,
    x: str = "fraction",
    y: str = "accuracy",
    log: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw the curves of :func:`pyablate.prune_curve`, random orders as a band from worst to best.

    A dotted line is what guessing gets.

    Parameters
    ----------
    curves : pandas.DataFrame
        From :func:`pyablate.prune_curve`.
    x, y : str
        Columns, for example ``"flops"`` and ``"worst_class_accuracy"``.
    log : bool
        Whether the axis across is logarithmic, beyond numbers near 0.
    ax : matplotlib.axes.Axes, optional
        Where to draw; by default a new figure.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    ValueError, TypeError
        Other curves, no such column, or nothing in it.

    Examples
    --------
    >>> norms = pa.compression.filter_ranking(model, images[:2], "l1")
    >>> curves = pa.prune_curve(model, data, norms, fractions=[0.1, 0.5], seeds=1)
    >>> axes = pa.plots.prune_curves(curves, x="flops")
    >>> len(axes.lines) > 0
    True
    """
    table = _table(curves, "pa.prune_curve", ("ranking", "fraction"))
    return _curves(table.assign(name=table["ranking"].astype(str)), "fraction", x, y, log, ax)


def _table(curves: Any, maker: str, columns: tuple[str, ...]) -> pd.DataFrame:
    table = curves.to_dataframe() if hasattr(curves, "to_dataframe") else curves
    if not isinstance(table, pd.DataFrame):
        raise TypeError(f"curves: expected those of {maker}, got {type(curves).__name__}")
    for column in columns:
        if column not in table:
            found = ", ".join(map(str, table.columns))
            raise ValueError(f"curves: expected a column {column!r} of {maker}, got {found}")
    return table


def _curves(table: pd.DataFrame, step: str, x: str, y: str, log: bool, ax: Axes | None) -> Axes:
    """Draw ``y`` against ``x``, a line for each name; where a step comes again, mean and range."""
    for argument, column in (("x", x), ("y", y)):
        check_choice(argument, column, list(table.select_dtypes("number").columns))
        if table[column].isna().all():
            raise ValueError(f"{argument}: no curve has {column!r}")
    axes = new_axes(ax, width=6.4, height=4.4)
    x_label, x_scale = label_of(x, table[x].max())
    y_label, y_scale = label_of(y, table[y].max())
    named = table.dropna(subset=[x, y]).groupby("name", sort=False)
    # A second round of the colours is dashed.
    dashes = cycle(["-"] * len(COLOURS) + ["--"] * len(COLOURS))
    styles = zip(named, cycle(COLOURS), cycle(MARKERS), dashes, strict=False)
    for (name, of_name), colour, marker, dash in styles:
        points = of_name.groupby(step)[[x, y]]
        across, mean = x_scale * points.mean()[x], y_scale * points.mean()[y]
        several = bool((points.size() > 1).any())
        shade = CHANCE if str(name).startswith("random") else colour
        label = entry(f"{name} (mean, range)" if several else str(name))
        style: dict[str, Any] = {"color": shade, "linestyle": dash, "marker": marker}
        axes.plot(across, mean, markersize=3.5, label=label, **style)
        if several:
            low, high = y_scale * points.min()[y], y_scale * points.max()[y]
            axes.fill_between(across, low, high, color=shade, alpha=0.3, linewidth=0)
    axes.set(xlabel=plain(x_label), ylabel=plain(y_label))
    if log:
        stretch(axes.xaxis, x_scale * table[x], log)
    level = guessing(table, y)
    if level is not None:
        axes.axhline(y_scale * level, color=CHANCE, linestyle=":", zorder=0, label="chance")
    legend(axes)
    return axes


def guessing(table: pd.DataFrame, y: str) -> float | None:
    """Return what guessing gets; None where that is not known."""
    if y == "target_balanced_accuracy":
        return 0.5
    known = table["chance"].dropna().tolist() if "chance" in table else []
    if not known or not 0 < known[0] <= 1:
        return None
    if y == "loss":
        return -math.log(known[0])
    return float(known[0]) if y.endswith("accuracy") else None
