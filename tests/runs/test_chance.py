"""What is said of a network that is at chance, and which reasons are found."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest
import torch
from support.simulated import from_predictions
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyablate as pa
from pyablate.runs._ablate import _warn_of_chance
from pyablate.runs.chance import chance_remark

TRUTH = np.arange(60) % 6
DRAW = np.random.default_rng(0).integers(0, 6, 60)


@pytest.mark.parametrize(
    ("labels", "baseline", "expected"),
    [
        (TRUTH, TRUTH, None),
        (TRUTH, np.where(np.arange(60) < 11, TRUTH, (TRUTH + 2) % 6), None),  # just above chance
        (TRUTH[:9], (TRUTH[:9] + 1) % 6, None),  # few images
        (TRUTH % 5, TRUTH % 5 + 1, r"with labels \+1 it is 100.00%: they are shifted by one"),
        (TRUTH % 5 + 1, TRUTH % 5, "with labels -1 it is 100.00%: they are shifted by one"),
        (TRUTH, np.full(60, 2), "100% of the images are predicted as 'class 2'"),
        (TRUTH, (TRUTH + 3) % 6, "no better than chance .16.67%.. Likely reasons"),
        (TRUTH, np.where(DRAW == TRUTH, (DRAW + 1) % 6, DRAW), r"accuracy 0.00% .* Likely"),
    ],
)
def test_what_is_said_of_a_network_at_chance(
    labels: np.ndarray, baseline: np.ndarray, expected: str | None
) -> None:
    remark = chance_remark(from_predictions(baseline[None], baseline, labels, 6))
    if expected is None:
        assert remark is None
        return
    assert remark is not None
    assert re.search(expected, remark)
    assert ("with labels" in remark) == ("with labels" in expected)


def test_a_run_says_that_its_loader_shuffles(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    pairs = TensorDataset(torch.randn(8, 4), torch.arange(8) % 4)
    for shuffle in (False, True):
        assert "shuffles" not in caplog.text
        loader = DataLoader(pairs, 4, shuffle=shuffle)
        pa.ablate(model, loader, audit=5, memory="1GB", progress=False)
    assert "data: the loader shuffles: image numbers" in caplog.text


def test_a_run_says_it_once(caplog: pytest.LogCaptureFixture) -> None:
    _warn_of_chance.cache_clear()
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    images = torch.randn(24, 4)
    labels = (model(images).argmax(dim=1) + 1) % 4
    for _ in range(2):
        pa.ablate(model, (images, labels), audit=5, progress=False)
    told = [r for r in caplog.records if "no better than chance" in r.getMessage()]
    assert [record.levelno for record in told] == [logging.WARNING]
    caplog.clear()
    pa.ablate(model, (images, model(images).argmax(dim=1)), audit=5, progress=False)
    assert "chance" not in caplog.text
