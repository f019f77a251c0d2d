"""Blocks: what a run has found on some consecutive images, in memory and as files.

Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyablate.io.atomic import replace_file
from pyablate.results.arrays import Ints
from pyablate.results.audit import Audit
from pyablate.results.estimate import ARRAYS as ESTIMATED
from pyablate.results.estimate import Estimate
from pyablate.results.flips import Flips
from pyablate.results.measures import Accuracy, Measure
from pyablate.results.screening import Screening
from pyablate.runtime.distributed import MODULUS

FlipChunk = tuple[NDArray[Any], ...]
"""Changed predictions: row of the result, image of the data, new class; in an estimated run, what
is recorded of it has weights besides."""

_TOGETHER = 1000


@dataclass(frozen=True, eq=False)
class BlockMetadata:
    """What is known about some images besides their predictions.

    Attributes
    ----------
    hash : int
        Of the images and labels; see :func:`pyablate.runs.fingerprint.hash_images`.
    audits : dict
        Of the pairs recomputed here, per layer; of merged parts, and where an older version wrote
        them down, all together without a name.
    strategy : dict
        Per layer, how it was computed.
    state : list
        How far the calibration of each job had come; JSON.
    measures : dict
        Sums over these images.
    screening : Screening or None
        What was settled by prediction.
    estimate : Estimate or None
        What was drawn.
    """

    hash: int
    audits: dict[str, Audit] = field(default_factory=dict)
    strategy: dict[str, str] = field(default_factory=dict)
    state: list[Any] = field(default_factory=list)
    measures: dict[str, Measure] = field(default_factory=dict)
    screening: Screening | None = None
    estimate: Estimate | None = None

    @property
    def audit(self) -> Audit:
        """Of all layers."""
        return sum(self.audits.values(), Audit(0, 0))

    @property
    def small(self) -> BlockMetadata:
        """The same without what is as large as the result."""
        return replace(self, measures={}, estimate=None)

    def updated(self, again: BlockMetadata, rows: NDArray[np.bool_]) -> BlockMetadata:
        """As :meth:`Block.updated`."""
        audits = dict(self.audits)
        for name, one in again.audits.items():
            before = audits.get(name, Audit(0, 0))
            # In a block of an older version the same pairs are counted, for all layers together.
            pairs = 0 if "" in audits and name not in audits else one.pairs
            audits[name] = Audit(pairs, one.mismatches, before.mended + one.mended)
        return replace(
            self,
            audits=audits,
            strategy={**self.strategy, **again.strategy},
            state=again.state,
            measures=again.measures,  # where there are any, all rows are computed again
            screening=(
                self.screening.updated(again.screening, again.audits)
                if self.screening and again.screening
                else None
            ),
            estimate=(
                self.estimate.updated(again.estimate, rows)
                if self.estimate and again.estimate
                else None
            ),
        )

    def __add__(self, other: BlockMetadata) -> BlockMetadata:
        """BlockMetadata about the images of both."""
        return BlockMetadata(
            hash=(self.hash + other.hash) % MODULUS,
            audits={
                name: self.audits.get(name, Audit(0, 0)) + other.audits.get(name, Audit(0, 0))
                for name in {**self.audits, **other.audits}
            },
            strategy=self.strategy,
            state=other.state,
            measures={
                name: Measure(
                    own.change + other.measures[name].change,
                    own.accuracy + other.measures[name].accuracy,
                )
                for name, own in self.measures.items()
            },
            screening=(
                self.screening + other.screening
                if self.screening and other.screening
                else self.screening
            ),
            estimate=(
                self.estimate + other.estimate
                if self.estimate and other.estimate
                else self.estimate
            ),
        )


@dataclass(frozen=True, eq=False)
class Block:
    """Everything that is known about some consecutive images.

    Attributes
    ----------
    labels, baseline : int64 [image]
        True class and the intact network's prediction.
    flips : Flips
        Of all units; images are numbered within the block.
    metadata : BlockMetadata
        The rest.
    """

    labels: Ints
    baseline: Ints
    flips: Flips
    metadata: BlockMetadata

    def updated(self, again: Block, rows: NDArray[np.bool_]) -> Block:
        """Take the rows, bool ``[unit]``, of layers that were computed again with more care."""
        return replace(
            self,
            flips=self.flips.updated(again.flips, rows),
            metadata=self.metadata.updated(again.metadata, rows),
        )


@dataclass(frozen=True, eq=False)
class PartialBlock:
    """A block of which some jobs are done.

    Attributes
    ----------
    jobs : int
        How many, the first ones.
    chunks : list
        Flips found by them.
    metadata : BlockMetadata
        The rest.
    """

    jobs: int
    chunks: list[FlipChunk]
    metadata: BlockMetadata


class Joining:
    """Puts blocks of consecutive images together, in the order in which they are added."""

    def __init__(self) -> None:
        self._held: list[Block] = []

    def add(self, block: Block) -> None:
        """Add the next one."""
        if self._held:  # sums are as large as the result: one is enough
            metadata = self._held[0].metadata + block.metadata
            self._held[0] = replace(self._held[0], metadata=metadata)
            block = replace(block, metadata=BlockMetadata(0))
        self._held.append(block)
        if len(self._held) > _TOGETHER:
            self._held = [self.block()]

    def block(self) -> Block:
        """Return all of them as one."""
        held = self._held
        lengths = [len(block.labels) for block in held]
        return Block(
            labels=np.concatenate([block.labels for block in held]),
            baseline=np.concatenate([block.baseline for block in held]),
            flips=Flips.joined([block.flips for block in held], lengths),
            metadata=held[0].metadata,
        )


def write_block(path: Path, block: Block, run: str) -> None:
    """Write a block's file, whole or not at all."""
    arrays: dict[str, NDArray[Any]] = {
        "labels": block.labels.astype(np.int32),
        "baseline": block.baseline.astype(np.int32),
        "flips": np.diff(block.flips.start).astype(np.int32),
        "image": block.flips.image,
        "prediction": block.flips.prediction,
        **({} if block.flips.weight is None else {"weight": block.flips.weight}),
    }
    _write(path, run, block.metadata, {}, arrays)


