"""Labels as people have them, as class numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support import networks
from torch.utils.data import DataLoader

import pyablate as pa
from pyablate.data.dataset import Data, class_numbers

EXPECTED = [2, 0, 1, 2]
ONE_HOT = np.eye(3)[EXPECTED]


@pytest.mark.parametrize(
    "labels",
    [
        EXPECTED,
        tuple(EXPECTED),
        [np.int64(n) for n in EXPECTED],
        np.array(EXPECTED, dtype=np.uint8),
        np.array(EXPECTED)[:, None],
        torch.tensor(EXPECTED, dtype=torch.int32)[:, None],
        ONE_HOT,
        ONE_HOT.astype(np.float32),
        torch.tensor(ONE_HOT) == 1,
        ONE_HOT.astype(int).tolist(),
    ],
)
def test_labels_become_class_numbers(labels: Any) -> None:
    images = torch.zeros(4, 1, 2, 2)
    for source in ((images, labels), [(images, labels)]):
        data = Data(source, dtype=torch.float32, device=torch.device("cpu"))
        assert torch.cat([batch.labels for batch in data.batches(3)]).tolist() == EXPECTED


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat", "dog"], r"must be integers, got list; class names become numbers"),
        (np.array(["cat", "dog"]), r"must be integers, got <U3; class names become numbers"),
        ([0.5, 1.0], r"must be integers, got torch\.float32"),
        ([True, False], r"must be integers, got torch\.bool"),
        ([[1, 1], [0, 1]], r"labels \[2, 2\] must be one-hot, exactly one 1 in each row"),
        ([[0, 0], [0, 1]], "must be one-hot"),
        ([[0.3, 0.7], [0.0, 1.0]], "must be one-hot"),
        ([[0], [1, 2]], "must be integers, got list"),
        (None, "must be integers, got NoneType"),
    ],
)
def test_other_labels_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"data: batch 3: .*{message}"):
        class_numbers(labels, "data: batch 3")


def test_one_hot_labels_of_a_loader_give_the_same_result() -> None:
    model = networks.residual().eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 2, 8, 8, generator=generator)
    labels = torch.arange(12) % networks.CLASSES
    rows = torch.nn.functional.one_hot(labels, networks.CLASSES)
    expected = pa.ablate(model, (images, labels), progress=False)
    loader = DataLoader(list(zip(images, rows, strict=True)), batch_size=5)
    found = pa.ablate(model, loader, progress=False)
    assert np.array_equal(found.labels, labels.numpy())
    assert np.array_equal(found.predictions(slice(None)), expected.predictions(slice(None)))
