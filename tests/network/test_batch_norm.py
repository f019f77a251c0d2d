"""Batch norm folded into weights: the same network, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from support.compressible import images
from torch import nn

import pyablate as pa
from pyablate.network.batch_norm import fold_norms, norms_to_fold
from pyablate.network.sites import copied


def lively(model: nn.Module) -> nn.Module:
    """Evaluation mode, with statistics, scales and shifts unlike those of a fresh batch norm."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                tensor.data = 0.5 + torch.rand(tensor.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("name", ["resnet", "alexnet_bn"])
def test_a_folded_network_has_no_norms_and_the_same_logits(name):
    model, pictures, _ = pa.demo.load(name, limit=5)
    pairs = norms_to_fold(model, pictures)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(pairs) == len(norms) > 0
    folded = copied(model)
    fold_norms(folded, pairs)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    with torch.no_grad():
        expected = model.double()(pictures.double())
        assert torch.allclose(folded(pictures).double(), expected, rtol=0, atol=1e-4)


class Shared(nn.Module):
    """The convolution is read twice, or called twice, or its maps are normed along another axis."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.rows, self.across = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.narrow = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "read twice":
            inner = self.conv(x)
            x = self.norm(inner) + inner
        elif self.kind == "called twice":
            x = self.norm(self.conv(self.conv(x)))
        elif self.kind == "untraceable" and float(x.sum()) > -1e9:
            x = self.norm(self.conv(x))
        elif self.kind == "an axis of another size":
            return self.across(self.narrow(x[:, :2, :3, :6].reshape(-1, 6, 6))).flatten(1)
        elif self.kind == "another axis":
            return self.across(self.rows(x[:, :2, :3, :6].reshape(-1, 6, 6))).flatten(1)
        return x.flatten(1)


_KINDS = ["read twice", "called twice", "untraceable", "another axis", "an axis of another size"]


@pytest.mark.parametrize("kind", _KINDS)
def test_what_cannot_be_folded_is_left(kind):
    torch.manual_seed(0)
    assert norms_to_fold(lively(Shared(kind)), images(4)) == []
