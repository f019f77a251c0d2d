"""Draw what `pyablate demo` wrote: which units matter, and to which class.

    python examples/plot_demo.py demo/run.zarr --output docs/images/demo.png

Needs matplotlib: ``pip install 'pyablate[plot]'``. Left: every unit of every layer by its largest
class accuracy drop. Right: the units that hurt a class most, and what they do to every class.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl

import pyablate as pa

mpl.use("Agg")
from matplotlib import pyplot as plt


def main() -> None:
    """Read a result and write the picture."""
    parser = argparse.ArgumentParser(description="Draw what `pyablate demo` wrote.")
    parser.add_argument("result", nargs="?", default="demo/run.zarr")
    parser.add_argument("--output", type=Path, default=Path("demo/units.png"))
    parser.add_argument("--units", type=int, default=20, help="rows of the right panel")
    given = parser.parse_args()

    result = pa.load(given.result)
    shape = {"figsize": (12, 5), "width_ratios": (1.15, 1), "layout": "constrained"}
    figure, (left, right) = plt.subplots(1, 2, **shape)
    result.plot.drops(ax=left)
    result.plot.heat_map(given.units, ax=right)
    figure.suptitle(
        f"{len(result.units):,} units, {len(result.labels):,} images, "
        f"baseline accuracy {100 * result.baseline_accuracy:.2f} %",
        fontsize=11,
    )
    given.output.parent.mkdir(parents=True, exist_ok=True)
    # No software version or date in the file: equal results give equal pictures.
    figure.savefig(given.output, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
