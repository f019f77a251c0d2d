"""What a Zarr group on disk may hold, checked before it is read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_BYTES = 64 << 30
"""Limit of one array, unpacked; 100 million images with their labels take 0.4 GB."""

MAX_METADATA = 256 << 20
"""Bytes of one metadata file: those of a result hold the labels of all its units."""

_METADATA = ("zarr.json", ".zarray", ".zgroup", ".zmetadata")


def check_folder(folder: Path, *, max_bytes: int = MAX_BYTES) -> None:
    """Refuse a Zarr group that leads elsewhere, would not fit, or would run what it holds.

    A symbolic link inside it could show any file of the machine as data; an array can claim any
    shape in a few bytes; and one codec unpickles, which some versions of numcodecs allow.

    Parameters
    ----------
    folder : Path
        Of Zarr format 2 or 3. It may itself be reached through a link.
    max_bytes : int
        Limit of one array.

    Raises
    ------
    OSError
        The group holds one of these, or its metadata are damaged.
    """
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink():
                raise OSError(f"{folder}: {path.relative_to(folder)} is a symbolic link")
            if name in _METADATA:
                for array in _described(_metadata(folder, path)):
                    _check_array(path, array, max_bytes)


def _metadata(folder: Path, path: Path) -> Any:
    if path.stat().st_size > MAX_METADATA:
        raise OSError(f"{path}: expected at most {MAX_METADATA} bytes of metadata")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        name = path.relative_to(folder)
        raise OSError(f"{folder}: damaged metadata in {name} ({error})") from None


def _described(content: Any) -> Iterator[dict[str, Any]]:
    """Arrays in metadata, also in those that a group keeps of all its members."""
    waiting = [content]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            if "shape" in item:
                yield item
            waiting += [value for key, value in item.items() if key != "attributes"]


def _check_array(path: Path, array: dict[str, Any], max_bytes: int) -> None:
    chunk = _inner(_inner(array.get("chunk_grid"), "configuration"), "chunk_shape")
    for shape in (array["shape"], array.get("chunks", chunk) or []):
        numbers = isinstance(shape, list) and all(isinstance(size, int) for size in shape)
        if not numbers or min(shape, default=0) < 0:
            raise OSError(f"{path}: expected a shape, found {shape!r}")
        if 8 * math.prod(shape) > max_bytes:
            raise OSError(f"{path}: shape {shape} is larger than the limit of {max_bytes} bytes")
    codecs = [array.get("compressor"), *_listed(array, "filters"), *_listed(array, "codecs")]
    for codec in codecs:
        if isinstance(codec, dict) and "pickle" in str(codec.get("id", codec.get("name"))):
            raise OSError(f"{path}: holds pickled objects, expected numbers and text")


def _inner(item: Any, key: str) -> Any:
    return item.get(key) if isinstance(item, dict) else None


def _listed(array: dict[str, Any], key: str) -> list[Any]:
    found = array.get(key)
    return found if isinstance(found, list) else []
