"""What all plots share: axes, colours, labels with units, ticks.

The colours are those of Okabe and Ito (2008), readable to the colour-blind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyablate._validation import optional
from pyablate.io.sanitize import visible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P")
"""One fewer than colours, so that 42 pairs of both are different."""
CHANCE = "0.6"
"""Grey of whatever chance alone may explain."""

ABOVE: dict[str, Any] = {
    "xytext": (0, 4),
    "textcoords": "offset points",
    "ha": "center",
    "fontsize": "x-small",
}
"""Text above a point."""

CLASS_DROP = "class accuracy drop (percentage points)"

_POINTS = {
    "accuracy_drop": "accuracy drop",
    "max_class_drop": "largest class accuracy drop",
    "split_half_drop": "largest class accuracy drop, split halves",
    "preferred_class_drop": "accuracy drop of the preferred class",
}
_PERCENT = {
    "fraction": "share of units removed",
    "accuracy": "accuracy",
    "worst_class_accuracy": "accuracy of the worst class",
    "mean_class_accuracy": "mean accuracy of the classes",
    "target_accuracy": "accuracy of the curve's own class",
    "target_balanced_accuracy": "balanced accuracy of the curve's own class",
}
_PLAIN = {
    "removed": "units removed",
    "kept": "units kept",
    "units": "units removed",
    "flops": "FLOPs of one image",
    "parameters": "parameters",
    "loss": "cross entropy (nats)",
}


def new_axes(ax: Axes | None, *, width: float, height: float) -> Axes:
    """Take the axes given or those of a new figure, without spines above and to the right.

    Parameters
    ----------
    ax : matplotlib.axes.Axes, optional
        Axes given.
    width, height : float
        Size of a new figure in inches.

    Raises
    ------
    ImportError
        matplotlib is not installed.
    """
    # An extra, and slow to import.
    pyplot = optional("matplotlib.pyplot", "plots need matplotlib: pip install 'pyablate[plot]'")
    if ax is None:
        ax = pyplot.subplots(figsize=(width, height), layout="constrained")[1]
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def plain(name: str) -> str:
    """Write a name so that matplotlib draws it as it is, and no formula between its ``$``."""
    return visible(name).replace("$", r"\$")


def entry(name: str) -> str:
    """Write a name for a legend, which leaves out what begins with an underscore."""
    return plain(f" {name}" if name.startswith("_") else name)


def label_of(name: str) -> tuple[str, float]:
    """Label of an axis, and what to multiply its numbers by."""
    if name in _POINTS:
        return f"{_POINTS[name]} (percentage points)", 100.0
    if name in _PERCENT:
        return f"{_PERCENT[name]} (%)", 100.0
    return _PLAIN.get(name, plain(name.replace("_", " "))), 1.0


def tick(axis: Any, names: Sequence[str], *, turned: bool = False) -> None:
    """Name the places 0, 1, ...; smaller where there are many, none where they cannot be read."""
    if len(names) > 120:
        axis.set_ticks([])
        return
    size = "small" if len(names) <= 40 else "xx-small"
    how = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if turned else {}
    axis.set_ticks(range(len(names)), [plain(name) for name in names], fontsize=size, **how)


def legend(axes: Axes, title: str | None = None) -> None:
    """Draw the legend without a frame, beside the axes if it is long."""
    long = len(axes.get_legend_handles_labels()[1]) > 6
    where: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if long else {}
    axes.legend(frameon=False, fontsize="small", title=title, title_fontsize="small", **where)
