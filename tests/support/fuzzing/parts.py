"""Parts of random networks, as plain values whose ``repr`` is the code that makes them.

Each part fits itself to the shape it is given, so that any list of parts is a network: counts are
taken modulo what is possible, and what would leave nothing is left out. Shapes are those of one
image: ``(C, H, W)`` for maps, ``(L, C)`` for tokens, ``(F,)`` for vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from support import awkward, networks

Shape = tuple[int, ...]


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parts)


def shape_after(module: nn.Module, shape: Shape) -> Shape:
    module.eval()
    with torch.no_grad():
        return tuple(module(torch.zeros(2, *shape)).shape[1:])


def divisor(number: int, choice: int) -> int:
    """One of the divisors of a number."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return divisors[choice % len(divisors)]


def chain(parts: Sequence[Part], shape: Shape) -> tuple[nn.Sequential, Shape]:
    built = nn.Sequential()
    for part in parts:
        module = part.build(shape)
        if module is not None:
            built.append(module)
            shape = shape_after(module, shape)
    return built, shape


@dataclass(frozen=True)
class Part:
    def build(self, shape: Shape) -> nn.Module | None:
        """Return the module, or None where it does not fit the shape."""
        raise NotImplementedError


@dataclass(frozen=True)
class Conv(Part):
    out: int = 4
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 0
    bias: bool = True
    mode: str = "zeros"

    def build(self, shape: Shape) -> nn.Module | None:
        if len(shape) != 3:
            return None
        padding = self.padding
        if padding == "same":
            return self._conv(shape, stride=(1, 1), mode="zeros")
        sizes = [
            size + 2 * pad - step * (width - 1)
            for size, pad, step, width in zip(
                shape[1:], padding, self.dilation, self.kernel, strict=True
            )
        ]
        if min(sizes) < 1:
            return None
        wraps = any(pad >= size for pad, size in zip(padding, shape[1:], strict=True))
        return self._conv(shape, stride=self.stride, mode="zeros" if wraps else self.mode)

    def _conv(self, shape: Shape, stride: tuple[int, int], mode: str) -> nn.Module:
        groups = divisor(math.gcd(shape[0], self.out), self.groups)
        return nn.Conv2d(
            shape[0],
            self.out,
            self.kernel,
            stride,
            self.padding,
            self.dilation,
            groups,
            self.bias,
            mode,
        )


@dataclass(frozen=True)
class Depthwise(Part):
    kernel: int = 3
    stride: int = 1
    times: int = 1

    def build(self, shape: Shape) -> nn.Module | None:
        if len(shape) != 3:
            return None
        c = shape[0]
        padding = self.kernel // 2
        return nn.Conv2d(c, c * self.times, self.kernel, self.stride, padding, groups=c)


@dataclass(frozen=True)
class Transposed(Part):
    out: int = 3
    stride: int = 2

    def build(self, shape: Shape) -> nn.Module | None:
        small = len(shape) == 3 and max(shape[1:]) <= 8
        return nn.ConvTranspose2d(shape[0], self.out, 3, self.stride, 1) if small else None


@dataclass(frozen=True)
class Pad(Part):
    """Left, right, top, bottom."""

    margins: tuple[int, int, int, int] = (0, 1, 0, 1)
    mode: str = "constant"
    value: float = 0.0

    def build(self, shape: Shape) -> nn.Module | None:
        if len(shape) != 3:
            return None
        left, right, top, bottom = self.margins
        fits = max(left, right) < shape[2] and max(top, bottom) < shape[1]
        mode = self.mode if fits else "constant"
        value = self.value if mode == "constant" else None
        return Apply(lambda x: functional.pad(x, self.margins, mode, value))


@dataclass(frozen=True)
class Norm(Part):
    kind: str = "batch"
    groups: int = 0

    def build(self, shape: Shape) -> nn.Module | None:
        if len(shape) == 1:
            return nn.BatchNorm1d(shape[0]) if self.kind == "batch" else nn.LayerNorm(shape[0])
        if len(shape) == 2:
            return nn.LayerNorm(shape[1])
        c, positions = shape[0], math.prod(shape[1:])
        if self.kind == "group" and positions * c > 1:
            return nn.GroupNorm(divisor(c, self.groups), c) if positions > 1 else nn.GroupNorm(1, c)
        if self.kind == "instance" and positions > 1:
            return nn.InstanceNorm2d(c, affine=True)
        if self.kind == "layer" and c > 1:
            norm = nn.LayerNorm(c)
            return Apply(lambda x, norm: norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm)
        if self.kind == "local":
            return nn.LocalResponseNorm(3)
        return nn.BatchNorm2d(c)


