"""Tables of attributes by unit label: checked, put in the order of a result, read from files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyablate._validation import nearest
from pyablate.io import checksums
from pyablate.io.zarr_check import check_folder
from pyablate.results.arrays import Floats, Ints
from pyablate.results.record import Record

if TYPE_CHECKING:
    import xarray as xr

_PER_CLASS = "_per_class"
_LABELS = ("unit", "label")  # columns of a CSV file that may hold the unit labels


def aligned(table: xr.Dataset | pd.DataFrame, result: Record) -> pd.DataFrame:
    """Return the variables with one value per unit, a row for each unit of the result, in order.

    The table is over the coordinate ``unit`` or indexed by unit labels (``"layer:unit"``). Further
    units, and variables with further dimensions, are left out.
    """
    frame = table_frame(table)
    index = frame.index.astype(str)
    twice = index[index.duplicated()]
    if len(twice):
        raise ValueError(f"table: unit {twice[0]!r} is there more than once")
    labels = result.units["label"].astype(str)
    missing = labels[~labels.isin(index)]
    if len(missing):
        first = str(missing.iloc[0])
        raise ValueError(
            f"table: {len(missing)} of {len(labels)} units of the result are missing, "
            f"the first is {first!r}{nearest(first, index, 1)}"
        )
    return frame.iloc[index.get_indexer(pd.Index(labels))]


def attribute_columns(
    frame: pd.DataFrame, names: str | Sequence[str] | None, *, leave_out: Sequence[str] = ()
) -> dict[str, Floats]:
    """Pick the attributes by name, or all that are floating point numbers.

    Whole numbers are as a rule no attributes but numbers of units, layers or classes: they have to
    be named.
    """
    if names is None:
        floats = [name for name in frame if pd.api.types.is_float_dtype(frame[name])]
        names = [str(name) for name in floats if name not in leave_out]
        if not names:
            raise ValueError("table: expected at least one attribute of floating point numbers")
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in frame:
            raise ValueError(f"attributes: no attribute {name!r}{nearest(name, frame.columns)}")
        if not pd.api.types.is_numeric_dtype(frame[name]):
            raise ValueError(f"attributes: {name!r} holds no numbers but {frame[name].dtype}")
    return {name: frame[name].to_numpy(dtype=np.float64, na_value=np.nan) for name in names}


def has_cells(table: xr.Dataset | pd.DataFrame) -> bool:
    """Whether a table has variables over unit and class."""
    variables = getattr(table, "data_vars", {})
    return any(values.dims == ("unit", "class") for values in variables.values())


def cell_columns(
    table: xr.Dataset | pd.DataFrame, result: Record, names: str | Sequence[str] | None
) -> dict[str, Floats]:
    """Pick the variables over unit and class, [unit, class] in the order of the result.

    ``auc_per_class`` is picked, and called, by ``auc`` as well.
    """
    if not hasattr(table, "data_vars"):
        raise TypeError(
            "table: cells of unit and class need an xarray.Dataset with variables over both, got "
            f"{type(table).__name__}"
        )
    dataset: Any = table
    of_cells = {
        str(name).removesuffix(_PER_CLASS): values
        for name, values in dataset.data_vars.items()
        if values.dims == ("unit", "class")
    }
    if names is None:
        names = list(of_cells)
    if not of_cells or not len(names):
        raise ValueError("table: expected at least one attribute over 'unit' and 'class', got none")
    labels = aligned(dataset.drop_vars(list(dataset.data_vars)), result).index
    classes = tuple(map(str, dataset["class"].to_numpy())) if "class" in dataset.coords else None
    numbered = tuple(map(str, range(result.classes)))  # of attributes without class names
    if classes not in (None, numbered, result.class_names):
        raise ValueError(
            f"table: expected the classes of the result, {result.class_names[0]!r} and "
            f"{result.classes - 1} others in this order, got {len(classes)}: {classes[0]!r}, ..."
        )
    chosen = {}
    for name in [names] if isinstance(names, str) else names:
        short = name.removesuffix(_PER_CLASS)
        if short not in of_cells:
            raise ValueError(
                f"attributes: no attribute {name!r} of unit and class{nearest(name, of_cells)}"
            )
        values = of_cells[short].sel(unit=labels.to_numpy()).to_numpy().astype(np.float64)
        if values.shape[1] != result.classes:
            raise ValueError(
                f"table: expected {result.classes} classes in {name!r}, got {values.shape[1]}"
            )
        chosen[short] = values
    return chosen


def preferred_classes(frame: pd.DataFrame, name: str, class_names: Sequence[str]) -> Ints | None:
    """Read preferred classes, numbers or class names, -1 for none; None without such a column."""
    if name not in frame:
        return None
    column = frame[name]
    if pd.api.types.is_numeric_dtype(column):
        return column.fillna(-1).to_numpy(dtype=np.int64)
    number = {class_name: k for k, class_name in enumerate(class_names)}
    named = column[column.notna()].astype(str)
    unknown = named[~named.isin(list(number))]
    if len(unknown):
        raise ValueError(f"table: {unknown.iloc[0]!r} in {name!r} is no class of the result")
    return np.asarray([number.get(str(value), -1) for value in column], dtype=np.int64)


def formula_of(table: xr.Dataset | pd.DataFrame, name: str) -> str:
    """Say what an attribute is, where the table says so; otherwise an empty text."""
    return str(getattr(table[name], "attrs", {}).get("formula", ""))


def read_table(path: Path) -> xr.Dataset | pd.DataFrame:
    """Read a table of attributes: a CSV file with a column of labels, or a Zarr group."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such table of attributes")
    if path.is_dir():
        import xarray as xr

        check_folder(path)
        try:
            checksums.check(path)
            with xr.open_zarr(path, consolidated=False) as opened:
                loaded: xr.Dataset = opened.load()
        except Exception as error:  # the file formats raise whatever the damage leads to
            reason = " ".join(str(error).split())[:200]
            raise OSError(f"{path}: not a Zarr group that xarray can open: {reason}") from error
        return loaded
    if not path.is_file():  # a named pipe would be waited for
        raise OSError(f"{path}: expected a file or a Zarr folder")
    try:
        frame = pd.read_csv(path)
    except (ValueError, MemoryError, OverflowError) as error:
        raise OSError(f"{path}: not a CSV file: {error}") from None
    for name in _LABELS:
        if name in frame and not pd.api.types.is_numeric_dtype(frame[name]):
            return frame.set_index(name)
    raise ValueError(
        f"{path}: expected a column 'unit' or 'label' of unit labels such as 'features.2:0', got "
        f"{', '.join(map(repr, frame.columns))}"
    )


def table_frame(table: xr.Dataset | pd.DataFrame) -> pd.DataFrame:
    """Return the variables with one value per unit, a row per unit, labels as index."""
    if isinstance(table, pd.DataFrame):
        return table
    if not hasattr(table, "data_vars"):
        kind = type(table).__name__
        raise TypeError(f"table: expected an xarray.Dataset or a pandas.DataFrame, got {kind}")
    if "unit" not in table.coords:
        raise ValueError("table: expected a coordinate 'unit' with the unit labels")
    flat = {str(n): v.to_numpy() for n, v in table.data_vars.items() if v.dims == ("unit",)}
    return pd.DataFrame(flat, index=pd.Index(table["unit"].to_numpy(), name="unit"))
