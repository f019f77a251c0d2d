"""Small networks, one idiom each, as people write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Idiom:
    """A network, and what is to be found in it.

    Attributes
    ----------
    build : callable
        Makes it, the same weights every time.
    units : str
        Layers with their numbers of units, as the test says.
    left_out : str
        Modules whose weights make units that are in no chosen layer.
    shape : tuple of int
        Of one image.
    """

    build: Callable[[], nn.Module]
    units: str
    left_out: str = ""
    shape: tuple[int, ...] = (1, 8, 8)


class Between(nn.Module):
    """Two convolutions with the same thing behind each, and a head."""

    def __init__(self, between: Callable[[Tensor], Tensor], *, halves: bool = False) -> None:
        super().__init__()
        self.between = between
        width = 2 if halves else 1
        self.conv1 = nn.Conv2d(1, 6 * width, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 10 * width, 3, padding=1)
        self.fc = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.conv1(x))
        x = self.between(self.conv2(x))
        return self.fc(x.mean((2, 3)))


class FunctionalNorm(nn.Module):
    """Batch norm as a function of buffers."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.relu) -> None:
        super().__init__()
        self.act = act
        self.conv = nn.Conv2d(1, 6, 3)
        self.register_buffer("mean", 0.3 * torch.randn(6))
        self.register_buffer("var", torch.rand(6) + 0.5)
        self.scale, self.shift = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(self.conv(x), self.mean, self.var, self.scale, self.shift)
        return self.fc(self.act(x).amax((2, 3)))


class InlineResidual(nn.Module):
    """A residual sum in the network's own forward."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.relu, *, in_place: bool = False) -> None:
        super().__init__()
        self.act, self.in_place = act, in_place
        self.conv1, self.bn1 = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv3 = nn.Conv2d(6, 5, 3)
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(h))
        if self.in_place:
            y += h
            y.relu_()
        else:
            y = self.act(y + h)
        return self.fc(F.relu(self.conv3(y)).mean((2, 3)))


class QuickGELU(nn.Module):
    """An activation module of someone's own."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Padded(nn.Conv2d):
    """A convolution that keeps its padding in a module."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.pad = nn.ZeroPad2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.pad(x))


class OwnLinear(nn.Linear):
    """A subclass that does what its parent does."""


class Mlp(nn.Module):
    """Tokens through an MLP, in a residual block."""

    def __init__(self, width: int, hidden: int, act: nn.Module) -> None:
        super().__init__()
        self.norm, self.fc1 = nn.LayerNorm(width), OwnLinear(width, hidden)
        self.act, self.keep, self.fc2 = act, nn.Identity(), OwnLinear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.keep(self.act(self.fc1(self.norm(x)))))


class MixedMlp(nn.Module):
    """The MLP of PVT v2 and SegFormer: a depthwise convolution among the hidden units."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        side = int(h.shape[1] ** 0.5)
        h = h.transpose(1, 2).unflatten(2, (side, side))
        h = self.dwconv(h).flatten(2).transpose(1, 2)
        return x + self.fc2(self.act(h))


class Gated(nn.Module):
    """The MLP of language models: one half gates the other."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.w2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.w2(F.silu(self.w1(x)) * self.w3(x))


class Attention(nn.Module):
    """Self-attention with one map for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5).softmax(-1)
        return x + self.proj((weights @ v).transpose(1, 2).reshape(n, length, width))


