"""Split of the images into halves: one to choose units on, one to measure on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyablate._validation import check_seed
from pyablate.analysis.statistics import random_half
from pyablate.data.dataset import gathered
from pyablate.data.inputs import chosen

Images = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Halves:
    """Labelled images in two parts, each with images ``[N, ...]`` and int64 labels ``[N]``."""

    choosing: Images
    measuring: Images


def split(data: Any, *, seed: int) -> Halves:
    """Split images at random into halves, class by class.

    What is chosen for its effect on some images looks better on them than it is; measured on
    others it does not.
    """
    check_seed(seed)
    images, labels = gathered(data)
    if len(labels) < 2:
        raise ValueError(f"data: expected at least 2 images to split, got {len(labels)}")
    classes = int(labels.max()) + 1
    half = random_half(labels.numpy(), classes, np.random.default_rng(seed))
    if half.all() or not half.any():  # single images of their classes, all on one side
        half[0] = not half[0]
    first = torch.from_numpy(half)
    return Halves(
        (chosen(images, first), labels[first]),
        (chosen(images, ~first), labels[~first]),
    )
