"""The loop over the blocks of a run, kept as they are finished, shared among processes."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyablate.data.dataset import Batch, Data
from pyablate.engine.care import Care
from pyablate.engine.job import Job
from pyablate.engine.precision_cascade import PrecisionCascade
from pyablate.engine.replacements import Key, Statistics
from pyablate.result import AblationResult
from pyablate.runs.blocks import Block, BlockMetadata, Joining, PartialBlock
from pyablate.runs.executor import BlockSweep
from pyablate.runs.fingerprint import Identity, differences, hash_images
from pyablate.runs.run_folder import Layout, RunStore, StoreMismatch, locked, open_store
from pyablate.runs.sampling_design import Design
from pyablate.runs.state import (
    care_of,
    pack_statistics,
    raised_of,
    restore_care,
    restore_cascades,
)
from pyablate.runs.thresholds import Thresholds
from pyablate.runtime.distributed import MODULUS, Ranks
from pyablate.runtime.progress import Reporter, stage

logger = logging.getLogger("pyablate")

SECONDS = 2.0
"""Time between two looks at what other processes have done."""


@dataclass(eq=False)
class InMemory:
    """Blocks of a run without a folder: lost with the process, and always written in order."""

    layout: Layout
    joined: Joining = field(default_factory=Joining)
    updates: list[tuple[Joining, NDArray[np.bool_]]] = field(default_factory=list)

    def done(self) -> list[int]:
        """Nothing is there when the run begins."""
        return []

    def read(self, number: int) -> Block | None:
        """Give nothing: blocks are joined at once."""
        return None

    def again(self, numbers: Sequence[int], rows: NDArray[np.bool_]) -> Sequence[int]:
        """Let rows of all blocks be computed again: what is joined cannot be taken apart."""
        self.updates.append((Joining(), rows))
        return range(len(self.layout))

    def partial(self, number: int) -> PartialBlock | None:
        """Nothing is known of unfinished ones."""
        return None

    def write(self, number: int, block: Block) -> None:
        """Keep a block."""
        self.joined.add(block)

    def update(self, number: int, block: Block, rows: NDArray[np.bool_]) -> None:
        """Keep a block, of which these rows count."""
        self.updates[-1][0].add(block)

    def write_partial(self, number: int, partial: PartialBlock) -> None:
        """Let it go."""

    def count_images(self) -> int:
        """Nobody else works on this run."""
        return 0

    def collect(self) -> Block:
        """Give all blocks together."""
        block = self.joined.block()
        for update, rows in self.updates:
            block = block.updated(update.block(), rows)
        return block


Held = InMemory | RunStore
"""Where finished blocks are kept."""


def shard_images(shard: tuple[int, int] | None, images: int) -> range:
    """Images of shard ``(i, n)``, the i-th of n from 1 on; all of them for None.

    Raises
    ------
    ValueError
        No such shard, or one without images.
    """
    if shard is None:
        return range(images)
    number, count = shard
    if not 1 <= number <= count:
        raise ValueError(f"shard: expected i/n with i from 1 to n, got {number}/{count}")
    part = range(images * (number - 1) // count, images * number // count)
    if not part:
        raise ValueError(f"shard: {number}/{count} of {images} images is empty")
    return part


@contextmanager
def kept(
    place: Path | None,
    identity: Identity,
    layout: Layout,
    statistics: Mapping[Key, Statistics],
    thresholds: Thresholds | Design | None = None,
    *,
    fresh: bool,
    ranks: Ranks,
) -> Iterator[Held | None]:
    """Begin or find a run's folder, and hold it while the run is under way.

    Parameters
    ----------
    place : Path or None
        The folder; None keeps blocks in memory.
    identity, layout, statistics, fresh
        As :func:`pyablate.runs.run_folder.open_store` takes them.
    thresholds : Thresholds, Design or None
        Of a screened or an estimated run, measured beforehand like the statistics.
    ranks : Ranks
        Who takes part: the first process opens the folder, all agree on what it finds.

    Yields
    ------
    InMemory, RunStore or None
        None if the run has finished already.

    Raises
    ------
    StoreMismatch
        Another run is there, or the processes have different models, data or options.
    OSError
        The folder cannot be written, or another process holds it.
    """
    if place is None:
        yield InMemory(layout)
        return
    with locked(place) if ranks.first else nullcontext():
        cut: tuple[int, int] | None = None
        if ranks.first:
            arrays = pack_statistics(statistics, thresholds.to_json() if thresholds else None)
            opened = open_store(place, identity, layout, arrays, fresh=fresh)
            cut = (opened.layout.size, opened.layout.memory) if opened else None
            identity = opened.identity if opened else identity  # what it was partial with
        said = ranks.tell({"identity": identity, "cut": cut})
        differing = differences(said["identity"], identity)
        if differing:
            raise StoreMismatch(
                f"distributed: process {ranks.number} has another run than the first process; "
                f"what differs: {', '.join(differing)}"
            )
        if said["cut"] is None:
            yield None
            return
        held = RunStore(place, said["identity"], Layout(layout.images, *said["cut"]))
        with held.keeping():
            yield held


def check_data(
    data: Data, layout: Layout, result: AblationResult, dtype: torch.dtype, ranks: Ranks
) -> None:
    """Refuse a finished result of other images or labels.

    Raises
    ------
    StoreMismatch
        They differ.
    """
    found = hash_all(data, layout, dtype, ranks)
    if result.provenance["data"]["hash"] != found:
        raise StoreMismatch(
            "output: the finished run there has other images or labels. Take another place, or "
            "start over with --fresh (fresh=True)"
        )


def hash_all(data: Data, layout: Layout, dtype: torch.dtype, ranks: Ranks) -> str:
    """Hash all images of a layout, each process its own part."""
    stage("reading all images")
    numbers = ranks.part(range(len(layout)))
    total = sum(hash_images(batch, dtype) for _, batch in read_blocks(data, layout, numbers))
    return f"{ranks.add_hashes(total % MODULUS):064x}"


def read_blocks(data: Data, layout: Layout, numbers: Sequence[int]) -> Iterator[tuple[int, Batch]]:
    """Read the images of some blocks, given in ascending order."""
    start = 0
    for place in range(1, len(numbers) + 1):
        if place < len(numbers) and numbers[place] == numbers[place - 1] + 1:
            continue
        stretch = numbers[start:place]
        part = range(layout.block(stretch[0]).start, layout.block(stretch[-1]).stop)
        yield from zip(stretch, data.batches(layout.size, part), strict=True)
        start = place


@dataclass(eq=False, kw_only=True)
class RunLoop:
    """The loop over a run's blocks.

    Attributes
    ----------
    sweep : BlockSweep
        What is done with a block.
    held : Held
        Where blocks are kept.
    ranks : Ranks
        Who takes part.
    dtype : torch.dtype
        In which images are compared.
    any_tier : bool
        See :func:`pyablate.runs.state.restore_cascades`.
    hashing : bool
        Whether the images are to be known again: of no use to a run that nobody can go on with, and
        dearer than the work itself where that is a last layer only.
    report : callable
        Where progress goes.
    made : dict
        What is known of the finished blocks that are this process's own, when they were last at
        work: the hash of their images, and the state of all jobs.
    before, mine, others : int
        Pairs done before, by this process, and by the others when they were last looked at.
    worked : float
        As ``mine``, but for what a pair of each layer takes beside that of others.
    looked : float
        When that was.
    """

    sweep: BlockSweep
    held: Held
    ranks: Ranks
    dtype: torch.dtype
    any_tier: bool
    hashing: bool
    report: Reporter
    made: dict[int, BlockMetadata] = field(default_factory=dict)
    before: int = field(init=False, default=0)
    mine: int = field(init=False, default=0)
    others: int = field(init=False, default=0)
    worked: float = field(init=False, default=0.0)
    looked: float = field(init=False, default_factory=time.monotonic)

    @property
    def rows(self) -> int:
        """Pairs per image."""
        return self.sweep.setup.rows

    @property
    def cascades(self) -> list[PrecisionCascade]:
        """Calibrations, one per job."""
        return list(self.sweep.cascades.values())

    def run(self) -> None:
        """Do what is not done yet."""
        held, ranks = self.held, self.ranks
        done = ranks.tell(held.done())
        if done:
            logger.info("%d of %d blocks are there already: going on", len(done), len(held.layout))
        damaged = self._check(ranks.part(done))
        there = set(done)
        missing = [number for number in range(len(held.layout)) if number not in there]
        todo = sorted([*ranks.part(missing), *damaged])
        self.before = self.rows * sum(len(held.layout.block(number)) for number in done)
        self._advance(0, self.sweep.setup.jobs[0])
        self._do(todo)
        self._even_out()
        if ranks.count > 1:  # others have gone on since they were last looked at
            total = self.rows * len(held.layout.images)
            self.report(total, total, "all processes are done")

    def _do(self, numbers: Sequence[int]) -> None:
        """Compute some blocks and keep them."""
        held = self.held
        for number, images in read_blocks(self.sweep.setup.data, held.layout, numbers):
            partial = held.partial(number)
            hashed = self._hash(number, images, partial.metadata if partial else None)
            if partial is not None:
                restore_cascades(self.cascades, partial.metadata.state, any_tier=self.any_tier)
                self._raise(raised_of(partial.metadata.state))
                if self._behind(partial.metadata.state[: partial.jobs]):
                    partial = None
            block = self.sweep.block(
                images,
                hashed,
                partial,
                keep=functools.partial(held.write_partial, number),
                advance=self._advance,
            )
            held.write(number, block)
            self.made[number] = block.metadata.small  # as large as the result

    def _hash(self, number: int, images: Batch, known: BlockMetadata | None) -> int:
        """Return the hash of a block's images, if any, after comparing it with what is known."""
        hashed = hash_images(images, self.dtype) if self.hashing else 0
        if known is not None and known.hash != hashed:
            raise _other_images(self.held.layout.block(number))
        return hashed

    def _redo(self, numbers: Sequence[int], jobs: Sequence[Job]) -> None:
        """Compute some jobs of finished blocks again, and keep the others as they are."""
        rows = np.zeros(self.rows, dtype=bool)
        for job in jobs:
            rows[job.rows.start : job.rows.stop] = True
        numbers = self.held.again(numbers, rows)
        for number, images in read_blocks(self.sweep.setup.data, self.held.layout, numbers):
            hashed = self._hash(number, images, self.made[number])
            block = self.sweep.block(images, hashed, jobs=jobs, advance=self._advance)
            self.held.update(number, block, rows)
            self.made[number] = block.metadata.small

    def _even_out(self) -> None:
        """Compute again what was done with less care than later blocks turned out to need.

        Until the processes agree on the care of each job, and all blocks have been done with it.
        """
        agreed: list[int] = []
        while True:
            self.ranks.wait(lambda: self._tell("waiting for other processes"))
            own = [*(cascade.care for cascade in self.cascades), *self._raised]
            care = self.ranks.largest(own)
            if care == agreed:
                return
            agreed = care
            for cascade, level in zip(self.cascades, care, strict=False):
                cascade.care = Care(level)
            self._raise(care[len(self.cascades) :])
            found = {number: self._behind(known.state) for number, known in self.made.items()}
            behind = sorted(number for number, jobs in found.items() if jobs)
            if behind:
                careless = set().union(*found.values())
                logger.warning(
                    "%d finished blocks are computed again, with the care that others needed: %s",
                    len(behind),
                    ", ".join(dict.fromkeys(j.name for j in self.sweep.cascades if j in careless)),
                )
                self._redo(behind, self._together(careless))

    def _behind(self, state: Sequence[Mapping[str, Any]]) -> set[Job]:
        """Tell which jobs were done with less care than is taken now."""
        known = zip(self.sweep.cascades, care_of(state), raised_of(state), strict=False)
        return {job for job, care, raised in known if self.sweep.behind(job, care, raised)}

    def _together(self, behind: Collection[Job]) -> list[Job]:
        """Add the jobs that cannot be computed again without these.

        What is recorded of a layer is of all its jobs, and the error of a measure of all layers.
        """
        layers = {job.name for job in behind}
        jobs = self.sweep.setup.jobs
        return [job for job in jobs if job.name in layers or self.sweep.measures]

    @property
    def _raised(self) -> list[int]:
        """How often each job's threshold has been raised; none in an exact run."""
        screen = self.sweep.screen
        return [] if screen is None else list(screen.raised.values())

    def _raise(self, raised: Sequence[int]) -> None:
        """Raise thresholds no less often than this."""
        screen = self.sweep.screen
        if screen is not None:
            for job, times in zip(screen.raised, raised, strict=False):
                screen.raised[job] = max(screen.raised[job], times)

    def _check(self, numbers: Sequence[int]) -> list[int]:
        """Compare the images of finished blocks with what they were; name the damaged ones."""
        damaged, state = [], None
        for number, images in read_blocks(self.sweep.setup.data, self.held.layout, numbers):
            block = self.held.read(number)
            if block is None:
                logger.warning("block %d is damaged: it is computed again", number)
                damaged.append(number)
            elif block.metadata.hash != hash_images(images, self.dtype):
                raise _other_images(self.held.layout.block(number))
            else:
                state = block.metadata.state
                restore_care(self.cascades, state)
                self._raise(raised_of(state))
                self.made[number] = block.metadata.small
        if state is not None:
            restore_cascades(self.cascades, state, any_tier=self.any_tier)
        return damaged

    @functools.cached_property
    def _work(self) -> dict[Job, float]:
        """Work that a pair of each job takes, as the arithmetic suggests; 1 in the mean."""
        suffixes = self.sweep.suffixes
        jobs = self.sweep.setup.jobs
        work = {job: suffixes[job].work if job in suffixes else 1.0 for job in jobs}
        everything = sum(len(job.rows) * work[job] for job in jobs) or 1.0
        return {job: work[job] * self.rows / everything for job in jobs}

    def _advance(self, pairs: int, job: Job) -> None:
        self.mine += pairs
        self.worked += pairs * self._work[job]
        self._tell(job.name)

    def _tell(self, layer: str) -> None:
        watching = self.ranks.count > 1 and self.ranks.first
        if watching and time.monotonic() - self.looked > SECONDS:
            self.looked = time.monotonic()
            everything = self.rows * self.held.count_images()
            self.others = max(self.others, everything - self.before - self.mine)
        total = self.rows * len(self.held.layout.images)
        elsewhere = self.before + self.others
        self.report(min(total, elsewhere + self.mine), total, layer, elsewhere + self.worked)


def _other_images(where: range) -> StoreMismatch:
    return StoreMismatch(
        f"data: images {where.start} to {where.stop - 1} or their labels are not those that the "
        "run began with. Give the same data in the same order, or start over with --fresh "
        "(fresh=True)"
    )
