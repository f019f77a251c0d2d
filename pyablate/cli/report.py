"""The shell's ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pyablate.cli.common import check_files
from pyablate.cli.options import (
    Device,
    Fdr,
    Images,
    Labels,
    Limit,
    Logits,
    Network,
    Preprocessing,
    Run,
    SampleSpec,
    Weights,
    by_option,
    check_needed,
)
from pyablate.cli.tables import show


def report(
    *,
    run: Run,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The HTML file to write.")
    ] = Path("report.html"),
    attributes: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Attributes of the units: a .csv file or .zarr group."),
    ] = None,
    curves: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Curves of `pyablate prune --csv` and the like; may be given again.",
        ),
    ] = None,
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
    logits: Logits = None,
    labels: Labels = None,
    limit: Limit = None,
    pixels: Preprocessing,
    device: Device = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Unit ablation",
    fdr: Fdr = 0.05,
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
    if model is None:
        check_needed("--model", {"--weights": weights, "--logits": logits, "--device": device})
    if data is None:
        of_data = {"--labels": labels, "--limit": limit, **by_option(pixels), "--model": model}
        check_needed("--data", of_data)
    check_files(output=output)
    import pyablate as pa
    from pyablate.analysis.unit_table import read_table

    result = pa.load(run)
    network = own = images = None
    if model is not None:
        spec = Network(model=model, weights=weights, logits=logits)
        network = spec.load(device)
        own = spec.pixels(network)
    if data is not None:
        images = Images(data=data, labels=labels, limit=limit).load(pixels, own)
    given = {"Result": run, "Model": model, "Weights": weights, "Data": data}
    result.report(
        output,
        attributes=None if attributes is None else read_table(attributes),
        model=network,
        data=None if images is None else images.batches,
        curves=curves,
        minimal_sets=minimal_sets,
        provenance={name: value for name, value in given.items() if value is not None},
        title=title,
        fdr=fdr,
        device=device,
    )
    show(f"Written: {output} ({output.stat().st_size / 1e6:.1f} MB)")
