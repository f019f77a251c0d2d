"""Small networks, one per architecture family, that tests ablate.

Each takes 12x12 images (or a signal of 24 samples), has at most 16 channels and five classes, and
names three layers that hold units: an early, a middle and a late one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import pyablate as pa

CLASSES = 5

Operator = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Architecture:
    build: Callable[[], nn.Module]
    layers: tuple[str, str, str]
    shape: tuple[int, ...] = (2, 12, 12)
    exports: bool = True


def conv_bn(inputs: int, outputs: int, size: int = 3, **options: int) -> nn.Sequential:
    padding = options.pop("padding", size // 2)
    conv = nn.Conv2d(inputs, outputs, size, padding=padding, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Pooled(nn.Module):
    """Body, global average pooling, linear head."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(2).mean(dim=2))


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.inner = conv_bn(inputs, outputs, stride=stride)
        self.relu1 = nn.ReLU()
        self.outer = conv_bn(outputs, outputs)
        self.relu2 = nn.ReLU()
        self.project = conv_bn(inputs, outputs, 1, stride=stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.outer(self.relu1(self.inner(x)))
        return self.relu2(self.project(x) + y)


def residual() -> nn.Module:
    stem = (*conv_bn(2, 8), nn.ReLU())
    return Pooled(nn.Sequential(*stem, ResidualBlock(8, 8), ResidualBlock(8, 12, stride=2)), 12)


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(self.relu(self.norm(x)))], dim=1)


def dense() -> nn.Module:
    transition = (nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 6, 1), nn.AvgPool2d(2))
    body = (
        nn.Conv2d(2, 4, 3, padding=1),
        DenseLayer(4, 4),
        DenseLayer(8, 4),
        *transition,
        DenseLayer(6, 4),
        nn.BatchNorm2d(10),
        nn.ReLU(),
    )
    return Pooled(nn.Sequential(*body), 10)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, 4, 1)
        self.relu = nn.ReLU()
        self.expand = nn.Conv2d(4, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(self.relu(self.reduce(self.pool(x)))))


