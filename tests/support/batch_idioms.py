"""What networks do with the number of images of a batch, one idiom each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

CLASSES = 4


class Batches(nn.Module):
    """A convolution whose maps are made to six features in some way, and a head."""

    def __init__(self, between: Callable[[Batches, Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between
        self.conv, self.act = nn.Conv2d(1, 6, 3, padding=1), nn.ReLU()
        self.first = nn.Parameter(torch.randn(1, 1, 6))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self, self.act(self.conv(x))))


def network(between: Callable[[Batches, Tensor], Tensor]) -> Batches:
    """Build the network, with the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Batches(between).eval()
        nn.init.normal_(model.head.weight)
        return model


def data(count: int = 37) -> tuple[Tensor, Tensor]:
    """Images and labels, more of them than one chunk of 32."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(count, 1, 8, 8, generator=draw)
    images += 2 * torch.randn(count, 1, 1, 1, generator=draw)
    return images, torch.arange(count) % CLASSES


def _tokens(h: Tensor) -> Tensor:
    return h.flatten(2).transpose(1, 2)


def _token_of_each(n: Callable[[Tensor], int]) -> Callable[[Batches, Tensor], Tensor]:
    def between(_net: Batches, h: Tensor) -> Tensor:
        tokens = _tokens(h)
        return tokens[torch.arange(n(tokens)), tokens.sum(2).argmax(1)]

    return between


def _filled(_net: Batches, h: Tensor) -> Tensor:
    result = h.new_zeros(len(h), 6)
    result[:, :] = h.mean((2, 3))
    return result


def _two_halves(_net: Batches, h: Tensor) -> Tensor:
    first, second = h.chunk(2)
    return torch.cat([first, second]).mean((2, 3))


def _by_hand(_net: Batches, h: Tensor) -> Tensor:
    result = []
    for number in range(h.size(0)):
        result.append(h[number : number + 1].mean((2, 3)))
    return torch.cat(result)


def _masked(_net: Batches, h: Tensor) -> Tensor:
    features = h.mean((2, 3))
    return features[features.sum(1) > -1e9]


def _whole(h: Tensor) -> Tensor:
    return h.mean((2, 3))


CAPTURED: dict[str, Callable[[Batches, Tensor], Tensor]] = {
    "view_by_len": lambda _net, h: h.view(len(h), 6, -1).mean(2),
    "view_by_int": lambda _net, h: h.view(int(h.shape[0]), 6, -1).mean(2),
    "view_by_numpy": lambda _net, h: h.reshape(int(np.prod(h.shape[:1])), 6, -1).mean(2),
    "size_in_arithmetic": lambda _net, h: h.reshape(h.size(0) * 6, -1).mean(1).view(h.size(0), 6),
    "iterated": lambda _net, h: torch.stack([one.mean((1, 2)) for one in h]),
    "iterated_twice": lambda _net, h: torch.stack(
        [(a + b).mean((1, 2)) for a, b in zip(h, h, strict=True)]
    ),
    "unbound": lambda _net, h: torch.stack([one.mean((1, 2)) for one in h.unbind(0)]),
    "by_number": lambda _net, h: torch.stack([h[i].mean((1, 2)) for i in range(h.shape[0])]),
    "by_hand": _by_hand,
    "chunks_of_four": lambda _net, h: torch.cat(
        [_whole(h)[i : i + 4] for i in range(0, len(h), 4)]
    ),
    "arange_of_len": _token_of_each(len),
    "arange_of_size": _token_of_each(lambda h: h.shape[0]),
    "numbers_in_a_list": lambda _net, h: _tokens(h)[torch.arange(len(h)), [0] * len(h)],
    "zeros": lambda _net, h: torch.cat([torch.zeros(len(h), 1, 6), _tokens(h)], 1).mean(1),
    "filled": _filled,
    "class_token": lambda net, h: torch.cat([net.first.expand(len(h), -1, -1), _tokens(h)], 1).mean(
        1
    ),
    "class_token_repeated": lambda net, h: torch.cat(
        [net.first.repeat(len(h), 1, 1), _tokens(h)], 1
    ).mean(1),
    "positions": lambda _net, h: (
        _tokens(h) * torch.arange(64).expand(len(h), -1).unsqueeze(2).sin()
    ).mean(1),
    "split_of_32": lambda _net, h: torch.cat([_whole(part) for part in h.split(32)]),
    "one_or_several": lambda _net, h: _whole(h) if len(h) > 1 else _whole(h).clone(),
    "constant_item": lambda _net, h: _whole(h[:, :, : torch.tensor(3).item()]),
}
"""Captured, whatever the number of images."""

REPLAYED: dict[str, tuple[Callable[[Batches, Tensor], Tensor], str]] = {
    "two_halves": (_two_halves, "a number depends on the number of images at "),
    "item": (
        lambda _net, h: _whole(h) * (h.max().item() > -1e9),
        "a tensor's value becomes a number of Python at ",
    ),
    "sliced_by_item": (
        lambda _net, h: _whole(h[:, :, : (0 * h.sum() + 3).long().item()]),
        "a tensor's value becomes a number of Python at ",
    ),
    "weight_as_a_number": (
        lambda net, h: _whole(h) * net.first[0, 0, 0].abs().item(),
        "a tensor's value becomes a number of Python at ",
    ),
    "branch_on_values": (
        lambda _net, h: _whole(h) if (h > 1e9).any() else 2 * _whole(h),
        "torch.export: Could not guard on data-dependent expression .* at ",
    ),
    "size_as_a_float": (
        lambda _net, h: _whole(h) * h.size(0) ** 0.5 / h.size(0) ** 0.5,
        r"mul\w* \(aten.mul.Tensor\) mixes images or counts them at ",
    ),
    "masked_rows": (_masked, "a tensor's value becomes a number of Python at "),
    "through_numpy": (
        lambda _net, h: _whole(torch.from_numpy(h.detach().numpy())),
        r"torch.export: \.numpy\(\) is not supported for tensor subclasses.* at ",
    ),
}
"""Not captured, and what is said."""
