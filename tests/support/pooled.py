"""A small network with global pooling."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Pooled(nn.Module):
    """Convolution, ReLU, global mean, linear: what its maps weigh can be read off the head."""

    def __init__(self, channels: int = 6, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1, bias=bias)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(self.pool(self.relu(self.conv(x)))))


def pooled(seed: int, channels: int = 6, bias: bool = True) -> Pooled:
    torch.manual_seed(seed)
    return Pooled(channels, bias).eval()
