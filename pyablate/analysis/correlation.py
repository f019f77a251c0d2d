"""Correlation of attributes of units with their importance, within each layer."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from pyablate._validation import check_choices, check_count, check_level, check_seed, nearest
from pyablate.analysis.bootstrap import METHODS, Variable, coefficients, resample, shuffled
from pyablate.analysis.cells import (
    FEWEST,
    FIGURES,
    Cells,
    agreement_of_halves,
    ceiling,
    half_drops,
)
from pyablate.analysis.statistics import adjusted, layer_rows
from pyablate.analysis.targets import CELL_TARGET, cell_targets, unit_targets
from pyablate.analysis.unit_table import (
    aligned,
    attribute_columns,
    cell_columns,
    preferred_classes,
)
from pyablate.results.arrays import Floats
from pyablate.results.record import Record

if TYPE_CHECKING:
    import xarray as xr

_FAMILY = ["layer", "target", "method"]
_FIGURES = ["correlation", "low", "high", "p", "shuffled", "random_order"]
_COLUMNS = (
    "layer target attribute method units missing correlation low high p q shuffled random_order"
).split()
_CELL_FIGURES = ["value", "low", "high", "p", "shuffled_units", "shuffled_classes"]
_CELL_FIGURES += ["halves", "ceiling"]
_CELL_COLUMNS = (
    "layer target attribute figure units classes missing value low high p q shuffled_units "
    "shuffled_classes halves ceiling"
).split()
_EQUAL = 1e-9
_Made = TypeVar("_Made")


def correlate(
    result: Record,
    table: xr.Dataset | pd.DataFrame,
    *,
    attributes: str | Sequence[str] | None = None,
    targets: str | Sequence[str] | Mapping[str, ArrayLike] | None = None,
    cells: bool = False,
    top: float = 0.05,
    methods: str | Sequence[str] = METHODS,
    layers: str | Sequence[str] | None = None,
    preferred: str = "class_selectivity_class",
    resamples: int = 1000,
    shuffles: int = 200,
    confidence: float = 0.95,
    splits: int = 10,
    seed: int = 0,
) -> pd.DataFrame:
    """Correlate attributes of units with their importance, within each layer.

    Layers are never pooled: attributes and drops both change from layer to layer, and pooling them
    makes correlations that no layer has.

    Parameters
    ----------
    result : AblationResult
        What was ablated.
    table : xarray.Dataset or pandas.DataFrame
        Attributes over the labels of the result's units (``"layer:unit"``): variables over the
        coordinate ``unit``, or columns with the labels as index.
    attributes : str or sequence of str, optional
        Which; by default all floating point ones.
    targets : str, sequence of str, or mapping of str to numbers [unit], optional
        What to predict, see :func:`pyablate.analysis.targets.unit_targets`; by default all that can
        be had.
    cells : bool
        Compare cells of unit and class instead: does what an attribute says of class k foretell the
        drop of class k? The table is then a data set with variables over ``unit`` and ``class``
        (``auc_per_class`` is attribute ``auc``), and targets are such variables of ``result.data``,
        by default ``class_accuracy_drop``.
    top : float
        Share of the cells that ``precision`` looks at, with ``cells``.
    methods : str or sequence of str
        Of ``pearson``, ``spearman``, ``kendall`` (tau-b); cells are compared by ``spearman``.
    layers : str or sequence of str, optional
        Names or globs; by default all.
    preferred : str
        Variable of the table with the preferred class of each unit (number or name), for the
        target ``preferred_class_drop``.
    resamples, shuffles : int
        Random draws of the bootstrap, and of the baselines.
    confidence : float
        Of interval and baselines, between 0 and 1.
    splits, seed : int
        Random splits of the target ``split_half_drop``; seed of everything random.

    Returns
    -------
    pandas.DataFrame
        One row per layer, target, attribute and method:

        - ``units``, those that took part, and ``missing``, those left out because attribute or
          target is not finite;
        - ``correlation``, and ``low`` and ``high``, the percentile bootstrap interval over units;
        - ``p``, scipy's two-sided value, and ``q``, adjusted by Benjamini-Hochberg over the
          attributes of the same layer, target and method;
        - ``shuffled``: the size that the correlation stays below with probability ``confidence``
          when the attribute is shuffled among the units;
        - ``random_order``: the same with a random order of the units in place of the attribute.

        NaN for fewer than three units, and where attribute or target is constant.

        With ``cells`` one row per layer, target, attribute and ``figure``: ``within_unit`` (rank
        correlation over classes, mean over units: which class suffers), ``within_class`` (over
        units, mean over classes: which unit matters) and ``precision`` (of the ``top`` cells by the
        attribute, the share that is among as many by the drop):

        - ``units`` and ``classes`` that took part, and ``missing``, units left out because a
          cell of theirs is not finite; a class without any finite cell is left out before;
        - ``value``, and ``low`` and ``high``, the interval when units and classes are drawn again;
        - ``shuffled_units`` and ``shuffled_classes``: what the figure stays below with probability
          ``confidence`` when the attribute's rows, or columns, are shuffled. The first keeps what
          all units have in common (classes that are fragile, whoever is ablated), the second what
          all classes have (units that matter to all);
        - ``p``, the share of shuffles that reach the value or have none, of the kind that does so
          more often, and ``q``, adjusted over the attributes of the layer, target and figure;
        - ``halves``, the figure between the drops of two halves of the images, and ``ceiling``, the
          correlation to expect of a perfect attribute; only of ``class_accuracy_drop``.

    Raises
    ------
    ValueError
        Unknown names (the nearest is told), units missing in the table, options out of range.
    TypeError
        The table is of another type.

    Examples
    --------
    >>> table = pa.attributes(model, data, "features.16", ["l1_norm"])
    >>> found = pa.correlate(result, table, methods="spearman", resamples=50, seed=0)
    >>> found["target"].iloc[0], int(found["units"].iloc[0])
    ('accuracy_drop', 128)
    >>> table = pa.attributes(model, data, "features.16", "class_correlation")
    >>> found = pa.correlate(result, table, cells=True, resamples=20, shuffles=20)
    >>> found["figure"].tolist()
    ['within_unit', 'within_class', 'precision']
    """
    methods = check_choices("methods", methods, METHODS)
    if not methods:
        raise ValueError(f"methods: expected some of {', '.join(METHODS)}, got none")
    check_count("resamples", resamples)
    check_count("shuffles", shuffles)
    check_seed(seed)
    check_level("confidence", confidence)
    if cells:
        check_level("top", top)
        check_count("splits", splits)
        if tuple(methods) not in (METHODS, ("spearman",)):
            raise ValueError(f"methods: cells are compared by spearman, got {', '.join(methods)}")
        draws = _Draws(resamples, shuffles, confidence, splits, seed)
        return _cells(result, table, attributes, targets, layers, top, draws)
    frame = aligned(table, result)
    columns = attribute_columns(frame, attributes, leave_out=[preferred])
    wanted = unit_targets(
        result,
        targets,
        preferred=preferred_classes(frame, preferred, result.class_names),
        splits=splits,
        seed=seed,
    )
    lines: list[dict[str, Any]] = []
    for number, (layer, rows) in enumerate(chosen_layers(result, layers).items()):
        chance = _Chance(resamples, shuffles, confidence, (seed, number))
        for target, values in wanted.items():
            for attribute, numbers in columns.items():
                pair = numbers[rows], values[rows]
                head = {"layer": layer, "target": target, "attribute": attribute}
                lines += [head | line for line in _pair(*pair, methods, chance)]
    found = _frame(lines)
    tests = found.groupby(_FAMILY, sort=False)["p"]
    found["q"] = tests.transform(lambda p: adjusted(p.to_numpy()))
    return found[_COLUMNS]


def _frame(lines: list[dict[str, Any]]) -> pd.DataFrame:
    if not lines:
        raise ValueError("attributes, targets, layers: expected at least one of each, got none")
    return pd.DataFrame(lines)


@dataclass(frozen=True)
class _Draws:
    """How much of everything random, as :func:`correlate` takes it."""

    resamples: int
    shuffles: int
    confidence: float
    splits: int
    seed: int


def _cells(
    result: Record,
    table: xr.Dataset | pd.DataFrame,
    attributes: str | Sequence[str] | None,
    targets: str | Sequence[str] | Mapping[str, ArrayLike] | None,
    layers: str | Sequence[str] | None,
    top: float,
    draws: _Draws,
) -> pd.DataFrame:
    """Compare attributes with drops in every cell of unit and class."""
    result.check_complete("correlate(cells=True)")
    columns = cell_columns(table, result, attributes)
    wanted = cell_targets(result, targets)
    lines: list[dict[str, Any]] = []
    for layer, rows in chosen_layers(result, layers).items():
        halves = list(half_drops(result, rows, draws.splits, draws.seed))
        for target, drops in wanted.items():
            pairs = halves if target == CELL_TARGET else []
            for attribute, values in columns.items():
                head = {"layer": layer, "target": target, "attribute": attribute}
                found = _cell_figures(values[rows], drops[rows], pairs, top, draws)
                lines += [head | line for line in found]
    frame = _frame(lines)
    tests = frame.groupby(["layer", "target", "figure"], sort=False)["p"]
    frame["q"] = tests.transform(lambda p: adjusted(p.to_numpy()))
    return frame.loc[:, list(_CELL_COLUMNS)]


def _cell_figures(
    attribute: Floats, drop: Floats, halves: Sequence[Sequence[Floats]], top: float, draws: _Draws
) -> list[dict[str, Any]]:
    """All figures of one attribute on the cells of one layer."""
    finite = np.isfinite(attribute) & np.isfinite(drop)
    classes = finite.any(axis=0)
    units = finite[:, classes].all(axis=1)
    kept = np.ix_(units, classes)
    counts = {
        "units": int(units.sum()),
        "classes": int(classes.sum()),
        "missing": int((~units).sum()),
    }
    if min(counts["units"], counts["classes"]) < FEWEST:
        return [
            {"figure": name, **counts, **dict.fromkeys(_CELL_FIGURES, np.nan)} for name in FIGURES
        ]
    cells = Cells(attribute[kept], drop[kept], top)
    value = cells.measured()
    drawn = cells.resampled(draws.resamples, np.random.default_rng(draws.seed))
    tail = (1 - draws.confidence) / 2
    low, high = (_quantiles(drawn, level) for level in (tail, 1 - tail))
    generator = np.random.default_rng((draws.seed, 1))
    by_units, by_classes = (cells.shuffled(draws.shuffles, generator, axis) for axis in (0, 1))
    # Equal figures differ in their last bits by the order of a sum; no figure speaks for no value.
    reaching = [(~(one < value - _EQUAL)).sum(axis=0) for one in (by_units, by_classes)]
    p = (1 + np.maximum(*reaching)) / (1 + draws.shuffles)
    bounds = [_quantiles(shuffled, draws.confidence) for shuffled in (by_units, by_classes)]
    agreeing = agreement_of_halves([[half[kept] for half in pair] for pair in halves], top)
    return [
        {
            "figure": name,
            **counts,
            "value": value[i],
            "low": low[i],
            "high": high[i],
            "p": p[i] if np.isfinite(value[i]) else np.nan,
            "shuffled_units": bounds[0][i],
            "shuffled_classes": bounds[1][i],
            "halves": agreeing[i],
            "ceiling": ceiling(agreeing[i]) if name != "precision" else np.nan,
        }
        for i, name in enumerate(FIGURES)
    ]


def _quantiles(draws: Floats, level: float) -> Floats:
    """Quantile of each column [draw, figure], NaN left out; NaN where nothing is left."""
    columns = (column[~np.isnan(column)] for column in draws.T)
    return np.array([np.quantile(known, level) if len(known) else np.nan for known in columns])


class _Chance:
    """Random draws for one layer, shared by all its attributes and targets."""

    def __init__(
        self, resamples: int, shuffles: int, confidence: float, seed: tuple[int, int]
    ) -> None:
        self.resamples, self.shuffles = resamples, shuffles
        self.confidence, self.seed = confidence, seed
        self._known: dict[Hashable, Any] = {}

    def variable(self, values: Floats) -> Variable:
        """Join values with the weights of all resamples; ready-made if they came before."""
        weights = self._once(
            ("weights", len(values)),
            lambda: resample(len(values), self.resamples, np.random.default_rng(self.seed)),
        )
        return self._once(("values", values.tobytes()), lambda: Variable(values, weights))

    def interval(self, x: Floats, y: Floats, method: str) -> tuple[float, float]:
        """Percentile bootstrap interval of the correlation; NaN if no resample has one."""
        found = coefficients(self.variable(x), self.variable(y), method)
        found = found[~np.isnan(found)]
        if not len(found):
            return np.nan, np.nan
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(found, [tail, 1 - tail])
        return float(low), float(high)

    def bound(self, x: Floats, y: Floats, method: str) -> float:
        """Size that the correlation of shuffled ``x`` with ``y`` seldom exceeds."""
        if method != "pearson":
            # Of shuffled ranks nothing matters but how many values are equal, in attributes mostly
            # none: one answer serves many.
            x, y = np.sort(stats.rankdata(x)), np.sort(stats.rankdata(y))

        def make() -> float:
            sizes = np.abs(shuffled(x, y, method, self._orders(len(x))))
            return float(np.quantile(sizes, self.confidence))

        return self._once(("bound", method, x.tobytes(), y.tobytes()), make)

    def _orders(self, units: int) -> NDArray[np.int64]:
        generator = np.random.default_rng((*self.seed, 1))
        rows = np.tile(np.arange(units), (self.shuffles, 1))
        return self._once(("orders", units), lambda: generator.permuted(rows, axis=1))

    def _once(self, key: Hashable, make: Callable[[], _Made]) -> _Made:
        if key not in self._known:
            self._known[key] = make()
        made: _Made = self._known[key]
        return made


def _pair(
    attribute: Floats, target: Floats, methods: Sequence[str], chance: _Chance
) -> list[dict[str, Any]]:
    """All methods for one attribute and one target on the units of one layer."""
    both = np.isfinite(attribute) & np.isfinite(target)
    x, y = attribute[both], target[both]
    counts = {"units": len(x), "missing": len(both) - len(x)}
    if len(x) < FEWEST or x.min() == x.max() or y.min() == y.max():
        empty = dict.fromkeys(_FIGURES, np.nan)
        return [{"method": method, **counts, **empty} for method in methods]
    lines = []
    for method in methods:
        correlation, p = _scipy(chance, x, y, method)
        low, high = chance.interval(x, y, method)
        line = {"correlation": correlation, "low": low, "high": high, "p": p}
        line["shuffled"] = chance.bound(x, y, method)
        line["random_order"] = chance.bound(np.arange(len(x), dtype=np.float64), y, method)
        lines.append({"method": method, **counts, **line})
    return lines


def _scipy(chance: _Chance, x: Floats, y: Floats, method: str) -> tuple[float, float]:
    found: Any
    if method == "pearson":
        # Standardised, because scipy warns of values that hardly differ relative to their mean.
        found = stats.pearsonr(chance.variable(x).standard, chance.variable(y).standard)
    elif method == "spearman":
        found = stats.spearmanr(x, y)
    else:
        found = stats.kendalltau(x, y)
    return float(found.statistic), float(found.pvalue)


def chosen_layers(
    result: Record, patterns: str | Sequence[str] | None
) -> dict[str, NDArray[np.int64]]:
    """Rows of each layer that a name or glob matches, or of all; see :func:`layer_rows`."""
    rows = layer_rows(result)
    if patterns is None:
        return rows
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matching = fnmatch.filter(rows, pattern)
        if not matching:
            raise ValueError(f"layers: the result has no layer {pattern!r}{nearest(pattern, rows)}")
        chosen.update(matching)
    return {layer: rows[layer] for layer in rows if layer in chosen}
