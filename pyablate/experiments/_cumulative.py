"""Cumulative ablation: accuracy against the number of units removed, in a given order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import integrate
from torch import nn

from pyablate._validation import check_count, check_seed
from pyablate.data.dataset import gathered
from pyablate.experiments.accuracies import (
    balanced_accuracy,
    baseline_balanced_accuracy,
    class_accuracy,
)
from pyablate.experiments.orders import Order, measured, named, orders_of
from pyablate.experiments.split import split
from pyablate.experiments.units import labels_of, opened
from pyablate.interventions import Intervention
from pyablate.network.capture_memory import same_network
from pyablate.network.sites import select
from pyablate.result import AblationResult
from pyablate.results.arrays import Floats, Ints
from pyablate.results.notebook import page
from pyablate.runs._ablate import ablate

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

STEPS = 64
"""Points of a curve of a larger layer, unless told otherwise."""


@same_network()
def cumulative(
    model: nn.Module,
    data: Any,
    layers: str | Sequence[str],
    *,
    order: Any = "drop",
    ascending: bool = False,
    keep: bool = False,
    steps: int | Sequence[int] | None = None,
    repeats: int = 10,
    ranking: AblationResult | None = None,
    seed: int = 0,
    intervention: str | Intervention = "zero",
    class_names: Sequence[str] | None = None,
    **options: Any,
) -> Cumulative:
    """Remove the units of a layer one after another and follow the accuracy.

    Every point of a curve is an ablation of a group of units, exact as in
    :func:`pyablate.ablate`. Groups that several orders share are ablated once.

    Parameters
    ----------
    model, data
        As for :func:`pyablate.ablate`; the images are held in memory.
    layers : str or sequence of str
        Names or globs. Units of several layers make one order.
    order : str, numbers, labels, table, or mapping of names to these
        In which order units go, the first removed first:

        - numbers by unit label (a ``pandas.Series``, an ``xarray.DataArray`` over ``unit``) or in
          the order of the units (an array): largest first, NaN last; each numeric column of a
          ``pandas.DataFrame`` makes an order;
        - a list of all labels ``"layer:unit"``;
        - ``"drop"``: by the accuracy drop of each unit alone;
        - ``"class"``: for every class by the drop of that class, one curve per class;
        - ``"random"``.
    ascending : bool
        Smallest numbers and drops first.
    keep : bool
        Keep the first units of the order and remove the others, that is, remove in reverse.
    steps : int or sequence of int, optional
        How many points, evenly spread, or the numbers of removed units. By default every number
        up to 64 units, 64 points for more. None removed and all removed are always there.
    repeats : int
        Random orders.
    ranking : AblationResult, optional
        Single ablations of these units on other images, for ``"drop"`` and ``"class"``. Without
        it the images are split at random into halves, class by class: units are ranked on one
        half, and all curves measured on the other.
    seed : int
        Of split and random orders, and as for :func:`pyablate.ablate`.
    intervention, class_names, **options
        As for :func:`pyablate.ablate`; directions cannot be removed together.

    Raises
    ------
    ValueError, TypeError
        Unknown layers, units or words, numbers of another length, options out of range, and
        whatever :func:`pyablate.ablate` raises.

    Examples
    --------
    >>> curves = pa.cumulative(model, data, "features.16", order="random", steps=2, repeats=1)
    >>> curves.to_dataframe()["removed"].tolist()
    [0, 64, 128]
    """
    check_seed(seed)
    check_count("repeats", repeats)
    orders = named(order)
    images, labels = gathered(data)
    ready = opened(model, (images, labels), options)
    units = labels_of(select(ready.sites, layers))
    common = {"intervention": intervention, "class_names": class_names, "seed": seed, **options}
    measuring = images, labels
    if measured(orders) and ranking is None:
        halves = split((images, labels), seed=seed)
        ranking = ablate(model, halves.choosing, layers, **common)
        measuring = halves.measuring
    generator = np.random.default_rng(seed)
    curves = [
        curve
        for name, spec in orders.items()
        for curve in orders_of(
            name,
            spec,
            units,
            ranking,
            ascending=ascending,
            repeats=repeats,
            generator=generator,
        )
    ]
    if keep:
        curves = [Order(c.name, c.ranks[::-1], c.repeat, c.target) for c in curves]
    removed = _counts(steps, len(units))
    groups: dict[frozenset[int], int] = {}
    rows = np.array(
        [
            [groups.setdefault(frozenset(c.ranks[:n].tolist()), len(groups)) for n in removed[1:]]
            for c in curves
        ]
    )
    named_groups = [[units[unit] for unit in sorted(group)] for group in groups]
    result = ablate(model, measuring, groups=named_groups, **common)
    return Cumulative(_dataset(result, curves, rows, removed, units, keep=keep), result)


@dataclass(frozen=True, eq=False)
class Cumulative:
    """Curves of accuracy against units removed.

    Attributes
    ----------
    data : xarray.Dataset
        ``accuracy`` (curve, step), ``class_accuracy`` and ``balanced_accuracy`` (curve, step,
        class; see :func:`pyablate.experiments.balanced_accuracy`), ``removal`` (curve,
        rank: labels of the units, first removed first). Coordinates: ``order``, ``repeat`` and
        ``target`` (name of the class it is made for, or empty) of each curve; ``removed`` and
        ``kept``, numbers of units, of each step.
    result : AblationResult
        The ablations behind it, one row per group, with their audit.

    Examples
    --------
    >>> curves = pa.cumulative(model, data, "features.16", order="random", steps=2, repeats=1)
    >>> curves.data["accuracy"].dims, len(curves.area)
    (('curve', 'step'), 1)
    """

    data: xr.Dataset
    result: AblationResult

    @property
    def area(self) -> pd.DataFrame:
        """One row per curve: ``order``, ``repeat``, ``target`` and the areas under the curves.

        ``area`` of accuracy, ``target_area`` of the accuracy of the target class (NaN without
        one): by the trapezoid rule over the share of units removed, so between 0 and 1.
        """
        share = self.data["removed"].to_numpy() / self.data["removed"].to_numpy()[-1]
        areas = integrate.trapezoid(self.data["accuracy"].to_numpy(), share, axis=1)
        of_target = integrate.trapezoid(self._of_target("class_accuracy"), share, axis=1)
        return self._curves().assign(area=areas, target_area=of_target)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per curve and step.

        ``order``, ``repeat``, ``target``, ``removed``, ``kept``, ``accuracy``, for curves made
        for a class ``target_accuracy`` and ``target_balanced_accuracy``, and ``chance``, the
        accuracy of guessing, 1 / classes. The accuracies of all classes are in ``data``.
        """
        steps = self.data.sizes["step"]
        curves = self._curves()
        table = curves.loc[curves.index.repeat(steps)].reset_index(drop=True)
        return table.assign(
            removed=np.tile(self.data["removed"].to_numpy(), len(curves)),
            kept=np.tile(self.data["kept"].to_numpy(), len(curves)),
            accuracy=self.data["accuracy"].to_numpy().ravel(),
            target_accuracy=self._of_target("class_accuracy").ravel(),
            target_balanced_accuracy=self._of_target("balanced_accuracy").ravel(),
            chance=1 / self.data.sizes["class"],
        )

    def __repr__(self) -> str:
        """Size in one line."""
        sizes = self.data.sizes
        return f"Cumulative({sizes['curve']} curves of {sizes['step']} steps)"

    def _repr_html_(self) -> str:
        """Show the areas under the curves."""
        return page(repr(self), self.area)

    def plot(
        self,
        *,
        x: str = "removed",
        y: str = "accuracy",
        log: bool = False,
        ax: Axes | None = None,
    ) -> Axes:
        """Draw the curves, see :func:`pyablate.plots.cumulative_curves`."""
        from pyablate.plots import cumulative_curves

        return cumulative_curves(self, x=x, y=y, log=log, ax=ax)

    def _curves(self) -> pd.DataFrame:
        return pd.DataFrame(
            {name: self.data[name].to_numpy() for name in ("order", "repeat", "target")}
        )

    def _of_target(self, name: str) -> Floats:
        """float64 [curve, step]: a figure of each curve's own class; NaN without one."""
        every = self.data[name].to_numpy()
        found = np.full(every.shape[:2], np.nan)
        for curve, target in enumerate(self.data["target_class"].to_numpy()):
            if target >= 0:
                found[curve] = every[curve, :, target]
        return found


