"""Asynchronous copies from pinned host memory to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to a device without waiting; on the CPU it is the tensor itself.

    The copy takes its turn on the device's stream. That needs pinned memory: from any other CUDA
    waits for all earlier work before it copies.
    """
    if device.type == values.device.type:
        return values
    return values.pin_memory().to(device, non_blocking=True)
