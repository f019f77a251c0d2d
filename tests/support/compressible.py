"""Small networks with everything that ties channels together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyablate.compression._remove import silencing
from pyablate.network.sites import sites


def conv_bn(inputs: int, outputs: int, size: int, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


class Inverted(nn.Module):
    """Inverted residual with a squeeze-and-excitation gate and a linear bottleneck."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        wide = 4 * inputs
        self.residual = inputs == outputs
        self.expand = nn.Sequential(*conv_bn(inputs, wide, 1), nn.ReLU6(inplace=True))
        self.depthwise = nn.Sequential(*conv_bn(wide, wide, 3, groups=wide), nn.ReLU6(inplace=True))
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(wide, 3, 1),
            nn.ReLU(),
            nn.Conv2d(3, wide, 1),
            nn.Sigmoid(),
        )
        self.project = nn.Sequential(*conv_bn(wide, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.depthwise(self.expand(x))
        inner = self.project(inner * self.gate(inner))
        return x + inner if self.residual else inner


class Mobile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Inverted(3, 4), Inverted(4, 4), Inverted(4, 6))
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(x).mean((2, 3)))


class Dense(nn.Module):
    """Densely connected: batch norm and a functional ReLU before each convolution, flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(7)])
        self.convs = nn.ModuleList([nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(7, 3, 3, padding=1)])
        self.last = nn.BatchNorm2d(10)
        self.fc = nn.Linear(10 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(functional.relu(norm(x)))], 1)
        return self.fc(functional.max_pool2d(functional.relu(self.last(x)), 2).flatten(1))


class Grouped(nn.Module):
    """A convolution in groups between two others, and the classes as channels at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.grouped = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU())
        self.free = nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU())
        self.classes = nn.Sequential(nn.Conv2d(6, 5, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(self.free(self.grouped(self.first(x)))).mean((2, 3))


class Written(nn.Module):
    """A network with a size written into its code."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.fc = nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).reshape(-1, 144))


class Shifted(nn.Module):
    """An exponential makes of a silent channel what is not 0."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.exp(self.relu(self.conv(x))).mean((2, 3)))


def made(network: type[nn.Module], seed: int = 0) -> nn.Module:
    """With random weights, and batch norms that are not the identity."""
    torch.manual_seed(seed)
    model = network()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -1, 1)
    return model.eval()


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def silenced(model: nn.Module, pictures: Tensor, units: Sequence[str]) -> Tensor:
    """Logits of a network with some units at zero, all together."""
    with torch.no_grad(), silencing(model, sites(model, pictures[:1]), units):
        return model(pictures)
