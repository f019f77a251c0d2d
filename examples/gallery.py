"""Draw the pictures of docs/guides/gallery.md from a real run: one of each kind of plot.

    python examples/gallery.py --output docs/images/gallery

Needs matplotlib and Torch-Pruning: ``pip install 'pyablate[plot,compression]'``. Takes about a
minute on two idle cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes

import pyablate as pa
from pyablate import compression

mpl.use("Agg")

NAMES = {"class_names": pa.demo.CLASSES}
LAYER = "features.16"
SHARES = [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5]


def pictures(limit: int) -> dict[str, Axes]:
    """Run everything on the first images and draw it, by the name of the file."""
    model, images, labels = pa.demo.load("vgg_bn", limit=limit)
    data = images, labels
    result = pa.ablate(model, data, layers=["*"], **NAMES)
    table = pa.attributes(model, data, ["*"], ["weights", "selectivity", "gradients"])
    last = table.sel(unit=table["layer"] == LAYER)
    orders = {
        "l1 norm": last["l1_norm"],
        "class selectivity": last["class_selectivity"],
        "measured drop": "drop",
        "random": "random",
    }
    shared = {"steps": 16, "repeats": 5, **NAMES}
    removed = pa.cumulative(model, data, LAYER, order=orders, **shared)
    of_class = pa.cumulative(model, data, LAYER, order="class", **shared)
    rankings = {
        "l1 norm": compression.filter_ranking(model, images[:2], "l1"),
        "largest class drop": pa.rank(
            model, images[:2], result, column="max_class_drop", scope="layer"
        ),
    }
    pruned = pa.prune_curve(model, data, rankings, fractions=SHARES, seeds=3, **NAMES)
    worst = result.units["label"].iloc[int(result.max_class_drop.argmax())]
    return {
        "drops": result.plot.drops(),
        "overall": result.plot.drops("accuracy_drop"),
        "heat-map": result.plot.heat_map(25, order="cluster", limit=15),
        "profile": result.plot.profile(worst),
        "scatter": result.plot.scatter(table, "taylor", layers=["features.13", LAYER]),
        "cumulative": removed.plot(),
        "classes": of_class.plot(y="target_balanced_accuracy"),
        "prune": pa.plots.prune_curves(pruned, y="worst_class_accuracy"),
    }


def main() -> None:
    """Write one PNG file per picture."""
    parser = argparse.ArgumentParser(description="Draw the pictures of docs/guides/gallery.md.")
    parser.add_argument("--output", type=Path, default=Path("docs/images/gallery"))
    parser.add_argument("--limit", type=int, default=1000, help="how many images")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    for name, axes in pictures(given.limit).items():
        # No software version or date in the file: equal results give equal pictures.
        axes.figure.savefig(given.output / f"{name}.png", dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
