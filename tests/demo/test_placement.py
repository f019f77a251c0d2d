"""examples/placement.py: objects stand where they are said to, and its figures are the engine's."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy import stats

import pyablate as pa

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "examples" / "placement.py"
    spec = importlib.util.spec_from_file_location("placement_script", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _box(image: torch.Tensor) -> tuple[int, int, int, int]:
    """First and last row, first and last column of what is not black."""
    rows, columns = image[0].nonzero().T
    return tuple(int(n) for n in (rows.min(), rows.max(), columns.min(), columns.max()))


def test_an_object_stands_where_it_is_said_to(script):
    images, _ = pa.demo.images(4)
    full = torch.ones(2, 1, 28, 28)
    assert torch.equal(script.composites(images, script.PLAIN), images)
    assert _box(script.composites(full, script.Setting("", 16))[0]) == (6, 21, 6, 21)
    moved = script.composites(full, script.Setting("", 16, right=-6, down=5))
    assert _box(moved[0]) == (11, 26, 0, 15)
    small = script.composites(images, script.Setting("", 20))
    turned = script.composites(images, script.Setting("", 20, angle=90))
    torch.testing.assert_close(turned, small.rot90(1, (2, 3)), atol=1e-4, rtol=0)
    behind = script.composites(images, script.Setting("", 20, background=0.5))
    torch.testing.assert_close(behind, small.maximum(0.5 * images[[3, 0, 1, 2]]))


def test_figures_and_page(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "LAYERS", ("features.16",))
    images, labels = pa.demo.images(80)
    settings = script.SETTINGS[:2]
    table, shares = script.study(images, labels, settings)
    model, drops = pa.demo.network(script.NETWORK), []
    for part, setting in ((slice(0, 40), settings[0]), (slice(40, 80), settings[1])):
        data = script.composites(images[part], setting), labels[part]
        options = {"measures": ["loss"], "audit": 0, "progress": False}
        drops.append(pa.ablate(model, data, "features.16", **options))
    first, second = (one.class_loss_change for one in drops)
    row, harm = table.iloc[1], second.clip(min=0)
    assert row["accuracy"] == drops[1].baseline_accuracy
    assert row["damage"] == pytest.approx(harm.mean(), abs=1e-6)
    of_cells = stats.spearmanr(first.ravel(), second.ravel()).statistic
    of_units = stats.spearmanr(first.clip(min=0).mean(1), harm.mean(1)).statistic
    for figure, expected in (("cells", of_cells), ("units", of_units)):
        middle, low, high = map(float, re.findall(r"-?\d\.\d\d", row[figure]))
        assert middle == pytest.approx(expected, abs=0.011)
        assert low < middle < high
    parts = shares[list(pa.demo.CLASSES)].to_numpy()
    np.testing.assert_allclose(parts[1], harm.sum(0) / harm.sum(), atol=1e-4)
    page = script.page(table, shares, 80)
    assert f"| {100 * row['accuracy']:.1f} % | {1000 * row['damage']:.1f} | {row['units']}" in page
    script.picture(images, shares, settings, tmp_path / "images" / "placement.png")
    assert (tmp_path / "images" / "placement.png").stat().st_size > 1000
