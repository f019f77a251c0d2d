"""Checksums of a Zarr store, kept in its attributes: reading it detects corruption.

A SHA-256 for each array, over all its files, and one for each attribute. What others add to the
folder or to the attributes is not covered and does not matter.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

NAME = "checksums"
"""Of the attribute that holds them."""

ARRAY_FILE = re.compile(r"zarr\.json|\.zarray|\.zattrs|c|(?:c/)?\d+(?:[./]\d+)*")
"""Files of an array, in Zarr 3 and 2: what it is, and its chunks."""


_COPY = ".zmetadata"
"""Metadata of all arrays together, in Zarr 2: some readers take them from there."""


def seal(folder: Path) -> None:
    """Write down the checksums of a store that is complete."""
    place = next(folder / name for name in ("zarr.json", ".zattrs") if (folder / name).exists())
    content = json.loads(place.read_bytes())
    attributes = content["attributes"] if place.name == "zarr.json" else content
    attributes.pop(NAME, None)
    attributes[NAME] = {
        "arrays": {array.name: digest(array) for array in _arrays(folder)},
        "attributes": {name: _hash_value(value) for name, value in attributes.items()},
    }
    if (folder / _COPY).exists():
        attributes[NAME]["files"] = {_COPY: _hash_file(folder / _COPY)}
    place.write_text(json.dumps(content, indent=2))


def sealed(folder: Path) -> dict[str, str] | None:
    """Name the arrays of a store with their checksums; None if it was written without."""
    return None if (held := _held(attributes_of(folder))) is None else held["arrays"]


def check(folder: Path) -> bool:
    """Compare a store with its checksums: False if it has none, an error if it is damaged."""
    attributes = attributes_of(folder)
    held = _held(attributes)
    if held is None:
        return False
    for name, expected in held["attributes"].items():
        if name not in attributes or _hash_value(attributes[name]) != expected:
            raise ValueError(f"the attribute {name!r} is not as it was written")
    for name, expected in held["arrays"].items():
        if digest(folder / name) != expected:
            raise ValueError(f"the array {name!r} is not as it was written")
    for name, expected in held["files"].items():
        if not (folder / name).exists() or _hash_file(folder / name) != expected:
            raise ValueError(f"the file {name!r} is not as it was written")
    return True


def digest(array: Path) -> str:
    """Hash the files of an array with their names; other files in its folder are left out."""
    total = hashlib.sha256()
    for name in sorted(filter(ARRAY_FILE.fullmatch, files_below(array))):
        total.update(f"{_hash_file(array / name)}  {name}\n".encode())
    return total.hexdigest()


def files_below(folder: Path) -> Iterator[str]:
    """Give the paths, relative to a folder, of what is in it: files, links and empty folders."""
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        for name in (*files, *links):
            yield Path(place, name).relative_to(folder).as_posix()
        if not folders and not files and place != str(folder):
            yield Path(place).relative_to(folder).as_posix()


def attributes_of(folder: Path) -> dict[str, Any]:
    """Read the attributes of a group; none if it has no readable ones."""
    try:
        if (folder / "zarr.json").exists():
            found = json.loads((folder / "zarr.json").read_bytes())["attributes"]
        else:
            found = json.loads((folder / ".zattrs").read_bytes())
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _held(attributes: Mapping[str, Any]) -> dict[str, dict[str, str]] | None:
    """Return the checksums in attributes, if they look like those that :func:`seal` writes."""
    held = attributes.get(NAME)
    if held is None:
        return None
    if not isinstance(held, dict):
        raise ValueError("the checksums are damaged")
    parts = {"files": {}, **held}
    if not all(isinstance(parts.get(name), dict) for name in _PARTS) or not parts["arrays"]:
        raise ValueError("the checksums are damaged")
    if any(Path(name).name != name for name in (*parts["arrays"], *parts["files"])):
        raise ValueError("the checksums name something outside of the store")
    return parts


_PARTS = ("arrays", "attributes", "files")


def _arrays(folder: Path) -> list[Path]:
    described = ("zarr.json", ".zarray")
    return [
        entry
        for entry in sorted(folder.iterdir())
        if any((entry / name).is_file() for name in described)
    ]


def _hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_value(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
