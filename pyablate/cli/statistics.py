"""The shell's ``significance`` and ``correlate``: statistics of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyablate.cli.common import log_to_stderr, say_written
from pyablate.cli.options import Csv, Debug, Run, Splits
from pyablate.io.atomic import check_file, write_csv


def significance(
    run: Run,
    fdr: Annotated[float, typer.Option(help="Share of wrong ones tolerated among those found.")] = (
        0.05
    ),
    splits: Splits = 10,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the splits.")] = 0,
    csv: Csv = None,
    pairs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the pairs found, one per row, as CSV."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Tell which damage of a finished run is more than chance.

    Each class of each unit is tested (exact McNemar test, false discovery rate per layer). Beside
    the largest class drop of a unit stand the noise floor (what a harmless unit with the same
    changed images would show), the split half estimate (the class chosen on one half of the images,
    the drop measured on the other), and the chance p of a harmless unit to show as much, adjusted
    over the layer's units as q.

    Try `pyablate significance run.zarr`, `pyablate significance run.zarr --pairs pairs.csv`
    """
    log_to_stderr(debug)
    import numpy as np

    import pyablate as pa
    from pyablate.cli.tables import summary
    from pyablate.cli.tables.statistics import significance_table

    for option, path in (("--csv", csv), ("--pairs", pairs)):
        if path is not None:
            check_file(path, option)
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
    out = summary.console()
    out.print(
        f"Pairs of unit and class whose accuracy changes, at a false discovery rate of {fdr:g}:"
    )
    out.print(significance_table(result, tests, units))
    say_written(out, csv, pairs)


def correlate(
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
    layers: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Only these layers; may be given again."),
    ] = None,
    resamples: Annotated[int, typer.Option(min=1, help="Resamples of the bootstrap.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all correlations as CSV.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Tell which attributes of units go with the damage that their ablation does, layer by layer.

    Try `pyablate correlate run.zarr attributes.csv`

    `pyablate correlate run.zarr attributes.csv --target split_half_drop --csv correlations.csv`
    """
    log_to_stderr(debug)
    import pyablate as pa
    from pyablate.analysis.unit_table import read_table
    from pyablate.cli.tables import summary
    from pyablate.cli.tables.statistics import correlation_table

    if csv is not None:
        check_file(csv, "--csv")
    found = pa.correlate(
        pa.load(run),
        read_table(attributes),
        attributes=attribute,
        targets=target,
        methods=method,
        layers=layers,
        resamples=resamples,
        seed=seed,
    )
    if csv is not None:
        write_csv(found, csv)
    out = summary.console()
    out.print(correlation_table(found))
    say_written(out, csv)
