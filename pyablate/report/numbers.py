"""The numbers of a report: everything that the page shows, as one tree of JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.cluster import hierarchy

from pyablate._version import __version__
from pyablate.analysis.clusters import cluster_units, profile_distances
from pyablate.analysis.statistics import (
    adjusted,
    layer_rows,
    max_class_test,
    row_blocks,
    significance,
)
from pyablate.report.packed import packed
from pyablate.results.arrays import Floats, Ints
from pyablate.results.flips import Flips
from pyablate.results.record import Record

if TYPE_CHECKING:
    import xarray as xr

MOST_MOVES = 300
"""Distinct changes of prediction (true class, before, after) that a unit's card lists."""

_KNOWN = ("accuracy", "accuracy_drop", "max_class_drop", "max_class")
_ENDS = ("accuracy_drop_low", "accuracy_drop_high")  # of an estimated run's interval
_MOST_CLUSTERED = 10_000  # units: pyablate.analysis.clusters holds all distances in memory


def contents(
    result: Record,
    *,
    title: str,
    fdr: float,
    provenance: Mapping[str, object],
) -> dict[str, Any]:
    """Gather what follows from the result alone, as JSON values.

    Arrays are as :func:`pyablate.report.packed.packed` writes them; accuracies and drops are
    shares, the page shows points. ``provenance`` are further lines about where the result comes
    from.
    """
    tests = significance(result, fdr=fdr)
    cells, hurt_pairs = _cells(result, tests)
    return {
        "title": title,
        "fdr": fdr,
        "summary": _summary(result, hurt_pairs),
        "provenance": _provenance(result, provenance),
        "classes": {
            "name": list(result.class_names),
            "size": packed(result.class_sizes),
            "accuracy": packed(result.baseline_class_accuracy),
            "position": packed(_class_positions(result)),
        },
        "layers": _layers(result),
        "units": _units(result, tests),
        "cells": cells,
        "moves": _moves(result),
    }


def _cells(result: Record, tests: xr.Dataset) -> tuple[dict[str, Any], int]:
    """Gather counts and tests of each class of each unit, and how many pairs are hurt."""
    hurt = tests["significant"].to_numpy() & (result.lost > result.gained)
    cells = {"lost": packed(result.lost), "gained": packed(result.gained)}
    if result.estimate is not None:
        cells["half_width"] = packed(result.half_width("class_accuracy_drop"))
    return cells | {name: packed(tests[name].to_numpy()) for name in "pq"}, int(hurt.sum())


def _summary(result: Record, hurt_pairs: int) -> dict[str, Any]:
    return {
        "images": len(result.labels),
        "intervention": result.intervention,
        "accuracy": result.baseline_accuracy,
        "word": result.word,
        "flips": round(float(result.flip_count.sum())),
        "guarantee": result.guarantee,
        "known": str(result.estimate or result.screening or ""),
        "hurt_pairs": hurt_pairs,
        "audit": {
            "pairs": result.audit.pairs,
            "mismatches": result.audit.mismatches,
            "mended": result.audit.mended,
            "upper_bound": result.audit.upper_bound,
        },
    }


def _provenance(result: Record, further: Mapping[str, object]) -> list[list[str]]:
    """Lines of name and value."""
    facts: dict[str, object] = dict(further) | flat(result.provenance)
    facts["Replaced by"] = result.intervention
    for name, measure in result.measures.items():
        facts[f"Accuracy of the {name} change"] = measure.accuracy
    if result.seconds:
        facts["Time of the run"] = f"{result.seconds:,.1f} s"
    facts["Audit"] = result.audit if result.audit.pairs else "none"
    facts["Guarantee"] = result.guarantee
    if result.screening is not None:
        facts["Screening"] = result.screening
    if result.estimate is not None:
        facts["Estimate"] = result.estimate
    facts["Report written by"] = f"pyablate {__version__}"
    return [[str(name), str(value)] for name, value in facts.items()]


