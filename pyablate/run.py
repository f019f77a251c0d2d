"""The main job: capture, clean run, sweep of all units, rescue, audit, result."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import psutil
import torch
from torch import Tensor, nn

from pyablate.capture import CaptureError, Graph, capture
from pyablate.data import Batch, Data
from pyablate.engine import baseline
from pyablate.engine.ablations import Job, Key, Statistics, calibrate, stand_ins
from pyablate.engine.delta import Clean, Suffix, needed
from pyablate.engine.replay import Replay, decision, in_double
from pyablate.interventions import Intervention, parse
from pyablate.progress import Report, reporting
from pyablate.result import AblationResult, Audit, Flips
from pyablate.sites import Site, parse_label, select, sites

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
    progress: bool | Report | None = None,
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
    progress : bool or callable, optional
        None shows a bar on a terminal and logs elsewhere; a callable gets (done, total, layer).

    Returns
    -------
    AblationResult
        Predictions equal those of a float64 forward pass with the unit replaced, near ties
        (top-2 margin below 1e-5 of the largest logit) apart.

    Raises
    ------
    ValueError, TypeError
        Bad arguments, data or weights; the message names what, where and what was expected.
    """
    begin = time.perf_counter()
    _check_options(model, batch_size=batch_size, memory=memory, audit=audit, strategy=strategy)
    chosen = parse(intervention, seed=seed)
    with _random_state_kept():
        setup = _prepare(
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
        )
        sweep = _Sweep(setup, _audited_pairs(setup, audit, seed))
        with reporting(progress) as report:
            sweep.run(report)
    return sweep.result(time.perf_counter() - begin)


@dataclass(frozen=True, eq=False)
class _Setup:
    """Everything that is known before the first batch."""

    model: nn.Module
    graph: Graph | None
    jobs: list[Job]
    data: Data
    classes: int
    class_names: tuple[str, ...]
    intervention: Intervention
    statistics: Mapping[Key, Statistics]
    exact: Replay
    batch_size: int
    memory: int

    @property
    def rows(self) -> int:
        return sum(len(job.rows) for job in self.jobs)


