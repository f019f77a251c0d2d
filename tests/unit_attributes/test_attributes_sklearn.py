"""Attributes against scikit-learn, where that is installed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import pyablate as pa

metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")


def test_auc_and_information() -> None:
    draw = np.random.default_rng(0)
    A = np.maximum(draw.normal(size=(120, 6)), 0).round(1).astype(np.float32)
    y = draw.integers(0, 4, size=120)
    A[y == 1, 0] += 2
    model = nn.Sequential(nn.Identity(), nn.Linear(6, 4))
    found = pa.attributes(
        model, (torch.from_numpy(A), torch.from_numpy(y)), "0", ["auc", "information"], bins=8
    )
    for u in range(6):
        for k in range(4):
            expected = metrics.roc_auc_score(y == k, A[:, u])
            assert abs(float(found["auc_per_class"][u, k]) - expected) < 1e-12
        below = (A[:, u][:, None] > A[:, u]).sum(axis=1)
        T = below * 8 // 120
        cells = metrics.cluster.contingency_matrix(T, y)
        occupied = (cells > 0).sum() - cells.shape[0] - cells.shape[1] + 1
        plain = metrics.mutual_info_score(T, y)
        corrected = float(found["mutual_information"][u])
        assert abs(corrected - (plain - occupied / 240)) < 1e-12
