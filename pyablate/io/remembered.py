"""Figures that were measured on this machine, kept between processes in the user's cache."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from pyablate.io.atomic import replace_file

_MOST = 1 << 16
"""Bytes of the file: some tens of figures."""


def place() -> Path | None:
    """Name the file: in ``PYABLATE_CACHE``, or the user's cache; None where that is set to ""."""
    folder = os.environ.get("PYABLATE_CACHE")
    if folder is None:
        user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        return Path(user, "pyablate", "measured.json")
    return Path(folder, "measured.json") if folder else None


def recall(machine: str, name: str) -> float | None:
    """Look a figure up; None where it is not known of this machine, or the file cannot be read."""
    found = _known().get(machine, {}).get(name)
    usable = isinstance(found, float) and math.isfinite(found) and found > 0
    return found if usable else None


def remember(machine: str, name: str, figure: float) -> None:
    """Keep a figure; a disk that cannot be written to is no error, the next process measures."""
    path = place()
    if path is None:
        return
    known = _known()
    known.setdefault(machine, {})[name] = float(figure)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(known, indent=1, sort_keys=True).encode())
    except OSError:
        return


def forget() -> None:
    """Remove what is known, of all machines."""
    path = place()
    if path is not None:
        try:
            path.unlink(missing_ok=True)
        except OSError:
            return


def _known() -> dict[str, dict[str, float]]:
    path = place()
    try:
        if path is None or path.stat().st_size > _MOST:
            return {}
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    right = isinstance(found, dict) and all(isinstance(each, dict) for each in found.values())
    return found if right else {}