def _counts(steps: int | Sequence[int] | None, units: int) -> Ints:
    """Numbers of removed units, ascending, 0 and all among them."""
    if steps is None:
        steps = min(units, STEPS)
    if isinstance(steps, int):
        check_count("steps", steps)
        return np.unique(np.linspace(0, units, min(steps, units) + 1).round().astype(np.int64))
    counts = np.asarray(list(steps))
    if counts.ndim != 1 or counts.dtype.kind not in "iu" or counts.min(initial=0) < 0:
        raise ValueError(f"steps: expected whole numbers from 0, got {steps!r}")
    if counts.max(initial=0) > units:
        raise ValueError(f"steps: expected at most {units}, all units, got {counts.max()}")
    return np.unique(np.concatenate([[0], counts, [units]])).astype(np.int64)


def _dataset(
    result: AblationResult,
    curves: Sequence[Order],
    rows: Ints,
    removed: Ints,
    units: Sequence[str],
    *,
    keep: bool,
) -> xr.Dataset:
    """Arrange the rows of a result by curve and step."""
    import xarray as xr  # slow to import: half a second

    def arranged(intact: Any, ablated: Floats) -> Floats:
        points = ablated[rows]
        first = np.broadcast_to(intact, (len(curves), 1, *np.shape(intact)))
        return np.concatenate([first, points], axis=1)

    by_class = ("curve", "step", "class")
    targets = np.array([curve.target for curve in curves])
    names = np.array([*result.class_names, ""], dtype=object)
    return xr.Dataset(
        {
            "accuracy": (by_class[:2], arranged(result.baseline_accuracy, result.accuracy)),
            "class_accuracy": (
                by_class,
                arranged(result.baseline_class_accuracy, class_accuracy(result)),
            ),
            "balanced_accuracy": (
                by_class,
                arranged(baseline_balanced_accuracy(result), balanced_accuracy(result)),
            ),
            "removal": (("curve", "rank"), np.array(units)[np.stack([c.ranks for c in curves])]),
            "class_size": ("class", result.class_sizes),
        },
        coords={
            "order": ("curve", np.array([curve.name for curve in curves], dtype=str)),
            "repeat": ("curve", np.array([curve.repeat for curve in curves])),
            "target": ("curve", names[targets].astype(str)),
            "target_class": ("curve", targets),
            "removed": ("step", removed),
            "kept": ("step", len(units) - removed),
            "class": np.array(result.class_names, dtype=str),
        },
        attrs={
            "intervention": result.intervention,
            "keep": int(keep),
            "images": len(result.labels),
            "audit": str(result.audit),
        },
    )
