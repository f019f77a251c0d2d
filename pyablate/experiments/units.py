"""Which units an experiment is about."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyablate.result import AblationResult, Ints
from pyablate.sites import Site, copied, select, sites


def layers_of(model: nn.Module, images: Tensor, layers: str | Sequence[str]) -> list[Site]:
    """Find the layers of a network, in the order in which it computes them.

    Raises
    ------
    TypeError
        The model is no ``nn.Module``.
    ValueError
        An unknown layer, or images that the model cannot take.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    first = next(iter(model.parameters()), torch.zeros(0))
    work = copied(model).eval()
    if first.dtype != torch.float64:
        work = work.float()  # as :func:`pyablate.ablate` does
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    sample = torch.cat([images[:1], images[-1:]]).to(first.device, dtype)
    try:
        found = sites(work, sample)
    except RuntimeError as error:
        raise ValueError(
            f"data: the model fails on images of shape {list(sample.shape[1:])}: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    return select(found, layers)


def labels_of(found: Sequence[Site]) -> list[str]:
    """Labels ``"layer:unit"`` of all units of some layers."""
    return [site.label(unit) for site in found for unit in range(site.channels)]


def class_number(result: AblationResult, name: str | int, argument: str = "classes") -> int:
    """Find the number of a class by its name or number.

    Raises
    ------
    ValueError
        No such class.
    """
    names = result.class_names
    if isinstance(name, str):
        if name in names:
            return names.index(name)
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.3) or names[:3]
        raise ValueError(f"{argument}: no class {name!r}; nearest: {', '.join(near)}")
    if not 0 <= int(name) < len(names):
        raise ValueError(f"{argument}: expected numbers 0 to {len(names) - 1}, got {name}")
    return int(name)


def best_first(values: Any) -> Ints:
    """Positions by falling value; of equal ones the first, NaN last."""
    order: Ints = np.argsort(-np.asarray(values, dtype=np.float64), kind="stable")
    return order
