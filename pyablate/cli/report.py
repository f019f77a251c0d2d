"""The shell's ``report``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from pyablate.cli.common import InputError, images_from, log_to_stderr, network_from
from pyablate.cli.options import (
    Debug,
    Device,
    Labels,
    Limit,
    Mean,
    Run,
    SampleSpec,
    Size,
    Std,
    Weights,
)
from pyablate.io.atomic import check_file

_Tables = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="Curves of `pyablate prune --csv` and the like; may be given again.",
    ),
]


def report(
    run: Run,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The HTML file to write.")
    ] = Path("report.html"),
    attributes: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Attributes of the units: a .csv file or .zarr group."),
    ] = None,
    curves: _Tables = None,
    minimal_sets: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Minimal sets: a .csv file with the columns `class` and `units`."
        ),
    ] = None,
    data: SampleSpec = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The network of the run, to show the images that activate each unit most; "
            "needs --data.",
        ),
    ] = None,
    weights: Weights = None,
    labels: Labels = None,
    limit: Limit = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    device: Device = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Unit ablation",
    fdr: Annotated[float, typer.Option(help="Share of wrong ones tolerated among those found.")] = (
        0.05
    ),
    debug: Debug = False,
) -> None:
    """Show a finished run as one HTML file that needs no network and no other file.

    The page has the distribution of drops per layer with the noise floor, a heat map of units and
    classes, a table of units with search, and a card for every unit and class. With --data (the
    images of the run: the same data and options) the cards show images, with --attributes there
    are scatter plots and correlations, with --curves the curves of removing many units.

    Try `pyablate report run.zarr -o report.html`

    `pyablate report run.zarr --attributes attributes.csv --model demo:vgg_bn --data demo
    --limit 2000 --curves curve.csv`
    """
    log_to_stderr(debug)
    _check_needed("--model", model, {"--weights": weights, "--device": device})
    of_data = {"--labels": labels, "--limit": limit, "--size": size, "--mean": mean, "--std": std}
    _check_needed("--data", data, of_data | {"--model": model})
    check_file(output, "--output")
    import pyablate as pa
    from pyablate.analysis.unit_table import read_table
    from pyablate.cli.tables import summary

    result = pa.load(run)
    images = None if data is None else images_from(data, labels, limit, size, mean, std)
    given = {"Result": run, "Model": model, "Weights": weights, "Data": data}
    result.report(
        output,
        attributes=None if attributes is None else read_table(attributes),
        model=None if model is None else network_from(model, weights, device),
        data=None if images is None else images.batches,
        curves=curves,
        minimal_sets=minimal_sets,
        provenance={name: value for name, value in given.items() if value is not None},
        title=title,
        fdr=fdr,
        device=device,
    )
    size_in_megabytes = output.stat().st_size / 1e6
    summary.console().print(f"Written: {output} ({size_in_megabytes:.1f} MB)")


def _check_needed(option: str, given: object, others: Mapping[str, object]) -> None:
    """Refuse options that say something about another one which is not there."""
    for other, value in others.items():
        if given is None and value is not None:
            raise InputError(f"{other} needs {option}, got none")
