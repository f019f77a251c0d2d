"""A folder of images with one sub-folder per class, decoded while it is read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from pyablate.io.class_map import ClassMap, class_map
from pyablate.io.image_files import SUFFIXES, ImageFiles, Source, pillow

_log = logging.getLogger("pyablate")

_SYSTEM = ("__MACOSX", "@eaDir")  # what archivers and servers leave beside the images


class ImageFolder(ImageFiles):
    """The images below `folder`, in the order of class and file name.

    Parameters
    ----------
    folder : Path
        Holds one sub-folder per class; the sorted names of the sub-folders are the classes. Names
        that are all whole numbers are sorted as numbers. Hidden and system folders do not count.
    limit : int, optional
        Number of images, taken in turn from every class, because files come sorted by class.
    class_index : path, mapping or sequence, optional
        The classes of the network, in any form that :func:`pyablate.io.class_map.class_map` takes,
        among which the sub-folders are looked up by WordNet id, class name or number; some may
        have no folder.
    labelled : bool
        Whether sub-folders are classes. If not, all images below `folder` are taken, without
        labels.
    **options
        How images are decoded: see :class:`pyablate.io.image_files.ImageFiles`.

    Attributes
    ----------
    classes : tuple of str
        Names of the sub-folders, or of all classes of `class_index`.
    files : list of (Path, int)
        Images and their classes, in order; -1 without labels.
    skipped : dict of Path to str
        Files left out, and why.

    Raises
    ------
    ImportError
        Pillow is not installed.
    OSError
        The folder cannot be read.
    ValueError
        There are no sub-folders or no images, an option is out of range, or a sub-folder is none
        of the classes of `class_index`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        limit: int | None = None,
        class_index: Any = None,
        labelled: bool = True,
        **options: Any,
    ) -> None:
        pillow()  # what is missing is told before the folder is gone through
        known = None if class_index is None else class_map(class_index)
        classes = known.names if known else ()
        folders = _class_folders(folder, known) if labelled else [(-1, ".")]
        if labelled and not known:
            classes = tuple(name for _, name in folders)
        by_folder = [[(path, n) for path in _images(folder / name)] for n, name in folders]
        files = _spread(by_folder, limit)
        super().__init__(folder, files, classes, labelled=labelled, **options)
        if labelled:
            self._warn_of_empty_classes([number for number, _ in folders])

    def _warn_of_empty_classes(self, expected: Sequence[int]) -> None:
        seen = {label for _, label in self.files}
        empty = [self.classes[label] for label in expected if label not in seen]
        if empty:
            _log.warning(
                "%d of the classes have no image among those read, such as %r", len(empty), empty[0]
            )


def _class_folders(folder: Path, known: ClassMap | None) -> list[tuple[int, str]]:
    """Return number and name of each sub-folder, in the order of the classes."""
    names = [path.name for path in folder.iterdir() if _is_class(path)]
    if not names:
        raise ValueError(
            f"data: expected one sub-folder per class in {str(folder)!r}, found 0; images without "
            "classes go by --unlabelled (labelled=False)"
        )
    if known is None:
        return list(enumerate(_in_order(names)))
    return sorted(zip(known.match(names), names, strict=True))


def _is_class(path: Path) -> bool:
    return path.is_dir() and not is_hidden(path.name)


def is_hidden(name: str) -> bool:
    """Whether a file or folder does not count, by its name."""
    return name.startswith(".") or name in _SYSTEM


def _in_order(names: list[str]) -> tuple[str, ...]:
    """Sort names of classes: as text, or as numbers where that is what all of them are."""
    as_text = sorted(names)
    if not all(name.isascii() and name.isdecimal() for name in names):
        return tuple(as_text)
    as_numbers = sorted(names, key=lambda name: (int(name), name))
    if as_numbers != as_text:
        _log.warning(
            "data: the classes are sorted as numbers (%s); tools that sort them as text have "
            "another order (%s)",
            ", ".join(as_numbers[:12]),
            ", ".join(as_text[:12]),
        )
    return tuple(as_numbers)


def _images(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(map(is_hidden, path.relative_to(folder).parts))
        and path.is_file()
    )


def _spread(by_folder: list[list[tuple[Path, int]]], limit: int | None) -> list[tuple[Source, int]]:
    in_turn = [item for item in chain(*zip_longest(*by_folder)) if item is not None]
    return sorted(in_turn[:limit], key=lambda item: (item[1], item[0]))
