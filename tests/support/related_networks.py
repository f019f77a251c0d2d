"""Networks of related systems, as their papers define them, small and with random weights.

All take 12x12 images of two channels (``time_series`` signals of 24 samples) and tell five classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from support.networks import CLASSES, Pooled, conv_bn, made, spread_logits


class WideBlock(nn.Module):
    """Pre-activated block B(3, 3): what is activated feeds the branch and a projected shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(inputs), nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(outputs), nn.ReLU()
        self.dropout = nn.Dropout(0.3)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.norm1(x))
        y = self.conv2(self.dropout(self.relu2(self.norm2(self.conv1(active)))))
        return y + (x if self.shortcut is None else self.shortcut(active))


def wide_resnet(k: int = 2) -> nn.Module:
    """A group of two blocks, ``k`` times as wide as the first convolution."""
    stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
    blocks = (WideBlock(4, 4 * k, 2), WideBlock(4 * k, 4 * k, 1))
    return Pooled(nn.Sequential(stem, *blocks, nn.BatchNorm2d(4 * k), nn.ReLU()), 4 * k)


class GhostModule(nn.Module):
    """Few maps by a convolution, as many more by a cheap depthwise one, the first of them kept."""

    def __init__(self, inputs: int, outputs: int, *, relu: bool) -> None:
        super().__init__()
        few = (outputs + 1) // 2
        self.outputs = outputs
        self.primary = nn.Sequential(*conv_bn(inputs, few, 1), *[nn.ReLU()] * relu)
        self.cheap = nn.Sequential(*conv_bn(few, few, groups=few), *[nn.ReLU()] * relu)

    def forward(self, x: Tensor) -> Tensor:
        primary = self.primary(x)
        return torch.cat([primary, self.cheap(primary)], dim=1)[:, : self.outputs]


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = functional.relu(self.reduce(x.mean(dim=(2, 3), keepdim=True)))
        return x * functional.hardsigmoid(self.expand(squeezed))


