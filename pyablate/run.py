"""The main job: capture, clean run, sweep of all units, rescue, audit, result."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from pyablate import shortage
from pyablate.batches import Batch
from pyablate.blocks import Begun, Block, Facts, Piece
from pyablate.checkpoint import pack_ladder
from pyablate.engine import baseline
from pyablate.engine.ablations import Job, stand_ins
from pyablate.engine.delta import Clean, Suffix, needed
from pyablate.engine.measures import Measured, Record, check_measures
from pyablate.engine.replay import Replay, decision
from pyablate.engine.tiers import Ladder
from pyablate.identity import Identity, identify, own_dtype
from pyablate.interventions import Intervention, parse
from pyablate.long_run import Course, check_data, hash_all, kept, shard_images
from pyablate.measures import Accuracy, Measure
from pyablate.prepare import Setup, check_options, prepare, undisturbed
from pyablate.progress import Report, reporting
from pyablate.ranks import Ranks, own_device, taking_part
from pyablate.result import AblationResult, Audit, Effort, Flips
from pyablate.run_store import (
    Layout,
    RunStore,
    check_place,
    has_statistics,
    read_statistics,
)
from pyablate.store import load
from pyablate.transfer import sent

logger = logging.getLogger("pyablate")


def ablate(
    model: nn.Module,
    data: Any,
    layers: str | Sequence[str] | None = None,
    *,
    intervention: str | Intervention = "zero",
    groups: Sequence[Sequence[str]] | None = None,
    class_names: Sequence[str] | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    memory: int | None = None,
    audit: int = 300,
    seed: int = 0,
    strategy: str = "auto",
    precision: str = "auto",
    measures: Sequence[str] = (),
    progress: bool | Report | None = None,
    output: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    shard: tuple[int, int] | None = None,
    distributed: bool = False,
) -> AblationResult:
    """Ablate every unit of some layers, one at a time, on every image.

    Parameters
    ----------
    model : nn.Module
        Trained classifier: images ``[N, ...]`` to logits ``[N, classes]``. It comes back as it
        was; the work is done on a copy in evaluation mode, in float32 (float64 if it is).
    data : pair of arrays, DataLoader or iterable of (images, labels)
        Images ``[N, ...]`` and integer labels ``[N]``.
    layers : str or sequence of str, optional
        Layer names, globs, or single units as ``"layer:unit"``; see :func:`pyablate.select`.
        The default is ``"*"``, or nothing if ``groups`` are given.
    intervention : str or Intervention
        What stands in for a unit; see :func:`pyablate.interventions.parse`.
    groups : sequence of sequences of str, optional
        Units ``"layer:unit"`` to ablate together, one row of the result per group, after the
        rows of ``layers``.
    class_names : sequence of str, optional
        One per class; by default the class numbers.
    device : str or torch.device, optional
        Where to work; by default where the model is.
    batch_size : int, optional
        Images per clean run. Changes speed and memory only.
    memory : int, optional
        Bytes to work in, roughly; by default a quarter of what is free.
    audit : int
        Random (unit, image) pairs to recompute by a plain float64 forward pass.
    seed : int
        Chooses the audited pairs; also the seed of a random intervention that names none.
    strategy : {"auto", "replay"}
        ``"replay"`` runs the whole network for every pair; it is what "auto" falls back on.
    precision : {"auto", "int8", "bf16", "fp32", "fp64"}
        Arithmetic of the dense part; "auto" takes what this device is measured to run fastest. All
        give the same predictions: doubtful pairs are decided again in higher precision.
    measures : sequence of {"loss", "margin"}
        Also record how much each ablation changes the cross-entropy, and the lead of the largest
        logit over the second, summed over the images of each class. In whatever precision decided
        a pair's prediction: ``result.measures`` says how accurate that was on the audited pairs;
        ``precision="fp32"`` or ``"fp64"`` buy more.
    progress : bool or callable, optional
        None shows a bar on a terminal and logs elsewhere; a callable gets (done, total, layer),
        pairs and the layer at work.
    output : path-like, optional
        Folder where finished blocks of images are kept, and the result in the end, the same as
        :meth:`AblationResult.save` would write. A run that was killed goes on there when it is
        called again; a finished one is read.
    fresh : bool
        Start over, whatever run is in ``output``.
    shard : (int, int), optional
        ``(i, n)``: only the i-th of n parts of the images, i from 1; see :func:`pyablate.merge`.
    distributed : bool
        Share the work among the processes that `torchrun` started; needs an ``output`` that all
        of them see.

    Returns
    -------
    AblationResult
        Predictions equal those of a float64 forward pass with the unit replaced, near ties
        (top-2 margin below 1e-5 of the largest logit) apart.

    Raises
    ------
    ValueError, TypeError
        Bad arguments, data or weights; the message names what, where and what was expected.
        :class:`pyablate.run_store.StoreMismatch`, a ValueError, if ``output`` holds a run with
        another model, data or option.
    OSError
        ``output`` cannot be written; when the disk is full, what is done is kept.
    """
    begin = time.perf_counter()
    if distributed and output is None:
        raise ValueError("distributed: needs output, a folder that all processes see")
    check_options(
        model,
        batch_size=batch_size,
        memory=memory,
        audit=audit,
        strategy=strategy,
        precision=precision,
    )
    recorded = check_measures(measures)
    chosen = parse(intervention, seed=seed)
    place = None if output is None else Path(output)
    if place is not None:
        check_place(place)
    device = own_device(distributed, device)
    with undisturbed(), taking_part(distributed, device) as ranks:
        goes_on = ranks.tell(place is not None and not fresh and has_statistics(place))
        setup = prepare(
            model,
            data,
            layers,
            groups,
            chosen,
            class_names,
            device,
            batch_size=batch_size,
            memory=memory,
            strategy=strategy,
            precision=precision,
            measured=read_statistics(place) if place is not None and goes_on else None,
            ranks=ranks,
        )
        images, dtype = shard_images(shard, len(setup.data)), own_dtype(model)
        size = min(setup.batch_size, -(-len(images) // ranks.count))
        layout = Layout(images, size, setup.memory)
        identity = identify(
            setup,
            dtype=dtype,
            images=images,
            strategy=strategy,
            audit=audit,
            seed=seed,
            measures=recorded,
        )
        hashing = place is not None or shard is not None
        known = _with_all_images(identity, setup, layout, dtype, ranks) if place else identity
        with kept(place, known, layout, setup.statistics, fresh=fresh, ranks=ranks) as held:
            if held is None and place is not None:
                finished = load(place)
                check_data(setup.data, layout, finished, dtype, ranks)
                logger.info("%s has finished already", place)
                return finished
            assert held is not None
            setup = replace(
                setup,
                batch_size=batch_size or held.layout.size,
                memory=memory or held.layout.memory,
            )
            sweep = Sweep(setup, _audited_pairs(setup, audit, seed), recorded)
            with reporting(progress if ranks.first else False, unit="pairs") as report:
                Course(
                    setup.data,
                    held,
                    ranks,
                    dtype,
                    list(sweep.ladders.values()),
                    precision == "auto",
                    setup.rows,
                    hashing,
                    report,
                ).run(sweep.block, setup.jobs[0].name)
            if ranks.first:
                result = _result(setup, held.collect(), known if shard else identity, hashing)
                if isinstance(held, RunStore):
                    held.finish(result)
            ranks.wait(lambda: None)
        if place is not None and not ranks.first:
            result = load(place)
    return replace(result, seconds=time.perf_counter() - begin, effort=sweep.effort())


def _with_all_images(
    identity: Identity, setup: Setup, layout: Layout, dtype: torch.dtype, ranks: Ranks
) -> Identity:
    """Add the hash of all images where others than its own matter to an image's result."""
    if not setup.intervention.needs_statistics and setup.intervention.kind != "resample":
        return identity
    everything = replace(layout, images=range(len(setup.data)))
    return {
        **identity,
        "data": {**identity["data"], "others": hash_all(setup.data, everything, dtype, ranks)},
    }


