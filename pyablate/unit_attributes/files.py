"""Attributes on disk: a CSV table, one row per unit, or a Zarr group."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pyablate.io import checksums
from pyablate.io.atomic import write_csv
from pyablate.results.store import replacing

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

FORMAT = "attributes 1"


def to_frame(found: xr.Dataset) -> pd.DataFrame:
    """One row per unit: label, layer, unit and every variable that has one value per unit.

    Class numbers (``<name>_class``) become class names, empty where there is none.
    """
    names = {of: found[of].to_numpy().tolist() for of in ("class", "concept") if of in found}
    frame = found[["layer", "index"]].to_dataframe().reset_index()
    frame = frame.rename(columns={"unit": "label", "index": "unit"})
    for name, values in found.data_vars.items():
        if values.dims != ("unit",):
            continue
        of = str(name).rpartition("_")[2]
        if of in names and values.dtype.kind == "i":
            chosen = [names[of][number] if number >= 0 else "" for number in values.to_numpy()]
            frame[str(name)] = chosen
        else:
            frame[str(name)] = values.to_numpy()
    return frame


def write_attributes(found: xr.Dataset, path: Path) -> None:
    """Write attributes as CSV (one row per unit) or, with every class, as a Zarr group.

    The group is what ``xarray.open_zarr`` reads. An older group of attributes at ``path`` is
    replaced, unless something else lies in its folder.
    """
    if path.suffix == ".csv":
        write_csv(to_frame(found), path, "output")
    elif path.suffix == ".zarr":
        marked = found.assign_attrs(pyablate_format=FORMAT)
        replacing(path, lambda fresh: _write_group(marked, fresh), str)
    else:
        raise ValueError(f"output: expected a name ending in .csv or .zarr, got {str(path)!r}")


def _write_group(found: xr.Dataset, path: Path) -> None:
    # Format 2: that of Zarr 3 has no settled encoding for strings.
    found.to_zarr(path, zarr_format=2, consolidated=True)
    checksums.seal(path)
