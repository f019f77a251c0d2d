"""Models and data named by a word, as on the command line: ``demo:vgg_bn``, ``images.npz``."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pyablate import demo
from pyablate.io.idx import read_idx
from pyablate.io.image_folder import ImageFolder, image_batches, moments
from pyablate.io.weights import load_state, read_state
from pyablate.network.exported import load_exported

MODEL_SPECS = ("demo:NAME", "module:factory", "FILE.pt2", "torchvision:NAME", "timm:NAME")
DATA_SPECS = ("demo", "FOLDER", "FILE.npz", "IMAGES-idx3-ubyte[.gz]")
# Arrays of images and labels in .npz files, in the order looked for; MedMNIST's hold splits.
NPZ_KEYS = (("images", "labels"), ("x", "y"), ("test_images", "test_labels"))
# Limit of one decompressed array, against decompression bombs.
MAX_BYTES = 8 << 30
_PREFIXES = ("demo", "torchvision", "timm")


@dataclass(frozen=True)
class Data:
    """Labelled images.

    Attributes
    ----------
    batches : (Tensor, Tensor) or iterable of (Tensor, Tensor)
        Images, float32 ``[N, C, H, W]``, and labels, int64 ``[N]``: at once, or in batches that
        can be gone through any number of times.
    count : int
        Number of images.
    class_names : tuple of str or None
        Where the source names its classes.
    source : str
        What was read, for the record.
    """

    batches: tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]
    count: int
    class_names: tuple[str, ...] | None
    source: str


def load_model(
    spec: str,
    weights: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device | None = None,
) -> nn.Module:
    """Return the model that `spec` names, in evaluation mode.

    Parameters
    ----------
    spec : str
        ``demo:NAME``, a network shipped with the package; ``module:factory``, a dotted module
        importable from the working directory and the name of a function that takes no arguments,
        or of a module instance; ``FILE.pt2``, a program of `torch.export`, exported in evaluation
        mode with a dynamic batch (it runs what it holds: open only files you trust);
        ``torchvision:NAME`` or ``timm:NAME``, where installed. The last two come with the
        pretrained weights of their library, downloaded where needed, unless `weights` is given.
    weights : path, optional
        A safetensors file, or a checkpoint read with ``weights_only=True``: a state dict, or a
        dict with one under any one key ("state_dict", "model", "net", "ema", ...); prefixes of
        names ("module.", "model.", "backbone.") are matched where exactly one reading fits.
    device : str or torch.device, optional
        Where to put the model; by default it stays where it was made.

    Raises
    ------
    ValueError
        `spec`, `weights` or `device` is not what was expected.
    OSError
        A file is missing or unreadable.
    ImportError
        A module or library is not installed.
    """
    place = None if device is None else _usable_device(device)
    state = None if weights is None else read_state(Path(weights))
    model = _model(spec, pretrained=state is None)
    if state is not None:
        load_state(model, state, os.fspath(weights or ""))
    return (model if place is None else model.to(place)).eval()


def load_data(
    spec: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 128,
    workers: int = 0,
) -> Data:
    """Return the labelled images that `spec` names.

    Parameters
    ----------
    spec : str or path
        ``demo``, the shipped images; a folder with one sub-folder of images per class (sorted
        names are the classes); an ``.npz`` file with arrays ``images`` and ``labels``, or ``x``
        and ``y``, or ``test_images`` and ``test_labels`` (the test split of MedMNIST), and
        optionally ``class_names``; an idx file, gzipped or not.
        In files, uint8 is scaled to ``[0, 1]`` and floats stay as they are; ``[N, H, W]`` is taken
        as grey images, ``[N, H, W, C]`` with 1, 3 or 4 channels becomes ``[N, C, H, W]``.
    labels : path, optional
        The labels (idx or ``.npy``) of an idx or ``.npz`` file. By default those of an idx file
        are looked for beside it, under the names MNIST uses.
    limit : int, optional
        Number of images: the first ones, but in an image folder spread evenly over the classes,
        because its files come sorted by class.
    size : int or (int, int), optional
        Image folders only: scale the shorter side to `size`, then cut out the central square; a
        pair gives the two lengths apart, as in ``(256, 224)``.
    channels : {1, 3}, optional
        Image folders only: decode as grey or RGB. By default as many as `mean` has entries, else
        RGB unless the images are grey.
    mean, std : sequence of float, optional
        Per channel or one for all; the images, in ``[0, 1]``, become ``(images - mean) / std``.
    batch_size, workers : int
        Image folders only: images per batch, and decoding processes besides this one.

    Raises
    ------
    ValueError
        An argument or the content of a file is not what was expected.
    OSError
        A file is missing or unreadable.
    ImportError
        `spec` is an image folder and Pillow is not installed.
    """
    limit = None if limit is None else _at_least(1, "limit", limit)
    name = os.fspath(spec)
    path = Path(name)
    if name != "demo" and path.is_dir():
        _refuse("an image folder", labels=labels)
        images = ImageFolder(path, limit=limit, size=size, channels=channels, mean=mean, std=std)
        batches = image_batches(
            images,
            batch_size=_at_least(1, "batch_size", batch_size),
            workers=_at_least(0, "workers", workers),
        )
        return Data(batches, len(images), images.classes, name)
    _refuse(name, size=size, channels=channels)
    class_names: tuple[str, ...] | None = None
    if name == "demo":
        _refuse(name, labels=labels)
        pair, class_names = demo.images(limit), demo.CLASSES
    elif not path.is_file():
        raise FileNotFoundError(_unknown_data(name))
    elif path.suffix == ".npz":
        arrays = _read_npz(path)
        given = None if labels is None else _read_labels(Path(labels))
        pair = _tensors(*_images_and_labels(arrays, given, name), name, limit)
        class_names = _class_names(arrays, name)
    else:
        found = Path(labels) if labels is not None else _labels_beside(path)
        pair = _tensors(read_idx(path, max_bytes=MAX_BYTES), _read_labels(found), name, limit)
    if mean is not None or std is not None:
        pair = _normalised(pair[0], mean, std), pair[1]
    return Data(pair, len(pair[1]), class_names, name)


# --- models -------------------------------------------------------------------------------------


def _model(spec: str, *, pretrained: bool) -> nn.Module:
    if spec.endswith(".pt2"):
        return load_exported(Path(spec))
    prefix, colon, name = spec.partition(":")
    if not (prefix and colon and name):
        near = difflib.get_close_matches(spec, demo.NETWORKS, n=1)
        hint = f"; did you mean demo:{near[0]}?" if near else ""
        raise ValueError(f"model: expected {' | '.join(MODEL_SPECS)}, got {spec!r}{hint}")
    if prefix == "demo":
        return demo.network(name) if pretrained else demo.build(name)
    if prefix == "torchvision":
        return _torchvision(name, pretrained)
    if prefix == "timm":
        return _timm(name, pretrained)
    return _from_module(prefix, name, spec)


def _torchvision(name: str, pretrained: bool) -> nn.Module:
    models = _library("torchvision", "torchvision.models")
    _known("torchvision", name, models.list_models())
    return _built(lambda: models.get_model(name, weights="DEFAULT" if pretrained else None), name)


def _timm(name: str, pretrained: bool) -> nn.Module:
    timm = _library("timm", "timm")
    # timm takes "name.tag" for one of several sets of weights.
    _known("timm", name.partition(".")[0], timm.list_models())
    return _built(lambda: timm.create_model(name, pretrained=pretrained), name)


def _library(name: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"model: {name}:NAME needs {name}, which cannot be imported ({error}): "
            f"pip install {name}"
        ) from None


def _known(library: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ValueError(f"model: expected the name of a {library} model, got {name!r}{hint}")


def _from_module(module: str, name: str, spec: str) -> nn.Module:
    with _importable_from_cwd():
        try:
            found = attrgetter(name)(importlib.import_module(module))
        except ModuleNotFoundError as error:
            near = difflib.get_close_matches(module, _PREFIXES, n=1)
            hint = f"; did you mean {near[0]}:{name}?" if near else ""
            raise ImportError(f"model: cannot import {module!r} ({error}){hint}") from error
        except AttributeError as error:
            raise ValueError(f"model: no {name!r} in the module {module!r} ({error})") from error
        if isinstance(found, nn.Module):
            return found
        if not callable(found):
            raise ValueError(
                f"model: expected a function or torch.nn.Module at {spec!r}, "
                f"found {type(found).__name__}"
            )
        return _built(found, spec)


def _built(factory: Callable[[], Any], spec: str) -> nn.Module:
    try:
        model = factory()
    except (ImportError, OSError):
        raise
    except Exception as error:
        # Whatever a user's factory raises: the name of the model tells more than the line of ours.
        raise ValueError(f"model: {spec!r} failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model: expected {spec!r} to return a torch.nn.Module, got {type(model).__name__}"
        )
    return model


@contextmanager
def _importable_from_cwd() -> Iterator[None]:
    # As with "python -m"; an installed command has its own folder there instead.
    cwd = os.getcwd()
    sys.path.insert(0, cwd)
    try:
        yield
    finally:
        sys.path.remove(cwd)


def _usable_device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"device: expected one this machine has, got {str(device)!r} ({reason})"
        ) from None
    return place


# --- data ---------------------------------------------------------------------------------------


def _unknown_data(name: str) -> str:
    near = difflib.get_close_matches(name, ["demo"], cutoff=0.5)
    hint = "; did you mean demo?" if near else ""
    return f"data: expected {' | '.join(DATA_SPECS)}, found no file or folder {name!r}{hint}"


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
    arrays: dict[str, NDArray[Any]], labels: NDArray[Any] | None, name: str
) -> tuple[NDArray[Any], NDArray[Any]]:
    for images_key, labels_key in NPZ_KEYS:
        if images_key in arrays and (labels is not None or labels_key in arrays):
            return arrays[images_key], arrays[labels_key] if labels is None else labels
    raise ValueError(
        f"data: expected arrays images and labels, or x and y, or test_images and test_labels, in "
        f"{name!r}, found {', '.join(arrays) or 'none'}"
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
    images: NDArray[Any], labels: NDArray[Any], name: str, limit: int | None
) -> tuple[Tensor, Tensor]:
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels: expected integers [N] for {name!r}, found {labels.dtype} {list(labels.shape)}"
        )
    if images.ndim not in (2, 3, 4) or (images.dtype != np.uint8 and images.dtype.kind != "f"):
        raise ValueError(
            f"data: expected uint8 or float images [N, ...] in {name!r}, "
            f"found {images.dtype} {list(images.shape)}"
        )
    if len(images) != len(labels):
        raise ValueError(
            f"data: expected as many labels as images in {name!r}, "
            f"found {len(labels)} labels and {len(images)} images"
        )
    if not images.size:
        raise ValueError(f"data: expected images in {name!r}, found shape {list(images.shape)}")
    images, labels = _channels_first(images[:limit]), labels[:limit]
    pixels = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
    if images.dtype == np.uint8:
        pixels /= 255
    return pixels, torch.from_numpy(labels.astype(np.int64))


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


def _at_least(least: int, name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    return value
