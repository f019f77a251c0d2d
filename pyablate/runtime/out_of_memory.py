"""Out of memory: which errors say so."""

from __future__ import annotations

import torch

ERRORS = (MemoryError, RuntimeError)
"""What to catch; :func:`is_shortage` tells which of them it is."""

_WORDS = (
    "can't allocate memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""In messages of PyTorch's allocator on the CPU, of CUDA (our own kernels' too), and of libraries
that allocate for themselves."""


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)
