"""Units and classes of an experiment by label, name or number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn

from pyablate._validation import nearest
from pyablate.network.model_checks import Ready, open_up
from pyablate.network.sites import Site, check_model
from pyablate.result import AblationResult
from pyablate.results.arrays import Ints
from pyablate.runtime.determinism import undisturbed


def check_every_pair(options: Mapping[str, Any]) -> None:
    """Refuse options of a run that computes a sample of the predictions.

    Raises
    ------
    ValueError
        They are.
    """
    if options.get("guarantee") == "estimated":
        raise ValueError(
            "guarantee: expected 'exact' or 'screened', as every prediction is needed here, got "
            "'estimated'"
        )


def opened(model: nn.Module, data: Any, options: Mapping[str, Any] = MappingProxyType({})) -> Ready:
    """Copy the model and look at the data, as :func:`pyablate.ablate` will with these options."""
    check_every_pair(options)
    known: dict[str, Any] = {name: options.get(name) for name in ("axis", "logits")}
    check_model(model)
    with undisturbed(model, options.get("device")), torch.inference_mode(False):
        return open_up(model, data, options.get("class_names"), options.get("device"), **known)


def labels_of(found: Sequence[Site]) -> list[str]:
    """Labels ``"layer:unit"`` of all units of some layers."""
    return [site.label(unit) for site in found for unit in range(site.channels)]


def one_layer(found: Sequence[Site], name: Any) -> Site:
    """Return the layer that a name selects; refuse a name that selects several."""
    if len(found) != 1:
        raise ValueError(f"layer: expected one layer, {name!r} names {len(found)}")
    return found[0]


def class_number(result: AblationResult | Ready, name: str | int, argument: str = "classes") -> int:
    """Find the number of a class by its name or number."""
    names = result.class_names
    if isinstance(name, str):
        if name in names:
            return names.index(name)
        raise ValueError(f"{argument}: no class {name!r}{nearest(name, names)}")
    if not 0 <= int(name) < len(names):
        raise ValueError(f"{argument}: expected numbers 0 to {len(names) - 1}, got {name}")
    return int(name)


def best_first(values: Any) -> Ints:
    """Positions by falling value; of equal ones the first, NaN last."""
    order: Ints = np.argsort(-np.asarray(values, dtype=np.float64), kind="stable")
    return order
