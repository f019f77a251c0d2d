"""The data of a run: images and labels from arrays, loaders or iterables, checked, in batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from pyablate.data.inputs import (
    LABELS,
    Inputs,
    as_tensor,
    is_integer,
    is_structured,
    labels_apart,
    scaled,
)
from pyablate.runtime.host_to_device import sent

_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)

_ROWS = 64
"""Images that are read of a data set at a time."""


@dataclass(frozen=True)
class Batch:
    """Some images of the data.

    Attributes
    ----------
    index : Tensor
        int64 ``[N]``, index of each image in the data; on the CPU.
    images : Tensor
        ``[N, ...]``, in the engine's dtype and on its device.
    labels : Tensor
        int64 ``[N]``, on the engine's device; -1 where the data have none.
    """

    index: Tensor
    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.index)

    @property
    def device(self) -> torch.device:
        """The engine's device."""
        return self.images.device

    def take(self, image: Tensor) -> Batch:
        """Only the images at these positions of the batch, int64 on the CPU."""
        there = sent(image, self.device)
        return Batch(self.index[image], self.images[there], self.labels[there])

    @classmethod
    def joined(cls, parts: Sequence[Batch]) -> Batch:
        """Join the images of some batches, in order."""
        index, images, labels = zip(*((p.index, p.images, p.labels) for p in parts), strict=True)
        return cls(torch.cat(index), torch.cat(images), torch.cat(labels))

    def split(self, size: int) -> Iterator[Batch]:
        """Parts of at most ``size`` images, in order."""
        if len(self) <= size:
            yield self
            return
        parts = (part.split(size) for part in (self.index, self.images, self.labels))
        for index, images, labels in zip(*parts, strict=True):
            yield Batch(index, images, labels)

    def to(self, dtype: torch.dtype) -> Batch:
        """Return the same images in another dtype."""
        return Batch(self.index, self.images.to(dtype), self.labels)


