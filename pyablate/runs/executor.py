"""All jobs on one block of images after another: clean run, deltas, rescue, audit.

Where the audit finds that a job was done wrong, that is a fault of the engine: the job is done
again one step more carefully, and with that care from there on.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from pyablate.data.dataset import Batch
from pyablate.engine import clean_run
from pyablate.engine.care import AuditError, Care, Mismatch
from pyablate.engine.float64 import IMAGES, Exact
from pyablate.engine.job import Job, stand_ins
from pyablate.engine.loss_margin import Measured, Record
from pyablate.engine.precision_cascade import Ladder
from pyablate.engine.replay import Replay, decision
from pyablate.engine.rounding import Rounding
from pyablate.engine.suffix import Clean, Suffix, needed
from pyablate.results.measures import Accuracy, Measure
from pyablate.results.record import Audit, Effort, Flips
from pyablate.runs.blocks import Begun, Block, Facts, Piece
from pyablate.runs.setup import Setup
from pyablate.runs.state import pack_ladder
from pyablate.runtime import out_of_memory
from pyablate.runtime.host_to_device import sent

logger = logging.getLogger("pyablate")


@dataclass(eq=False)
class BlockSweep:
    """All jobs on one block of images after another, and what they took."""

    setup: Setup
    audited: np.ndarray  # int64 [A, 2]: row, image
    measures: tuple[str, ...]
    on_mismatch: str = "error"
    flips: list[Piece] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    baseline: list[np.ndarray] = field(default_factory=list)
    audit: Audit = field(default_factory=lambda: Audit(0, 0))
    done: dict[Job, Care] = field(default_factory=dict)  # on the first part of the block
    differed: set[tuple[int, int]] = field(default_factory=set)  # row, image
    mended: int = 0  # by an earlier process
    rescued: int = 0
    strategy: dict[str, str] = field(default_factory=dict)
    layer_seconds: dict[str, float] = field(default_factory=dict)
    accuracy: list[Accuracy] = field(init=False)  # one per measure
    sums: Tensor = field(init=False)  # float64 [measure, unit, class]
    irregular: set[Job] = field(default_factory=set)  # of which it has been told

    def __post_init__(self) -> None:
        setup = self.setup
        self.suffixes = {job: Suffix.of(setup.graph, job) for job in setup.jobs if setup.graph}
        self.ladders = {job: Ladder([*setup.low, setup.data.dtype]) for job in setup.jobs}
        self.keep = needed(self.suffixes.values())
        self.rounding = Rounding()
        if setup.abrupt:
            care = Care.FLOAT64 if isinstance(setup.exact, Exact) else Care.REPLAY
            for ladder in self.ladders.values():
                ladder.care = care

    def block(
        self,
        images: Batch,
        hashed: int,
        begun: Begun | None = None,
        *,
        keep: Callable[[Begun], None],
        advance: Callable[[int, str], None],
    ) -> Block:
        """Do all jobs on some images.

        Parameters
        ----------
        images : Batch
            Consecutive ones.
        hashed : int
            Their hash, for the record.
        begun : Begun, optional
            What an earlier process found on them.
        keep : callable
            Takes what the first jobs have found, after each of them.
        advance : callable
            Takes the number of pairs just done, and the layer at work.
        """
        self.differed, self.mended = set(), begun.facts.audit.mended if begun else 0
        block = self._once(images, hashed, begun, keep, advance)
        while any(care < self.ladders[job].care for job, care in self.done.items()):
            # A part of the block needed more care than those before it.
            block = self._once(images, hashed, None, keep, advance)
        return block

    def _once(
        self,
        images: Batch,
        hashed: int,
        begun: Begun | None,
        keep: Callable[[Begun], None],
        advance: Callable[[int, str], None],
    ) -> Block:
        self._start(begun)
        skipped = begun.jobs if begun else 0
        parts = images.split(self.setup.batch_size)
        for batch, clean in (found for part in parts for found in self._clean(part)):
            self.labels.append(batch.labels.cpu().numpy())
            self.baseline.append(clean.predicted.numpy())
            for number, job in enumerate(self.setup.jobs):
                if number >= skipped:
                    advance(0, job.name)
                    self._job(job, batch, clean)
                    if len(batch) == len(images):
                        keep(Begun(number + 1, list(self.flips), self._facts(hashed)))
                advance(len(job.rows) * len(batch), job.name)
            del clean  # before the next batch has its own
        pieces = [(row, image - int(images.index[0]), new) for row, image, new in self.flips]
        return Block(
            labels=np.concatenate(self.labels).astype(np.int64),
            baseline=np.concatenate(self.baseline).astype(np.int64),
            flips=Flips.gather(self.setup.rows, pieces),
            facts=self._facts(hashed),
        )

    def _start(self, begun: Begun | None) -> None:
        """Forget the last block; go on from what is known of this one."""
        shape = len(self.measures), self.setup.rows, self.setup.classes
        self.labels, self.baseline = [], []
        self.flips = list(begun.pieces) if begun else []
        self.audit = begun.facts.audit if begun else Audit(0, 0)
        self.strategy = dict(begun.facts.strategy) if begun else {}
        self.done = {}
        self.sums = torch.zeros(shape, dtype=torch.float64)
        self.accuracy = [Accuracy()] * len(self.measures)
        for number, known in enumerate(begun.facts.measures.values() if begun else ()):
            self.sums[number] = torch.from_numpy(known.change)
            self.accuracy[number] = known.accuracy

    def _facts(self, hashed: int) -> Facts:
        return Facts(
            hash=hashed,
            audit=replace(self.audit, mended=self.mended + len(self.differed)),
            strategy=dict(self.strategy),
            state=[pack_ladder(ladder) for ladder in self.ladders.values()],
            measures={
                name: Measure(sums.numpy(), accuracy)
                for name, sums, accuracy in zip(
                    self.measures, self.sums, self.accuracy, strict=True
                )
            },
        )

    def _job(self, job: Job, batch: Batch, clean: Clean) -> None:
        start = time.perf_counter()
        measured = self._measured(job, batch, clean)
        flips = self._pieces(job, batch, clean, measured)
        if flips is None:
            for half in _halves(batch):
                for part, known in self._clean(half):
                    self._job(job, part, known)
            return
        spent = time.perf_counter() - start
        self.layer_seconds[job.name] = self.layer_seconds.get(job.name, 0.0) + spent
        audited = self._audit(job, batch, clean, flips, measured)
        if audited.wrong:
            self._check_intact(batch, clean, audited)
            if self._more_careful(job, audited):
                self._job(job, batch, clean)
                return
        self._take(job, flips, measured, audited)

    def _take(
        self, job: Job, flips: list[Piece], measured: Measured | None, audited: _Audited
    ) -> None:
        """Keep what was found by a job on a batch."""
        care = self.ladders[job].care
        self.done.setdefault(job, care)
        self.flips += flips
        self.audit += Audit(audited.pairs, len(audited.wrong))
        self.differed.difference_update((pair.row, pair.image) for pair in audited.wrong)
        if care or job.name not in self.strategy:  # two jobs may have one name
            strategy = self.ladders[job].strategy if self.setup.graph else "replay"
            self.strategy[job.name] = care.describe(strategy)
        if measured is not None:
            measured.add_to(self.sums[:, job.rows.start : job.rows.stop])
            pairs = zip(self.accuracy, audited.accuracy, strict=True)
            self.accuracy = [a + b for a, b in pairs]

    def _more_careful(self, job: Job, audited: _Audited) -> bool:
        """Do a job with more care from now on; whether there is more.

        Raises
        ------
        AuditError
            There is none, and this is an error.
        """
        ladder, found = self.ladders[job], self._describe(job, audited)
        if ladder.care < Care.REPLAY:
            ladder.care = self._next(job)
            self.differed.update((pair.row, pair.image) for pair in audited.wrong)
            how = ladder.care.describe(ladder.strategy)
            logger.warning("%s; the layer is computed again by: %s", found, how)
            return True
        self._give_up(f"{found}, though every pair of this layer is by float64 replay already")
        return False

    def _check_intact(self, batch: Batch, clean: Clean, audited: _Audited) -> None:
        """Look whether the clean run is at fault: no care that a job takes would mend that."""
        image = torch.tensor(sorted({pair.image for pair in audited.wrong})) - int(batch.index[0])
        exact = self.setup.replay.decide(batch, None, image, image)
        found, names = clean.predicted[image], self.setup.class_names
        wrong = ((found != exact.prediction) & ~exact.near_tie).nonzero().flatten().tolist()
        for place in wrong[:1]:
            self._give_up(
                f"audit: with no unit ablated, image {int(batch.index[image[place]])} was found "
                f"to be {names[found[place]]}, expected {names[exact.prediction[place]]}"
            )

    def _give_up(self, found: str) -> None:
        """Say what cannot be mended, in an error if that is wanted."""
        found += (
            ". Please report this, with the model and what `pyablate doctor --json` prints; the "
            "other predictions of this run may be wrong too"
        )
        if self.on_mismatch == "error":
            raise AuditError(f'{found}. on_mismatch="warn" (--on-mismatch warn) gives them')
        logger.error("%s", found)

    def _next(self, job: Job) -> Care:
        """Find the least care above the present one that makes a difference."""
        ladder = self.ladders[job]
        if job not in self.suffixes:
            return Care.REPLAY
        if ladder.care < Care.FULL and ladder.strategy == "delta" and len(ladder.tiers) > 1:
            return Care.FULL
        decides = isinstance(self.setup.exact, Exact)
        return Care.FLOAT64 if ladder.care < Care.FLOAT64 and decides else Care.REPLAY

    def _describe(self, job: Job, audited: _Audited) -> str:
        """Name the first pair that differs."""
        pair, names = audited.wrong[0], self.setup.class_names
        members = job.members[pair.row - job.rows.start]
        unit = "+".join(f"{name}:{unit}" for name, unit in members)
        return (
            f"audit: layer {job.name}: {len(audited.wrong)} of {audited.pairs} recomputed pairs "
            f"differ: without unit {unit}, image {pair.image} was found to be "
            f"{names[pair.found]}, expected {names[pair.expected]}"
        )

    def _pieces(
        self, job: Job, batch: Batch, clean: Clean, measured: Measured | None
    ) -> list[Piece] | None:
        """Return what a job changes on a batch; None where memory does not suffice."""
        try:
            return [
                self._changed(job, batch, clean, row, image, prediction)
                for row, image, prediction in self._predictions(job, batch, clean, measured)
            ]
        except out_of_memory.ERRORS as error:
            if len(batch) == 1 or not out_of_memory.is_shortage(error):
                raise
        return None

    def _clean(self, batch: Batch) -> Iterator[tuple[Batch, Clean]]:
        """Run the intact network, on halves of the batch where memory does not suffice."""
        setup = self.setup
        try:
            if setup.graph is None:
                clean = clean_run.run_model(
                    setup.model,
                    setup.exact,
                    batch,
                    rounding=self.rounding,
                    at_a_time=setup.at_a_time,
                    trusted=not setup.abrupt,
                )
            else:
                clean = clean_run.run_graph(
                    setup.graph,
                    self.keep,
                    setup.exact,
                    batch,
                    rounding=self.rounding,
                    trusted=not setup.abrupt,
                )
            self.rounding = clean.rounding
        except out_of_memory.ERRORS as error:
            if len(batch) == 1 or not out_of_memory.is_shortage(error):
                raise
        else:
            yield batch, clean
            return
        for half in _halves(batch):
            yield from self._clean(half)

    def _measured(self, job: Job, batch: Batch, clean: Clean) -> Measured | None:
        if not self.measures:
            return None
        return Measured.of(self.measures, clean.logits, batch.labels, len(job.rows))

    def _predictions(
        self, job: Job, batch: Batch, clean: Clean, measured: Measured | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        setup, care = self.setup, self.ladders[job].care
        record = None if measured is None else measured.record
        if clean.irregular:
            self._tell_irregular(job)
        if care >= Care.FLOAT64 or clean.irregular:
            decides = setup.replay if care == Care.REPLAY else setup.exact
            self.rescued += len(job.rows) * len(batch)
            yield from _in_float64(setup, decides, job, batch, clean, record)
            return
        if job not in self.suffixes:
            yield from _replayed(setup, job, batch, clean, self.rounding, record)
            return
        suffix, ladder = self.suffixes[job], self.ladders[job]
        if care == Care.FULL:
            ladder.tiers = [ladder.full]
        standins = stand_ins(
            setup.model, setup.data, batch, job, setup.statistics, at_a_time=setup.at_a_time
        )
        truth = None
        if ladder.full != torch.float64:
            truth = functools.partial(setup.exact.logits, batch, job)
        with torch.no_grad():
            yield from suffix.predict(
                clean,
                standins,
                ladder,
                slice_bytes=setup.slice_bytes,
                record=record,
                truth=truth,
            )

    def _tell_irregular(self, job: Job) -> None:
        if job not in self.irregular:
            self.irregular.add(job)
            logger.info("%s: something inside is not finite: float64 decides all pairs", job.name)

    def _changed(
        self,
        job: Job,
        batch: Batch,
        clean: Clean,
        row: Tensor,
        image: Tensor,
        prediction: Tensor,
    ) -> Piece:
        """Decide what is open, then keep the predictions that changed; all on the CPU."""
        open_ = (prediction < 0).nonzero().squeeze(1)
        if len(open_):
            self.rescued += len(open_)
            exact = self.setup.exact.decide(batch, job, row[open_], image[open_])
            prediction = prediction.index_copy(0, open_, exact.prediction)
        changed = (prediction != clean.predicted[image]).nonzero().squeeze(1)
        return (
            (row[changed] + job.rows.start).numpy(),
            batch.index[image[changed]].numpy(),
            prediction[changed].numpy(),
        )

    def _audit(
        self,
        job: Job,
        batch: Batch,
        clean: Clean,
        flips: Sequence[Piece],
        measured: Measured | None,
    ) -> _Audited:
        """Recompute the audited pairs of this job and batch, and compare with its flips."""
        first, last = int(batch.index[0]), int(batch.index[-1])
        row, image = self.audited.T
        mine = (row >= job.rows.start) & (row < job.rows.stop) & (image >= first) & (image <= last)
        row, image = row[mine], image[mine]
        if not len(row):
            return _Audited(0, [], [Accuracy()] * len(self.measures))
        flipped = {
            (r, i): new
            for piece in flips
            for r, i, new in zip(*(part.tolist() for part in piece), strict=True)
        }
        intact = clean.predicted.numpy()[image - first]
        pairs = zip(row.tolist(), image.tolist(), intact.tolist(), strict=True)
        found = np.array([flipped.get((r, i), same) for r, i, same in pairs])
        replay = self.setup.replay
        rows, images = torch.from_numpy(row - job.rows.start), torch.from_numpy(image - first)
        logits = replay.logits(batch, job, rows, images)
        exact = decision(logits)
        accuracy: Sequence[Accuracy] = []
        if measured is not None:
            used, which = images.unique(return_inverse=True)
            before = replay.logits(batch, None, used, used)[which]
            accuracy = measured.audit(rows, images, before, logits)
        expected = exact.prediction.numpy()
        wrong = (expected != found) & ~exact.near_tie.numpy()
        named = zip(*(part[wrong].tolist() for part in (row, image, found, expected)), strict=True)
        return _Audited(len(found), [Mismatch(*pair) for pair in named], accuracy)

    def effort(self) -> Effort:
        """Sum up what the jobs took in this process."""
        settled: dict[str, int] = {}
        for ladder in self.ladders.values():
            for tier, pairs in ladder.settled.items():
                settled[_name(tier)] = settled.get(_name(tier), 0) + pairs
        if self.rescued:
            settled["float64"] = settled.get("float64", 0) + self.rescued
        logger.info(
            "the dense part settled %s pairs",
            ", ".join(f"{pairs} in {tier}" for tier, pairs in settled.items()) or "no",
        )
        doubt = {
            job.name: {_name(tier): ladder.doubt(tier) for tier in ladder.doubts}
            for job, ladder in self.ladders.items()
        }
        return Effort(self.layer_seconds, settled, doubt)


@dataclass(frozen=True)
class _Audited:
    """What the audit found on a job and a batch."""

    pairs: int
    wrong: list[Mismatch]
    accuracy: Sequence[Accuracy]  # of each measure


def _halves(batch: Batch) -> list[Batch]:
    """Halve a batch for which memory does not suffice."""
    logger.warning("out of memory: going on with %d images at a time", len(batch) // 2)
    return list(batch.split(len(batch) // 2))


def _name(tier: torch.dtype) -> str:
    return str(tier).removeprefix("torch.")


def _replayed(
    setup: Setup,
    job: Job,
    batch: Batch,
    clean: Clean,
    rounding: Rounding,
    record: Record | None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every pair of a job by plain replay; close calls are left open."""
    fitting = setup.memory // 4 // max(1, batch.images[0].numel() * 1024)
    size = max(1, min(256, setup.at_a_time, fitting))
    own = Replay(setup.model, batch.images.dtype, setup.data, setup.statistics, size)
    image = torch.arange(len(batch)).repeat_interleave(len(job.members))
    row = torch.arange(len(job.members)).repeat(len(batch))
    for rows, images in zip(row.split(size), image.split(size), strict=True):
        logits = own.logits(batch, job, rows, images)
        close = clean_run.close_calls(logits, rounding.tolerance(logits))
        prediction = decision(logits).prediction
        _tell(record, rows, images, logits, clean)
        yield rows, images, torch.where(close, torch.full_like(prediction, -1), prediction)


def _in_float64(
    setup: Setup,
    decides: Exact | Replay,
    job: Job,
    batch: Batch,
    clean: Clean,
    record: Record | None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every pair of a job decided in float64, some images at a time; nothing is left open.

    The clean run is not relied on, not even for which pairs are silent.
    """
    units = len(job.members)
    fitting = setup.memory // 8 // (8 * units * setup.classes)
    for images in torch.arange(len(batch)).split(max(1, min(IMAGES, fitting))):
        image = images.repeat_interleave(units)
        row = torch.arange(units).repeat(len(images))
        logits = decides.logits(batch, job, row, image)
        _tell(record, row, image, logits, clean)
        yield row, image, decision(logits).prediction


def _tell(record: Record | None, row: Tensor, image: Tensor, logits: Tensor, clean: Clean) -> None:
    """Record the logits of some pairs, all on the CPU, as changes of the clean ones."""
    if record is not None:
        device = clean.logits.device
        rows, images, exact = (sent(t, device) for t in (row, image, logits.double()))
        record(rows, images, exact - clean.logits[images])
