"""Whether the units that matter stay the same when objects are smaller, elsewhere or turned.

    python examples/placement.py [--images 800]

Controls in the manner of SI-Score (Djolonga et al. 2021, *On Robustness and Transferability of
Convolutional Neural Networks*, arXiv:2007.08558), on composites of the shipped images. Writes the
page docs/results/placement.md and its picture, in a few minutes of one core. Needs matplotlib:
``pip install 'pyablate[plot]'``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional

import pyablate as pa
from pyablate.analysis.bootstrap import Variable, coefficients, resample

mpl.use("Agg")
from matplotlib import pyplot as plt

NETWORK = "vgg_bn"
LAYERS = ("features.9", "features.16")
CANVAS = 28
RESAMPLES = 2000


@dataclass(frozen=True)
class Setting:
    """Where an object stands, how large and how turned, and on what.

    Attributes
    ----------
    name : str
        As the page calls it.
    size : int
        Pixels of the object's side on a canvas of 28.
    right, down : int
        Pixels by which it is moved from the centre.
    angle : float
        Degrees by which it is turned against the clock, round the centre of the canvas.
    background : float
        Brightness of another image behind it, of 1.
    """

    name: str
    size: int = CANVAS
    right: int = 0
    down: int = 0
    angle: float = 0
    background: float = 0


PLAIN = Setting("as it is")
SETTINGS = (
    PLAIN,
    Setting("size 24", 24),
    Setting("size 20", 20),
    Setting("size 16", 16),
    Setting("size 16, left", 16, right=-6),
    Setting("size 16, down", 16, down=6),
    Setting("size 20, turned by 15°", 20, angle=15),
    Setting("size 20, turned by 45°", 20, angle=45),
    Setting("size 20, turned by 90°", 20, angle=90),
    Setting("size 20, turned by 180°", 20, angle=180),
    Setting("size 20, on an image of 1/4", 20, background=0.25),
)


def composites(images: Tensor, setting: Setting) -> Tensor:
    """Place the objects of images ``[N, 1, 28, 28]``, in front of the image before each.

    Objects are bright on black: of two pixels the brighter is seen.
    """
    size = setting.size
    objects = images
    if size != CANVAS:
        objects = functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
    left, top = ((CANVAS - size) // 2 + move for move in (setting.right, setting.down))
    placed = functional.pad(objects, (left, CANVAS - size - left, top, CANVAS - size - top))
    if setting.angle:
        turn = torch.tensor(np.deg2rad(setting.angle), dtype=images.dtype)
        matrix = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()]).reshape(2, 2)
        matrix = functional.pad(matrix, (0, 1)).expand(len(images), 2, 3)
        grid = functional.affine_grid(matrix, list(placed.shape), align_corners=False)
        placed = functional.grid_sample(placed, grid, align_corners=False)
    return placed.maximum(setting.background * images.roll(1, 0))


@dataclass(frozen=True, eq=False)
class Damage:
    """What the loss of single units costs in one setting.

    Attributes
    ----------
    accuracy : float
        Of the intact network.
    layer : ndarray
        str ``[unit]``.
    cells : ndarray
        float64 ``[unit, class]``: by how much the mean cross entropy of the images of each class
        rises without the unit.
    """

    accuracy: float
    layer: Any
    cells: Any

    def harm(self, layer: str) -> Any:
        """Rises only, of the units of a layer, ``[unit, class]``."""
        return self.cells[self.layer == layer].clip(min=0)


def measured(images: Tensor, labels: Tensor, setting: Setting) -> Damage:
    """Ablate each unit of the layers, one at a time, on the images of a setting."""
    model = pa.demo.network(NETWORK)
    data = composites(images, setting), labels
    result = pa.ablate(model, data, list(LAYERS), measures=["loss"], progress=False)
    layer = result.units["layer"].to_numpy()
    return Damage(result.baseline_accuracy, layer, result.class_loss_change)


def correlation(one: Any, other: Any, seed: int = 0) -> str:
    """Rank correlation of ``[unit]`` or ``[unit, class]``; 95 % bootstrap interval over units."""
    weights = resample(len(one), RESAMPLES, np.random.default_rng(seed))
    weights = np.repeat(weights, one[0].size, axis=1)
    one, other = one.ravel(), other.ravel()
    drawn = coefficients(Variable(one, weights), Variable(other, weights), "spearman")
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return f"{stats.spearmanr(one, other).statistic:.2f} ({low:.2f} to {high:.2f})"


def study(
    images: Tensor, labels: Tensor, settings: Sequence[Setting] = SETTINGS
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare each setting on the second half of the images with the plain one on the first.

    Returns
    -------
    table : pandas.DataFrame
        One row per setting and layer: ``setting``, ``layer``, ``accuracy``, ``damage`` (mean harm),
        and correlations with their intervals, text: ``units`` and ``cells``.
    shares : pandas.DataFrame
        One row per setting and layer, a column per class: its part of the harm.
    """
    half = len(images) // 2
    first = measured(images[:half], labels[:half], PLAIN)
    rows, shares = [], []
    for setting in settings:
        found = measured(images[half:], labels[half:], setting)
        for layer in LAYERS:
            row = {"setting": setting.name, "layer": layer}
            mine, before, after = found.layer == layer, first.harm(layer), found.harm(layer)
            parts = after.sum(0) / after.sum()
            shares.append(row | dict(zip(pa.demo.CLASSES, parts, strict=True)))
            row |= {"accuracy": found.accuracy, "damage": after.mean()}
            row |= {"units": correlation(before.mean(1), after.mean(1))}
            row |= {"cells": correlation(first.cells[mine], found.cells[mine])}
            rows.append(row)
    return pd.DataFrame(rows), pd.DataFrame(shares)


