"""Shapley values of units: what each adds, on average over all orders in which units can go."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from torch import nn

from pyablate._validation import check_choice, check_exact, check_seed
from pyablate.data.dataset import gathered
from pyablate.experiments.permutations import Bools, Estimates, Rules, estimate
from pyablate.experiments.units import class_number, opened
from pyablate.interventions import Intervention, parse
from pyablate.network.capture_memory import same_network
from pyablate.result import AblationResult
from pyablate.results.arrays import Floats, Ints
from pyablate.results.audit import Audit
from pyablate.results.notebook import page
from pyablate.results.screening import Screening
from pyablate.runs._ablate import ablate
from pyablate.runs.job_list import plan_jobs
from pyablate.runtime.chunking import NUMBERS
from pyablate.runtime.progress import Report, reporting

if TYPE_CHECKING:
    import xarray as xr

MEASURES = ("accuracy", "loss")
FIGURES = ("value", "standard_error", "lower", "upper", "samples", "decided")

PAIRS = 2 * NUMBERS
"""Pairs of a set and an image, or a unit, in one run: their flips fill some hundred megabytes."""

OWN = ("groups", "measures", "output", "fresh", "shard", "distributed")
"""Options of :func:`pyablate.ablate` that the many runs behind the values have no use for."""

Groups = Sequence[Sequence[str]]
Ablated = Callable[[Groups, Report], tuple[Floats, AblationResult]]
"""What is lost without each of some groups of units, and the run that tells."""


@same_network()
def shapley(
    model: nn.Module,
    data: Any,
    layers: str | Sequence[str],
    *,
    top: int | None = None,
    target: str | int | None = None,
    measure: str = "accuracy",
    permutations: int = 100,
    truncation: float | None = None,
    tolerance: float = 0.0,
    confidence: float = 0.95,
    interval: str | None = None,
    seed: int = 0,
    intervention: str | Intervention = "zero",
    class_names: Sequence[str] | None = None,
    progress: bool | Report | None = None,
    **options: Any,
) -> Shapley:
    """Estimate the Shapley value of units: the share of the performance that is due to each.

    Units are taken away one after another in a random order; what is lost when a unit goes, on
    average over the orders, is its value. So a unit that another one backs up has a value although
    its ablation alone does nothing, and the values of all units add up to what is lost when all
    are ablated. Every set of units is ablated as a group of :func:`pyablate.ablate`, exactly unless
    ``guarantee`` says otherwise; sets that come again are ablated once.

    Parameters
    ----------
    model, data
        As for :func:`pyablate.ablate`; the images are held in memory.
    layers : str or sequence of str
        The units that take part, as for :func:`pyablate.ablate`: names, globs, or single units as
        ``"layer:unit"``, of one layer or several. All other units stay.
    top : int, optional
        Only which are the ``top`` units of largest value is asked. Sampling stops for a unit once
        its interval lies above or below the middle between the ``top``-th and the next estimate.
    target : str or int, optional
        Name or number of a class: performance on its images only.
    measure : {"accuracy", "loss"}
        Performance is accuracy, or minus the mean cross-entropy in nats, as exact as the
        ``measures`` of :func:`pyablate.ablate`.
    permutations : int
        Orders to draw, at most.
    truncation : float, optional
        An order ends where the performance of what is left is as near as this to that without
        all units; what is left counts 0. That saves the sets which have lost everything, and
        moves the sum of the values by at most so much. By default all orders are gone through.
    tolerance : float
        Half-width of an interval below which a unit is known well enough, and sampling stops for
        it; with ``top``, how far an interval may reach beyond the middle.
    confidence : float
        Probability with which all intervals hold together, whenever sampling stops.
    interval : {"bernstein", "student"}, optional
        The empirical Bernstein bound, which holds whatever the distribution but needs thousands of
        orders to be narrow; or Student's t, narrow early, which takes means as normally distributed
        (and a unit that changed nothing so far as one that never does). By default ``"bernstein"``
        for accuracy, ``"student"`` for the loss, which has no bound.
    seed : int
        Of the orders, and as for :func:`pyablate.ablate`.
    intervention, class_names, progress, **options
        As for :func:`pyablate.ablate`; directions cannot be removed together, and each of the runs
        behind the values audits as many pairs. ``guarantee="screened"`` is for the accuracy, as the
        loss needs the logits of every pair; the intervals know nothing of what it can miss.

    Raises
    ------
    ValueError, TypeError
        Unknown layers, units or classes, a class without images, options out of range, options
        about where a run is kept, which this has no use for, a truncation that ends every order
        before its first unit, and whatever :func:`pyablate.ablate` raises.

    Notes
    -----
    Truncated permutations: Ghorbani and Zou 2019, "Data Shapley: Equitable Valuation of Data for
    Machine Learning". The Shapley value of units, and sampling that stops unit by unit: Ghorbani
    and Zou 2020, "Neuron Shapley: Discovering the Responsible Neurons". With m samples of variance
    V (sample variance) in a range R, ``sqrt(2 V ln(2 / d) / m) + 7 R ln(2 / d) / (3 (m - 1))``
    bounds the error of their mean on one side with probability 1 - d: Maurer and Pontil 2009,
    "Empirical Bernstein Bounds and Sample Variance Penalization", theorem 4. Here R = 2, and d is
    ``1 - confidence`` divided among units, sides and the (at most ten) looks at which it is asked
    who is decided.

    Examples
    --------
    >>> units = [f"features.16:{unit}" for unit in (14, 39, 113, 117)]
    >>> found = pa.shapley(model, data, units, permutations=20)
    >>> round(float(found.data["value"].sum()), 6) == round(found.data.attrs["total"], 6)
    True
    """
    check_seed(seed)
    check_choice("measure", measure, MEASURES)
    for name in OWN:
        if name in options:
            raise TypeError(f"{name}: expected no such option, shapley makes many runs of its own")
    if measure == "loss":
        check_exact(options.get("guarantee", "exact"), "the loss needs the logits of every pair")
    if measure == "loss" and interval == "bernstein":
        raise ValueError("interval: expected 'student' for the loss, which has no bound")
    rules = Rules(
        permutations=permutations,
        top=top,
        truncation=truncation,
        tolerance=tolerance,
        confidence=confidence,
        interval=interval or ("student" if measure == "loss" else "bernstein"),
    )
    images, labels = gathered(data)
    replaced = parse(intervention, seed=seed)
    common = {
        "intervention": replaced,
        "class_names": class_names,
        "measures": ["loss"] if measure == "loss" else [],
        **options,
    }
    ready = opened(model, (images, labels), common)
    jobs = plan_jobs(ready.sites, layers, None, replaced)
    units = [f"{name}:{unit}" for job in jobs for ((name, unit),) in job.members]
    rules.check(len(units))
    number = None if target is None else class_number(ready, target, "target")

    # Samples of screened runs are to be independent, and each run measures with the seed after it.
    seeds = itertools.count(seed, 2)

    def ablated(groups: Groups, report: Report) -> tuple[Floats, AblationResult]:
        result = ablate(
            model, (images, labels), groups=groups, seed=next(seeds), progress=report, **common
        )
        return _lost(result, measure, number), result

    most = permutations * len(units)
    with reporting(progress, unit="sets") as report:
        sets = _Sets(ablated, units, len(labels), most, report)
        found = estimate(sets, len(units), rules, np.random.default_rng(seed))
        report(most, most, "+".join(dict.fromkeys(sets.layers)))
    about = {
        "total": found.total,
        "measure": measure,
        "target": "" if number is None else ready.class_names[number],
        "permutations": found.permutations,
        "evaluations": len(sets.known),
        "intervention": str(replaced),
        "images": len(labels),
        "audit": str(sets.audit),
        "guarantee": "exact" if sets.screening is None else "screened",
    }
    return Shapley(_dataset(units, found, asdict(rules) | about), sets.audit, sets.screening)


@dataclass(frozen=True, eq=False, repr=False)
class Shapley:
    """Shapley values of units, how exactly they are known, and what that took.

    Attributes
    ----------
    data : xarray.Dataset
        Over ``unit`` (labels, with the coordinate ``layer``): ``value``, a share of the images, or
        nats; ``standard_error``; ``lower`` and ``upper``, which hold for all units together with
        the probability ``confidence``; ``samples``, orders in which the unit's part is known;
        ``decided``, whether it is among the top units or not for certain, or known as exactly as
        ``tolerance`` asks. In ``attrs``: ``total``, the loss of performance without all units,
        to which all values add up where no unit stopped early and no order was truncated;
        ``permutations`` drawn, ``evaluations`` (sets ablated), ``guarantee``, and what was asked
        for. The intervals are those of the orders as truncated.
    audit : Audit
        Of all runs.
    screening : Screening or None
        Certificate of all runs together, about the predictions of all sets that were ablated; None
        where they are exact. Each run draws its sample anew; that later runs ablate what earlier
        ones made them ask for is left out of account.

    Examples
    --------
    >>> units = [f"features.16:{unit}" for unit in (14, 39, 113, 117)]
    >>> pa.shapley(model, data, units, permutations=20).to_dataframe().shape
    (4, 8)
    """

    data: xr.Dataset
    audit: Audit
    screening: Screening | None = None

    def to_dataframe(self) -> pd.DataFrame:
        """One row per unit.

        ``unit`` (label), ``layer``, ``value``, ``standard_error``, ``lower``, ``upper``,
        ``samples`` and ``decided``.
        """
        names = ("unit", "layer", *FIGURES)
        return pd.DataFrame({name: self.data[name].to_numpy() for name in names})

    def _repr_html_(self) -> str:
        """Show the units worth most."""
        table = self.to_dataframe().sort_values("value", ascending=False, kind="stable")
        return page(repr(self), table)

    def __repr__(self) -> str:
        """Size and effort in one line."""
        about = self.data.attrs
        of = f" of {about['target']}" if about["target"] else ""
        decided = int(self.data["decided"].sum())
        known = self.screening
        screened = (
            "" if known is None else f", screened: at most {known.upper_bound:.2g} wrong at 95 %"
        )
        return (
            f"Shapley({self.data.sizes['unit']} units, {about['measure']}{of}, "
            f"{about['permutations']:,} permutations, {about['evaluations']:,} sets ablated, "
            f"{decided} units decided{screened})"
        )


class _Sets:
    """What is lost without sets of units; equal sets are ablated once."""

    def __init__(
        self, ablated: Ablated, units: Sequence[str], images: int, most: int, report: Report
    ) -> None:
        self.ablated = ablated
        self.units = np.array(units, dtype=object)
        self.layers = np.array([label.rpartition(":")[0] for label in units], dtype=object)
        self.at_a_time = max(1, PAIRS // max(images, len(units)))
        self.most, self.asked, self.report = most, 0, report
        self.known: dict[bytes, float] = {}
        self.audit = Audit(0, 0)
        self.screening: Screening | None = None

    def __call__(self, ranks: Ints, order: Ints, count: Ints) -> Floats:
        """Ablate sets of units; see :data:`pyablate.experiments.permutations.Lost`."""
        found = np.empty(len(count))
        for start in range(0, len(count), self.at_a_time):
            some = slice(start, start + self.at_a_time)
            sets = ranks[order[some]] < count[some, None]
            keys = [key.tobytes() for key in np.packbits(sets, axis=1)]
            new = {key: each for key, each in zip(keys, sets, strict=True) if key not in self.known}
            if new:
                self._ablate(new)
            found[some] = [self.known[key] for key in keys]
            self.asked += len(keys)
        return found

    def _ablate(self, new: Mapping[bytes, Bools]) -> None:
        where = {key: tuple(dict.fromkeys(self.layers[each])) for key, each in new.items()}
        keys = sorted(new, key=where.__getitem__)  # groups in the same layers share their passes

        def report(done: int, total: int, layer: str) -> None:
            here = done * len(keys) // max(total, 1)
            self.report(min(self.asked + here, self.most), self.most, layer)

        lost, result = self.ablated([self.units[new[key]].tolist() for key in keys], report)
        self.known.update(zip(keys, lost.tolist(), strict=True))
        self.audit += result.audit
        known, found = self.screening, result.screening
        self.screening = found if known is None or found is None else known + found


def _lost(result: AblationResult, measure: str, target: int | None) -> Floats:
    """Sum up the performance that each row of a result loses, float64 [row]."""
    classes = slice(None) if target is None else [target]
    images = int(result.class_sizes[classes].sum())
    if not images:
        raise ValueError(f"target: no images of class {result.class_names[target or 0]!r}")
    if measure == "loss":
        by_class = result.measures["loss"].change
    else:
        by_class = (result.lost - result.gained).astype(np.float64)
    shares: Floats = by_class[:, classes].sum(axis=1) / images
    return shares


def _dataset(units: Sequence[str], found: Estimates, about: Mapping[str, Any]) -> xr.Dataset:
    import xarray as xr  # slow to import: half a second

    layers = [label.rpartition(":")[0] for label in units]
    return xr.Dataset(
        {name: ("unit", getattr(found, name)) for name in FIGURES},
        coords={"unit": np.array(units, dtype=str), "layer": ("unit", np.array(layers, dtype=str))},
        attrs={name: value for name, value in about.items() if value is not None},
    )
