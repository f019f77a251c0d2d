"""What the shell prints of curves, sensitivities and comparisons."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.table import Table

from pyablate.cli.tables.summary import cell

if TYPE_CHECKING:
    import pandas as pd

    from pyablate.compression import Comparison, Preservation


def curve_table(curves: pd.DataFrame) -> Table:
    """Tabulate the curves of :func:`pyablate.prune_curve`; random orders by their mean."""
    table = _table("Ranking")
    _numeric(table, "gone", "accuracy", "worst class", "mean class", "loss", "parameters", "FLOPs")
    shown = ""
    for (ranking, _), rows in curves.groupby(["ranking", "fraction"], sort=False):
        mean = rows.mean(numeric_only=True)
        table.add_row(
            cell("" if shown == ranking else str(ranking)),
            f"{100 * mean['fraction']:.0f} %",
            *(f"{100 * mean[name]:.2f}" for name in _ACCURACIES),
            f"{mean['loss']:.3f}",
            f"{mean['parameters']:,.0f}",
            f"{mean['flops']:,.0f}",
        )
        shown = str(ranking)
    return table


def sensitivity_table(found: pd.DataFrame) -> Table:
    """Tabulate :func:`pyablate.sensitivity`."""
    table = _table("Layer")
    _numeric(table, "gone", "units", "accuracy", "drop")
    table.add_column("hurts most", overflow="fold")
    _numeric(table, "by (points)")
    shown = ""
    for row in found.to_dict("records"):
        table.add_row(
            cell("" if shown == row["layer"] else row["layer"]),
            f"{100 * row['fraction']:.1f} %",
            f"{row['units']:,}",
            f"{100 * row['accuracy']:.2f}",
            f"{100 * row['accuracy_drop']:+.2f}",
            cell(row["max_class"]),
            f"{100 * row['max_class_drop']:.2f}",
        )
        shown = row["layer"]
    return table


def comparison_tables(found: Comparison) -> list[Table]:
    """Tabulate a comparison: figures of both networks, one row per class, attributions if any."""
    summary = found.summary()
    both = _table("Figure")
    _numeric(both, "before", "after")
    for name in ("accuracy", "worst_class_accuracy", "mean_class_accuracy", "calibration_error"):
        figures = (100 * summary[f"{name}_{which}"] for which in ("before", "after"))
        both.add_row(name.replace("_", " ") + ", %", *(f"{figure:.2f}" for figure in figures))
    losses = (summary[f"loss_{which}"] for which in ("before", "after"))
    both.add_row("loss", *(f"{loss:.4f}" for loss in losses))
    both.add_row("differing predictions, %", "", f"{100 * summary['differing']:.2f}")
    both.add_row("p of the accuracies", "", f"{summary['p']:.2g}")
    classes = _table("Class")
    _numeric(classes, "images", "before", "after", "drop", "excess", "lost", "gained", "q")
    table = found.classes()
    for row in table.iloc[np.argsort(-table["drop"].to_numpy(), kind="stable")].to_dict("records"):
        classes.add_row(
            cell(row["class"]),
            f"{row['images']:,}",
            *(f"{100 * row[name]:.2f}" for name in ("before", "after", "drop", "excess")),
            f"{row['lost']:,}",
            f"{row['gained']:,}",
            f"{row['q']:.2g}",
        )
    kept = found.attributions
    return [both, classes] if kept is None else [both, classes, _attribution_table(kept)]


def _attribution_table(kept: Preservation) -> Table:
    table = _table("Attributions")
    _numeric(table, "figure", "mean", "95 % interval", "images", "undefined")
    shown = ""
    for row in kept.summary().to_dict("records"):
        table.add_row(
            cell("" if shown == row["method"] else row["method"]),
            row["figure"],
            f"{row['mean']:.4f}",
            f"{row['low']:.4f} to {row['high']:.4f}",
            f"{row['images']:,}",
            f"{row['undefined']:,}",
        )
        shown = row["method"]
    return table


_ACCURACIES = ("accuracy", "worst_class_accuracy", "mean_class_accuracy")


def _table(first: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    return table


def _numeric(table: Table, *names: str) -> None:
    for name in names:
        table.add_column(name, justify="right")
