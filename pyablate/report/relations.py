"""Attributes of units in a report, and their correlations with the drops."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from pyablate.analysis.cells import within_units
from pyablate.analysis.correlation import correlate
from pyablate.analysis.targets import NEEDS_ALL
from pyablate.analysis.unit_table import (
    aligned,
    attribute_columns,
    cell_columns,
    formula_of,
    has_cells,
)
from pyablate.report.numbers import measures
from pyablate.report.packed import packed
from pyablate.results.record import Record

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

TARGETS = ("max_class_drop", "split_half_drop", "accuracy_drop")
_RESAMPLES = 300
MOST_CELLS = 1 << 20
"""Numbers of all attributes by unit and class that a report holds: some four megabytes."""

logger = logging.getLogger("pyablate")


def relations(result: Record, table: xr.Dataset | pd.DataFrame) -> dict[str, Any]:
    """Gather attributes and their rank correlations with the drops, layer by layer.

    ``name``, ``formula`` and ``values`` of each attribute; ``correlations``, one entry for each
    layer, target and attribute that has one; ``cells``, the attributes that have a value for each
    class, None without.
    """
    columns = attribute_columns(aligned(table, result), None)
    targets = [
        name
        for name in (*TARGETS, *measures(result))
        if result.estimate is None or name not in NEEDS_ALL
    ]
    found = correlate(
        result,
        table,
        attributes=list(columns),
        targets=targets,
        methods="spearman",
        resamples=_RESAMPLES,
        shuffles=1,
    )
    layers = {layer: code for code, layer in enumerate(dict.fromkeys(found["layer"]))}
    names = {name: code for code, name in enumerate(columns)}
    known = found[found["correlation"].notna()]
    numbers = ["units", "correlation", "low", "high", "p", "q"]
    return {
        "name": list(columns),
        "formula": [formula_of(table, name) for name in columns],
        "values": [packed(values) for values in columns.values()],
        "targets": targets,
        "correlations": {
            "layer": packed(known["layer"].map(layers).to_numpy(dtype="int64")),
            "target": packed(known["target"].map(targets.index).to_numpy(dtype="int64")),
            "attribute": packed(known["attribute"].map(names).to_numpy(dtype="int64")),
        }
        | {name: packed(known[name].to_numpy()) for name in numbers},
        "cells": _cells(result, table),
    }


def _cells(result: Record, table: xr.Dataset | pd.DataFrame) -> dict[str, Any] | None:
    """Gather what attributes say of each class: ``name``, ``formula``, ``values`` [unit, class].

    And ``within``, each unit's rank correlation with the drops over the classes.
    """
    if not has_cells(table):
        return None
    every = cell_columns(table, result, None)
    most = MOST_CELLS // max(1, result.class_accuracy_drop.size)
    columns = dict(list(every.items())[:most])
    if len(columns) < len(every):
        left = ", ".join(name for name in every if name not in columns)
        logger.warning("report: too many units and classes for the cells of %s, left out", left)
    drop = result.class_accuracy_drop
    return {
        "name": list(columns),
        "formula": [formula_of(table, name) if name in table else "" for name in columns],
        "values": [packed(values) for values in columns.values()],
        "within": [packed(within_units(values, drop)) for values in columns.values()],
    }
