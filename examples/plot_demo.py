"""Draw what `pyablate demo` wrote: which units matter, and to which class.

    python examples/plot_demo.py demo/run.zarr --output docs/images/demo.png

Needs matplotlib. Left: every unit of every layer by its largest class accuracy drop. Right: the
units that hurt a class most, and what they do to every class.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

import pyablate as pa

mpl.use("Agg")
from matplotlib import pyplot as plt


def draw_units(axes: Axes, result: pa.AblationResult) -> None:
    """One dot per unit, layers side by side; the share of a layer's width is arbitrary."""
    layers = list(dict.fromkeys(result.units["layer"]))
    spread = np.random.default_rng(0).uniform(-0.32, 0.32, len(result.units))
    for number, layer in enumerate(layers):
        rows = np.flatnonzero(result.units["layer"] == layer)
        axes.scatter(
            number + spread[rows], 100 * result.max_class_drop[rows], s=9, alpha=0.6, linewidths=0
        )
        worst = rows[np.argmax(result.max_class_drop[rows])]
        axes.annotate(
            f"unit {result.units['unit'][worst]}:\n{result.class_names[result.max_class[worst]]}",
            (number + spread[worst], 100 * result.max_class_drop[worst]),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=7,
        )
    turned = len(layers) > 8
    axes.set_xticks(
        range(len(layers)), layers, rotation=60 * turned, ha="right" if turned else "center"
    )
    axes.set_ylabel("largest class accuracy drop (points)")
    axes.set_title("Every unit, switched off alone", fontsize=10)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def draw_classes(axes: Axes, result: pa.AblationResult, units: int) -> None:
    """Class by class, what the units with the largest class drops do."""
    rows = np.argsort(-result.max_class_drop, kind="stable")[:units]
    drops = 100 * result.class_accuracy_drop[rows]
    limit = float(np.nanmax(np.abs(drops))) or 1.0
    image = axes.imshow(drops, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_yticks(range(len(rows)), result.units["label"].iloc[rows], fontsize=7)
    axes.set_xticks(range(result.classes), result.class_names, rotation=45, ha="right", fontsize=8)
    axes.set_title(f"The {len(rows)} units that hurt a class most", fontsize=10)
    axes.figure.colorbar(image, ax=axes, label="class accuracy drop (points)", shrink=0.8)


def main() -> None:
    """Read a result and write the picture."""
    parser = argparse.ArgumentParser(description="Draw what `pyablate demo` wrote.")
    parser.add_argument("result", nargs="?", default="demo/run.zarr")
    parser.add_argument("--output", type=Path, default=Path("demo/units.png"))
    parser.add_argument("--units", type=int, default=20, help="rows of the right panel")
    given = parser.parse_args()

    result = pa.load(given.result)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), width_ratios=(1.15, 1))
    draw_units(left, result)
    draw_classes(right, result, given.units)
    figure.suptitle(
        f"{len(result.units):,} units, {len(result.labels):,} images, "
        f"baseline accuracy {100 * result.baseline_accuracy:.2f} %",
        fontsize=11,
    )
    figure.tight_layout()
    given.output.parent.mkdir(parents=True, exist_ok=True)
    # No software version or date in the file: equal results give equal pictures.
    figure.savefig(given.output, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
