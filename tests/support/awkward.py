"""Operators and images on which networks compute in ways that small errors do not survive.

Each operator maps a tensor ``[N, C, ...]`` to one of the same shape and acts on each image alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

Function = Callable[[Tensor], Tensor]

NAN = float("nan")


def _per_image(values: Tensor, x: Tensor) -> Tensor:
    """Values ``[N]`` that go with every element of ``x``."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def _smallest(x: Tensor, share: float) -> Tensor:
    """Smallest of the largest ``share`` of the elements of each image."""
    flat = x.flatten(1)
    place = max(1, int((1 - share) * flat.shape[1]))
    return _per_image(flat.kthvalue(place, dim=1).values, x)


def _winners(x: Tensor, share: float) -> Tensor:
    """Keep the largest elements of each image, those that ``topk`` names."""
    flat = x.flatten(1)
    where = flat.topk(max(1, int(share * flat.shape[1])), dim=1).indices
    return (flat * torch.zeros_like(flat).scatter(1, where, 1.0)).view_as(x)


def _one_hot(x: Tensor) -> Tensor:
    channels = x.shape[1]
    return functional.one_hot(x.argmax(dim=1), channels).movedim(-1, 1).to(x.dtype)


def _gumbel_hard(x: Tensor) -> Tensor:
    soft = x.softmax(dim=1)
    return _one_hot(x) - soft.detach() + soft


def _nanmean(x: Tensor) -> Tensor:
    positive = torch.where(x > 0, x, NAN)
    return x + _per_image(positive.flatten(1).nanmean(dim=1).nan_to_num(0.5), x)


def _masked_mean(x: Tensor) -> Tensor:
    """Mean of what is positive among each channel and its mirror image."""
    mask, mirrored = (x > 0).to(x.dtype), (x > 0).to(x.dtype).flip(1)
    mean = (x * mask + x.flip(1) * mirrored) / (mask + mirrored)
    return mean.nan_to_num(0.25)


def _share(x: Tensor) -> Tensor:
    x = x.relu()
    return torch.nan_to_num(x / (x + x.flip(1)))


def _share_of_all(x: Tensor) -> Tensor:
    x = x.relu()
    return 3.0 * torch.nan_to_num(x / _per_image(x.flatten(1).sum(dim=1), x))


def _four_bits(x: Tensor) -> Tensor:
    """Round to 15 steps of the image's own range."""
    step = _per_image(x.flatten(1).abs().amax(dim=1), x).clamp(min=1e-6) / 7
    return (x / step).round() * step