class GhostBottleneck(nn.Module):
    """Two ghost modules, the second without activation, and a shortcut around them."""

    def __init__(self, inputs: int, hidden: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.expand = GhostModule(inputs, hidden, relu=True)
        self.reduce: nn.Module = nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.reduce = conv_bn(hidden, hidden, stride=stride, groups=hidden)
            self.shortcut = nn.Sequential(
                conv_bn(inputs, inputs, stride=stride, groups=inputs), conv_bn(inputs, outputs, 1)
            )
        self.excite = SqueezeExcite(hidden)
        self.project = GhostModule(hidden, outputs, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.excite(self.reduce(self.expand(x)))) + self.shortcut(x)


def c_ghostnet() -> nn.Module:
    stem = (*conv_bn(2, 6), nn.ReLU())
    return Pooled(nn.Sequential(*stem, GhostBottleneck(6, 9, 12, 2)), 12)


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.relu = conv_bn(inputs, outputs, stride=stride), nn.ReLU()
        self.conv2 = conv_bn(outputs, outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else conv_bn(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.conv2(self.relu(self.conv1(x))) + self.shortcut(x))


class GhostStage(nn.Module):
    """A stage whose blocks make some channels; the others come from its first block, cheaply.

    To these what all blocks know is added: their maps' means through a linear map (*mix*).
    """

    def __init__(self, inputs: int, outputs: int, ghosts: int, blocks: int = 3) -> None:
        super().__init__()
        made = outputs - ghosts
        self.first = ResidualBlock(inputs, outputs, 2)
        self.blocks = nn.ModuleList([ResidualBlock(made, made) for _ in range(blocks - 1)])
        self.cheap = nn.Sequential(*conv_bn(outputs, ghosts, 1))
        self.mix = nn.Linear(made * (blocks - 1), ghosts)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        y = first[:, : first.shape[1] - self.mix.out_features]
        seen = []
        for block in self.blocks:
            y = block(y)
            seen.append(y.mean(dim=(2, 3)))
        mixed = self.mix(torch.cat(seen, dim=1))[:, :, None, None]
        return torch.cat([y, functional.relu(self.cheap(first) + mixed)], dim=1)


def g_ghostnet() -> nn.Module:
    stem = (*conv_bn(2, 6), nn.ReLU())
    return Pooled(nn.Sequential(*stem, GhostStage(6, 10, 4)), 10)


def orthogonality_loss(weight: Tensor, stride: int) -> Tensor:
    """Squared distance of the rows of the doubly block-Toeplitz matrix from orthonormal ones."""
    padding = (weight.shape[-1] - 1) // stride * stride
    gram = functional.conv2d(weight, weight, stride=stride, padding=padding)
    middle = gram.shape[-1] // 2
    target = torch.zeros_like(gram)
    target[:, :, middle, middle] = torch.eye(len(weight), dtype=gram.dtype)
    return (gram - target).square().sum()


def trained_orthogonal(model: nn.Module) -> None:
    """Take steps down the loss alone."""
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    steps = torch.optim.SGD([conv.weight for conv in convs], lr=0.02)
    for _ in range(30):
        steps.zero_grad()
        torch.stack([orthogonality_loss(c.weight, c.stride[0]) for c in convs]).sum().backward()
        steps.step()


def orthogonal_resnet() -> nn.Module:
    return Pooled(nn.Sequential(*conv_bn(2, 8), nn.ReLU(), ResidualBlock(8, 12, 2)), 12)


class CoConv(nn.Module):
    """Contextual convolution: at each level some of the kernels, with a dilation of their own."""

    def __init__(self, inputs: int, levels: tuple[int, ...], stride: int = 1) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.Conv2d(inputs, size, 3, stride, padding=d, dilation=d, bias=False)
            for d, size in enumerate(levels, start=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([level(x) for level in self.levels], dim=1)


class CoBottleneck(nn.Module):
    """The bottleneck of a residual network with CoConv in the middle."""

    def __init__(self, inputs: int, levels: tuple[int, ...], outputs: int, stride: int) -> None:
        super().__init__()
        width = sum(levels)
        self.reduce, self.relu1 = conv_bn(inputs, width, 1), nn.ReLU()
        self.context = nn.Sequential(CoConv(width, levels, stride), nn.BatchNorm2d(width))
        self.relu2, self.expand = nn.ReLU(), conv_bn(width, outputs, 1)
        self.shortcut = conv_bn(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu2(self.context(self.relu1(self.reduce(x))))
        return functional.relu(self.expand(y) + self.shortcut(x))


def coconv() -> nn.Module:
    block = CoBottleneck(6, (4, 2, 1, 1), 12, 2)
    return Pooled(nn.Sequential(*conv_bn(2, 6), nn.ReLU(), block), 12)


class RepGraph(nn.Module):
    """Non-local layer whose nodes each look at few others, at learned offsets from themselves."""

    def __init__(self, channels: int, inner: int, samples: int) -> None:
        super().__init__()
        self.samples = samples
        self.offset = nn.Conv2d(channels, 2 * samples, 3, padding=1)
        self.query, self.key = nn.Conv2d(channels, inner, 1), nn.Conv2d(channels, inner, 1)
        self.value, self.out = nn.Conv2d(channels, inner, 1), conv_bn(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        offset = self.offset(x).unflatten(1, (self.samples, 2)).flatten(3)  # [N, S, (x, y), L]
        row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        here = torch.stack([column, row]).flatten(1).to(x)
        size = torch.tensor([[width], [height]]).to(x)
        grid = ((here + offset + 0.5) * (2 / size) - 1).permute(0, 3, 1, 2)  # [N, L, S, (x, y)]
        key, value = (
            functional.grid_sample(one(x), grid, align_corners=False)  # [N, C, L, S]
            for one in (self.key, self.value)
        )
        query = self.query(x).flatten(2)
        affinity = torch.einsum("ncl,ncls->nls", query, key).softmax(dim=2)
        looked_at = torch.einsum("nls,ncls->ncl", affinity, value)
        return x + self.out(looked_at.unflatten(2, (height, width)))


def repgraph() -> nn.Module:
    first = (*conv_bn(2, 8, stride=2), nn.ReLU(), RepGraph(8, 4, 5))
    return Pooled(nn.Sequential(*first, *conv_bn(8, 12), nn.ReLU()), 12)


class DACNN(nn.Module):
    """One kernel, the anchor, for every layer behind the first; each layer has its own batch norm.

    Layers of ``own`` have kernels of their own beside it (DACNN-mix).
    """

    def __init__(self, depth: int, own: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.first = nn.Sequential(*conv_bn(2, 8), nn.ReLU())
        self.anchor = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.mine = own
        self.own = nn.ModuleDict(
            {str(layer): nn.Conv2d(8, 8, 3, padding=1, bias=False) for layer in own}
        )
        self.norms = nn.ModuleList([nn.BatchNorm2d(8) for _ in range(depth)])
        self.relu = nn.ReLU()
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer, norm in enumerate(self.norms):
            kernel = self.own[str(layer)] if layer in self.mine else self.anchor
            x = self.relu(norm(kernel(x)))
            if layer == 1:
                x = functional.max_pool2d(x, 2)
        return self.head(x.mean(dim=(2, 3)))


class TimeSeriesBlock(nn.Module):
    """Convolutions of 8, 5 and 3 samples beside a projected shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        sizes = zip((inputs, outputs, outputs), (8, 5, 3), strict=True)
        parts: list[nn.Module] = []
        for before, size in sizes:
            conv = nn.Conv1d(before, outputs, size, padding="same", bias=False)
            parts += [conv, nn.BatchNorm1d(outputs), nn.ReLU()]
        self.body = nn.Sequential(*parts[:-1])
        shortcut = nn.Conv1d(inputs, outputs, 1, bias=False)
        self.shortcut = nn.Sequential(shortcut, nn.BatchNorm1d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.body(x) + self.shortcut(x))


def time_series() -> nn.Module:
    return Pooled(nn.Sequential(TimeSeriesBlock(3, 6), TimeSeriesBlock(6, 10)), 10)


class MultiLabel(nn.Module):
    """A probability for each label, whatever the others are."""

    def __init__(self) -> None:
        super().__init__()
        body = (*conv_bn(2, 8), nn.ReLU(), ResidualBlock(8, 12, 2))
        self.scores = Pooled(nn.Sequential(*body), 12)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.scores(x))


@dataclass(frozen=True)
class Related:
    """A network, and what is to be found in it.

    Attributes
    ----------
    build : callable
        Makes it.
    units : str
        What ``"*"`` selects: layers with their numbers of units.
    left_out : str
        Modules whose weights make units that are in none of these.
    shape : tuple of int
        Of one image.
    """

    build: Callable[[], nn.Module]
    units: str
    left_out: str = ""
    shape: tuple[int, ...] = (2, 12, 12)


RELATED: dict[str, Related] = {
    "wide_resnet": Related(
        wide_resnet,
        "body.1.relu1:4 body.1.relu2:8 body.1:8 body.2.relu1:8 body.2.relu2:8 body.2:8 body.4:8",
    ),
    "c_ghostnet": Related(
        c_ghostnet,
        "body.2:6 body.3.expand.primary.2:5 body.3.expand.cheap.2:5 body.3.expand:9 "
        "body.3.excite.reduce:4 body.3.excite.expand:9 body.3.excite:9 body.3.project:12 body.3:12",
        left_out="body.3.shortcut.0.0",
    ),
    "g_ghostnet": Related(
        g_ghostnet,
        "body.2:6 body.3.first.relu:10 body.3.first:10 body.3.blocks.0.relu:6 body.3.blocks.0:6 "
        "body.3.blocks.1.relu:6 body.3.blocks.1:6 body.3:10",
    ),
    "orthogonal_resnet": Related(orthogonal_resnet, "body.2:8 body.3.relu:12 body.3:12"),
    "coconv": Related(
        coconv, "body.2:6 body.3.relu1:8 body.3.context.0:8 body.3.relu2:8 body.3:12"
    ),
    "repgraph": Related(
        repgraph,
        "body.2:8 body.3:8 body.6:12",
        left_out="body.3.offset body.3.key body.3.value body.3.query",
    ),
    "dacnn": Related(lambda: DACNN(4), "first.2:8 relu@1:8 relu@2:8 relu@3:8 relu@4:8"),
    "dacnn_mix": Related(
        lambda: DACNN(4, own=(1, 3)), "first.2:8 relu@1:8 relu@2:8 relu@3:8 relu@4:8"
    ),
    "time_series": Related(
        time_series,
        "body.0.body.2:6 body.0.body.5:6 body.0:6 body.1.body.2:10 body.1.body.5:10 body.1:10",
        shape=(3, 24),
    ),
    "multi_label": Related(MultiLabel, "scores.body.2:8 scores.body.3.relu:12 scores.body.3:12"),
}


@cache
def related(name: str, images: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    """A network in evaluation mode with random weights, random images and random labels."""
    one = RELATED[name]
    draw = torch.Generator().manual_seed(7)
    x = torch.randn(images, *one.shape, generator=draw)
    x += torch.randn(images, one.shape[0], *[1] * (len(one.shape) - 1), generator=draw)
    model = one.build()
    made(getattr(model, "scores", model), x)  # of probabilities, the logits are to be spread
    if name == "orthogonal_resnet":
        trained_orthogonal(model)
        spread_logits(model, x)
    model.known_as = name
    return model.eval(), x, torch.arange(images) % 3
