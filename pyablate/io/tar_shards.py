"""Images in tar archives, as WebDataset lays them out: ``0001.jpg`` beside ``0001.cls``."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from pyablate.io.class_map import ClassMap, class_map
from pyablate.io.image_files import SUFFIXES, ImageFiles, Member, Source, pillow
from pyablate.io.image_folder import is_hidden

_LONGEST = 256
"""Bytes of a label."""


def archives(path: Path) -> list[Path]:
    """Tar archives that a path stands for: itself, or those of a folder without other images."""
    if not path.is_dir():
        return [path] if path.suffix == ".tar" else []
    shown = sorted(entry for entry in path.iterdir() if not is_hidden(entry.name))
    if any(entry.is_dir() or entry.suffix.lower() in SUFFIXES for entry in shown):
        return []
    return [entry for entry in shown if entry.suffix == ".tar"]


class TarShards(ImageFiles):
    """The images in tar archives, in the order of archives and of images in each.

    Parameters
    ----------
    path : Path
        An archive that is not compressed, or a folder of them. Files are alike up to the first dot
        of their names: an image, and its class as a number in a ``.cls`` file.
    limit : int, optional
        Number of images, the first ones.
    class_index : path, mapping or sequence, optional
        The classes of the network, in any form that :func:`pyablate.io.class_map.class_map` takes;
        ``.cls`` files may name them then.
    labelled : bool
        Whether ``.cls`` files are read. If not, images come without labels.
    **options
        How images are decoded: see :class:`pyablate.io.image_files.ImageFiles`.

    Raises
    ------
    ImportError
        Pillow is not installed.
    OSError
        An archive cannot be read.
    ValueError
        An archive is compressed or damaged, an image has no class, there are no images, or an
        option is out of range.
    """

    def __init__(
        self,
        path: Path,
        *,
        limit: int | None = None,
        class_index: Any = None,
        labelled: bool = True,
        **options: Any,
    ) -> None:
        pillow()  # what is missing is told before the archives are gone through
        known = None if class_index is None else class_map(class_index)
        root = path if path.is_dir() else path.parent
        found = (s for archive in archives(path) for s in _samples(archive))
        files: list[tuple[Source, int]] = [
            (sample.image, sample.number(known) if labelled else -1)
            for sample in islice(found, limit)
        ]
        names = known.names if known else ()
        super().__init__(root, files, names, labelled=labelled, **options)


@dataclass
class _Sample:
    """Files that are alike up to the first dot of their names."""

    image: Member
    label: str | None

    def number(self, known: ClassMap | None) -> int:
        """Class of the image."""
        text = (self.label or "").strip()
        is_number = text.isascii() and text.isdecimal()
        if known is not None and text and not is_number:
            return known.match([text])[0]
        if not is_number:
            shown = repr(text) if text else "none"
            raise ValueError(
                f"data: expected the class of {str(self.image)!r} as a number in a .cls file "
                f"beside it, found {shown}"
            )
        return int(text)


def _samples(archive: Path) -> Iterator[_Sample]:
    """Go through one archive, whose files may come in any order."""
    images: dict[str, Member] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(archive, "r:") as tar:
            for file in tar:
                name = PurePosixPath(file.name)
                if not file.isreg() or file.issparse() or any(map(is_hidden, name.parts)):
                    continue
                key = str(name.parent / name.name.partition(".")[0])
                if name.suffix.lower() in SUFFIXES:
                    if key in images:
                        raise ValueError(
                            f"data: expected one image, found {images[key].name!r} and "
                            f"{file.name!r} in {str(archive)!r}"
                        )
                    images[key] = Member(archive, file.name, file.offset_data, file.size)
                elif name.suffix == ".cls":
                    content = tar.extractfile(file)
                    assert content is not None  # which it is of links and folders only
                    labels[key] = content.read(_LONGEST).decode(errors="replace")
    except tarfile.TarError as error:
        raise ValueError(
            f"data: cannot read {str(archive)!r} ({error}); expected a tar archive that is not "
            "compressed"
        ) from None
    for key, image in images.items():
        yield _Sample(image, labels.get(key))
