"""Similarity of two sets of attribution maps, image by image.

Every figure is NaN where it is not defined: of a map of zeros there is no direction, of a constant
one no order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from pyablate._validation import optional
from pyablate.results.arrays import Floats

_MISSING = "SSIM needs scikit-image; install it with: pip install 'pyablate[attributions]'"
_WINDOW = 7
"""Side of the window of SSIM, as in scikit-image; smaller maps take the largest odd side."""


def cosine(a: Floats, b: Floats) -> Floats:
    """Cosine of the angle between two maps: ``[N, H, W]`` to ``[N]``; NaN if one is zero."""
    a, b = _flat(a), _flat(b)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return _ratio((a * b).sum(1), norms)


def pearson(a: Floats, b: Floats) -> Floats:
    """Pearson correlation over pixels: ``[N, H, W]`` to ``[N]``; NaN if one is constant."""
    a, b = _flat(a), _flat(b)
    varies = (np.ptp(a, axis=1) > 0) & (np.ptp(b, axis=1) > 0)
    centred = [each - each.mean(1, keepdims=True) for each in (a, b)]
    return np.where(varies, cosine(*centred), np.nan)


def spearman(a: Floats, b: Floats) -> Floats:
    """Rank correlation over pixels: ``[N, H, W]`` to ``[N]``; NaN if one is constant."""
    return pearson(stats.rankdata(_flat(a), axis=1), stats.rankdata(_flat(b), axis=1))


def structure(a: Floats, b: Floats) -> Floats:
    """Structural similarity: ``[N, H, W]`` to ``[N]``; NaN if one is zero or smaller than 3 pixels.

    Each map is divided by its largest absolute value first; the range is that of the two together
    (Wang, Bovik, Sheikh, Simoncelli 2004, *Image Quality Assessment*; by scikit-image, with
    its uniform window of 7 pixels).
    """
    structural_similarity = optional("skimage.metrics", _MISSING).structural_similarity
    found = np.full(len(a), np.nan)
    side = min(a.shape[1:])
    window = min(_WINDOW, side - (side + 1) % 2)
    for i, (one, two) in enumerate(zip(a, b, strict=True)):
        peaks = np.abs(one).max(), np.abs(two).max()
        if min(peaks) == 0 or window < 3:
            continue
        one, two = one / peaks[0], two / peaks[1]
        span = max(one.max(), two.max()) - min(one.min(), two.min())
        if span > 0:  # both constant and equal: no structure to compare
            found[i] = structural_similarity(one, two, win_size=window, data_range=span)
    return found


def top_overlap(a: Floats, b: Floats, quantile: float = 0.9) -> Floats:
    """Intersection over union of the pixels above each map's own quantile: ``[N]``.

    NaN where nothing is above it in one of the two, as in a constant map.
    """
    tops = []
    for maps in (_flat(a), _flat(b)):
        tops.append(maps > np.quantile(maps, quantile, axis=1, keepdims=True))
    both, either = (tops[0] & tops[1]).sum(1), (tops[0] | tops[1]).sum(1)
    defined = tops[0].any(1) & tops[1].any(1)
    return np.where(defined, both / np.maximum(either, 1), np.nan)


def pixel_auc(maps: Floats, masks: NDArray[np.bool_]) -> Floats:
    """ROC area: chance that a pixel in the mask is above one outside, ties half: ``[N]``.

    NaN where the mask is empty or full; 0.5 for a constant map.
    """
    flat, inside = _flat(maps), _flat(masks)
    ranks = stats.rankdata(flat, axis=1)
    size = inside.sum(1).astype(np.float64)
    rest = inside.shape[1] - size
    wins = (ranks * inside).sum(1) - size * (size + 1) / 2
    return _ratio(wins, size * rest)


def points_inside(maps: Floats, masks: NDArray[np.bool_]) -> Floats:
    """Whether the highest pixel lies in the mask, 1 or 0: ``[N]``.

    Of equal pixels the share that does. NaN where the mask is empty or the map constant.
    """
    flat, inside = _flat(maps), _flat(masks)
    top = flat == flat.max(1, keepdims=True)
    share = (top & inside).sum(1) / top.sum(1)
    return np.where(inside.any(1) & ~top.all(1), share, np.nan)


def _flat(maps: NDArray[Any]) -> NDArray[Any]:
    return maps.reshape(len(maps), -1)


def _ratio(above: Floats, below: Floats) -> Floats:
    fine = below > 0
    return np.where(fine, above / np.where(fine, below, 1.0), np.nan)
