"""Interactions: what ablating two units does beyond ablating each alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from pyablate._validation import check_choice
from pyablate.analysis.statistics import adjusted, mcnemar
from pyablate.data.dataset import gathered
from pyablate.experiments.units import opened
from pyablate.interventions import Intervention
from pyablate.network.sites import select
from pyablate.result import AblationResult
from pyablate.results.arrays import Ints
from pyablate.results.notebook import page
from pyablate.runs._ablate import ablate
from pyablate.runtime.chunking import NUMBERS

if TYPE_CHECKING:
    import xarray as xr


def pairs(
    model: nn.Module,
    data: Any,
    layer: str,
    *,
    units: Sequence[int] | None = None,
    intervention: str | Intervention = "zero",
    class_names: Sequence[str] | None = None,
    **options: Any,
) -> Pairs:
    """Ablate all pairs of units of a layer, and compare with the units one by one.

    The *interaction* of two units is the accuracy drop of both together minus the sum of their
    single drops. Positive: together they do more harm, as units that back each other up do.
    Negative: they do less, as units that break the same images do.

    Parameters
    ----------
    model, data
        As for :func:`pyablate.ablate`; the images are held in memory.
    layer : str
        Name of one layer. C units make C (C - 1) / 2 pairs.
    units : sequence of int, optional
        Only pairs of these units.
    intervention, class_names, **options
        As for :func:`pyablate.ablate`; directions cannot be removed together.

    Raises
    ------
    ValueError, TypeError
        Not one layer, fewer than two units, a unit twice, and whatever :func:`pyablate.ablate`
        raises.

    Examples
    --------
    >>> found = pa.pairs(model, data, "features.16", units=[14, 39, 113])
    >>> found.data.sizes["pair"]
    3
    """
    images, labels = gathered(data)
    ready = opened(model, (images, labels), options)
    sites = select(ready.sites, layer)
    if len(sites) != 1:
        found = ", ".join(site.name for site in sites)
        raise ValueError(f"layer: expected one layer, {layer!r} selects {found}")
    site = sites[0]
    chosen = list(range(site.channels)) if units is None else sorted(units)
    if len(chosen) < 2 or len(set(chosen)) < len(chosen):
        raise ValueError(f"units: expected at least two different units, got {list(chosen)}")
    single = [site.label(unit) for unit in chosen]
    groups = list(itertools.combinations(single, 2))
    result = ablate(
        model,
        (images, labels),
        single,
        groups=groups,
        intervention=intervention,
        class_names=class_names,
        **options,
    )
    return Pairs(_dataset(result, len(single)), result)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Single and joint ablations of the units of a layer.

    Attributes
    ----------
    data : xarray.Dataset
        Over ``pair``, with coordinates ``first`` and ``second`` (unit labels), ``class`` and
        ``unit``:

        - ``drop`` (unit), ``class_drop`` (unit, class): single ablations;
        - ``joint_drop`` (pair), ``class_joint_drop`` (pair, class): both units at once;
        - ``interaction`` (pair), ``class_interaction`` (pair, class): joint drop minus the sum of
          the single drops, as a share of the images; NaN for a class without images;
        - ``more``, ``less`` (pair, int64): images on which the pair does more, or less, harm than
          the sum, ``x > 0`` or ``x < 0`` with ``x = right(i) + right(j) - right(i, j) -
          right(intact)``, each 0 or 1, whose mean is the interaction;
        - ``p``, ``q`` (pair): exact sign test of ``more`` against ``less``, two-sided, and ``p``
          adjusted by Benjamini-Hochberg over the pairs.
    result : AblationResult
        The ablations: first the units, then the pairs.

    Examples
    --------
    >>> found = pa.pairs(model, data, "features.16", units=[14, 39])
    >>> found.matrix("interaction").shape
    (2, 2)
    """

    data: xr.Dataset
    result: AblationResult

    def __repr__(self) -> str:
        """Size in one line."""
        return f"Pairs({self.data.sizes['pair']:,} pairs of units)"

    def _repr_html_(self) -> str:
        """Show the pairs that interact most."""
        figures = [name for name, values in self.data.items() if values.dims == ("pair",)]
        table = self.data[figures].to_dataframe()[["first", "second", *figures]]
        strongest = table["interaction"].abs().argsort(kind="stable")[::-1]
        return page(repr(self), table.iloc[strongest])

    def matrix(self, name: str = "interaction") -> xr.DataArray:
        """Symmetric matrix of a figure of the pairs, NaN on the diagonal.

        Parameters
        ----------
        name : str
            A variable over ``pair``, or over ``pair`` and ``class``.

        Returns
        -------
        xarray.DataArray
            Over ``unit`` and ``other`` (and ``class``).

        Raises
        ------
        ValueError
            No such variable.
        """
        import xarray as xr

        known = [str(key) for key, values in self.data.items() if "pair" in values.dims]
        check_choice("name", name, known)
        values = self.data[name]
        units = self.data["unit"].to_numpy()
        first, second = np.triu_indices(len(units), 1)
        square = np.full((len(units), len(units), *values.shape[1:]), np.nan)
        square[first, second] = square[second, first] = values.to_numpy()
        rest = {str(key): self.data[key].to_numpy() for key in values.dims[1:]}
        coords = {"unit": units, "other": units, **rest}
        return xr.DataArray(square, coords, ("unit", "other", *rest), name=name)


def _dataset(result: AblationResult, units: int) -> xr.Dataset:
    import xarray as xr  # slow to import: half a second

    first, second = np.triu_indices(units, 1)  # as itertools.combinations has them
    net = result.lost - result.gained  # whole numbers: sums are exact
    beyond = net[units:] - net[first] - net[second]
    sizes = np.where(result.class_sizes > 0, result.class_sizes, np.nan)
    more, less = _signs(result, first, second)
    p = mcnemar(more, less)
    labels = result.units["label"].to_numpy(dtype=str)[:units]
    drops, class_drops = result.accuracy_drop, result.class_accuracy_drop
    return xr.Dataset(
        {
            "drop": ("unit", drops[:units]),
            "class_drop": (("unit", "class"), class_drops[:units]),
            "joint_drop": ("pair", drops[units:]),
            "class_joint_drop": (("pair", "class"), class_drops[units:]),
            "interaction": ("pair", beyond.sum(axis=1) / len(result.labels)),
            "class_interaction": (("pair", "class"), beyond / sizes),
            "more": ("pair", more),
            "less": ("pair", less),
            "p": ("pair", p),
            "q": ("pair", adjusted(p)),
        },
        coords={
            "unit": labels,
            "class": np.array(result.class_names, dtype=str),
            "first": ("pair", labels[first]),
            "second": ("pair", labels[second]),
        },
        attrs={"intervention": result.intervention, "audit": str(result.audit)},
    )


def _signs(result: AblationResult, first: Ints, second: Ints) -> tuple[Ints, Ints]:
    """Count the images on which each pair does more, and less, harm than the sum: int64 [pair]."""
    units = len(result.units) - len(first)
    right = (result.predictions(slice(units)) == result.labels).astype(np.int8)
    intact = (result.baseline == result.labels).astype(np.int8)
    counts = np.empty((2, len(first)), dtype=np.int64)
    size = max(1, NUMBERS // len(result.labels))
    for start in range(0, len(first), size):
        some = slice(start, min(start + size, len(first)))
        joint = result.predictions(slice(units + some.start, units + some.stop)) == result.labels
        x = right[first[some]] + right[second[some]] - joint - intact
        counts[:, some] = (x > 0).sum(axis=1), (x < 0).sum(axis=1)
    return counts[0], counts[1]
