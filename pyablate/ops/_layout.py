"""Memory layouts and outputs of the operations in :mod:`pyablate.ops`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyablate.ops._checks import check_shape, check_tensor


def layout_of(tensor: Tensor) -> torch.memory_format:
    """Return the layout of a tensor that :func:`dense` has made."""
    return torch.contiguous_format if tensor.is_contiguous() else torch.channels_last


def dense(tensor: Tensor) -> Tensor:
    """Return the tensor contiguous or channels_last, copied only where it is neither."""
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor
    return tensor.contiguous()


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lie in memory alike."""
    return a.stride() == b.stride()


def empty_rows(x: Tensor, rows: int) -> Tensor:
    """Return memory for ``rows`` rows like those of ``x``."""
    return torch.empty(
        (rows, *x.shape[1:]), dtype=x.dtype, device=x.device, memory_format=layout_of(x)
    )


def output(
    out: Tensor | None, shape: tuple[int, ...], like: Tensor, layout: torch.memory_format
) -> Tensor:
    """Return ``out``, checked, or memory for a result of that shape and layout."""
    if out is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)
    check_tensor("out", out, dtypes=(like.dtype,), like=like)
    check_shape("out", out, shape)
    if not out.is_contiguous(memory_format=layout):
        raise ValueError(f"out: expected a {layout} tensor, got strides {out.stride()}")
    return out


def base_rows(base: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """Return ``base`` in ``layout``, in ``dtype`` unless it is bfloat16."""
    return read_as(base, dtype).contiguous(memory_format=layout)


def read_as(base: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``base`` in ``dtype``, or as it is where that is bfloat16 and ``dtype`` float32."""
    half = base.dtype == torch.bfloat16 and dtype != torch.float64
    return base if half else base.to(dtype)


def by_runs(
    run: Callable[[Tensor, Tensor, Tensor], None], rows: Tensor, base: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return what ``run(rows, base, out)`` writes, as ``[., R, M]``: runs of M neighbours.

    Views whose elements lie apart, such as the heads of an attention, are read where they are, if
    both ``rows [P, *S]`` and ``base [N, *S]`` are such; the result has no gaps.
    """
    order = [0, *sorted(range(1, rows.ndim), key=rows.stride().__getitem__, reverse=True)]
    start = max(_start_of_runs(x.permute(order)) for x in (rows, base))
    if start > (2 if rows.ndim > 2 else 1) and rows.numel():
        rows = dense(rows)
        return by_runs(run, rows, base.contiguous(memory_format=layout_of(rows)), dtype)
    shape = [rows.shape[axis] for axis in order]
    out = rows.new_empty(shape, dtype=dtype)
    if rows.numel():
        size = [math.prod(shape[1:start]), math.prod(shape[start:])]
        views = (x.view(-1, *size) for x in (rows.permute(order), base.permute(order), out))
        run(*views)
    return out.permute(sorted(range(rows.ndim), key=order.__getitem__))


def _start_of_runs(x: Tensor) -> int:
    """First axis, but for that of the rows, from which on the elements lie one after the other."""
    step = 1
    for axis in range(x.ndim - 1, 0, -1):
        if x.shape[axis] != 1 and x.stride(axis) != step:
            return axis + 1
        step *= x.shape[axis]
    return 1


def wider(*tensors: Tensor) -> torch.dtype:
    """Return float64 if any tensor has it, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
