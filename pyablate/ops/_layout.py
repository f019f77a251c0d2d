"""Memory layouts and outputs of the operations in :mod:`pyablate.ops`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyablate.ops._checks import check_shape, check_tensor

BASES = {
    torch.float32: (torch.float32, torch.bfloat16),
    torch.float64: (torch.float64,),
    torch.bfloat16: (torch.float32, torch.bfloat16),
    torch.float16: (torch.float32, torch.float16),
}
"""Dtypes of ``base`` that backends read, by that of deltas, which are accumulated in the first."""


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
    """Return ``base`` in ``layout``, in a dtype that goes with deltas of ``dtype``."""
    return read_as(base, dtype).contiguous(memory_format=layout)


def read_as(base: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``base`` in a dtype that goes with deltas of ``dtype``: as it is if that does."""
    return base if base.dtype in BASES[dtype] else base.to(BASES[dtype][0])


def by_runs(
    run: Callable[..., None],
    dtype: torch.dtype,
    rows: Tensor,
    base: Tensor,
    *factors: Tensor,
) -> Tensor:
    """Return what ``run(rows, base, *factors, out)`` writes, of tensors ``[., R, M]``: runs of M.

    The numbers of a run are neighbours, those of the factors, which may have been expanded,
    neighbours or one for all. Views whose elements lie apart, such as the heads of an attention,
    are read where they are if all tensors, of one shape but for their rows, are such views. The
    result has no gaps.
    """
    order = [0, *sorted(range(1, rows.ndim), key=rows.stride().__getitem__, reverse=True)]
    shape = [rows.shape[axis] for axis in order]
    out = rows.new_empty(shape, dtype=dtype)
    if out.numel():
        views = _alike((rows, base, *factors), order)
        if views is None:
            rows = dense(rows)
            layout = layout_of(rows)
            others = (x.contiguous(memory_format=layout) for x in (base, *factors))
            return by_runs(run, dtype, rows, *others)
        run(*views, out.view(views[0].shape))
    return out.permute(sorted(range(rows.ndim), key=order.__getitem__))


def _alike(tensors: Sequence[Tensor], order: list[int]) -> list[Tensor] | None:
    """View tensors as runs that are as long as they can be; None where they need copies."""
    for start in range(1, max(2, len(order))):
        views = [_as_runs(x.permute(order), start) for x in tensors]
        found = [view for view in views if view is not None]
        if len(found) < len(views):
            continue
        steps = [view.stride(2) for view in found]
        if steps[:2] == [1, 1] and steps[2:] in ([], [0, 0], [1, 1]):
            return found
    return None


def _as_runs(x: Tensor, start: int) -> Tensor | None:
    """View a tensor ``[., R, M]``, the axes from ``start`` on as one; None if that needs a copy."""
    outer = _step(x.shape[1:start], x.stride()[1:start])
    inner = _step(x.shape[start:], x.stride()[start:])
    if outer is None or inner is None:
        return None
    size = len(x), math.prod(x.shape[1:start]), math.prod(x.shape[start:])
    return x.as_strided(size, (x.stride(0), outer, inner))


def _step(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """Stride of several axes seen as one; None if that needs a copy."""
    step, following = 1, None
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size == 1:
            continue
        if following is None:
            step = stride
        elif stride != following:
            return None
        following = stride * size
    return step


def wider(*tensors: Tensor) -> torch.dtype:
    """Return float64 if any tensor has it, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
