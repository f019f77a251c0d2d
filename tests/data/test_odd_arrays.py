"""Arrays as other libraries make them: they work like plain ones, or an error says why not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import pyablate as pa
from pyablate.data import dataset
from pyablate.data.dataset import Data

IMAGES = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
LABELS = np.arange(6) % 3


def read(source: object, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    data = Data(source, dtype=torch.float32, device=torch.device("cpu"))
    data.hold()
    (batch,) = data.batches(100)
    assert torch.equal(data.at(batch.index), batch.images)
    return batch.images, batch.labels


@pytest.mark.parametrize("batches", [False, True])
@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (IMAGES, LABELS.astype(np.uint16)),
        (IMAGES, LABELS.astype(np.uint64)),
        (IMAGES, torch.from_numpy(LABELS).to(torch.uint32)),
        (np.flip(np.flip(IMAGES).copy()), np.flip(np.flip(LABELS).copy())),  # negative strides
        (np.flip(np.flip(IMAGES, 1).copy(), 1), LABELS),
        (IMAGES.astype(">f4"), LABELS.astype(">i8")),
        (np.asfortranarray(IMAGES), LABELS.astype(">u2")),
    ],
)
def test_odd_arrays_are_read_like_plain_ones(images, labels, batches):
    found = read([(images, labels)] if batches else (images, labels))
    assert torch.equal(found[0], torch.from_numpy(IMAGES))
    assert torch.equal(found[1], torch.from_numpy(LABELS))


def test_unsigned_images_keep_their_values():
    images, _ = read(((IMAGES * 100 + 500).astype(np.uint16), LABELS))
    assert torch.equal(images, torch.from_numpy((IMAGES * 100 + 500).astype(np.int64)).float())


@pytest.mark.parametrize(
    ("images", "kind", "message"),
    [
        (IMAGES.astype(np.complex64), TypeError, "images: expected real numbers, got torch.compl"),
        (IMAGES.astype(object), TypeError, "images: expected numbers, got an array of object"),
        (IMAGES.astype(str), TypeError, "images: expected numbers, got an array of <U"),
        (torch.zeros(6, 4, device="meta"), ValueError, "images: expected values, got a tensor on"),
    ],
)
def test_what_holds_no_real_numbers_is_refused(images, kind, message):
    with pytest.raises(kind, match=f"data: batch 0: {message}"):
        read((images, LABELS))


def test_an_endless_iterable_ends_in_an_error(monkeypatch):
    monkeypatch.setattr(dataset, "_room", lambda: 1000)
    with pytest.raises(ValueError, match="data: the first 66 images fill the memory that is free"):
        read(itertools.repeat((IMAGES, LABELS)))


def test_a_model_without_weights_is_refused():
    model = nn.Sequential(nn.Linear(4, 4, device="meta"), nn.ReLU(), nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"model: 0 \(Linear\) is on the meta device"):
        pa.ablate(model, (IMAGES, LABELS), progress=False)


def test_numbers_of_numpy_are_numbers(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    numbers = {"batch_size": 4, "memory": 1 << 30, "audit": 3, "seed": 2}
    given = {name: np.int64(number) for name, number in numbers.items()}
    one = pa.ablate(model, (IMAGES, LABELS), progress=False, **numbers)
    two = pa.ablate(model, (IMAGES, LABELS), output=tmp_path / "r", progress=False, **given)
    assert one.data.equals(two.data)
    assert one.provenance["options"] == two.provenance["options"]
