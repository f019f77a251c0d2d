"""The shell's ``attributes``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyablate.cli.common import check_files, check_suffix, parse_axes
from pyablate.cli.options import (
    Axes,
    Bar,
    BatchSize,
    Device,
    Images,
    Layers,
    Network,
    Preprocessing,
)
from pyablate.cli.tables import show


def attributes(
    *,
    network: Network,
    images: Images,
    layers: Layers = ["*"],  # noqa: B006  # typer copies it
    which: Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            help="Attributes or families of them; may be given again. `all` is all of them.",
        ),
    ] = ["all"],  # noqa: B006  # typer copies it
    axis: Axes = None,
    device: Device = None,
    batch_size: BatchSize = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="A .csv file, one row per unit, or a .zarr folder."),
    ] = Path("attributes.csv"),
    pixels: Preprocessing,
    progress: Bar = None,
) -> None:
    """Compute properties of every unit: norms, selectivity, information, gradients and others.

    The CSV file has one value per unit and attribute; the Zarr group has the values per class too.

    Try `pyablate attributes demo:vgg_bn --data demo --limit 2000 -o attributes.csv`
    """
    check_suffix(output, (".csv", ".zarr"))
    import pyablate as pa
    from pyablate.results.store import check_writable
    from pyablate.unit_attributes.files import write_attributes

    check_files(output=output) if output.suffix == ".csv" else check_writable(output, str)
    model = network.load(device)
    data = images.load(pixels, network.pixels(model), batch_size)
    found = pa.attributes(
        model,
        data.batches,
        layers,
        which,
        class_names=data.class_names,
        axis=parse_axes(axis),
        device=device,
        batch_size=batch_size,
        progress=progress,
    )
    write_attributes(found, output)
    size = f"{found.sizes['unit']:,} units, {len(found.data_vars)} variables"
    show(f"Written: {output} ({size})")
