"""On-disk checkpoint of a run: a folder with finished blocks, fingerprint, the result in the end.

While a run is under way its folder holds ``blocks/`` and nothing that anyone could take for a
result: ``manifest.json``, one file per finished block, one for a block in the middle of its jobs.
Each appears at once and whole. When all blocks are there, the result is written beside them and
moved into the folder, ``zarr.json`` last: from then on it is a result, and ``blocks/`` goes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyablate.io.atomic import replace_file, sync_folder
from pyablate.io.own_files import (
    ARRAYS,
    COMMAND,
    check_blocks,
    check_in_the_way,
    clear_blocks,
    is_manifest,
    read_command,
    remains,
)
from pyablate.io.zarr_check import check_folder
from pyablate.result import AblationResult, load
from pyablate.results import store
from pyablate.runs.blocks import (
    DAMAGED,
    Block,
    Joining,
    PartialBlock,
    read_arrays,
    read_block,
    read_partial,
    write_arrays,
    write_block,
    write_partial,
)
from pyablate.runs.fingerprint import Identity, differences, fingerprint

logger = logging.getLogger("pyablate")

FORMAT = 1

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says when a disk, a quota or the largest file is full."""

SECONDS = 30.0
"""Time after which the finished jobs of an unfinished block are written down."""

_command: ContextVar[list[str] | None] = ContextVar("command", default=None)

_BLOCK = re.compile(r"(\d{9})\.npz")


class StoreMismatch(ValueError):
    """A folder holds a run with another model, other data or other options.

    Examples
    --------
    >>> from pyablate.runs import StoreMismatch
    >>> _ = pa.ablate(model, data, "features.16", output="run.zarr")
    >>> try:
    ...     _ = pa.ablate(model, data, "features.16", intervention="mean", output="run.zarr")
    ... except StoreMismatch as error:
    ...     print("options.intervention (zero, now mean)" in str(error))
    True
    """


@dataclass(frozen=True)
class Layout:
    """How the images of a run are cut into blocks.

    Attributes
    ----------
    images : range
        Those of the run.
    size : int
        Images per block; the last block may have fewer.
    memory : int
        Bytes to work in: what is cut by them decides the last bits of sums.
    """

    images: range
    size: int
    memory: int

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def block(self, number: int) -> range:
        """Images of a block."""
        return self.images[number * self.size : (number + 1) * self.size]


