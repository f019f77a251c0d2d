"""Before the first batch: arguments checked, units numbered, the network copied and captured."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, fx, nn

from pyablate import near_tie
from pyablate.batches import Batch, Data
from pyablate.capture import CaptureError, capture
from pyablate.checkpoint import unpack_statistics
from pyablate.engine import eight_bit
from pyablate.engine.ablations import Job, Key, Statistics, calibrate
from pyablate.engine.delta import Suffix, needed
from pyablate.engine.discontinuous import jumps, observed_jump, steep
from pyablate.engine.exact import Exact, exact
from pyablate.engine.replay import ROWS, Replay, forward, in_double
from pyablate.graph import Graph
from pyablate.heap import keep_freed_blocks
from pyablate.interventions import Intervention
from pyablate.layers import Site, check_model, copied, parse_label, select, sites
from pyablate.peaks import convolution_rate
from pyablate.portions import LARGEST, images_at_a_time
from pyablate.ranks import Ranks
from pyablate.turns import a_run

logger = logging.getLogger("pyablate")

PRECISIONS = ("auto", "int8", "bf16", "fp32", "fp64")

SAMPLE = 8
"""Images that are looked at before the first batch."""

SLICE = 8 << 20
"""Bytes of the widest delta that are worked on at a time: what stays in a processor's caches."""

DEVICE_SLICE = 256 << 20
"""The same on a GPU: one pass over it takes some 0.1 ms at 2 to 3 TB/s, as long as launching tens
of operations. By arithmetic, not measured."""

SAME = 1e-3
"""Share of the largest logit by which a captured network may differ from the model: rounding."""

CLEAN = 32 << 20
"""Bytes of the widest clean tensor up to which a batch may have more than 256 images."""

WORTHWHILE = 1.3
"""Gain in speed above which a lower precision pays for checking it."""


@contextmanager
def undisturbed() -> Iterator[None]:
    """Work in plain arithmetic, and leave random generators and settings as they were.

    An ambient autocast or TF32 would round the clean run and all that is compared with it. All of
    this is the whole process's: other threads wait for their turn.
    """
    with a_run(), _plain_arithmetic():
        yield


@contextmanager
def _plain_arithmetic() -> Iterator[None]:
    matmul = torch.get_float32_matmul_precision()
    tf32 = torch.backends.cudnn.allow_tf32
    cuda = torch.autocast("cuda", enabled=False) if torch.cuda.is_available() else nullcontext()
    with torch.random.fork_rng(), torch.autocast("cpu", enabled=False), cuda:
        try:
            torch.set_float32_matmul_precision("highest")
            torch.backends.cudnn.allow_tf32 = False
            yield
        finally:
            torch.set_float32_matmul_precision(matmul)
            torch.backends.cudnn.allow_tf32 = tf32


