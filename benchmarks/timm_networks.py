"""Networks of timm by their definitions alone: nothing is downloaded, no torchvision is needed."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

CERTAINTY = {
    "resnet18": 6.0,
    "resnet50": 6.0,
    "mobilenetv3_small_100": 7.5,
    "convnext_atto": 2.0,
    "deit_tiny_patch16_224": 5.5,
}
"""How far the logit of an image's own class is raised, in standard deviations of all logits: so far
that about 1 % of the predictions flip, as they do in trained networks."""

TORCHVISION = """
    torchvision torchvision.datasets torchvision.models torchvision.models.feature_extraction
    torchvision.ops torchvision.ops.misc torchvision.transforms torchvision.transforms.functional
""".split()


@torch.no_grad()
def random_classifier(name: str, images: Tensor, *, seed: int = 0) -> nn.Module:
    """Draw a network of timm, in evaluation mode, that tells these images apart.

    Weights are timm's initial ones. Batch norms get gains in [0.5, 1.5], shifts of standard
    deviation 0.2 and the statistics of the images; what scales a residual branch, which begins at
    almost nothing, is drawn from [0.1, 0.5]. The head is random, centred on the images' features,
    and raises one class for each image (`CERTAINTY`).

    Raises
    ------
    ImportError
        timm is not installed (``make bench`` does that).
    """
    timm = _imported()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model: nn.Module = timm.create_model(name).eval()
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.2)
            norm.reset_running_stats()
            norm.momentum = None  # the mean over what is seen
            norm.train()
        for parameter, value in model.named_parameters():
            if parameter.endswith("gamma"):
                value.uniform_(0.1, 0.5)
        model(images)
        model.eval()
        head: nn.Linear = model.get_classifier()
        features = _features(model, head, images)
        centre = features.mean(0)
        weight = torch.randn_like(head.weight)
        weight /= ((features - centre) @ weight.T).std()
        own = torch.linalg.pinv(features - centre).T  # [images, features]
        weight[: len(images)] += CERTAINTY[name] * own
        head.weight.copy_(weight)
        head.bias.copy_(-weight @ centre)
    return model


def _features(model: nn.Module, head: nn.Linear, images: Tensor) -> Tensor:
    """Return what the head is given."""
    kept: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    model(images)
    handle.remove()
    return kept[0]


# --- without torchvision --------------------------------------------------------------------------


class _Nothing(type):
    """Classes of torchvision that timm names while it is imported; its networks use none."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(name, (), {})


class _StandIn(ModuleType):
    """A module of torchvision, which has a build for the CPU in no package index."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(name, (), {})


def _imported() -> ModuleType:
    """Import timm, whether or not torchvision is there and can be loaded."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if _of_torchvision(name)}
    sys.modules.update({name: _StandIn(name) for name in TORCHVISION})
    try:
        return importlib.import_module("timm")
    finally:
        for name in TORCHVISION:
            del sys.modules[name]
        sys.modules.update(before)


def _of_torchvision(name: str) -> bool:
    return name.partition(".")[0] == "torchvision"
