"""The numbers of a report: everything that the page shows, as one tree of JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.cluster import hierarchy

from pyablate._version import __version__
from pyablate.analysis.clusters import cluster_units, profile_distances
from pyablate.analysis.statistics import layer_rows, max_class_test, row_blocks, significance
from pyablate.report.packed import packed
from pyablate.results.record import Floats, Ints, Record

MOST_MOVES = 300
"""Distinct changes of prediction (true class, before, after) that a unit's card lists."""

_KNOWN = ("accuracy", "accuracy_drop", "max_class_drop", "max_class")
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
    cells, hurt_pairs = _cells(result, fdr)
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
        "units": _units(result),
        "cells": cells,
        "moves": _moves(result),
    }


def _cells(result: Record, fdr: float) -> tuple[dict[str, Any], int]:
    """Test each class of each unit; return counts and tests, and how many pairs are hurt."""
    tests = significance(result, fdr=fdr)
    hurt = tests["significant"].to_numpy() & (result.lost > result.gained)
    counts = {"lost": packed(result.lost), "gained": packed(result.gained)}
    return counts | {name: packed(tests[name].to_numpy()) for name in "pq"}, int(hurt.sum())


def _summary(result: Record, hurt_pairs: int) -> dict[str, Any]:
    return {
        "images": len(result.labels),
        "intervention": result.intervention,
        "accuracy": result.baseline_accuracy,
        "word": result.word,
        "flips": len(result.flips.image),
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
    if result.screening is not None:
        facts["Screening"] = result.screening
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


def _units(result: Record) -> dict[str, Any]:
    number = {layer: code for code, layer in enumerate(layer_rows(result))}
    worst = max_class_test(result)
    columns = {
        "layer": np.array([number[str(layer)] for layer in result.units["layer"]], dtype=np.int64),
        "accuracy_drop": result.accuracy_drop,
        "max_class_drop": result.max_class_drop,
        "max_class": result.max_class,
        "flips": np.diff(result.flips.start),
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


def measures(result: Record) -> dict[str, Floats]:
    """Further numbers that the run recorded, one per unit, such as the change of the loss."""
    return {
        str(name): values.to_numpy().astype(np.float64)
        for name, values in result.data.items()
        if values.dims == ("unit",) and name not in _KNOWN
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


def leading(lengths: Ints, most: int) -> NDArray[np.bool_]:
    """Mark the first ``most`` entries of each of some runs that follow each other."""
    starts = np.cumsum(lengths) - lengths
    place: Ints = np.arange(lengths.sum()) - np.repeat(starts, lengths)
    return place < most


def joined(parts: Sequence[np.ndarray]) -> Ints:
    """Concatenate whole numbers, where there are any."""
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])
