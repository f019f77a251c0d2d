"""Folders of runs, byte by byte."""

from __future__ import annotations

import json
from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path in it."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def unseal(store: Path) -> None:
    """Take the checksums off a result: it is as an older version wrote it."""
    place = store / "zarr.json"
    metadata = json.loads(place.read_text())
    del metadata["attributes"]["checksums"]
    place.write_text(json.dumps(metadata, indent=2))