@dataclass(frozen=True)
class Act(Part):
    name: str = "ReLU"
    inplace: bool = False

    def build(self, shape: Shape) -> nn.Module | None:
        if self.name == "PReLU":
            return nn.PReLU(shape[0] if len(shape) == 3 else 1)
        if self.name == "softmax":
            return nn.Softmax(dim=1)
        if self.name.islower():  # a function in the network's own code
            return Apply(getattr(torch, self.name, None) or getattr(functional, self.name))
        kind = getattr(nn, self.name)
        takes = self.inplace and self.name in ("ReLU", "ReLU6", "SiLU", "Hardswish", "ELU")
        return kind(inplace=True) if takes else kind()


@dataclass(frozen=True)
class Pool(Part):
    kind: str = "max"
    kernel: int = 2
    stride: int = 2
    padding: int = 0
    ceil: bool = False
    dilation: int = 1
    count_pad: bool = True

    def build(self, shape: Shape) -> nn.Module | None:
        if len(shape) != 3:
            return None
        sizes = shape[1:]
        if self.kind == "adaptive_average":
            return nn.AdaptiveAvgPool2d((min(self.kernel, sizes[0]), 1))
        if self.kind == "adaptive_max":
            return nn.AdaptiveMaxPool2d((1, min(self.kernel, sizes[1])))
        padding = 0 if self.kind == "lp" else min(self.padding, self.kernel // 2)
        reach = (self.kernel - 1) * (self.dilation if self.kind == "max" else 1) + 1
        if min(sizes) + 2 * padding < reach:
            return None
        if self.kind == "max":
            return nn.MaxPool2d(
                self.kernel, self.stride, padding, self.dilation, ceil_mode=self.ceil
            )
        if self.kind == "average":
            return nn.AvgPool2d(self.kernel, self.stride, padding, self.ceil, self.count_pad)
        return nn.LPPool2d(2, self.kernel, self.stride)


@dataclass(frozen=True)
class Linear(Part):
    out: int = 5
    bias: bool = True

    def build(self, shape: Shape) -> nn.Module | None:
        if len(shape) == 3:
            return None
        return nn.Linear(shape[-1], self.out, self.bias)


@dataclass(frozen=True)
class Residual(Part):
    """``x + f(x)``, through a projection where shapes differ."""

    inner: tuple[Part, ...] = ()
    operation: str = "add"

    def build(self, shape: Shape) -> nn.Module | None:
        body, after = chain(self.inner, shape)
        skip: nn.Module = nn.Identity()
        if after != shape:
            if len(after) != 3 or len(shape) != 3:
                return body if len(body) else None
            pooled = nn.AdaptiveAvgPool2d(after[1:])
            skip = nn.Sequential(pooled, nn.Conv2d(shape[0], after[0], 1))
        operation = getattr(torch, self.operation)
        return Apply(lambda x, body, skip: operation(skip(x), body(x)), body, skip)


@dataclass(frozen=True)
class Branches(Part):
    """Concatenation of what several parts make of the same tensor."""

    parts: tuple[tuple[Part, ...], ...] = ()

    def build(self, shape: Shape) -> nn.Module | None:
        if len(shape) != 3 or not self.parts:
            return None
        bodies, shapes = zip(*(chain(part, shape) for part in self.parts), strict=True)
        if any(len(after) != 3 for after in shapes):
            return None
        size = tuple(min(after[i] for after in shapes) for i in (1, 2))

        def join(x: Tensor, *parts: nn.Module) -> Tensor:
            return torch.cat([functional.adaptive_avg_pool2d(p(x), size) for p in parts], dim=1)

        return Apply(join, *bodies)


@dataclass(frozen=True)
class Gate(Part):
    """Squeeze and excitation, or a gate of the same size."""

    kind: str = "channel"
    activation: str = "Sigmoid"

    def build(self, shape: Shape) -> nn.Module | None:
        if len(shape) != 3:
            features = shape[-1]
            gate = nn.Sequential(nn.Linear(features, features), getattr(nn, self.activation)())
            return Apply(lambda x, gate: x * gate(x), gate)
        c = shape[0]
        gate = nn.Sequential(
            nn.Conv2d(c, 2, 1), nn.ReLU(), nn.Conv2d(2, c, 1), getattr(nn, self.activation)()
        )
        if self.kind == "channel":
            gate.insert(0, nn.AdaptiveAvgPool2d(1))
        if self.kind == "scalar":
            return Apply(lambda x, gate: x * gate(x).mean(dim=(1, 2, 3), keepdim=True), gate)
        if self.kind == "divide":
            return Apply(lambda x, gate: x / (1.5 + gate(x).abs()), gate)
        return Apply(lambda x, gate: x * gate(x), gate)


@dataclass(frozen=True)
class Shuffle(Part):
    """Reorderings and changes of shape that keep every value."""

    kind: str = "channels"
    groups: int = 1

    def build(self, shape: Shape) -> nn.Module | None:
        if len(shape) == 2:
            return Apply(lambda x: x.flip(1).contiguous())
        if len(shape) == 1:
            return Apply(lambda x: torch.roll(x, 1, dims=1))
        c, h, w = shape
        g = divisor(c, self.groups)
        makers: dict[str, Callable[[Tensor], Tensor]] = {
            "channels": lambda x: (
                x.view(x.shape[0], g, c // g, h, w).transpose(1, 2).reshape(x.shape)
            ),
            "flip": lambda x: x.flip(1, 3),
            "roll": lambda x: torch.roll(x, (1, 1), dims=(1, 2)),
            "transpose": lambda x: x.transpose(2, 3),
            "rows": lambda x: x.transpose(1, 2),
            "slice": lambda x: torch.cat([x[:, c // 2 :], x[:, : c // 2]], dim=1),
            "split": lambda x: torch.cat(torch.split(x, g, dim=1)[::-1], dim=1),
            "upsample": lambda x: functional.interpolate(x, scale_factor=2),
            "bilinear": lambda x: functional.interpolate(x, (h + 1, w), mode="bilinear"),
            "stack": lambda x: torch.stack([x, -x], dim=2).flatten(1, 2),
            "expand": lambda x: x.mean(dim=1, keepdim=True).expand(-1, c, -1, -1) + x,
            "crop": lambda x: x[:, :, : max(1, h - 1), w // 3 :],
        }
        return Apply(makers[self.kind])


@dataclass(frozen=True)
class Arithmetic(Part):
    """What networks do in their own code."""

    kind: str = "scale"

    def build(self, shape: Shape) -> nn.Module | None:
        makers: dict[str, Callable[[Tensor], Tensor]] = {
            "scale": lambda x: 0.5 * x + 0.25,
            "square": lambda x: x * x * 0.3,
            "abs": lambda x: x.abs() - 0.5,
            "clamp": lambda x: x.clamp(-1.0, 2.0),
            "power": lambda x: (x.square() + 1e-2).sqrt(),
            "difference": lambda x: x - x.mean(dim=1, keepdim=True),
            "normalise": lambda x: functional.normalize(x, dim=1),
            "negative": lambda x: 1.0 - x,
            "maximum": lambda x: torch.maximum(x, -0.3 * x.flip(1)),
            "where": lambda x: torch.where(x > 0, x, 0.2 * x),
            "mask": lambda x: x * (x > -0.5).float(),
            "logsumexp": lambda x: x + x.logsumexp(dim=1, keepdim=True),
            "standard": lambda x: (
                (x - x.mean(1, True)) / (x.std(1, keepdim=True, correction=0) + 1)
            ),
            "tensor_split": lambda x: torch.cat(list(reversed(x.chunk(2, dim=1))), dim=1),
            "inplace": lambda x: (x + 0.0).mul_(0.7).add_(0.1).relu_(),
        }
        return Apply(makers[self.kind])


@dataclass(frozen=True)
class Awkward(Part):
    """An operator that small errors do not survive, or one that a precision lacks."""

    kind: str = "jump"
    name: str = "step"

    def build(self, shape: Shape) -> nn.Module | None:
        if self.name == "codebook":
            return awkward.Codebook(shape[0])
        return Apply(awkward.OPERATORS[self.kind][self.name])


@dataclass(frozen=True)
class Outlier(Part):
    """One channel is far larger than the others, for a while or for good."""

    factor: float = 1000.0
    restored: bool = False
    inner: tuple[Part, ...] = ()

    def build(self, shape: Shape) -> nn.Module | None:
        def scaled(x: Tensor, factor: float) -> Tensor:
            return torch.cat([factor * x[:, :1], x[:, 1:]], dim=1)

        inner, after = chain(self.inner, shape)
        last = 1 / self.factor if self.restored and after == shape else 1.0
        return Apply(lambda x, inner: scaled(inner(scaled(x, self.factor)), last), inner)


@dataclass(frozen=True)
class Attention(Part):
    heads: int = 1
    library: bool = False

    def build(self, shape: Shape) -> nn.Module | None:
        if len(shape) != 2:
            return None
        width = shape[1]
        heads = divisor(width, self.heads)
        if self.library:
            attention = nn.MultiheadAttention(width, heads, batch_first=True)
            return Apply(lambda x, a: x + a(x, x, x, need_weights=False)[0], attention)

        def attend(x: Tensor, qkv: nn.Module, out: nn.Module) -> Tensor:
            n, tokens, _ = x.shape
            q, k, v = qkv(x).reshape(n, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
            scores = (q @ k.transpose(-2, -1)) * (width // heads) ** -0.5
            y = scores.softmax(dim=-1) @ v
            return x + out(y.transpose(1, 2).reshape(n, tokens, width))

        return Apply(attend, nn.Linear(width, 3 * width), nn.Linear(width, width))


@dataclass(frozen=True)
class AsTokens(Part):
    """Positions become tokens for a while."""

    inner: tuple[Part, ...] = ()

    def build(self, shape: Shape) -> nn.Module | None:
        if len(shape) != 3 or math.prod(shape[1:]) > 64:
            return None
        height, width = shape[1:]
        inner, after = chain(self.inner, (height * width, shape[0]))
        if len(after) != 2 or after[0] != height * width:
            return None

        def run(x: Tensor, inner: nn.Module) -> Tensor:
            y = inner(x.flatten(2).transpose(1, 2))
            return y.transpose(1, 2).unflatten(2, (height, width))

        return Apply(run, inner)


@dataclass(frozen=True)
class Repeat(Part):
    """The same weights several times, where the shape allows it."""

    inner: tuple[Part, ...] = ()
    times: int = 2

    def build(self, shape: Shape) -> nn.Module | None:
        inner, after = chain(self.inner, shape)
        times = self.times if after == shape else 1

        def run(x: Tensor, inner: nn.Module) -> Tensor:
            for _ in range(times):
                x = inner(x)
            return x

        return Apply(run, inner) if len(inner) else None


@dataclass(frozen=True)
class Network:
    """A whole classifier."""

    parts: tuple[Part, ...] = ()
    shape: Shape = (2, 6, 6)
    classes: int = 3
    head: str = "average"
    hidden: int = 0
    shared_activations: bool = False
    behind: str = ""
    outlier_weights: bool = False
    seed: int = 0

    def parts_within(self) -> list[Part]:
        """All parts, those inside others too."""
        return list(_flattened(self.parts))

    def finish(self, model: nn.Module) -> None:
        """Do what comes behind the choice of weights and the scaling of the head."""
        if self.behind:
            model.add_module("behind", Apply(awkward.ENDS[self.behind]))

    def randomise(self, model: nn.Module) -> None:
        """Give it random weights."""
        networks.randomise(model, seed=self.seed)
        for weight in model.parameters() if self.outlier_weights else ():
            with torch.no_grad():
                weight.view(-1)[self.seed % weight.numel()] *= 100.0

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        body, shape = chain(self.parts, self.shape)
        while math.prod(shape) > 600:
            body.append(nn.AvgPool2d(2))
            shape = shape_after(body[-1], shape)
        model = nn.Sequential()
        model.add_module("body", body)
        model.add_module("end", self._end(shape))
        features = shape_after(model, self.shape)[0]
        if self.hidden:
            model.add_module("hidden", nn.Linear(features, self.hidden))
            model.add_module("act", nn.ReLU())
            features = self.hidden
        model.add_module("head", nn.Linear(features, self.classes))
        if self.shared_activations:
            _share_activations(model)
        return model.eval()

    def _end(self, shape: Shape) -> nn.Module:
        if len(shape) == 1:
            return nn.Identity()
        axes = (2, 3) if len(shape) == 3 else (1,)
        ends: dict[str, Callable[[Tensor], Tensor]] = {
            "average": lambda x: x.mean(dim=axes),
            "maximum": lambda x: x.amax(dim=axes),
            "flatten": lambda x: x.flatten(1),
            "both": lambda x: torch.cat([x.mean(dim=axes), x.amax(dim=axes)], dim=1),
            "sum": lambda x: x.sum(dim=axes).div(4.0),
            "first": lambda x: x[:, 0].flatten(1) if len(shape) == 2 else x[:, :, 0, 0],
        }
        if self.head == "flatten_module":
            return nn.Flatten()
        if self.head == "pool_module" and len(shape) == 3:
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return Apply(ends.get(self.head, ends["average"]))


def _flattened(parts: Sequence[Any]) -> Iterator[Part]:
    for part in parts:
        if isinstance(part, tuple):
            yield from _flattened(part)
        else:
            yield part
            yield from _flattened(getattr(part, "inner", ()))
            yield from _flattened(getattr(part, "parts", ()))


def _share_activations(model: nn.Module) -> None:
    """Let one object be all the activations of its kind."""
    first: dict[type, nn.Module] = {}
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__module__.endswith("activation") and not list(child.parameters()):
                module._modules[name] = first.setdefault(type(child), child)