class RunStore:
    """The folder of a run.

    Attributes
    ----------
    path : Path
        The folder.
    identity : dict
        Of the run.
    layout : Layout
        As when the run began, whatever memory there is now.
    """

    def __init__(self, path: Path, identity: Identity, layout: Layout) -> None:
        self.path = path
        self.identity = identity
        self.layout = layout
        self._run = fingerprint(identity)
        self._written = time.monotonic()

    @property
    def blocks(self) -> Path:
        """Where the files of unfinished runs are."""
        return self.path / "blocks"

    def done(self) -> list[int]:
        """Numbers of the blocks whose files are there, ascending; some may be damaged."""
        return sorted(self._numbers())

    def count_images(self) -> int:
        """Images of the blocks whose files are there."""
        return sum(len(self.layout.block(number)) for number in self._numbers())

    def read(self, number: int) -> Block | None:
        """Read a finished block; None if there is none."""
        block = read_block(self._file(number), self._run)
        fits = block is not None and len(block.labels) == len(self.layout.block(number))
        return block if fits else None

    def write(self, number: int, block: Block) -> None:
        """Write a finished block."""
        write_block(self._file(number), block, self._run)
        self._file(number, "begun").unlink(missing_ok=True)
        self._written = time.monotonic()

    def again(self, numbers: Sequence[int], rows: NDArray[np.bool_]) -> Sequence[int]:
        """Tell which blocks to compute again where rows of these have to be: no others."""
        return numbers

    def update(self, number: int, block: Block, rows: NDArray[np.bool_]) -> None:
        """Write a finished block once more, with some rows as they are in another."""
        self.write(number, self._there(number).updated(block, rows))

    def partial(self, number: int) -> PartialBlock | None:
        """Read what is known of an unfinished block."""
        return read_partial(self._file(number, "begun"), self._run)

    def write_partial(self, number: int, partial: PartialBlock) -> None:
        """Write down what is known of an unfinished block, if that has not been done just now."""
        if time.monotonic() - self._written > SECONDS:
            write_partial(self._file(number, "begun"), partial, self._run)
            self._written = time.monotonic()

    def finish(self, result: AblationResult) -> None:
        """Turn the folder into the result."""
        check_in_the_way(self.path)  # what was not there when the run began
        _set_aside(self.path)  # what an attempt that was cut short had moved
        fresh = self.blocks / "result"
        clear_blocks(self.blocks, below="result")
        store.write(result, fresh)
        _sync(fresh)
        # zarr.json last: with it the folder is a result.
        for name in (*ARRAYS, "zarr.json"):
            if (fresh / name).exists():
                os.rename(fresh / name, self.path / name)
                sync_folder(self.path)
        clear_blocks(self.blocks)

    def collect(self) -> Block:
        """Join all blocks.

        Raises
        ------
        RuntimeError
            One of them is missing.
        """
        joined = Joining()
        for number in range(len(self.layout)):
            joined.add(self._there(number))
        return joined.block()

    def _there(self, number: int) -> Block:
        """Read a block that was there."""
        block = self.read(number)
        if block is None:
            raise RuntimeError(f"{self.path}: block {number} has disappeared")
        return block

    def _file(self, number: int, kind: str = "") -> Path:
        return self.blocks / ".".join([f"{number:09d}", *([kind] if kind else []), "npz"])

    def _numbers(self) -> list[int]:
        names = os.listdir(self.blocks) if self.blocks.exists() else []
        found = [int(match[1]) for match in map(_BLOCK.fullmatch, names) if match]
        return [number for number in found if number < len(self.layout)]

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Say, when a run ends early, what is kept and how to go on."""
        try:
            yield
        except OSError as error:
            if error.errno not in NO_ROOM:
                self._say(logging.ERROR)
                raise
            reason = f"output: no room for {self.path} ({error.strerror}); {self._kept()}"
            raise OSError(error.errno, reason) from error
        except KeyboardInterrupt:
            self._say(logging.WARNING)
            raise
        except Exception:
            self._say(logging.ERROR)
            raise

    def _say(self, level: int) -> None:
        if self._numbers():
            logger.log(level, "%s", self._kept())

    def _kept(self) -> str:
        return (
            f"{len(self._numbers())} of {len(self.layout)} blocks are kept in "
            f"{self.path}: the same call or command goes on from there"
        )


def open_store(
    path: Path,
    identity: Identity,
    layout: Layout,
    statistics: Mapping[str, NDArray[Any]],
    *,
    fresh: bool,
) -> RunStore | None:
    """Begin a run's folder, or find the run that it holds.

    Parameters
    ----------
    path : Path
        The folder; it need not exist.
    identity : dict
        Of the run that is wanted.
    layout : Layout
        For a new run.
    statistics : mapping
        What the run measured beforehand, to be used again: see :func:`read_statistics`.
    fresh : bool
        Give up what is there.

    Returns
    -------
    RunStore or None
        None if the run has finished already.

    Raises
    ------
    StoreMismatch
        Another run is there; the message names what differs.
    OSError
        Something else is there, or the folder cannot be written.
    """
    check_place(path, fresh=fresh)
    blocks = path / "blocks"
    if not fresh and (path / "zarr.json").exists():
        finished = load(path)
        _compare(path, finished.provenance, identity)
        if is_manifest(blocks) or (blocks.is_dir() and not os.listdir(blocks)):
            clear_blocks(blocks)  # killed while tidying up
        return None
    manifest = None if fresh else _read_manifest(path)
    if manifest is not None:
        _compare(path, manifest["identity"], identity)
        known = Layout(layout.images, int(manifest["block"]), int(manifest["memory"]))
        return RunStore(path, manifest["identity"], known)
    _begin(path, identity, layout, statistics)
    return RunStore(path, identity, layout)


def _begin(
    path: Path, identity: Identity, layout: Layout, statistics: Mapping[str, NDArray[Any]]
) -> None:
    """Make the folder of a new run; from its first file on the manifest tells whose it is."""
    blocks = path / "blocks"
    manifest = {"pyablate_run": FORMAT, "identity": identity}
    manifest |= {"block": layout.size, "memory": layout.memory}
    manifest["checksum"] = fingerprint(manifest)
    try:
        blocks.mkdir(parents=True, exist_ok=True)
        replace_file(blocks / "manifest.json", json.dumps({"pyablate_run": FORMAT}).encode())
        if (path / "zarr.json").exists():
            clear_blocks(blocks, below="aside")
            (blocks / "aside").mkdir(exist_ok=True)
            os.rename(path / "zarr.json", blocks / "aside" / "zarr.json")
        _set_aside(path)
        clear_blocks(blocks, keep="manifest.json")
        write_arrays(blocks / "statistics.npz", statistics, np.savez)
        _keep_command(path)
        replace_file(blocks / "manifest.json", json.dumps(manifest, indent=1).encode())
        sync_folder(path)
    except OSError as error:
        reason = f"output: cannot write {path}: {error.strerror}"
        raise OSError(error.errno, reason) from error


@contextmanager
def begun_by(words: list[str]) -> Iterator[None]:
    """Keep the words of the shell's command in the folder of a run that is begun meanwhile."""
    token = _command.set(words)
    try:
        yield
    finally:
        _command.reset(token)


def _keep_command(path: Path) -> None:
    """Write down the command that begins a run in place of that of an earlier run."""
    words, place = _command.get(), path / COMMAND
    if os.path.lexists(place) and read_command(path) is None:
        return  # somebody else's
    if words is not None:
        replace_file(place, json.dumps({"pyablate_command": words}).encode())
    else:
        place.unlink(missing_ok=True)


@dataclass(frozen=True)
class Unfinished:
    """How far an unfinished run is.

    Attributes
    ----------
    identity : dict
        Of the run.
    images, done : int
        All images, and those of finished blocks.
    jobs : int
        Layers that are done on the next block, as far as they are written down.
    at_work : bool
        Whether a process is working on it.
    """

    identity: Identity
    images: int
    done: int
    jobs: int
    at_work: bool


