"""Image files, decoded while they are read: size, channels, mean, std, damaged ones left out."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import struct
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pyablate._validation import check_choice
from pyablate.runtime.locks import export_lock
from pyablate.runtime.out_of_memory import is_shortage

_log = logging.getLogger("pyablate")

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")
# The limit above which Pillow itself suspects a decompression bomb.
MAX_PIXELS = 89_478_485
INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "box", "hamming", "lanczos")
_GREY_MODES = ("1", "L", "I")  # and those that begin so, such as LA and I;16
_EXPANDED = ("PNG", "PPM")  # whose 16 bits Pillow may hand out as 32
_LOOKED_AT = 16


@dataclass(frozen=True)
class Member:
    """A file in an archive that is not compressed: where its bytes lie."""

    archive: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        """Return the names of both."""
        return f"{self.archive}:{self.name}"

    def read(self) -> bytes:
        """Read the bytes."""
        with self.archive.open("rb") as archive:
            archive.seek(self.offset)
            return archive.read(self.size)


Source = Path | Member
"""Where one image is."""


class ImageFiles(Dataset[Any]):
    """Images from files, with their classes.

    Parameters
    ----------
    root : Path
        The folder or archive that they are in.
    files : list of (Path or Member, int)
        Images and their classes, in order.
    classes : tuple of str
        Names of the classes.
    labelled : bool
        Whether the classes are known. If not, images come alone.
    size : int or (int, int), optional
        Scale the shorter side to `size`, then cut out the central square of `size` pixels; a pair
        gives the two lengths apart, as in ``(256, 224)``. By default images stay as they are.
    interpolation : str, optional
        How pixels are scaled to `size`: one of :data:`INTERPOLATIONS`, by default "bilinear".
    channels : {1, 3}, optional
        Grey or RGB. By default RGB where `mean` or `std` has three entries, and unless the images
        looked at first are all grey.
    mean, std : sequence of float, optional
        Per channel or one for all, subtracted and divided by, after scaling to ``[0, 1]``.
    on_bad : {"error", "skip"}
        What happens to files that cannot be decoded: an error when one is read, or they are left
        out and listed; ``"skip"`` decodes every file once to find them.

    Attributes
    ----------
    files, classes
        As above, without what was left out.
    skipped : dict of Path or Member to str
        Files left out, and why.

    Notes
    -----
    Images are turned as their EXIF orientation says. Those of 16 bits are scaled to 8, which the
    log tells once.

    Raises
    ------
    ImportError
        Pillow is not installed.
    ValueError
        There are no images, or an option is out of range.
    """

    def __init__(
        self,
        root: Path,
        files: list[tuple[Source, int]],
        classes: tuple[str, ...],
        *,
        labelled: bool = True,
        size: int | tuple[int, int] | None = None,
        interpolation: str | None = None,
        channels: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        on_bad: str = "error",
    ) -> None:
        check_choice("on_bad", on_bad, ("error", "skip"))
        check_choice("interpolation", interpolation or "bilinear", INTERPOLATIONS)
        self._interpolation = (interpolation or "bilinear").upper()
        pillow()  # missing, it is missed now and not at the first image
        self._root, self.files, self.classes, self._labelled = root, files, classes, labelled
        if not files:
            kinds = " ".join(SUFFIXES)
            raise ValueError(f"data: expected images ({kinds}) below {str(root)!r}, found none")
        self._size = None if size is None else _scale_and_crop(size)
        if channels not in (None, 1, 3):
            raise ValueError(f"channels: expected 1 or 3, got {channels!r}")
        self.channels = channels or _told(mean, std) or self._guess_channels()
        self._mean, self._std = moments(mean, std, self.channels)
        self._first_shape: tuple[int, ...] | None = None
        self._told = False
        self.skipped: dict[Source, str] = {}
        if on_bad == "skip":
            self._leave_out_damaged()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Tensor:
        """Return image `index`, float32 ``[channels, H, W]``, and its class index, if there is one.

        Raises
        ------
        ValueError
            The file is damaged, too large, or of another size than the first one read.
        """
        path, label = self.files[index]
        with _decoding(path):
            return (self._read(path), label) if self._labelled else self._read(path)

    def listing(self) -> Iterator[str]:
        """Name each image by class and place below the root, with the size of its file."""
        for source, label in self.files:
            if isinstance(source, Member):
                place, size = source.archive / source.name, source.size
            else:
                with _decoding(source):
                    place, size = source, source.stat().st_size
            yield f"{label} {size} {place.relative_to(self._root).as_posix()}"

    def _leave_out_damaged(self) -> None:
        for path, _ in self.files:
            try:
                with _decoding(path):
                    self._decode(path)
            except ValueError as error:
                if error.__context__ is not None and is_shortage(error.__context__):
                    raise  # the file is sound
                self.skipped[path] = str(error).removeprefix("data: ")
        self.files = [item for item in self.files if item[0] not in self.skipped]
        if not self.files:
            raise ValueError(f"data: none of the images below {str(self._root)!r} can be decoded")
        for path, why in self.skipped.items():
            _log.warning("data: %r is left out: %s", str(path), why)

    def _read(self, path: Source) -> Tensor:
        pixels = self._decode(path)
        image = torch.from_numpy(pixels).reshape(*pixels.shape[:2], -1).permute(2, 0, 1) / 255
        self._first_shape = self._first_shape or tuple(image.shape)
        if tuple(image.shape) != self._first_shape:
            raise ValueError(
                f"data: expected images of one size {list(self._first_shape)}, found "
                f"{list(image.shape)} in {str(path)!r}; give size= to scale and crop"
            )
        return (image - self._mean) / self._std

    def _decode(self, path: Source) -> Any:
        with self._open(path) as image:
            if self._size is not None:
                _check_scaled(path, *self._scaled(image))
            converted = self._of_8_bits(_upright(image), path).convert(
                "L" if self.channels == 1 else "RGB"
            )
        if self._size is not None:
            converted = self._cut_out(converted, self._size[1])
        return np.array(converted, dtype=np.uint8)

    def _open(self, path: Source) -> Any:
        images = pillow()  # no attribute: decoding processes get a pickled copy of this object
        with _decoding(path):
            try:
                image = images.open(io.BytesIO(path.read()) if isinstance(path, Member) else path)
            except images.DecompressionBombError as error:
                raise ValueError(f"data: {str(path)!r} is too large ({error})") from None
        if image.width * image.height > MAX_PIXELS:
            found = f"{image.width} x {image.height}"
            image.close()
            raise ValueError(
                f"data: {str(path)!r} is too large: expected at most {MAX_PIXELS} pixels, "
                f"found {found}"
            )
        if image.mode == "F":
            image.close()
            raise ValueError(
                f"data: expected 8 or 16 bits a channel, found floats in {str(path)!r}"
            )
        return image

    def _of_8_bits(self, image: Any, path: Source) -> Any:
        if not image.mode.startswith("I"):
            return image
        if image.mode == "I" and image.format not in _EXPANDED:
            raise ValueError(f"data: expected 8 or 16 bits a channel, found 32 in {str(path)!r}")
        values = np.asarray(image).astype(np.int64)  # Pillow would clip them
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError(f"data: expected 8 or 16 bits a channel, found 32 in {str(path)!r}")
        if not self._told:
            self._told = True
            _log.info("data: images of 16 bits are scaled to 8, such as %r", str(path))
        return pillow().fromarray(((values * 0xFF + 0x7FFF) // 0xFFFF).astype(np.uint8))

    # Both round the way torchvision's Resize and CenterCrop do, so that accuracies compare.
    def _scaled(self, image: Any) -> tuple[int, int]:
        assert self._size is not None
        short = max(1, min(image.size))
        return self._size[0] * image.width // short, self._size[0] * image.height // short

    def _cut_out(self, image: Any, crop: int) -> Any:
        width, height = self._scaled(image)
        image = image.resize((width, height), pillow().Resampling[self._interpolation])
        left, top = (round((side - crop) / 2) for side in (width, height))
        return image.crop((left, top, left + crop, top + crop))

    def _guess_channels(self) -> int:
        for path, _ in self.files[:: max(1, len(self.files) // _LOOKED_AT)]:
            # What is damaged is reported when its turn to be decoded comes.
            with contextlib.suppress(ValueError), self._open(path) as image:
                if not image.mode.startswith(_GREY_MODES):
                    return 3
        return 1


def _told(*moments: Sequence[float] | None) -> int | None:
    """Channels that figures are given for apart; one figure is for however many there are."""
    return 3 if any(given is not None and len(given) == 3 for given in moments) else None


def image_batches(images: ImageFiles, *, batch_size: int, workers: int = 0) -> DataLoader[Any]:
    """Return the images in order, in batches; drawing them leaves the global random state alone."""
    # A loader without a generator of its own takes a seed from the global one at every pass.
    generator = torch.Generator()
    return DataLoader(images, batch_size, num_workers=workers, generator=generator)


def moments(
    mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
) -> tuple[Tensor, Tensor]:
    """Return mean and deviation as float32 tensors ``[channels, 1, 1]``; 0 and 1 by default.

    Raises
    ------
    ValueError
        The lengths do not fit `channels`, a figure is not finite, or a deviation is not positive.
    """
    tensors = []
    for name, given, default in (("mean", mean, 0.0), ("std", std, 1.0)):
        values = torch.tensor([default] if given is None else list(given), dtype=torch.float32)
        if values.ndim != 1 or len(values) not in (1, channels):
            raise ValueError(f"{name}: expected 1 or {channels} figures, got {given!r}")
        if not values.isfinite().all() or (name == "std" and (values <= 0).any()):
            kind = "positive" if name == "std" else "finite"
            raise ValueError(f"{name}: expected {kind} figures, got {given!r}")
        tensors.append(values.expand(channels).reshape(-1, 1, 1))
    return tensors[0], tensors[1]


def pillow() -> Any:
    """Return Pillow, which is an extra."""
    try:
        return importlib.import_module("PIL.Image")
    except ImportError:
        raise ImportError("image folders need Pillow: pip install pillow") from None


@contextlib.contextmanager
def _decoding(path: Source) -> Iterator[None]:
    """Turn whatever Pillow raises about a damaged file into one error with the file's name."""
    try:
        # About sizes, which the header tells before any decoding, and about damaged metadata. The
        # filters are the whole process's: threads that change them at once would mix them up.
        with export_lock(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except FileNotFoundError:
        raise ValueError(
            f"data: {str(path)!r} has been removed since the folder was listed; put it back, and a "
            "run with an output goes on where it stopped"
        ) from None
    except Exception as error:
        if is_shortage(error):
            raise ValueError(f"data: not enough memory to read {str(path)!r}") from None
        if str(error).startswith("data:"):
            raise
        raise ValueError(f"data: cannot decode {str(path)!r} ({error})") from None


def _upright(image: Any) -> Any:
    """Turn an image as its EXIF orientation says; metadata that are damaged say nothing."""
    image.load()  # what is damaged in the image itself is an error
    try:
        return importlib.import_module("PIL.ImageOps").exif_transpose(image)
    except (SyntaxError, ValueError, KeyError, TypeError, ZeroDivisionError, struct.error):
        return image


def _check_scaled(path: Source, width: int, height: int) -> None:
    # The sides keep their ratio, and a strip one pixel wide may be a million long.
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"data: {str(path)!r} is too large: expected at most {MAX_PIXELS} pixels after scaling "
            f"to size=, which would make {width} x {height}"
        )


def _scale_and_crop(size: int | tuple[int, int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    good = len(pair) == 2 and all(isinstance(n, int) and not isinstance(n, bool) for n in pair)
    if not good or not 1 <= pair[1] <= pair[0]:
        raise ValueError(f"size: expected SIZE or (SCALE, CROP) with CROP <= SCALE, got {size!r}")
    return pair[0], pair[1]
