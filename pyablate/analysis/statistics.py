"""Significance of drops: McNemar tests, false discovery rate, noise floor, split halves.

The null model is the same everywhere and assumes little: a *harmless* unit is one for which each
image whose correctness changed was as likely to be lost as to be gained. The images that changed
are kept as they are; only the direction is random. Given ``n`` changed images of a class, the
number lost is then binomial with ``n`` trials and probability 1/2.

Nothing here needs torch, a model or the extension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special, stats

from pyablate._validation import check_count, check_level, check_seed
from pyablate.results.arrays import Counts, Floats, Ints
from pyablate.results.estimate import WIDTH
from pyablate.results.record import Record, coordinates
from pyablate.runtime.chunking import NUMBERS

if TYPE_CHECKING:
    import xarray as xr


def significance(result: Record, *, fdr: float = 0.05) -> xr.Dataset:
    """Test each class of each unit for a change of accuracy.

    Parameters
    ----------
    result : AblationResult
        What was ablated.
    fdr : float
        Level of the false discovery rate, between 0 and 1: the share of wrong ones that is
        tolerated, on average, among the pairs called significant in a layer.

    Returns
    -------
    xarray.Dataset
        Over ``unit`` and ``class``: ``lost`` and ``gained`` (int64, images), ``drop`` (float64,
        class accuracy drop), ``p`` (float64, see :func:`mcnemar`), ``q`` (float64, ``p`` adjusted
        by Benjamini-Hochberg over all units x classes of the unit's layer) and ``significant``
        (bool, ``q <= fdr``). The test is two-sided: the sign of ``drop`` tells harm from benefit.
        A class without images is not tested: NaN, not significant. Of an estimated run ``lost`` and
        ``gained`` are estimates (float64), and ``p`` reckons with their variance.

    Raises
    ------
    ValueError
        ``fdr`` is not between 0 and 1.

    Notes
    -----
    Benjamini and Hochberg 1995, "Controlling the False Discovery Rate". Classes of one unit share
    no image, so given the changed images the tests of one unit are independent; those of different
    units see the same images and are usually positively dependent, which the procedure allows.

    Examples
    --------
    >>> result.significance(fdr=0.05)["p"].shape  # the same as significance(result, fdr=0.05)
    (128, 10)
    """
    import xarray as xr  # slow to import: half a second

    check_level("fdr", fdr)
    uncertain = sampling_variance(result)
    p = np.empty(result.lost.shape)
    q = np.empty_like(p)
    for rows in layer_rows(result).values():  # by layers also because they fit into the cache
        tested = mcnemar(result.lost[rows], result.gained[rows], uncertain[rows])
        tested[:, result.class_sizes == 0] = np.nan
        p[rows] = tested
        q[rows] = adjusted(tested.ravel()).reshape(tested.shape)
    per_class = ("unit", "class")
    return xr.Dataset(
        {
            "lost": (per_class, result.lost),
            "gained": (per_class, result.gained),
            "drop": (per_class, result.class_accuracy_drop),
            "p": (per_class, p),
            "q": (per_class, q),
            "significant": (per_class, q <= fdr),
        },
        coords=coordinates(result),
        attrs={
            "fdr": fdr,
            "test": "exact McNemar, two-sided",
            "adjustment": "Benjamini-Hochberg over units x classes of a layer",
        },
    )


def sampling_variance(result: Record, of: str = "class_accuracy_drop") -> Floats:
    """Variance of ``lost - gained`` that comes from the sample of an estimated run, in images².

    Parameters
    ----------
    result : AblationResult
        What was ablated.
    of : str
        ``"class_accuracy_drop"`` or ``"accuracy_drop"``.

    Returns
    -------
    ndarray
        float64 ``[unit, class]`` or ``[unit]``; zeros where all pairs were decided.

    Examples
    --------
    >>> from pyablate.analysis.statistics import sampling_variance
    >>> float(sampling_variance(result).max())
    0.0
    """
    images = len(result.labels) if of == "accuracy_drop" else result.class_sizes
    return np.square(np.nan_to_num(result.half_width(of)) * images / WIDTH)


def mcnemar(lost: Counts, gained: Counts, variance: Floats | None = None) -> Floats:
    """Exact two-sided McNemar p value, elementwise.

    ``min(1, 2 P(X <= min(lost, gained)))`` with ``X`` binomial with ``lost + gained`` trials and
    probability 1/2; 1 where nothing changed. Images that stay right or stay wrong do not matter.

    Parameters
    ----------
    lost, gained : int64, one shape
        Images that went from right to wrong and from wrong to right; float64 where estimated.
    variance : float64 of that shape, optional
        Of their difference, for a sample's sake. Then both are scaled down to as many whole images
        as have the same variance in all, and the binomial tail is taken between whole numbers by
        the incomplete beta function.

    Returns
    -------
    ndarray
        float64 of the same shape.

    Examples
    --------
    >>> from pyablate.analysis.statistics import mcnemar
    >>> mcnemar(np.array([9, 5]), np.array([1, 5])).round(4).tolist()
    [0.0215, 1.0]
    """
    if variance is None or not np.any(variance):
        tail: Floats = np.asarray(stats.binom.cdf(np.minimum(lost, gained), lost + gained, 0.5))
        return np.minimum(1.0, 2 * tail)
    lost, gained = np.maximum(lost, 0.0), np.maximum(gained, 0.0)
    total = lost + gained
    scale = np.divide(total, total + variance, out=np.zeros(total.shape), where=total > 0)
    fewer = np.minimum(lost, gained) * scale
    tail = np.asarray(special.betainc(np.maximum(total * scale - fewer, 1e-9), fewer + 1.0, 0.5))
    return np.minimum(1.0, 2 * tail)


def adjusted(p: Floats) -> Floats:
    """Adjust p values [test] by Benjamini-Hochberg; NaN stays NaN and does not count.

    Examples
    --------
    >>> from pyablate.analysis.statistics import adjusted
    >>> adjusted(np.array([[0.01, 0.04, np.nan]])).round(3).tolist()
    [[0.02, 0.04, nan]]
    """
    q = np.full_like(p, np.nan)
    tested = ~np.isnan(p)
    if tested.any():
        q[tested] = stats.false_discovery_control(p[tested], method="bh")
    return q


def max_class_test(result: Record, *, splits: int = 10, seed: int = 0) -> pd.DataFrame:
    """Describe the largest class accuracy drop of each unit, and what chance would make of it.

    Parameters
    ----------
    result : AblationResult
        What was ablated.
    splits, seed : int
        See :func:`split_half_drop`.

    Returns
    -------
    pandas.DataFrame
        One row per unit: ``label``, ``layer``, ``unit``, ``max_class`` (name), ``max_class_drop``;
        ``mcnemar_p``, the p value of that class alone, too small because the class was chosen for
        its drop; ``p``, the probability that a harmless unit with the same changed images has so
        large a drop in any class; ``q``, the latter adjusted by Benjamini-Hochberg over the units
        of the layer; ``noise_floor``, see :func:`noise_floor`; ``split_half_drop``, see
        :func:`split_half_drop`.

    Examples
    --------
    >>> result.max_class_test(seed=0)[["label", "max_class"]].iloc[14].tolist()
    ['features.16:14', 'T-shirt/top']
    """
    result.check_complete("max_class_test")
    where = np.arange(len(result.units)), result.max_class
    p = _max_p(result)
    q = np.full_like(p, np.nan)
    for rows in layer_rows(result).values():
        q[rows] = adjusted(p[rows])
    columns = pd.DataFrame(
        {
            "max_class": np.array(result.class_names, dtype=object)[result.max_class],
            "max_class_drop": result.max_class_drop,
            "mcnemar_p": mcnemar(result.lost[where], result.gained[where]),
            "p": p,
            "q": q,
            "noise_floor": noise_floor(result),
            "split_half_drop": split_half_drop(result, splits=splits, seed=seed),
        }
    )
    return pd.concat([result.units.reset_index(drop=True), columns], axis=1)


def noise_floor(result: Record) -> Floats:
    """Largest class accuracy drop to expect of a harmless unit with the same changed images.

    The exact expectation of ``max_k (2 B_k - n_k) / s_k``, where ``n_k`` counts the unit's changed
    images of class ``k`` (lost + gained), ``s_k`` all images of the class, and the ``B_k`` are
    independent binomials with ``n_k`` trials and probability 1/2. The distribution function of the
    maximum is the product of those of the classes.

    Returns
    -------
    ndarray
        float64 ``[unit]``, a share of a class like ``max_class_drop``; 0 where nothing changed.

    Examples
    --------
    >>> result.noise_floor().shape
    (128,)
    """
    result.check_complete("noise_floor")
    present = result.class_sizes > 0
    sizes = result.class_sizes[present]
    expected = np.empty(len(result.units))
    for rows in row_blocks(result, len(sizes)):
        changed = result.lost[rows] + result.gained[rows]
        expected[rows] = _expected_maximum(changed[:, present], sizes)
    return expected


def split_half_drop(result: Record, *, splits: int = 10, seed: int = 0) -> Floats:
    """Largest class accuracy drop, its class chosen on one half of the images, measured on another.

    The drop itself is too large because its class was chosen for it. Here the images of each class
    are split at random into halves (a class of odd size gives one half, chosen at random, one image
    more), the class with the largest drop on one half is measured on the other, and both directions
    and all splits are averaged. A harmless unit has 0 on average. Of equal drops the first class is
    taken; a class with a single image has no say.

    Parameters
    ----------
    result : AblationResult
        What was ablated.
    splits : int
        Random splits to average over.
    seed : int
        Of the splits.

    Returns
    -------
    ndarray
        float64 ``[unit]``; NaN if no class has two images.

    Raises
    ------
    ValueError
        ``splits`` is below 1, or ``seed`` negative.

    Examples
    --------
    >>> result.split_half_drop(splits=2, seed=0).shape
    (128,)
    """
    result.check_complete("split_half_drop")
    check_count("splits", splits)
    check_seed(seed)
    usable = np.flatnonzero(result.class_sizes > 1)
    if not len(usable):
        return np.full(len(result.units), np.nan)
    generator = np.random.default_rng(seed)
    halves = [random_half(result.labels, result.classes, generator) for _ in range(splits)]
    total = np.zeros(len(result.units))
    for rows in row_blocks(result, result.classes):
        image, cell, net = changes(result, rows)
        shape = rows.stop - rows.start, result.classes
        both = net_by_cell(cell, net, shape)[:, usable]
        for half in halves:
            inside = half[image]
            first = net_by_cell(cell[inside], net[inside], shape)[:, usable]
            second = both - first
            sizes = np.bincount(result.labels[half], minlength=result.classes)
            rest = result.class_sizes - sizes
            total[rows] += _chosen(first, sizes[usable], second, rest[usable])
            total[rows] += _chosen(second, rest[usable], first, sizes[usable])
    return total / (2 * splits)


def layer_rows(result: Record) -> dict[str, Ints]:
    """Rows of each layer, layers in the order of their first unit.

    Examples
    --------
    >>> from pyablate.analysis.statistics import layer_rows
    >>> {layer: len(rows) for layer, rows in layer_rows(result).items()}
    {'features.16': 128}
    """
    codes, layers = pd.factorize(result.units["layer"])
    return {str(layer): np.flatnonzero(codes == code) for code, layer in enumerate(layers)}


def row_blocks(result: Record, cells: int = 1) -> Iterator[slice]:
    """Yield runs of rows whose flips, and ``cells`` a row, make about ``NUMBERS`` numbers.

    Examples
    --------
    >>> from pyablate.analysis.statistics import row_blocks
    >>> list(row_blocks(result, result.classes))
    [slice(0, 128, None)]
    """
    units = len(result.units)
    load = result.flips.start + np.arange(units + 1) * max(cells, 1)
    row = 0
    while row < units:
        after = int(np.searchsorted(load, load[row] + NUMBERS, side="right")) - 1
        stop = min(units, max(row + 1, after))
        yield slice(row, stop)
        row = stop


def _tabulated(
    function: Callable[[Ints, Ints], Floats], index: Ints, count: Ints
) -> NDArray[np.float64]:
    """Call ``function(index, count)`` once for each distinct pair: there are few of them."""
    stride = int(count.max(initial=0)) + 2  # an index lies between -1 and its count
    key = count * stride + index + 1
    distinct, place = np.unique(key, return_inverse=True)
    return function(distinct % stride - 1, distinct // stride)[place]


def _log_cdf(index: Ints, count: Ints) -> Floats:
    """Logarithm of P(B <= index) for a fair binomial, exact to rounding on both sides of 0."""
    below, above = stats.binom.cdf(index, count, 0.5), stats.binom.sf(index, count, 0.5)
    with np.errstate(divide="ignore"):
        logarithm = np.where(below < 0.5, np.log(below), np.log1p(-above))
    # exp of it is 0 all the same, and differences stay numbers.
    return np.maximum(logarithm, -1000.0)


def _expected_maximum(changed: Ints, sizes: Ints) -> Floats:
    """Take the expectation of max_k (2 B_k - n_k) / s_k for n [unit, class] and s [class]."""
    # The maximum is never below the largest of the classes' smallest values, low / base.
    units = np.arange(len(changed))
    highest = np.argmax(-changed / sizes, axis=1)
    low, base = -changed[units, highest], sizes[highest]
    unit, of_class = np.nonzero(changed)
    count, size = changed[unit, of_class], sizes[of_class]
    # At that value a class has lost at most `index` images; in whole numbers, so never off by one.
    index = (low[unit] * size + count * base[unit]) // (2 * base[unit])
    start = np.bincount(unit, _tabulated(_log_cdf, index, count), minlength=len(changed))
    # The steps of every class's distribution function above that value, sorted within each unit.
    steps = count - index
    step_unit, step_count = np.repeat(unit, steps), np.repeat(count, steps)
    ends = np.cumsum(steps)
    lost = np.arange(len(step_unit)) - np.repeat(ends - steps, steps) + np.repeat(index, steps) + 1
    value = (2 * lost - step_count) / np.repeat(size, steps)
    rise = _tabulated(lambda k, n: _log_cdf(k, n) - _log_cdf(k - 1, n), lost, step_count)
    order = np.lexsort((value, step_unit))
    step_unit, value, rise = step_unit[order], value[order], rise[order]
    before = np.concatenate([[0.0], np.cumsum(rise)])
    first = before[np.searchsorted(step_unit, units)]
    below = np.exp(np.minimum(0.0, start[step_unit] + before[:-1] - first[step_unit]))
    upto = np.exp(np.minimum(0.0, start[step_unit] + before[1:] - first[step_unit]))
    above = np.bincount(step_unit, value * (upto - below), minlength=len(changed))
    expected: Floats = low / base * np.exp(start) + above
    return expected


def _max_p(result: Record) -> Floats:
    """Chance of a harmless unit to have, in any class, at least the largest drop observed."""
    present = result.class_sizes > 0
    sizes = result.class_sizes[present]
    p = np.empty(len(result.units))
    for rows in row_blocks(result, len(sizes)):
        lost, gained = result.lost[rows], result.gained[rows]
        units, worst = np.arange(len(lost)), result.max_class[rows]
        drop = (lost - gained)[units, worst]
        base = result.class_sizes[worst]
        changed = (lost + gained)[:, present]
        unit, of_class = np.nonzero(changed)
        count = changed[unit, of_class]
        # The most that a class may lose and still stay below the drop, in whole numbers.
        below = (drop[unit] * sizes[of_class] + count * base[unit] - 1) // (2 * base[unit])
        index: Ints = np.clip(below, -1, count).astype(np.int64)
        log_smaller = np.bincount(unit, _tabulated(_log_cdf, index, count), minlength=len(lost))
        # A class without changes has drop 0, which a maximum of 0 or less never exceeds.
        certain = (drop <= 0) & (changed == 0).any(axis=1)
        p[rows] = np.where(certain, 1.0, -np.expm1(log_smaller))
    return p


def random_half(labels: Ints, classes: int, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Random half of the images of every class, bool [image].

    Examples
    --------
    >>> from pyablate.analysis.statistics import random_half
    >>> labels_of_four = np.array([0, 0, 1, 1])
    >>> int(random_half(labels_of_four, 2, np.random.default_rng(0)).sum())
    2
    """
    order = np.lexsort((generator.random(len(labels)), labels))
    sizes = np.bincount(labels, minlength=classes)
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    parity = generator.integers(0, 2, classes)  # which half gets the odd image
    half = np.empty(len(labels), dtype=bool)
    half[order] = (rank + np.repeat(parity, sizes)) % 2 == 0
    return half


def changes(result: Record, rows: slice) -> tuple[Ints, Ints, Ints]:
    """Flips of some rows that changed correctness: image, (row, class) as one number, +1 or -1.

    Examples
    --------
    >>> from pyablate.analysis.statistics import changes
    >>> image, cell, net = changes(result, slice(0, 1))
    >>> int(net.sum()) == int((result.lost - result.gained)[0].sum())
    True
    """
    run = slice(result.flips.start[rows.start], result.flips.start[rows.stop])
    image = result.flips.image[run]
    label = result.labels[image]
    lost = result.baseline[image] == label
    kept = lost | (result.flips.prediction[run] == label)
    cell = (result.flips.row[run] - rows.start) * result.classes + label
    return image[kept], cell[kept], np.where(lost[kept], 1, -1)


def net_by_cell(cell: Ints, net: Ints, shape: tuple[int, int]) -> Floats:
    """Sum +1 and -1 of :func:`changes` by row and class: float64 of that shape.

    Examples
    --------
    >>> from pyablate.analysis.statistics import net_by_cell
    >>> net_by_cell(np.array([0, 2, 2]), np.array([1, 1, -1]), (1, 3)).tolist()
    [[1.0, 0.0, 0.0]]
    """
    sums = np.bincount(cell, net, minlength=shape[0] * shape[1])
    return sums.astype(np.float64, copy=False).reshape(shape)


def _chosen(first: Floats, first_sizes: Ints, second: Floats, second_sizes: Ints) -> Floats:
    """Measure on the second half the classes that suffer most on the first."""
    worst = np.argmax(first / first_sizes, axis=1)
    drops: Floats = second[np.arange(len(second)), worst] / second_sizes[worst]
    return drops
