"""The shell's ``plot``."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyablate._validation import check_choice
from pyablate.cli.common import InputError, check_files
from pyablate.cli.options import Only
from pyablate.io.atomic import whole
from pyablate.io.sanitize import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_log = logging.getLogger("pyablate")

KINDS = ("drops", "heat-map", "profile", "scatter", "cumulative", "prune")
FORMATS = (".png", ".svg", ".pdf")
_CURVES = ("cumulative", "prune")
# Which kinds an option says something about; those not here are for all of them.
_KINDS_OF = {
    "layers": ("drops", "scatter"),
    "unit": ("profile",),
    "units": ("heat-map",),
    "order": ("heat-map",),
    "classes": ("heat-map", "profile"),
    "log": ("drops", "heat-map", "scatter", *_CURVES),
    "limit": ("drops", "heat-map", "scatter"),
    "attributes": ("scatter",),
    "attribute": ("scatter",),
    "target": ("drops", "scatter"),
    "x": _CURVES,
    "y": _CURVES,
}
# No date and no version in the files: equal results give equal pictures.
_METADATA = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What a picture shows; each option is about some kinds only."""

    layers: Only = None
    unit: Annotated[
        str | None, typer.Option(metavar="LAYER:UNIT", help="The unit of a profile.")
    ] = None
    units: Annotated[int, typer.Option(min=1, help="How many units a heat map shows.")] = 20
    order: Annotated[
        str, typer.Option(metavar="NAME", help="Rows of a heat map: drop, layer or cluster.")
    ] = "drop"
    attributes: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Table of attributes of a scatter plot (.csv, .zarr)."),
    ] = None
    attribute: Annotated[
        str | None, typer.Option(metavar="NAME", help="The attribute of a scatter plot.")
    ] = None
    target: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What drops and scatter plots show: max_class_drop, accuracy_drop, and for "
            "scatter plots split_half_drop, gini, entropy ...",
        ),
    ] = None
    x: Annotated[str | None, typer.Option(metavar="COLUMN", help="Across, of curves.")] = None
    y: Annotated[str, typer.Option(metavar="COLUMN", help="Upwards, of curves.")] = "accuracy"
    classes: Annotated[
        int | None,
        typer.Option(
            min=1, help="How many classes at most, the most changed: 50 (heat-map), 20 (profile)."
        ),
    ] = None
    log: Annotated[
        bool | None,
        typer.Option(
            "--log/--linear",
            help="Logarithmic drops (of curves: what is across); left out: drops where a single "
            "one would take half of the axis.",
            show_default=False,
        ),
    ] = None
    limit: Annotated[
        float | None,
        typer.Option(
            metavar="POINTS",
            help="Where drops or their colours end; what is beyond is marked there.",
        ),
    ] = None
    width: Annotated[
        float | None, typer.Option(min=1, max=100, metavar="INCHES", help="Width of the picture.")
    ] = None


def plot(
    *,
    context: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="A result of `pyablate run`; for the kinds cumulative and prune the CSV file of "
            "such curves.",
            show_default=False,
        ),
    ],
    kind: Annotated[
        str, typer.Option(metavar="KIND", help=f"What to draw: {', '.join(KINDS)}.")
    ] = "drops",
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="A .png, .svg or .pdf file.")
    ] = Path("plot.png"),
    options: Drawing,
    dpi: Annotated[int, typer.Option(min=20, max=1200, help="Dots per inch of a .png file.")] = 150,
) -> None:
    """Draw a finished run, or curves.

    `drops`: every unit, layer by layer, with the noise floor. `heat-map`: units x classes.
    `profile`: what one unit does to each class. `scatter`: an attribute against what the ablation
    does. `cumulative`, `prune`: accuracy against what was removed.

    Try `pyablate plot run.zarr -o drops.png`

    `pyablate plot run.zarr --kind profile --unit features.2:18 -o profile.svg`

    `pyablate plot run.zarr --kind scatter --attributes table.csv --attribute l1_norm`

    `pyablate plot curves.csv --kind prune --x flops --y worst_class_accuracy`
    """
    check_choice("--kind", kind, KINDS)
    _check_options(context, kind)
    suffix = output.suffix.lower()
    if suffix not in FORMATS:
        expected = f"a name ending in {', '.join(FORMATS)}"
        raise InputError(f"--output: expected {expected}, got {str(output)!r}")
    check_files(output=output)
    _without_screen()
    axes = (_curves if kind in _CURVES else _of_result)(source, kind, options)
    figure: Any = axes.figure
    if options.width is not None:
        figure.set_figwidth(options.width)
    with whole(output, "--output") as fresh, _about_glyphs():
        figure.savefig(fresh, format=suffix[1:], dpi=dpi, metadata=_METADATA[suffix])
    typer.echo(f"Written: {visible(str(output))}")


