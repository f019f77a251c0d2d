"""The shell's ``sensitivity`` and ``compare``, and what is ranked by."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pyablate.cli.common import check_files
from pyablate.cli.options import (
    Bar,
    Device,
    Guarantee,
    Images,
    Network,
    Preprocessing,
    Risk,
    Seed,
)
from pyablate.cli.tables import (
    chance,
    change,
    columns,
    count,
    figure,
    frame_table,
    number,
    points,
    show,
)
from pyablate.io.atomic import write_csv
from pyablate.io.sanitize import visible

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from pyablate.cli.data_specs import Data
    from pyablate.comparison import Comparison
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
    typer.Option(
        min=0, max=1, metavar="SHARE", help="Share of the units that goes; may be given again."
    ),
]


_SENSITIVITY_COLUMNS = (
    *columns(str, "Layer=layer"),
    *columns(lambda share: f"{100 * share:.1f} %", "gone=fraction"),
    *columns(count, "units"),
    *columns(points, "accuracy"),
    *columns(change, "drop=accuracy_drop"),
    *columns(str, "hurts most=max_class"),
    *columns(points, "by (points)=max_class_drop"),
)
_CERTIFICATE_COLUMNS = (
    *columns(str, "guarantee"),
    *columns(count, "computed"),
    *columns(points, "wrong at most (95 %)=upper_bound"),
)
_ATTRIBUTION_COLUMNS = (
    *columns(str, "Attributions=method"),
    *columns(number, "figure"),
    *columns(figure, "mean"),
    *columns(number, "95 % interval=interval"),
    *columns(count, "images", "undefined"),
)


def sensitivity(
    *,
    network: Network,
    images: Images,
    by: Annotated[
        str, typer.Option(metavar="WHAT", help="Order within a layer; see `pyablate prune`.")
    ] = "l1",
    column: Column = None,
    fraction: Fraction = None,
    stop: Annotated[
        float | None,
        typer.Option(min=0, help="Leave a layer alone once it has lost more accuracy (0.05)."),
    ] = None,
    guarantee: Guarantee = "exact",
    risk: Risk = 1e-5,
    seed: Seed = 0,
    device: Device = None,
    pixels: Preprocessing,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The table, .csv or .json; a killed run resumes it."),
    ] = None,
    progress: Bar = None,
) -> None:
    """Ablate growing shares of one layer at a time, to see how much of each can go.

    Try `pyablate sensitivity demo:resnet --data demo --limit 500 --stop 0.1 --output layers.csv`
    """
    from pyablate.compression import sensitivity as measure
    from pyablate.compression._sensitivity import FRACTIONS

    check_files(output=output)
    check_column(column, [by])
    model = network.load(device)
    loaded = images.load(pixels, network.pixels(model))
    ranking = ranking_of(by, model, loaded, column, "layer", seed)
    found = measure(
        model,
        loaded.batches,
        ranking,
        fractions=fraction or FRACTIONS,
        stop=stop,
        path=output,
        guarantee=guarantee,
        risk=risk,
        class_names=loaded.class_names,
        device=device,
        progress=progress,
    )
    shown = (*_SENSITIVITY_COLUMNS, *(() if guarantee == "exact" else _CERTIFICATE_COLUMNS))
    show(frame_table(found, shown, grouped=1), written=[output])


def compare(
    *,
    network: Network,
    smaller: Annotated[
        str, typer.Argument(metavar="OTHER", help="The other network.", show_default=False)
    ],
    other_weights: Annotated[
        str | None, typer.Option(metavar="FILE", help="Weights of the other network.")
    ] = None,
    data: Images,
    device: Device = None,
    pixels: Preprocessing,
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
) -> None:
    """Compare two networks with the same classes: which classes suffer, which images differ.

    Try `pyablate compare demo:alexnet demo:vgg_bn --data demo --limit 2000 --csv classes.csv`
    """
    import pyablate as pa

    check_files(csv=csv, images=images)
    other = Network(model=smaller, weights=other_weights, logits=network.logits)
    networks = network.load(device), other.load(device)
    loaded = data.load(pixels, network.pixels(networks[0]))
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
    if smaller == network.model:  # with other weights
        tables = _comparison_tables(found, "before", "after")
    else:
        typer.echo(visible(f"first: {network.model}; second: {smaller}"))
        tables = _comparison_tables(found, "first", "second")
    show(*tables, written=[csv, images])


def _comparison_tables(found: Comparison, one: str, other: str) -> list[Table]:
    """Tabulate figures of both networks, one row per class, and attributions if there are any."""
    import pandas as pd

    summary = found.summary()
    names = ["accuracy", "worst_class_accuracy", "mean_class_accuracy"]
    if found.labelled:
        names.append("calibration_error")  # of how sure a network is of what is right
    both: list[tuple[str, ...]] = [
        (
            f"{name.replace('_', ' ').replace('accuracy', found.word)}, %",
            *(points(summary[f"{name}_{which}"]) for which in ("before", "after")),
        )
        for name in names
    ]
    both += [
        ("loss", figure(summary["loss_before"]), figure(summary["loss_after"])),
        ("differing predictions, %", "", points(summary["differing"])),
        (f"p of the {'accuracies' if found.labelled else 'agreements'}", "", chance(summary["p"])),
    ]
    tables = [
        frame_table(
            pd.DataFrame(both, columns=["Figure", one, other]),
            (*columns(str, "Figure"), *columns(number, one, other)),
        ),
        frame_table(
            found.classes().sort_values("drop", ascending=False, kind="stable"),
            (
                *columns(str, "Class=class"),
                *columns(count, "images"),
                *columns(points, f"{one}=before", f"{other}=after", "drop", "excess"),
                *columns(count, "lost", "gained"),
                *columns(chance, "q"),
            ),
        ),
    ]
    if found.attributions is not None:
        kept = found.attributions.summary()
        interval = kept["low"].map(figure) + " to " + kept["high"].map(figure)
        kept = kept.assign(interval=interval)
        tables.append(frame_table(kept, _ATTRIBUTION_COLUMNS, grouped=1))
    return tables


def check_column(column: str | None, by: list[str]) -> None:
    """Refuse a column where no ranking has any."""
    from pyablate.compression.filters import CRITERIA

    if column is not None and all(what in (*CRITERIA, "random") for what in by):
        raise ValueError(
            f"--column: expected beside it a --by that names a result or a table, got {column!r} "
            f"and --by {', '.join(by)}"
        )


def ranking_of(
    what: str, network: nn.Module, images: Data, column: str | None, scope: str, seed: int
) -> Ranking:
    """Rank by what ``--by`` names."""
    import pyablate as pa
    from pyablate.analysis.unit_table import read_table
    from pyablate.compression.filters import CRITERIA, filter_ranking

    sample = images.first(2)
    if what in CRITERIA:
        return filter_ranking(network, sample, what, scope=scope, data=images.batches)
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
