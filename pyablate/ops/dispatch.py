"""Where an operation runs, and what every backend is told."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyablate import _native
from pyablate.ops._checks import check_pairs, check_shape, check_tensor
from pyablate.ops._layout import layout_of
from pyablate.ops.activations import Activation
from pyablate.ops.quantized import Quantized

REAL = (torch.float32, torch.float64)
FLOATS = (*REAL, torch.bfloat16, torch.float16)


def backend(tensor: Tensor) -> Any:
    """Return the compiled module if it has a backend for the tensor's device, else None."""
    core = _native.core
    if core is None or tensor.device.type == "cpu":
        return core
    return core if tensor.device.type == "cuda" and core.has_cuda else None


def on_processor(tensor: Tensor) -> bool:
    """Whether the processor's kernels would do the work."""
    return tensor.device.type == "cpu"


def delta_backend(delta: Tensor, quantized: Quantized | None = None) -> Any:
    """Return the backend of an operation on a delta, None where it is left to the reference.

    That does what no kernel is for: float16 on a processor, where it would gain nothing over
    float32, and quantized values on a GPU or of float64.
    """
    if on_processor(delta):
        left = delta.dtype == torch.float16
        left |= quantized is not None and delta.dtype == torch.float64
    else:
        left = quantized is not None
    return None if left else backend(delta)


def context(tensor: Tensor) -> dict[str, int]:
    """Return number of CPU threads and CUDA stream handle for work on ``tensor``."""
    if tensor.device.type == "cuda":
        return {"threads": 1, "stream": torch.cuda.current_stream(tensor.device).cuda_stream}
    return {"threads": torch.get_num_threads(), "stream": 0}


def activation_arguments(activation: Activation | None) -> tuple[int, float, float]:
    """Return number and settings of an activation as the backends know it; 0 is none."""
    if activation is None:
        return 0, 0.0, 0.0
    return activation.code, activation.a, activation.b


def check_change(
    base: Tensor,
    delta: Tensor,
    image: Tensor,
    *,
    dims: int | None = None,
    name: str = "delta",
    base_name: str = "base",
) -> None:
    """Check a delta ``[P, *S]``, its base ``[N, *S]`` and the row of each pair, int32 ``[P]``."""
    check_tensor(name, delta, dims=dims, dtypes=FLOATS)
    if delta.dim() < 1:
        raise ValueError(f"{name}: expected at least one dimension, got none")
    check_tensor(base_name, base, dims=dims, dtypes=FLOATS, like=delta)
    check_shape(base_name, base, (base.shape[0] if base.dim() else 0, *delta.shape[1:]))
    pairs = check_pairs(delta, image=(image, 0, base.shape[0]))
    check_shape(name, delta, (pairs, *base.shape[1:]))


def ready_scales(
    like: Tensor, *, finer: bool = False, **scales: Tensor | None
) -> list[Tensor | None]:
    """Check factors of the pairs, or with ``finer`` of maps' positions; return them to be read."""
    ready: list[Tensor | None] = []
    for name, scale in scales.items():
        if scale is not None:
            by_position = finer and scale.ndim == 3
            shape = (like.shape[0], *like.shape[2:]) if by_position else (like.shape[0],)
            check_tensor(name, scale, dims=len(shape), dtypes=(torch.float32,), like=like)
            check_shape(name, scale, shape)
        ready.append(None if scale is None else scale.detach().contiguous())
    return ready


def written(result: Tensor, quantized: Quantized | None) -> Tensor | None:
    """Return where a result goes; None where its quantized values are all that is wanted."""
    return None if quantized is not None and quantized.alone else result


def quantized_arguments(
    quantized: Quantized | None, result: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Check memory for quantized values; return values and scales."""
    if quantized is None:
        return None, None
    check_tensor("quantized", quantized.values, dtypes=(torch.uint8,), like=result)
    check_shape("quantized", quantized.values, tuple(result.shape))
    if not quantized.values.is_contiguous(memory_format=layout_of(result)):
        raise ValueError(f"quantized: expected the layout of the result, {layout_of(result)}")
    return quantized.values, quantized.scale
