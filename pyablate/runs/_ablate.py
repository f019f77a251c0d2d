"""The main job: check and prepare, go through the blocks of images, gather the result."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from pyablate.engine.care import check_on_mismatch
from pyablate.engine.job import Job
from pyablate.engine.loss_margin import check_measures
from pyablate.interventions import Intervention, parse
from pyablate.result import AblationResult, load
from pyablate.runs.blocks import Block
from pyablate.runs.executor import BlockSweep
from pyablate.runs.fingerprint import Identity, glance, identify, own_dtype
from pyablate.runs.loop import Course, check_data, hash_all, kept, shard_images
from pyablate.runs.run_folder import Layout, RunStore, check_place, has_statistics, read_statistics
from pyablate.runs.setup import Setup, check_options, prepare
from pyablate.runtime.determinism import undisturbed
from pyablate.runtime.distributed import Ranks, own_device, taking_part
from pyablate.runtime.progress import Report, reporting

logger = logging.getLogger("pyablate")


def ablate(
    model: nn.Module,
    data: Any,
    layers: str | Sequence[str] | None = None,
    *,
    intervention: str | Intervention = "zero",
    groups: Sequence[Sequence[str]] | None = None,
    axis: Mapping[str, int] | None = None,
    class_names: Sequence[str] | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    memory: int | None = None,
    audit: int = 300,
    on_mismatch: str = "error",
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

    Calls from several threads of one process take turns.

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
    axis : dict, optional
        Axis of the units of some layers, by name, 0 being the batch, where you know better than
        :func:`pyablate.sites`, which follows it from the weights.
    class_names : sequence of str, optional
        One per class; by default the class numbers.
    device : str or torch.device, optional
        Where to work; by default where the model is.
    batch_size : int, optional
        Images per clean run. Changes speed and memory only.
    memory : int, optional
        Bytes to work in, roughly; by default a quarter of what is free.
    audit : int
        Random (unit, image) pairs to recompute by a plain float64 forward pass. A layer of which
        one differs is computed again more carefully, at last by such passes only, on all images;
        ``result.strategy`` and ``result.audit`` tell.
    on_mismatch : {"error", "warn"}
        What happens if pairs differ even then: :class:`pyablate.AuditError`, or a message and a
        result whose ``audit`` counts them.
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
    check_on_mismatch(on_mismatch)
    recorded = check_measures(measures)
    chosen = parse(intervention, seed=seed)
    place = None if output is None else Path(output)
    if place is not None:
        check_place(place, fresh=fresh)
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
            axis=axis,
            measures=recorded,
            measured=read_statistics(place) if place is not None and goes_on else None,
            ranks=ranks,
        )
        for remark in setup.remarks if ranks.first else ():
            logger.warning("%s", remark)
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
        known = _with_all_images(identity, setup, layout, dtype, ranks) if hashing else identity
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
            sweep = BlockSweep(setup, _audited_pairs(setup, audit, seed), recorded, on_mismatch)
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
                if shard:  # what `merge` compares, as it was when the run began
                    identity = held.identity if isinstance(held, RunStore) else known
                result = _result(setup, held.collect(), identity, hashing)
                if isinstance(held, RunStore):
                    held.finish(result)
            ranks.wait(lambda: None)
        if place is not None and not ranks.first:
            result = load(place)
    return replace(result, seconds=time.perf_counter() - begin, effort=sweep.effort())


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
    facts = found.facts
    hashed = {"hash": f"{facts.hash:064x}"} if hashing else {}
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