class InvertedResidual(nn.Module):
    def __init__(self, channels: int, hidden: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.expand = conv_bn(channels, hidden, 1)
        self.act1 = activation()
        self.depthwise = conv_bn(hidden, hidden, 5, groups=hidden)
        self.act2 = activation()
        self.excite = SqueezeExcite(hidden)
        self.project = conv_bn(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act2(self.depthwise(self.act1(self.expand(x))))
        return x + self.project(self.excite(y))


def inverted_residual() -> nn.Module:
    body = (
        *conv_bn(2, 6, stride=2),
        nn.Hardswish(),
        InvertedResidual(6, 12, nn.Hardswish),
        InvertedResidual(6, 12, nn.SiLU),
        *conv_bn(6, 14, 1),
        nn.SiLU(),
    )
    return Pooled(nn.Sequential(*body), 14)


class Inception(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.one = nn.Sequential(*conv_bn(inputs, 3, 1), nn.ReLU())
        self.three = nn.Sequential(*conv_bn(inputs, 4, 1), nn.ReLU(), *conv_bn(4, 4), nn.ReLU())
        self.five = nn.Sequential(*conv_bn(inputs, 3, 5), nn.ReLU())
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), *conv_bn(inputs, 2, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], dim=1)


def inception() -> nn.Module:
    stem = (nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    return Pooled(nn.Sequential(*stem, Inception(8), Inception(12)), 12)


class ShuffleBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.right = nn.Sequential(
            *conv_bn(half, half, 1), nn.ReLU(), *conv_bn(half, half, groups=half), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        y = torch.cat([left, self.right(right)], dim=1)
        images, channels, height, width = y.shape
        y = y.view(images, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return y.view(images, channels, height, width)


def shuffle() -> nn.Module:
    stem = (*conv_bn(2, 8, stride=2), nn.ReLU())
    end = (nn.Conv2d(8, 10, 1), nn.ReLU())
    return Pooled(nn.Sequential(*stem, ShuffleBlock(8), ShuffleBlock(8), *end), 10)


class ResponseNorm(nn.Module):
    """Global response normalisation of ConvNeXt V2, channels last."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        response = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        relative = response / (response.mean(dim=-1, keepdim=True) + 1e-6)
        return self.gamma * (x * relative) + self.beta + x


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up = nn.Linear(channels, 14)
        self.gelu = nn.GELU()
        self.response = ResponseNorm(14)
        self.down = nn.Linear(14, channels)
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(self.response(self.gelu(self.up(y))))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 2, stride=2)
        self.first = ConvNeXtBlock(8)
        self.second = ConvNeXtBlock(8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(self.stem(x)))
        return self.head(self.norm(y.mean(dim=(-2, -1))))


class GlobalContext(nn.Module):
    """Context block of GCNet: attention-pooled features, transformed, added everywhere."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attend = nn.Conv2d(channels, 1, 1)
        self.transform = nn.Sequential(
            nn.Linear(channels, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights = self.attend(x).flatten(2).softmax(dim=-1)
        context = torch.bmm(x.flatten(2), weights.transpose(1, 2)).squeeze(-1)
        return x + self.transform(context)[:, :, None, None]


def global_context() -> nn.Module:
    body = (
        nn.Conv2d(2, 8, 3, padding=1),
        nn.GELU(),
        GlobalContext(8),
        nn.Conv2d(8, 10, 3, stride=2, padding=1),
        nn.GELU(),
    )
    return Pooled(nn.Sequential(*body), 10)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        images, tokens, width = x.shape
        split = self.qkv(x).reshape(images, tokens, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(images, tokens, width))


class LibraryAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class TransformerBlock(nn.Module):
    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(8)
        self.attention = attention(8, 2)
        self.norm2 = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, 8, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.position = nn.Parameter(torch.zeros(1, 10, 8))
        self.blocks = nn.Sequential(*(TransformerBlock(attention) for _ in range(3)))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], dim=1) + self.position
        return self.head(self.norm(self.blocks(tokens))[:, 0])


def grouped_dilated() -> nn.Module:
    body = (
        nn.Conv2d(2, 8, 3, padding=2, dilation=2),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, groups=4),
        nn.LeakyReLU(0.2),
        nn.Conv2d(12, 8, (3, 5), stride=(1, 2), padding=(3, 0), dilation=(3, 1), groups=2),
        nn.PReLU(8),
    )
    return Pooled(nn.Sequential(*body), 8)


class Pooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.ELU(),
            nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False, ceil_mode=True),
            nn.Conv2d(8, 10, 2),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d((2, 1)),
        )
        self.head = nn.Linear(30, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        highest = functional.adaptive_max_pool2d(y, 1)
        return self.head(torch.cat([y.flatten(1), highest.flatten(1)], dim=1))


class Conv1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(3, 8, 5, padding=2)
        self.relu1 = nn.ReLU()
        self.pool = nn.MaxPool1d(2)
        self.conv2 = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv1d(8, 10, 3, stride=2)
        self.relu3 = nn.ReLU()
        self.average = nn.AvgPool1d(5)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.relu1(self.conv1(x)))
        y = self.relu3(self.conv3(self.relu2(self.norm(self.conv2(y)))))
        return self.head(self.average(y).flatten(1))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(2 * 12 * 12, 16),
        nn.ReLU(),
        nn.Linear(16, 12),
        nn.Sigmoid(),
        nn.Dropout(0.5),
        nn.Linear(12, 12),
        nn.ReLU6(),
        nn.Linear(12, CLASSES),
    )


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 8, 3, padding=1)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(8)
        self.act2 = nn.Hardswish(inplace=True)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.act3 = nn.ReLU6(inplace=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.conv1(x))
        y = self.act2(self.norm2(self.conv2(x)))
        y += x
        y = self.act3(self.conv3(y))
        y.mul_(0.5).add_(1.0)
        return self.head(y.mean(dim=(2, 3)))


