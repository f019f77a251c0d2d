"""What the shell prints and writes of experiments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from rich import box
from rich.table import Table

from pyablate.cli.tables.summary import cell

if TYPE_CHECKING:
    from pyablate.experiments import Cumulative, Pairs

_POINTS = 8
_PAIRS = 10


def cumulative_table(found: Cumulative) -> Table:
    """Tabulate the accuracy at a few steps and the area of each curve; random orders by means."""
    steps = np.unique(np.linspace(0, found.data.sizes["step"] - 1, _POINTS + 1).round().astype(int))
    removed = found.data["removed"].to_numpy()[steps]
    table = _table("Order", "of class", numeric=[*(f"{n:,} gone" for n in removed), "area"])
    rows = found.area.assign(curve=np.arange(found.data.sizes["curve"]))
    for (order, target), same in rows.groupby(["order", "target"], sort=False):
        name = "class_accuracy" if target else "accuracy"
        accuracy = found.data[name].isel(curve=same["curve"].to_numpy(), step=steps)
        if target:
            accuracy = accuracy.sel({"class": target})
        area = same["target_area" if target else "area"].mean()
        several = f"{order} (mean of {len(same)})" if len(same) > 1 else str(order)
        figures = [f"{100 * value:.2f}" for value in accuracy.mean("curve").to_numpy()]
        table.add_row(cell(several), cell(target), *figures, f"{area:.4f}")
    return table


def pair_rows(found: Pairs) -> pd.DataFrame:
    """One row per pair: labels, drops, interaction overall and of each class, tests."""
    data, names = found.data, ("joint_drop", "interaction", "more", "less", "p", "q")
    first, second = data["first"].to_numpy(), data["second"].to_numpy()
    single = data["drop"].to_series()
    rows = pd.DataFrame(
        {
            "first": first,
            "second": second,
            "first_drop": single[first].to_numpy(),
            "second_drop": single[second].to_numpy(),
            **{name: data[name].to_numpy() for name in names},
        }
    )
    classes = [f"interaction: {name}" for name in data["class"].to_numpy()]
    return pd.concat(
        [rows, pd.DataFrame(data["class_interaction"].to_numpy(), columns=classes)], axis=1
    )


def pair_table(rows: pd.DataFrame) -> Table:
    """Tabulate the pairs with the strongest interactions, by p and then by size."""
    size = rows["interaction"].abs()
    best = rows.assign(size=size).sort_values(["p", "size"], ascending=[True, False], kind="stable")
    table = _table(
        "Unit",
        "and unit",
        numeric=["drop", "drop", "of both", "interaction", "more", "less", "p", "q"],
    )
    for row in best.head(_PAIRS).to_dict("records"):
        drops = [row[name] for name in ("first_drop", "second_drop", "joint_drop", "interaction")]
        table.add_row(
            cell(row["first"]),
            cell(row["second"]),
            *(f"{100 * drop:+.2f}" for drop in drops),
            f"{row['more']:,}",
            f"{row['less']:,}",
            f"{row['p']:.2g}",
            f"{row['q']:.2g}",
        )
    return table


def minimal_sets_table(found: pd.DataFrame) -> Table:
    """Tabulate the sets: how large, what they do to their class and to the others."""
    table = _table("Class", numeric=["units", "at chance", "before", "after", "others lose"])
    table.add_column("which", overflow="fold")
    for row in found.to_dict("records"):
        shares = [row[name] for name in ("baseline_accuracy", "accuracy", "others_drop")]
        table.add_row(
            cell(row["class"]),
            f"{row['size']:,}",
            "yes" if row["reached"] else "no",
            *(f"{100 * share:.2f}" for share in shares),
            cell(" ".join(row["units"])),
        )
    return table


def rotation_table(found: pd.DataFrame) -> Table:
    """Tabulate units against rotated axes."""
    table = _table("Layer", "Figure", numeric=["units", "rotated", "difference", "from", "to", "p"])
    shown = ""
    for row in found.to_dict("records"):
        figures = ("units", "rotated", "difference", "difference_low", "difference_high")
        table.add_row(
            cell("" if shown == row["layer"] else row["layer"]),
            row["figure"],
            *(f"{row[name]:.4f}" for name in figures),
            f"{row['p']:.2g}",
        )
        shown = row["layer"]
    return table


def _table(*texts: str, numeric: list[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in texts:
        table.add_column(name, overflow="fold")
    for name in numeric:
        table.add_column(name, justify="right")
    return table
