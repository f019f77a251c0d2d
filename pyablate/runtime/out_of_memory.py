"""Out of memory: which errors say so."""

from __future__ import annotations

import torch

ERRORS = (MemoryError, RuntimeError)
"""What to catch; :func:`is_shortage` tells which of them it is."""


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
