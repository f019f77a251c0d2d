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
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, TensorDataset

import pyablate as pa
from pyablate.data.dataset import Data, class_numbers
from pyablate.data.inputs import _say_scaled

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
        ([[1, 1], [0, 1]], r"labels \[2, 2\] must be one-hot, .* one at a time: its column"),
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


@pytest.mark.parametrize("form", ["numpy", "torch", "loader", "batches"])
def test_images_of_uint8_are_scaled_and_that_is_said_once(
    form: str, caplog: pytest.LogCaptureFixture
) -> None:
    _say_scaled.cache_clear()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 1, 3, 3), dtype=np.uint8)
    images, labels = torch.from_numpy(pixels), torch.arange(6)
    source: Any = {
        "numpy": (pixels, labels.numpy()),
        "torch": (images, labels),
        "loader": DataLoader(TensorDataset(images, labels), batch_size=4),
        "batches": [(images[:4], labels[:4]), (images[4:], labels[4:])],
    }[form]
    expected = images.float() / 255
    for dtype in (torch.float32, torch.float64):
        data = Data(source, dtype=dtype, device=torch.device("cpu"))
        assert torch.equal(torch.cat([b.images for b in data.batches(5)]), expected.to(dtype))
        data.hold()
        assert torch.equal(data.at(torch.tensor([5, 0])), expected[[5, 0]].to(dtype))
    assert sum("are scaled from 0..255" in message for message in caplog.messages) == 1


def test_uint8_gives_the_result_of_scaled_floats() -> None:
    model = networks.residual().eval()
    pixels = np.random.default_rng(1).integers(0, 256, (12, 2, 8, 8), dtype=np.uint8)
    labels = np.arange(12) % networks.CLASSES
    expected = pa.ablate(model, (pixels.astype(np.float32) / 255, labels), progress=False)
    for module in (pa, pa.reference):
        found = module.ablate(model, (pixels, labels), progress=False)
        assert np.array_equal(found.predictions(), expected.predictions())


class Rows:
    """As a data set of Hugging Face: rows by index, as lists of numbers or, asked for, tensors."""

    def __init__(self, columns: dict[str, Any], kind: str | None = None) -> None:
        self.columns, self.format = columns, {"type": kind}
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        self.read.append(index)
        row = {name: column[index] for name, column in self.columns.items()}
        if self.format["type"] == "torch":
            return row
        return {name: value.tolist() for name, value in row.items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def with_format(self, kind: str) -> Rows:
        return Rows(self.columns, kind)


class Indexed:
    """Images by index, of no class that is known."""

    def __init__(self, pairs: TensorDataset) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.pairs[index]
        return image, int(label)


class Batches(Indexed):
    """Batches by index."""

    def __getitem__(self, index: int) -> Any:
        if index * 5 >= len(self.pairs):
            raise IndexError(index)
        return self.pairs[5 * index : 5 * index + 5]

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(4))


class Unlabelled(Dataset[torch.Tensor]):
    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


DATA_SETS: dict[str, Any] = {
    "tensors by name": lambda images, labels: Rows(named(images, labels), "torch"),
    "lists by name": lambda images, labels: Rows(named(images, labels)),
    "torch": TensorDataset,
    "pairs": lambda *pair: Indexed(TensorDataset(*pair)),
    "batches": lambda *pair: Batches(TensorDataset(*pair)),
    "no labels": lambda images, labels: Unlabelled(images),
}


def named(images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"pixel_values": images, "labels": labels}


@pytest.mark.parametrize("form", DATA_SETS)
def test_data_sets_are_taken_as_they_are(form: str) -> None:
    images, labels = torch.randn(17, 3, 4, 4), torch.arange(17) % 5
    source = DATA_SETS[form](images, labels)
    data = Data(source, dtype=torch.float32, device=torch.device("cpu"), unlabelled=True)
    assert len(data) == 17
    batches = list(data.batches(7))
    assert [len(batch) for batch in batches] == [7, 7, 3]
    assert torch.equal(torch.cat([batch.images for batch in batches]), images)
    found = torch.cat([batch.labels for batch in batches])
    assert torch.equal(found, labels if form != "no labels" else torch.full((17,), -1))
    (part,) = data.batches(7, range(9, 12))
    assert torch.equal(part.images, images[9:12])
    assert (data.inputs is not None) == ("name" in form)


def test_parts_of_a_data_set_are_read_alone() -> None:
    rows = Rows(named(torch.randn(17, 3, 4, 4), torch.arange(17) % 5), "torch")
    data = Data(rows, dtype=torch.float32, device=torch.device("cpu"))
    list(data.batches(7, range(9, 12)))
    assert rows.read == [9, 10, 11]


@pytest.mark.parametrize("kind", [None, "torch"])
def test_a_data_set_of_hugging_face(kind: str | None) -> None:
    datasets = pytest.importorskip("datasets")
    model, images, labels = networks.network("residual", 17)
    columns = {"x": images.tolist(), "label": labels.tolist()}
    rows = datasets.Dataset.from_dict(columns).with_format(kind)
    options: dict[str, Any] = {"layers": "body.2", "audit": 0, "progress": False}
    assert same(pa.ablate(model, rows, **options), pa.ablate(model, (images, labels), **options))


@pytest.mark.parametrize("kind", ["tensors", "loader", "generator"])
def test_scattered_images_come_in_full_batches(kind):
    images, labels = torch.arange(300.0).reshape(300, 1), torch.arange(300) % 7
    pairs = list(zip(images.split(32), labels.split(32), strict=True))
    sources = {
        "tensors": (images, labels),
        "loader": DataLoader(TensorDataset(images, labels), batch_size=32),
        "generator": pairs,
    }
    data = Data(sources[kind], dtype=torch.float32, device=torch.device("cpu"))
    wanted = [3, 4, 40, 41, 120, 200, 201, 202, 250, 298, 299]
    found = list(data.chosen(wanted, 4))
    assert [len(batch) for batch in found] == [4, 4, 3]
    assert torch.cat([batch.index for batch in found]).tolist() == wanted
    assert torch.cat([batch.images for batch in found]).flatten().tolist() == wanted
    assert torch.cat([batch.labels for batch in found]).tolist() == [one % 7 for one in wanted]
    assert list(data.chosen([], 4)) == []
