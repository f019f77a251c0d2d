"""Networks and images of the study: families that differ in one thing, several seeds of each."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from paper import glyphs
from paper.glyph_network import GlyphNet
from pyablate import demo

FOLDER = Path(__file__).parent / "networks"
TEST_PER_CLASS = 100  # images of a class of the glyphs
LETTERS = tuple(glyphs.GLYPHS)


@dataclass(frozen=True)
class Family:
    """Networks that were trained alike but for their seed.

    Attributes
    ----------
    name : str
        As in the names of the weights' files.
    title : str
        In the document's words.
    build : callable
        Makes the network, untrained.
    top : str
        Its last map, the layer that curves and rotations look at.
    """

    name: str
    title: str
    build: Callable[[], nn.Module]
    top: str

    @property
    def reads_glyphs(self) -> bool:
        """Whether the images are the rendered characters."""
        return self.build is GlyphNet


def _shipped(name: str) -> Callable[[], nn.Module]:
    return functools.partial(demo.build, name)


FAMILIES = {
    family.name: family
    for family in (
        Family("alexnet", "plain", _shipped("alexnet"), "features.11"),
        Family("alexnet_dropout", "dropout", _shipped("alexnet_dropout"), "features.11"),
        Family("alexnet_bn", "batch norm", _shipped("alexnet_bn"), "features.16"),
        Family("vgg_bn", "VGG-like", _shipped("vgg_bn"), "features.16"),
        Family("resnet", "residual", _shipped("resnet"), "stage3.1.relu2"),
        Family("glyphs", "residual, glyphs", GlyphNet, "stage3.1.relu2"),
    )
}


@dataclass(frozen=True)
class Network:
    """One trained network: a family and the seed of its training."""

    family: Family
    seed: int

    @property
    def name(self) -> str:
        """As ``alexnet-0``."""
        return f"{self.family.name}-{self.seed}"

    @property
    def weights(self) -> Path:
        """File of the weights."""
        if self.seed == 0 and not self.family.reads_glyphs:
            shipped = resources.files("pyablate") / "demo" / "networks"
            return Path(str(shipped)) / f"{self.family.name}.safetensors"
        return FOLDER / f"{self.name}.safetensors"

    @property
    def digest(self) -> str:
        """SHA-256 of the weights' file."""
        return hashlib.sha256(self.weights.read_bytes()).hexdigest()

    def training(self) -> dict[str, object]:
        """How it was trained, as its file says: ``epochs``, ``accuracy`` and more."""
        import json

        with safe_open(self.weights, "pt") as file:
            known: dict[str, object] = json.loads(file.metadata()["training"])
            return known

    def model(self) -> nn.Module:
        """Return the trained network in evaluation mode, float32."""
        model = self.family.build()
        model.load_state_dict(load_file(self.weights))
        return model.eval()

    def images(self, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """Return `limit` test images and labels, classes balanced; by default all."""
        every = _glyph_images() if self.family.reads_glyphs else demo.images()
        return balanced(*every, limit)

    @property
    def class_names(self) -> tuple[str, ...]:
        """One per class."""
        return LETTERS if self.family.reads_glyphs else demo.CLASSES


def known(families: tuple[str, ...] = tuple(FAMILIES)) -> list[Network]:
    """Return all networks of these families whose weights are there, seeds ascending."""
    found = [Network(FAMILIES[name], seed) for name in families for seed in range(10)]
    return [network for network in found if network.weights.exists()]


def balanced(images: Tensor, labels: Tensor, limit: int | None) -> tuple[Tensor, Tensor]:
    """Return the first images of each class, as many of each as `limit` allows, in their order."""
    if limit is None or limit >= len(labels):
        return images, labels
    each = max(1, limit // int(labels.max() + 1))
    counted = nn.functional.one_hot(labels).cumsum(0)[torch.arange(len(labels)), labels]
    chosen = torch.from_numpy(np.flatnonzero(counted.numpy() <= each))
    return images[chosen], labels[chosen]


@functools.cache
def _glyph_images() -> tuple[Tensor, Tensor]:
    return glyphs.images(TEST_PER_CLASS)
