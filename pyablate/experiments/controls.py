"""Controls: damage of units against that of random directions, and between networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from torch import nn

from pyablate._validation import check_count, check_level, check_seed, nearest
from pyablate.analysis.bootstrap import resample
from pyablate.analysis.statistics import layer_rows
from pyablate.analysis.targets import gini
from pyablate.data.dataset import gathered
from pyablate.experiments import directions
from pyablate.experiments.units import check_every_pair
from pyablate.interventions import Intervention
from pyablate.network.capture_memory import same_network
from pyablate.network.classifier import classifier
from pyablate.result import AblationResult
from pyablate.results.arrays import Floats, Ints
from pyablate.results.notebook import page
from pyablate.runs._ablate import ablate

FIGURES = ("gini", "split_half_drop", "max_class_drop", "accuracy_drop")
Results = AblationResult | Sequence[AblationResult]
Several = list[Floats]  # values of each network or rotation


def compare_damage(
    first: Results,
    second: Results,
    *,
    names: tuple[str, str] = ("first", "second"),
    layers: Mapping[str, str] | None = None,
    fewest: int = 10,
    resamples: int = 1000,
    confidence: float = 0.95,
    splits: int = 10,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare the damage that single units do in two networks: how much, how concentrated.

    Made for networks that differ in one thing, such as dropout or batch norm. Layers are compared
    one by one.

    Parameters
    ----------
    first, second : AblationResult or sequence of AblationResult
        Single ablations in either network, or in several that were trained alike.
    names : tuple of str
        What the two are called in the columns.
    layers : mapping of str to str, optional
        Which layer of the second stands for which of the first; by default those of equal name.
    fewest : int
        Lost images that a unit must have to take part in ``gini``: of one lost image all harm is
        in one class, whatever the unit does.
    resamples, confidence
        Of the bootstrap, percentile intervals.
    splits, seed : int
        Of ``split_half_drop``, and of everything random.

    Returns
    -------
    pandas.DataFrame
        One row per layer and figure: ``layer`` and ``layer_second``; ``figure``: ``gini`` (see
        :func:`pyablate.analysis.targets.gini`), ``split_half_drop``, ``max_class_drop`` (an extreme
        statistic, biased upwards), ``accuracy_drop``; for each side, after its name, the number of
        units, the mean over units (and networks) and its interval; ``difference``, first minus
        second, with its interval; ``p`` of a two-sided Mann-Whitney test between the units of one
        side and of the other, which takes units as independent. Several networks of a side are
        resampled as well as their units.

    Raises
    ------
    ValueError
        Names that are equal, no common layer, an unknown layer, options out of range.
    TypeError
        Something that is no result.

    Examples
    --------
    >>> other = pa.ablate(model, data, "features.16", intervention="mean")
    >>> table = pa.compare_damage(result, other, names=("zero", "mean"), resamples=20)
    >>> table["figure"].iloc[0]
    'gini'
    """
    sides = [_results(name, each) for name, each in (("first", first), ("second", second))]
    _check(names, fewest, resamples, confidence)
    check_seed(seed)
    known = [[layer_rows(result) for result in side] for side in sides]
    figures = [[_figures(result, fewest, splits, seed) for result in side] for side in sides]
    lines = []
    for layer, other in _matched(known, layers).items():
        for figure in FIGURES:
            values = [
                [
                    each[figure][rows[name]]
                    for each, rows in zip(figures[side], known[side], strict=True)
                ]
                for side, name in enumerate((layer, other))
            ]
            head = {"layer": layer, "layer_second": other, "figure": figure}
            lines.append(head | _compared(values, names, resamples, confidence, seed))
    return pd.DataFrame(lines)


@same_network()
def rotation_control(
    model: nn.Module,
    data: Any,
    layers: str | Sequence[str],
    *,
    rotations: int = 3,
    fewest: int = 10,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    **options: Any,
) -> RotationControl:
    """Compare units with random directions of the same layer.

    Ablating unit u by zero is ablating the direction of the u-th axis. If units are special, random
    orthogonal axes in their place do damage that is spread over more classes.

    Parameters
    ----------
    model, data
        As for :func:`pyablate.ablate`; the images are held in memory.
    layers : str or sequence of str
        Names or globs; compared one by one.
    rotations : int
        Random rotations, each with as many directions as there are units.
    fewest, resamples, confidence, seed
        As for :func:`compare_damage`.
    class_names, **options
        As for :func:`pyablate.ablate`.

    Raises
    ------
    ValueError, TypeError
        ``rotations`` below 1, and whatever :func:`pyablate.ablate` raises.

    Examples
    --------
    >>> control = pa.rotation_control(model, data, "features.16", rotations=1, resamples=20)
    >>> control.table["layer"].unique().tolist()
    ['features.16']
    """
    check_count("rotations", rotations)
    check_seed(seed)
    _check(("units", "rotated"), fewest, resamples, confidence)
    check_every_pair(options)
    held = gathered(data)
    network = classifier(model, logits=options.get("logits"))
    axes = directions.rotations(
        network,
        held,
        layers,
        count=rotations,
        seed=seed,
        device=options.get("device"),
        axis=options.get("axis"),
    )
    common = {"class_names": class_names, "seed": seed, **options}
    units = ablate(model, held, list(axes), **common)
    rotated = ablate(
        model, held, list(axes), intervention=Intervention("direction", directions=axes), **common
    )
    of_units, of_rotated = (_figures(result, fewest, 10, seed) for result in (units, rotated))
    unit_rows, rotated_rows = layer_rows(units), layer_rows(rotated)
    lines = []
    for layer in axes:
        for figure in FIGURES:
            turns = np.split(of_rotated[figure][rotated_rows[layer]], rotations)
            values = [[of_units[figure][unit_rows[layer]]], turns]
            compared = _compared(values, ("units", "rotated"), resamples, confidence, seed)
            lines.append({"layer": layer, "figure": figure} | compared)
    return RotationControl(pd.DataFrame(lines), units, rotated)


