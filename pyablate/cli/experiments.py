"""The shell's ``cumulative``, ``pairs``, ``minimal-sets``, ``shapley`` and ``rotation``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyablate.cli.common import (
    InputError,
    check_files,
    check_suffix,
    parse_axes,
    parse_integers,
)
from pyablate.cli.options import (
    Axes,
    Bar,
    Device,
    Guarantee,
    Images,
    Intervention,
    Layers,
    Network,
    Precision,
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
from pyablate.io.atomic import whole, write_csv

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

    from pyablate.experiments import Cumulative, Pairs, Shapley
    from pyablate.result import AblationResult

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

_POINTS = 8
_PAIRS = 10
_PAIR_COLUMNS = (
    *columns(str, "Unit=first", "and unit=second"),
    *columns(change, "drop=first_drop", "drop=second_drop", "of both=joint_drop", "interaction"),
    *columns(count, "more", "less"),
    *columns(chance, "p", "q"),
)
_SET_COLUMNS = (
    *columns(str, "Class=class"),
    *columns(count, "units=size"),
    *columns(lambda reached: "yes" if reached else "no", "at chance=reached"),
    *columns(str, "minimal"),
    *columns(points, "before=baseline_accuracy", "after=accuracy", "others lose=others_drop"),
    *columns(str, "which=units"),
)
_VALUES = 10
_VALUE_COLUMNS = (
    *columns(str, "Unit=unit"),
    *columns(figure, "value", "error=standard_error", "from=lower", "to=upper"),
    *columns(count, "samples"),
    *columns(lambda decided: "yes" if decided else "no", "decided"),
)
_ROTATION_COLUMNS = (
    *columns(str, "Layer=layer", "Figure=figure"),
    *columns(number, "units", "rotated", "difference", "from=difference_low", "to=difference_high"),
    *columns(chance, "p"),
)
_SIDES = {"units": "units", "rotated": "rotated directions"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every experiment takes."""

    precision: Precision = "auto"
    guarantee: Guarantee = "exact"
    risk: Risk = 1e-5
    seed: Seed = 0
    axis: Axes = None
    device: Device = None
    pixels: Preprocessing
    output: Rows = None
    progress: Bar = None

    def load(self, network: Network, images: Images) -> tuple[Any, Any, dict[str, Any]]:
        """Return the network, the images, and the options of every experiment."""
        if self.output is not None:
            check_suffix(self.output, (".csv", ".json"))
            check_files(output=self.output)
        model = network.load(self.device)
        data = images.load(self.pixels, network.pixels(model))
        options = {
            "precision": self.precision,
            "guarantee": self.guarantee,
            "risk": self.risk,
            "seed": self.seed,
            "axis": parse_axes(self.axis),
            "device": self.device,
            "class_names": data.class_names,
            "progress": self.progress,
        }
        return model, data.batches, options