class UsedTwice(nn.Module):
    """One convolution with weights and one activation object, each called at several places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.act = nn.ReLU()
        self.gelu = nn.GELU()
        self.mix = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.stem(x))
        y = self.act(self.conv(y))
        y = self.gelu(self.conv(functional.avg_pool2d(y, 2)) + 0.1)
        y = self.act(self.mix(y))
        return self.head(y.amax(dim=(2, 3)))


class FunctionalReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 10, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(10)
        self.conv3 = nn.Conv2d(10, 12, 3, padding=1)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        y = torch.relu(self.norm2(self.conv2(y)))
        y = self.conv3(y).relu()
        return self.head(functional.adaptive_avg_pool2d(y, 1).flatten(1))


def norm_after_relu() -> nn.Module:
    body: list[nn.Module] = []
    for inputs, outputs in ((2, 8), (8, 8), (8, 12)):
        body += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(outputs)]
    return Pooled(nn.Sequential(*body), 12)


class Between(nn.Module):
    """Convolution, ReLU, an operator, convolution, something else, mean, linear."""

    def __init__(self, operator: Operator | None = None, behind: Operator | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 8, 3, padding=1)
        self.relu = nn.ReLU()
        self.operator = operator or nn.Identity()
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.behind = behind or nn.Identity()
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.operator(self.relu(self.conv1(x))))
        return self.head(self.behind(y).mean(dim=(2, 3)))


class Routed(nn.Module):
    """What happens to an image depends on its values: no graph can hold that."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 8, 3, padding=1)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.relu3 = nn.ReLU()
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        turned = [image.flip(0) if bool(image[0].sum() > image[1].sum()) else image for image in y]
        z = self.relu3(self.conv3(torch.stack(turned)))
        return self.head(torch.cat([y, z], dim=1).mean(dim=(2, 3)))


class Guarded(nn.Module):
    """A check of the values that does nothing on sound images, and still defeats export."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 8, 3, padding=1)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(8, 8, 3)
        self.relu3 = nn.ReLU()
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.abs().max()) > 1e6:
            x = x.clamp(-1e6, 1e6)
        y = self.relu2(self.conv2(self.relu1(self.conv1(x))))
        return self.head(self.relu3(self.conv3(y)).amax(dim=(2, 3)))


ARCHITECTURES: dict[str, Architecture] = {
    "residual": Architecture(residual, ("body.2", "body.3.relu1", "body.4")),
    "dense": Architecture(dense, ("body.0", "body.2.relu", "body.8")),
    "inverted_residual": Architecture(inverted_residual, ("body.2", "body.3.act2", "body.7")),
    "inception": Architecture(inception, ("body.1", "body.3.three.2", "body.4")),
    "shuffle": Architecture(shuffle, ("body.2", "body.3.right.2", "body.4")),
    "convnext": Architecture(ConvNeXt, ("stem", "first.gelu", "second")),
    "global_context": Architecture(global_context, ("body.1", "body.2.transform.2", "body.4")),
    "vit": Architecture(lambda: ViT(Attention), ("blocks.0.mlp.1", "blocks.1", "blocks.2.mlp.1")),
    "vit_library": Architecture(
        lambda: ViT(LibraryAttention), ("blocks.0.mlp.1", "blocks.1.norm1", "blocks.2.mlp.1")
    ),
    "grouped_dilated": Architecture(grouped_dilated, ("body.1", "body.3", "body.5")),
    "pooling": Architecture(Pooling, ("features.1", "features.4", "features.7")),
    "conv1d": Architecture(Conv1d, ("relu1", "relu2", "relu3"), shape=(3, 24)),
    "mlp": Architecture(mlp, ("2", "4", "7")),
    "in_place": Architecture(InPlace, ("act1", "act2", "act3")),
    "used_twice": Architecture(UsedTwice, ("act@1", "conv", "act")),
    "functional_relu": Architecture(FunctionalReLU, ("conv1", "norm2", "conv3")),
    "norm_after_relu": Architecture(norm_after_relu, ("body.1", "body.4", "body.8")),
    "routed": Architecture(Routed, ("relu1", "relu2", "relu3"), exports=False),
    "guarded": Architecture(Guarded, ("relu1", "relu2", "relu3"), exports=False),
}


class Counting(TensorDataset):
    """A data set that knows which images were asked for."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__(*tensors)
        self.asked: list[int] = []

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        self.asked.append(index)
        return super().__getitem__(index)