def flat(tree: Mapping[str, Any], head: str = "") -> dict[str, object]:
    """Join the names along each branch: ``model.weights``."""
    lines: dict[str, object] = {}
    for name, value in tree.items():
        path = f"{head}{name}"
        lines |= flat(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return lines


def _layers(result: Record) -> list[dict[str, Any]]:
    return [
        {"name": layer, "units": len(rows), "strategy": result.strategy.get(layer, "")}
        for layer, rows in layer_rows(result).items()
    ]


def _units(result: Record, tests: xr.Dataset) -> dict[str, Any]:
    number = {layer: code for code, layer in enumerate(layer_rows(result))}
    worst = _worst_of_estimates(result, tests) if result.estimate else max_class_test(result)
    columns = {
        "layer": np.array([number[str(layer)] for layer in result.units["layer"]], dtype=np.int64),
        "accuracy_drop": result.accuracy_drop,
        "max_class_drop": result.max_class_drop,
        "max_class": result.max_class,
        "half_width": result.half_width("accuracy_drop"),
        "flips": result.flip_count,
        "undefined": result.undefined.sum(axis=1),
        "noise_floor": worst["noise_floor"].to_numpy(),
        "split_half_drop": worst["split_half_drop"].to_numpy(),
        "p": worst["p"].to_numpy(),
        "q": worst["q"].to_numpy(),
        "position": _unit_positions(result),
    }
    return {
        "label": result.units["label"].astype(str).tolist(),
        "measures": {name: packed(values) for name, values in measures(result).items()},
    } | {name: packed(values) for name, values in columns.items()}


def _worst_of_estimates(result: Record, tests: xr.Dataset) -> pd.DataFrame:
    """Test the most hurt class of each unit by Bonferroni's bound over the classes.

    :func:`pyablate.analysis.statistics.max_class_test` needs to know which images changed.
    """
    of_class = tests["p"].to_numpy()  # NaN without images
    harm: Floats = np.where((result.lost > result.gained) | np.isnan(of_class), of_class, 1.0)
    p = np.minimum(1.0, np.nanmin(harm, axis=1) * (result.class_sizes > 0).sum())
    q, unknown = np.empty_like(p), np.full(len(p), np.nan)
    for rows in layer_rows(result).values():
        q[rows] = adjusted(p[rows])
    return pd.DataFrame({"noise_floor": unknown, "split_half_drop": unknown, "p": p, "q": q})


def measures(result: Record) -> dict[str, Floats]:
    """Further numbers that the run recorded, one per unit, such as the change of the loss."""
    return {
        str(name): values.to_numpy().astype(np.float64)
        for name, values in result.data.items()
        if values.dims == ("unit",) and name not in (*_KNOWN, *_ENDS)
    }


def _unit_positions(result: Record) -> Ints:
    """Place of each unit among the leaves of its layer's cluster tree, those left out last."""
    places = np.arange(len(result.units))
    for layer, rows in layer_rows(result).items():
        if len(rows) <= _MOST_CLUSTERED:
            found = cluster_units(result, layer=layer)["position"].to_numpy()
            places[rows] = np.where(found >= 0, found, len(rows))
    return places


def _class_positions(result: Record) -> Ints:
    """Place of each class among the leaves of a tree that joins classes hurt by the same units."""
    profiles: Floats = np.nan_to_num(result.class_accuracy_drop.T)
    inside = np.flatnonzero(profiles.any(axis=1))
    places = np.full(result.classes, result.classes, dtype=np.int64)
    if len(inside) < 3:
        places[inside] = np.arange(len(inside))
        return places
    apart = profile_distances(profiles[inside], "cosine")
    # Cosine distances of parallel profiles come out slightly below zero.
    tree = hierarchy.linkage(np.maximum(apart, 0), "average", optimal_ordering=len(inside) <= 1000)
    places[inside[hierarchy.leaves_list(tree)]] = np.arange(len(inside))
    return places


def _moves(result: Record) -> dict[str, Any]:
    """Count images by true class, prediction before and after; the most frequent of each unit."""
    k = result.classes
    result = certain(result)
    counted = [_most_frequent(result, rows) for rows in row_blocks(result)]
    total, kinds, count = (joined([part[i] for part in counted]) for i in range(3))
    return {
        "start": packed(np.concatenate([[0], np.cumsum(np.minimum(total, MOST_MOVES))])),
        "total": packed(total),
        "label": packed(kinds // (k * (k + 1))),
        "before": packed(kinds // (k + 1) % k),
        "after": packed(kinds % (k + 1) - 1),
        "count": packed(count),
    }


def _most_frequent(result: Record, rows: slice) -> tuple[Ints, Ints, Ints]:
    """Kinds of change of each row: how many there are, the most frequent, and their counts."""
    run = slice(result.flips.start[rows.start], result.flips.start[rows.stop])
    row, image, k = result.flips.row[run] - rows.start, result.flips.image[run], result.classes
    after = result.flips.prediction[run].astype(np.int64) + 1  # 0 is none
    kind = (result.labels[image] * k + result.baseline[image]) * (k + 1) + after
    order = np.lexsort((kind, row))
    row, kind = row[order], kind[order]
    begin = np.flatnonzero(np.diff(row, prepend=-1) | np.diff(kind, prepend=-1))
    count = np.diff(begin, append=len(row))
    row, kind = row[begin], kind[begin]
    total = np.bincount(row, minlength=rows.stop - rows.start)
    first = np.lexsort((-count, row))[leading(total, MOST_MOVES)]
    return total, kind[first], count[first]


def certain(result: Record) -> Record:
    """Leave out flips that are not known: an estimated run does not tell which images change."""
    if result.estimate is None:
        return result
    return replace(result, flips=Flips.gather(len(result.units), []), estimate=None)


def leading(lengths: Ints, most: int) -> NDArray[np.bool_]:
    """Mark the first ``most`` entries of each of some runs that follow each other."""
    starts = np.cumsum(lengths) - lengths
    place: Ints = np.arange(lengths.sum()) - np.repeat(starts, lengths)
    return place < most


def joined(parts: Sequence[np.ndarray]) -> Ints:
    """Concatenate whole numbers, where there are any."""
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])