@dataclass(eq=False)
class Sweep:
    """All jobs on one block of images after another, and what they took."""

    setup: Setup
    audited: np.ndarray  # int64 [A, 2]: row, image
    measures: tuple[str, ...]
    flips: list[Piece] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    baseline: list[np.ndarray] = field(default_factory=list)
    audit: Audit = field(default_factory=lambda: Audit(0, 0))
    rescued: int = 0
    strategy: dict[str, str] = field(default_factory=dict)
    layer_seconds: dict[str, float] = field(default_factory=dict)
    accuracy: list[Accuracy] = field(init=False)  # one per measure
    sums: Tensor = field(init=False)  # float64 [measure, unit, class]

    def __post_init__(self) -> None:
        setup = self.setup
        self.suffixes = {job: Suffix.of(setup.graph, job) for job in setup.jobs if setup.graph}
        self.ladders = {job: Ladder([*setup.low, setup.data.dtype]) for job in setup.jobs}
        self.keep = needed(self.suffixes.values())

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
        self.sums = torch.zeros(shape, dtype=torch.float64)
        self.accuracy = [Accuracy()] * len(self.measures)
        for number, known in enumerate(begun.facts.measures.values() if begun else ()):
            self.sums[number] = torch.from_numpy(known.change)
            self.accuracy[number] = known.accuracy

    def _facts(self, hashed: int) -> Facts:
        return Facts(
            hash=hashed,
            audit=self.audit,
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
        self.flips += flips
        spent = time.perf_counter() - start
        self.layer_seconds[job.name] = self.layer_seconds.get(job.name, 0.0) + spent
        strategy = self.ladders[job].strategy if self.setup.graph else "replay"
        self.strategy.setdefault(job.name, strategy)
        self._audit(job, batch, clean, flips, measured)
        if measured is not None:
            measured.add_to(self.sums[:, job.rows.start : job.rows.stop])

    def _pieces(
        self, job: Job, batch: Batch, clean: Clean, measured: Measured | None
    ) -> list[Piece] | None:
        """Return what a job changes on a batch; None where memory does not suffice."""
        try:
            return [
                self._changed(job, batch, clean, row, image, prediction)
                for row, image, prediction in self._predictions(job, batch, clean, measured)
            ]
        except shortage.ERRORS as error:
            if len(batch) == 1 or not shortage.is_shortage(error):
                raise
        return None

    def _clean(self, batch: Batch) -> Iterator[tuple[Batch, Clean]]:
        """Run the intact network, on halves of the batch where memory does not suffice."""
        setup = self.setup
        try:
            if setup.graph is None:
                clean = baseline.run_model(
                    setup.model,
                    setup.exact,
                    batch,
                    margin=setup.margin,
                    at_a_time=setup.at_a_time,
                )
            else:
                clean = baseline.run_graph(
                    setup.graph, self.keep, setup.exact, batch, margin=setup.margin
                )
        except shortage.ERRORS as error:
            if len(batch) == 1 or not shortage.is_shortage(error):
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
        setup = self.setup
        record = None if measured is None else measured.record
        if job not in self.suffixes:
            yield from _replayed(setup, job, batch, clean, record)
            return
        suffix, ladder = self.suffixes[job], self.ladders[job]
        standins = stand_ins(
            setup.model, setup.data, batch, job, setup.statistics, at_a_time=setup.at_a_time
        )
        with torch.no_grad():
            yield from suffix.predict(
                clean, standins, ladder, slice_bytes=setup.slice_bytes, record=record
            )

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
    ) -> None:
        """Recompute the audited pairs of this job and batch, and compare with its flips."""
        first, last = int(batch.index[0]), int(batch.index[-1])
        row, image = self.audited.T
        mine = (row >= job.rows.start) & (row < job.rows.stop) & (image >= first) & (image <= last)
        row, image = row[mine], image[mine]
        if not len(row):
            return
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
        if measured is not None:
            used, which = images.unique(return_inverse=True)
            before = replay.logits(batch, None, used, used)[which]
            found_here = measured.audit(rows, images, before, logits)
            self.accuracy = [a + b for a, b in zip(self.accuracy, found_here, strict=True)]
        wrong = (exact.prediction.numpy() != found) & ~exact.near_tie.numpy()
        self.audit = Audit(self.audit.pairs + len(found), self.audit.mismatches + int(wrong.sum()))

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


