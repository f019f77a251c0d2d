"""All jobs on one block of images after another: clean run, predictions, audit.

Where the audit finds that a job was done wrong, that is a fault of the engine: the job is done
again one step more carefully, and with that care from there on.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from pyablate.data.dataset import Batch
from pyablate.engine import clean_run, cuda_graph
from pyablate.engine.care import Care
from pyablate.engine.clean import Clean
from pyablate.engine.float64 import IMAGES, Exact
from pyablate.engine.job import Job
from pyablate.engine.logit_change import Change
from pyablate.engine.loss_margin import Measured, Record
from pyablate.engine.pair_slice import logit_change
from pyablate.engine.precision_cascade import PrecisionCascade
from pyablate.engine.replay import Replay, decision
from pyablate.engine.rounding import Rounding
from pyablate.engine.suffix import Suffix, needed
from pyablate.engine.sweep import Sweep
from pyablate.network import near_tie
from pyablate.results.effort import Effort
from pyablate.runs.accumulator import BlockAccumulator
from pyablate.runs.audit import Audited, Auditor
from pyablate.runs.blocks import Block, FlipChunk, PartialBlock
from pyablate.runs.job_steps import Steps
from pyablate.runs.sampling import Drawing
from pyablate.runs.screening import Screen
from pyablate.runs.setup import Setup
from pyablate.runs.state import TIERS, in_words, pack_cascade
from pyablate.runtime import out_of_memory
from pyablate.runtime.host_to_device import sent
from pyablate.runtime.progress import stage

logger = logging.getLogger("pyablate")

MEASURED = 32
"""Units of a job at most on which replay in less than float64 is measured, batch by batch."""

Decide = Callable[[Tensor, Tensor], Tensor]
"""``decide(row, image)``: the class of each pair, int32 ``[P]``."""

Predicted = tuple[Tensor, Tensor, Tensor]
"""Row in the job, position in the batch, class: int64, int64 and int32 ``[P]``, on the CPU."""


@dataclass(eq=False)
class BlockSweep:
    """All jobs on one block of images after another, and what they took.

    Attributes
    ----------
    setup : Setup
        The run.
    audited : ndarray
        int64 ``[A, 2]``: row and image of the pairs to recompute.
    measures : tuple of str
        What is recorded besides predictions.
    on_mismatch : str
        See :func:`pyablate.ablate`.
    screen : Screen or None
        What settles pairs by prediction, in a screened run.
    drawing : Drawing or None
        What draws pairs, in an estimated run.
    rounding : Rounding
        How far the clean run has been seen to be off.
    layer_seconds : dict
        Time of each layer's ablations.
    other_seconds : dict
        Time of clean runs and audit.
    cascades : dict
        Precisions and care of each job.
    suffixes : dict
        What lies behind the sites of each job; empty where all is done by replay.
    keep : set of fx.Node
        Clean tensors that they read.
    advance : callable
        Told how many more pairs of the job at work are done.
    recorder : Recorder or None
        Records slices as CUDA graphs, where the device has such; its memory goes with the sweep.
    """

    setup: Setup
    audited: np.ndarray
    measures: tuple[str, ...]
    on_mismatch: str = "error"
    screen: Screen | None = None
    drawing: Drawing | None = None
    rounding: Rounding = field(default_factory=Rounding)
    layer_seconds: dict[str, float] = field(default_factory=dict)
    other_seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    cascades: dict[Job, PrecisionCascade] = field(init=False)
    suffixes: dict[Job, Suffix] = field(init=False)
    keep: set[fx.Node] = field(init=False)
    auditor: Auditor = field(init=False)
    advance: Callable[[int], None] = field(init=False)
    recorder: cuda_graph.Recorder | None = field(init=False)

    def __post_init__(self) -> None:
        setup = self.setup
        self.suffixes = {job: Suffix.of(setup.graph, job) for job in setup.jobs if setup.graph}
        self.cascades = {job: self._cascade(job) for job in setup.jobs}
        self.keep = needed(self.suffixes.values())
        self.recorder = cuda_graph.recorder(setup.data.device)
        self.auditor = Auditor(setup, self.audited, self.on_mismatch)
        if setup.abrupt:
            care = Care.FLOAT64 if isinstance(setup.exact, Exact) else Care.REPLAY
            for cascade in self.cascades.values():
                cascade.care = care

    def _cascade(self, job: Job) -> PrecisionCascade:
        """Begin with all precisions; few pairs take only the last, unless one is asked for."""
        setup, chosen = self.setup, self.drawing or self.screen
        tiers = [*setup.low, setup.data.dtype]
        if setup.precision != "auto":
            return PrecisionCascade(tiers)
        share = 1.0 if chosen is None else chosen.share(job)
        return PrecisionCascade(tiers, round(share * len(job.members) * len(setup.data)))

    def block(
        self,
        images: Batch,
        hashed: int,
        partial: PartialBlock | None = None,
        *,
        jobs: Sequence[Job] | None = None,
        keep: Callable[[PartialBlock], None] | None = None,
        advance: Callable[[int, Job], None],
    ) -> Block:
        """Do jobs on some images.

        Parameters
        ----------
        images : Batch
            Consecutive ones.
        hashed : int
            Their hash, for the record.
        partial : PartialBlock, optional
            What an earlier process found on them.
        jobs : sequence of Job, optional
            Some of the run's; all by default.
        keep : callable, optional
            Takes what the first of all jobs have found, after each of them.
        advance : callable
            Takes the number of pairs just done, and the job at work.
        """
        found = BlockAccumulator(self.setup, self.measures, hashed, jobs or self.setup.jobs)
        if self.screen is not None:
            found.screening = self.screen.nothing()
        if self.drawing is not None:
            found.estimate = self.drawing.nothing()
        if partial is not None:
            found.go_on_from(partial)
        self._sweep(images, found, keep, advance)
        while self._behind(found):
            found = found.start_over()
            self._sweep(images, found, keep, advance)
        return found.block(images, self._state)

    def _sweep(
        self,
        images: Batch,
        found: BlockAccumulator,
        keep: Callable[[PartialBlock], None] | None,
        advance: Callable[[int, Job], None],
    ) -> None:
        parts = images.split(self.setup.batch_size)
        for batch, clean in (run for part in parts for run in self._clean(part, found.jobs)):
            found.labels.append(batch.labels.cpu().numpy())
            found.baseline.append(clean.predicted.numpy())
            for number, job in enumerate(found.jobs):
                steps = Steps(job, len(job.rows) * len(batch), advance)
                if number >= found.skipped:
                    self.advance = steps
                    self._job(job, batch, clean, found)
                    if keep is not None and len(batch) == len(images) and not self._behind(found):
                        keep(found.partial(number + 1, self._state))
                steps.finish()
            del clean  # before the next batch has its own

    def _behind(self, found: BlockAccumulator) -> bool:
        """Whether a part of the block needed more care than those before it."""
        return any(self.behind(job, *known) for job, known in found.care.items())

    def behind(self, job: Job, care: Care, raised: int) -> bool:
        """Whether a job that was done with this care, and thresholds, is done with more now.

        Where all pairs are computed, thresholds are of no account.
        """
        by_threshold = care < Care.FLOAT64 and raised < self._raised(job)
        return by_threshold or care < self.cascades[job].care

    @property
    def _state(self) -> list[Any]:
        return [pack_cascade(cascade, self._raised(job)) for job, cascade in self.cascades.items()]

    def _raised(self, job: Job) -> int:
        """How often the threshold of a job has been raised."""
        return 0 if self.screen is None else self.screen.raised[job]

    def _clean(self, batch: Batch, jobs: Sequence[Job]) -> Iterator[tuple[Batch, Clean]]:
        """Run the intact network, on halves of the batch where memory does not suffice.

        What gradients say is asked of some jobs.
        """
        setup, start = self.setup, time.perf_counter()
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
            chosen = self.drawing or self.screen
            # With more care all pairs are computed, whatever gradients say.
            some = [job for job in jobs if self.cascades[job].care < Care.FLOAT64]
            if chosen is not None and some and not clean.irregular:
                clean = chosen.predict(batch, clean, some)
        except out_of_memory.ERRORS as error:
            if len(batch) == 1 or not out_of_memory.is_shortage(error):
                raise
        else:
            if not setup.data.labelled:
                batch = replace(batch, labels=clean.prediction.long())
            self.other_seconds["clean runs"] += time.perf_counter() - start
            yield batch, clean
            return
        for half in _halves(batch):
            yield from self._clean(half, jobs)

    def _job(self, job: Job, batch: Batch, clean: Clean, found: BlockAccumulator) -> None:
        """Do a job on a batch, again with more care where the audit finds it wrong."""
        start = time.perf_counter()
        measured = None
        if self.screen is not None:
            self.screen.found.pop(job, None)  # of a first try with less care
        if self.drawing is not None:
            self.drawing.found.pop(job, None)
        if self.measures:
            measured = Measured.of(self.measures, clean.logits, batch.labels, len(job.rows))
        flips = self._flips(job, batch, clean, None if measured is None else measured.record)
        if flips is None:
            for half in _halves(batch):
                for part, known in self._clean(half, [job]):
                    self._job(job, part, known, found)
            return
        spent = time.perf_counter() - start
        self.layer_seconds[job.name] = self.layer_seconds.get(job.name, 0.0) + spent
        stage(f"{job.name} (audit)")
        start = time.perf_counter()
        audited = self.auditor.check(job, batch, clean, flips, measured)
        self.other_seconds["audit"] += time.perf_counter() - start
        if audited.wrong:
            self.auditor.check_intact(batch, clean, audited)
            if self._more_careful(job, audited):
                found.differed |= {(pair.row, pair.image): job.name for pair in audited.wrong}
                self._job(job, batch, clean, found)
                return
        cascade = self.cascades[job]
        strategy = cascade.strategy if self.setup.graph else "replay"
        found.take(
            job,
            flips,
            measured,
            audited,
            care=cascade.care,
            strategy=strategy,
            raised=self._raised(job),
            screened=None if self.screen is None else self.screen.found.pop(job, None),
            drawn=None if self.drawing is None else self.drawing.noted(job, flips),
        )

    def _flips(
        self, job: Job, batch: Batch, clean: Clean, record: Record | None
    ) -> list[FlipChunk] | None:
        """Return what a job changes on a batch; None where memory does not suffice."""
        try:
            predicted = self._predictions(job, batch, clean, record)
            return [_changed(job, batch, clean, *some) for some in predicted]
        except out_of_memory.ERRORS as error:
            if len(batch) == 1 or not out_of_memory.is_shortage(error):
                raise
        return None

    def _more_careful(self, job: Job, audited: Audited) -> bool:
        """Do a job with more care from now on; whether there is more.

        Raises
        ------
        AuditError
            There is none, and this is an error.
        """
        cascade, found = self.cascades[job], self.auditor.describe(job, audited)
        if cascade.care == Care.REPLAY:
            self.auditor.give_up(
                f"{found}, though every pair of this layer is by float64 replay already"
            )
            return False
        cascade.care = self._next(job)
        how = cascade.care.describe(cascade.strategy)
        logger.warning("%s; the layer is computed again by: %s", found, how)
        partly = self.screen is not None or (self.drawing and not self.drawing.samples(job))
        if partly and cascade.care >= Care.FLOAT64:
            logger.warning("all pairs of the layer are computed from here on, whatever was asked")
        return True

    def _next(self, job: Job) -> Care:
        """Find the least care above the present one that makes a difference."""
        cascade = self.cascades[job]
        if job not in self.suffixes:
            return Care.REPLAY
        if cascade.care < Care.FULL and cascade.strategy == "delta" and len(cascade.tiers) > 1:
            return Care.FULL
        decides = isinstance(self.setup.exact, Exact)
        return Care.FLOAT64 if cascade.care < Care.FLOAT64 and decides else Care.REPLAY

    def _predictions(
        self, job: Job, batch: Batch, clean: Clean, record: Record | None
    ) -> Iterator[Predicted]:
        """Predictions of every pair that can differ from the clean run's."""
        cascade = self.cascades[job]
        if clean.irregular:
            self._give_up_deltas(job)
        if cascade.care >= Care.FLOAT64 or clean.irregular:
            yield from self._in_float64(job, batch, clean, record)
        elif job not in self.suffixes:
            yield from self._replayed(job, batch, clean, record)
        elif self.setup.graph and self.setup.graph.logits in self.suffixes[job].nodes:
            if cascade.care == Care.FULL:
                cascade.tiers = [cascade.full]
            with torch.no_grad():
                found = self._by_deltas(job, batch, clean, record)
            yield found

    def _give_up_deltas(self, job: Job) -> None:
        """Let float64 compute values of a job: what is not finite has no difference."""
        exact = self.setup.exact
        if isinstance(exact, Exact) and job not in exact.recomputed:
            logger.debug("%s: something inside is not finite: values instead of deltas", job.name)
            exact.recomputed.add(job)

    def _by_deltas(self, job: Job, batch: Batch, clean: Clean, record: Record | None) -> Predicted:
        """By the closed form or tier after tier, at last in float64.

        The device is waited for where pairs are counted: those that are live, those whose
        prediction changed. What lies between is launched without a look at what came out.
        """
        suffix, cascade = self.suffixes[job], self.cascades[job]
        size = suffix.pairs_in(self.setup.slice_bytes, self.setup.data.device)
        truth = functools.partial(self.setup.exact.logits, batch, job)
        sweep = Sweep(suffix, clean, self.setup.own.replacements(batch, job))
        if job.channelwise:
            sweep.advance()
            if sweep.head is not None:
                cascade.strategy = "closed form"
                if record is not None:
                    sweep.record_closed_form(record, size(torch.float64))
                row, image, prediction = sweep.closed_form()
                return row, image, cascade.classify_in_float64(row, image, prediction, truth)
        row, image = sweep.live_pairs()
        change: Change = functools.partial(logit_change, sweep)
        if self.recorder is not None:
            change = cuda_graph.Repeated(change, self.recorder)
        decide: Decide = functools.partial(
            cascade.classify,
            change,
            clean=clean,
            size=size,
            record=record,
            truth=truth,
            advance=self.advance,
        )
        self.advance(len(job.rows) * len(batch) - len(row))  # the others change nothing
        if self.drawing is not None:
            return self._drawn(self.drawing, job, batch, clean, row, image, decide)
        if self.screen is None:
            return row, image, decide(row, image)
        return row, image, self._screened(self.screen, sweep, batch, row, image, decide)

    def _screened(
        self,
        screen: Screen,
        sweep: Sweep,
        batch: Batch,
        row: Tensor,
        image: Tensor,
        decide: Decide,
    ) -> Tensor:
        """Settle live pairs by prediction where that will do; decide the others, and a sample."""
        job, intact = sweep.suffix.job, sweep.clean.predicted[image]
        choice = screen.choose(sweep, batch, row, image)
        if choice is None:
            return decide(row, image)
        found, computed = intact.clone(), torch.zeros(len(row), dtype=torch.bool)
        forced = self.auditor.draws(job, batch, row, image)
        while True:
            todo = (~computed & (forced | ~screen.settles(job, choice))).nonzero().squeeze(1)
            if len(todo):
                found[todo] = decide(row[todo], image[todo])
                computed[todo] = True
            if not screen.learn(job, choice, found != intact):
                break
        screen.take_note(job, len(job.rows) * len(batch), choice, computed, found != intact)
        return found

    def _drawn(
        self,
        drawing: Drawing,
        job: Job,
        batch: Batch,
        clean: Clean,
        row: Tensor,
        image: Tensor,
        decide: Decide,
    ) -> Predicted:
        """Decide pairs that are drawn, and those that are audited, which do not count."""
        drawn = drawing.draw(job, batch, clean, row, image)
        todo = drawn.chosen | self.auditor.draws(job, batch, row, image)
        todo = todo.nonzero().squeeze(1)
        found = clean.predicted[image]
        if len(todo):
            found[todo] = decide(row[todo], image[todo])
        drawing.take_note(job, batch, clean, row, image, drawn, found)
        return row[todo], image[todo], found[todo]

    def _every_pair(
        self, job: Job, batch: Batch, clean: Clean, size: int, decide: Decide
    ) -> Iterator[Predicted]:
        """Decide all pairs (row, image), or those drawn, image by image, ``size`` at a time."""
        row, image = _pairs(job, batch)
        if self.drawing is not None and self.drawing.samples(job):

            def some(row: Tensor, image: Tensor) -> Tensor:
                parts = zip(row.split(size), image.split(size), strict=True)
                return torch.cat([decide(*part) for part in parts])

            yield self._drawn(self.drawing, job, batch, clean, row, image, some)
            return
        for part in zip(row.split(size), image.split(size), strict=True):
            yield *part, decide(*part)

    def _in_float64(
        self, job: Job, batch: Batch, clean: Clean, record: Record | None
    ) -> Iterator[Predicted]:
        """Every pair in float64, some images at a time.

        The clean run is not relied on, not even for which pairs are silent.
        """
        setup, units = self.setup, len(job.members)
        decides = setup.replay if self.cascades[job].care == Care.REPLAY else setup.exact
        fitting = setup.memory // 8 // (8 * units * setup.classes)

        def decide(row: Tensor, image: Tensor) -> Tensor:
            logits = decides.logits(batch, job, row, image)
            _tell(record, row, image, logits, clean)
            self.cascades[job].count(torch.float64, len(row))
            self.advance(len(row))
            return decision(logits).prediction

        size = units * max(1, min(IMAGES, fitting))
        yield from self._every_pair(job, batch, clean, size, decide)

    def _replayed(
        self, job: Job, batch: Batch, clean: Clean, record: Record | None
    ) -> Iterator[Predicted]:
        """Every pair by replay in the model's own precision, close calls in float64."""
        setup = self.setup
        fitting = setup.memory // 4 // max(1, batch.images[0].numel() * 1024)
        size = max(1, min(256, setup.at_a_time, fitting))
        own = replace(setup.own, rows=size)
        truth = functools.partial(setup.exact.logits, batch, job)
        self._measure_replay(job, batch, own, truth)

        def decide(row: Tensor, image: Tensor) -> Tensor:
            logits = own.logits(batch, job, row, image)
            close = clean_run.close_calls(logits, self.rounding.tolerance(logits))
            _tell(record, row, image, logits, clean)
            prediction = decision(logits).prediction.masked_fill(close, -1)
            self.advance(len(row))
            return self.cascades[job].classify_in_float64(row, image, prediction, truth)

        yield from self._every_pair(job, batch, clean, size, decide)

    def _measure_replay(
        self, job: Job, batch: Batch, own: Replay, truth: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        """Measure how far replay is off where units are ablated; intact images do not show it."""
        units = len(job.members)
        row = torch.arange(0, units, -(-units // MEASURED))
        image = row % len(batch)
        for part in torch.arange(len(row)).split(own.rows):
            found = own.logits(batch, job, row[part], image[part])
            exact = truth(row[part], image[part])
            usable = near_tie.usable(found) & near_tie.usable(exact)
            if bool(usable.any()):
                self.rounding |= Rounding.measured(found[usable], exact[usable])

    def effort(self) -> Effort:
        """Sum up what the jobs took in this process."""
        total: Counter[torch.dtype] = Counter()
        for cascade in self.cascades.values():
            total.update(cascade.classified)
        decided = {_name(tier): total[tier] for tier in TIERS if tier in total}
        if decided:
            each = (f"{pairs:,} in {in_words(tier)}" for tier, pairs in decided.items())
            logger.info("pairs decided: %s", ", ".join(each))
        bounds = {
            job.name: {_name(tier): cascade.error_bound(tier) for tier in cascade.error_bounds}
            for job, cascade in self.cascades.items()
        }
        return Effort(self.layer_seconds, decided, bounds, dict(self.other_seconds))


def _changed(
    job: Job, batch: Batch, clean: Clean, row: Tensor, image: Tensor, prediction: Tensor
) -> FlipChunk:
    """Keep the predictions that changed; all on the CPU."""
    changed = (prediction != clean.predicted[image]).nonzero().squeeze(1)
    return (
        (row[changed] + job.rows.start).numpy(),
        batch.index[image[changed]].numpy(),
        prediction[changed].numpy(),
    )


def _halves(batch: Batch) -> list[Batch]:
    """Halve a batch for which memory does not suffice."""
    logger.warning("out of memory: going on with %d images at a time", len(batch) // 2)
    return list(batch.split(len(batch) // 2))


def _name(tier: torch.dtype) -> str:
    return str(tier).removeprefix("torch.")


def _pairs(job: Job, batch: Batch) -> tuple[Tensor, Tensor]:
    """All pairs (row, image), image by image."""
    image = torch.arange(len(batch)).repeat_interleave(len(job.members))
    return torch.arange(len(job.members)).repeat(len(batch)), image


def _tell(record: Record | None, row: Tensor, image: Tensor, logits: Tensor, clean: Clean) -> None:
    """Record the logits of some pairs, all on the CPU, as changes of the clean ones."""
    if record is not None:
        device = clean.logits.device
        rows, images, exact = (sent(t, device) for t in (row, image, logits.double()))
        record(rows, images, exact - clean.logits[images])
