"""Shrunken accuracy drops: empirical Bayes on the images that each unit loses and gains.

Of the images that change with a unit, each is lost with a chance of the unit's own, and gained
otherwise. These chances follow a beta distribution, fitted to all units of a layer: so the number
lost, given the number changed, is beta-binomial. A unit with few changed images is taken to be like
the others of its layer; one with many is taken at its word.
"""

from __future__ import annotations

import numpy as np
from scipy import optimize, special

from pyablate.analysis.statistics import layer_rows
from pyablate.results.arrays import Counts, Floats
from pyablate.results.record import Record

# Of the logarithms of both parameters. Beyond e^9 the chances of all units are as good as equal.
_BOUNDS = (-4.0, 9.0)


def shrunken_drop(result: Record) -> Floats:
    """Accuracy drop of each unit, shrunken towards what is usual in its layer.

    ``m (2 (l + a) / (m + a + b) - 1) / N`` for ``l`` lost of ``m`` changed images of ``N``, with
    ``a`` and ``b`` of the layer from :func:`beta_prior`: the expected drop, given the counts, of
    a unit that changes as many images.

    Parameters
    ----------
    result : AblationResult
        What was ablated, with all pairs decided.

    Returns
    -------
    ndarray
        float64 ``[unit]``, a share of the images like ``accuracy_drop``; 0 where nothing changed.

    Raises
    ------
    ValueError
        The run is an estimated one.

    Notes
    -----
    Robbins 1956, "An Empirical Bayes Approach to Statistics"; the beta-binomial by Skellam 1948.

    Examples
    --------
    >>> from pyablate.analysis.shrinkage import shrunken_drop
    >>> shrunken_drop(result).shape
    (128,)
    """
    result.check_complete("shrunken_drop")
    lost, gained = result.lost.sum(axis=1), result.gained.sum(axis=1)
    drop = np.zeros(len(result.units))
    for rows in layer_rows(result).values():
        changed = lost[rows] + gained[rows]
        a, b = beta_prior(lost[rows], changed)
        drop[rows] = changed * (2 * (lost[rows] + a) / (changed + a + b) - 1)
    return drop / len(result.labels)


def beta_prior(lost: Counts, changed: Counts) -> tuple[float, float]:
    """Fit the beta distribution of the units' chances by largest likelihood.

    Parameters
    ----------
    lost, changed : int64 [unit]
        Images lost, and lost or gained.

    Returns
    -------
    tuple of float
        Its parameters a and b; the mean chance is ``a / (a + b)``. Both 1 where nothing changed.

    Examples
    --------
    >>> from pyablate.analysis.shrinkage import beta_prior
    >>> a, b = beta_prior(np.array([9, 1, 8, 2]), np.array([10, 10, 10, 10]))
    >>> round(a / (a + b), 2), a < 2
    (0.5, True)
    """
    seen = changed > 0
    if not seen.any():
        return 1.0, 1.0
    lost, gained = lost[seen], (changed - lost)[seen]

    def misfit(logarithms: Floats) -> float:
        a, b = np.exp(logarithms)
        return -float(np.sum(special.betaln(lost + a, gained + b) - special.betaln(a, b)))

    found = optimize.minimize(misfit, [0.0, 0.0], bounds=[_BOUNDS, _BOUNDS], method="L-BFGS-B")
    a, b = np.exp(found.x)
    return float(a), float(b)