def unfinished(path: Path) -> Unfinished | None:
    """Look how far a run is; None where there is none that has begun and not finished."""
    if (path / "zarr.json").exists() or not path.is_dir():
        return None
    manifest = _read_manifest(path)
    if manifest is None:
        return None
    identity = manifest["identity"]
    first, count = (int(identity["data"][name]) for name in ("first", "count"))
    images = range(first, first + count)
    run = RunStore(path, identity, Layout(images, int(manifest["block"]), int(manifest["memory"])))
    begun = (run.partial(number) for number in range(len(run.layout)))
    jobs = next((partial.jobs for partial in begun if partial is not None), 0)
    try:
        with locked(path):
            at_work = False
    except BlockingIOError:
        at_work = True
    return Unfinished(identity, count, run.count_images(), jobs, at_work)


def has_statistics(path: Path) -> bool:
    """Whether an unfinished run has measured what it needs before its first block."""
    # Beside a result its blocks are no more than rubbish, of which a part may be gone.
    return not (path / "zarr.json").exists() and _read_manifest(path) is not None


def read_statistics(path: Path) -> dict[str, NDArray[Any]]:
    """Read what an unfinished run measured before its first block.

    Raises
    ------
    StoreMismatch
        The file is missing or damaged.
    """
    place = path / "blocks" / "statistics.npz"
    try:
        with read_arrays(place.read_bytes()) as held:
            return {name: held[name] for name in held}
    except DAMAGED as error:
        raise StoreMismatch(
            f"output: {place} is damaged ({error}); take another place, or start over with "
            "--fresh (fresh=True)"
        ) from None


def check_place(path: Path, *, fresh: bool = False) -> None:
    """Refuse to write over anything but a run or its result, or through a link.

    Parameters
    ----------
    path : Path
        Folder of a run.
    fresh : bool
        Whether what is there will be given up.

    Raises
    ------
    OSError
        Something else is there, or in the way, or the folder cannot be made.
    """
    if path.exists():
        if not path.is_dir() or not _is_ours(path):
            raise FileExistsError(f"output: {path} exists and is not a pyablate result")
        check_folder(path, only=ARRAYS)
        if fresh or not store.is_result(path):
            check_in_the_way(path)
            check_blocks(path)
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"output: cannot write {path}: {there} is a file")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"output: cannot write {path}: no permission to write to {there}")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a run's folder, so that no second process works on it; a kill lets it go.

    Raises
    ------
    OSError
        Another process holds it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        reason = f"output: cannot write {path}: {error.strerror}"
        raise OSError(error.errno, reason) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                errno.EWOULDBLOCK, f"output: another process is at work in {path}"
            ) from None
        except OSError as error:  # a file system without locks
            logger.debug("%s cannot be locked: %s", path, error)
        yield
    finally:
        os.close(handle)


def _is_ours(path: Path) -> bool:
    if store.is_result(path) or is_manifest(path / "blocks"):
        return True
    # Killed before there was a manifest: nothing but the folders themselves.
    begun = path / "blocks" / ".manifest.json.new"
    return all(entry.is_dir() or entry == begun for entry in path.rglob("*"))


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """Read what a run's folder belongs to; None if no run has got so far."""
    place = path / "blocks" / "manifest.json"
    try:
        manifest = json.loads(place.read_text())
        if manifest == {"pyablate_run": FORMAT}:
            return None
        checksum = manifest.pop("checksum", None)
        if checksum not in (None, fingerprint(manifest)):
            raise ValueError("not as it was written")
        sizes = int(manifest["block"]), int(manifest["memory"])
        known = isinstance(manifest["identity"], dict) and min(sizes) > 0
        if manifest["pyablate_run"] == FORMAT and known:
            if checksum is None:
                logger.warning("%s: without a checksum, by an older version", place)
            return dict(manifest)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        pass
    raise StoreMismatch(
        f"output: {place} is damaged or of another version of pyablate; take another place, or "
        "start over with --fresh (fresh=True)"
    )


def _compare(path: Path, theirs: Mapping[str, Any], ours: Identity) -> None:
    """Refuse what differs; the images of a finished run are compared when they have been read."""
    differing = differences(theirs, ours) if theirs else ["nobody knows how it was made"]
    if differing:
        raise StoreMismatch(
            f"output: {path} holds another run; what differs: {', '.join(differing)}. Take another "
            "place, or start over with --fresh (fresh=True)"
        )


def _set_aside(path: Path) -> None:
    """Move the arrays of a result out of the way, each at once, and delete them."""
    blocks = path / "blocks"
    (blocks / "aside").mkdir(exist_ok=True)
    for name in remains(path):
        os.rename(path / name, blocks / "aside" / name)
    clear_blocks(blocks, below="aside")


def _sync(folder: Path) -> None:
    """Have a folder's files on the disk."""
    for place, _, names in os.walk(folder):
        for name in names:
            handle = os.open(os.path.join(place, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(Path(place))
