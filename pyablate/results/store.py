"""Results on disk: one Zarr group that xarray opens, written whole or not at all."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray

from pyablate.io import checksums
from pyablate.io.atomic import replace_folder, scratch_beside
from pyablate.io.own_files import ARRAYS, check_replaceable
from pyablate.io.zarr_check import check_folder, check_opened
from pyablate.results.audit import Audit
from pyablate.results.estimate import ARRAYS as ESTIMATED
from pyablate.results.estimate import Estimate
from pyablate.results.flips import Flips
from pyablate.results.measures import Accuracy, Measure
from pyablate.results.record import Record
from pyablate.results.screening import Screening

logger = logging.getLogger("pyablate")

R = TypeVar("R", bound=Record)

FORMAT = 1

# Zarr leaves out chunks of zeros; then one that was lost could not be told from one of them.
_EVERY_CHUNK: Any = {"write_empty_chunks": True}


def save(result: Record, path: str | os.PathLike[str]) -> None:
    """Write a result as a Zarr group.

    Equal results give equal bytes. The group is written beside ``path`` and moved into place
    when it is complete, so a crash leaves either the old or the new one; an existing result is
    replaced, anything else at ``path`` is refused, and so is a result in whose folder anything
    else lies.

    Parameters
    ----------
    result : AblationResult
        What to write.
    path : path-like
        Folder to create, by custom ``*.zarr``.

    Raises
    ------
    OSError
        The place cannot be written, or holds something that is not a result.

    Examples
    --------
    >>> from pyablate.results import save
    >>> save(result, "run.zarr")
    >>> pa.load("run.zarr").class_names[0]
    'T-shirt/top'
    """
    replacing(path, lambda fresh: write(result, fresh))


def replacing(
    path: str | os.PathLike[str], write: Callable[[Path], object], kind: type = int
) -> None:
    """Let ``write`` make a folder beside ``path``, and move it there when it is complete.

    ``kind`` is that of the format of what may be replaced: a number for results, a word for other
    stores.
    """
    target = Path(path)
    replace_folder(target, write, lambda: _check_replaceable(target, kind))


def read(path: str | os.PathLike[str], kind: type[R]) -> R:
    """Read a record that :func:`save` wrote, as ``kind``; see :func:`pyablate.load`."""
    source = Path(path)
    attrs = _attributes(source)
    if (source / "blocks" / "manifest.json").exists() and not attrs:
        raise OSError(f"{source}: an unfinished run; the command that began it goes on with it")
    if attrs.get("pyablate_format") != FORMAT:
        raise OSError(f"{source}: not a pyablate result of format {FORMAT}")
    check_folder(source, only=ARRAYS, whole=True)
    try:
        if not checksums.check(source):
            _say_unsealed(source)
        return _read(source, attrs, kind)
    except Exception as error:  # the file formats raise whatever the damage leads to
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise OSError(f"{source}: damaged result ({reason})") from error


@functools.cache
def _say_unsealed(source: Path) -> None:
    """Say it once of each folder."""
    logger.warning("%s: written without checksums, by an older version: damage may pass", source)


def _read(source: Path, attrs: dict[str, Any], kind: type[R]) -> R:
    # Consolidated metadata are a copy that others may have put there: no checksum covers it.
    group = zarr.open_group(source, mode="r", use_consolidated=False)

    def array(name: str) -> Any:
        return np.asarray(group[name][...])  # type: ignore[index]

    layers = np.array(attrs["layers"], dtype=object)
    units = pd.DataFrame(
        {
            "label": attrs["unit_labels"],
            "layer": layers[array("unit_layer")].tolist(),
            "unit": array("unit_index").astype(np.int64),
        }
    )
    labels, baseline = array("label").astype(np.int64), array("baseline").astype(np.int64)
    flips = Flips(array("flip_start"), array("flip_image"), array("flip_prediction"))
    estimate = None
    if "estimate" in attrs:
        flips = replace(flips, weight=array("flip_weight").astype(np.float64))
        arrays = {name: array(f"estimate_{name}") for name in ESTIMATED}
        estimate = Estimate.of(attrs["estimate"], arrays)
        _check_estimate(estimate, flips, len(units), len(attrs["class_names"]))
    _check_numbers(len(units), labels, baseline, flips, len(attrs["class_names"]))
    return kind(
        units=units,
        labels=labels,
        baseline=baseline,
        flips=flips,
        class_names=tuple(attrs["class_names"]),
        intervention=attrs["intervention"],
        audit=Audit(**attrs["audit"]),
        strategy=dict(attrs["strategy"]),
        measures={
            name: Measure(array(f"{name}_change_sum"), Accuracy(**accuracy))
            for name, accuracy in attrs.get("measures", {}).items()
        },
        provenance=dict(attrs.get("provenance", {})),
        labelled=attrs.get("labelled", True),
        screening=Screening.of(attrs["screening"]) if "screening" in attrs else None,
        estimate=estimate,
    )


def _check_estimate(estimate: Estimate, flips: Flips, units: int, classes: int) -> None:
    """Raise ValueError where the arrays of an estimate do not fit the others."""
    live = estimate.live
    for name, right in (
        ("flip_weight", flips.weight is not None and flips.weight.shape == flips.image.shape),
        ("flip_weight", flips.weight is not None and bool(np.isfinite(flips.weight).all())),
        ("estimate_live", live.ndim == 2 and len(live) == units and live.shape[1] > 0),
        ("estimate_drawn", estimate.drawn.shape == (units,)),
        ("estimate_top", estimate.top.shape == (units,)),
        ("estimate_spread", estimate.spread.shape == (units, classes)),
    ):
        if not right:
            raise ValueError(f"{name} does not fit the other arrays")


def _check_numbers(
    units: int, labels: np.ndarray, baseline: np.ndarray, flips: Flips, classes: int
) -> None:
    """Raise ValueError where the arrays of a result do not fit each other."""
    images, count = len(labels), len(flips.image)
    sizes = [np.diff(flips.start), flips.start[:1], count - flips.start[-1:]]
    for name, right in (
        ("flip_start", len(flips.start) == units + 1 and not sizes[1].any()),
        ("flip_start", min(sizes[0], default=0) >= 0 and not sizes[2].any()),
        ("flip_prediction", len(flips.prediction) == count),
        ("baseline", len(baseline) == images),
        ("flip_image", _within(flips.image, images)),
        ("label", images > 0 and _within(labels, classes)),
        ("baseline", _within(baseline, classes)),
        ("flip_prediction", _within(flips.prediction, classes, first=-1)),
    ):
        if not right:
            raise ValueError(f"{name} does not fit the other arrays")


def _within(numbers: np.ndarray, stop: int, *, first: int = 0) -> bool:
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
        return False
    return not len(numbers) or (int(numbers.min()) >= first and int(numbers.max()) < stop)


def check_writable(path: str | os.PathLike[str], kind: type = int) -> None:
    """Fail now rather than after an hour if :func:`replacing` cannot write at ``path``."""
    _check_replaceable(Path(path), kind)
    scratch_beside(Path(path)).cleanup()


def is_result(path: Path) -> bool:
    """Whether a folder holds a result."""
    return path.is_dir() and isinstance(_attributes(path).get("pyablate_format"), int)


def _check_replaceable(target: Path, kind: type) -> None:
    if not target.exists():
        return
    if not isinstance(_attributes(target).get("pyablate_format"), kind):
        what = "result" if kind is int else "table of attributes"
        raise FileExistsError(f"output: {target} exists and is not a pyablate {what}")
    check_replaceable(target)


def _attributes(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such result")
    check_opened(path)
    try:
        return dict(zarr.open_group(path, mode="r").attrs)
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def write(result: Record, path: Path) -> None:
    """Write a result's group to a new folder, in any number of steps; see :func:`save`."""
    # Names live in the attributes: Zarr 3 has no settled encoding for strings in arrays.
    layers = list(dict.fromkeys(result.units["layer"]))
    number = {layer: i for i, layer in enumerate(layers)}
    group = zarr.create_group(
        path,
        attributes={
            "pyablate_format": FORMAT,
            "class_names": list(result.class_names),
            "intervention": result.intervention,
            "audit": _audit(result.audit),
            "strategy": result.strategy,
            "layers": layers,
            "unit_labels": list(result.units["label"]),
            **_accuracies(result),
            "provenance": result.provenance,
            **({} if result.labelled else {"labelled": False}),
            **({} if result.screening is None else {"screening": result.screening.to_json()}),
            **({} if result.estimate is None else {"estimate": result.estimate.to_json()}),
        },
    )
    arrays: dict[str, tuple[tuple[str, ...], NDArray[Any]]] = {
        "unit_layer": (("unit",), np.array([number[x] for x in result.units["layer"]], np.int32)),
        "unit_index": (("unit",), result.units["unit"].to_numpy(np.int32)),
        "label": (("image",), result.labels.astype(np.int32)),
        "baseline": (("image",), result.baseline.astype(np.int32)),
        "flip_start": (("unit_bound",), result.flips.start),
        "flip_image": (("flip",), result.flips.image),
        "flip_prediction": (("flip",), result.flips.prediction),
    }
    if result.estimate is not None and result.flips.weight is not None:
        arrays["flip_weight"] = (("flip",), result.flips.weight)
        dimensions = {"live": ("unit", "level"), "spread": ("unit", "class")}
        for name, values in result.estimate.arrays.items():
            arrays[f"estimate_{name}"] = (dimensions.get(name, ("unit",)), values)
    for name, measure in result.measures.items():
        arrays[f"{name}_change_sum"] = (("unit", "class"), measure.change)
    for name, (named, values) in arrays.items():
        group.create_array(name, data=values, dimension_names=named, config=_EVERY_CHUNK)
    checksums.seal(path)


def _audit(audit: Audit) -> dict[str, int]:
    """Attributes of the audit; what was mended only where something was."""
    return {name: count for name, count in asdict(audit).items() if name != "mended" or count}


def _accuracies(result: Record) -> dict[str, Any]:
    """Attributes of what was measured; none where nothing was."""
    found = {name: asdict(measure.accuracy) for name, measure in result.measures.items()}
    return {"measures": found} if found else {}
