"""What the shell prints: the summary of a run, the layers of a network, the state of an install."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Console
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from pyablate.io.sanitize import visible

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import ConsoleOptions, RenderableType

    from pyablate.network.sites import Site
    from pyablate.reference.timing import HookLoopTiming
    from pyablate.result import AblationResult

_TOP_UNITS = 5
_PIPED_WIDTH = 120


def console(*, stderr: bool = False) -> Console:
    """Make a console that does not squeeze tables into 80 columns when piped into a file."""
    made = _Console(stderr=stderr, markup=False, highlight=False, soft_wrap=False)
    if made.is_terminal:
        return made
    return _Console(stderr=stderr, markup=False, highlight=False, width=_PIPED_WIDTH)


class _Console(Console):
    """Lets no control characters through but rich's own, whatever was printed."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield segment._replace(text=visible(segment.text, keep="\n"))


def cell(name: object) -> Text:
    """Make a cell of a table that shows a name as it is, which may hold what rich takes for markup.

    Control characters are shown before the width of the column is measured.
    """
    return Text(visible(str(name)))


def print_summary(out: Console, result: AblationResult) -> None:
    """Print baseline accuracy, the units that matter most per layer, the audit and the time."""
    units, images = len(result.units), len(result.labels)
    out.print(
        f"Baseline accuracy {_percent(result.baseline_accuracy)} on {images:,} images; "
        f"{units:,} units, one at a time, replaced by: {result.intervention}"
    )
    out.print(summary_table(result))
    out.print(f"Audit: {result.audit}")
    for name, measure in result.measures.items():
        out.print(f"{name.capitalize()} changes: {measure.accuracy}")
    out.print(f"Time: {_seconds(result.seconds)} for {units * images:,} (unit, image) pairs")


def summary_table(result: AblationResult) -> Table:
    """Tabulate, per layer, its units, largest accuracy drop and five worst class drops.

    Drops are in percentage points, positive where ablation does harm.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Layer", overflow="fold")
    table.add_column("Units", justify="right")
    table.add_column("Computed by")
    table.add_column("Largest accuracy drop", justify="right")
    table.add_column("Unit", justify="right")
    table.add_column("hurts most", overflow="fold")
    table.add_column("by (points)", justify="right")
    layers = result.units["layer"].to_numpy()
    numbers = result.units["unit"].to_numpy()
    for layer in dict.fromkeys(layers):
        rows = np.flatnonzero(layers == layer)
        how = result.strategy.get(layer, "")
        first = [str(layer), f"{len(rows):,}", how, _largest_drop(result, rows, numbers)]
        for row in _worst(result, rows):
            hurt = result.class_names[result.max_class[row]]
            drop = 100 * float(result.max_class_drop[row])
            cells = [*first, str(numbers[row]), hurt, f"{drop:.2f}"]
            table.add_row(*map(cell, cells))
            first = ["", "", "", ""]
        table.add_section()
    return table


def hook_loop_lines(result: AblationResult, timing: HookLoopTiming) -> list[str]:
    """Compare the time of a run with the plain hook loop, and say how that was measured."""
    layout = "channels last" if timing.channels_last else "contiguous"
    timed_images = (
        f"all {timing.images:,}"
        if timing.images_timed == timing.images
        else f"{timing.images_timed:,} of {timing.images:,}"
    )
    lines = [
        f"Plain hook loop on this machine: {_seconds(timing.seconds)}, estimated by timing "
        f"{timing.units_timed} of {timing.units:,} units on {timed_images} images "
        f"({_seconds(timing.measured_seconds)}, batches of {timing.batch_size}, {layout}) "
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
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Layer", overflow="fold")
    table.add_column("Kind")
    table.add_column("Units", justify="right")
    table.add_column("Output of one image", justify="right")
    table.add_column("Axis", justify="right")
    table.add_column('in "*"')
    chosen = {site.name for site in selected}
    for site in sites:
        shape = " x ".join(str(size) for size in site.shape)
        mark = "yes" if site.name in chosen else ""
        table.add_row(cell(site.name), site.kind, f"{site.channels:,}", shape, str(site.axis), mark)
    return table


def facts_table(facts: dict[str, Any]) -> Table:
    """Tabulate names and values."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(cell(name), cell(_fact(value)))
    return table


def _largest_drop(result: AblationResult, rows: np.ndarray, numbers: np.ndarray) -> str:
    drops = result.accuracy_drop[rows]
    best = int(np.argmax(drops))
    return f"{100 * float(drops[best]):.2f} (unit {numbers[rows[best]]})"


def _worst(result: AblationResult, rows: np.ndarray) -> np.ndarray:
    """Rows with the largest class accuracy drop, worst first; equal drops in unit order."""
    order = np.argsort(-result.max_class_drop[rows], kind="stable")
    worst: np.ndarray = rows[order[:_TOP_UNITS]]
    return worst


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _seconds(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    if seconds < 6000:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _fact(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, dict):
        return ", ".join(f"{name} {_fact(inner)}" for name, inner in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return str(value)