def read_block(path: Path, run: str) -> Block | None:
    """Read a block's file; None if it is damaged or of another run."""
    found = _read(path, run, ("labels", "baseline", "flips", "image", "prediction"))
    if found is None:
        return None
    _, metadata, arrays = found
    start = np.concatenate([[0], np.cumsum(arrays["flips"], dtype=np.int64)])
    return Block(
        labels=arrays["labels"].astype(np.int64),
        baseline=arrays["baseline"].astype(np.int64),
        flips=Flips(start, arrays["image"], arrays["prediction"], arrays.get("weight")),
        metadata=metadata,
    )


def write_partial(path: Path, partial: PartialBlock, run: str) -> None:
    """Write down what the first jobs have found on a block, whole or not at all."""
    weighted = partial.metadata.estimate is not None
    parts = partial.chunks or [(np.zeros(0),) * (3 + weighted)]
    names = ("row", "image", "prediction", "weight")[: len(parts[0])]
    arrays = {
        name: np.concatenate([chunk[i] for chunk in parts]).astype(
            np.float64 if i == 3 else np.int32
        )
        for i, name in enumerate(names)
    }
    _write(path, run, partial.metadata, {"jobs": partial.jobs}, arrays)


def read_partial(path: Path, run: str) -> PartialBlock | None:
    """Read what :func:`write_partial` wrote; None if it is damaged or of another run."""
    found = _read(path, run, ("row", "image", "prediction"))
    if found is None:
        return None
    known, metadata, arrays = found
    chunk = tuple(arrays.values())
    return PartialBlock(int(known["jobs"]), [chunk], metadata)


