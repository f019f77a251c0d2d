"""What the shell prints of statistics: how sure the damage is, what goes with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.table import Table

from pyablate.analysis.statistics import layer_rows
from pyablate.cli.tables.summary import cell

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from pyablate.result import AblationResult

_TOP_UNITS = 5
_TOP_ATTRIBUTES = 3


def significance_table(result: AblationResult, tests: xr.Dataset, units: pd.DataFrame) -> Table:
    """Tabulate, per layer, the pairs found and the units with the largest class drops.

    Parameters
    ----------
    result : AblationResult
        What was ablated.
    tests : xarray.Dataset
        From :func:`pyablate.analysis.statistics.significance`.
    units : pandas.DataFrame
        From :func:`pyablate.analysis.statistics.max_class_test`.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Layer", overflow="fold")
    for name in ("Pairs", "harmed", "helped", "Unit"):
        table.add_column(name, justify="right")
    table.add_column("hurts most", overflow="fold")
    for name in ("by (points)", "noise floor", "split half", "p", "q"):
        table.add_column(name, justify="right")
    significant, drops = tests["significant"].to_numpy(), tests["drop"].to_numpy()
    tested = np.isfinite(tests["p"].to_numpy())
    for layer, rows in layer_rows(result).items():
        harmed = (significant[rows] & (drops[rows] > 0)).sum()
        helped = (significant[rows] & (drops[rows] < 0)).sum()
        counts = (tested[rows].sum(), harmed, helped)
        first = [layer, *(f"{count:,}" for count in counts)]
        order = np.argsort(-result.max_class_drop[rows], kind="stable")
        for row in rows[order[:_TOP_UNITS]]:
            unit = units.iloc[row]
            cells = [*first, str(unit["unit"]), str(unit["max_class"])]
            figures = unit[["max_class_drop", "noise_floor", "split_half_drop"]]
            cells += [f"{100 * figure:.2f}" for figure in figures]
            cells += [_chance(unit["p"]), _chance(unit["q"])]
            table.add_row(*map(cell, cells))
            first = [""] * 4
        table.add_section()
    return table


def correlation_table(found: pd.DataFrame) -> Table:
    """Tabulate, per layer, target and method, the attributes that correlate most.

    Parameters
    ----------
    found : pandas.DataFrame
        From :func:`pyablate.correlate`. ``by chance`` shows its ``random_order``.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Layer", overflow="fold")
    table.add_column("Target", no_wrap=True)
    table.add_column("Method", no_wrap=True)
    table.add_column("Attribute", overflow="fold")
    for column in ("Units", "correlation", "interval", "q", "by chance"):
        table.add_column(column, justify="right", no_wrap=True)
    shown = ("", "", "")
    for family, lines in found.groupby(["layer", "target", "method"], sort=False):
        layer, target, method = map(str, family)
        order = np.argsort(-np.abs(lines["correlation"].to_numpy()), kind="stable")  # NaN last
        for _, line in lines.iloc[order[:_TOP_ATTRIBUTES]].iterrows():
            table.add_row(
                cell("" if shown[0] == layer else layer),
                cell("" if shown[:2] == (layer, target) else target),
                "" if shown == (layer, target, method) else method,
                cell(line["attribute"]),
                f"{line['units']:,}",
                _signed(line["correlation"]),
                f"{_signed(line['low'])} to {_signed(line['high'])}",
                _chance(line["q"]),
                "-" if np.isnan(line["random_order"]) else f"{line['random_order']:.2f}",
            )
            shown = layer, target, method
    return table


def _signed(number: float) -> str:
    return "-" if np.isnan(number) else f"{number:+.2f}"


def _chance(p: float) -> str:
    return "-" if np.isnan(p) else f"{p:.2g}"
