"""Memory layouts and outputs of the operations in :mod:`pyablate.ops`."""

from __future__ import annotations

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
    if base.dtype not in BASES[dtype]:
        base = base.to(BASES[dtype][0])
    return base.contiguous(memory_format=layout)


def wider(*tensors: Tensor) -> torch.dtype:
    """Return float64 if any tensor has it, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
