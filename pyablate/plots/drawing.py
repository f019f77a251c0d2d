"""What all plots share: axes, colours, labels with units, ticks.

The colours are those of Okabe and Ito (2008), readable to the colour-blind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pyablate._validation import optional
from pyablate.io.sanitize import visible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

    from pyablate.results.arrays import Floats

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

_LOGARITHMIC = "(logarithmic beyond ±{:g})"

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
    "places": "places removed",
    "loss": "cross entropy (nats)",
}
_LARGE = {
    "flops": ("FLOPs of one image", "{}FLOPs of one image", ("G", "M", "k")),
    "parameters": ("parameters", "parameters ({})", ("billions", "millions", "thousands")),
}
"""Label of small numbers, of large ones, and what stands there for 1e9, 1e6 and 1e3."""


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


def label_of(name: str, largest: float = 0.0) -> tuple[str, float]:
    """Label of an axis whose numbers go up to ``largest``, and what to multiply them by."""
    if name in _POINTS:
        return f"{_POINTS[name]} (percentage points)", 100.0
    if name in _PERCENT:
        return f"{_PERCENT[name]} (%)", 100.0
    if name in _LARGE:
        label, large, units = _LARGE[name]
        for unit, size in zip(units, (1e9, 1e6, 1e3), strict=True):
            if largest >= size:
                return large.format(unit), 1 / size
        return label, 1.0
    return _PLAIN.get(name, name.replace("_", " ")), 1.0


def squeezed(numbers: ArrayLike) -> bool:
    """Say whether one number in fifty, or a single one, takes half of an axis from 0."""
    numbers = np.asarray(numbers, np.float64)
    sizes = np.sort(np.abs(numbers[np.isfinite(numbers)]))
    few = max(1, len(sizes) // 50)
    return len(sizes) >= 8 and bool(sizes[-1] > 2 * sizes[-1 - few] > 0)


def linear_part(numbers: ArrayLike) -> float:
    """Up to where a symmetric logarithmic scale is linear: the power of ten below the median."""
    sizes = np.abs(np.asarray(numbers, np.float64))
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    return float(10 ** np.floor(np.log10(np.median(sizes)))) if len(sizes) else 1.0


def steps(threshold: float, largest: float) -> Floats:
    """Return numbers to write at a symmetric logarithmic scale: 0, powers of ten, some between."""
    decades = np.arange(np.ceil(np.log10(max(largest / threshold, 1.0)) + 1e-9))
    within = [1.0] if len(decades) > 3 else [1.0, 2.0, 5.0]
    up = np.outer(threshold * 10**decades, within).ravel()
    return np.concatenate([-up[::-1], [0.0], up])


def stretch(axis: Any, numbers: ArrayLike, log: bool | None) -> None:
    """Draw an axis by a symmetric logarithmic scale: if ``log``, or by None where it is squeezed.

    The label says so.
    """
    every = np.asarray(numbers, np.float64)
    finite = every[np.isfinite(every)]
    if log is None:
        log = squeezed(finite)
    if not log or not finite.size:
        return
    threshold = linear_part(finite)
    set_scale = axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale
    set_scale("symlog", linthresh=threshold)
    _write(axis, steps(threshold, float(np.abs(finite).max())))
    axis.set_label_text(f"{axis.get_label_text()}\n{_LOGARITHMIC.format(threshold)}")


def stretch_bar(bar: Any, threshold: float, end: float) -> None:
    """Write numbers beside logarithmic colours, and say that they are."""
    _write(bar.long_axis, steps(threshold, end))
    bar.set_label(f"{bar.ax.get_ylabel()}\n{_LOGARITHMIC.format(threshold)}")


def _write(axis: Any, numbers: Floats) -> None:
    """Write numbers at an axis, which ends where it did."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator  # there are axes already

    axis.set_major_locator(FixedLocator(numbers.tolist()))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}".replace("-", "\u2212")))


def tick(axis: Any, names: Sequence[str], *, turned: bool = False) -> None:
    """Name the places 0, 1, ...; smaller where there are many, every second, third ... beyond."""
    every = -(-len(names) // 120)
    size = "small" if len(names) <= 40 else "xx-small"
    how = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if turned else {}
    shown = [plain(name) for name in names[::every]]
    axis.set_ticks(range(0, len(names), every), shown, fontsize=size, **how)


def legend(axes: Axes, title: str | None = None) -> None:
    """Draw the legend without a frame, beside the axes if it is long."""
    long = len(axes.get_legend_handles_labels()[1]) > 6
    where: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if long else {}
    axes.legend(frameon=False, fontsize="small", title=title, title_fontsize="small", **where)
