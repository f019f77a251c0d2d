"""Labelled images named by a word, as on the command line: ``demo``, ``images.npz``, a folder."""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyablate import demo
from pyablate._validation import check_count
from pyablate.io.class_map import class_map
from pyablate.io.idx import read_idx
from pyablate.io.image_files import image_batches, moments
from pyablate.io.image_folder import ImageFolder
from pyablate.io.tar_shards import TarShards, archives

_log = logging.getLogger("pyablate")

DATA_SPECS = ("demo", "FOLDER", "FILE.npz", "FILE.tar", "IMAGES-idx3-ubyte[.gz]")
# Arrays of images and labels in .npz files, in the order looked for; MedMNIST's hold splits.
NPZ_KEYS = (("images", "labels"), ("x", "y"), ("test_images", "test_labels"))
# Limit of one decompressed array, against decompression bombs.
MAX_BYTES = 8 << 30


@dataclass(frozen=True)
class Pixels:
    """How the images of a known model are prepared.

    Attributes
    ----------
    origin : str
        The model.
    size : (int, int) or None
        Shorter side after scaling, and side of the central square that is cut out.
    interpolation : str or None
        How pixels are scaled.
    mean, std : sequence of float or None
        Per channel, of images in ``[0, 1]``.
    """

    origin: str
    size: tuple[int, int] | None
    interpolation: str | None
    mean: Sequence[float] | None
    std: Sequence[float] | None

    def complete(self, **given: Any) -> dict[str, Any]:
        """Put what the model brings where nothing was given, and say which was used."""
        used = {
            name: getattr(self, name) if value is None else value for name, value in given.items()
        }
        told = [
            f"{name} {_told(value)} {f'of {self.origin}' if given[name] is None else 'as given'}"
            for name, value in used.items()
            if value is not None
        ]
        _log.info("data: %s", "; ".join(told))
        return used


def _told(value: Any) -> str:
    if isinstance(value, str | int):
        return str(value)
    return ",".join(f"{number:g}" for number in value)


@dataclass(frozen=True)
class Data:
    """Images, float32 ``[N, C, H, W]``, labels, int64 ``[N]``, and names of classes if known.

    They come at once, or in batches that can be gone through any number of times. Without labels,
    a pair has None for them, and batches are images alone.
    """

    batches: tuple[Tensor, Tensor | None] | Iterable[Any]
    class_names: tuple[str, ...] | None

    def first(self, count: int) -> Tensor:
        """Return the first images, as many as `count` if the first batch has them."""
        batches = self.batches
        images = batches[0] if isinstance(batches, tuple) else next(iter(batches))
        return (images if isinstance(images, Tensor) else images[0])[:count]


