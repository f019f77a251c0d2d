"""The main job: check, capture, plan, sweep the blocks of images, collect the result."""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from pyablate._validation import check_bytes, check_count
from pyablate.engine.care import check_on_mismatch
from pyablate.engine.job import Job
from pyablate.engine.loss_margin import check_measures
from pyablate.interventions import Intervention, parse
from pyablate.network.classifier import Choice
from pyablate.network.forward import own_dtype
from pyablate.result import AblationResult, load
from pyablate.results.store import is_result
from pyablate.runs.audit import usual_pairs
from pyablate.runs.blocks import Block
from pyablate.runs.chance import chance_remark
from pyablate.runs.executor import BlockSweep
from pyablate.runs.fingerprint import Identity, glance, identify
from pyablate.runs.loop import Held, RunLoop, check_data, hash_all, kept, shard_images
from pyablate.runs.run_folder import Layout, RunStore, check_place, has_statistics, read_statistics
from pyablate.runs.sampling import Drawing
from pyablate.runs.sampling_design import Budget, Design, design
from pyablate.runs.screening import Screen
from pyablate.runs.setup import Setup, SetupOptions, check_options, prepare
from pyablate.runs.state import unpack_thresholds
from pyablate.runs.thresholds import Thresholds, measure
from pyablate.runtime.determinism import undisturbed
from pyablate.runtime.distributed import Ranks, own_device, taking_part
from pyablate.runtime.progress import Report, Reporter, reporting, stage

logger = logging.getLogger("pyablate")


_SHUFFLED = (
    "data: the loader shuffles: image numbers in the result are those of this pass, and a run that "
    "is killed or cut into shards cannot go on; shuffle=False makes them those of the data set"
)


