"""A hook loop as plain as can be, on the model itself and called the way its owner calls it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import pyablate as pa


def predictions(
    model: nn.Module, layer: str, logits_of: Callable[[nn.Module], Tensor], *, axis: int
) -> np.ndarray:
    """Predictions in float64, int64 ``[1 + units, N]``: of the intact network, then by unit."""
    double = copy.deepcopy(model).double().eval()
    found, units = [], 0

    def count(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        nonlocal units
        units = output.shape[axis]

    def zero(unit: int) -> Callable[..., Tensor]:
        return lambda _module, _inputs, output: output.index_fill(axis, torch.tensor([unit]), 0)

    with torch.no_grad():
        handle = double.get_submodule(layer).register_forward_hook(count)
        found.append(logits_of(double))
        handle.remove()
        for unit in range(units):
            handle = double.get_submodule(layer).register_forward_hook(zero(unit))
            found.append(logits_of(double))
            handle.remove()
    return torch.stack(found).argmax(dim=2).numpy()


def check_by_hand(
    result: pa.AblationResult,
    model: nn.Module,
    layer: str,
    logits_of: Callable[[nn.Module], Tensor],
    *,
    axis: int = 1,
) -> None:
    """Compare a result on one layer with the loop; some units must matter, or it proves nothing."""
    expected = predictions(model, layer, logits_of, axis=axis)
    np.testing.assert_array_equal(result.baseline, expected[0])
    np.testing.assert_array_equal(result.predictions(), expected[1:])
    assert (expected[1:] != expected[0]).any()
