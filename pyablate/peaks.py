"""What this machine was measured to do: the figures that plans and precisions rest on."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


@functools.cache
def convolution_rate(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a 64 -> 64 channel 3 x 3 convolution, channels last.

    Parameters
    ----------
    device : str
        Where.
    dtype : torch.dtype
        Of images and weights.

    Returns
    -------
    float
        The best of a few short runs; 0 where the device cannot do it. Measured once.
    """
    x = torch.ones(64, 64, 14, 14, device=device, dtype=dtype)
    w = torch.ones(64, 64, 3, 3, device=device, dtype=dtype)
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    try:
        with torch.no_grad():
            seconds = _best(lambda: functional.conv2d(x, w, padding=1), device)
    except RuntimeError:
        return 0.0
    return 2.0 * x.numel() * 64 * 9 / seconds


@functools.cache
def copy_rate(device: str) -> float:
    """Bytes per second through memory, read and written, in a large copy. Measured once."""
    source = torch.zeros(1 << 24, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.numel() * 4 / _best(lambda: target.copy_(source), device)


def _best(work: Callable[[], Tensor], device: str, repeats: int = 7) -> float:
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return best
