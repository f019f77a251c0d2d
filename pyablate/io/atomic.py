"""Atomic writers: files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

_STORE = ("zarr.json", ".zgroup", ".zarray")


def check_file(path: Path, what: str = "output") -> None:
    """Fail now rather than after the run if a file cannot be written; nothing is made yet.

    A symbolic link stands for what it leads to; ``what`` names the argument in the message. Refused
    are folders and devices, and places inside a Zarr store.
    """
    _check_kind(path, what)
    target = Path(os.path.realpath(path))
    for folder in target.parents:
        if folder.suffix == ".zarr" or any((folder / name).is_file() for name in _STORE):
            raise FileExistsError(f"{what}: expected a place outside of stores, {path} is in one")
    standing = next(folder for folder in target.parents if os.path.lexists(folder))
    if not standing.is_dir():
        raise NotADirectoryError(f"{what}: {path} cannot be written, {standing} is no folder")
    needed = [standing, target] if target.exists() else [standing]
    if not all(os.access(place, os.W_OK) for place in needed):
        raise PermissionError(f"{what}: {path} cannot be written")


def _check_kind(path: Path, what: str) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:  # a link that leads to itself, a file taken for a folder
        raise OSError(error.errno, f"{what}: {path} cannot be written: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{what}: expected a file to write to, {path} is a folder")
    if not stat.S_ISREG(mode):
        raise FileExistsError(f"{what}: expected a file to write to, {path} is a device or a pipe")


@contextmanager
def whole(path: Path, what: str = "output") -> Iterator[Path]:
    """Give a scratch file to write, and move it to ``path`` once it is complete.

    It lies in a folder beside the target, which goes in any case. The target of a symbolic link is
    replaced, not the link; ``what`` names the argument in messages.
    """
    check_file(path, what)
    target = Path(os.path.realpath(path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".pyablate.") as scratch:
            fresh = Path(scratch) / path.name
            yield fresh
            os.replace(fresh, target)
    except OSError as error:
        reason = f"{what}: cannot write {path}: {error.strerror or error}"
        raise OSError(error.errno, reason) from error  # OSError picks the subclass by number


def replace_file(path: Path, content: bytes) -> None:
    """Put a file in place at once, on the disk when this returns; a kill leaves old or new."""
    scratch = path.with_name(f".{path.name}.new")
    try:
        with open(scratch, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Have the names of a folder's files on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_folder(
    target: Path, write: Callable[[Path], object], check: Callable[[], None]
) -> None:
    """Let ``write`` make a folder beside ``target``, and move it there when it is complete.

    ``check`` says, before and after, whether what is there may be replaced; it is put back if
    the new folder cannot take its place.
    """
    check()
    with scratch_beside(target) as scratch:
        fresh, replaced = Path(scratch) / "new", Path(scratch) / "old"
        write(fresh)
        check()  # again: writing may have taken a while
        if target.exists():
            os.rename(target, replaced)
        try:
            os.rename(fresh, target)
        except BaseException:
            if replaced.exists():
                os.rename(replaced, target)
            raise


def scratch_beside(target: Path) -> tempfile.TemporaryDirectory[str]:
    """Make a scratch folder on the disk of a folder that is going to be written."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        reason = f"output: cannot write {target}: {error.strerror}"
        raise OSError(error.errno, reason) from error  # OSError picks the subclass by number


def write_csv(table: pd.DataFrame, path: Path, what: str = "--csv") -> None:
    """Write a table without its index as CSV; names that are not valid Unicode with backslashes."""
    with whole(path, what) as fresh:
        table.to_csv(fresh, index=False, errors="backslashreplace")