@dataclass(frozen=True, eq=False)
class Setup:
    """Everything that is known before the first batch."""

    model: nn.Module
    graph: Graph | None
    jobs: list[Job]
    data: Data
    classes: int
    class_names: tuple[str, ...]
    intervention: Intervention
    statistics: Mapping[Key, Statistics]
    exact: Exact | Replay
    replay: Replay
    doubtful: Doubtful
    low: tuple[torch.dtype, ...]
    batch_size: int
    memory: int
    at_a_time: int
    """Images of one pass through the model: see :func:`pyablate.portions.images_at_a_time`."""

    @property
    def slice_bytes(self) -> int:
        """Bytes of the widest delta of one slice of pairs; a few such tensors live at a time."""
        most = SLICE if self.data.device.type == "cpu" else DEVICE_SLICE
        return min(most, max(1, self.memory // 16))

    @property
    def rows(self) -> int:
        """Number of ablations."""
        return sum(len(job.rows) for job in self.jobs)


@dataclass(frozen=True)
class Doubtful:
    """What no precision below float64 may decide, since errors on a sample say nothing about it.

    Attributes
    ----------
    jobs : frozenset of Job
        Behind their sites the network jumps, or rises as steeply as if it did.
    clean : bool
        The intact network does so anywhere.
    """

    jobs: frozenset[Job] = frozenset()
    clean: bool = False


@dataclass(frozen=True, eq=False)
class Ready:
    """A model and data that fit each other.

    Attributes
    ----------
    model : nn.Module
        A copy in evaluation mode, in float32 or float64, without gradients of weights.
    data : Data
        On the model's device and in its dtype; labels beyond its classes are errors.
    batch : Batch
        The first images.
    sites : list of Site
        All of them.
    classes : int
        Number of logits.
    class_names : tuple of str
        One per class.
    """

    model: nn.Module
    data: Data
    batch: Batch
    sites: list[Site]
    classes: int
    class_names: tuple[str, ...]


def open_up(
    model: nn.Module,
    source: Any,
    class_names: Sequence[str] | None,
    device: str | torch.device | None,
    *,
    double: bool = False,
) -> Ready:
    """Copy the model, look at the first images and check that the two fit.

    Raises
    ------
    ValueError, TypeError
        The model or the data cannot be used; the message says why.
    """
    work, dtype, where = _working_copy(model, device, double=double)
    data = Data(source, dtype=dtype, device=where)
    batch = data.first(SAMPLE)
    sample = batch.images
    try:
        found = sites(work, sample)
    except RuntimeError as error:
        raise ValueError(
            f"data: the model fails on images of shape {list(sample.shape[1:])}: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    classes = data.classes = _count_classes(work, sample)
    _check_independence(work, sample)
    return Ready(work, data, batch, found, classes, _check_names(class_names, classes))


@torch.inference_mode(False)  # in which nothing can be exported
def prepare(
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
    precision: str,
    measures: Sequence[str] = (),
    measured: Mapping[str, np.ndarray] | None = None,
    ranks: Ranks | None = None,
) -> Setup:
    """Check everything that can be checked and get ready; see :func:`pyablate.ablate`.

    ``measured`` are statistics that an earlier process packed, taken instead of measuring them;
    ``ranks`` the processes that measure them together.
    """
    ready = open_up(model, source, class_names, device, double=precision == "fp64")
    work, data, sample = ready.model, ready.data, ready.batch.images
    jobs = plan_jobs(ready.sites, layers, groups, intervention)
    marked = list({site.name: site for job in jobs for site in job.sites}.values())
    graph = None if strategy == "replay" else _capture(work, sample, marked)
    if intervention.needs_statistics:
        data.hold_if_read_once()
    if intervention.kind == "resample":
        data.hold()
    budget = memory or _free(data.device) // 4
    keep_freed_blocks(budget)
    pair = _two(sample)
    double, decisive = in_double(work, pair)
    at_a_time = images_at_a_time(double, pair.to(decisive))
    size = batch_size or _images_per_batch(graph, jobs, sample, budget)
    statistics: Mapping[Key, Statistics] = {}
    if intervention.needs_statistics and measured:
        statistics = unpack_statistics(measured, data.device)
    elif intervention.needs_statistics:
        statistics = calibrate(
            work,
            data,
            marked,
            ready.classes,
            batch_size=min(size, at_a_time),
            ranks=ranks or Ranks(),
        )
    replay = Replay(double, decisive, data, statistics, min(ROWS, at_a_time))
    decided = exact(graph, replay, ready.batch)
    if graph is not None and isinstance(decided, Exact) and not measures:
        graph, decided.graph = graph.before_softmax(), decided.graph.before_softmax()
    return Setup(
        model=work,
        graph=graph,
        jobs=jobs,
        data=data,
        classes=ready.classes,
        class_names=ready.class_names,
        intervention=intervention,
        statistics=statistics,
        exact=decided,
        replay=replay,
        doubtful=_find_doubtful(work, graph, jobs, decided, sample),
        low=_low_precisions(precision, data.dtype, data.device),
        batch_size=size,
        memory=budget,
        at_a_time=at_a_time,
    )


def _find_doubtful(
    model: nn.Module,
    graph: Graph | None,
    jobs: Sequence[Job],
    decided: Exact | Replay,
    sample: Tensor,
) -> Doubtful:
    """Find what only float64 may decide, and what of that has no differences."""
    if graph is None:
        jump = observed_jump(model, _two(sample))
        if jump is not None:
            logger.info("replay decides in float64, since %s jumps", jump)
        return Doubtful(frozenset(jobs if jump else ()), clean=jump is not None)
    abrupt = set(steep(graph, sample))
    found: dict[Job, fx.Node] = {}
    for job in jobs:
        nodes = Suffix.of(graph, job).nodes
        for node in [*jumps(nodes), *(node for node in nodes if node in abrupt)][:1]:
            found[job] = node
    if isinstance(decided, Exact):
        decided.recomputed.update(found)
    for job, node in found.items():
        logger.info("%s: decided in float64, since %s jumps or is steep", job.name, node.target)
    return Doubtful(frozenset(found), clean=bool(abrupt or jumps(graph.after([graph.images]))))


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

    def add(
        at: Sequence[Site], members: Sequence[tuple[tuple[str, int], ...]], *, grouped: bool
    ) -> None:
        nonlocal row
        rows = range(row, row + len(members))
        jobs.append(Job(tuple(at), rows, tuple(members), intervention, grouped))
        row += len(members)

    if layers is not None or groups is None:
        for site, units in _units_by_site(found, layers, intervention):
            add([site], [((site.name, unit),) for unit in units], grouped=False)
    for at, members in _groups_by_sites(found, [] if groups is None else groups, intervention):
        add(at, members, grouped=True)
    if not jobs:
        raise ValueError("groups: expected at least one group of units, got none")
    return jobs


def _units_by_site(
    found: Sequence[Site], layers: str | Sequence[str] | None, intervention: Intervention
) -> Iterator[tuple[Site, list[int]]]:
    """Sites in execution order with their chosen units, ascending."""
    patterns = ["*"] if layers is None else [layers] if isinstance(layers, str) else list(layers)
    single = [p for p in patterns if isinstance(p, str) and ":" in p]
    whole = [p for p in patterns if p not in single]
    chosen: dict[str, set[int]] = {}
    if whole or not patterns:
        for site in select(found, whole):
            chosen[site.name] = set(range(_count_units(site, intervention)))
    for label in single:
        site, unit = parse_label(found, label, lambda at: _count_units(at, intervention))
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
    """Yield runs of consecutive groups that act at the same sites: rows keep the caller's order."""
    if isinstance(groups, str) or not isinstance(groups, Sequence):
        raise TypeError(f"groups: expected lists of unit labels, got {type(groups).__name__}")
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
        if at != run[0]:
            if run[1]:
                yield run
            run = (at, [])
        run[1].append(members)
    if run[1]:
        yield run


def _group(
    found: Sequence[Site], group: Sequence[str], number: int
) -> tuple[tuple[tuple[str, int], ...], list[Site]]:
    if isinstance(group, str) or not isinstance(group, Sequence):
        raise TypeError(
            f'groups: group {number}: expected a list of "layer:unit" labels, got {group!r}'
        )
    if len(group) == 0:
        raise ValueError(f"groups: group {number} is empty")
    parsed = [parse_label(found, label) for label in group]
    members = tuple((site.name, unit) for site, unit in parsed)
    if len(set(members)) < len(members):
        raise ValueError(f"groups: group {number} names a unit twice: {list(group)}")
    names = {site.name for site, _ in parsed}
    return members, [site for site in found if site.name in names]


def _working_copy(
    model: nn.Module, device: str | torch.device | None, *, double: bool
) -> tuple[nn.Module, torch.dtype, torch.device]:
    """Copy the model to work on, so that nothing can happen to the caller's."""
    first = next(iter([*model.parameters(), *model.buffers(), torch.zeros(0)]))
    where = _device(device) if device is not None else first.device
    dtype = torch.float64 if double or first.dtype == torch.float64 else torch.float32
    work = copied(model).to(where)
    work = (work.double() if dtype == torch.float64 else work.float()).eval()  # not the complex
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


def _two(sample: Tensor) -> Tensor:
    """Two images even where there is one: some networks squeeze a batch of one away."""
    return torch.stack([sample[0], sample[-1]])


def _count_classes(model: nn.Module, sample: Tensor) -> int:
    sample = _two(sample)
    with torch.no_grad():
        logits = model(sample)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(sample):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"model: expected logits [N, classes], got {got}")
    if logits.shape[1] < 2:
        raise ValueError(f"model: expected logits of at least 2 classes, got {logits.shape[1]}")
    return logits.shape[1]


def _check_independence(model: nn.Module, sample: Tensor) -> None:
    """Refuse a network that lets one image's prediction depend on the others."""
    first, second = sample[0], sample[-1]
    with torch.no_grad():
        alone = model(torch.stack([first, second]))[0]
        other = model(torch.stack([first, 1.5 * second + 1.0]))[0]
    if not _alike(other, alone, 2e-3):
        raise ValueError(
            "model: the logits of an image change with the other images of its batch; each image "
            "must be classified by itself"
        )


def _alike(found: Tensor, expected: Tensor, share: float) -> bool:
    """Whether logits agree but for a share of the largest; NaN do, the clean run names them."""
    return near_tie.disagreement(found, expected) <= share


def _check_names(class_names: Sequence[str] | None, classes: int) -> tuple[str, ...]:
    if class_names is None:
        return tuple(str(number) for number in range(classes))
    if isinstance(class_names, str):
        raise TypeError(f"class_names: expected a sequence of strings, got {class_names!r}")
    if len(class_names) != classes:
        raise ValueError(f"class_names: expected {classes} names, got {len(class_names)}")
    names = tuple(str(name) for name in class_names)
    # Not an error: two of ImageNet's classes are called crane.
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        logger.warning("class_names: %s stand for more than one class", ", ".join(twice[:5]))
    return names


def check_options(
    model: Any,
    *,
    batch_size: int | None,
    memory: int | None,
    audit: int,
    strategy: str,
    precision: str,
) -> None:
    """Check the arguments that need nothing else to be known."""
    check_model(model)
    for name, value in (("batch_size", batch_size), ("memory", memory)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    if not isinstance(audit, int) or audit < 0:
        raise ValueError(f"audit: expected a number of pairs, 0 or more, got {audit!r}")
    if strategy not in ("auto", "replay"):
        raise ValueError(f'strategy: expected "auto" or "replay", got {strategy!r}')
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")


def _low_precisions(
    precision: str, full: torch.dtype, device: torch.device
) -> tuple[torch.dtype, ...]:
    """Cheaper arithmetic for the dense suffix, cheapest first."""
    if precision in ("fp32", "fp64") or full != torch.float32:
        return ()
    if precision == "int8" and (device.type != "cpu" or not eight_bit.available()):
        raise ValueError(
            'precision: expected a processor with 8-bit arithmetic (VNNI) for "int8", this device '
            f'({device}) has none that is exact; "auto" takes the best there is'
        )
    asked = {"int8": torch.int8, "bf16": torch.bfloat16}.get(precision)
    found: list[torch.dtype] = []
    rate = convolution_rate(str(device), full, alone=True)
    for dtype in (torch.bfloat16, torch.int8):
        own = convolution_rate(str(device), dtype, alone=True)
        worthwhile = own > WORTHWHILE * rate and precision != "bf16"
        if dtype == asked or worthwhile:
            found.insert(0, dtype)
            rate = own
    return tuple(found)


def _free(device: torch.device) -> int:
    """Bytes of memory that nobody uses where the work is done."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def _capture(model: nn.Module, sample: Tensor, marked: Sequence[Site]) -> Graph | None:
    try:
        graph = capture(model, sample, marked)
        if graph.half:
            # It rounds there itself, and differences do not: they would decide otherwise.
            raise CaptureError("parts of it compute in half precision")
        with torch.no_grad():
            found = graph.run(sample, [graph.logits])[graph.logits]
            expected = forward(model, sample)
        if not _alike(found, expected, SAME):
            # Marked outputs are tensors of their own; in a network they may be one and the same.
            raise CaptureError("it works in place on a tensor that is read elsewhere too")
        return graph
    except CaptureError as error:
        logger.warning(
            "the network cannot be captured (%s): every pair runs by replay of the whole "
            "network, exact but slow",
            error,
        )
        return None


def _images_per_batch(graph: Graph | None, jobs: Sequence[Job], sample: Tensor, memory: int) -> int:
    """As many images as let the clean tensors fit into half the memory; a few hundred are plenty.

    Small networks take more at a time: what a batch costs by itself would show.
    """
    if graph is None:
        return 64
    kept = needed(Suffix.of(graph, job) for job in jobs)
    size = sample.element_size()
    # Beside the clean tensors stand the changes of one layer's units, while on their channels: as
    # differences, in the precision of the dense part, and on the way from one to the other.
    units = max((graph.elements(marker) for marker in graph.markers), default=0)
    per_image = (sum(graph.elements(node) for node in kept) + 3 * units) * size
    widest = graph.widest * size
    enough = min(max(256, CLEAN // max(widest, 1)), max(1, LARGEST // max(widest, 1)))
    return int(max(1, min(enough, memory // 2 // max(per_image, 1))))
