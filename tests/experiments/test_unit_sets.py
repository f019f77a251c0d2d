"""Sets of units by network dissection's protocol, against a slow loop with hooks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import networks
from support.screened import screen_anyway
from torch import Tensor, nn

import pyablate as pa
from pyablate.experiments._unit_sets import _sizes
from pyablate.experiments.split import Images, split

LAYER = "body.2"


def balanced(model: nn.Module, data: Images, units: list[int]) -> np.ndarray:
    """Balanced accuracy of every class with units of the layer at 0."""

    def silence(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, units] = 0
        return output

    handle = model.get_submodule(LAYER).register_forward_hook(silence)
    with torch.no_grad():
        predicted = model(data[0]).argmax(1).numpy()
    handle.remove()
    labels = data[1].numpy()
    rates = []
    for k in range(networks.CLASSES):
        right = (predicted[labels == k] == k).mean()
        rates.append((right + (predicted[labels != k] != k).mean()) / 2)
    return np.array(rates)


def test_sets_against_a_loop():
    model, images, labels = networks.network("residual", 60)
    table = pa.unit_sets(
        model, (images, labels), LAYER, sizes=[3, 1], seed=5, progress=False, audit=0
    )
    halves = split((images, labels), seed=5)
    intact = balanced(model, halves.choosing, [])
    drops = np.array([intact - balanced(model, halves.choosing, [unit]) for unit in range(8)])
    rows = iter(table.itertuples())
    for k in range(5):
        order = np.argsort(-drops[:, k].round(9), kind="stable").tolist()
        for size in (1, 3):
            row = next(rows)
            assert (row[1], row.size) == (str(k), size)
            assert row.units == tuple(f"{LAYER}:{unit}" for unit in order[:size])
            assert row.baseline == pytest.approx(balanced(model, halves.measuring, [])[k])
            removed = balanced(model, halves.measuring, order[:size])[k]
            kept = balanced(model, halves.measuring, order[size:])[k]
            assert row.removed == pytest.approx(removed)
            assert row.kept == pytest.approx(kept)
    assert next(rows, None) is None


def test_tables_tell_what_they_rest_on(monkeypatch):
    screen_anyway(monkeypatch)
    model, images, labels = networks.network("residual", 60)
    options = {"sizes": [2], "progress": False, "audit": 10}
    exact = pa.unit_sets(model, (images, labels), LAYER, **options)
    assert (exact.attrs["guarantee"], exact.attrs["intervention"]) == ("exact", "zero")
    assert exact.attrs["audit"].startswith("20 pairs recomputed by replay, 0 mismatches")
    assert "screening" not in exact.attrs
    screened = pa.unit_sets(model, (images, labels), LAYER, **options, guarantee="screened")
    assert screened.attrs["guarantee"] == "screened"
    sets = 2 * len({frozenset(units) for units in screened["units"]})  # removed, and all but these
    assert screened.attrs["screening"].startswith(f"{30 * (8 + sets):,} pairs: ")


def test_default_sizes_are_those_that_fit():
    assert _sizes(None, 8) == [1, 2, 3, 4, 5]
    assert _sizes(None, 65) == [1, 2, 3, 4, 5, 20, 64]
    assert _sizes(None, 512) == [1, 2, 3, 4, 5, 20, 64, 128, 256]
    assert _sizes([9, 2, 9], 10) == [2, 9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": [8]}, "sizes: expected fewer than the 8 units, got 8"),
        ({"sizes": [0]}, "sizes: expected at least 1"),
        ({"sizes": []}, "sizes: expected at least one"),
        ({"classes": "x"}, "classes: no class 'x'"),
        ({"layers": "body.99"}, "layers: no layer"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_input(options, message):
    model, images, labels = networks.network("residual", 10)
    given = {"layers": LAYER, "progress": False, "audit": 0} | options
    with pytest.raises(ValueError, match=message):
        pa.unit_sets(model, (images, labels), **given)


def test_a_layer_of_one_unit_has_no_sets():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1), nn.ReLU(), nn.Linear(1, 2)).eval()
    with pytest.raises(ValueError, match="layers: sets need a layer of two units"):
        pa.unit_sets(model, (torch.randn(8, 3), torch.arange(8) % 2), "1")