def ablate(
    model: nn.Module,
    data: Any,
    layers: str | Sequence[str] | None = None,
    *,
    intervention: str | Intervention = "zero",
    groups: Sequence[Sequence[str]] | None = None,
    axis: Mapping[str, int] | None = None,
    logits: Choice = None,
    class_names: Sequence[str] | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    memory: int | str | None = None,
    audit: int | None = None,
    on_mismatch: str = "error",
    seed: int = 0,
    strategy: str = "auto",
    precision: str = "auto",
    measures: Sequence[str] = (),
    guarantee: str = "exact",
    risk: float = 1e-5,
    budget: str | int | None = None,
    progress: bool | Report | None = None,
    output: str | os.PathLike[str] | None = None,
    fresh: bool = False,
    shard: tuple[int, int] | None = None,
    distributed: bool = False,
) -> AblationResult:
    """Ablate every unit of some layers, one at a time, on every image.

    Calls from several threads of one process take turns.

    Parameters
    ----------
    model : nn.Module
        Trained classifier: images ``[N, ...]`` to logits ``[N, classes]``. It comes back as it
        was; the work is done on a copy in evaluation mode, in float32 (float64 if it is).
    data : pair of arrays, data set, DataLoader or iterable of (images, labels)
        Images ``[N, ...]``, of which uint8 is scaled to ``[0, 1]``, and integer labels ``[N]``; a
        data set that is read by index has one image and its label. A dict or tuple of several
        inputs may stand for the images, a dict of inputs and "labels" for a pair. Without labels
        (images alone, or None for the labels) the intact network's predictions stand in, and what
        is called accuracy is agreement with them.
    layers : str or sequence of str, optional
        Layer names, globs, or single units as ``"layer:unit"``; see :func:`pyablate.select`.
        The default is ``"*"``, or nothing if ``groups`` are given.
    intervention : str or Intervention
        The replacement of a unit; see :func:`pyablate.interventions.parse`.
    groups : sequence of sequences of str, optional
        Units ``"layer:unit"`` to ablate together, one row of the result per group, after the
        rows of ``layers``.
    axis : dict, optional
        Axis of the units of some layers, by name, 0 being the batch, where you know better than
        :func:`pyablate.sites`, which follows it from the weights.
    logits : str, int or callable, optional
        What the model's logits are, where it returns more than one tensor, or ``"binary"`` where it
        returns one logit an image; see :func:`pyablate.classifier`.
    class_names : sequence of str, optional
        One per class; by default those of the model's ``config.id2label``, as Hugging Face's
        models have it, else the class numbers.
    device : str or torch.device, optional
        Where to work; by default where the model is.
    batch_size : int, optional
        Images per clean run. Changes speed and memory only.
    memory : int or str, optional
        Bytes to work in, roughly, or a size such as "4GB" or "512MiB"; by default a quarter of
        what is free.
    audit : int, optional
        Random (unit, image) pairs to recompute by plain forward passes of the model, in float64
        where float32 does not settle them. A layer of which one differs is computed again more
        carefully, at last by float64 passes only, on all images; ``result.strategy`` and
        ``result.audit`` tell. By default as many as take about 5 % of the time, from 30 to 300;
        how many follows from the network and the sizes alone.
    on_mismatch : {"error", "warn"}
        What happens if pairs differ even then: :class:`pyablate.AuditError`, or a message and a
        result whose ``audit`` counts them.
    seed : int
        Chooses the audited pairs; also the seed of a random intervention that names none.
    strategy : {"auto", "replay"}
        ``"replay"`` runs the whole network for every pair; it is what "auto" falls back on, and
        what it takes for few pairs of a large network, whose capture would take longer.
    precision : {"auto", "int8", "bf16", "fp16", "fp32", "fp64"}
        What pairs are computed in first; "auto" takes what this device is measured to run fastest.
        "int8" is for processors, "fp16" for GPUs.
        All give the same predictions: doubtful pairs are decided again in higher precision.
    measures : sequence of {"loss", "margin"}
        Also record how much each ablation changes the cross-entropy, and the lead of the largest
        logit over the second, summed over the images of each class. In whatever precision decided
        a pair's prediction: ``result.measures`` says how accurate that was on the audited pairs;
        ``precision="fp32"`` or ``"fp64"`` buy more.
    guarantee : {"exact", "screened", "estimated"}
        "screened" computes the pairs whose prediction could change, and a random sample of the
        others, which keep the intact network's; ``result.screening`` bounds how many of these are
        wrong. Layers that would gain nothing by that are computed as a whole. "estimated" computes
        a random sample of all pairs, as large as ``budget`` lets it be: accuracies, drops, ``lost``
        and ``gained`` are unbiased estimates, with 95 % intervals
        (:meth:`AblationResult.half_width`). See the guide on guarantees.
    risk : float
        Of a screened run: share of wrong predictions to aim at, as far as its measurements tell.
    budget : str or int, optional
        Of an estimated run, which needs one: about so many pairs are computed. A share of all pairs
        (``"2%"``) or their number, of which layers with a closed form do not count, since they
        are computed as a whole; or a time for the images after the first measurements
        (``"10min"``, ``"90s"``), which gives other pairs each time.
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
        (top-2 margin below 1e-5 of the scale of the competing logits) apart.

    Raises
    ------
    ValueError, TypeError
        Bad arguments, data or weights; the message names what, where and what was expected.
        :class:`pyablate.runs.StoreMismatch`, a ValueError, if ``output`` holds a run with
        another model, data or option.
    OSError
        ``output`` cannot be written; when the disk is full, what is done is kept.
    AuditError
        Audited predictions differ whatever is tried; finished blocks in ``output`` are kept.

    Examples
    --------
    >>> found = pa.ablate(model, data, "features.16", intervention="mean", audit=20)
    >>> found.strategy, found.audit.mismatches
    ({'features.16': 'closed form'}, 0)
    """
    begin = time.perf_counter()
    options = _RunOptions(
        setup=SetupOptions(
            layers=layers,
            groups=groups,
            intervention=parse(intervention, seed=seed),
            class_names=class_names,
            device=own_device(distributed, device),
            batch_size=batch_size,
            memory=check_bytes("memory", memory),
            strategy=strategy,
            precision=precision,
            measures=check_measures(measures),
            guarantee=guarantee,
            axis=axis,
            logits=logits,
        ),
        output=None if output is None else Path(output),
        audit=audit,
        on_mismatch=on_mismatch,
        seed=seed,
        risk=risk,
        budget=budget,
        fresh=fresh,
        shard=shard,
        distributed=distributed,
        progress=progress,
    )
    options.check(model)
    with (
        undisturbed(model, options.setup.device),
        taking_part(distributed, device) as ranks,
        reporting(options.progress if ranks.first else False, unit="pairs") as report,
    ):
        measured = _earlier(options, ranks)
        setup = _capture(model, data, options, measured, ranks)
        plan = _plan(model, setup, options, ranks)
        known = _measured(setup, options, measured, ranks)
        with kept(
            options.output,
            plan.known,
            plan.layout,
            setup.statistics,
            known,
            fresh=fresh,
            ranks=ranks,
        ) as held:
            if held is None:
                return _finished(setup, plan, options, ranks)
            prepared = time.perf_counter() - begin
            sweep = _sweep(setup, plan, options, held, known, ranks, report)
            if ranks.first:
                result = _collect(setup, plan, held)
                _warn_of_chance(chance_remark(result))
            ranks.wait(lambda: None)
        if options.output is not None and not ranks.first:
            result = load(options.output)
    effort = sweep.effort()
    effort.other_seconds["preparation"] = prepared
    return replace(result, seconds=time.perf_counter() - begin, effort=effort)


