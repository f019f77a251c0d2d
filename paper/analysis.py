"""From single measurements to the figures of the tables; nothing here needs a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from scipy import stats

from pyablate import AblationResult, Flips, correlate
from pyablate.analysis.statistics import layer_rows, random_half
from pyablate.analysis.targets import gini, unit_targets

TARGETS = ("accuracy_drop", "split_half_drop", "loss_change")
TARGET_TITLES = {
    "accuracy_drop": "overall drop",
    "split_half_drop": "largest class drop",
    "loss_change": "loss change",
}
# More of each should mean more important.
OF_THE_PAPER = ("class_selectivity", "l1_norm", "class_correlation")
ATTRIBUTES = (
    *OF_THE_PAPER,
    "auc",
    "mutual_information",
    "mean",
    "l1_norm_outgoing",
    "taylor",
)
# Of a unit and a class; the paper's first. Conductance on enough images of every class would take
# sixty times as long as relevance.
OF_CELLS = ("class_selectivity", "class_correlation", "auc", "taylor", "lrp")
CELL_FIGURES = ("within_unit", "within_class", "precision")
TOP_CELLS = 0.05
LEVEL = 0.05
POINT = 0.01
Floats = NDArray[np.float64]


def drops(result: AblationResult, *, fdr: float = 0.05, seed: int = 0) -> pd.DataFrame:
    """Summarise the drops of the units of each layer.

    Returns
    -------
    pandas.DataFrame
        One row per layer: ``units``; ``overall_median``, ``overall_largest``; ``harmless``, share
        of units whose overall drop is below one point; ``class_median``, ``class_largest`` of the
        largest class drop; ``floor_median`` of its noise floor; ``split_half_median`` and
        ``split_half_largest`` of the drop of a class that was chosen on other images; ``damaged``,
        share of units whose largest class drop is more than chance at this false discovery rate;
        ``damaged_5``, the same with a split-half drop of at least five points besides.
    """
    tests = result.max_class_test(seed=seed)
    overall = result.accuracy_drop
    lines = []
    for layer, rows in layer_rows(result).items():
        of_layer = tests.iloc[rows]
        damaged = of_layer["q"] <= fdr
        lines.append(
            {
                "layer": layer,
                "units": len(rows),
                "overall_median": np.median(overall[rows]),
                "overall_largest": overall[rows].max(),
                "harmless": (overall[rows] < POINT).mean(),
                "class_median": of_layer["max_class_drop"].median(),
                "floor_median": of_layer["noise_floor"].median(),
                "split_half_median": of_layer["split_half_drop"].median(),
                "class_largest": of_layer["max_class_drop"].max(),
                "split_half_largest": of_layer["split_half_drop"].max(),
                "damaged": damaged.mean(),
                "damaged_5": (damaged & (of_layer["split_half_drop"] >= 5 * POINT)).mean(),
            }
        )
    return pd.DataFrame(lines)


def summary(table: pd.DataFrame) -> pd.Series:
    """Join the layers of `drops`: shares over all units, and the same for the upper half.

    The upper half of the layers stands for the paper's "high layers". Its figures end in
    ``_upper``: ``units``, ``harmless``, ``damaged``, ``damaged_5``, ``overall_largest``,
    ``split_half_largest``.
    """
    found: dict[str, float] = {}
    for ending, part in (("", table), ("_upper", table.iloc[len(table) // 2 :])):
        found["units" + ending] = part["units"].sum()
        for name in ("harmless", "damaged", "damaged_5"):
            found[name + ending] = np.average(part[name], weights=part["units"])
        for name in ("overall_largest", "split_half_largest"):
            found[name + ending] = part[name].max()
    return pd.Series(found)


def on_images(result: AblationResult, chosen: NDArray[np.bool_]) -> AblationResult:
    """Return the result on some of its images only, without measures."""
    number = np.cumsum(chosen) - 1
    kept = chosen[result.flips.image]
    row = result.flips.row[kept]
    start = np.searchsorted(row, np.arange(len(result.units) + 1))
    flips = Flips(
        start, number[result.flips.image[kept]].astype(np.int32), result.flips.prediction[kept]
    )
    return replace(
        result,
        labels=result.labels[chosen],
        baseline=result.baseline[chosen],
        flips=flips,
        measures={},  # sums over all images
    )


def reliability(result: AblationResult, *, splits: int = 10, seed: int = 0) -> pd.DataFrame:
    """How well a target measured on half of the images agrees with the other half.

    No attribute can be expected to agree with a target much better than the target with itself.

    Returns
    -------
    pandas.DataFrame
        One row per layer: ``accuracy_drop`` and ``split_half_drop``, the Spearman correlation over
        units between the halves, mean of several random splits; of the class drop each half
        measures the class that the other half chose. NaN where a half shows no difference.
    """
    generator = np.random.default_rng(seed)
    rows = layer_rows(result)
    found = {(layer, target): [] for layer in rows for target in TARGETS[:2]}
    for _ in range(splits):
        mask = random_half(result.labels, result.classes, generator)
        one, two = on_images(result, mask), on_images(result, ~mask)
        of_class = [first.class_accuracy_drop for first in (one, two)]
        unit = np.arange(len(result.units))
        measured = {
            "accuracy_drop": (one.accuracy_drop, two.accuracy_drop),
            "split_half_drop": (of_class[1][unit, one.max_class], of_class[0][unit, two.max_class]),
        }
        for layer, of_layer in rows.items():
            for target, (first, second) in measured.items():
                found[layer, target].append(spearman(first[of_layer], second[of_layer]))
    lines = [
        {"layer": layer} | {target: _mean(found[layer, target]) for target in TARGETS[:2]}
        for layer in rows
    ]
    return pd.DataFrame(lines)


def half_of(labels: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """Random half of the images of each class."""
    return random_half(labels, int(labels.max()) + 1, np.random.default_rng(seed))


def cells(
    result: AblationResult,
    attributes: xr.Dataset,
    half: NDArray[np.bool_],
    *,
    resamples: int = 200,
    shuffles: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """`pa.correlate(cells=True)` of attributes of one half of the images, drops of the other.

    The halves share no image, so no accident of an image is in both.
    """
    return correlate(
        on_images(result, ~half),
        attributes,
        attributes=OF_CELLS,
        cells=True,
        top=TOP_CELLS,
        resamples=resamples,
        shuffles=shuffles,
        seed=seed,
    )


def joined_cells(networks: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Join the tables of `cells` of networks of one family.

    Returns
    -------
    pandas.DataFrame
        Over attribute and figure: ``value``, ``halves`` and ``ceiling``, mean over layers and
        networks; ``value_least`` and ``value_most``, means over layers of single networks;
        ``layers``, layers of all networks that have a value; ``told``, how many of these beat the
        shuffles of units and of classes (q at most 5 %).
    """
    key = ["attribute", "figure"]
    each = [table.groupby(key, sort=False)["value"].mean() for table in networks]
    every = pd.concat(networks)
    grouped = every.assign(told=every["q"] <= LEVEL).groupby(key, sort=False)
    means = pd.concat(each, axis=1)
    return pd.DataFrame(
        {
            "value": means.mean(axis=1),
            "value_least": means.min(axis=1),
            "value_most": means.max(axis=1),
            "halves": grouped["halves"].mean(),
            "ceiling": grouped["ceiling"].mean(),
            "layers": grouped["value"].count(),
            "told": grouped["told"].sum(),
        }
    )


