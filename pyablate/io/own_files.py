"""Ownership of files: which of a run's folder pyablate wrote; nothing else is ever removed.

People put notes, tables and stores into the folder of a run. Own is what has the name of a file
that pyablate writes and, where checksums tell, its content.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from pyablate.io import checksums

ARRAYS = (
    "unit_layer",
    "unit_index",
    "label",
    "baseline",
    "flip_start",
    "flip_image",
    "flip_prediction",
    "flip_weight",
    "estimate_top",
    "estimate_live",
    "estimate_drawn",
    "estimate_spread",
    "loss_change_sum",
    "margin_change_sum",
)
"""Arrays of a result."""

COMMAND = "command.json"
"""The command of the shell that made a result."""

_ARRAY_FOLDER = rf"(?:{'|'.join(ARRAYS)})"
_ARRAY_FILE = rf"{_ARRAY_FOLDER}/(?:zarr\.json|c(?:/\d+)+)"
_PLAIN = r"manifest\.json|statistics\.npz|\d{9}(?:\.begun)?\.npz"
# Zarr itself writes under another name first, which a kill leaves behind.
_SCRATCH = rf"(?:result|aside)/(?:zarr\.json|{_ARRAY_FILE}|(?:{_ARRAY_FOLDER}/.*)?[^/]+\.partial)"
_BLOCKS_FILE = re.compile(rf"{_PLAIN}|\.(?:{_PLAIN})\.new|{_SCRATCH}")
_BLOCKS_FOLDER = re.compile(rf"(?:result|aside)(?:/{_ARRAY_FOLDER}(?:/c(?:/\d+)*)?)?")
_GROUP_FILES = (".zgroup", ".zattrs", ".zmetadata")


def check_replaceable(store: Path) -> None:
    """Refuse to replace a finished store whose folder holds anything else."""
    arrays = own_arrays(store, store)
    zarr: tuple[str, ...] = ("zarr.json",) if (store / "zarr.json").exists() else _GROUP_FILES
    group = (*zarr, *([COMMAND] if read_command(store) else []))
    tidying = is_manifest(store / "blocks")  # of a run that was killed when all was done
    for name in checksums.files_below(store):
        first, _, rest = name.partition("/")
        blocks = tidying and first == "blocks" and is_own_in_blocks(rest)
        if first not in arrays and name not in group and not blocks:
            raise foreign(store, name)


def read_command(folder: Path) -> list[str] | None:
    """Read the words of the command that made what is in a folder; None where nobody knows."""
    try:
        words = json.loads((folder / COMMAND).read_bytes())["pyablate_command"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return [str(word) for word in words] if isinstance(words, list) else None


def remains(path: Path) -> list[str]:
    """Name the arrays in a run's folder that a result given up, or cut short, has left there."""
    return own_arrays(path, path, path / "blocks" / "aside", path / "blocks" / "result")


def check_in_the_way(path: Path) -> None:
    """Refuse a run's folder where somebody else has put what has the name of a part of results."""
    remains(path)
    ours = isinstance(checksums.attributes_of(path).get("pyablate_format"), int)
    if os.path.lexists(path / "zarr.json") and not ours:
        raise foreign(path, "zarr.json")


def own_arrays(folder: Path, *described: Path) -> list[str]:
    """Name the arrays in a folder that may be removed, or moved.

    One of the folders ``described`` may have the attributes of the result to which they belong.
    Refused is what has the name of such an array and is another, or holds something else.
    """
    ours = [place for place in described if "pyablate_format" in checksums.attributes_of(place)]
    try:
        sums = checksums.sealed(ours[0]) if ours else None
    except ValueError as error:
        raise FileExistsError(f"output: {folder}: {error}; {_REMEDY}") from None
    known = dict.fromkeys([*ARRAYS, *(sums or ())])
    names = [name for name in known if os.path.lexists(folder / name)]
    for name in names:
        inside = list(checksums.files_below(folder / name))
        other = [file for file in inside if not checksums.ARRAY_FILE.fullmatch(file)]
        if other:
            raise foreign(folder, f"{name}/{other[0]}")
        changed = sums is not None and checksums.digest(folder / name) != sums.get(name)
        if not ours or not inside or changed:
            raise foreign(folder, name)
    return names


def is_manifest(blocks: Path) -> bool:
    """Whether the manifest of a run is in a folder, if a damaged one."""
    try:
        manifest = json.loads((blocks / "manifest.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except ValueError:
        return (blocks / "statistics.npz").exists()
    return isinstance(manifest, dict) and bool({"pyablate_run", "identity"} & manifest.keys())


def check_blocks(path: Path) -> None:
    """Refuse a folder of somebody else's that has the name and the files of our own."""
    blocks = path / "blocks"
    if is_manifest(blocks):
        return
    if os.path.lexists(blocks) and not blocks.is_dir():
        raise foreign(path, "blocks")
    for name in checksums.files_below(blocks):
        if is_own_in_blocks(name) and name != ".manifest.json.new":
            raise foreign(path, f"blocks/{name}")


def is_own_in_blocks(name: str) -> bool:
    """Whether a path relative to the folder of blocks is of a file that a run writes there."""
    return bool(_BLOCKS_FILE.fullmatch(name) or _BLOCKS_FOLDER.fullmatch(name))


def clear_blocks(blocks: Path, *, keep: str = "", below: str = "") -> None:
    """Remove what runs have written among their blocks, and the folders that this leaves empty.

    Only those in the folder ``below``, and not the file ``keep``. The manifest, which tells whose
    they are, goes last.
    """
    for place, _, files in os.walk(blocks / below, topdown=False):
        for name in sorted(files, key=lambda name: name == "manifest.json"):
            path = Path(place, name)
            relative = path.relative_to(blocks).as_posix()
            if relative != keep and _BLOCKS_FILE.fullmatch(relative):
                os.unlink(path)
        relative = Path(place).relative_to(blocks).as_posix()
        whole = relative == "." and not keep
        if (whole or _BLOCKS_FOLDER.fullmatch(relative)) and not os.listdir(place):
            os.rmdir(place)


_REMEDY = "move it elsewhere first, or take another place"


def foreign(folder: Path, name: str) -> FileExistsError:
    """Make the error that names something in a folder which is not ours."""
    return FileExistsError(
        f"output: {folder} holds {name}, which pyablate did not write or somebody has changed "
        f"since; {_REMEDY}"
    )
