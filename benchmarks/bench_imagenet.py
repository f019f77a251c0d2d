"""Networks of ImageNet's size from their pixels on: three layers each, and whole networks.

EfficientNet-Lite0 and 2 have their ImageNet weights; those of timm are drawn (`timm_networks.py`).
Images are crops of photographs. All units would take hours, so some are ablated, at even distances,
on so many images that the pairs outweigh what a layer costs once (measuring its error bounds).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from measure import Job, Settings, compare, floor
from rivals import Cached, Hooks, spread
from subjects import LITE_SIZES, cut, efficientnet_lite, photograph_crops
from timm_networks import random_classifier
from torch import Tensor, nn

import pyablate as pa
from pyablate.network.capture_memory import same_network

LAYERS = {
    "EfficientNet-Lite0": ("blocks.2", "blocks.8", "blocks.13._swish@1", "head.2"),
    "EfficientNet-Lite2": ("blocks.3", "blocks.12", "blocks.20._swish@1"),
    "resnet18": ("layer1.0.act1", "layer2.1.act1", "layer4.0.act1"),
    "resnet50": ("layer1.1.act2", "layer3.0.act2", "layer4.1.act1"),
    "mobilenetv3_small_100": ("blocks.1.1.bn1.act", "blocks.3.1.bn1.act", "blocks.4.2"),
    "convnext_atto": tuple(f"stages.{stage}.blocks.1.mlp.act" for stage in (0, 2, 3)),
    "deit_tiny_patch16_224": tuple(f"blocks.{block}.mlp.act" for block in (1, 6, 10)),
}
"""Early, middle and late ones, and one that is decided in closed form."""

FIRST = 4
"""Images of the run that tells how many there is time for."""

AUDIT = 16
"""Pairs: a float64 pass of such a network is slow. One round, since its capture is slow too."""

SECONDS = 25
"""Times as long as a small network's layer may take, where ``--seconds`` cuts images off."""

COMPILED = {"blocks.8", "layer2.1.act1"}
"""Layers for which `cached` tries to compile, which takes half a minute or more."""

UNITS, IMAGES = (32, 64, 128, 1280), (16, 32, 48, 48)
"""Of each of these layers, at most: as many more as they are later and cost less."""

IMAGES_ON_GPU = 64
"""With all units of a layer: what keeps a GPU busy. Of whole networks half as many."""

UNITS_OF_ALL = {
    "EfficientNet-Lite2": Hooks.units_timed * 251,
    "resnet50": Hooks.units_timed * 67,
    "convnext_atto": Hooks.units_timed * 251,
    "deit_tiny_patch16_224": Hooks.units_timed * 167,
}
"""Of whole networks, of the others all. Odd multiples: the units that `hooks` times are among them.
With fewer of each layer no low precision pays."""

IMAGES_OF_ALL = 2


@dataclass(frozen=True)
class Subject:
    """A network and its images."""

    model: nn.Module
    images: Tensor

    def job(self, labels: list[str], images: int) -> Job:
        # On a GPU the first run is as large as the others, since it prepares for numbers of pairs.
        first = images if self.images.is_cuda else FIRST
        return Job(self.model, self.images[:images], labels, audit=AUDIT, first=first)


@functools.lru_cache(maxsize=1)
def subject(network: str, device: str) -> Subject:
    """Make a network and its images; only the last one is kept."""
    size = LITE_SIZES[int(network[-1])] if network.startswith("EfficientNet") else 224
    try:
        images = photograph_crops(IMAGES_ON_GPU if on_gpu(device) else max(IMAGES), size)
        model = classifier(network, images)
    except ImportError as error:
        pytest.skip(f"{error}; make bench installs it")
    return Subject(model.to(device), images.to(device))


def classifier(network: str, images: Tensor) -> nn.Module:
    """Make a network by its name; one of timm is drawn for these images."""
    if network.startswith("EfficientNet-Lite"):
        return efficientnet_lite(int(network[-1]))
    return random_classifier(network, images)


def on_gpu(device: str) -> bool:
    return device.startswith("cuda")


@pytest.mark.parametrize(
    ("network", "layer", "most", "images"),
    [
        (network, layer, most, images)
        for network, layers in LAYERS.items()
        for layer, most, images in zip(layers, UNITS, IMAGES, strict=False)
    ],
    ids=str,
)
def test_layer(
    benchmark: Any, settings: Settings, network: str, layer: str, most: int, images: int
) -> None:
    found = subject(network, settings.device)
    (site,) = pa.select(pa.sites(found.model, found.images[:1]), layer)
    rounds = 1
    if on_gpu(settings.device):
        most, images, rounds = site.channels, IMAGES_ON_GPU, settings.rounds
    units = spread(site.channels, most)
    labels = [site.label(unit) for unit in units]
    job = found.job(labels, images)

    def rivals(count: int) -> list[Any]:
        some, parts = found.images[:count], cut(found.model, layer)
        compiling = settings.compiling and layer in COMPILED
        return [Cached(parts, some, layer, site.axis, units, compiling)]

    with same_network():
        compare(
            benchmark,
            f"{network} {layer}, from pixels",
            job,
            rivals,
            replace(settings, seconds=SECONDS * settings.seconds, rounds=rounds),
            group="imagenet",
            extra=lambda count, _: {"units_in_all": site.channels, **floor(job.plan(count), count)},
        )


@pytest.mark.parametrize("network", LAYERS)
def test_network(benchmark: Any, settings: Settings, network: str) -> None:
    found = subject(network, settings.device)
    sites = pa.select(pa.sites(found.model, found.images[:1]))
    every = [site.label(unit) for site in sites for unit in range(site.channels)]
    asked, images = UNITS_OF_ALL.get(network, len(every)), IMAGES_OF_ALL
    if on_gpu(settings.device):
        asked, images = len(every), IMAGES_ON_GPU // 2
    labels = [every[i] for i in spread(len(every), asked)]
    job = replace(found.job(labels, images), first=1)
    no_labels = torch.zeros(len(found.images), dtype=torch.int64)
    data = found.images, no_labels
    share = len(labels) / len(every)
    with same_network():
        compare(
            benchmark,
            f"{network}, all layers, from pixels",
            job,
            lambda count: [
                Hooks(found.model, tuple(part[:count] for part in data), sites, share=share)
            ],
            replace(settings, seconds=images * SECONDS * settings.seconds, rounds=1),
            group="imagenet",
            extra=lambda count, _: {"units_in_all": len(every), **floor(job.plan(count), count)},
        )