def page(table: pd.DataFrame, shares: pd.DataFrame, images: int) -> str:
    """Write the page about the settings."""
    heads = ["setting", "accuracy", *(f"{what}, `{layer}`" for layer in LAYERS for what in WHAT)]
    lines = []
    for name, rows in table.groupby("setting", sort=False):
        line = [str(name), f"{100 * rows['accuracy'].iloc[0]:.1f} %"]
        for row in rows.to_dict("records"):
            line += [f"{1000 * row['damage']:.1f}", row["units"], row["cells"]]
        lines.append(line)
    last = shares[shares["layer"] == LAYERS[-1]]
    by_class = [
        [row["setting"], *(f"{100 * row[name]:.0f}" for name in pa.demo.CLASSES)]
        for row in last.to_dict("records")
    ]
    return f"""# Placement: size, position and rotation of the object

Written by `python examples/placement.py`; do not edit. Do the units that matter stay the same when
the object is smaller, elsewhere, turned, or in front of something? Controls in the manner of
SI-Score (Djolonga et al. 2021, arXiv:2007.08558) on composites of shipped images: each object is
scaled to so many of the 28 pixels, moved by 6 of them, turned, or laid over another image of so
much of its brightness. SI-Score pastes photographed objects on photographs; these are small grey
pictures, and the network (`{NETWORK}`) was trained on them as they are.

Every unit of two layers is ablated by zero. A cell is a unit and a class: the rise of the mean
cross entropy of the class's images. The damage of a unit is the mean over classes, falls counted as
0: the mean over all images hangs on a few of them, and gains in one class hide harm in others. Each
row's rank correlations, over units and over cells, are with the plain setting on {images // 2:,}
images, each row being measured on {images // 2:,} *others*, the same ones in all rows: so the first
row says what other images alone cost. In brackets is the 95 % bootstrap interval over units.

![composites, and which classes take the damage in each setting](images/placement.png)

{_markdown(heads, lines)}
## Which classes take the damage

The part of the damage of the units of `{LAYERS[-1]}` that falls to each class, in per cent.

{_markdown(["setting", *pa.demo.CLASSES], by_class)}"""


WHAT = ("damage x 1000", "units", "cells")


def _markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def picture(images: Tensor, shares: pd.DataFrame, settings: Sequence[Setting], path: Path) -> None:
    """Draw the composites of eight images, and which classes take the damage beside them."""
    shown = {"figsize": (11, 0.45 * len(settings) + 1.2), "width_ratios": (1, 1.25)}
    figure, (left, right) = plt.subplots(1, 2, **shown, layout="constrained")
    strips = [torch.cat(list(composites(images[:8], one)[:, 0]), dim=1) for one in settings]
    left.imshow(torch.cat(strips).numpy(), cmap="gray", aspect="auto")
    left.set_yticks(CANVAS * (np.arange(len(settings)) + 0.5), [one.name for one in settings])
    left.set_xticks([])
    parts = shares.loc[shares["layer"] == LAYERS[-1], list(pa.demo.CLASSES)].to_numpy()
    heat = right.imshow(100 * parts, cmap="viridis", vmin=0, aspect="auto")
    right.set_xticks(range(len(pa.demo.CLASSES)), pa.demo.CLASSES, rotation=45, ha="right")
    right.set_yticks([])
    figure.colorbar(heat, ax=right, label=f"part of the damage of {LAYERS[-1]}, per cent")
    path.parent.mkdir(parents=True, exist_ok=True)
    # No software version or date in the file: equal results give equal pictures.
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, and write its page and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=800, help="in both halves together")
    parser.add_argument("--page", type=Path, default=Path("docs/results/placement.md"))
    options = parser.parse_args(arguments)
    start = time.monotonic()
    images, labels = pa.demo.images(options.images)
    table, shares = study(images, labels)
    picture(images, shares, SETTINGS, options.page.parent / "images" / "placement.png")
    options.page.write_text(page(table, shares, len(images)).rstrip() + "\n")
    print(f"wrote {options.page} after {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