def load_data(
    spec: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    size: int | tuple[int, int] | None = None,
    interpolation: str | None = None,
    channels: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    on_bad: str | None = None,
    classes: Any = None,
    own: Pixels | None = None,
    unlabelled: bool = False,
    batch_size: int = 128,
    workers: int = 0,
) -> Data:
    """Return the labelled images that `spec` names.

    Parameters
    ----------
    spec : str or path
        ``demo``, the shipped images; a folder with one sub-folder of images per class (sorted
        names are the classes, as numbers if all of them are); a tar archive of images and ``.cls``
        files, or a folder of such shards; an ``.npz`` file with arrays
        ``images`` and ``labels``, or ``x`` and ``y``, or ``test_images`` and ``test_labels`` (the
        test split of MedMNIST), and optionally ``class_names``; an idx file, gzipped or not.
        In files, uint8 is scaled to ``[0, 1]`` and floats stay as they are; ``[N, H, W]`` is taken
        as grey images, ``[N, H, W, C]`` with 1, 3 or 4 channels becomes ``[N, C, H, W]``.
    labels : path, optional
        The labels (idx or ``.npy``) of an idx or ``.npz`` file. By default those of an idx file
        are looked for beside it, under the names MNIST uses.
    limit : int, optional
        Number of images: the first ones, but in an image folder spread evenly over the classes,
        because its files come sorted by class.
    size : int or (int, int), optional
        Image files only: scale the shorter side to `size`, then cut out the central square; a
        pair gives the two lengths apart, as in ``(256, 224)``.
    interpolation : str, optional
        Image files only: how pixels are scaled to `size`; by default "bilinear".
    channels : {1, 3}, optional
        Image files only: decode as grey or RGB. By default as many as the model has a mean for;
        else RGB where `mean` or `std` has three entries, and unless the images are all grey.
    mean, std : sequence of float, optional
        Per channel or one for all; the images, in ``[0, 1]``, become ``(images - mean) / std``.
    on_bad : {"error", "skip"}, optional
        Image files only: what happens to files that cannot be decoded, by default an error.
    classes : path, mapping or sequence, optional
        The classes of the network, as :func:`pyablate.io.class_map.class_map` takes them: names
        of the outputs, among which the sub-folders of an image folder are looked up.
    own : Pixels, optional
        What the model brings, where `size`, `interpolation`, `mean` or `std` is not given: for
        image folders, and the last two for files of uint8, which are not prepared yet.
    unlabelled : bool
        Take images alone: all that lie below a folder, whatever its sub-folders; of files no
        labels are read.
    batch_size, workers : int
        Image files only: images per batch, and decoding processes besides this one.

    Raises
    ------
    ValueError
        An argument or the content of a file is not what was expected.
    OSError
        A file is missing or unreadable.
    ImportError
        `spec` is an image folder and Pillow is not installed; or a library of `classes`.
    """
    if limit is not None:
        check_count("limit", limit)
    if unlabelled:
        _refuse("unlabelled", labels=labels)
    name = os.fspath(spec)
    path = Path(name)
    if name != "demo" and (path.is_dir() or (path.suffix == ".tar" and path.is_file())):
        _refuse("an image folder", labels=labels)
        check_count("batch_size", batch_size)
        check_count("workers", workers, 0)
        given = {"size": size, "interpolation": interpolation, "mean": mean, "std": std}
        if channels is None and own and own.mean is not None:
            channels = len(own.mean)  # those that the model takes
        read_as = TarShards if archives(path) else ImageFolder
        folder = read_as(
            path,
            limit=limit,
            channels=channels,
            **(own.complete(**given) if own else given),
            on_bad=on_bad or "error",
            class_index=classes,
            labelled=not unlabelled,
        )
        batches = image_batches(folder, batch_size=batch_size, workers=workers)
        return Data(batches, folder.classes or None)
    _refuse(name, size=size, interpolation=interpolation, channels=channels, on_bad=on_bad)
    class_names: tuple[str, ...] | None = None
    pair: tuple[Tensor, Tensor | None]
    whole_numbers = False
    if name == "demo":
        _refuse(name, labels=labels)
        images, known = demo.images(limit)
        pair, class_names = (images, None if unlabelled else known), demo.CLASSES
    elif not path.is_file():
        raise FileNotFoundError(
            f"data: expected {' | '.join(DATA_SPECS)}, found no file or folder {name!r}"
        )
    elif path.suffix == ".npz":
        arrays = _read_npz(path)
        apart = None if labels is None else _read_labels(Path(labels))
        read = _images_and_labels(arrays, apart, name, unlabelled=unlabelled)
        pair, whole_numbers = _tensors(*read, name, limit), read[0].dtype == np.uint8
        class_names = _class_names(arrays, name)
    else:
        numbers = None
        if not unlabelled:
            beside = Path(labels) if labels is not None else _labels_beside(path)
            numbers = _read_labels(beside)
        read = read_idx(path, max_bytes=MAX_BYTES), numbers
        pair, whole_numbers = _tensors(*read, name, limit), read[0].dtype == np.uint8
    if own and whole_numbers:
        mean, std = own.complete(mean=mean, std=std).values()
    if mean is not None or std is not None:
        pair = _normalised(pair[0], mean, std), pair[1]
    if classes is not None:
        class_names = class_map(classes).names
    return Data(pair, class_names)


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > MAX_BYTES:
            raise ValueError(f"data: {path} unpacks to {size} bytes, the limit is {MAX_BYTES}")
        with np.load(path, allow_pickle=False) as arrays:
            read = {key: arrays[key] for key in arrays.files}
    except zipfile.BadZipFile as error:
        raise ValueError(f"data: {str(path)!r} is no .npz file or damaged ({error})") from None
    except Exception as error:  # numpy raises whatever the damage leads to
        of_the_disk = isinstance(error, OSError) and error.filename is not None
        if of_the_disk or str(error).startswith("data:"):
            raise
        raise ValueError(f"data: cannot read {str(path)!r} ({_first_line(error)})") from None
    # numpy hands out the bytes of what is no array
    return {key: array for key, array in read.items() if isinstance(array, np.ndarray)}