DAMAGED = (
    OSError,  # not of the disk, once the file is in memory: of one of the ways to pack
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    RuntimeError,  # an archive with a password, or packed in a way that is not known
    zipfile.BadZipFile,
    zlib.error,
)
"""What reading an archive from memory raises if it is none, or not a sound one."""


def _write(
    path: Path,
    run: str,
    metadata: BlockMetadata,
    known: dict[str, Any],
    arrays: dict[str, NDArray[Any]],
) -> None:
    text = json.dumps(
        {
            "run": run,
            "hash": f"{metadata.hash:064x}",
            "audits": {name: asdict(audit) for name, audit in metadata.audits.items()},
            "strategy": metadata.strategy,
            "state": metadata.state,
            "measures": {name: asdict(one.accuracy) for name, one in metadata.measures.items()},
            **({"screening": metadata.screening.to_json()} if metadata.screening else {}),
            **({"estimate": metadata.estimate.to_json()} if metadata.estimate else {}),
            **known,
        }
    )
    sums = {f"sum.{name}": measure.change for name, measure in metadata.measures.items()}
    if metadata.estimate is not None:
        sums |= {f"estimate.{name}": held for name, held in metadata.estimate.arrays.items()}
    held: dict[str, Any] = {"known": np.frombuffer(text.encode(), np.uint8), **arrays, **sums}
    write_arrays(path, held, np.savez_compressed)


def write_arrays(path: Path, arrays: Mapping[str, Any], pack: Callable[..., None]) -> None:
    """Write arrays with a checksum behind them, whole or not at all.

    The checksums in an archive cover neither its directory nor what is read before its end.
    """
    packed = io.BytesIO()
    pack(packed, **arrays)
    content = packed.getvalue()
    replace_file(path, content + _seal(content))


def read_arrays(content: bytes) -> Any:
    """Open what :func:`write_arrays` has written, after comparing it with its checksum.

    Raises
    ------
    ValueError, ...
        It is damaged; see ``DAMAGED``.
    """
    inner, seal = content[:-_SEALED], content[-_SEALED:]
    if not seal.startswith(_MARK):
        inner = content  # written by an older version
    elif seal != _seal(inner):
        raise ValueError("not as it was written")
    # From memory: numpy leaves a damaged file open, and what is wrong in the archive is then no
    # error of the disk.
    return np.load(io.BytesIO(inner), allow_pickle=False)


_MARK = b"\nsha256 "
_SEALED = len(_MARK) + 64


def _seal(content: bytes) -> bytes:
    return _MARK + hashlib.sha256(content).hexdigest().encode()


def _read(
    path: Path, run: str, names: Sequence[str]
) -> tuple[dict[str, Any], BlockMetadata, dict[str, NDArray[Any]]] | None:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        with read_arrays(content) as packed:
            known = json.loads(packed["known"].tobytes())
            if known["run"] != run:
                return None
            audits = known["audits"] if "audits" in known else {"": known["audit"]}
            measures = {
                name: Measure(packed[f"sum.{name}"], Accuracy(**accuracy))
                for name, accuracy in known["measures"].items()
            }
            metadata = BlockMetadata(
                hash=int(known["hash"], 16),
                audits={name: Audit(**audit) for name, audit in audits.items()},
                strategy=dict(known["strategy"]),
                state=list(known["state"]),
                measures=measures,
                screening=Screening.of(known["screening"]) if "screening" in known else None,
                estimate=_estimate(known["estimate"], packed) if "estimate" in known else None,
            )
            weight = ("weight",) if metadata.estimate is not None else ()
            return known, metadata, {name: packed[name] for name in (*names, *weight)}
    except DAMAGED:
        return None


def _estimate(known: Mapping[str, Any], packed: Any) -> Estimate:
    return Estimate.of(known, {name: packed[f"estimate.{name}"] for name in ESTIMATED})
