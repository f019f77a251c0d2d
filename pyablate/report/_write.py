"""``write_report``: gathers the contents of the page and writes it atomically."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyablate.io.atomic import check_file, whole
from pyablate.report.curves import curve_charts, sets_by_class
from pyablate.report.examples import ACTIVATING, examples, heat_maps
from pyablate.report.numbers import contents
from pyablate.report.page import page
from pyablate.report.patterns import pattern_rows
from pyablate.report.relations import relations
from pyablate.results.arrays import Ints
from pyablate.results.record import Record

logger = logging.getLogger("pyablate")

MOST = 9_900_000
"""Bytes of a report up to which pictures are put into it."""

if TYPE_CHECKING:
    import pandas as pd
    import torch
    import xarray as xr
    from torch import nn


def write_report(
    result: Record,
    path: str | os.PathLike[str],
    *,
    attributes: xr.Dataset | pd.DataFrame | None = None,
    model: nn.Module | None = None,
    data: Any = None,
    relevant: xr.Dataset | None = None,
    curves: Any = None,
    minimal_sets: Any = None,
    patterns: xr.Dataset | None = None,
    provenance: Mapping[str, object] | None = None,
    title: str = "Unit ablation",
    fdr: float = 0.05,
    device: str | torch.device | None = None,
) -> None:
    """Write a result as one HTML file that needs no network and no other file.

    Parameters
    ----------
    result : AblationResult
        What to show.
    path : path-like
        The file to write; an older one is replaced once the new one is complete.
    attributes : xarray.Dataset or pandas.DataFrame, optional
        Of the units, from :func:`pyablate.attributes` or any table over the unit labels.
    model : nn.Module, optional
        The network of the run, for the images that activate each unit most; needs ``data``.
    data : optional
        The images of the run in the same order, as for :func:`pyablate.ablate`, for the pictures on
        the cards of units.
    relevant : xarray.Dataset, optional
        From :func:`pyablate.attribution.relmax` on the same images: those for which each unit is
        most relevant, beside those that activate it most.
    curves : optional
        From :func:`pyablate.prune_curve`, :func:`pyablate.sensitivity` or
        :func:`pyablate.cumulative`: an object, a table, the path of a CSV file, or a sequence or
        mapping (with titles) of these.
    minimal_sets : MinimalSets, pandas.DataFrame or path of a CSV file, optional
        From :func:`pyablate.minimal_sets`.
    patterns : xarray.Dataset, optional
        From :func:`pyablate.activation_patterns` on the same images.
    provenance : mapping of str to object, optional
        Lines about where the result comes from: model, data, versions.
    title : str
        Heading of the page.
    fdr : float
        Level of the false discovery rate, see :func:`pyablate.analysis.statistics.significance`.
    device : str or torch.device, optional
        Where to run ``model``.

    Raises
    ------
    ValueError, TypeError
        Something given does not belong to this result; the message says what.
    OSError
        The file cannot be written, or a table cannot be read.

    Examples
    --------
    >>> from pathlib import Path
    >>> from pyablate.report import write_report
    >>> write_report(result, "report.html", provenance={"Model": "vgg_bn"})
    >>> Path("report.html").read_text()[:15]
    '<!doctype html>'
    """
    if model is not None and data is None:
        raise ValueError("model: data are needed too, to see which images activate a unit most")
    check_file(Path(path), "path")
    gathered = contents(result, title=title, fdr=fdr, provenance=provenance or {})
    gathered["attributes"] = None if attributes is None else relations(result, attributes)
    gathered["curves"] = curve_charts(curves)
    gathered["sets"] = sets_by_class(minimal_sets, result)
    gathered["patterns"] = None if patterns is None else pattern_rows(result, patterns)
    gathered["examples"] = _examples(result, model, data, relevant, device)
    text = _fitting(gathered)
    with whole(Path(path), "path") as fresh:
        fresh.write_text(text, encoding="ascii")


def _examples(
    result: Record,
    model: nn.Module | None,
    data: Any,
    relevant: xr.Dataset | None,
    device: str | torch.device | None,
) -> dict[str, Any]:
    activating = None
    if isinstance(data, Iterator):
        from pyablate.data.dataset import gathered

        data = gathered(data)  # it is read twice
    if model is not None:
        from pyablate.report.activating import most_activating

        activating = most_activating(model, data, result, count=ACTIVATING, device=device)
    found = examples(result, activating, data, _relevant(result, relevant))
    found["heat"] = {} if relevant is None else heat_maps(result, relevant)
    return found


def _relevant(result: Record, found: xr.Dataset | None) -> Ints | None:
    """Images of relmax in the order of the result's units; -1 for units that it has not."""
    if found is None:
        return None
    if "relevant_image" not in getattr(found, "data_vars", ()):
        raise TypeError(f"relevant: expected what relmax returns, got {type(found).__name__}")
    rows = found["relevant_image"].reindex(unit=result.units["label"].tolist(), fill_value=-1)
    images: Ints = rows.transpose("unit", "rank").to_numpy()[:, :ACTIVATING].astype(np.int64)
    if not (images >= 0).any() or images.max() >= len(result.labels):
        raise ValueError(
            f"relevant: expected units and images of this result ({len(result.labels):,} images), "
            "got others"
        )
    return images


def _fitting(gathered: dict[str, Any]) -> str:
    """Write the page, without the pictures that matter least where it would be too large."""
    text, pictures = page(gathered), gathered["examples"]["pictures"]
    excess = len(text) - MOST
    if excess > 0 and pictures:
        while excess > 0 and pictures:
            excess -= len(pictures.popitem()[1])
        text = page(gathered)
    if len(text) > MOST:
        logger.warning(
            "the report has %.0f MB, which browsers may be slow at: a few layers at a time make "
            "smaller ones",
            len(text) / 1e6,
        )
    return text