def _attend_hard(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    return x + _per_image(((50.0 * flat).softmax(dim=1) * flat).sum(dim=1), x)


def _peaks(x: Tensor) -> Tensor:
    if x.ndim != 4:
        return x * (x == x.amax(dim=1, keepdim=True))
    return x * (x == functional.max_pool2d(x, 3, 1, 1))


def _unpooled(x: Tensor) -> Tensor:
    if x.ndim != 4 or min(x.shape[2:]) < 2:
        return x
    pooled, where = functional.max_pool2d(x, 2, return_indices=True)
    return functional.max_unpool2d(pooled, where, 2, output_size=x.shape[2:])


def _as_volumes(x: Tensor, pool: nn.Module) -> Tensor:
    if x.ndim != 4:
        return x
    return pool(functional.pad(x, (0, 1, 0, 1)).unsqueeze(2)).squeeze(2)


SWALLOWED: Mapping[str, Function] = {
    "nanmean": _nanmean,
    "masked mean": _masked_mean,
    "share of two": _share,
    "share of all": _share_of_all,
    "logarithm of nothing": lambda x: x.relu().log().nan_to_num(neginf=-4.0),
    "clamped reciprocal": lambda x: x.relu().reciprocal().clamp(max=3.0),
    "softmax of nothing": lambda x: (
        x.masked_fill(x <= 0, -torch.inf).softmax(dim=1).nan_to_num(0.0)
    ),
}
"""NaN and infinity that later operators make numbers of."""

COMPARISONS: Mapping[str, Function] = {
    "peaks": _peaks,
    "above kth": lambda x: x * (x >= _smallest(x, 0.25)),
    "largest by kth": lambda x: x * (x >= _smallest(x, 0.0)),
    "less kth": lambda x: x - _smallest(x, 0.4),
    "all but the largest": lambda x: x.masked_fill(x < x.amax(dim=1, keepdim=True), 0.0),
    "where equal": lambda x: torch.where(x == x.amax(dim=1, keepdim=True), x + 1.0, 0.3 * x),
    "where both are nothing": lambda x: torch.where(x.relu() == x.relu().flip(1), 0.3, x + 0.5),
    "sorted": lambda x: x.sort(dim=1).values,
    "ranks": lambda x: x.argsort(dim=1, stable=True).argsort(dim=1).to(x.dtype) / x.shape[1],
    "where the largest is": lambda x: x + x.argmax(dim=1, keepdim=True) / x.shape[1],
}
"""Values that are compared with others of the same tensor, equal ones among them."""

JUMPS: Mapping[str, Function] = {
    "winners": lambda x: _winners(x, 0.3),
    "one hot": _one_hot,
    "gumbel hard": _gumbel_hard,
    "step": lambda x: (x > 0).to(x.dtype),
    "jump": lambda x: torch.where(x > 0.2, x + 1.0, x),
    "sign": torch.sign,
    "floor": lambda x: (2.0 * x).floor() / 2.0,
    "rounding": lambda x: (4.0 * x).round() / 4.0,
    "four bits": _four_bits,
    "fake quantisation": lambda x: torch.fake_quantize_per_tensor_affine(x, 0.25, 0, -8, 7),
}
"""A small change of the input may make a large one of the output."""

STEEP: Mapping[str, Function] = {
    "gate": lambda x: x * torch.sigmoid(1000.0 * x.flip(1)),
    "hard tanh": lambda x: (1000.0 * x).clamp(-1.0, 1.0),
    "tanh": lambda x: torch.tanh(1000.0 * x),
    "hard attention": _attend_hard,
    "hard softmax": lambda x: (50.0 * x).softmax(dim=1),
}
"""Nearly jumps."""

CONTINUOUS: Mapping[str, Function] = {
    "times positive": lambda x: x * (x > 0),
    "where positive": lambda x: torch.where(x > 0, x, 0.2 * x),
    "unpooled": _unpooled,
}
"""Comparisons that choose between values which are equal where the choice changes."""

RARE: Mapping[str, Function] = {
    "AvgPool3d": lambda x: _as_volumes(x, nn.AvgPool3d((1, 2, 2), stride=1)),
    "LPPool3d": lambda x: _as_volumes(x, nn.LPPool3d(2, (1, 2, 2), stride=1)),
}
"""Operators that PyTorch lacks in bfloat16."""

OPERATORS: Mapping[str, Mapping[str, Function]] = {
    "swallowed": SWALLOWED,
    "comparison": COMPARISONS,
    "jump": JUMPS,
    "steep": STEEP,
    "continuous": CONTINUOUS,
    "rare": RARE,
}


class Codebook(nn.Module):
    """Vector quantisation: the nearest of some codes stands in for each ``[N, C, ...]`` vector."""

    def __init__(self, channels: int, codes: int = 8) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(channels)
        self.codes = nn.Parameter(torch.randn(codes, channels, generator=draw))

    def forward(self, x: Tensor) -> Tensor:
        vectors = x.movedim(1, -1)
        apart = (vectors.unsqueeze(-2) - self.codes).square().sum(dim=-1)
        return self.codes[apart.argmin(dim=-1)].movedim(-1, 1)


# --- behind the head: logits [N, K] to logits [N, K] ------------------------------------------


def _minority(z: Tensor) -> Tensor:
    """The second class, and every fourth from there on."""
    return torch.arange(z.shape[1], device=z.device) % 4 == 1


def _majority(z: Tensor) -> Tensor:
    """All but the first two classes."""
    return torch.arange(z.shape[1], device=z.device) > 1


def _masked(value: str, mask: Function) -> Function:
    if value == "finfo.min":  # of the precision in which the network runs
        return lambda z: z.masked_fill(mask(z), torch.finfo(z.dtype).min)
    return lambda z: z.masked_fill(mask(z), float(value))


LARGE = ("-1e4", "-1e9", "-1e38", "finfo.min", "-inf")

ENDS: Mapping[str, Function] = {
    **{f"masked {value}": _masked(value, _minority) for value in LARGE},
    **{f"mostly masked {value}": _masked(value, _majority) for value in LARGE},
    "additive mask": lambda z: z + -1e9 * _minority(z).to(z.dtype),
    "additive mask -1e4": lambda z: z + -1e4 * _majority(z).to(z.dtype),
    "masked, log_softmax": lambda z: z.masked_fill(_minority(z), -1e9).log_softmax(dim=1),
    "masked -inf, softmax": lambda z: z.masked_fill(_minority(z), -torch.inf).softmax(dim=1),
    "offset 1e4": lambda z: z + 1e4,
    "offset 1e6": lambda z: z + 1e6,
    "offset by image": lambda z: z + 1e4 * z.sum(dim=1, keepdim=True),
    "softmax": lambda z: (100.0 * z).softmax(dim=1),
    "log_softmax": lambda z: z.log_softmax(dim=1),
}
"""What networks do to their logits."""


# --- images -----------------------------------------------------------------------------------


def _low_contrast(x: Tensor) -> Tensor:
    return 0.5 + 1e-3 * x


REGIMES: Mapping[str, Function] = {
    "low contrast": _low_contrast,
    "offset": lambda x: x + 1e4,
    "dark": torch.zeros_like,
    "large": lambda x: 100.0 * x,
    "sparse": lambda x: x * (x > 1.5),
    "steps": lambda x: (2.0 * x).round() / 2.0,
}
"""Kinds of image, made from usual ones ``[N, ...]``."""


def mixed(images: Tensor, kind: str, order: str) -> Tensor:
    """Make images of a kind: ``all``, those from a quarter on (``later``), or 3 % (``rare``)."""
    other = REGIMES[kind](images)
    number = torch.arange(len(images))
    if order == "later":
        chosen = number >= min(256, len(images) // 4)
    elif order == "rare":
        chosen = torch.rand(len(images), generator=torch.Generator().manual_seed(3)) < 0.03
    else:
        chosen = number >= 0
    return torch.where(_per_image(chosen, images), other, images)
