"""Layer sensitivity: growing shares of one layer ablated at a time."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from pyablate.compression._rank import Ranking
from pyablate.io.atomic import whole, write_csv
from pyablate.result import AblationResult
from pyablate.runs._ablate import ablate
from pyablate.runs.fingerprint import table_fingerprint

logger = logging.getLogger("pyablate")

FRACTIONS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
_SUFFIXES = (".csv", ".json")


def sensitivity(
    model: nn.Module,
    data: Any,
    ranking: Ranking,
    *,
    fractions: Sequence[float] = FRACTIONS,
    stop: float | None = None,
    path: str | os.PathLike[str] | None = None,
    guarantee: str = "exact",
    risk: float = 1e-5,
    class_names: Sequence[str] | None = None,
    device: str | torch.device | None = None,
    audit: int = 100,
    on_mismatch: str = "error",
    progress: bool | None = None,
) -> pd.DataFrame:
    """Ablate growing shares of one layer at a time, the others intact.

    Parameters
    ----------
    model : nn.Module
        Trained classifier; it stays as it is.
    data : pair of arrays, DataLoader or iterable of (images, labels)
        As for :func:`pyablate.ablate`.
    ranking : Ranking
        From :func:`pyablate.rank`; the order within each layer is that of the ranking. Layers whose
        units hang together are taken as one.
    fractions : sequence of float
        Shares of each layer, above 0 and up to 1; the last unit of a layer always stays. Shares
        that come to the same units are listed once.
    stop : float, optional
        A layer that has lost more accuracy than this (0.05 is five points) is not tried with
        larger shares. None tries all.
    path : str or path, optional
        A ``.csv`` or ``.json`` file that holds the table after every share. If it is there, what it
        has is not computed again; a file of another model, data or options is refused.
    guarantee, risk, class_names, device, audit, on_mismatch
        As for :func:`pyablate.ablate`.
    progress : bool, optional
        As for :func:`pyablate.ablate`.

    Returns
    -------
    pandas.DataFrame
        One row per layer (joined by ``+``) and share tried: ``layer``, ``fraction``; ``places``
        and ``units``, how many were ablated; ``accuracy``, ``accuracy_drop``,
        ``worst_class_accuracy`` with its ``worst_class``, ``max_class_drop`` with its
        ``max_class``, ``mean_class_accuracy``. Of screened runs also ``guarantee``, "exact" where
        a layer could not be screened; ``computed``, the images whose prediction was; and
        ``upper_bound``, at 95 % for each row by itself, of the share of wrong predictions, by which
        ``accuracy`` can be off.

    Raises
    ------
    ValueError, TypeError
        Bad arguments or data, or a file of another run.

    Examples
    --------
    >>> norms = pa.compression.filter_ranking(model, images[:2], "l1")
    >>> table = pa.sensitivity(model, data, norms, fractions=[0.5], audit=10)
    >>> table["layer"].tolist()
    ['features.2', 'features.6', 'features.9', 'features.13', 'features.16']
    """
    shares = sorted({float(share) for share in fractions})
    if not shares or shares[0] <= 0 or shares[-1] > 1:
        raise ValueError(f"fractions: expected numbers above 0 and up to 1, got {list(fractions)}")
    if stop is not None and not stop >= 0:
        raise ValueError(f"stop: expected a drop of accuracy, 0 or more, or None, got {stop!r}")
    if not isinstance(ranking, Ranking):
        raise TypeError(f"ranking: expected one of pa.rank, got {type(ranking).__name__}")
    source = _read_often(data)
    layers = {one.layers for one in ranking.order if not one.obstacle}
    order = list(ranking.layer_sizes)  # that of the network
    layers_in_order = sorted(layers, key=lambda names: [order.index(name) for name in names])
    parts = {names: ranking.within(names) for names in layers_in_order}
    ranked = [(one.label, note) for one, note in zip(ranking.order, ranking.notes, strict=True)]
    choices = [ranked, list(class_names or [])]  # shares tried and when to stop do not matter
    if guarantee != "exact":
        choices.append([guarantee, risk])
    run = "" if path is None else table_fingerprint(model, source, choices)
    known = pd.DataFrame() if path is None else _read(Path(path), run)
    for share in shares:
        wanted = _wanted(parts, share, known, stop)
        if not wanted:
            continue
        result = ablate(
            model,
            source,
            groups=list(wanted.values()),
            class_names=class_names,
            device=device,
            guarantee=guarantee,
            risk=risk,
            audit=audit,
            on_mismatch=on_mismatch,
            progress=progress,
        )
        rows = [
            {"layer": "+".join(layer), "fraction": share, "places": len(parts[layer].first(share))}
            | _figures(result, row, len(units))
            | _certificate(result, row)
            for row, (layer, units) in enumerate(wanted.items())
        ]
        known = pd.concat([known, pd.DataFrame(rows)], ignore_index=True)
        if path is not None:
            _write(Path(path), known, run)
    if known.empty:
        raise ValueError("fractions: none is large enough to take a single unit of any layer")
    names = {"+".join(layer): place for place, layer in enumerate(parts)}
    table = known.assign(_place=known["layer"].map(names)).sort_values(["_place", "fraction"])
    return table.drop(columns="_place").reset_index(drop=True)


def _wanted(
    parts: dict[tuple[str, ...], Ranking],
    share: float,
    known: pd.DataFrame,
    stop: float | None,
) -> dict[tuple[str, ...], tuple[str, ...]]:
    """Find the groups of this share that are to be computed."""
    wanted = {}
    for layer, ranking in parts.items():
        name, units = "+".join(layer), ranking.units(share)
        mine = known[known["layer"] == name] if len(known) else known
        before = mine[mine["fraction"] < share] if len(mine) else mine
        done = len(mine) and bool((mine["fraction"] == share).any())
        same = len(before) and bool((before["units"] == len(units)).any())
        stopped = stop is not None and len(before) and bool((before["accuracy_drop"] > stop).any())
        if units and not done and not same and not stopped:
            wanted[layer] = units
    return wanted


def _figures(result: AblationResult, row: int, units: int) -> dict[str, Any]:
    accuracy = result.baseline_class_accuracy - result.class_accuracy_drop[row]
    worst = int(np.nanargmin(accuracy))
    return {
        "units": units,
        "accuracy": float(result.accuracy[row]),
        "accuracy_drop": float(result.accuracy_drop[row]),
        "worst_class_accuracy": float(accuracy[worst]),
        "worst_class": result.class_names[worst],
        "max_class_drop": float(result.max_class_drop[row]),
        "max_class": result.class_names[int(result.max_class[row])],
        "mean_class_accuracy": float(np.nanmean(accuracy)),
    }


def _certificate(result: AblationResult, row: int) -> dict[str, Any]:
    """Say what a screened run knows of a row, which is a layer of its own."""
    known = result.screening
    if known is None:
        return {}
    sites = sorted(result.units["layer"].iloc[row].split("+"))  # in the order of its units
    own = (one for name, one in known.layers.items() if sorted(name.split("+")) == sites)
    found = next(own, None)
    if found is None:
        return {"guarantee": "exact", "computed": len(result.labels), "upper_bound": 0.0}
    bound = known.missed(found) / found.pairs
    return {"guarantee": result.guarantee, "computed": found.computed, "upper_bound": bound}


def _read_often(data: Any) -> Any:
    """Keep the batches of a source that can be iterated only once: each share reads the data."""
    pair = isinstance(data, (tuple, list))
    if not pair and hasattr(data, "__iter__") and iter(data) is iter(data):
        return list(data)
    return data


def _read(path: Path, run: str) -> pd.DataFrame:
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"path: expected a file called *.csv or *.json, got {str(path)!r}")
    if not path.exists():
        return pd.DataFrame()
    if not path.is_file():
        raise ValueError(f"path: expected a file, got {str(path)!r}, which is none")
    # Class names and layers are text, whatever they look like.
    text = {"layer": str, "worst_class": str, "max_class": str, "run": str}
    try:
        if path.suffix == ".csv":
            table = pd.read_csv(path, dtype=text, keep_default_na=False)
        else:
            table = pd.DataFrame(json.loads(path.read_text()))
        runs = set(table["run"])
    except KeyError as error:
        raise ValueError(
            f"path: {path} holds no table of sensitivities, it has no column {error}"
        ) from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"path: {path} holds no table of sensitivities: {error}") from None
    if runs - {run}:
        raise ValueError(
            f"path: {path} holds a run with another model, data, ranking or guarantee; "
            "take another file or remove it"
        )
    logger.info("sensitivity: %d rows are in %s already", len(table), path)
    return table.drop(columns="run")


def _write(path: Path, table: pd.DataFrame, run: str) -> None:
    """Replace the file at once, so that a killed run leaves a whole one."""
    full = table.assign(run=run)
    if path.suffix == ".csv":
        write_csv(full, path, "path")
        return
    with whole(path, "path") as fresh:
        fresh.write_text(json.dumps(full.to_dict("records"), indent=1))
