"""The shell's ``significance`` and ``correlate``: statistics of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pyablate.cli.common import check_files
from pyablate.cli.options import Csv, Fdr, Only, Run, Seeds, Splits
from pyablate.cli.summary import worst_units
from pyablate.cli.tables import chance, columns, count, frame_table, number, points, show
from pyablate.io.atomic import write_csv

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from rich.table import Table

    from pyablate.result import AblationResult

_BEST = 3  # attributes shown of a layer, target and method
_SIGNIFICANCE_COLUMNS = (
    *columns(str, "Layer=layer"),
    *columns(count, "Pairs", "harmed", "helped"),
    *columns(number, "Unit=unit"),
    *columns(str, "hurts most=max_class"),
    *columns(points, "by (points)=max_class_drop", "noise floor=noise_floor"),
    *columns(points, "split half=split_half_drop"),
    *columns(chance, "p", "q"),
)
_CORRELATION_COLUMNS = (
    *columns(str, "Layer=layer", "Target=target", "Method=method", "Attribute=attribute"),
    *columns(count, "Units=units"),
    *columns("{:+.2f}".format, "correlation"),
    *columns(number, "interval"),
    *columns(chance, "q"),
    *columns("{:.2f}".format, "by chance=random_order"),
)
_CELL_COLUMNS = (
    *columns(str, "Layer=layer", "Target=target", "Figure=figure", "Attribute=attribute"),
    *columns("{:+.2f}".format, "value", "from=low", "to=high"),
    *columns(chance, "q"),
    *columns("{:+.2f}".format, "units shuffled=shuffled_units", "classes=shuffled_classes"),
    *columns("{:.2f}".format, "ceiling"),
)


def significance(
    *,
    run: Run,
    fdr: Fdr = 0.05,
    splits: Splits = 10,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the splits.")] = 0,
    csv: Csv = None,
    pairs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the pairs found, one per row, as CSV."),
    ] = None,
) -> None:
    """Tell which damage of a finished run is more than chance.

    Each class of each unit is tested (exact McNemar test, false discovery rate per layer). Beside
    the largest class drop of a unit stand the noise floor (what a harmless unit with the same
    changed images would show), the split half estimate (the class chosen on one half of the images,
    the drop measured on the other), and the chance p of a harmless unit to show as much, adjusted
    over the layer's units as q.

    Try `pyablate significance run.zarr`, `pyablate significance run.zarr --pairs pairs.csv`
    """
    import numpy as np

    import pyablate as pa

    check_files(csv=csv, pairs=pairs)
    result = pa.load(run)
    tests = result.significance(fdr=fdr)
    units = result.max_class_test(splits=splits, seed=seed)
    if csv is not None:
        write_csv(units, csv)
    if pairs is not None:
        rows, classes = tests["significant"].to_numpy().nonzero()
        found = result.units.iloc[rows].assign(**{"class": np.array(result.class_names)[classes]})
        for name in ("lost", "gained", "drop", "p", "q"):
            found[name] = tests[name].to_numpy()[rows, classes]
        write_csv(found, pairs, "--pairs")
    show(
        f"Pairs of unit and class whose accuracy changes, at a false discovery rate of {fdr:g}:",
        _significance_table(result, tests, units),
        written=[csv, pairs],
    )


def correlate(
    *,
    run: Run,
    attributes: Annotated[
        Path,
        typer.Argument(
            metavar="ATTRIBUTES",
            help="Table of attributes: a .csv file with unit labels in a column `unit` or `label`, "
            "or a .zarr group over the coordinate `unit`.",
            show_default=False,
        ),
    ],
    attribute: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this attribute; may be given again."),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Only this target: accuracy_drop, split_half_drop, preferred_class_drop, gini, "
            "entropy, max_class_drop; may be given again.",
        ),
    ] = None,
    method: Annotated[
        list[str],
        typer.Option(metavar="NAME", help="pearson, spearman or kendall; may be given again."),
    ] = ["spearman"],  # noqa: B006  # typer copies it
    layers: Only = None,
    cells: Annotated[
        bool,
        typer.Option(
            "--cells",
            help="Compare what attributes say of each class with the drop of that class; needs a "
            ".zarr table.",
        ),
    ] = False,
    resamples: Annotated[int, typer.Option(min=1, help="Resamples of the bootstrap.")] = 1000,
    seed: Seeds = 0,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all correlations as CSV.")
    ] = None,
) -> None:
    """Tell which attributes of units go with the damage that their ablation does, layer by layer.

    Try `pyablate correlate run.zarr attributes.csv`

    `pyablate correlate run.zarr attributes.csv --target split_half_drop --csv correlations.csv`
    """
    import pyablate as pa
    from pyablate.analysis.unit_table import read_table

    check_files(csv=csv)
    found = pa.correlate(
        pa.load(run),
        read_table(attributes),
        attributes=attribute,
        targets=target,
        cells=cells,
        methods=method,
        layers=layers,
        resamples=resamples,
        seed=seed,
    )
    if csv is not None:
        write_csv(found, csv)
    show(_cell_table(found) if cells else _correlation_table(found), written=[csv])


def _significance_table(result: AblationResult, tests: xr.Dataset, units: pd.DataFrame) -> Table:
    """Tabulate, per layer, the pairs found and the units with the largest class drops."""
    import pandas as pd

    from pyablate.analysis.statistics import layer_rows

    parts = []
    for rows in layer_rows(result).values():
        of_layer = tests.isel(unit=rows)
        counts = {
            "Pairs": of_layer["p"].notnull(),
            "harmed": of_layer["significant"] & (of_layer["drop"] > 0),
            "helped": of_layer["significant"] & (of_layer["drop"] < 0),
        }
        sums = {name: int(found.sum()) for name, found in counts.items()}
        parts.append(worst_units(units.iloc[rows]).assign(**sums))
    return frame_table(pd.concat(parts), _SIGNIFICANCE_COLUMNS, grouped=4)


def _cell_table(found: pd.DataFrame) -> Table:
    """Tabulate, per layer, target and figure, the attributes that foretell most."""
    import pandas as pd

    families = found.groupby(["layer", "target", "figure"], sort=False)
    best = [
        lines.sort_values("value", ascending=False, kind="stable").head(_BEST)
        for _, lines in families
    ]
    return frame_table(pd.concat(best), _CELL_COLUMNS, grouped=3)


def _correlation_table(found: pd.DataFrame) -> Table:
    """Tabulate, per layer, target and method, the attributes that correlate most."""
    import pandas as pd

    low, high = (found[end].map("{:+.2f}".format) for end in ("low", "high"))
    interval = (low + " to " + high).where(found["low"].notna())
    families = found.assign(interval=interval).groupby(["layer", "target", "method"], sort=False)
    best = [
        lines.sort_values("correlation", key=abs, ascending=False, kind="stable").head(_BEST)
        for _, lines in families
    ]
    return frame_table(pd.concat(best), _CORRELATION_COLUMNS, grouped=3)