@dataclass(frozen=True, eq=False)
class RotationControl:
    """Units against random directions.

    Attributes
    ----------
    table : pandas.DataFrame
        As of :func:`compare_damage`, sides ``units`` and ``rotated``.
    units, rotated : AblationResult
        The ablations; of ``rotated`` the directions of the r-th rotation of a layer of C units are
        its rows ``r * C`` to ``(r + 1) * C - 1``.

    Examples
    --------
    >>> control = pa.rotation_control(model, data, "features.16", rotations=1, resamples=20)
    >>> len(control.units.units), len(control.rotated.units)
    (128, 128)
    """

    table: pd.DataFrame
    units: AblationResult
    rotated: AblationResult

    def __repr__(self) -> str:
        """Size in one line."""
        return f"RotationControl({len(self.table)} rows)"

    def _repr_html_(self) -> str:
        """Show the table."""
        return page(repr(self), self.table)


def _figures(result: AblationResult, fewest: int, splits: int, seed: int) -> dict[str, Floats]:
    """Each figure of every unit, NaN where it has none."""
    enough = result.lost.sum(axis=1) >= fewest
    return {
        "gini": np.where(enough, gini(result.class_accuracy_drop), np.nan),
        "split_half_drop": result.split_half_drop(splits=splits, seed=seed),
        "max_class_drop": result.max_class_drop,
        "accuracy_drop": result.accuracy_drop,
    }


def _compared(
    values: Sequence[Several],
    names: tuple[str, str],
    resamples: int,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    """Means, intervals and difference of two sides."""
    line: dict[str, Any] = {}
    means, draws = [], []
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    pooled = []
    for number, (name, side) in enumerate(zip(names, values, strict=True)):
        finite = [each[np.isfinite(each)] for each in side]
        finite = [each for each in finite if len(each)]
        pooled.append(np.concatenate([*finite, []]))
        mean = float(np.mean([each.mean() for each in finite])) if finite else np.nan
        drawn = _resampled(finite, resamples, np.random.default_rng((seed, number)))
        low, high = np.quantile(drawn, tails)
        line |= {f"{name}_units": len(pooled[-1]), name: mean}
        line |= {f"{name}_low": float(low), f"{name}_high": float(high)}
        means.append(mean)
        draws.append(drawn)
    low, high = np.quantile(draws[0] - draws[1], tails)
    line |= {"difference": means[0] - means[1]}
    line |= {"difference_low": float(low), "difference_high": float(high)}
    one, two = pooled
    both = len(one) > 0 and len(two) > 0
    return line | {"p": float(stats.mannwhitneyu(one, two).pvalue) if both else np.nan}


def _resampled(several: Several, resamples: int, generator: np.random.Generator) -> Floats:
    """Mean of the means in every resample of networks and of their units, float64 [resample]."""
    if not several:
        return np.full(resamples, np.nan)
    means = np.stack(
        [
            resample(len(each), resamples, generator).astype(np.float64) @ each / len(each)
            for each in several
        ]
    )
    chosen = generator.integers(0, len(several), (len(several), resamples))
    drawn: Floats = np.take_along_axis(means, chosen, axis=0).mean(axis=0)
    return drawn


def _matched(
    known: Sequence[Sequence[Mapping[str, Ints]]], layers: Mapping[str, str] | None
) -> Mapping[str, str]:
    """Pair layers that every result of either side has."""
    common = [[name for name in side[0] if all(name in rows for rows in side)] for side in known]
    if layers is None:
        layers = {name: name for name in common[0] if name in common[1]}
        if not layers:
            raise ValueError(
                f"layers: the two have no layer of the same name: {', '.join(common[0])} and "
                f"{', '.join(common[1])}; say which belong together"
            )
    for names, side in ((layers.keys(), common[0]), (layers.values(), common[1])):
        for name in names:
            if name not in side:
                raise ValueError(f"layers: no layer {name!r} there{nearest(name, side)}")
    return layers


def _results(name: str, given: Results) -> list[AblationResult]:
    found = [given] if isinstance(given, AblationResult) else list(given)
    if not found:
        raise ValueError(f"{name}: expected at least one result, got none")
    for each in found:
        if not isinstance(each, AblationResult):
            raise TypeError(f"{name}: expected an AblationResult, got {type(each).__name__}")
    return found


def _check(names: tuple[str, str], fewest: int, resamples: int, confidence: float) -> None:
    if len(names) != 2 or names[0] == names[1]:
        raise ValueError(f"names: expected two different names, got {names!r}")
    check_count("fewest", fewest)
    check_count("resamples", resamples)
    check_level("confidence", confidence)