@dataclass(eq=False)
class _Sweep:
    """The loop over batches and jobs, and what it has found so far."""

    setup: _Setup
    audited: np.ndarray  # int64 [A, 2]: row, image
    flips: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    baseline: list[np.ndarray] = field(default_factory=list)
    mismatches: int = 0
    checked: int = 0
    rescued: int = 0

    def run(self, report: Report) -> None:
        setup = self.setup
        suffixes = {job: Suffix.of(setup.graph, job) for job in setup.jobs} if setup.graph else {}
        keep = needed(suffixes.values())
        total = setup.rows * len(setup.data)
        done = 0
        report(0, total, setup.jobs[0].name)
        for batch in setup.data.batches(setup.batch_size):
            self._check_labels(batch)
            if setup.graph is None:
                clean = baseline.run_model(setup.model, setup.exact, batch)
            else:
                clean = baseline.run_graph(setup.graph, keep, setup.exact, batch)
            self.labels.append(batch.labels.cpu().numpy())
            self.baseline.append(clean.prediction.cpu().numpy())
            for job in setup.jobs:
                found = self._predictions(job, suffixes.get(job), batch, clean)
                for row, image, prediction in found:
                    self._record(job, batch, clean, row, image, prediction)
                self._audit(job, batch)
                done += len(job.rows) * len(batch)
                report(done, total, job.name)
        if self.mismatches:
            logger.error(
                "audit: %d of %d recomputed pairs differ; please report this model",
                self.mismatches,
                self.checked,
            )

    def _predictions(
        self, job: Job, suffix: Suffix | None, batch: Batch, clean: Clean
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        setup = self.setup
        if suffix is None:
            yield from _replayed(setup, job, batch)
            return
        standins = stand_ins(setup.model, setup.data, batch, job, setup.statistics)
        with torch.no_grad():
            yield from suffix.predict(clean, standins, slice_bytes=_slice_bytes(setup.memory))

    def _record(
        self,
        job: Job,
        batch: Batch,
        clean: Clean,
        row: Tensor,
        image: Tensor,
        prediction: Tensor,
    ) -> None:
        """Decide what is open, then keep the predictions that changed."""
        open_ = (prediction < 0).nonzero().squeeze(1)
        if len(open_):
            self.rescued += len(open_)
            exact = self.setup.exact.decide(batch, job, row[open_], image[open_])
            prediction = prediction.index_copy(0, open_, exact.prediction)
        changed = (prediction != clean.prediction[image]).nonzero().squeeze(1)
        self.flips.append(
            (
                (row[changed] + job.rows.start).cpu().numpy(),
                batch.index[image[changed]].cpu().numpy(),
                prediction[changed].cpu().numpy(),
            )
        )

    def _audit(self, job: Job, batch: Batch) -> None:
        """Recompute the audited pairs of this job and batch, and compare."""
        row, image = self.audited.T
        first, last = int(batch.index[0]), int(batch.index[-1])
        mine = (row >= job.rows.start) & (row < job.rows.stop) & (image >= first) & (image <= last)
        if not mine.any():
            return
        device = batch.index.device
        at_row = torch.from_numpy(row[mine] - job.rows.start).to(device)
        at_image = torch.from_numpy(image[mine] - first).to(device)
        exact = self.setup.exact.decide(batch, job, at_row, at_image)
        found = self._found(row[mine], image[mine])
        wrong = (exact.prediction.cpu().numpy() != found) & ~exact.near_tie.cpu().numpy()
        self.checked += len(found)
        self.mismatches += int(wrong.sum())

    def _found(self, row: np.ndarray, image: np.ndarray) -> np.ndarray:
        """Look up what was recorded for some pairs of the current batch."""
        first = sum(len(part) for part in self.baseline[:-1])
        found = self.baseline[-1][image - first].copy()
        wanted = {(r, i): k for k, (r, i) in enumerate(zip(row, image, strict=True))}
        for rows, images, predictions in self.flips:
            if len(rows) and images[0] >= first:
                hits = np.isin(rows, row) & np.isin(images, image)
                for r, i, p in zip(rows[hits], images[hits], predictions[hits], strict=True):
                    if (r, i) in wanted:
                        found[wanted[r, i]] = p
        return found

    def _check_labels(self, batch: Batch) -> None:
        beyond = batch.labels >= self.setup.classes
        if bool(beyond.any()):
            where = int(batch.index[beyond][0])
            raise ValueError(
                f"data: label {int(batch.labels[beyond][0])} of image {where} is outside the "
                f"model's {self.setup.classes} classes (0 to {self.setup.classes - 1})"
            )

    def result(self, seconds: float) -> AblationResult:
        setup = self.setup
        logger.info("%d of the pairs were too close for float32 and recomputed", self.rescued)
        return AblationResult(
            units=_units(setup.jobs),
            labels=np.concatenate(self.labels).astype(np.int64),
            baseline=np.concatenate(self.baseline).astype(np.int64),
            flips=Flips.gather(setup.rows, self.flips),
            class_names=setup.class_names,
            intervention=str(setup.intervention),
            audit=Audit(self.checked, self.mismatches),
            strategy={job.name: _strategy(setup.graph, job) for job in setup.jobs},
            seconds=seconds,
        )


def _prepare(
    model: nn.Module,
    source: Any,
    layers: str | Sequence[str] | None,
    groups: Sequence[Sequence[str]] | None,
    intervention: Intervention,
    class_names: Sequence[str] | None,
    device: str | torch.device | None,
    *,
    batch_size: int | None,
    memory: int | None,
    strategy: str,
) -> _Setup:
    work, dtype, where = _working_copy(model, device)
    data = Data(source, dtype=dtype, device=where)
    sample = data.sample(2)
    found = sites(work, sample)
    jobs = plan_jobs(found, layers, groups, intervention)
    classes = _count_classes(work, sample)
    names = _check_names(class_names, classes)
    marked = list({site.name: site for job in jobs for site in job.sites}.values())
    graph = None if strategy == "replay" else _capture(work, sample, marked)
    if intervention.needs_statistics:
        data.hold_if_read_once()
    if intervention.kind == "resample":
        data.hold()
    budget = memory or psutil.virtual_memory().available // 4
    size = batch_size or _images_per_batch(graph, jobs, sample, budget)
    statistics: Mapping[Key, Statistics] = {}
    if intervention.needs_statistics:
        statistics = calibrate(work, data, marked, classes, batch_size=size)
    double, precision = in_double(work, sample)
    return _Setup(
        model=work,
        graph=graph,
        jobs=jobs,
        data=data,
        classes=classes,
        class_names=names,
        intervention=intervention,
        statistics=statistics,
        exact=Replay(double, precision, data, statistics),
        batch_size=size,
        memory=budget,
    )


def plan_jobs(
    found: Sequence[Site],
    layers: str | Sequence[str] | None,
    groups: Sequence[Sequence[str]] | None,
    intervention: Intervention,
) -> list[Job]:
    """Turn layers and groups into jobs; rows are numbered in the order of the result.

    Raises
    ------
    ValueError, TypeError
        Unknown layers or units, an empty group, a group given twice.
    """
    jobs: list[Job] = []
    row = 0

    def add(at: Sequence[Site], members: Sequence[tuple[tuple[str, int], ...]]) -> None:
        nonlocal row
        jobs.append(Job(tuple(at), range(row, row + len(members)), tuple(members), intervention))
        row += len(members)

    if layers is not None or groups is None:
        for site, units in _units_by_site(found, layers, intervention):
            add([site], [((site.name, unit),) for unit in units])
    for at, members in _groups_by_sites(found, groups or [], intervention):
        add(at, members)
    if not jobs:
        raise ValueError("groups: expected at least one group of units, got none")
    return jobs


def _units_by_site(
    found: Sequence[Site], layers: str | Sequence[str] | None, intervention: Intervention
) -> Iterator[tuple[Site, list[int]]]:
    """Sites in execution order with their chosen units, ascending."""
    patterns = ["*"] if layers is None else [layers] if isinstance(layers, str) else list(layers)
    single = [p for p in patterns if isinstance(p, str) and p.rpartition(":")[2].isdecimal()]
    whole = [p for p in patterns if p not in single]
    chosen: dict[str, set[int]] = {}
    if whole or not patterns:
        for site in select(found, whole):
            chosen[site.name] = set(range(_count_units(site, intervention)))
    for label in single:
        site, unit = parse_label(found, label)
        chosen.setdefault(site.name, set()).add(unit)
    for site in found:
        if site.name in chosen:
            yield site, sorted(chosen[site.name])


def _count_units(site: Site, intervention: Intervention) -> int:
    if intervention.kind != "direction":
        return site.channels
    return intervention.matrix(site.name, site.channels).shape[1]


def _groups_by_sites(
    found: Sequence[Site], groups: Sequence[Sequence[str]], intervention: Intervention
) -> Iterator[tuple[list[Site], list[tuple[tuple[str, int], ...]]]]:
    """Runs of consecutive groups that act at the same sites: rows keep the caller's order."""
    if groups and intervention.kind == "direction":
        raise ValueError("groups: directions are ablated one at a time, not in groups")
    seen: dict[frozenset[tuple[str, int]], int] = {}
    run: tuple[list[Site], list[tuple[tuple[str, int], ...]]] = ([], [])
    for number, group in enumerate(groups):
        members, at = _group(found, group, number)
        if frozenset(members) in seen:
            first = seen[frozenset(members)]
            raise ValueError(f"groups: group {number} is the same as group {first}: {list(group)}")
        seen[frozenset(members)] = number
        if run[1] and at != run[0]:
            yield run
            run = ([], [])
        run = (at, [*run[1], members])
    if run[1]:
        yield run


def _group(
    found: Sequence[Site], group: Sequence[str], number: int
) -> tuple[tuple[tuple[str, int], ...], list[Site]]:
    if isinstance(group, str) or not isinstance(group, Sequence) or len(group) == 0:
        raise ValueError(
            f'groups: group {number}: expected a list of "layer:unit" labels, got {group!r}'
        )
    parsed = [parse_label(found, label) for label in group]
    members = tuple((site.name, unit) for site, unit in parsed)
    if len(set(members)) < len(members):
        raise ValueError(f"groups: group {number} names a unit twice: {list(group)}")
    names = {site.name for site, _ in parsed}
    return members, [site for site in found if site.name in names]


def _working_copy(
    model: nn.Module, device: str | torch.device | None
) -> tuple[nn.Module, torch.dtype, torch.device]:
    """Copy the model to work on, so that nothing can happen to the caller's."""
    first = next(model.parameters(), None)
    if first is None:
        first = next(model.buffers(), torch.zeros(0))
    where = _device(device) if device is not None else first.device
    dtype = first.dtype if first.dtype in (torch.float32, torch.float64) else torch.float32
    work = copy.deepcopy(model).to(device=where, dtype=dtype).eval()
    for name, tensor in [*work.named_parameters(), *work.named_buffers()]:
        tensor.requires_grad_(False)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = (~torch.isfinite(tensor)).nonzero()[0].tolist()
            raise ValueError(f"model: {name} holds NaN or infinite values, the first at {bad}")
    for name, module in work.named_modules():
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if batch_norm and module.running_mean is None:
            raise ValueError(
                f"model: {name} normalises by the statistics of each batch, so a prediction "
                "depends on the other images; give it running statistics"
            )
    return work, dtype, where


def _device(device: str | torch.device) -> torch.device:
    try:
        where = torch.device(device)
        torch.zeros(1, device=where)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: {device!r} cannot be used here: {reason}") from None
    return where


def _count_classes(model: nn.Module, sample: Tensor) -> int:
    with torch.no_grad():
        logits = model(sample)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(sample):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"model: expected logits [N, classes], got {got}")
    if logits.shape[1] < 2:
        raise ValueError(f"model: expected logits of at least 2 classes, got {logits.shape[1]}")
    return logits.shape[1]