class ThreeMaps(nn.Module):
    """Attention of the library's function, or of matrix products, on maps of their own."""

    def __init__(self, width: int, heads: int, *, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = heads, fused
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.stay, self.proj = nn.Identity(), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        v, q, k = (
            one(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for one in (self.v, self.q, self.k)
        )
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            weights = torch.einsum("bhlk,bhtk->bhlt", q, k).softmax(-1)
            mixed = torch.einsum("bhlt,bhtv->bhlv", weights, v)
        return x + self.proj(self.stay(mixed.transpose(1, 2).flatten(2)))


class TorchBlock(nn.Module):
    """The library's attention, with its weights asked for or not."""

    def __init__(self, width: int, heads: int, *, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=self.need_weights)[0]


class Windows(Attention):
    """Attention within windows that are folded into the batch, as in Swin."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__(width, heads)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        side, w = int(length**0.5), self.window
        x = x.view(n, side // w, w, side // w, w, width).permute(0, 1, 3, 2, 4, 5)
        x = super().forward(x.reshape(-1, w * w, width))
        x = x.view(-1, side // w, side // w, w, w, width).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(n, length, width)


class ChannelAttention(Attention):
    """The attention of XCiT: features attend to features."""

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 4, 1)
        q, k, v = qkv.unbind(0)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        mixed = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return x + self.proj(mixed.permute(0, 3, 1, 2).reshape(n, length, width))


class Tuples(nn.Module):
    """A block that returns its sum among other things, and reads such a tuple."""

    def __init__(self, width: int, heads: int, *, windows: bool = False) -> None:
        super().__init__()
        self.attention = Windows(width, heads, 2) if windows else Attention(width, heads)
        self.mlp = Mlp(width, 24, nn.GELU())

    def forward(self, x: Tensor | tuple[Tensor, Tensor, int]) -> tuple[Tensor, Tensor, int]:
        x = x[0] if isinstance(x, tuple) else x
        y = self.mlp(self.attention(x))
        return 0.5 * y, x.mean(-1), y.shape[1]


class Two(nn.Module):
    """A block with two streams, as in TNT and CoaT."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = Mlp(width, 24, nn.GELU()), Mlp(width, 20, nn.GELU())

    def forward(self, x: tuple[Tensor, Tensor]) -> list[Tensor]:
        one, two = x
        return [0.5 * self.one(one), self.two(two) + one]


class Both(nn.Module):
    """The same tensor twice."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.flip(1)


class Last(nn.Module):
    """Takes the tensor out of a tuple."""

    def forward(self, x: tuple[Tensor, ...]) -> Tensor:
        return torch.cat(list(x[:2]), 2) if x[1].ndim == x[0].ndim else x[0]


class WindowedMlp(Mlp):
    """An MLP on windows that are folded into the batch."""

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        return super().forward(x.reshape(n * 4, length // 4, width)).reshape(n, length, width)


class Mixer(nn.Module):
    """The block of an MLP mixer: tokens mix, then features."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.tokens1, self.tokens2 = nn.Linear(tokens, 11), nn.Linear(11, tokens)
        self.act1, self.act2 = nn.GELU(), nn.GELU()
        self.fc1, self.fc2 = nn.Linear(width, 14), nn.Linear(14, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens2(self.act1(self.tokens1(x.transpose(1, 2)))).transpose(1, 2)
        return x + self.fc2(self.act2(self.fc1(x)))


class Tokens(nn.Module):
    """Patches of an image as tokens, blocks, and the mean of the tokens classified."""

    def __init__(
        self, *blocks: nn.Module, width: int = 16, patch: int = 2, sequence_first: bool = False
    ) -> None:
        super().__init__()
        self.sequence_first = sequence_first
        self.patches = nn.Conv2d(1, width, patch, patch)
        self.stay = nn.Identity()
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(blocks)
        self.fc = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stay(self.patches(x).flatten(2).transpose(1, 2)))
        x = x.transpose(0, 1) if self.sequence_first else x
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean(0 if self.sequence_first else 1))


class ChannelsLast(nn.Module):
    """A cube of a map, channels last, as many of them as rows and columns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.norm, self.fc1, self.act = nn.RMSNorm(8), OwnLinear(8, 8), QuickGELU()
        self.stay, self.back = nn.Identity(), nn.Identity()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stay(self.conv(x).permute(0, 2, 3, 1))
        x = self.act(self.fc1(self.norm(x)))
        return self.fc(self.back(x.permute(0, 3, 1, 2)).mean((2, 3)))


class Words(nn.Module):
    """An embedding of pixel values as words."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.stay = nn.Embedding(5, 16), nn.Identity()
        self.fc1, self.fc = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        words = self.embedding((2 * x).long().clamp(0, 4).flatten(1)[:, :16])
        return self.fc(torch.tanh(self.fc1(self.stay(words))).amax(1))


class Bare(nn.Module):
    """A convolution whose weights are the module's own, under another class."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(outside, inside, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1)


def made(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Make the network with weights that are the same every time."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = make()
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.normal_(module.running_mean, 0.0, 0.3)
                    nn.init.uniform_(module.running_var, 0.5, 1.5)
                    nn.init.normal_(module.bias, 0.0, 0.3)
        return model.eval()

    return build


def _between(function: Callable[[Tensor], Tensor], units: str = "conv1:6 conv2:10") -> Idiom:
    return Idiom(made(lambda: Between(function, halves="." in units)), units)


IDIOMS: dict[str, Idiom] = {
    "relu_of_max_pool": _between(lambda x: F.relu(F.max_pool2d(x, 2))),
    "relu_of_avg_pool": _between(lambda x: F.relu(F.avg_pool2d(x, 2))),
    "clamp": _between(lambda x: x.clamp(min=0)),
    "masked": _between(lambda x: x * (x > 0)),
    "where": _between(lambda x: torch.where(x > 0, x, torch.zeros_like(x))),
    "maximum": _between(lambda x: torch.maximum(x, torch.zeros(()).to(x))),
    "threshold": _between(lambda x: F.threshold(x, 0.1, 0.0)),
    "hard_swish": _between(lambda x: x * F.relu6(x + 3) / 6),
    "quick_gelu": _between(lambda x: x * torch.sigmoid(1.702 * x)),
    "swish": _between(lambda x: x * x.sigmoid()),
    "sin": _between(torch.sin),
    "softsign": _between(F.softsign),
    "logsigmoid": _between(F.logsigmoid),
    "square": _between(lambda x: x.relu() ** 2),
    "tanh_shrink": _between(lambda x: x - x.tanh()),
    "glu": _between(lambda x: F.glu(x, dim=1), "conv1.glu:6 conv2.glu:10"),
    "glu_by_hand": _between(
        lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1].sigmoid(), "conv1.mul:6 conv2.mul:10"
    ),
    "functional_norm": Idiom(made(FunctionalNorm), "conv.relu:6"),
    "inline_residual": Idiom(made(InlineResidual), "bn1:6 bn2.relu:6 conv3:5"),
    "inline_residual_in_place": Idiom(
        made(lambda: InlineResidual(in_place=True)), "bn1:6 bn2.relu:6 conv3:5"
    ),
    "own_activation": Idiom(
        made(
            lambda: nn.Sequential(
                nn.Conv2d(1, 6, 3),
                QuickGELU(),
                nn.Flatten(2),
                nn.AdaptiveAvgPool1d(1),
                nn.Flatten(),
                nn.Linear(6, 4),
            )
        ),
        "1:6",
    ),
    "padding_inside": Idiom(
        made(
            lambda: nn.Sequential(
                Padded(1, 6, 3),
                nn.BatchNorm2d(6),
                nn.ReLU(),
                Padded(6, 5, 3),
                nn.BatchNorm2d(5),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(5, 4),
            )
        ),
        "2:6 5:5",
    ),
    "bare_weights": Idiom(
        made(
            lambda: nn.Sequential(
                Bare(1, 6),
                nn.BatchNorm2d(6),
                QuickGELU(),
                Bare(6, 5),
                QuickGELU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(5, 4),
            )
        ),
        "2:6 4:5",
    ),
    "no_nonlinearity": Idiom(
        made(
            lambda: nn.Sequential(
                nn.Conv2d(1, 6, 3),
                nn.Conv2d(6, 5, 3),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(5, 4),
            )
        ),
        "2:5",
        left_out="0",
    ),
    "vit": Idiom(
        made(lambda: Tokens(Attention(16, 2), Mlp(16, 24, QuickGELU()))),
        "blocks.0:16 blocks.1.act:24 blocks.1:16",
        left_out="blocks.0.qkv",
    ),
    "xcit": Idiom(
        made(lambda: Tokens(ChannelAttention(16, 2), Mlp(16, 24, nn.GELU()))),
        "blocks.0:16 blocks.1.act:24 blocks.1:16",
        left_out="blocks.0.qkv",
    ),
    "pvt_v2": Idiom(
        made(lambda: Tokens(MixedMlp(16, 24))),
        "blocks.0.act:24 blocks.0:16",
    ),
    "tuples": Idiom(
        made(lambda: Tokens(Tuples(16, 2), Tuples(16, 2, windows=True), Last())),
        "blocks.0.attention:16 blocks.0.mlp.act:24 blocks.0.mlp:16 blocks.0:16 "
        "blocks.1.attention:16 blocks.1.mlp.act:24 blocks.1.mlp:16 blocks.1:16",
        left_out="blocks.0.attention.qkv blocks.1.attention.qkv",
    ),
    "two_streams": Idiom(
        made(lambda: Tokens(Both(), Two(16), Two(16), Last(), nn.Linear(32, 16))),
        "blocks.1.one.act:24 blocks.1.one:16 blocks.1.two.act:20 blocks.1.two:16 blocks.1:16 "
        "blocks.1(2):16 blocks.2.one.act:24 blocks.2.one:16 blocks.2.two.act:20 blocks.2.two:16 "
        "blocks.2:16 blocks.2(2):16",
        left_out="blocks.4",
    ),
    "windows": Idiom(
        made(lambda: Tokens(WindowedMlp(16, 24, nn.GELU()))),
        "blocks.0.act:24 blocks.0:16",
    ),
    "tokens_first": Idiom(
        made(lambda: Tokens(Mlp(16, 24, nn.GELU()), sequence_first=True)),
        "blocks.0.act:24 blocks.0:16",
    ),
    "gated": Idiom(
        made(lambda: Tokens(Gated(16, 24))),
        "blocks.0.w1:24 blocks.0:16",
    ),
    "mixer": Idiom(
        made(lambda: Tokens(Mixer(16, 16))),
        "blocks.0.act1:11 blocks.0.act2:14 blocks.0:16",
    ),
    "channels_last": Idiom(made(ChannelsLast), "act:8", left_out="conv"),
    "words": Idiom(made(Words), "fc1:16", left_out="embedding"),
}
"""What ``"*"`` selects, with the number of units, and what is left."""

MAPS: dict[str, Idiom] = {
    "patches": Idiom(
        made(lambda: Tokens(Attention(16, 2), Mlp(16, 24, QuickGELU()))),
        "patches:16@1 stay:16@2 norm:16@2 blocks.0.qkv:48@2 blocks.0.proj:16@2 blocks.0:16@2 "
        "blocks.1.fc1:24@2 blocks.1.act:24@2 blocks.1.keep:24@2 blocks.1:16@2",
    ),
    "xcit": Idiom(
        made(lambda: Tokens(ChannelAttention(16, 2))), "blocks.0.proj:16@2 blocks.0:16@2"
    ),
    "three_maps": Idiom(
        made(lambda: Tokens(ThreeMaps(16, 2, fused=True), ThreeMaps(16, 4, fused=False))),
        "blocks.0.v:16@2 blocks.0.stay:16@2 blocks.0:16@2 blocks.1.stay:16@2 blocks.1:16@2",
    ),
    "pvt_v2": Idiom(
        made(lambda: Tokens(MixedMlp(16, 24))),
        "blocks.0.fc1:24@2 blocks.0.dwconv:24@1 blocks.0.act:24@2 blocks.0:16@2",
    ),
    "windows": Idiom(
        made(lambda: Tokens(WindowedMlp(16, 24, nn.GELU()))),
        "blocks.0.norm:16@3 blocks.0.fc1:24@3 blocks.0.act:24@3 blocks.0:16@2",
    ),
    "tokens_first": Idiom(
        made(lambda: Tokens(Mlp(16, 24, nn.GELU()), sequence_first=True)),
        "blocks.0.norm:16@2 blocks.0.fc1:24@2 blocks.0.act:24@2 blocks.0:16@2",
    ),
    "tuples": Idiom(made(lambda: Tokens(Tuples(16, 2), Last())), "blocks.0:16@2"),
    "mixer": Idiom(
        made(lambda: Tokens(Mixer(16, 16))),
        "blocks.0.tokens1:11@2 blocks.0.act1:11@2 blocks.0.act2:14@2 blocks.0:16@2",
    ),
    "channels_last": Idiom(
        made(ChannelsLast), "conv:8@1 stay:8@3 norm:8@3 fc1:8@3 act:8@3 back:8@1"
    ),
    "words": Idiom(made(Words), "embedding:16@2 stay:16@2 fc1:16@2"),
}
"""Layers with their numbers of units and axes, batch included."""
