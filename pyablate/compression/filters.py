"""Filter pruning by the criteria of the literature."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from pyablate._validation import check_choice
from pyablate.compression._rank import Ranking, rank
from pyablate.compression._remove import Removal, remove
from pyablate.compression.coupling import Coupling
from pyablate.compression.transforms import FLOAT_BITS, Transformed, output_axis
from pyablate.unit_attributes import attributes

BY_WEIGHTS = ("l1", "l2", "bn_scale", "nisp")
BY_DATA = ("hrank", "taylor")
CRITERIA = (*BY_WEIGHTS, *BY_DATA)


def filter_ranking(
    model: nn.Module,
    sample: Any,
    criterion: str = "l1",
    *,
    scope: str = "layer",
    data: Any = None,
) -> Ranking:
    """Rank units by a criterion of the literature.

    Parameters
    ----------
    model : nn.Module
        The network.
    sample : Tensor, dict or tuple of Tensor
        A batch of inputs, ``[N, ...]``.
    criterion : {"l1", "l2", "bn_scale", "nisp", "hrank", "taylor"}
        Norm of all filters that make the unit (Li, Kadav, Durdanovic, Samet, Graf 2017, *Pruning
        Filters for Efficient ConvNets*); the mean size of its batch norm scales (Liu, Li, Shen,
        Huang, Yan, Zhang 2017, *Learning Efficient Convolutional Networks through Network
        Slimming*); or the attributes of these names of :func:`pyablate.attributes`, of units that
        hang together their mean.
    scope : {"global", "layer"}
        As for :func:`pyablate.rank`; these figures of different layers hardly compare.
    data : pair of arrays, DataLoader or iterable of (images, labels), optional
        What ``hrank`` and ``taylor`` are measured on.

    Returns
    -------
    Ranking
        Of the layers that the criterion can score; shares of it are shares of these.

    Raises
    ------
    ImportError
        Torch-Pruning is not installed.
    ValueError, TypeError
        Bad arguments, no data for a criterion that needs them, or a network that has nothing of
        what the criterion looks at.

    Examples
    --------
    >>> pa.compression.filter_ranking(model, images[:2], "bn_scale").name
    'bn_scale'
    """
    check_choice("criterion", criterion, CRITERIA)
    if criterion in BY_DATA and data is None:
        raise ValueError(f"data: criterion {criterion!r} is measured on images, got None")
    coupling = Coupling(model, sample)
    if criterion in ("nisp", *BY_DATA):
        scores = _attribute(coupling, criterion, data)
    else:
        # Whole classes are scored, so their labels name groups.
        scores = {one.label: _size(coupling, one.units, criterion) for one in coupling.classes}
    finite = {label: value for label, value in scores.items() if math.isfinite(value)}
    if not finite:
        raise ValueError(f"criterion: no unit of this network has what {criterion!r} looks at")
    # What the criterion cannot score (maps of a layer without maps) takes no part in the shares.
    layers = list(
        dict.fromkeys(one.rpartition(":")[0] for label in finite for one in label.split("+"))
    )
    return rank(model, sample, finite, layers=layers, scope=scope, combine="mean", name=criterion)


def prune_filters(
    model: nn.Module,
    sample: Any,
    fraction: float,
    *,
    criterion: str = "l1",
    scope: str = "layer",
    data: Any = None,
) -> Transformed:
    """Remove the units that rank lowest, see :func:`filter_ranking`.

    Parameters
    ----------
    model, sample, criterion, scope, data
        See :func:`filter_ranking`.
    fraction : float
        Share of the removable units, from 0 to 1.

    Examples
    --------
    >>> pruned = pa.compression.prune_filters(model, images[:2], 0.3, criterion="l2")
    >>> pruned.ratio > 1, len(pruned.removed) > 0
    (True, True)
    """
    ranking = filter_ranking(model, sample, criterion, scope=scope, data=data)
    return without_units(remove(model, ranking, sample, fraction=fraction))


def without_units(removal: Removal, history: pd.DataFrame | None = None) -> Transformed:
    """Return a removal as what all transforms return."""
    after, before = (FLOAT_BITS * size.parameters for size in (removal.after, removal.before))
    return Transformed(removal.model, after, before, removal.units, history)


def _attribute(coupling: Coupling, name: str, data: Any) -> dict[str, float]:
    """Score every unit of every class by an attribute."""
    layers = list(dict.fromkeys(layer for one in coupling.classes for layer in one.layers))
    images = coupling.sample
    given = images if coupling.inputs is None else coupling.inputs.as_given(images)
    source = (given, torch.zeros(len(images), dtype=torch.long)) if data is None else data
    values = attributes(coupling.model, source, layers, name, progress=False)[name]
    return dict(zip(values["unit"].to_numpy().tolist(), values.to_numpy().tolist(), strict=True))


def _size(coupling: Coupling, units: Sequence[str], criterion: str) -> float:
    """Size of the weights that make some coupled units; NaN where there are none."""
    parts: list[Tensor] = []
    for dependency, channels in coupling.channels(units):
        module = dependency.target.module
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        makes = isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
        if criterion == "bn_scale" and norm and module.weight is not None:
            parts.append(module.weight.detach()[channels].abs())
        elif criterion != "bn_scale" and makes and "out" in dependency.handler.__name__:
            taken = torch.tensor(channels, device=module.weight.device)
            parts.append(module.weight.detach().index_select(output_axis(module), taken).flatten())
    if not parts:
        return math.nan
    joined = torch.cat([part.double().cpu() for part in parts])
    reduce: dict[str, Callable[[Tensor], Tensor]] = {
        "l1": lambda w: w.abs().sum(),
        "l2": lambda w: w.square().sum().sqrt(),
        "bn_scale": lambda w: w.mean(),
    }
    return float(reduce[criterion](joined))
