"""Activation patterns in a report: a row for each, with its classes and units."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pyablate.results.record import Record

if TYPE_CHECKING:
    import xarray as xr

_CLASSES = 3
_UNITS = 5


def pattern_rows(result: Record, found: xr.Dataset) -> dict[str, Any]:
    """Gather ``layer``, ``left`` (images in no pattern) and ``rows``, one for each pattern.

    Of each: ``size``, ``prototype`` (an image), ``classes`` (number and share) and ``units`` (label
    and contrast), the largest first, units by their absolute contrast.
    """
    if not {"pattern", "contrast"} <= set(getattr(found, "variables", ())):
        raise TypeError(
            f"patterns: expected what activation_patterns returns, got {type(found).__name__}"
        )
    images, classes = found.sizes["image"], found.sizes["class"]
    if images != len(result.labels) or classes != result.classes:
        raise ValueError(
            f"patterns: expected {len(result.labels):,} images and {result.classes} classes, those "
            f"of the result, got {images:,} and {classes}"
        )
    units = found["unit"].values.tolist()
    rows = []
    for number in range(found.sizes["pattern"]):
        share = found["class_share"].to_numpy()[number]
        contrast = found["contrast"].to_numpy()[number]
        rows.append(
            {
                "size": int(found["size"][number]),
                "prototype": int(found["prototype"][number]),
                "classes": [
                    [k, float(share[k])]
                    for k in np.argsort(-share, kind="stable")[:_CLASSES].tolist()
                    if share[k] > 0
                ],
                "units": [
                    [units[unit], float(contrast[unit])]
                    for unit in np.argsort(-abs(contrast), kind="stable")[:_UNITS].tolist()
                ],
            }
        )
    left = int((found["pattern"] < 0).sum())
    return {"layer": str(found.attrs.get("layer", "")), "left": left, "rows": rows}