def _check_names(class_names: Sequence[str] | None, classes: int) -> tuple[str, ...]:
    if class_names is None:
        return tuple(str(number) for number in range(classes))
    if isinstance(class_names, str) or len(class_names) != classes:
        raise ValueError(f"class_names: expected {classes} names, got {len(class_names)}")
    return tuple(str(name) for name in class_names)


def _check_options(
    model: Any, *, batch_size: int | None, memory: int | None, audit: int, strategy: str
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    for name, value in (("batch_size", batch_size), ("memory", memory)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    if not isinstance(audit, int) or audit < 0:
        raise ValueError(f"audit: expected a number of pairs, 0 or more, got {audit!r}")
    if strategy not in ("auto", "replay"):
        raise ValueError(f'strategy: expected "auto" or "replay", got {strategy!r}')


def _capture(model: nn.Module, sample: Tensor, marked: Sequence[Site]) -> Graph | None:
    try:
        return capture(model, sample, marked)
    except CaptureError as error:
        logger.warning(
            "the network cannot be captured (%s): every pair runs by replay of the whole "
            "network, exact but slow",
            error,
        )
        return None


def _strategy(graph: Graph | None, job: Job) -> str:
    if graph is None:
        return "replay"
    return "closed form" if Suffix.of(graph, job).closed_form else "delta"


def _images_per_batch(
    graph: Graph | None, jobs: Sequence[Job], sample: Tensor, memory: int
) -> int:
    """As many images as let the clean tensors fit into half the memory; 256 is plenty."""
    if graph is None:
        return 64
    kept = needed(Suffix.of(graph, job) for job in jobs)
    per_image = sum(graph.elements(node) for node in kept) * sample.element_size()
    return int(min(256, max(1, memory // 2 // max(per_image, 1))))


def _slice_bytes(memory: int) -> int:
    """Bytes of the widest delta of one slice of pairs; a few such tensors live at a time."""
    return min(8 << 20, max(1, memory // 16))


def _replayed(
    setup: _Setup, job: Job, batch: Batch
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Every pair of a job by plain replay; close calls are left open."""
    device = batch.index.device
    own = Replay(setup.model, batch.images.dtype, setup.data, setup.statistics)
    image = torch.arange(len(batch), device=device).repeat_interleave(len(job.members))
    row = torch.arange(len(job.members), device=device).repeat(len(batch))
    size = max(1, min(256, setup.memory // 4 // max(1, batch.images[0].numel() * 1024)))
    for rows, images in zip(row.split(size), image.split(size), strict=True):
        logits = own.logits(batch, job, rows, images)
        top = logits.topk(2, dim=1)
        close = top.values[:, 0] - top.values[:, 1] <= baseline.MARGIN * logits.abs().amax(dim=1)
        prediction = decision(logits).prediction
        yield rows, images, torch.where(close, torch.full_like(prediction, -1), prediction)


def _audited_pairs(setup: _Setup, audit: int, seed: int) -> np.ndarray:
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
            "unit": [members[0][1] if len(members) == 1 else -1 for members in rows],
        }
    )


@contextmanager
def _random_state_kept() -> Iterator[None]:
    with torch.random.fork_rng():
        yield
