"""Security check of Zarr groups before they are read: links, sizes, codecs, missing chunks."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

MAX_BYTES = 64 << 30
"""Limit of one array, unpacked; 100 million images with their labels take 0.4 GB."""

MAX_METADATA = 256 << 20
"""Bytes of one metadata file: those of a result hold the labels of all its units."""

MAX_RATIO = 32_768
"""Unpacked over packed bytes: Zstandard, which writes our stores, can do no more, for blocks of
128 KiB take at least 4 bytes."""

SMALL = 64 << 20
"""Bytes that arrays may claim whatever lies on the disk: except in results, chunks of nothing but
the fill value need not be there."""

_METADATA = ("zarr.json", ".zarray", ".zgroup", ".zmetadata")


def check_folder(
    folder: Path,
    *,
    only: Collection[str] | None = None,
    max_bytes: int = MAX_BYTES,
    whole: bool = False,
) -> None:
    """Refuse a Zarr group that leads elsewhere, would not fit, or would run what it holds.

    A symbolic link inside it could show any file of the machine as data; a named pipe waits for
    ever; an array can claim any shape in a few bytes; and one codec unpickles, which some versions
    of numcodecs allow. The folder itself may be reached through a link, and other stores that lie
    in it, beside the arrays ``only`` that will be read, may be as they like but for links. With
    ``whole`` every chunk must be there, as in results: Zarr takes a missing one for zeros.
    """
    claimed = stored = 0
    described: list[Path] = []
    for place, folders, files in os.walk(folder):
        read = only is None or place == str(folder) or _top(folder, Path(place)) in only
        for name in (*folders, *files):
            path = Path(place, name)
            _check_kind(folder, path)
            if not read:
                continue
            if name in _METADATA:
                described.append(path)
            elif name in files:
                stored += path.stat().st_size
    for path in described:
        for array in _described(_metadata(folder, path)):
            claimed += _check_array(path, array, max_bytes)
            if whole and path.parent != folder:  # a group may repeat its members' metadata
                _check_chunks(path, array)
    possible = SMALL + MAX_RATIO * stored
    if claimed > possible:
        raise OSError(
            f"{folder}: the shapes of its arrays claim {claimed} bytes, what is stored can hold at "
            f"most {possible}"
        )
    free = psutil.virtual_memory().available
    if claimed > max(SMALL, free):
        raise OSError(f"{folder}: its arrays take {claimed} bytes, {free} are free in memory")


def _top(folder: Path, place: Path) -> str:
    return place.relative_to(folder).parts[0]


def check_opened(folder: Path) -> None:
    """Refuse metadata that are no files, which opening a group would follow or wait for."""
    for name in (*_METADATA, ".zattrs"):
        _check_kind(folder, folder / name)


def _check_kind(folder: Path, path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if stat.S_ISLNK(mode):
        raise OSError(f"{folder}: {path.relative_to(folder)} is a symbolic link")
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(f"{folder}: {path.relative_to(folder)} is neither a file nor a folder")


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


def _check_array(path: Path, array: dict[str, Any], max_bytes: int) -> int:
    """Return the bytes that an array claims, or of one of its chunks where that is larger."""
    claims = [0]
    for shape in _shapes(array):
        numbers = isinstance(shape, list) and all(isinstance(size, int) for size in shape)
        if not numbers or min(shape, default=0) < 0:
            raise OSError(f"{path}: expected a shape, found {shape!r}")
        claims.append(_itemsize(array) * math.prod(shape))
        if claims[-1] > max_bytes:
            raise OSError(f"{path}: shape {shape} is larger than the limit of {max_bytes} bytes")
    codecs = [array.get("compressor"), *_listed(array, "filters"), *_listed(array, "codecs")]
    for codec in codecs:
        if isinstance(codec, dict) and "pickle" in str(codec.get("id", codec.get("name"))):
            raise OSError(f"{path}: holds pickled objects, expected numbers and text")
    return max(claims)


def _check_chunks(path: Path, array: dict[str, Any]) -> None:
    shape, chunk = _shapes(array)
    if len(chunk) != len(shape) or not all(chunk):
        raise OSError(f"{path}: expected chunks for the shape {shape}, found {chunk!r}")
    expected = math.prod(-(-size // part) for size, part in zip(shape, chunk, strict=True))
    found = sum(len(files) for _, _, files in os.walk(path.parent / "c"))
    if found < expected:
        raise OSError(f"{path.parent}: {expected - found} of its {expected} chunks are missing")


def _shapes(array: dict[str, Any]) -> tuple[Any, Any]:
    chunk = _inner(_inner(array.get("chunk_grid"), "configuration"), "chunk_shape")
    return array["shape"], array.get("chunks", chunk) or []


def _itemsize(array: dict[str, Any]) -> int:
    """Bytes of one entry, 8 at least; text and raw bytes may have any length."""
    kind = array.get("data_type", array.get("dtype"))
    length = _inner(_inner(kind, "configuration"), "length_bytes")
    if isinstance(length, int):
        return max(8, length)
    if isinstance(kind, str) and kind[:1] == "r" and kind[1:].isdigit():  # raw, counted in bits
        return max(8, int(kind[1:20]) // 8)
    try:
        return max(8, np.dtype(kind).itemsize if isinstance(kind, str) else 8)
    except (TypeError, ValueError):
        return 8


def _inner(item: Any, key: str) -> Any:
    return item.get(key) if isinstance(item, dict) else None


def _listed(array: dict[str, Any], key: str) -> list[Any]:
    found = array.get(key)
    return found if isinstance(found, list) else []
