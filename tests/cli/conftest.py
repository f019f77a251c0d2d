"""A working directory for the tests of commands."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from support.shelled import TINY_NETWORK
from support.simulated import simulate

_NETWORK = f"""
import time
{TINY_NETWORK}

def sleep():
    print("sleeping", flush=True)
    for _ in range(600):  # a signal just before one long sleep would wait for its end
        time.sleep(0.1)


def explode():
    raise ValueError("first line\\nsecond line")


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fine, self.coarse = make()[:-1], nn.Linear(6, 3), nn.Linear(6, 4)

    def forward(self, x):
        pooled = self.body(x)
        return {{"fine": self.fine(pooled), "coarse": self.coarse(pooled)}}


def wide():
    return nn.Sequential(nn.Flatten(), nn.Linear(100, 3))


def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a network in ``small_network.py`` and ``images.npz``."""
    (tmp_path / "small_network.py").write_text(_NETWORK)
    (tmp_path / "broken_network.py").write_text("def make(): pass\nmake_it()")
    (tmp_path / "no_python.py").write_text("def make(:")
    draw = np.random.default_rng(0)
    images = draw.random((12, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(12) % 3)
    np.savez(tmp_path / "empty.npz", images=images[:0], labels=np.arange(0))
    np.savez(tmp_path / "bad_labels.npz", images=images, labels=np.arange(12) - 1)
    images[3, 0, 0] = np.nan
    np.savez(tmp_path / "nan.npz", images=images, labels=np.arange(12) % 3)
    tiny = simulate(np.full((3, 2), 0.5), 0.5, 4, draw, ["x"] * 3)
    tiny.save(tmp_path / "results/tiny.zarr")
    tiny.to_dataframe().to_csv(tmp_path / "units.csv", index=False)
    (tmp_path / "other.csv").write_text("unit,a\ny:0,1.5\n")
    (tmp_path / "plain.csv").write_text("a,b\n1.5,2\n")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes.zarr").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("not a result")
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("small_network", None)
    return tmp_path
