"""What to say of a network that does not know its images: likely reasons, one of them tried."""

from __future__ import annotations

import math

import numpy as np

from pyablate.results.record import Record

FEWEST = 10
"""Images below which nothing is said: a good network may have all of so few wrong."""

_ONE_CLASS = 0.9
"""Share of images predicted as one class from which that is told."""


def chance_remark(result: Record) -> str | None:
    """Say why the intact network may be at or below chance; None where it is above.

    Labels moved by one either way are compared with the same predictions: background classes in
    front, or counting from 1, do that.
    """
    chance, images = 1 / result.classes, len(result.labels)
    if images < FEWEST or result.baseline_accuracy > chance:
        return None
    found = [
        f"baseline accuracy {result.baseline_accuracy:.2%} on {images:,} images, no better than "
        f"chance ({chance:.2%})"
    ]
    # Three standard deviations above chance: with fewer images more is asked for.
    clearly = chance + 3 * math.sqrt(chance * (1 - chance) / images)
    moved = {step: float((result.baseline == result.labels + step).mean()) for step in (1, -1)}
    step = max(moved, key=lambda step: moved[step])
    if moved[step] > clearly:
        found.append(f"with labels {step:+d} it is {moved[step]:.2%}: they are shifted by one")
    counts = np.bincount(result.baseline, minlength=result.classes)
    most, share = int(counts.argmax()), counts.max() / images
    if share > _ONE_CLASS:
        found.append(f"{share:.0%} of the images are predicted as {result.class_names[most]!r}")
    return (
        f"data: {'; '.join(found)}. Likely reasons: weights that were not loaded, classes in "
        "another order than the network's outputs, pixels of 0 to 255 where 0 to 1 is expected, "
        "another mean and std, labels shifted by one"
    )