@dataclass(frozen=True)
class _RunOptions:
    """How a run is set up, checked and kept; see :func:`ablate`."""

    setup: SetupOptions
    output: Path | None
    audit: int | None
    on_mismatch: str
    seed: int
    risk: float
    budget: str | int | None
    fresh: bool
    shard: tuple[int, int] | None
    distributed: bool
    progress: bool | Report | None

    def check(self, model: Any) -> None:
        """Check what needs nothing else to be known."""
        if self.distributed and self.output is None:
            raise ValueError("distributed: needs output, a folder that all processes see")
        check_options(model, self.setup)
        _check_risk(self.risk)
        self._check_budget()
        if self.audit is not None:
            check_count("audit", self.audit, 0)
        check_on_mismatch(self.on_mismatch)
        if self.output is not None:
            check_place(self.output, fresh=self.fresh)

    def _check_budget(self) -> None:
        estimated = self.setup.guarantee == "estimated"
        if estimated:
            Budget.of(self.budget)
        elif self.budget is not None:
            raise ValueError(
                f'budget: expected with guarantee="estimated" only, got {self.budget!r} with '
                f'guarantee="{self.setup.guarantee}"'
            )

    @property
    def guarantee(self) -> dict[str, Any]:
        """What tells apart results of different guarantees."""
        kind = self.setup.guarantee
        if kind == "exact":
            return {}
        bound = (
            {"risk": self.risk} if kind == "screened" else {"budget": str(Budget.of(self.budget))}
        )
        return {"guarantee": kind, **bound}


@dataclass(frozen=True)
class _RunPlan:
    """Which images a run does, in what portions, and what tells it from others.

    Attributes
    ----------
    layout : Layout
        Images, and how they are cut into blocks.
    identity : dict
        What the result was computed from.
    known : dict
        The same, with what tells all images where others than its own matter.
    dtype : torch.dtype
        In which images are compared.
    hashing : bool
        Whether the images are to be known again.
    shard : (int, int), optional
        See :func:`ablate`.
    audit : int
        Pairs to recompute.
    """

    layout: Layout
    identity: Identity
    known: Identity
    dtype: torch.dtype
    hashing: bool
    shard: tuple[int, int] | None
    audit: int


def _check_risk(risk: Any) -> None:
    if isinstance(risk, bool) or not isinstance(risk, (int, float)) or not 0 < risk < 1:
        raise ValueError(f"risk: expected a share between 0 and 1, got {risk!r}")


def _earlier(options: _RunOptions, ranks: Ranks) -> dict[str, np.ndarray] | None:
    """Read what an earlier process measured before its first block, if there was one."""
    place = options.output
    goes_on = place is not None and not options.fresh and has_statistics(place)
    return read_statistics(place) if ranks.tell(goes_on) and place is not None else None


def _measured(
    setup: Setup,
    options: _RunOptions,
    measured: Mapping[str, np.ndarray] | None,
    ranks: Ranks,
) -> Thresholds | Design | None:
    """Measure what a screened or an estimated run needs, in the first process, for all."""
    kind, finished = options.setup.guarantee, False
    if options.output is not None and not options.fresh:
        finished = is_result(options.output)
    if kind == "exact" or ranks.tell(finished):
        return None
    known = None if measured is None else unpack_thresholds(measured)
    if known is None:
        stage("measuring what predictions by gradients are worth")
        found: Thresholds | Design | None = None
        if ranks.first and kind == "screened":
            found = measure(setup, options.risk, options.seed)
        elif ranks.first:
            images = len(shard_images(options.shard, len(setup.data)))
            budget = Budget.of(options.budget)
            found = design(setup, budget, options.seed, images=images, processes=ranks.count)
        known = ranks.tell(found.to_json() if found else None)
    return Thresholds.of(known) if kind == "screened" else Design.of(known)


def _capture(
    model: nn.Module,
    data: Any,
    options: _RunOptions,
    measured: Mapping[str, np.ndarray] | None,
    ranks: Ranks,
) -> Setup:
    """Capture the network, with the statistics of an earlier process if there are any."""
    setup = prepare(model, data, options.setup, measured=measured, ranks=ranks)
    remarks = [*setup.remarks, *([_SHUFFLED] if setup.data.shuffled else [])]
    for remark in remarks if ranks.first else ():
        logger.warning("%s", remark)
    return setup


