"""The shell's ``prune``, ``sensitivity`` and ``compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyablate.cli.common import images_from, log_to_stderr, network_from, say_written
from pyablate.cli.options import (
    Bar,
    DataSpec,
    Debug,
    Device,
    Labels,
    Limit,
    Mean,
    Model,
    Seed,
    Size,
    Std,
    Weights,
)
from pyablate.io.atomic import check_file, write_csv

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pyablate.compression import Ranking
    from pyablate.result import AblationResult

By = Annotated[
    list[str],
    typer.Option(
        metavar="WHAT",
        help="Rank by l1, l2, bn_scale, nisp, hrank or taylor, by random, a result of "
        "`pyablate run` (.zarr), or a table of attributes (.csv); may be given again for `prune`.",
    ),
]
Column = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Which drop of a result (accuracy_drop, max_class_drop ...) or attribute of a table.",
    ),
]
Scope = Annotated[
    str, typer.Option(help="layer: the same share of each layer; global: wherever scores are low.")
]
Fraction = Annotated[
    list[float] | None,
    typer.Option(min=0, max=1, help="Share of the units that goes; may be given again."),
]


def prune(
    model: Model,
    data: DataSpec,
    weights: Weights = None,
    labels: Labels = None,
    limit: Limit = None,
    by: By = ["l1"],  # noqa: B006  # typer copies it
    column: Column = None,
    scope: Scope = "layer",
    fraction: Fraction = None,
    seeds: Annotated[int, typer.Option(min=0, help="Random orders to compare with.")] = 3,
    seed: Seed = 0,
    device: Device = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the curves as CSV.")
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.pt2",
            help="Write the smaller network; needs one --by and one --fraction.",
        ),
    ] = None,
    progress: Bar = None,
    debug: Debug = False,
) -> None:
    """Remove more and more units, by one or several rankings, and say what is lost.

    Try `pyablate prune demo:vgg_bn --data demo --limit 1000 --by l1 --by bn_scale`

    `pyablate prune demo:vgg_bn --data demo --by run.zarr --column max_class_drop --csv curve.csv`

    `pyablate prune demo:vgg_bn --data demo --by l1 --fraction 0.3 --save smaller.pt2`
    """
    log_to_stderr(debug)
    from pyablate.cli.tables import summary
    from pyablate.cli.tables.compression import curve_table
    from pyablate.compression import remove, save_network
    from pyablate.compression._prune_curve import FRACTIONS, prune_curve

    for option, path in (("--csv", csv), ("--save", save)):
        if path is not None:
            check_file(path, option)
    if save is not None and (len(by) != 1 or len(fraction or []) != 1):
        raise ValueError("--save: expected one --by and one --fraction, which say what to remove")
    if save is not None and save.suffix != ".pt2":
        raise ValueError(f"--save: expected a file called *.pt2, got {str(save)!r}")
    _check_column(column, by)
    network = network_from(model, weights, device)
    loaded = images_from(data, labels, limit, size, mean, std)
    sample = _first_images(loaded.batches)
    ranked = (network, loaded.batches, column, scope, seed)
    rankings = {what: _ranking(what, *ranked) for what in by}
    curves = prune_curve(
        network,
        loaded.batches,
        rankings,
        fractions=fraction or FRACTIONS,
        seeds=seeds,
        class_names=loaded.class_names,
        device=device,
        progress=progress,
    )
    if csv is not None:
        write_csv(curves, csv)
    if save is not None and fraction:
        removal = remove(network, rankings[by[0]], sample, fraction=fraction[0])
        save_network(removal.model, sample, save)
    out = summary.console()
    out.print(curve_table(curves))
    say_written(out, csv, save)


def sensitivity(
    model: Model,
    data: DataSpec,
    weights: Weights = None,
    labels: Labels = None,
    limit: Limit = None,
    by: Annotated[
        str, typer.Option(metavar="WHAT", help="Order within a layer; see `pyablate prune`.")
    ] = "l1",
    column: Column = None,
    fraction: Fraction = None,
    stop: Annotated[
        float | None,
        typer.Option(min=0, help="Leave a layer alone once it has lost more accuracy (0.05)."),
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The table, .csv or .json; a killed run resumes it."),
    ] = None,
    progress: Bar = None,
    debug: Debug = False,
) -> None:
    """Ablate growing shares of one layer at a time, to see how much of each can go.

    Try `pyablate sensitivity demo:resnet --data demo --limit 500 --stop 0.1 --output layers.csv`
    """
    log_to_stderr(debug)
    from pyablate.cli.tables import summary
    from pyablate.cli.tables.compression import sensitivity_table
    from pyablate.compression import sensitivity as measure
    from pyablate.compression._sensitivity import FRACTIONS

    if output is not None:
        check_file(output, "--output")
    _check_column(column, [by])
    network = network_from(model, weights, device)
    loaded = images_from(data, labels, limit, size, mean, std)
    ranking = _ranking(by, network, loaded.batches, column, "layer", seed)
    found = measure(
        network,
        loaded.batches,
        ranking,
        fractions=fraction or FRACTIONS,
        stop=stop,
        path=output,
        class_names=loaded.class_names,
        device=device,
        progress=progress,
    )
    out = summary.console()
    out.print(sensitivity_table(found))
    say_written(out, output)


def compare(
    model: Model,
    smaller: Annotated[
        str, typer.Argument(metavar="OTHER", help="The other network.", show_default=False)
    ],
    data: DataSpec,
    weights: Weights = None,
    other_weights: Annotated[
        str | None, typer.Option(metavar="FILE", help="Weights of the other network.")
    ] = None,
    labels: Labels = None,
    limit: Limit = None,
    device: Device = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one row per class as CSV.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the images on which they differ as CSV."),
    ] = None,
    attributions: Annotated[
        bool, typer.Option(help="Compare attribution maps too (needs Captum).")
    ] = False,
    debug: Debug = False,
) -> None:
    """Compare two networks with the same classes: which classes suffer, which images differ.

    Try `pyablate compare demo:alexnet demo:vgg_bn --data demo --limit 2000 --csv classes.csv`
    """
    log_to_stderr(debug)
    import pyablate as pa
    from pyablate.cli.tables import summary
    from pyablate.cli.tables.compression import comparison_tables

    for option, path in (("--csv", csv), ("--images", images)):
        if path is not None:
            check_file(path, option)
    networks = network_from(model, weights, device), network_from(smaller, other_weights, device)
    loaded = images_from(data, labels, limit, size, mean, std)
    found = pa.compare(
        *networks,
        loaded.batches,
        class_names=loaded.class_names,
        attributions=attributions,
        device=device,
    )
    if csv is not None:
        write_csv(found.classes(), csv)
    if images is not None:
        write_csv(found.images(), images, "--images")
    out = summary.console()
    for each in comparison_tables(found):
        out.print(each)
    say_written(out, csv, images)


def _check_column(column: str | None, by: list[str]) -> None:
    """Refuse a column where no ranking has any."""
    from pyablate.compression.filters import CRITERIA

    if column is not None and all(what in (*CRITERIA, "random") for what in by):
        raise ValueError(
            f"--column: expected beside it a --by that names a result or a table, got {column!r} "
            f"and --by {', '.join(by)}"
        )


def _first_images(batches: object) -> Tensor:
    """Two images to run the network on."""
    first: Tensor = batches[0] if isinstance(batches, tuple) else next(iter(batches))[0]  # type: ignore[call-overload]
    return first[:2]


def _ranking(
    what: str, network: nn.Module, data: Any, column: str | None, scope: str, seed: int
) -> Ranking:
    import pyablate as pa
    from pyablate.analysis.unit_table import read_table
    from pyablate.compression.filters import CRITERIA, filter_ranking

    sample = _first_images(data)
    if what in CRITERIA:
        return filter_ranking(network, sample, what, scope=scope, data=data)
    scores: object = what
    if what != "random":
        path = Path(what)
        if not path.exists():
            raise ValueError(
                f"--by: expected {', '.join(CRITERIA)}, random or a file, got {what!r}"
            )
        result = _result(path)
        scores = read_table(path) if result is None else result
    return pa.rank(network, sample, scores, column=column, scope=scope, seed=seed, name=what)  # type: ignore[arg-type]


def _result(path: Path) -> AblationResult | None:
    """Load a result of ``pyablate run``; None if it is something else."""
    import pyablate as pa

    try:
        return pa.load(path) if path.is_dir() else None
    except OSError:
        return None
