"""Neural activation patterns: groups of images that a layer responds to alike.

Baeuerle, Joensson, Ropinski 2022, *Neural Activation Patterns (NAPs): Visual Explainability of
Learned Concepts*, arXiv:2206.10611.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from pyablate._validation import check_count
from pyablate.experiments.units import opened
from pyablate.network.sites import check_channels, select
from pyablate.results.arrays import Floats, Ints
from pyablate.runtime.determinism import undisturbed
from pyablate.unit_attributes.observe import observe

if TYPE_CHECKING:
    import xarray as xr

BATCH = 128
"""Images at a time, unless told otherwise."""

_MISSING = (
    "activation patterns need scikit-learn; install it with: pip install 'pyablate[patterns]'"
)


def activation_patterns(
    model: nn.Module,
    data: Any,
    layer: str,
    *,
    smallest: int = 10,
    neighbours: int | None = None,
    class_names: Sequence[str] | None = None,
    batch_size: int = BATCH,
    axis: Mapping[str, int] | None = None,
    device: str | torch.device | None = None,
) -> xr.Dataset:
    """Group the images that a layer responds to alike, by HDBSCAN of scikit-learn.

    An image is the vector of the layer's unit means over its positions, the whole range of them,
    not the largest only. A dense region of these vectors is a pattern; its number is not given
    beforehand, and images in none are left out (Baeuerle, Joensson, Ropinski 2022,
    arXiv:2206.10611).

    Parameters
    ----------
    model, data, class_names, axis, device
        As for :func:`pyablate.attributes`.
    layer : str
        One layer.
    smallest : int
        Images of the smallest pattern, at least 2.
    neighbours : int, optional
        Images in a neighbourhood whose radius says how dense it is; by default ``smallest``. More
        leave more images out.
    batch_size : int
        Images at a time.

    Returns
    -------
    xarray.Dataset
        ``pattern`` (int64 [image]; 0 is the largest, -1 in none), ``probability`` (float64 [image],
        how firmly the image belongs to it), ``label`` (int64 [image]); ``size`` (int64 [pattern]),
        ``prototype`` (int64 [pattern], the image nearest to its mean), ``class_share`` (float64
        [pattern, class], share of its images that are of a class), ``mean`` (float64 [pattern,
        unit]) and ``contrast`` (float64 [pattern, unit], that mean minus the mean of all images,
        over their standard deviation; 0 for a unit that never changes).

    Raises
    ------
    ImportError
        scikit-learn 1.3 or later is not installed.
    ValueError, TypeError
        Bad arguments, several layers, fewer images than ``smallest``.

    Examples
    --------
    >>> found = pa.activation_patterns(model, data, "features.16", smallest=4)
    >>> found["pattern"].shape, found["class_share"].dims
    ((60,), ('pattern', 'class'))
    """
    import xarray as xr  # slow to import: half a second

    try:
        from sklearn.cluster import HDBSCAN
    except ImportError as error:
        raise ImportError(_MISSING) from error
    check_count("smallest", smallest, 2)
    if neighbours is not None:
        check_count("neighbours", neighbours)
    check_count("batch_size", batch_size)
    options = {"class_names": class_names, "device": device, "axis": axis}
    with undisturbed(model, device), torch.inference_mode(False):
        ready = opened(model, data, options)
        chosen = select(ready.sites, layer)
        if len(chosen) != 1:
            names = ", ".join(site.name for site in chosen)
            raise ValueError(f"layer: expected one layer, got {names}")
        check_channels(chosen)
        ready.data.hold_if_read_once()
        seen = observe(
            ready.model, ready.data, chosen, classes=ready.classes, batch_size=batch_size
        )
    vectors: Floats = seen.layers[0].maps.pooled.t().double().numpy()
    fewest = max(smallest, neighbours or 1)
    if len(vectors) < fewest:
        raise ValueError(f"data: expected at least {fewest} images, got {len(vectors)}")
    found = HDBSCAN(min_cluster_size=smallest, min_samples=neighbours, copy=True).fit(vectors)
    pattern = _largest_first(found.labels_)
    members = [np.flatnonzero(pattern == number) for number in range(pattern.max() + 1)]
    labels = seen.labels.numpy()
    mean = np.array([vectors[each].mean(0) for each in members]).reshape(-1, vectors.shape[1])
    by_class = [np.bincount(labels[each], minlength=ready.classes) for each in members]
    counts = np.array(by_class, dtype=np.int64).reshape(-1, ready.classes)
    spread = vectors.std(0)
    return xr.Dataset(
        {
            "pattern": ("image", pattern),
            "probability": ("image", np.asarray(found.probabilities_, dtype=np.float64)),
            "label": ("image", labels),
            "size": ("pattern", counts.sum(1)),
            "prototype": ("pattern", _nearest(vectors, members, mean)),
            "class_share": (("pattern", "class"), counts / counts.sum(1, keepdims=True)),
            "mean": (("pattern", "unit"), mean),
            "contrast": (
                ("pattern", "unit"),
                np.divide(mean - vectors.mean(0), spread, np.zeros_like(mean), where=spread > 0),
            ),
        },
        coords={
            "unit": [chosen[0].label(unit) for unit in range(chosen[0].channels)],
            "class": list(ready.class_names),
        },
        attrs={"layer": chosen[0].name},
    )


def _largest_first(labels: Ints) -> Ints:
    """Give the largest cluster number 0; of equal sizes the one with the first image; -1 stays."""
    found, first, size = np.unique(labels[labels >= 0], return_index=True, return_counts=True)
    rank = np.full(len(found) + 1, -1, dtype=np.int64)  # the last is what -1 takes
    rank[found[np.lexsort((first, -size))]] = np.arange(len(found))
    return rank[labels]


def _nearest(vectors: Floats, members: Sequence[Ints], mean: Floats) -> Ints:
    apart = [
        np.linalg.norm(vectors[each] - centre, axis=1)
        for each, centre in zip(members, mean, strict=True)
    ]
    chosen = [int(each[far.argmin()]) for each, far in zip(members, apart, strict=True)]
    return np.array(chosen, dtype=np.int64)
