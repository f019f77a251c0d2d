"""What the shell says of a run: accuracy, the units that matter most, the audit, the time."""

from __future__ import annotations

from collections import Counter
from operator import attrgetter
from typing import TYPE_CHECKING

from pyablate.cli.tables import chance, columns, count, frame_table, number, points

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from rich.console import RenderableType
    from rich.table import Table

    from pyablate.network.sites import Site
    from pyablate.reference.timing import HookLoopTiming
    from pyablate.result import AblationResult

_SHOWN = 5  # units of a layer

_SITE_COLUMNS = (
    *columns(str, "Layer", "Kind"),
    *columns(count, "Units"),
    *columns(lambda shape: " x ".join(map(str, shape)), "Output of one image"),
    *columns(str, "Axis", 'in "*"'),
)


def summary(result: AblationResult) -> list[RenderableType]:
    """Describe a run in lines and a table."""
    units, images = len(result.units), len(result.labels)
    baseline = f"Baseline accuracy {points(result.baseline_accuracy)} %"
    if not result.labelled:
        baseline = "No labels: agreement with the intact network's predictions"
    seconds = f"Time: {_time(result.seconds)} for {units * images:,} (unit, image) pairs"
    return [
        f"{baseline} on {images:,} images; {units:,} units, one at a time, "
        f"replaced by: {result.intervention}",
        *_worst(result),
        f"Audit: {result.audit}",
        *([] if result.screening is None else [f"Screening: {result.screening}"]),
        *([] if result.estimate is None else [f"Estimate: {result.estimate}", _precision(result)]),
        *(
            f"{name.capitalize()} changes: {each.accuracy}"
            for name, each in result.measures.items()
        ),
        *([seconds] if result.seconds else []),  # none is stored
    ]


def _precision(result: AblationResult) -> str:
    """Say how far off the drops are."""
    width = result.half_width()
    mean, largest = (points(share) for share in (width.mean(), width.max()))
    return (
        f"95 % interval of a unit's {result.word} drop: ± {mean} points on average, ± {largest} at "
        "most"
    )


def _worst(result: AblationResult) -> list[RenderableType]:
    """Tabulate the units that matter most, and say what is not in the table."""
    import numpy as np

    from pyablate.analysis.statistics import layer_rows

    changes = np.diff(result.flips.start) > 0
    silent = [layer for layer, rows in layer_rows(result).items() if not changes[rows].any()]
    found: list[RenderableType] = []
    if result.estimate is not None:
        found.append(_estimated_table(result))
    elif len(silent) < len(layer_rows(result)):
        found += [
            summary_table(result),
            f"Up to {_SHOWN} units a layer, by q, then by drop. q: adjusted probability that a "
            "harmless unit shows as much; noise floor: the drop to expect of one",
        ]
    if silent and result.estimate is None:
        found.append(f"No prediction changes without any one unit of: {', '.join(silent)}")
    ways = Counter(result.strategy.values())
    found.append(f"Computed by: {', '.join(map(_layers, ways, ways.values()))}")
    return found


def _layers(way: str, count: int) -> str:
    return f"{way} ({count} {'layer' if count == 1 else 'layers'})"


def _estimated_table(result: AblationResult) -> Table:
    """Tabulate, per layer, the units with the largest estimated drops, with their intervals."""
    import pandas as pd

    units = result.to_dataframe()[["layer", "unit", "accuracy_drop"]]
    units = units.assign(width=result.half_width())
    parts = [
        rows.nlargest(_SHOWN, "accuracy_drop").assign(units=len(rows))
        for _, rows in units.groupby("layer", sort=False)
    ]
    shown = (
        *columns(str, "Layer=layer"),
        *columns(count, "Units=units"),
        *columns(number, "Unit=unit"),
        *columns(points, f"{result.word.capitalize()} drop=accuracy_drop", "95 %: ±=width"),
    )
    return frame_table(pd.concat(parts), shown, grouped=2)


