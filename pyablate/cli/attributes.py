"""The shell's ``attributes``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyablate.cli.common import InputError, images_from, log_to_stderr, network_from
from pyablate.cli.options import (
    Bar,
    BatchSize,
    DataSpec,
    Debug,
    Device,
    Labels,
    Layers,
    Limit,
    Mean,
    Model,
    Size,
    Std,
    Weights,
)
from pyablate.io.atomic import check_file


def attributes(
    model: Model,
    data: DataSpec,
    weights: Weights = None,
    labels: Labels = None,
    limit: Limit = None,
    layers: Layers = ["*"],  # noqa: B006  # typer copies it
    which: Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            help="Attributes or families of them; may be given again. `all` is all of them.",
        ),
    ] = ["all"],  # noqa: B006  # typer copies it
    device: Device = None,
    batch_size: BatchSize = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="A .csv file, one row per unit, or a .zarr folder."),
    ] = Path("attributes.csv"),
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    progress: Bar = None,
    debug: Debug = False,
) -> None:
    """Compute properties of every unit: norms, selectivity, information, gradients and others.

    The CSV file has one value per unit and attribute; the Zarr group has the values per class too.

    Try `pyablate attributes demo:vgg_bn --data demo --limit 2000 -o attributes.csv`
    """
    log_to_stderr(debug)
    if output.suffix not in (".csv", ".zarr"):
        raise InputError(f"--output: expected a name ending in .csv or .zarr, got {str(output)!r}")
    import pyablate as pa
    from pyablate.cli.tables import summary
    from pyablate.results.store import check_writable
    from pyablate.unit_attributes.files import write_attributes

    check_file(output, "--output") if output.suffix == ".csv" else check_writable(output, str)

    network = network_from(model, weights, device)
    batches = images_from(data, labels, limit, size, mean, std, batch_size)
    found = pa.attributes(
        network,
        batches.batches,
        layers,
        which,
        class_names=batches.class_names,
        device=device,
        batch_size=batch_size,
        progress=progress,
    )
    write_attributes(found, output)
    summary.console().print(
        f"Written: {output} ({found.sizes['unit']:,} units, {len(found.data_vars)} variables)"
    )
