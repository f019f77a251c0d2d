"""Reading of idx files, the format of MNIST and its relatives."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from pyablate.runtime.chunking import READ

# Third byte of the magic number -> big-endian element type.
_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MAX_RANK = 8


class Openable(Protocol):
    """What `read_idx` needs of a path: `pathlib.Path` and package resources both have it."""

    @property
    def name(self) -> str:
        """Last component of the path."""
        ...

    def open(self, mode: Any = "r") -> Any:
        """Open the file; `read_idx` asks for ``"rb"``."""
        ...


def read_idx(
    source: str | os.PathLike[str] | Openable, *, max_bytes: int = 4 << 30
) -> NDArray[Any]:
    """Read one idx file, gzipped or not.

    Parameters
    ----------
    source : path or package resource
        The file. A name that ends in ``.gz`` is decompressed on the way.
    max_bytes : int
        Upper limit of the decompressed array, against decompression bombs.

    Returns
    -------
    numpy.ndarray
        The array in native byte order, with the shape and element type the header states.

    Raises
    ------
    OSError
        The file is missing or unreadable.
    ValueError
        The magic number is wrong, the file is shorter or longer than its header says, the gzip
        stream is damaged, or the array would exceed `max_bytes`.
    """
    path = Path(source) if isinstance(source, str | os.PathLike) else source
    try:
        with path.open("rb") as raw:
            if path.name.endswith(".gz"):
                with gzip.GzipFile(fileobj=raw) as stream:
                    return _parse(stream, path.name, max_bytes)
            return _parse(raw, path.name, max_bytes)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"idx file {path.name!r}: damaged gzip stream ({error})") from None


def _parse(stream: BinaryIO | gzip.GzipFile, name: str, max_bytes: int) -> NDArray[Any]:
    magic = stream.read(4)
    rank = magic[3] if len(magic) == 4 else 0
    if magic[:2] != b"\0\0" or len(magic) < 4 or magic[2] not in _DTYPES or rank > _MAX_RANK:
        raise ValueError(
            f"idx file {name!r}: expected the magic number 0x0000TTRR (type, rank), "
            f"found 0x{magic.hex() or '(empty file)'}"
        )
    header = stream.read(4 * rank)
    if len(header) < 4 * rank:
        raise ValueError(f"idx file {name!r}: truncated inside the header")
    shape = struct.unpack(f">{rank}I", header)
    dtype = np.dtype(_DTYPES[magic[2]])
    expected = math.prod(shape) * dtype.itemsize
    if expected > max_bytes:
        raise ValueError(
            f"idx file {name!r}: header {shape} asks for {expected} bytes, the limit is {max_bytes}"
        )
    data = _read_up_to(stream, expected + 1)
    if len(data) != expected:
        found = "more" if len(data) > expected else f"{len(data)}"
        raise ValueError(
            f"idx file {name!r}: header {shape} asks for {expected} bytes of data, found {found}"
        )
    array = np.frombuffer(data, dtype=dtype).reshape(shape)
    return array.astype(dtype.newbyteorder("="))


def _read_up_to(stream: BinaryIO | gzip.GzipFile, count: int) -> bytes:
    # In pieces, so that a header with a wrong size allocates only what the file holds.
    pieces = []
    while count > 0 and (piece := stream.read(min(count, READ))):
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)
