"""Results made up at random, of any size."""

from __future__ import annotations

import numpy as np
import pandas as pd

from pyablate.result import AblationResult
from pyablate.results.flips import Flips


def random_result(
    units: int, images: int, classes: int, share: float, *, layers: int = 16
) -> AblationResult:
    """Flip a share of the predictions of every unit at random.

    Three quarters of the images are right at first; a third of the flips of wrong ones make them
    right. There is nothing in it that compresses well.
    """
    draw = np.random.default_rng(0)
    labels = np.arange(images) * classes // images
    other = (labels + draw.integers(1, classes, images)) % classes
    baseline = np.where(draw.random(images) < 0.75, labels, other)
    row = np.repeat(np.arange(units), draw.poisson(share * images, units))
    row, image = np.divmod(np.unique(row * images + draw.integers(0, images, len(row))), images)
    new = (baseline[image] + draw.integers(1, classes, len(row))) % classes
    back = (baseline[image] != labels[image]) & (draw.random(len(row)) < 1 / 3)
    new[back] = labels[image[back]]
    layer = np.arange(units) * layers // units
    frame = pd.DataFrame({"layer": [f"layer{number}" for number in layer]})
    frame["unit"] = frame.groupby("layer").cumcount()
    frame.insert(0, "label", frame["layer"] + ":" + frame["unit"].astype(str))
    start = np.searchsorted(row, np.arange(units + 1))
    flips = Flips(start, image.astype(np.int32), new.astype(np.int32))
    return AblationResult(frame, labels, baseline, flips, tuple(map(str, range(classes))))
