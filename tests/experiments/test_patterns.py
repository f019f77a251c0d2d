"""Activation patterns: planted groups of images are found, and told apart by their units."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from support.report_pages import data_of, structured
from torch import Tensor, nn

import pyablate as pa


def planted() -> tuple[nn.Module, Tensor, Tensor, np.ndarray]:
    """Four groups of images of 40, 30, 20 and 10, and 5 images of no group, shuffled."""
    draw = torch.Generator().manual_seed(0)
    group = torch.tensor([3] * 10 + [0] * 40 + [2] * 20 + [1] * 30 + [-1] * 5)
    group = group[torch.randperm(105, generator=draw)]
    centres = 6 * torch.eye(5)[:4]
    vectors = torch.where(
        (group >= 0)[:, None],
        centres[group] + 0.2 * torch.randn(105, 5, generator=draw),
        25 * torch.rand(105, 5, generator=draw) + 8,
    ).clamp(min=0)
    images = vectors[:, :, None, None] * torch.tensor([0.5, 1.5]).repeat(8).reshape(1, 1, 4, 4)
    model = nn.Sequential(nn.Conv2d(5, 5, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(80, 4))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(5)[:, :, None, None])
    return model.eval(), images, group.clamp(min=0), group.numpy()


def test_planted_patterns_are_found():
    pytest.importorskip("sklearn")
    model, images, labels, group = planted()
    found = pa.activation_patterns(
        model, (images, labels), "1", smallest=8, neighbours=4, class_names=list("abcd")
    )
    assert found["pattern"].values.tolist() == group.tolist()
    assert found["size"].values.tolist() == [40, 30, 20, 10]
    np.testing.assert_array_equal(found["class_share"], np.eye(4))
    assert found["contrast"].values[:, :4].argmax(1).tolist() == [0, 1, 2, 3]
    pooled = images.mean((2, 3)).double().numpy()
    for number in range(4):
        mean = pooled[group == number].mean(0)
        np.testing.assert_allclose(found["mean"][number], mean, rtol=1e-5)
        away = np.where(group == number, np.linalg.norm(pooled - mean, axis=1), np.inf)
        assert found["prototype"][number] == away.argmin()
        contrast = (mean - pooled.mean(0)) / pooled.std(0)
        np.testing.assert_allclose(found["contrast"][number], contrast, rtol=1e-4)
    assert (found["probability"].values[group < 0] == 0).all()


def test_no_patterns_among_scattered_images():
    pytest.importorskip("sklearn")
    model, images, labels, _ = planted()
    far = images * torch.arange(1.0, 106)[:, None, None, None].pow(2)
    found = pa.activation_patterns(model, (far[:9], labels[:9]), "1", smallest=9)
    assert (found["pattern"] == -1).all()
    assert found["class_share"].shape == (0, 4)
    assert found["contrast"].shape == (0, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smallest": 1}, "smallest: expected at least 2, got 1"),
        ({"neighbours": 0}, "neighbours"),
        ({"layer": ["0", "1"]}, "layer: expected one layer, got 0, 1"),
        ({"layer": "9"}, "layers: no layer"),
        ({"smallest": 200}, "data: expected at least 200 images, got 105"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_input(options, message):
    pytest.importorskip("sklearn")
    model, images, labels, _ = planted()
    with pytest.raises(ValueError, match=message):
        pa.activation_patterns(model, (images, labels), **{"layer": "1", **options})


def test_without_scikit_learn(monkeypatch):
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **named: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    model, images, labels, _ = planted()
    with pytest.raises(ImportError, match=r"pip install 'pyablate\[patterns\]'"):
        pa.activation_patterns(model, (images, labels), "1")


def test_patterns_in_a_report(tmp_path):
    result = structured(24, 5, 60, 3, [f"class {k}" for k in range(5)])
    labels = result.units["label"].tolist()
    contrast = np.zeros((2, 6))
    contrast[0, 1], contrast[1, :3] = 3.0, (1.0, -2.0, 0.5)
    found = xr.Dataset(
        {
            "pattern": ("image", np.repeat([0, 1, -1], [150, 100, 50])),
            "size": ("pattern", [30, 20]),
            "prototype": ("pattern", [4, 41]),
            "class_share": (("pattern", "class"), [[0, 0.9, 0, 0, 0.1], [1, 0, 0, 0, 0]]),
            "contrast": (("pattern", "unit"), contrast),
        },
        coords={"unit": labels[:6], "class": list(result.class_names)},
        attrs={"layer": "somewhere"},
    )
    result.report(tmp_path / "r.html", patterns=found)
    shown = data_of((tmp_path / "r.html").read_text())["patterns"]
    assert shown["layer"] == "somewhere"
    assert shown["left"] == 50
    assert [row["classes"] for row in shown["rows"]] == [[[1, 0.9], [4, 0.1]], [[0, 1.0]]]
    assert [row["units"][0] for row in shown["rows"]] == [[labels[1], 3.0], [labels[1], -2.0]]
    for wrong, error in ((found.isel(image=slice(9)), ValueError), (xr.Dataset(), TypeError)):
        with pytest.raises(error, match="patterns: expected"):
            result.report(tmp_path / "r.html", patterns=wrong)