def prediction_draws(
    result: AblationResult,
    attributes: pd.DataFrame,
    *,
    names: Sequence[str] = ATTRIBUTES,
    targets: Sequence[str] = TARGETS,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Spearman correlations of attributes with targets, mean over layers, and bootstrap draws.

    The same resampled units serve all attributes and targets, so that draws can be subtracted.

    Returns
    -------
    pandas.DataFrame
        ``draw`` (-1: all units as they are), ``attribute``, and one column per target.
    """
    wanted = unit_targets(result, list(targets), seed=seed)
    values = attributes.loc[result.units["label"], list(names)].to_numpy(dtype=np.float64)
    every = np.column_stack([values, *wanted.values()])
    generator = np.random.default_rng(seed)
    of_layers = []
    for rows in layer_rows(result).values():
        finite = every[rows][np.isfinite(every[rows]).all(axis=1)]
        if len(finite) < 3:
            continue
        chosen = generator.integers(0, len(finite), (resamples, len(finite)))
        drawn = [finite, *(finite[draw] for draw in chosen)]
        of_layers.append([_cross(sample, len(names)) for sample in drawn])
    means = np.nanmean(np.array(of_layers), axis=0)  # [draw, attribute, target]
    frame = pd.DataFrame(means.reshape(-1, len(wanted)), columns=list(wanted))
    draws = np.repeat(np.arange(-1, resamples), len(names))
    return frame.assign(draw=draws, attribute=np.tile(names, resamples + 1))


def predicted(networks: Sequence[pd.DataFrame], *, confidence: float = 0.95) -> pd.DataFrame:
    """Join the draws of networks of one family.

    Returns
    -------
    pandas.DataFrame
        Over attributes: for each target, and for ``difference`` (class drop minus overall drop),
        the mean over networks, ``_low`` and ``_high`` of its interval (units resampled), and
        ``_least`` and ``_most`` of single networks.
    """
    targets = [name for name in networks[0].columns if name not in ("draw", "attribute")]
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    columns = {}
    tables = [table.assign(difference=table[TARGETS[1]] - table[TARGETS[0]]) for table in networks]
    for name in [*targets, "difference"]:
        each = np.stack(
            [table.pivot(index="attribute", columns="draw", values=name) for table in tables]
        )
        low, high = np.nanquantile(each[:, :, 1:].mean(axis=0), tails, axis=1)
        measured = each[:, :, 0]
        columns |= {name: measured.mean(axis=0), f"{name}_low": low, f"{name}_high": high}
        columns |= {f"{name}_least": measured.min(axis=0), f"{name}_most": measured.max(axis=0)}
    index = tables[0].pivot(index="attribute", columns="draw", values=targets[0]).index
    order = list(dict.fromkeys(networks[0]["attribute"]))
    return pd.DataFrame(columns, index=index).loc[order]


def over_seeds(tables: Sequence[pd.DataFrame], key: str = "layer") -> tuple[pd.DataFrame, ...]:
    """Mean, least and most of each figure over tables of the same rows."""
    joined = pd.concat(tables).groupby(key, sort=False)
    return (
        joined.mean(numeric_only=True),
        joined.min(numeric_only=True),
        joined.max(numeric_only=True),
    )


def axes(result: AblationResult, *, fewest: int = 10) -> pd.DataFrame:
    """Return ``layer``, ``lost`` images and ``gini`` of every unit that loses enough images."""
    frame = pd.DataFrame(
        {
            "layer": result.units["layer"].to_numpy(),
            "lost": result.lost.sum(axis=1),
            "gini": gini(result.class_accuracy_drop),
        }
    )
    return frame[(frame["lost"] >= fewest) & frame["gini"].notna()].reset_index(drop=True)


def at_equal_harm(
    first: Sequence[pd.DataFrame],
    second: Sequence[pd.DataFrame],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Difference in concentration, first minus second, between units that lose as many images.

    A unit that loses few images loses them in few classes, whatever it does. So the Gini
    coefficient is fitted by least squares, ``gini = a + b log(lost) + c [side is first]``; returned
    are c and its percentile bootstrap interval over the units of each table.
    """
    sides = [(table, 1.0) for table in first] + [(table, 0.0) for table in second]
    blocks = [
        np.column_stack(
            [np.ones(len(table)), np.log(table["lost"]), np.full(len(table), side), table["gini"]]
        )
        for table, side in sides
        if len(table)
    ]
    if {side for table, side in sides if len(table)} != {0.0, 1.0}:
        return float("nan"), float("nan"), float("nan")
    generator = np.random.default_rng(seed)

    def fitted(rows: Floats) -> float:
        return float(np.linalg.lstsq(rows[:, :3], rows[:, 3], rcond=None)[0][2])

    drawn = [
        fitted(
            np.concatenate(
                [block[generator.integers(0, len(block), len(block))] for block in blocks]
            )
        )
        for _ in range(resamples)
    ]
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    low, high = np.quantile(drawn, tails)
    return fitted(np.concatenate(blocks)), float(low), float(high)


def agreeing_pairs(first: Sequence[pd.DataFrame], second: Sequence[pd.DataFrame]) -> str:
    """Count the pairs of single networks whose mean Gini differs in the same direction as all's."""
    means = [[table["gini"].mean() for table in side if len(table)] for side in (first, second)]
    differences = np.subtract.outer(*means).ravel()
    if not len(differences):
        return "0 of 0"
    together = np.sign(np.mean(differences))
    return f"{int((np.sign(differences) == together).sum())} of {len(differences)}"


def spearman(x: Floats, y: Floats) -> float:
    """Spearman correlation of the pairs that are finite; NaN if one of the two is constant."""
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    if len(x) < 3 or x.min() == x.max() or y.min() == y.max():
        return float("nan")
    return float(stats.spearmanr(x, y).statistic)


def _cross(sample: Floats, attributes: int) -> Floats:
    """float64 [attribute, target]: rank correlations of the first columns with the others."""
    ranks = stats.rankdata(sample, axis=0)
    centred = ranks - ranks.mean(axis=0)
    norm = np.sqrt((centred**2).sum(axis=0))
    with np.errstate(invalid="ignore", divide="ignore"):
        unit = centred / norm
    found: Floats = unit[:, :attributes].T @ unit[:, attributes:]
    return found


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")
