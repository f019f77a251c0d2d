"""What the shell says of a run: accuracy, the units that matter most, the audit, the time."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING

from pyablate.cli.tables import columns, count, frame_table, number, points

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from rich.console import RenderableType
    from rich.table import Table

    from pyablate.network.sites import Site
    from pyablate.reference.timing import HookLoopTiming
    from pyablate.result import AblationResult

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
        summary_table(result),
        f"Audit: {result.audit}",
        *([] if result.screening is None else [f"Screening: {result.screening}"]),
        *(
            f"{name.capitalize()} changes: {each.accuracy}"
            for name, each in result.measures.items()
        ),
        *([seconds] if result.seconds else []),  # none is stored
    ]


def summary_table(result: AblationResult) -> Table:
    """Tabulate, per layer, its units, largest drop of all images and five worst class drops.

    Drops are in percentage points, positive where ablation does harm.
    """
    import pandas as pd

    parts = []
    for layer, rows in result.to_dataframe().groupby("layer", sort=False):
        first = rows.nlargest(1, "accuracy_drop").iloc[0]
        largest = f"{points(first['accuracy_drop'])} (unit {first['unit']})"
        how = result.strategy.get(str(layer), "")
        parts.append(worst_units(rows).assign(units=len(rows), how=how, largest=largest))
    shown = (
        *columns(str, "Layer=layer"),
        *columns(count, "Units=units"),
        *columns(str, "Computed by=how"),
        *columns(number, f"Largest {result.word} drop=largest", "Unit=unit"),
        *columns(str, "hurts most=max_class"),
        *columns(points, "by (points)=max_class_drop"),
    )
    return frame_table(pd.concat(parts), shown, grouped=4)


def worst_units(units: pd.DataFrame) -> pd.DataFrame:
    """Return the five rows with the largest class drops, worst first; equal drops in unit order."""
    return units.sort_values("max_class_drop", ascending=False, kind="stable").head(5)


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
