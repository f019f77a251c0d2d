"""Checks of the arguments of :mod:`pyablate.ops`.

Each raises ``TypeError`` or ``ValueError`` naming the argument, what was expected and what came.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_tensor(
    name: str,
    tensor: Tensor,
    *,
    dims: int | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
    like: Tensor | None = None,
) -> torch.dtype:
    """Check type, layout, number of dimensions, dtype and device; return the dtype."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a strided tensor, got layout {tensor.layout}")
    if dtypes is not None and tensor.dtype not in dtypes:
        wanted = ", ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {wanted}, got {tensor.dtype}")
    if dims is not None and tensor.dim() != dims:
        raise ValueError(f"{name}: expected {dims} dimensions, got shape {tuple(tensor.shape)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {tensor.device}")
    return tensor.dtype


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Check the shape, exactly."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")


def check_pairs(like: Tensor, **indices: tuple[Tensor, int, int]) -> int:
    """Check int32 vectors (tensor, low, high), all of one length, which is returned."""
    length = -1
    for name, (tensor, low, high) in indices.items():
        check_tensor(name, tensor, dims=1, dtypes=(torch.int32,), like=like)
        if length >= 0:
            check_shape(name, tensor, (length,))
        length = tensor.numel()
        check_range(name, tensor, low, high)
    return length


def check_range(name: str, tensor: Tensor, low: int, high: int) -> None:
    """Check that all of an integer tensor lies in [low, high); on the CPU only."""
    if tensor.numel() == 0 or tensor.device.type != "cpu":
        return
    smallest, largest = (int(t) for t in tensor.aminmax())
    if smallest < low or largest >= high:
        raise ValueError(
            f"{name}: expected indices from {low} to {high - 1}, got {smallest} to {largest}"
        )


def check_classes(classes: int) -> None:
    """Check the number of classes."""
    if classes < 1:
        raise ValueError(f"classes: expected at least one class, got {classes}")


def two(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    """Return a pair of ints, each at least ``least``, from an int or a sequence of one or two."""
    pair = tuple(value) if isinstance(value, Sequence) else (value,)
    if len(pair) == 1:
        pair *= 2
    if len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
        raise ValueError(f"{name}: expected one or two integers >= {least}, got {value!r}")
    return pair[0], pair[1]