def cumulative(
    *,
    network: Network,
    images: Images,
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
    settings: Settings,
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
    orders = _orders(order, column)
    import pyablate as pa

    model, data, options = settings.load(network, images)
    found = pa.cumulative(
        model,
        data,
        layers,
        order=orders,
        ascending=ascending,
        keep=keep,
        steps=steps,
        repeats=repeats,
        intervention=intervention,
        **options,
    )
    _finish(_cumulative_table(found), found.to_dataframe(), settings.output, found.result)


def pairs(
    *,
    network: Network,
    images: Images,
    layer: Annotated[str, typer.Option(metavar="NAME", help="The layer whose units are paired.")],
    units: Annotated[
        str | None,
        typer.Option(metavar="U,U,...", help="Only pairs of these units; all if left out."),
    ] = None,
    intervention: Intervention = "zero",
    settings: Settings,
) -> None:
    """Ablate all pairs of units of a layer, to see which do together what neither does alone.

    The interaction is the accuracy drop of both at once minus the sum of their single drops.
    Positive: they back each other up. Negative: they break the same images. The largest of many is
    large by chance alone: q is adjusted for that. The written table has one row per pair.

    Try `pyablate pairs demo:alexnet --data demo --limit 500 --layer features.4 -o pairs.csv`
    """
    chosen = None if units is None else parse_integers("--units", units, least=0)
    import pyablate as pa

    model, data, options = settings.load(network, images)
    found = pa.pairs(model, data, layer, units=chosen, intervention=intervention, **options)
    rows = _pair_rows(found)
    _finish(_pair_table(rows), rows, settings.output, found.result)


def minimal_sets(
    *,
    network: Network,
    images: Images,
    layers: Layers = ["*"],  # noqa: B006  # typer copies it
    chosen: Annotated[
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
    exhaust: Annotated[
        int, typer.Option(min=1, metavar="K", help="Try all sets of up to K units besides.")
    ] = 1,
    intervention: Intervention = "zero",
    settings: Settings,
) -> None:
    """Find, for each class, few units without which it is lost.

    Units are added by their single drops of the class (by its loss where no unit alone costs it an
    image) until its accuracy is at chance, then put back where they are not needed; `minimal` tells
    whether all smaller sets were tried. Sets are found on one half of the images and measured on
    the other; `others lose` tells a set that is about the class from plain destruction.

    Try `pyablate minimal-sets demo:vgg_bn --data demo --limit 1000 --layers features.16
    --class Bag --class Sandal -o sets.json`
    """
    import pyablate as pa

    model, data, options = settings.load(network, images)
    found = pa.minimal_sets(
        model,
        data,
        layers,
        classes=chosen,
        chance=chance,
        largest=largest,
        prune=prune,
        exhaust=exhaust,
        intervention=intervention,
        **options,
    )
    rows = found.table.assign(units=found.table["units"].map(" ".join))
    _finish(frame_table(found.shown, _SET_COLUMNS), rows, settings.output, found.result)


def shapley(
    *,
    network: Network,
    images: Images,
    layers: Layers = ["*"],  # noqa: B006  # typer copies it
    top: Annotated[
        int | None,
        typer.Option(min=1, metavar="K", help="Only find the K units of largest value."),
    ] = None,
    target: Annotated[
        str | None, typer.Option("--class", metavar="NAME", help="Accuracy on this class only.")
    ] = None,
    measure: Annotated[str, typer.Option(help="What is lost: accuracy or loss.")] = "accuracy",
    permutations: Annotated[int, typer.Option(min=1, help="Orders to draw, at most.")] = 100,
    truncation: Annotated[
        float | None,
        typer.Option(min=0, help="An order ends this near to the performance without all units."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="How exactly a value has to be known.")
    ] = 0.0,
    confidence: Annotated[
        float, typer.Option(help="Probability with which all intervals hold together.")
    ] = 0.95,
    interval: Annotated[
        str | None,
        typer.Option(help="bernstein (certain, but wide) or student; see the guide."),
    ] = None,
    intervention: Intervention = "zero",
    settings: Settings,
) -> None:
    """Estimate the Shapley value of units: what each is worth in all company.

    Units are taken away one after another in random orders; what is lost when a unit goes, on
    average, is its value. A unit that another backs up has a value, too, and all values add up to
    what is lost without all units. With `--top` sampling stops for a unit that is among the top
    ones, or not, for certain. The written table has one row per unit, the printed one the largest.

    Try `pyablate shapley demo:vgg_bn --data demo --limit 500 --layers features.16
    --permutations 20 -o values.csv`
    """
    import pyablate as pa

    model, data, options = settings.load(network, images)
    found = pa.shapley(
        model,
        data,
        layers,
        top=top,
        target=target,
        measure=measure,
        permutations=permutations,
        truncation=truncation,
        tolerance=tolerance,
        confidence=confidence,
        interval=interval,
        intervention=intervention,
        **options,
    )
    _finish(_value_table(found), found.to_dataframe(), settings.output, found)


def rotation(
    *,
    network: Network,
    images: Images,
    layers: Layers = ["*"],  # noqa: B006  # typer copies it
    rotations: Annotated[int, typer.Option(min=1, help="Random rotations of each layer.")] = 3,
    fewest: Annotated[
        int, typer.Option(min=1, help="Lost images that a unit must have to count for gini.")
    ] = 10,
    settings: Settings,
) -> None:
    """Are single units special? Compare them with random directions of the same layer.

    gini is how concentrated on few classes the harm is (0: all alike); split_half_drop the largest
    class drop without the bias of choosing its class. Drops are printed in percentage points.
    Intervals are 95 % bootstrap over units.

    Try `pyablate rotation demo:vgg_bn --data demo --limit 1000 --layers features.16 -o turned.csv`
    """
    import pyablate as pa

    model, data, options = settings.load(network, images)
    found = pa.rotation_control(model, data, layers, rotations=rotations, fewest=fewest, **options)
    table = frame_table(_in_points(found.table), _ROTATION_COLUMNS, grouped=1)
    remarks = _without_figures(found.table, fewest)
    _finish(table, found.table, settings.output, found.rotated, remarks)


def _in_points(table: pd.DataFrame) -> pd.DataFrame:
    """Write drops in percentage points, gini as it is; what is not a number stays one."""
    drops = table["figure"].str.endswith("_drop")
    shown = {name for _, name, written in _ROTATION_COLUMNS if written is number}
    return table.assign(
        **{
            name: [
                value if value != value else points(value) if drop else figure(value)
                for value, drop in zip(table[name], drops, strict=True)
            ]
            for name in shown
        }
    )


def _without_figures(table: pd.DataFrame, fewest: int) -> list[str]:
    """Say why rows are empty, once for all layers."""
    empty = table[table["figure"] == "gini"]
    return [
        f"No gini of the {said} of {', '.join(layers)}: none of them loses {fewest} images "
        "(--fewest)"
        for side, said in _SIDES.items()
        if (layers := list(empty["layer"][empty[side].isna()]))
    ]


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


def _cumulative_table(found: Cumulative) -> Table:
    """Tabulate the accuracy at a few steps and the area of each curve; random orders by means."""
    import numpy as np
    import pandas as pd

    steps = np.unique(np.linspace(0, found.data.sizes["step"] - 1, _POINTS + 1).round().astype(int))
    removed = found.data["removed"].to_numpy()[steps]
    curves = found.area.assign(curve=np.arange(found.data.sizes["curve"]))
    rows = []
    for (order, target), same in curves.groupby(["order", "target"], sort=False):
        name = "class_accuracy" if target else "accuracy"
        accuracy = found.data[name].isel(curve=same["curve"].to_numpy(), step=steps)
        if target:
            accuracy = accuracy.sel({"class": target})
        several = f"{order} (mean of {len(same)})" if len(same) > 1 else str(order)
        area = same["target_area" if target else "area"].mean()
        rows.append([several, target, *accuracy.mean("curve").to_numpy(), area])
    shown = (
        *columns(str, "Order", "of class"),
        *columns(points, *(f"{gone:,} gone" for gone in removed)),
        *columns(figure, "area"),
    )
    frame = pd.DataFrame(rows, columns=[name for _, name, _ in shown])
    return frame_table(frame, shown)


def _pair_rows(found: Pairs) -> pd.DataFrame:
    """One row per pair: labels, drops, interaction overall and of each class, tests."""
    import pandas as pd

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
    by_class = pd.DataFrame(data["class_interaction"].to_numpy(), columns=classes)
    return pd.concat([rows, by_class], axis=1)


def _pair_table(rows: pd.DataFrame) -> Table:
    """Tabulate the pairs with the strongest interactions, by p and then by size."""
    size = rows["interaction"].abs()
    best = rows.assign(size=size).sort_values(["p", "size"], ascending=[True, False], kind="stable")
    return frame_table(best.head(_PAIRS), _PAIR_COLUMNS)


def _value_table(found: Shapley) -> Table:
    """Tabulate the units of largest value."""
    largest = found.to_dataframe().sort_values("value", ascending=False, kind="stable")
    return frame_table(largest.head(found.data.attrs.get("top", _VALUES)), _VALUE_COLUMNS)


def _finish(
    table: Table,
    rows: pd.DataFrame,
    path: Path | None,
    made: AblationResult | Shapley,
    remarks: Sequence[str] = (),
) -> None:
    """Write the rows, then print the table, what is known of its runs, and where the rows are."""
    if path is not None and path.suffix == ".json":
        with whole(path, "--output") as fresh:
            rows.to_json(fresh, orient="records", indent=1, double_precision=15)
    elif path is not None:
        write_csv(rows, path, "--output")
    screened = [] if made.screening is None else [f"Screening: {made.screening}"]
    show(table, *remarks, f"Audit: {made.audit}", *screened, written=[path])
