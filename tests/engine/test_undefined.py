"""Logits that become NaN or infinite only under ablation: no prediction, counted apart."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pyablate as pa
from pyablate.engine.replay import decision
from pyablate.reference import predictions


class Behind(nn.Module):
    """Units, and something behind them that is not defined everywhere."""

    def __init__(self, behind: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.behind = behind
        self.conv, self.act = nn.Conv2d(1, 6, 3), nn.ReLU()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.behind(self.act(self.conv(x)).mean((2, 3))))


BEHIND: dict[str, Callable[[Tensor], Tensor]] = {
    "normalised": lambda h: (h - 0.5) / h[:, 2:3],  # x / 0: plus and minus infinity, and NaN
    "logarithm": lambda h: h[:, :1].log() + h,
    "root": lambda h: (h[:, 2:3] - 1e-3).sqrt() + h,
    "overflow": lambda h: torch.where(h[:, 2:3] > 0, h, h + torch.inf).clamp(max=torch.inf),
    "some_images": lambda h: h + torch.where(h[:, 3:4] > 1.78, h[:, :1], 1 + h[:, :1]).log(),
}


def subject(name: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Behind(BEHIND[name]).eval()
        nn.init.normal_(model.head.weight)
        model.conv.bias.data += 2.0  # no unit is silent by itself
        images = torch.randn(30, 1, 8, 8) + 0.5 * torch.randn(30, 1, 1, 1)
    return model, (images, torch.arange(30) % 4)


@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "fp64"}, {"precision": "bf16"}, {"strategy": "replay"}],
    ids=["auto", "fp64", "bf16", "replay"],
)
@pytest.mark.parametrize("name", BEHIND)
def test_a_prediction_that_there_is_not_is_none(name: str, options: dict[str, str]) -> None:
    model, data = subject(name)
    result = pa.ablate(model, data, ["act"], audit=60, progress=False, **options)
    oracle = pa.reference.ablate(model, data, ["act"], progress=False)
    np.testing.assert_array_equal(result.predictions(), oracle.predictions())
    assert result.audit == pa.Audit(60, 0)
    none = result.predictions() < 0
    assert 0 < none.sum() < none.size
    np.testing.assert_array_equal(result.undefined.sum(axis=1), none.sum(axis=1))


def test_none_counts_as_wrong_and_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, data = subject("some_images")
    with caplog.at_level(logging.WARNING, logger="pyablate"):
        result = pa.ablate(model, data, ["act"], progress=False)
    none = result.predictions() < 0
    assert f"{none.sum()} predictions are none" in caplog.text
    right = (result.predictions() == result.labels).mean(axis=1)
    np.testing.assert_allclose(result.accuracy, right)
    counts = result.confusion()
    np.testing.assert_array_equal(
        counts.sum(axis=2) + result.undefined, len(result.units) * [result.class_sizes]
    )
    np.testing.assert_array_equal(result.to_dataframe()["undefined"], none.sum(axis=1))
    np.testing.assert_array_equal(result.data["undefined"], result.undefined)
    result.save(tmp_path / "run.zarr")
    np.testing.assert_array_equal(
        pa.load(tmp_path / "run.zarr").predictions(), result.predictions()
    )
    result.report(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size > 0


def test_shards_join_and_measures_are_not_numbers(tmp_path: Path) -> None:
    model, data = subject("some_images")
    options = {"layers": ["act"], "measures": ["loss"], "progress": False}
    whole = pa.ablate(model, data, **options)
    paths = [tmp_path / f"{number}.zarr" for number in (1, 2)]
    for number, path in enumerate(paths, 1):
        pa.ablate(model, data, shard=(number, 2), output=path, **options)
    joined = pa.merge(paths)
    np.testing.assert_array_equal(joined.predictions(), whole.predictions())
    np.testing.assert_array_equal(np.isnan(joined.loss_change), joined.undefined.any(axis=1))


def test_the_intact_network_has_to_predict() -> None:
    model, (images, labels) = subject("normalised")
    model.conv.weight.data[2] = 0.0
    model.conv.bias.data[2] = 0.0
    for run in (pa.ablate, pa.reference.ablate):
        with pytest.raises(ValueError, match="the logits of image 0 are NaN or infinite"):
            run(model, (images, labels), ["act"], progress=False)


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([0.0, 1.0, 0.5], 1),
        ([0.0, torch.nan, 0.5], -1),
        ([0.0, torch.inf, 0.5], -1),
        ([0.0, -torch.inf, 0.5], 2),
        ([-torch.inf, -torch.inf, -torch.inf], -1),
        ([torch.inf, -torch.inf, torch.nan], -1),
    ],
)
def test_what_predicts(logits: list[float], expected: int) -> None:
    values = torch.tensor([logits], dtype=torch.float64)
    assert decision(values).prediction.tolist() == [expected]
    assert predictions(values).tolist() == [expected]
