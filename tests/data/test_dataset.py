"""Images and labels in every form that a run takes them in, and parts of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support import networks
from support.networks import Counting
from support.runs import network, same
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

import pyablate as pa
from pyablate.data.dataset import Data

pytestmark = pytest.mark.usefixtures("exports_kept")


def test_a_loader_with_batches_of_its_own():
    model, images, labels = networks.network("residual", 17)
    sampler = BatchSampler(SequentialSampler(range(6)), 4, drop_last=False)
    loader = DataLoader(TensorDataset(images, labels), batch_sampler=sampler)
    result = pa.ablate(model, loader, audit=40)
    assert len(result.labels) == 6
    assert result.audit.pairs == 40


def test_an_iterable_that_gives_the_same_iterator_twice():
    class Stubborn:
        def __init__(self, pieces: Iterator[Any]) -> None:
            self.pieces = pieces

        def __iter__(self) -> Iterator[Any]:
            return self.pieces

    model, images, labels = networks.network("residual", 17)
    pieces = iter([(images[:10], labels[:10]), (images[10:], labels[10:])])
    assert (pa.ablate(model, Stubborn(pieces)).labels == labels.numpy()).all()


@pytest.mark.parametrize("intervention", ["zero", "resample"])
def test_a_source_that_refills_its_memory(intervention):
    model, images, labels = networks.network("residual", 16)

    class Refilled:
        def __iter__(self) -> Iterator[Any]:
            memory = np.empty((4, *images.shape[1:]), np.float32)
            for start in range(0, 16, 4):
                memory[:] = images[start : start + 4].numpy()
                yield memory, labels[start : start + 4].numpy()

    options: dict[str, Any] = {"layers": "body.2", "intervention": intervention, "audit": 0}
    expected = pa.ablate(model, (images, labels), **options)
    assert same(pa.ablate(model, Refilled(), **options), expected)


@pytest.mark.parametrize("form", ["pair", "loader", "list", "shuffled"])
def test_parts_of_the_data_are_those_of_the_whole(form):
    _, images, labels = network()
    counting = Counting(images, labels)
    sources: dict[str, Any] = {
        "pair": (images, labels),
        "loader": DataLoader(counting, batch_size=7),
        "list": list(zip(images.split(9), labels.split(9), strict=True)),
        "shuffled": DataLoader(counting, batch_size=7, sampler=[*range(30, 60), *range(30)]),
    }
    data = Data(sources[form], dtype=torch.float32, device=torch.device("cpu"))
    whole = torch.cat([batch.images for batch in data.batches(8)])
    counting.asked.clear()
    for part in (range(17, 40), range(0, 3), range(56, 60), range(5, 5)):
        batches = list(data.batches(8, part))
        assert [len(batch) for batch in batches[:-1]] == [8] * (len(batches) - 1)
        index = [int(i) for batch in batches for i in batch.index]
        assert index == list(part)
        assert not part or torch.equal(torch.cat([b.images for b in batches]), whole[list(part)])
    if form == "loader":
        assert sorted(counting.asked) == [*range(0, 3), *range(17, 40), *range(56, 60)]
