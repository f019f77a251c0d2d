"""Agglomerative clusters of units by their drops, and of images by the units that break them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.cluster import hierarchy
from scipy.spatial import distance

from pyablate._validation import check_choice, check_count, nearest
from pyablate.analysis.statistics import layer_rows
from pyablate.results.arrays import Floats, Ints
from pyablate.results.record import Record, coordinates
from pyablate.runtime.chunking import DISTANCE_ROWS

if TYPE_CHECKING:
    import xarray as xr

Metric = Literal["cosine", "correlation", "euclidean"]
Method = Literal["average", "complete", "single", "weighted"]
METRICS: tuple[str, ...] = get_args(Metric)
METHODS: tuple[str, ...] = get_args(Method)
_MOST = 10_000  # 400 MB of distances
_QUICK = 1 << 28
"""Products of numbers that scipy does in a fraction of a second, one after the other."""


def cluster_units(
    result: Record,
    *,
    layer: str | None = None,
    clusters: int = 8,
    fewest: int = 1,
    metric: Metric = "cosine",
    method: Method = "average",
) -> xr.Dataset:
    """Group units by their damage profile: the accuracy drop of every class.

    Parameters
    ----------
    result : AblationResult
        What was ablated.
    layer : str, optional
        Only the units of this layer; by default all.
    clusters : int
        How many clusters to cut the tree into, at most.
    fewest : int
        Units with fewer changed images (lost + gained) stay out, and so do units all of whose drops
        are zero: the profile of a few images is noise.
    metric : str
        Distance of two profiles: ``cosine`` and ``correlation`` compare their shape,
        ``euclidean`` their size as well.
    method : str
        How two clusters are compared, see ``scipy.cluster.hierarchy.linkage``: ``average``,
        ``complete``, ``single`` or ``weighted``.

    Returns
    -------
    xarray.Dataset
        ``cluster`` (int64 [unit]; 0 is the largest, -1 was left out), ``position`` (int64 [unit],
        place among the leaves of the tree, the order in which a plot looks tidy; -1 was left out),
        ``size`` (int64 [cluster]), ``mean_drop`` (float64 [cluster, class]) and ``linkage``
        (float64 [merge, 4], scipy's tree over the units that were not left out, in their order).

    Raises
    ------
    ValueError
        Unknown layer, metric or method, a number out of range, more than 10,000 units.

    Examples
    --------
    >>> pa.cluster_units(result, clusters=3)["mean_drop"].dims
    ('cluster', 'class')
    """
    import xarray as xr  # slow to import: half a second

    _check(clusters, fewest, method)
    check_choice("metric", metric, METRICS)
    rows = _rows(result, layer)
    drops = result.class_accuracy_drop[rows][:, result.class_sizes > 0]
    changed = (result.lost[rows] + result.gained[rows]).sum(axis=1)
    # A profile without variation has no direction to compare.
    spread = np.ptp(drops, axis=1) if metric == "correlation" else np.abs(drops).max(axis=1)
    inside = np.flatnonzero((changed >= fewest) & (spread > 0))
    _check_size("units", len(inside))
    tree = _tree(profile_distances(drops[inside], metric) if len(inside) > 1 else None, method)
    label = _cut(tree, len(inside), clusters)
    sizes = np.bincount(label)
    means = np.full((len(sizes), result.classes), np.nan)
    for k in range(len(sizes)):
        means[k, result.class_sizes > 0] = drops[inside[label == k]].mean(axis=0)
    where = coordinates(result)
    return xr.Dataset(
        {
            "cluster": ("unit", _spread(label, inside, len(rows))),
            "position": ("unit", _spread(_places(tree, len(inside)), inside, len(rows))),
            "size": ("cluster", sizes),
            "mean_drop": (("cluster", "class"), means),
            "linkage": (("merge", "column"), tree),
        },
        coords={
            "unit": where["unit"][rows],
            "layer": ("unit", where["layer"][1][rows]),
            "class": where["class"],
        },
        attrs={"metric": metric, "method": method},
    )


def cluster_images(
    result: Record,
    *,
    layer: str | None = None,
    clusters: int = 8,
    fewest: int = 1,
    method: Method = "average",
) -> xr.Dataset:
    """Group images by the units that break them, that is, turn their prediction wrong.

    The distance of two images is Jaccard's: one minus the units that break both over the units that
    break either.

    Parameters
    ----------
    result : AblationResult
        What was ablated.
    layer : str, optional
        Only the units of this layer; by default all.
    clusters : int
        How many clusters to cut the tree into, at most.
    fewest : int
        Images that fewer units break stay out (at least those that none breaks).
    method : str
        As for :func:`cluster_units`.

    Returns
    -------
    xarray.Dataset
        ``cluster`` (int64 [image]; 0 is the largest, -1 was left out), ``position`` (int64 [image],
        place among the leaves of the tree; -1 was left out), ``label`` (int64 [image], true class),
        ``size`` (int64 [cluster]), ``broken`` (float64 [cluster, unit], share of the cluster's
        images that the unit breaks) and ``linkage`` (float64 [merge, 4], scipy's tree over the
        images that were not left out, in their order).

    Raises
    ------
    ValueError
        Unknown layer or method, a number out of range, more than 10,000 images broken.

    Examples
    --------
    >>> pa.cluster_images(result, clusters=2)["broken"].dims
    ('cluster', 'unit')
    """
    import xarray as xr

    result.check_complete("cluster_images")
    _check(clusters, fewest, method)
    rows = _rows(result, layer)
    breaks = _breaks(result, rows)
    inside = np.flatnonzero(np.diff(breaks.indptr) >= fewest)
    _check_size("images", len(inside))
    breaks = breaks[inside]
    tree = _tree(_jaccard(breaks) if len(inside) > 1 else None, method)
    label = _cut(tree, len(inside), clusters)
    sizes = np.bincount(label)
    member = sparse.csr_array(
        (np.ones(len(label)), (label, np.arange(len(label)))), shape=(len(sizes), len(label))
    )
    shares = (member @ breaks).toarray() / sizes[:, None]
    images = len(result.labels)
    where = coordinates(result)
    return xr.Dataset(
        {
            "cluster": ("image", _spread(label, inside, images)),
            "position": ("image", _spread(_places(tree, len(inside)), inside, images)),
            "label": ("image", result.labels),
            "size": ("cluster", sizes),
            "broken": (("cluster", "unit"), shares),
            "linkage": (("merge", "column"), tree),
        },
        coords={"unit": where["unit"][rows], "layer": ("unit", where["layer"][1][rows])},
        attrs={"metric": "jaccard", "method": method},
    )


def profile_distances(profiles: Floats, metric: Metric) -> Floats:
    """Distances of all pairs of rows of ``[row, class]``, condensed as scipy has them.

    By scipy where that is quick. Beyond, cosines are matrix products, which have other last bits.

    Examples
    --------
    >>> from pyablate.analysis.clusters import profile_distances
    >>> profile_distances(np.eye(3), "cosine").tolist()
    [1.0, 1.0, 1.0]
    """
    if metric != "cosine" or len(profiles) ** 2 * profiles.shape[1] < _QUICK:
        return np.asarray(distance.pdist(profiles, metric))
    length = np.linalg.norm(profiles, axis=1)
    pieces = []
    for begin in range(0, len(length), DISTANCE_ROWS):
        rows = slice(begin, begin + DISTANCE_ROWS)
        apart = 1 - profiles[rows] @ profiles[begin:].T / np.outer(length[rows], length[begin:])
        pieces += [line[number + 1 :] for number, line in enumerate(apart)]
    return np.concatenate(pieces)


def _breaks(result: Record, rows: Ints) -> sparse.csr_array:
    """Ones where the unit turns a right prediction wrong, [image, row of ``rows``]."""
    lost = result.baseline[result.flips.image] == result.labels[result.flips.image]
    column = np.full(len(result.units), -1)
    column[rows] = np.arange(len(rows))
    unit = column[result.flips.row]
    kept = lost & (unit >= 0)
    place = result.flips.image[kept], unit[kept]
    return sparse.csr_array((np.ones(len(place[0])), place), shape=(len(result.labels), len(rows)))


def _jaccard(sets: sparse.csr_array) -> Floats:
    """Condensed distances of the rows of a matrix of ones, a block of rows at a time."""
    size = np.diff(sets.indptr)
    pieces = []
    for begin in range(0, len(size), DISTANCE_ROWS):
        shared = (sets[begin : begin + DISTANCE_ROWS] @ sets.T).toarray()
        for row, common in enumerate(shared, start=begin):
            both = common[row + 1 :]
            pieces.append(1 - both / (size[row] + size[row + 1 :] - both))
    return np.concatenate(pieces)


def _tree(distances: Floats | None, method: Method) -> Floats:
    if distances is None:
        return np.empty((0, 4))
    # Rounding leaves a cosine distance of 0 a little below it.
    return np.asarray(hierarchy.linkage(np.maximum(distances, 0.0), method))


def _cut(tree: Floats, leaves: int, clusters: int) -> Ints:
    """Cluster of each leaf, numbered by size; of equal sizes the one with the first leaf."""
    if len(tree) == 0:
        return np.zeros(leaves, dtype=np.int64)
    found = hierarchy.fcluster(tree, clusters, criterion="maxclust")
    _, first, label, size = np.unique(
        found, return_index=True, return_inverse=True, return_counts=True
    )
    rank = np.empty(len(size), dtype=np.int64)
    rank[np.lexsort((first, -size))] = np.arange(len(size))
    return rank[label]


def _places(tree: Floats, leaves: int) -> Ints:
    places = np.zeros(leaves, dtype=np.int64)
    if len(tree):
        places[hierarchy.leaves_list(tree)] = np.arange(leaves)
    return places


def _spread(values: Ints, inside: NDArray[np.intp], length: int) -> Ints:
    """Put the values at their places among -1."""
    spread = np.full(length, -1, dtype=np.int64)
    spread[inside] = values
    return spread


def _rows(result: Record, layer: str | None) -> Ints:
    if layer is None:
        return np.arange(len(result.units))
    rows = layer_rows(result)
    if layer not in rows:
        raise ValueError(f"layer: the result has no layer {layer!r}{nearest(layer, rows)}")
    return rows[layer]


def _check(clusters: int, fewest: int, method: str) -> None:
    check_count("clusters", clusters)
    check_count("fewest", fewest)
    check_choice("method", method, METHODS)


def _check_size(what: str, count: int) -> None:
    if count > _MOST:
        raise ValueError(
            f"{what}: {count:,} would need too much memory, at most {_MOST:,} can be clustered; "
            "choose a layer or a larger fewest"
        )