def _result(setup: Setup, found: Block, identity: Identity, hashing: bool) -> AblationResult:
    facts = found.facts
    hashed = {"hash": f"{facts.hash:064x}"} if hashing else {}
    if facts.audit.mismatches:
        logger.error(
            "audit: %d of %d recomputed pairs differ; please report this model",
            facts.audit.mismatches,
            facts.audit.pairs,
        )
    return AblationResult(
        units=_units(setup.jobs),
        labels=found.labels,
        baseline=found.baseline,
        flips=found.flips,
        class_names=setup.class_names,
        intervention=str(setup.intervention),
        audit=facts.audit,
        strategy=facts.strategy,
        measures=facts.measures,
        provenance={**identity, "data": {**identity["data"], **hashed}},
    )


def _halves(batch: Batch) -> list[Batch]:
    """Halve a batch for which memory does not suffice."""
    logger.warning("out of memory: going on with %d images at a time", len(batch) // 2)
    return list(batch.split(len(batch) // 2))


def _name(tier: torch.dtype) -> str:
    return str(tier).removeprefix("torch.")


def _replayed(
    setup: Setup, job: Job, batch: Batch, clean: Clean, record: Record | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every pair of a job by plain replay; close calls are left open."""
    fitting = setup.memory // 4 // max(1, batch.images[0].numel() * 1024)
    size = max(1, min(256, setup.at_a_time, fitting))
    own = Replay(setup.model, batch.images.dtype, setup.data, setup.statistics, size)
    image = torch.arange(len(batch)).repeat_interleave(len(job.members))
    row = torch.arange(len(job.members)).repeat(len(batch))
    for rows, images in zip(row.split(size), image.split(size), strict=True):
        logits = own.logits(batch, job, rows, images)
        close = baseline.close_calls(logits, setup.margin * logits.abs().amax(dim=1))
        prediction = decision(logits).prediction
        if record is not None:
            there, where, exact = (sent(t, batch.device) for t in (rows, images, logits.double()))
            record(there, where, exact - clean.logits[where])
        yield rows, images, torch.where(close, torch.full_like(prediction, -1), prediction)


def _audited_pairs(setup: Setup, audit: int, seed: int) -> np.ndarray:
    """Choose random pairs; which ones depends on the seed and the sizes only."""
    images = len(setup.data)
    everything = setup.rows * images
    draw = np.random.Generator(np.random.Philox(seed))
    flat = np.sort(draw.choice(everything, size=min(audit, everything), replace=False))
    return np.stack([flat // images, flat % images], axis=1)


def _units(jobs: Sequence[Job]) -> pd.DataFrame:
    rows = [members for job in jobs for members in job.members]
    layers = ["+".join(dict.fromkeys(name for name, _ in members)) for members in rows]
    return pd.DataFrame(
        {
            "label": ["+".join(f"{name}:{unit}" for name, unit in members) for members in rows],
            "layer": layers,
            "unit": [
                -1 if job.grouped else members[0][1] for job in jobs for members in job.members
            ],
        }
    )
