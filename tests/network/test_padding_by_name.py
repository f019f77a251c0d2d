"""Convolutions padded by name, ``"same"`` and ``"valid"``: the rules are those of numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support import networks
from support.oracle import check
from torch import nn

import pyablate as pa
from pyablate.network.capture import capture
from pyablate.network.graph import CONVOLUTIONS
from pyablate.network.sites import surveyed

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = {1: (24,), 2: (12, 10), 3: (6, 5, 7)}

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


class Pooled(nn.Module):
    """Wide enough for 8-bit arithmetic; a layer of one filter per channel in between."""

    def __init__(self, axes: int, kernel: Any, dilation: Any, paddings: tuple[Any, ...]) -> None:
        super().__init__()
        conv, norm = CONVS[axes], NORMS[axes]
        geometry = {"kernel_size": kernel, "dilation": dilation}
        parts = [
            conv(2, 16, **geometry, padding=paddings[0], bias=False),
            norm(16),
            nn.ReLU(),
            conv(16, 16, **geometry, padding=paddings[1], groups=16),
            nn.ReLU(),
            conv(16, 16, **geometry, padding=paddings[2]),
            norm(16),
            nn.ReLU(),
        ]
        self.body, self.head = nn.Sequential(*parts), nn.Linear(16, networks.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).flatten(2).mean(dim=2))


def subject(axes: int, kernel: Any, dilation: Any, *paddings: Any) -> Any:
    images = torch.randn(6, 2, *SIZES[axes], generator=torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    model = Pooled(axes, kernel, dilation, paddings)
    networks.made(model, images)
    return model.eval(), (images, torch.arange(6) % networks.CLASSES)


@pytest.mark.parametrize("precision", ["auto", "fp32"])
@pytest.mark.parametrize(
    ("axes", "kernel", "dilation"),
    [
        (1, 5, 1),
        (1, 4, 1),
        (2, 3, 1),
        (2, (4, 3), 1),
        (2, (2, 5), (1, 2)),
        (2, (2, 4), (3, 1)),
        (3, (3, 2, 1), 1),
    ],
)
def test_predictions_are_the_oracles(axes, kernel, dilation, precision):
    model, data = subject(axes, kernel, dilation, "same", "same", "valid")
    result = check(model, data, "*", precision=precision, ties=0)
    assert "replay" not in result.strategy.values()
    assert len(result.flips.image) > 0


@pytest.mark.parametrize(("axes", "kernel"), [(1, 5), (2, 3), (2, (3, 4)), (3, 3)])
def test_a_graph_has_the_operators_of_padding_by_numbers(axes, kernel):
    """Batch norm is folded, and filters take the margin of an even extent, as elsewhere."""

    def operators(*paddings: Any) -> list[Any]:
        model, (images, _) = subject(axes, kernel, 1, *paddings)
        graph = capture(model, images, surveyed(model, images).sites).graph
        return [node.target for node in graph.nodes if node.op == "call_function"]

    found = operators("same", "same", "valid")
    assert found == operators(1, 1, 0)
    assert sum(target in CONVOLUTIONS for target in found) == 3


@pytest.mark.parametrize("axes", [1, 2])
def test_attributes_know_the_filters(axes):
    """Those of a network padded by the same numbers; there were none."""
    which = ["l1_norm", "l1_norm_outgoing", "bn_scale", "nisp", "spectral", "orthogonality_loss"]
    named, numbered = (
        pa.attributes(*subject(axes, 3, 1, *paddings), "*", which=which)
        for paddings in (("same", "same", "valid"), (1, 1, 0))
    )
    for name in which:
        assert np.isfinite(numbered[name]).any()
        np.testing.assert_array_equal(named[name], numbered[name])
