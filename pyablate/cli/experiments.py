"""The shell's ``cumulative``, ``pairs``, ``minimal-sets`` and ``rotation``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyablate.cli.common import (
    InputError,
    images_from,
    log_to_stderr,
    network_from,
    parse_numbers,
    say_written,
)
from pyablate.cli.options import (
    Bar,
    DataSpec,
    Debug,
    Device,
    Intervention,
    Labels,
    Layers,
    Limit,
    Mean,
    Model,
    Precision,
    Seed,
    Size,
    Std,
    Weights,
)
from pyablate.io.atomic import check_file, whole, write_csv

if TYPE_CHECKING:
    import pandas as pd

Rows = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write the whole table, .csv or .json."),
]
Column = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME", help="Which attributes of a table to order by; may be given again."
    ),
]
SUFFIXES = (".csv", ".json")


def cumulative(
    model: Model,
    data: DataSpec,
    weights: Weights = None,
    labels: Labels = None,
    limit: Limit = None,
    layers: Layers = ["*"],  # noqa: B006  # typer copies it
    order: Annotated[
        list[str],
        typer.Option(
            metavar="WHAT",
            help="What goes first: drop (the largest accuracy drop alone), class (one curve per "
            "class, by its drop), random, or a table of attributes (.csv, .zarr) with `--column`; "
            "may be given again.",
        ),
    ] = ["drop", "random"],  # noqa: B006
    column: Column = None,
    ascending: Annotated[
        bool, typer.Option("--ascending", help="Smallest drops and attributes go first.")
    ] = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the first of the order and remove the others.")
    ] = False,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Points of a curve; at most 64 if left out.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Random orders.")] = 10,
    intervention: Intervention = "zero",
    precision: Precision = "auto",
    seed: Seed = 0,
    device: Device = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    output: Rows = None,
    progress: Bar = None,
    debug: Debug = False,
) -> None:
    """Remove units one after another and follow the accuracy.

    Units that are ordered by what they do are ranked on one half of the images, and all curves
    measured on the other. The area is that under the curve of accuracy, over the share of units
    removed: large where units are removed that do not matter. Compare it with that of random
    orders. The written table has one row per curve and point.

    Try `pyablate cumulative demo:vgg_bn --data demo --limit 1000 --layers features.16 --steps 16`

    `pyablate cumulative demo:vgg_bn --data demo --layers features.16 --order random
    --order attributes.csv --column class_selectivity --column l1_norm --ascending -o curves.csv`
    """
    log_to_stderr(debug)
    _check_output(output)
    orders = _orders(order, column)
    import pyablate as pa
    from pyablate.cli.tables.experiments import cumulative_table

    network = network_from(model, weights, device)
    images = images_from(data, labels, limit, size, mean, std)
    found = pa.cumulative(
        network,
        images.batches,
        layers,
        order=orders,
        ascending=ascending,
        keep=keep,
        steps=steps,
        repeats=repeats,
        intervention=intervention,
        precision=precision,
        seed=seed,
        device=device,
        class_names=images.class_names,
        progress=progress,
    )
    _finish(cumulative_table(found), found.to_dataframe(), output, str(found.result.audit))


def pairs(
    model: Model,
    data: DataSpec,
    layer: Annotated[str, typer.Option(metavar="NAME", help="The layer whose units are paired.")],
    weights: Weights = None,
    labels: Labels = None,
    limit: Limit = None,
    units: Annotated[
        str | None,
        typer.Option(metavar="U,U,...", help="Only pairs of these units; all if left out."),
    ] = None,
    intervention: Intervention = "zero",
    precision: Precision = "auto",
    seed: Seed = 0,
    device: Device = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    output: Rows = None,
    progress: Bar = None,
    debug: Debug = False,
) -> None:
    """Ablate all pairs of units of a layer, to see which do together what neither does alone.

    The interaction is the accuracy drop of both at once minus the sum of their single drops.
    Positive: they back each other up. Negative: they break the same images. The largest of many is
    large by chance alone: q is adjusted for that. The written table has one row per pair.

    Try `pyablate pairs demo:alexnet --data demo --limit 500 --layer features.4 -o pairs.csv`
    """
    log_to_stderr(debug)
    _check_output(output)
    chosen = None if units is None else [int(u) for u in _whole_numbers("--units", units)]
    import pyablate as pa
    from pyablate.cli.tables.experiments import pair_rows, pair_table

    network = network_from(model, weights, device)
    images = images_from(data, labels, limit, size, mean, std)
    found = pa.pairs(
        network,
        images.batches,
        layer,
        units=chosen,
        intervention=intervention,
        precision=precision,
        seed=seed,
        device=device,
        class_names=images.class_names,
        progress=progress,
    )
    rows = pair_rows(found)
    _finish(pair_table(rows), rows, output, str(found.result.audit))


def minimal_sets(
    model: Model,
    data: DataSpec,
    weights: Weights = None,
    labels: Labels = None,
    limit: Limit = None,
    layers: Layers = ["*"],  # noqa: B006  # typer copies it
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="NAME", help="Only this class; may be given again."),
    ] = None,
    chance: Annotated[
        float | None,
        typer.Option(min=0, help="Accuracy at which a class is lost; 1 / classes if left out."),
    ] = None,
    largest: Annotated[
        int | None, typer.Option(min=1, help="Largest set to try; 64 if left out.")
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune/--no-prune", help="Put back units that are not needed.")
    ] = True,
    intervention: Intervention = "zero",
    precision: Precision = "auto",
    seed: Seed = 0,
    device: Device = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    output: Rows = None,
    progress: Bar = None,
    debug: Debug = False,
) -> None:
    """Find, for each class, few units without which it is lost.

    Units are added by their single drops of the class until its accuracy is at chance, then put
    back where they are not needed. Sets are found on one half of the images and measured on the
    other; `others lose` tells a set that is about the class from plain destruction.

    Try `pyablate minimal-sets demo:vgg_bn --data demo --limit 1000 --layers features.16
    --class Bag --class Sandal -o sets.json`
    """
    log_to_stderr(debug)
    _check_output(output)
    import pyablate as pa
    from pyablate.cli.tables.experiments import minimal_sets_table

    network = network_from(model, weights, device)
    images = images_from(data, labels, limit, size, mean, std)
    found = pa.minimal_sets(
        network,
        images.batches,
        layers,
        classes=classes,
        chance=chance,
        largest=largest,
        prune=prune,
        intervention=intervention,
        precision=precision,
        seed=seed,
        device=device,
        class_names=images.class_names,
        progress=progress,
    )
    rows = found.table.assign(units=found.table["units"].map(" ".join))
    _finish(minimal_sets_table(found.table), rows, output, str(found.result.audit))


def rotation(
    model: Model,
    data: DataSpec,
    weights: Weights = None,
    labels: Labels = None,
    limit: Limit = None,
    layers: Layers = ["*"],  # noqa: B006  # typer copies it
    rotations: Annotated[int, typer.Option(min=1, help="Random rotations of each layer.")] = 3,
    fewest: Annotated[
        int, typer.Option(min=1, help="Lost images that a unit must have to count for gini.")
    ] = 10,
    precision: Precision = "auto",
    seed: Seed = 0,
    device: Device = None,
    size: Size = None,
    mean: Mean = None,
    std: Std = None,
    output: Rows = None,
    progress: Bar = None,
    debug: Debug = False,
) -> None:
    """Are single units special? Compare them with random directions of the same layer.

    gini is how concentrated on few classes the harm is (0: all alike); split_half_drop the largest
    class drop without the bias of choosing its class. Intervals are 95 % bootstrap over units.

    Try `pyablate rotation demo:vgg_bn --data demo --limit 1000 --layers features.16 -o turned.csv`
    """
    log_to_stderr(debug)
    _check_output(output)
    import pyablate as pa
    from pyablate.cli.tables.experiments import rotation_table

    network = network_from(model, weights, device)
    images = images_from(data, labels, limit, size, mean, std)
    found = pa.rotation_control(
        network,
        images.batches,
        layers,
        rotations=rotations,
        fewest=fewest,
        precision=precision,
        seed=seed,
        device=device,
        class_names=images.class_names,
        progress=progress,
    )
    _finish(rotation_table(found.table), found.table, output, str(found.rotated.audit))


def _orders(order: list[str], columns: list[str] | None) -> dict[str, Any]:
    """Give each order its name: the words as they are, and columns of tables."""
    from pyablate.analysis.unit_table import attribute_columns, read_table, table_frame
    from pyablate.experiments.orders import BY_NAME

    found: dict[str, Any] = {}
    used = False
    for what in order:
        if what in BY_NAME:
            found[what] = what
            continue
        if Path(what).suffix not in (".csv", ".zarr"):
            expected = ", ".join(BY_NAME)
            raise InputError(f"--order: expected {expected} or a .csv or .zarr file, got {what!r}")
        frame, used = table_frame(read_table(Path(what))), True
        found |= {name: frame[name] for name in attribute_columns(frame, columns)}
    if columns and not used:
        raise InputError("--column: names attributes of a table, give one with --order FILE")
    return found


def _whole_numbers(option: str, text: str) -> list[float]:
    numbers = parse_numbers(option, text) or ()
    if any(number < 0 or number != int(number) for number in numbers):
        raise InputError(f"{option}: expected whole numbers from 0, got {text!r}")
    return list(numbers)


def _check_output(path: Path | None) -> None:
    if path is None:
        return
    if path.suffix not in SUFFIXES:
        raise InputError(f"--output: expected a name ending in .csv or .json, got {str(path)!r}")
    check_file(path, "--output")


def _finish(shown: Any, rows: pd.DataFrame, path: Path | None, audit: str) -> None:
    """Write the rows, then print the table, the audit, and where the rows are."""
    from pyablate.cli.tables import summary

    if path is not None and path.suffix == ".json":
        with whole(path, "--output") as fresh:
            rows.to_json(fresh, orient="records", indent=1, double_precision=15)
    elif path is not None:
        write_csv(rows, path, "--output")
    out = summary.console()
    out.print(shown)
    out.print(f"Audit: {audit}")
    say_written(out, path)
