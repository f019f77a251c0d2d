"""A clean run written by hand."""

from __future__ import annotations

import torch


class Clean:
    """Three images of two classes, the second of them nearly a tie."""

    logits = torch.tensor([[1.0, 0.0], [0.1, 0.0], [0.0, 2.0]])
    prediction = torch.tensor([0, 0, 1], dtype=torch.int32)
    tolerance = torch.full((3,), 1e-6)
    watched = torch.zeros(0, dtype=torch.int64)
