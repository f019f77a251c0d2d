"""``attributes()``: everything that is asked for, as one data set over the units."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pyablate._validation import check_count
from pyablate.data.inputs import Inputs
from pyablate.interventions import parse
from pyablate.network.classifier import Choice, check_choice_of_logits, inputs_of
from pyablate.network.model_checks import open_up
from pyablate.network.sites import check_channels, check_model
from pyablate.runs.job_list import plan_jobs
from pyablate.runtime.determinism import undisturbed
from pyablate.runtime.progress import Report, reporting
from pyablate.unit_attributes.catalog import Attribute, choose
from pyablate.unit_attributes.concepts import DETECTOR, TOP, check_masks
from pyablate.unit_attributes.pipeline import Work
from pyablate.unit_attributes.selectivity import largest

if TYPE_CHECKING:
    import xarray as xr

logger = logging.getLogger("pyablate")

_BATCH = 128
SAMPLED = ("rank", "conductance", "lrp", "clrp")
"""Families that look at a sample of the images."""


def attributes(
    model: nn.Module,
    data: Any,
    layers: str | Sequence[str] | None = None,
    which: str | Sequence[str] = "all",
    *,
    masks: Any = None,
    concept_names: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    logits: Choice = None,
    bins: int = 16,
    top: int = 60,
    sample: int = 256,
    axis: Mapping[str, int] | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    progress: bool | Report | None = None,
) -> xr.Dataset:
    """Compute properties of every unit of some layers.

    All attributes of activations and gradients come from one pass over the data; only concepts
    (two passes) and what is computed on a sample of the images need more. It takes 5 bytes of host
    memory per unit and image, 9 in float64.

    Parameters
    ----------
    model : nn.Module
        Trained classifier, as for :func:`pyablate.ablate`. It comes back as it was.
    data : pair of arrays, DataLoader or iterable of (images, labels)
        Images ``[N, ...]`` and integer labels ``[N]``.
    layers : str or sequence of str, optional
        Layer names, globs, or single units as ``"layer:unit"``; the default is ``"*"``.
    which : str or sequence of str
        Names of attributes or of families of them, or ``"all"``; docs/guides/attributes.md lists
        them. "all" leaves out, with a note in the log, what is not installed, concepts without
        ``masks``, and conductance of models that take integers.
    masks : array, optional
        ``[N, concepts, H, W]``, not 0 where a concept is present in an image, in the order of the
        data; anything that is indexed by a slice of images.
    concept_names, class_names : sequence of str, optional
        One per concept and class; by default their numbers, and classes as for
        :func:`pyablate.ablate`.
    logits : str, int or callable, optional
        As of :func:`pyablate.ablate`.
    bins : int
        Bins of the activation for mutual_information, kl_selectivity and entropy.
    top : int
        Images that precision_at looks at.
    sample : int
        Images, evenly spaced in the data, for hrank, conductance, lrp and clrp.
    axis : dict, optional
        Axis of the units of some layers, as for :func:`pyablate.ablate`.
    device : str or torch.device, optional
        Where to work; by default where the model is.
    batch_size : int, optional
        Images at a time.
    progress : bool or callable, optional
        As for :func:`pyablate.ablate`.

    Returns
    -------
    xarray.Dataset
        Over ``unit``, the labels of the ablation result, with ``layer`` and ``index``: float64
        variables named after the attributes. Attributes that speak about a class have
        ``<name>_per_class`` ``[unit, class]`` and ``<name>_class``, int64, too; concept_iou has
        ``concept_iou_per_concept`` ``[unit, concept]`` and ``concept_iou_concept``. Each
        variable's ``attrs`` hold ``formula``, ``source``, ``family`` and ``rescaling_invariant``.
        NaN where an attribute is not defined for a unit.

    Raises
    ------
    ValueError, TypeError
        Bad arguments, data or weights, or something asked for by name that does not apply; the
        message names what, where and what was expected.
    ImportError
        Something is asked for by name whose library is not installed.

    Examples
    --------
    >>> table = pa.attributes(model, data, "features.16", ["l1_norm", "auc"])
    >>> table["auc_per_class"].shape, table["l1_norm"].attrs["family"]
    ((128, 10), 'weights')
    """
    entries = list(choose(which))
    check_model(model)
    check_choice_of_logits(logits)
    for name, number in (("bins", bins), ("top", top), ("sample", sample)):
        check_count(name, number)
    if batch_size is not None:
        check_count("batch_size", batch_size)
    named = {which} if isinstance(which, str) else set(which)
    with undisturbed(model, device), torch.inference_mode(False):
        ready = open_up(model, data, class_names, device, axis=axis, logits=logits)
        entries = _available(entries, named, masks is not None, inputs_of(ready.model))
        jobs = plan_jobs(ready.sites, layers, None, parse("zero"))
        check_channels(job.sites[0] for job in jobs)
        ready.data.hold_if_read_once()
        covered = None
        if any(entry.family == "concepts" for entry in entries):
            covered = check_masks(masks, concept_names, len(ready.data))
        work = Work(ready, jobs, entries, covered, bins, top, sample, batch_size or _BATCH)
        with reporting(progress) as report:
            work.run(report)
    return _dataset(work)


def _available(
    entries: Sequence[Attribute], named: set[str], masks: bool, inputs: Inputs | None
) -> list[Attribute]:
    """Entries that can be computed; those that cannot are an error where they are named."""
    reasons: dict[str, Exception] = {}
    if not masks:
        reasons["concepts"] = ValueError("masks: concept_iou needs masks, got None")
    if not _installed("captum"):
        missing = "computed by Captum, which is not installed: pip install 'pyablate[attributions]'"
        for family in ("conductance", "lrp"):
            reasons[family] = ImportError(f"{family} is {missing}")
    if inputs is not None and any(inputs.dtypes):
        reasons["conductance"] = ValueError(
            "which: conductance follows a path from zero to the inputs, and there is none to "
            f"integers, got {inputs}"
        )
    possible = []
    for entry in entries:
        reason = reasons.get(entry.family)
        if reason is None:
            possible.append(entry)
        elif named & {entry.name, entry.family}:
            raise reason
        else:
            logger.info("%s is left out: %s", entry.name, reason)
    return possible


def _installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def _dataset(work: Work) -> xr.Dataset:
    """Everything found, as labelled arrays."""
    import xarray as xr  # slow to import: half a second

    members = [member[0] for job in work.jobs for member in job.members]
    coords: dict[str, Any] = {
        "unit": np.array([f"{name}:{number}" for name, number in members], dtype=str),
        "layer": ("unit", np.array([name for name, _ in members], dtype=str)),
        "index": ("unit", np.array([number for _, number in members], dtype=np.int64)),
        "class": np.array(work.ready.class_names, dtype=str),
    }
    if work.masks is not None:
        coords["concept"] = np.array(work.masks.names, dtype=str)
    variables: dict[str, Any] = {}
    for entry in work.entries:
        variables.update(_variables(work, entry))
    return xr.Dataset(variables, coords=coords)


def _variables(work: Work, entry: Attribute) -> Iterator[tuple[str, Any]]:
    """Variables of one attribute: its value, and where it has them values by class and the best."""
    attrs: dict[str, Any] = {
        "formula": entry.formula,
        "source": entry.source,
        "family": entry.family,
        "rescaling_invariant": entry.invariant,
        **_settings(work, entry),
    }
    concept = entry.family == "concepts" and work.masks is not None
    if not (concept or entry.per_class):
        yield entry.name, ("unit", _rows(work, entry.name).numpy(), attrs)
        return
    of = "concept" if concept else "class"
    names = work.masks.names if concept and work.masks else work.ready.class_names
    matrix = _rows(work, f"{entry.name}_per_{of}", len(names))
    best, where = largest(matrix)
    if entry.name in work.found:  # a mean over all images rather than the best class
        best = _rows(work, entry.name)
    best_of = {"formula": f"number of the {of} with the largest value; -1: none"}
    yield entry.name, ("unit", best.numpy(), attrs)
    yield f"{entry.name}_{of}", ("unit", where.numpy(), best_of)
    yield f"{entry.name}_per_{of}", (("unit", of), matrix.numpy(), attrs)


def _settings(work: Work, entry: Attribute) -> dict[str, Any]:
    """Tell what the caller chose, for the record."""
    if entry.family == "information":
        return {"bins": work.bins}
    if entry.name == "precision_at":
        return {"top": work.top}
    if entry.family == "concepts":
        return {"top_share": TOP, "detector_above": DETECTOR}
    return {"sample": work.sample} if entry.family in SAMPLED else {}


def _rows(work: Work, name: str, columns: int | None = None) -> Tensor:
    """Values of the units asked for, layer after layer; NaN for layers that have none."""
    parts = []
    for job in work.jobs:
        site = job.sites[0]
        value = work.found.get(name, {}).get(site.name)
        if value is None:
            shape = (site.channels,) if columns is None else (site.channels, columns)
            value = torch.full(shape, torch.nan, dtype=torch.float64)
        parts.append(value[[unit for member in job.members for _, unit in member]])
    return torch.cat(parts)
