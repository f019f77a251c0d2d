"""Folders of runs, byte by byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pyablate.runs import fingerprint

OLD = Path(__file__).parents[1] / "data" / "stored_by_2cd4797"
"""What the last version without checksums stored; its README says how."""


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


def as_of_then(name: str, folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """Copy an old run into a folder, and claim the versions that it was made with."""
    known = json.loads((OLD / name / "blocks/manifest.json").read_text())["identity"]
    versions = known["versions"]
    patch.setattr(fingerprint.metadata, "version", versions.__getitem__)
    patch.setattr(fingerprint, "build_info", lambda: {"version": versions["pyablate"]})
    # Of torch's own source, where no graph was captured.
    patch.setattr(fingerprint, "_structure", lambda *_: known["model"]["structure"])
    return Path(shutil.copytree(OLD / name, folder / name))