def _images_and_labels(
    arrays: dict[str, NDArray[Any]], labels: NDArray[Any] | None, name: str, *, unlabelled: bool
) -> tuple[NDArray[Any], NDArray[Any] | None]:
    for images_key, labels_key in NPZ_KEYS:
        if images_key in arrays and (unlabelled or labels is not None or labels_key in arrays):
            read = arrays.get(labels_key) if labels is None else labels
            return arrays[images_key], None if unlabelled else read
    raise ValueError(
        f"data: expected arrays images and labels, or x and y, or test_images and test_labels, in "
        f"{name!r}, found {', '.join(arrays) or 'none'}; images alone go by --unlabelled"
    )


def _class_names(arrays: dict[str, NDArray[Any]], name: str) -> tuple[str, ...] | None:
    names = arrays.get("class_names")
    if names is None:
        return None
    if names.ndim != 1 or names.dtype.kind != "U":
        raise ValueError(
            f"data: expected class_names in {name!r} to be a list of strings, "
            f"found {names.dtype} {list(names.shape)}"
        )
    try:
        return tuple(str(one) for one in names)
    except (ValueError, SystemError) as error:  # numbers that are no characters
        raise ValueError(f"data: class_names in {name!r} are no text: {error}") from None


def _labels_beside(images: Path) -> Path:
    stem = images.name.removesuffix(".gz")
    if "images" not in stem:
        raise ValueError(
            f"data: expected {' | '.join(DATA_SPECS)}, got {str(images)!r}; "
            "an idx file under another name needs labels="
        )
    renamed = stem.replace("images", "labels").replace("idx3", "idx1").replace("idx4", "idx1")
    tried = [images.with_name(renamed + ".gz"), images.with_name(renamed)]
    for path in tried if images.name.endswith(".gz") else tried[::-1]:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"labels: expected {renamed!r}, gzipped or not, beside {str(images)!r}, found neither"
    )


def _read_labels(path: Path) -> NDArray[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"labels: expected a file, found none at {str(path)!r}")
    if path.suffix != ".npy":
        return read_idx(path, max_bytes=MAX_BYTES)
    try:
        labels = np.load(path, allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # as above
        raise ValueError(f"labels: cannot read {str(path)!r} ({_first_line(error)})") from None
    if not isinstance(labels, np.ndarray):
        raise ValueError(f"labels: expected one array in {str(path)!r}, found an archive")
    return labels


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _tensors(
    images: NDArray[Any], labels: NDArray[Any] | None, name: str, limit: int | None
) -> tuple[Tensor, Tensor | None]:
    if labels is not None and labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iu"):
        raise ValueError(
            f"labels: expected integers [N] for {name!r}, found {labels.dtype} {list(labels.shape)}"
        )
    if images.ndim not in (2, 3, 4) or (images.dtype != np.uint8 and images.dtype.kind != "f"):
        raise ValueError(
            f"data: expected uint8 or float images [N, ...] in {name!r}, "
            f"found {images.dtype} {list(images.shape)}"
        )
    if labels is not None and len(images) != len(labels):
        raise ValueError(
            f"data: expected as many labels as images in {name!r}, "
            f"found {len(labels)} labels and {len(images)} images"
        )
    if not images.size:
        raise ValueError(f"data: expected images in {name!r}, found shape {list(images.shape)}")
    images = _channels_first(images[:limit])
    pixels = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
    if images.dtype == np.uint8:
        pixels /= 255
    return pixels, None if labels is None else torch.from_numpy(labels[:limit].astype(np.int64))


def _channels_first(images: NDArray[Any]) -> NDArray[Any]:
    if images.ndim == 3:
        return images[:, None]
    counts = (1, 3, 4)
    if images.ndim == 4 and images.shape[3] in counts and images.shape[1] not in counts:
        return images.transpose(0, 3, 1, 2)
    return images


def _normalised(
    images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> Tensor:
    if images.ndim != 4:
        raise ValueError(f"mean, std: expected images [N, C, H, W], got {list(images.shape)}")
    centre, deviation = moments(mean, std, images.shape[1])
    return (images - centre) / deviation


def _refuse(source: str, **given: object) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: expected none with {source}, got {value!r}")