def summary_table(result: AblationResult) -> Table:
    """Tabulate, per layer, its units, largest drop of all images and five worst class drops.

    Drops are in percentage points, positive where ablation does harm. Beside a class drop stand the
    images of the class, what a harmless unit would show (noise floor) and q. Units and layers
    without which nothing changes are left out.
    """
    import pandas as pd

    tests = result.max_class_test(splits=1)
    units = result.to_dataframe()[["layer", "unit", "accuracy_drop"]]
    units = units.assign(
        **{name: tests[name] for name in ("max_class", "max_class_drop", "noise_floor", "q")},
        images=result.class_sizes[result.max_class],
        changes=result.flips.start[1:] - result.flips.start[:-1],
    )
    parts = []
    for _, rows in units.groupby("layer", sort=False):
        first = rows.nlargest(1, "accuracy_drop").iloc[0]
        largest = f"{points(first['accuracy_drop'])} (unit {first['unit']})"
        shown = worst_units(rows[rows["changes"] > 0])
        parts.append(shown.assign(units=len(rows), largest=largest))
    shown_columns = (
        *columns(str, "Layer=layer"),
        *columns(count, "Units=units"),
        *columns(number, f"Largest {result.word} drop=largest", "Unit=unit"),
        *columns(str, "hurts most=max_class"),
        *columns(count, "images"),
        *columns(points, "by (points)=max_class_drop", "noise floor=noise_floor"),
        *columns(chance, "q"),
    )
    return frame_table(pd.concat(parts), shown_columns, grouped=3)


def worst_units(units: pd.DataFrame) -> pd.DataFrame:
    """Return the five rows of least q, then of largest class drop; equal ones in unit order."""
    order = {"q": True, "max_class_drop": False}
    return units.sort_values(list(order), ascending=list(order.values()), kind="stable").head(
        _SHOWN
    )


def screened_lines(exact: AblationResult, screened: AblationResult) -> list[str]:
    """Compare a screened run with an exact one of the same pairs."""
    pairs = len(exact.units) * len(exact.labels)
    differ = sum(
        int((exact.predictions(row) != screened.predictions(row)).sum())
        for row in range(len(exact.units))
    )
    return [
        f"Screened: {_time(screened.seconds)}, exact: {_time(exact.seconds)}; "
        f"{differ:,} of {pairs:,} predictions differ",
        f"Screening: {screened.screening}",
    ]


def hook_loop_lines(result: AblationResult, timing: HookLoopTiming) -> list[str]:
    """Compare the time of a run with the plain hook loop, and say how that was measured."""
    layout = "channels last" if timing.channels_last else "contiguous"
    timed_images = (
        f"all {timing.images:,}"
        if timing.images_timed == timing.images
        else f"{timing.images_timed:,} of {timing.images:,}"
    )
    lines = [
        f"Plain hook loop on this machine: {_time(timing.seconds)}, estimated by timing "
        f"{timing.units_timed} of {timing.units:,} units on {timed_images} images "
        f"({_time(timing.measured_seconds)}, batches of {timing.batch_size}, {layout}) "
        "and scaling",
        f"Measured ratio: {timing.seconds / max(result.seconds, 1e-9):.1f} times the time of "
        "this run",
    ]
    if timing.pairs_compared:
        lines.append(
            f"Its predictions on these units: {timing.disagreements:,} of "
            f"{timing.pairs_compared:,} differ from this run ({timing.near_ties:,} near ties "
            "left out)"
        )
    return lines


def sites_table(sites: Sequence[Site], selected: Sequence[Site]) -> Table:
    """Tabulate the layers that can be named: kind, units, shape, axis, and whether ``*`` has them.

    The axis of the units counts the batch as 0.
    """
    import pandas as pd

    about = attrgetter("name", "kind", "channels", "shape", "axis")
    chosen = {site.name for site in selected}
    rows = [(*about(site), "yes" if site.name in chosen else "") for site in sites]
    frame = pd.DataFrame(rows, columns=[name for _, name, _ in _SITE_COLUMNS])
    return frame_table(frame, _SITE_COLUMNS)


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 6000:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