def _plan(model: nn.Module, setup: Setup, options: _RunOptions, ranks: Ranks) -> _RunPlan:
    """Cut the images into blocks, and say what the run is."""
    images, dtype = shard_images(options.shard, len(setup.data)), own_dtype(model)
    size = min(setup.batch_size, -(-len(images) // ranks.count))
    layout = Layout(images, size, setup.memory)
    audit = usual_pairs(setup) if options.audit is None else options.audit
    identity = identify(
        setup,
        dtype=dtype,
        images=images,
        strategy=options.setup.strategy,
        audit=audit,
        seed=options.seed,
        measures=options.setup.measures,
        guarantee=options.guarantee,
    )
    hashing = options.output is not None or options.shard is not None
    known = _with_all_images(identity, setup, layout, dtype, ranks) if hashing else identity
    return _RunPlan(layout, identity, known, dtype, hashing, options.shard, audit)


def _finished(setup: Setup, plan: _RunPlan, options: _RunOptions, ranks: Ranks) -> AblationResult:
    """Read the result of a run that has finished already."""
    assert options.output is not None
    result = load(options.output)
    check_data(setup.data, plan.layout, result, plan.dtype, ranks)
    logger.info("%s has finished already", options.output)
    return result


def _sweep(
    setup: Setup,
    plan: _RunPlan,
    options: _RunOptions,
    held: Held,
    known: Thresholds | Design | None,
    ranks: Ranks,
    report: Reporter,
) -> BlockSweep:
    """Do all jobs on all blocks, in the portions with which the run began."""
    given = options.setup
    screen = Screen(setup, known) if isinstance(known, Thresholds) else None
    drawing = Drawing(setup, known) if isinstance(known, Design) else None
    setup = replace(
        setup,
        batch_size=given.batch_size or held.layout.size,
        memory=given.memory or held.layout.memory,
    )
    audited = _audited_pairs(setup, plan.audit, options.seed)
    sweep = BlockSweep(setup, audited, given.measures, options.on_mismatch, screen, drawing)
    RunLoop(
        sweep=sweep,
        held=held,
        ranks=ranks,
        dtype=plan.dtype,
        any_tier=given.precision == "auto",
        hashing=plan.hashing,
        report=report,
    ).run()
    return sweep


def _collect(setup: Setup, plan: _RunPlan, held: Held) -> AblationResult:
    """Join the blocks to the result, and keep it where they are kept."""
    identity = plan.identity
    if plan.shard:  # what `merge` compares, as it was when the run began
        identity = held.identity if isinstance(held, RunStore) else plan.known
    result = _result(setup, held.collect(), identity, plan.hashing)
    undefined = int(result.undefined.sum())
    if undefined:
        logger.warning(
            "%s predictions are none, since logits became NaN or infinite; they count as wrong "
            "(column undefined)",
            f"{undefined:,}",
        )
    if isinstance(held, RunStore):
        held.finish(result)
    return result


@functools.cache
def _warn_of_chance(remark: str | None) -> None:
    """Say it once, however often the same images are gone through."""
    if remark:
        logger.warning("%s", remark)


def _with_all_images(
    identity: Identity, setup: Setup, layout: Layout, dtype: torch.dtype, ranks: Ranks
) -> Identity:
    """Add what tells all images, where others than its own matter to a run."""
    everything = replace(layout, images=range(len(setup.data)))
    matter = setup.intervention.needs_statistics or setup.intervention.kind == "resample"
    if not matter and len(layout.images) == len(setup.data):
        return identity
    told = None if matter else glance(setup.data, dtype)
    if told is None:
        told = {"others": hash_all(setup.data, everything, dtype, ranks)}
    return {**identity, "data": {**identity["data"], **told}}


def _result(setup: Setup, found: Block, identity: Identity, hashing: bool) -> AblationResult:
    metadata = found.metadata
    hashed = {"hash": f"{metadata.hash:064x}"} if hashing else {}
    return AblationResult(
        units=_units(setup.jobs),
        labels=found.labels,
        baseline=found.baseline,
        flips=found.flips,
        class_names=setup.class_names,
        intervention=str(setup.intervention),
        audit=metadata.audit,
        strategy=metadata.strategy,
        measures=metadata.measures,
        provenance={**identity, "data": {**identity["data"], **hashed}},
        labelled=setup.data.labelled,
        screening=metadata.screening,
        estimate=metadata.estimate,
    )


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
