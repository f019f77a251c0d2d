"""The walk of a new user with a network as timm writes them; timm itself is not needed for it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.shelled import invoke_apart, write_photos

import pyablate as pa

pytest.importorskip("torch_pruning")

_NETWORK = '''
import torch
from torch import nn


class BatchNormAct2d(nn.BatchNorm2d):
    """Normalises and activates in one module."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class SqueezeExcite(nn.Module):
    def __init__(self, channels, inner):
        super().__init__()
        self.conv_reduce, self.act1 = nn.Conv2d(channels, inner, 1), nn.SiLU(inplace=True)
        self.conv_expand, self.gate = nn.Conv2d(inner, channels, 1), nn.Sigmoid()

    def forward(self, x):
        gate = self.conv_expand(self.act1(self.conv_reduce(x.mean((2, 3), keepdim=True))))
        return x * self.gate(gate)


class InvertedResidual(nn.Module):
    def __init__(self, channels, inner):
        super().__init__()
        self.conv_pw, self.bn1 = nn.Conv2d(channels, inner, 1, bias=False), BatchNormAct2d(inner)
        self.conv_dw = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.bn2, self.se = BatchNormAct2d(inner), SqueezeExcite(inner, 4)
        self.conv_pwl = nn.Conv2d(inner, channels, 1, bias=False)
        self.bn3, self.drop_path = nn.BatchNorm2d(channels), nn.Identity()

    def forward(self, x):
        y = self.se(self.bn2(self.conv_dw(self.bn1(self.conv_pw(x)))))
        return self.drop_path(self.bn3(self.conv_pwl(y))) + x


class SelectAdaptivePool2d(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten(1)

    def forward(self, x):
        return self.flatten(self.pool(x))


class Net(nn.Module):
    """With features and head apart, and what timm knows of its weights."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.pretrained_cfg = self.default_cfg = {"input_size": (3, 12, 12), "mean": (0.5,) * 3}
        self.conv_stem, self.bn1 = nn.Conv2d(3, 8, 3, stride=2, padding=1), BatchNormAct2d(8)
        self.blocks = nn.Sequential(nn.Sequential(InvertedResidual(8, 12)))
        self.global_pool, self.classifier = SelectAdaptivePool2d(), nn.Linear(8, num_classes)

    def forward_features(self, x):
        return self.blocks(self.bn1(self.conv_stem(x)))

    def forward_head(self, x, pre_logits=False):
        x = self.global_pool(x)
        return x if pre_logits else self.classifier(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def make():
    torch.manual_seed(0)
    return Net()
'''
_LAYERS = {
    "bn1.act": 8,
    "blocks.0.0.bn1.act": 12,
    "blocks.0.0.bn2.act": 12,
    "blocks.0.0.se.act1": 4,
    "blocks.0.0.se.gate": 12,
    "blocks.0.0.se": 12,
    "blocks.0.0": 8,
}
_THREE = ("--mean", "0.5,0.5,0.5", "--std", "0.25,0.25,0.25")
_MODEL = ("timm_like:make", "--data", "photos", "--size", "12", *_THREE)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "timm_like.py").write_text(_NETWORK)
    write_photos(tmp_path / "photos", each=8, side=12)
    for module in ("timm_like", "small"):
        monkeypatch.delitem(sys.modules, module, raising=False)


@pytest.mark.usefixtures("photos")
def test_a_network_as_timm_writes_them_from_its_layers_to_a_smaller_one() -> None:
    code, out, err = invoke_apart("layers", *_MODEL)
    assert code == 0, err
    chosen = {row.split()[0]: int(row.split()[2]) for row in out.splitlines() if " yes" in row}
    assert chosen == _LAYERS, out

    code, out, err = invoke_apart("run", *_MODEL, "--layers", "blocks*", "-o", "run.zarr")
    assert code == 0, err
    result = pa.load("run.zarr")
    assert "replay" not in result.strategy.values()
    assert result.class_names == ("ant", "bee", "cat")
    from timm_like import make  # type: ignore[import-not-found]

    from pyablate.cli.data_specs import load_data

    data = load_data("photos", size=12, mean=[0.5] * 3, std=[0.25] * 3).batches
    layers = list(result.strategy)
    expected = pa.reference.ablate(make().eval(), data, layers, progress=False)
    np.testing.assert_array_equal(result.predictions(), expected.predictions())

    code, out, err = invoke_apart(
        "prune", *_MODEL, "--flops", "-30%", "--save", "small.safetensors", "--csv", "tried.csv"
    )
    assert code == 0, err
    tried = pd.read_csv("tried.csv")
    assert tried.loc[tried["chosen"], "flops"].item() <= 0.7
    assert "small.py" in out
    small = ("small:make_model", *_MODEL[1:], "--weights", "small.safetensors")
    code, out, err = invoke_apart("finetune", *small, "--epochs", "1", "--save", "t.safetensors")
    assert code == 0, err
    code, out, err = invoke_apart(
        "compare", _MODEL[0], "small:make_model", *_MODEL[1:], "--other-weights", "t.safetensors"
    )
    assert code == 0, err
    rows = [row.split()[:2] for row in out.splitlines() if row.strip()]
    assert [name for name in ("ant", "bee", "cat") if [name, "8"] in rows] == ["ant", "bee", "cat"]
    assert len(pd.read_csv("tried.csv")) > 1