@cache
def network(name: str, images: int = 24) -> tuple[nn.Module, Tensor, Tensor]:
    """A network in evaluation mode with random weights, random images and random labels."""
    architecture = ARCHITECTURES[name]
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(images, *architecture.shape, generator=generator)
    # Images that differ as a whole are classified differently, which noise alone is not.
    spread = (images, architecture.shape[0], *[1] * (len(architecture.shape) - 1))
    x = x + torch.randn(spread, generator=generator)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    model = made(architecture.build(), x)
    model.known_as = name
    return model, x, labels


def made(model: nn.Module, images: Tensor) -> nn.Module:
    """Give a network random weights whose logits tell the classes of these images apart."""
    randomise(model, seed=1)
    spread_logits(model, images)
    return model.eval()


def outputs(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """What a module puts out, called once."""
    held: list[Tensor] = []
    module = model.get_submodule(layer)
    handle = module.register_forward_hook(lambda _m, _i, output: held.append(output.clone()))
    with torch.no_grad():
        model(images)
    handle.remove()
    return held[0]


def on_inputs(weight: Tensor, bias: Tensor) -> nn.Module:
    """The units' outputs are the images' own numbers; a linear layer reads them."""
    head = nn.Linear(weight.shape[1], weight.shape[0])
    head.load_state_dict({"weight": weight, "bias": bias})
    return nn.Sequential(OrderedDict(units=nn.ReLU(), head=head)).eval()


@cache
def demo(name: str, limit: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A shipped network and the first images, for tests that leave them as they are."""
    model, images, labels = pa.demo.load(name, limit=limit)
    model.known_as = name
    return model, images, labels


def randomise(model: nn.Module, seed: int) -> None:
    """Random weights of a trained network's scale, batch norm with signs and statistics."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, scale: float, centre: float = 0.0) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale + centre)

    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
                is_norm = isinstance(module, nn.LayerNorm | nn.modules.batchnorm._BatchNorm)
                if name == "weight" and is_norm:
                    # Of both signs, and none so small that its channel is dead.
                    normal(parameter, 0.5)
                    parameter += 0.5 * torch.where(parameter < 0, -1, 1)
                elif isinstance(module, nn.PReLU):
                    normal(parameter, 0.2, 0.2)
                elif fan_in > 1 and module.__class__ is not ViT:
                    normal(parameter, (2 / fan_in) ** 0.5)
                else:
                    normal(parameter, 0.5)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                normal(module.running_mean, 0.3)
                module.running_var.copy_(
                    torch.rand(module.running_var.shape, generator=generator) + 0.5
                )


def spread_logits(model: nn.Module, images: Tensor) -> None:
    """Rescale the last linear layer so that every class has a chance on these images.

    Logits that are constant up to rounding stay: centred and scaled they would be noise. So would
    those of a last layer whose units are all at their means, if classes were not a little apart.
    """
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    model.eval()
    with torch.no_grad():
        logits = model(images)
        spread = logits.std(dim=0)
        alive = spread > 1e-4 * logits.abs().amax(dim=0)
        scale = torch.where(alive, spread, 1.0)
        last.bias.sub_(torch.where(alive, logits.mean(dim=0), 0.0)).div_(scale)
        last.bias.add_(torch.linspace(-0.1, 0.1, len(scale)).to(last.bias))
        last.weight.div_(scale.unsqueeze(1))
