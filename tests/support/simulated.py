"""Results made up to order: what each unit loses and gains is known, no network is involved."""

from __future__ import annotations

import numpy as np
import pandas as pd

from pyablate.result import AblationResult
from pyablate.results.flips import Flips


def from_predictions(
    predictions: np.ndarray,
    baseline: np.ndarray,
    labels: np.ndarray,
    classes: int,
    layers: list[str] | None = None,
) -> AblationResult:
    """A result from full predictions [unit, image]; one layer unless told otherwise."""
    rows, images = np.nonzero(predictions != baseline)
    layers = layers or ["layer"] * len(predictions)
    units = pd.DataFrame({"layer": np.array(layers, dtype=object)})
    units["unit"] = units.groupby("layer").cumcount()
    units.insert(0, "label", units["layer"] + ":" + units["unit"].astype(str))
    return AblationResult(
        units=units,
        labels=labels,
        baseline=baseline,
        flips=Flips.gather(len(predictions), [(rows, images, predictions[rows, images])]),
        class_names=tuple(f"class {k}" for k in range(classes)),
    )


def simulate(
    rates: np.ndarray,
    gain: np.ndarray | float,
    images: int,
    random: np.random.Generator,
    layers: list[str] | None = None,
) -> AblationResult:
    """Half of each class is right; each right image is lost, each wrong one gained, at a rate.

    ``rates`` and ``gain`` are [unit, class] chances; ``images`` (an even number) per class. Where
    they are equal the unit is harmless: an image that changes was as likely lost as gained.
    """
    units, classes = rates.shape
    labels = np.repeat(np.arange(classes), images)
    right = np.tile(np.arange(images) < images // 2, classes)
    baseline = np.where(right, labels, (labels + 1) % classes)
    chance = np.where(right, rates[:, labels], np.broadcast_to(gain, rates.shape)[:, labels])
    flipped = random.random((units, len(labels))) < chance
    other = np.where(right, (labels + 1) % classes, labels)
    return from_predictions(np.where(flipped, other, baseline), baseline, labels, classes, layers)


def small(seed: int = 0) -> AblationResult:
    """Three units of one layer, two classes, four images of each."""
    return simulate(np.full((3, 2), 0.5), 0.5, 4, np.random.default_rng(seed), ["x"] * 3)