def _check_options(context: typer.Context, kind: str) -> None:
    """Refuse options of other kinds of plots, which would change nothing."""
    for name, kinds in _KINDS_OF.items():
        source = context.get_parameter_source(name)
        if kind not in kinds and source is not None and source.name != "DEFAULT":
            expected = " and ".join([", ".join(kinds[:-1]), kinds[-1]] if kinds[1:] else kinds)
            raise InputError(f"--{name}: is for --kind {expected}, got --kind {kind}")


@contextmanager
def _about_glyphs() -> Iterator[None]:
    """Say once what the font lacks, where matplotlib warns of every character by itself."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield
    messages = dict.fromkeys(str(each.message) for each in found)
    lacking = [re.match(r"Glyph (\d+) ", message) for message in messages]
    missing = "".join(chr(int(glyph[1])) for glyph in lacking if glyph)
    for message, glyph in zip(messages, lacking, strict=True):
        if not glyph:
            _log.warning("%s", message)
    if missing:
        _log.warning(
            "the font has no sign for %s; font.family in a matplotlibrc names another",
            missing if len(missing) <= 20 else f"{missing[:20]} and {len(missing) - 20} more",
        )


def _curves(source: Path, kind: str, options: Drawing) -> Axes:
    import pandas as pd

    from pyablate import plots

    if not source.is_file():
        raise InputError(f"{source}: expected the CSV file of curves for --kind {kind}")
    try:
        table = pd.read_csv(source)
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise OSError(f"{source}: not a CSV file: {error}") from None
    given: dict[str, Any] = {"y": options.y, "log": bool(options.log)}
    if kind == "cumulative":
        return plots.cumulative_curves(table, x=options.x or "removed", **given)
    return plots.prune_curves(table, x=options.x or "fraction", **given)


def _of_result(source: Path, kind: str, options: Drawing) -> Axes:
    import pyablate as pa
    from pyablate.analysis.unit_table import read_table

    attributes, attribute, target = options.attributes, options.attribute, options.target
    if kind == "scatter" and (attributes is None or attribute is None):
        raise InputError("--kind scatter: needs --attributes FILE and --attribute NAME")
    if kind == "profile" and options.unit is None:
        raise InputError("--kind profile: needs --unit LAYER:UNIT")
    draw = pa.load(source).plot
    classes: dict[str, Any] = {} if options.classes is None else {"classes": options.classes}
    if kind == "profile":
        return draw.profile(str(options.unit), **classes)
    axis: dict[str, Any] = {"log": options.log, "limit": options.limit}
    if kind == "heat-map":
        order: Any = options.order  # checked there
        return draw.heat_map(options.units, order=order, **axis, **classes)
    axis["layers"] = options.layers
    if attributes is not None and attribute is not None:
        target = target or "split_half_drop"
        return draw.scatter(read_table(attributes), attribute, target, **axis)
    return draw.drops(target or "max_class_drop", **axis)  # type: ignore[arg-type]


def _without_screen() -> None:
    """Draw into files only, whatever the machine has."""
    try:
        import matplotlib as mpl
    except ImportError:
        return  # the plot itself says what is missing
    mpl.use("Agg")