class Data:
    """Images and labels, read once per pass and handed out in batches of any size.

    Parameters
    ----------
    source : pair of arrays, data set, DataLoader or iterable of (images, labels)
        A pair is taken whole. Of a data set, as of torch or of Hugging Face's ``datasets``, each
        item is one image. Anything else is iterated; batches may have any sizes. For images
        may stand a dict or tuple of several inputs, for a pair or a batch a dict of inputs and
        "labels": see :mod:`pyablate.data.inputs`. Images alone (an array, ``(images, None)``,
        batches without labels) where ``unlabelled`` are taken.
    dtype, device
        What the images become; those of uint8 are scaled to ``[0, 1]``, which the log tells once.
    unlabelled : bool
        Whether images without labels are taken; then all labels are -1.

    Attributes
    ----------
    labelled : bool
        Whether there are labels; as long as no image has been read, True.

    Raises
    ------
    TypeError
        Not a pair, not iterable, items that are not (images, labels), labels that
        :func:`class_numbers` does not take, or none where they are needed.
    ValueError
        Empty, lengths or image shapes that differ, negative labels, images with NaN or infinities;
        the message says where.
    """

    def __init__(
        self,
        source: Any,
        *,
        dtype: torch.dtype,
        device: torch.device,
        unlabelled: bool = False,
    ) -> None:
        self.dtype = dtype
        self.device = device
        self.labelled = True
        self._unlabelled = unlabelled
        self.classes: int | None = None  # labels from here on are errors, once it is known
        self.inputs: Inputs | None = None
        """How several inputs lie in one image, known when the first batch has been read."""
        self.integers: Inputs | None = None
        """How a model may need images that came as integers: as indices."""
        self._shape: tuple[int, ...] | None = None
        if isinstance(source, Mapping):
            self._source: Iterable[Any] = [source]
        elif _is_pair(source):
            self._source = [tuple(source)]
        elif isinstance(source, (Tensor, np.ndarray)):
            self._source = [(source, None)]
        elif _is_data_set(source):
            self._source = DataLoader(_with_tensors(source), _ROWS)
        elif isinstance(source, (str, bytes)) or not isinstance(source, Iterable):
            raise TypeError(
                "data: expected (images, labels), a data set, a DataLoader or an iterable of "
                "(x, y), "
                f"got {type(source).__name__}"
            )
        else:
            self._source = source

    def __len__(self) -> int:
        """Count the images; iterates once if the source does not say."""
        if isinstance(self._source, list):
            return sum(len(images) for images, _ in self._raw())
        loader = self._source
        # A loader with the caller's own batches has no batch size, and its sampler says nothing.
        known = isinstance(loader, DataLoader) and loader.batch_size and not loader.drop_last
        sampler = getattr(loader, "sampler", None)
        if known and isinstance(sampler, Sized):
            return len(sampler)
        self.hold()
        return len(self)

    def hold(self) -> None:
        """Keep every image in memory, so that the data can be read again and at random."""
        if not isinstance(self._source, list):
            # Copies: the source may fill the same memory again and again.
            pairs, count, room = [], 0, _room()
            for images, labels in self._raw():
                pairs.append((images.clone(), labels.clone()))
                count += len(images)
                room -= images.nbytes if images.device.type == "cpu" else 0
                if room < 0:
                    raise ValueError(
                        f"data: the first {count:,} images fill the memory that is free, and more "
                        "follow; give a data set that is read by index, or end what is endless"
                    )
            self._source = pairs if self.labelled else [(images, None) for images, _ in pairs]

    @property
    def shuffled(self) -> bool:
        """Whether a loader gives its images in another order each time, as far as it tells."""
        sampler = getattr(self._source, "sampler", None)
        return isinstance(self._source, DataLoader) and isinstance(sampler, _SHUFFLING)

    def hold_if_read_once(self) -> None:
        """Keep the images of a source that can be iterated only once, such as a generator."""
        if iter(self._source) is iter(self._source):
            self.hold()

    def first(self, count: int) -> Batch:
        """Look at the first images, ``count`` at most; they are read again later."""
        self.hold_if_read_once()
        for batch in self.batches(count):
            # A copy: networks may work in place, and a batch may be a view of the caller's images.
            return Batch(batch.index, batch.images.clone(), batch.labels)
        raise ValueError("data: no images")

    def at(self, index: Tensor) -> Tensor:
        """Images by index, after :meth:`hold`."""
        if not isinstance(self._source, list):
            raise RuntimeError("hold the data before reading it at random")
        if len(self._source) > 1 or not _is_plain(self._source[0]):
            images, labels = (torch.cat(parts) for parts in zip(*self._raw(), strict=True))
            self._source = [(images, labels if self.labelled else None)]
        images = as_tensor(self._source[0][0])
        return self._converted(images[index.to(images.device)])

    @property
    def dataset(self) -> Any:
        """The data set of a loader that reads it in order, by index; None for other sources."""
        loader = self._source
        return loader.dataset if isinstance(loader, DataLoader) and _by_index(loader) else None

    def some(self, index: Sequence[int]) -> Iterator[Batch]:
        """Hand out only these images of a :attr:`dataset`, given in ascending order."""
        place = 0
        for number, item in enumerate(_only(self._source, index)):  # type: ignore[arg-type]
            images, labels = self._check(number, item)
            yield Batch(torch.as_tensor(index[place : place + len(images)]), images, labels)
            place += len(images)

    def chosen(self, index: Sequence[int], size: int) -> Iterator[Batch]:
        """Hand out only these images, given in ascending order, ``size`` at a time.

        A source that cannot be read by index is read up to its end.
        """
        wanted = torch.as_tensor(list(index))
        held: list[Batch] = []  # each of a few images, which by themselves would be slow
        for batch in self._around(wanted, size):
            here = torch.isin(batch.index, wanted).nonzero().squeeze(1)
            if len(here):
                held.append(batch.take(here))
            if sum(map(len, held)) >= size:
                *full, rest = Batch.joined(held).split(size)
                yield from full
                held = [rest]
        if held:
            yield Batch.joined(held)

    def _around(self, wanted: Tensor, size: int) -> Iterator[Batch]:
        """Hand out batches among which these images are."""
        if self.dataset is None:
            yield from self.batches(size)
            return
        for batch in self.some(wanted.tolist()):
            images, labels = self._converted(batch.images), sent(batch.labels, self.device)
            yield Batch(batch.index, images, labels)

    def batches(self, size: int, part: range | None = None) -> Iterator[Batch]:
        """Hand out batches of ``size`` images (the last may be smaller), of all or of a ``part``.

        A pair of tensors, or a loader that reads a data set in order by index, gives a part without
        reading what comes before; any other source is read up to its end.
        """
        if part is not None and len(part) == 0:
            return
        first = 0 if part is None else part.start
        waiting: list[tuple[Tensor, Tensor]] = []
        for images, labels in self._raw() if part is None else self._part(part):
            start = 0
            while start < len(images):
                room = size - sum(len(held) for held, _ in waiting)
                stop = min(len(images), start + room)
                waiting.append((images[start:stop], labels[start:stop]))
                start = stop
                if sum(len(held) for held, _ in waiting) == size:
                    yield self._join(first, waiting)
                    first += size
                    waiting = []
            if waiting and not isinstance(self._source, list):
                # A copy: the source may fill the same memory with its next images.
                waiting[-1] = (waiting[-1][0].clone(), waiting[-1][1].clone())
        if waiting:
            yield self._join(first, waiting)
        elif first == 0:
            raise ValueError("data: no images")

    def _join(self, first: int, parts: list[tuple[Tensor, Tensor]]) -> Batch:
        joined = parts[0][0] if len(parts) == 1 else torch.cat([images for images, _ in parts])
        images = self._converted(joined)
        total = float(images.detach().sum())
        if not math.isfinite(total):  # as one of them is not, or the sum overflows
            finite = torch.isfinite(images).flatten(1).all(dim=1)
            if not bool(finite.all()):
                where = first + int((~finite).nonzero()[0])
                raise ValueError(f"data: image {where} holds NaN or infinite values")
        labels = torch.cat([labels for _, labels in parts])
        if self.classes is not None and int(labels.max()) >= self.classes:
            where = int((labels >= self.classes).nonzero()[0])
            raise ValueError(
                f"data: label {int(labels[where])} of image {first + where} is outside the "
                f"model's {self.classes} classes (0 to {self.classes - 1})"
            )
        labels = sent(labels, self.device)
        return Batch(torch.arange(first, first + len(images)), images, labels)

    def _converted(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            return images.to(self.device, self.dtype)
        return scaled(images.to(self.device), self.dtype)

    def _raw(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number, item in enumerate(self._source):
            yield self._check(number, item)

    def _part(self, part: range) -> Iterator[tuple[Tensor, Tensor]]:
        """Only some consecutive images, in pieces as they come."""
        source, place = self._source, 0
        if isinstance(source, DataLoader) and _by_index(source):
            source, place = _only(source, part), part.start
        for number, item in enumerate(source):
            images, labels = self._check(number, item)
            own = slice(max(0, part.start - place), max(0, part.stop - place))
            place += len(images)
            if len(images[own]):
                yield images[own], labels[own]
            if place >= part.stop:
                return

    def _check(self, number: int, item: Any) -> tuple[Tensor, Tensor]:
        where = f"data: batch {number}"
        given, known = _images_and_labels(item, where)
        images = self._packed(given, where)
        if known is None:
            if not self._unlabelled:
                raise TypeError(f"{where}: expected (images, labels), got images without labels")
            labels = torch.full(images.shape[:1], -1)
        else:
            labels = class_numbers(known, where)
        if images.ndim < 2 or labels.ndim != 1 or len(images) != len(labels):
            raise ValueError(
                f"data: batch {number}: expected images [N, ...] and labels [N], got "
                f"{list(images.shape)} and {list(labels.shape)}"
            )
        if known is not None and len(labels) and int(labels.min()) < 0:
            raise ValueError(f"data: batch {number}: negative label {int(labels.min())}")
        shape = tuple(images.shape[1:])
        if self._shape not in (None, shape):
            raise ValueError(
                f"data: batch {number}: images of shape {list(shape)}, but earlier ones have "
                f"{list(self._shape or ())}"
            )
        if self._shape is not None and self.labelled != (known is not None):
            raise ValueError(f"{where}: expected labels for all images or for none")
        self._shape, self.labelled = shape, known is not None
        return images, labels.to("cpu", torch.int64)

    def _packed(self, given: Any, where: str) -> Tensor:
        """One tensor of what a batch has for images."""
        structured = is_structured(given)
        if not structured:
            try:
                images = given = as_tensor(given)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{where}: images: {error}") from None
            if not is_integer(images):
                return images
        try:
            inputs = Inputs.of(given)
            packed = inputs.pack(given, self.dtype)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from None
        if not structured:
            self.integers = inputs if self.inputs is None else None
            return packed
        if self.inputs is not None and not self.inputs.takes(inputs):
            raise ValueError(
                f"{where}: inputs {inputs}, but earlier ones are {self.inputs}; pad "
                "all of them to one length"
            )
        self.inputs = self.inputs or inputs
        return packed


def class_numbers(labels: Any, where: str) -> Tensor:
    """Turn labels as people have them into class numbers.

    Parameters
    ----------
    labels : Tensor, array or sequence of int
        Integers ``[N]`` or ``[N, 1]``, or one-hot rows ``[N, K]`` of any number type: exactly one
        entry of each row is 1, the others are 0.
    where : str
        What a message begins with.

    Returns
    -------
    Tensor
        Integers ``[N]``; other shapes, which the caller refuses, as they are.

    Raises
    ------
    TypeError
        Not integers, and no one-hot rows: text, fractions, several classes an image.
    """
    try:
        found = as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        kind = getattr(labels, "dtype", type(labels).__name__)
        raise TypeError(
            f"{where}: labels must be integers, got {kind}; class names become numbers by their "
            "place in class_names, as in [class_names.index(name) for name in labels]"
        ) from None
    if found.ndim == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if found.ndim == 2 and len(found):
        if bool((((found == 0) | (found == 1)).all(dim=1) & (found.sum(dim=1) == 1)).all()):
            return found.to(torch.int64).argmax(dim=1)
        raise TypeError(
            f"{where}: labels {list(found.shape)} must be one-hot, exactly one 1 in each row; "
            "of a network with several labels an image, ask for one at a time: its column, 0 or 1, "
            "and logits= (docs/guides/your-model.md)"
        )
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise TypeError(f"{where}: labels must be integers, got {found.dtype}")
    return found


def _images_and_labels(item: Any, where: str) -> tuple[Any, Any]:
    """Take a batch apart; no labels are None."""
    if isinstance(item, Mapping):
        return labels_apart(item, where)
    if isinstance(item, (Tensor, np.ndarray)):
        return item, None
    if isinstance(item, (tuple, list)) and len(item) in (1, 2):
        return (*item, None)[:2]
    kind = f"{len(item)} items" if isinstance(item, (tuple, list)) else type(item).__name__
    raise TypeError(f"{where}: expected (images, labels), got {kind}")


def _is_plain(item: Any) -> bool:
    """Whether a batch is a pair of one array of images and whatever labels."""
    return isinstance(item, tuple) and isinstance(item[0], (Tensor, np.ndarray))


def gathered(source: Any) -> tuple[Any, Tensor]:
    """Read all images and labels, int64 ``[N]``, of a source as they are, to be split.

    Images are a tensor ``[N, ...]``, or where a model takes several inputs the dict or tuple of
    them: see :func:`pyablate.data.inputs.chosen`.
    """
    data = Data(source, dtype=torch.float64, device=torch.device("cpu"))
    parts = [part for part in data._raw() if len(part[0])]
    if not parts:
        raise ValueError("data: no images")
    images, labels = parts[0]
    if len(parts) > 1:
        images = torch.cat([part for part, _ in parts])
        labels = torch.cat([part for _, part in parts])
    return images if data.inputs is None else data.inputs.as_given(images), labels


def _room() -> int:
    """Bytes of memory that nobody uses."""
    return int(psutil.virtual_memory().available)


def _by_index(loader: DataLoader[Any]) -> bool:
    """Whether a loader reads a data set in order, by index, in batches of its own making."""
    return (
        isinstance(loader.sampler, SequentialSampler)
        and isinstance(loader.batch_sampler, BatchSampler)
        and type(loader) is DataLoader
    )


def _only(loader: DataLoader[Any], part: Sequence[int]) -> DataLoader[Any]:
    """Return the same loader over a part of its data set."""
    return DataLoader(
        Subset(loader.dataset, part),
        loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator(),  # the caller's, or the global one, would be drawn from
        prefetch_factor=loader.prefetch_factor,
    )


def _is_data_set(source: Any) -> bool:
    """Whether a source has one image an index, not one batch."""
    if isinstance(source, (Sequence, DataLoader, IterableDataset)):
        return False
    if not hasattr(source, "__getitem__") or not hasattr(source, "__len__"):
        return False
    if isinstance(source, Dataset) or hasattr(source, "with_format") or not len(source):
        return True
    try:
        item = source[0]
    except (LookupError, TypeError):
        return False
    if isinstance(item, Mapping):
        labels = [item[key] for key in LABELS if key in item]
    else:
        labels = list(item[1:]) if isinstance(item, (tuple, list)) else []
    return len(labels) == 1 and np.ndim(labels[0]) == 0


def _with_tensors(source: Any) -> Any:
    """Let a data set of Hugging Face that makes lists of numbers make tensors."""
    listing = isinstance(getattr(source, "format", None), dict) and source.format["type"] is None
    return source.with_format("torch") if listing else source


def _is_pair(source: Any) -> bool:
    if not isinstance(source, (tuple, list)) or len(source) != 2:
        return False
    images, labels = source
    if not isinstance(images, (Tensor, np.ndarray)) and not is_structured(images):
        return False
    if isinstance(labels, (Tensor, np.ndarray)):
        # A list of two may as well hold two batches of images.
        return isinstance(source, tuple) or labels.ndim < 3
    return labels is None or _are_numbers(labels)


def _are_numbers(labels: Any) -> bool:
    """Whether a list holds numbers, or one-hot rows, of images rather than batches."""
    if not isinstance(labels, (list, tuple)):
        return False
    return all(isinstance(n, (int, float, np.number)) for one in labels for n in _listed(one))


def _listed(item: Any) -> list[Any]:
    return list(item) if isinstance(item, (list, tuple)) else [item]
