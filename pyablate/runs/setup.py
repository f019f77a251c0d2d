"""Before the first batch: arguments checked, units numbered, the network copied and captured."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, fx, nn

from pyablate._validation import check_choice, check_count
from pyablate.data.dataset import Data
from pyablate.engine import int8_conv, pointwise
from pyablate.engine.discontinuous import behind_images, jumps, observed_jump, steep
from pyablate.engine.float64 import Exact, exact
from pyablate.engine.job import Job
from pyablate.engine.microbenchmarks import convolution_rate
from pyablate.engine.replacements import Key, Statistics
from pyablate.engine.replay import Replay, in_double
from pyablate.engine.suffix import Suffix, needed
from pyablate.interventions import Intervention
from pyablate.network import capture_memory
from pyablate.network.capture import CaptureError, capture
from pyablate.network.classifier import Choice, check_choice_of_logits
from pyablate.network.forward import Cost, cost_of, forward, images_at_a_time, two_images
from pyablate.network.graph import MARKER, Graph, tensor
from pyablate.network.model_checks import alike, open_up
from pyablate.network.sites import Site, asks_for_everything, check_model
from pyablate.results.screening import GUARANTEES
from pyablate.runs.job_list import plan_jobs
from pyablate.runs.state import unpack_statistics
from pyablate.runs.unit_statistics import measure_units
from pyablate.runtime.allocator import keep_freed_blocks
from pyablate.runtime.chunking import DEVICE_SLICE, GRADIENTS, LARGEST, REPLAYED, SLICE
from pyablate.runtime.distributed import Ranks
from pyablate.runtime.progress import stage

logger = logging.getLogger("pyablate")

STRATEGIES = ("auto", "replay")
PRECISIONS = ("auto", "int8", "bf16", "fp16", "fp32", "fp64")

SAME = 1e-3
"""Share of the largest logit by which a captured network may differ from the model: rounding."""

CLEAN = 32 << 20
"""Bytes of the widest clean tensor up to which a batch may have more than 256 images."""

FEW, LARGE = 500, 2e8
"""Pairs up to which, and operations of a forward pass from which, a capture may not pay."""

CAPTURE = 0.04
"""Seconds that each operator of a network costs before its first pair is decided by differences:
its capture, and what is checked and measured of it. EfficientNet-Lite0 at 224 px, 2 units on 32
images: 17 s of one core by replay, 26 by differences; level at some 250 pairs, by count at 220."""

RATE = 2e10
"""Operations per second of a forward pass."""

WORTHWHILE = 1.3
"""Gain in speed above which a lower precision pays for checking it."""


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
    abrupt: bool
    """Whether the network jumps anywhere, or rises as steeply as if it did."""
    precision: str
    """As the caller asked for."""
    low: tuple[torch.dtype, ...]
    batch_size: int
    memory: int
    at_a_time: int
    """Images of one pass through the model: see :func:`images_at_a_time`."""
    axes: Mapping[str, int]
    """Axes of units that the caller gave, by layer."""
    remarks: tuple[str, ...]
    """What should be known of the layers chosen."""

    @cached_property
    def own(self) -> Replay:
        """The model itself in the precision of the clean run."""
        return Replay(self.model, self.data.dtype, self.data, self.statistics, self.at_a_time)

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
class SetupOptions:
    """What is ablated, and by what means; see :func:`pyablate.ablate`."""

    layers: str | Sequence[str] | None
    groups: Sequence[Sequence[str]] | None
    intervention: Intervention
    class_names: Sequence[str] | None = None
    device: str | torch.device | None = None
    batch_size: int | None = None
    memory: int | None = None
    strategy: str = "auto"
    precision: str = "auto"
    measures: tuple[str, ...] = ()
    guarantee: str = "exact"
    axis: Mapping[str, int] | None = None
    logits: Choice = None
    images: int | None = None
    """How many are to be done, where the data are only the first of them."""


@torch.inference_mode(False)  # in which nothing can be exported
def prepare(
    model: nn.Module,
    source: Any,
    options: SetupOptions,
    *,
    measured: Mapping[str, np.ndarray] | None = None,
    ranks: Ranks | None = None,
) -> Setup:
    """Check everything that can be checked and get ready.

    ``measured`` are statistics that an earlier process packed, taken instead of measuring them;
    ``ranks`` the processes that measure them together.
    """
    intervention, precision = options.intervention, options.precision
    double = precision == "fp64"
    stage("checking the model and the data")
    ready = open_up(
        model,
        source,
        options.class_names,
        options.device,
        double=double,
        axis=options.axis,
        unlabelled=True,
        logits=options.logits,
    )
    _check_labels(ready.data, intervention)
    work, data, sample = ready.model, ready.data, ready.batch.images
    jobs = plan_jobs(ready.sites, options.layers, options.groups, intervention)
    everything = asks_for_everything(options.layers, options.groups)
    marked = list({site.name: site for job in jobs for site in job.sites}.values())
    pair = two_images(sample)
    cost = cost_of(work, pair)
    pairs = sum(len(job.rows) for job in jobs) * (options.images or len(data))
    by_replay = options.strategy == "replay" or (
        options.guarantee == "exact" and _replay_is_quicker(cost, pairs)
    )
    how = frozenset(marked), sample.shape[1:], sample.dtype, sample.device, options.logits
    graph = None if by_replay else _known(model, work, sample, marked, how)
    _hold(data, intervention)
    memory = options.memory or _free(data.device) // 4
    keep_freed_blocks(memory)
    exact_model, decisive = in_double(work, pair)
    at_a_time = images_at_a_time(cost, pair.to(decisive))
    extra = GRADIENTS if options.guarantee != "exact" else 0
    size = int(options.batch_size or _images_per_batch(graph, jobs, sample, memory, extra))
    statistics: dict[Key, Statistics] = {}  # read by replay, once they are there
    replay = Replay(exact_model, decisive, data, statistics, min(REPLAYED, at_a_time))
    decided = exact(graph, replay, ready.batch)
    if graph is not None and isinstance(decided, Exact) and not options.measures:
        graph, decided.graph = graph.before_softmax(), decided.graph.before_softmax()
    stage("looking for jumps")
    abrupt = _is_abrupt(work, graph, jobs, decided, sample)
    if intervention.needs_statistics and measured:
        statistics.update(unpack_statistics(measured, data.device))
    elif intervention.needs_statistics:
        # In front of a site, too, low precision may fall on another side of a jump.
        stage("means of the units")
        judge, dtype = (exact_model, decisive) if abrupt else (work, data.dtype)
        statistics.update(
            measure_units(
                judge,
                data,
                marked,
                ready.classes,
                batch_size=min(size, at_a_time),
                dtype=dtype,
                ranks=ranks or Ranks(),
            )
        )
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
        abrupt=abrupt,
        precision=precision,
        low=_low_precisions(precision, data.dtype, data.device),
        batch_size=size,
        memory=memory,
        at_a_time=at_a_time,
        axes=ready.survey.given,
        remarks=tuple(ready.survey.remarks(marked, everything=everything)),
    )


def _check_labels(data: Data, intervention: Intervention) -> None:
    """Say what stands in for missing labels, and refuse what needs them beforehand.

    Raises
    ------
    ValueError
        The intervention does.
    """
    if data.labelled:
        return
    if intervention.kind == "class_mean":
        raise ValueError("intervention: class_mean needs labels, these data have none")
    logger.info(
        "data: no labels: the intact network's predictions stand in, so accuracy is "
        "agreement with them"
    )


def _hold(data: Data, intervention: Intervention) -> None:
    """Keep images that are read more than once."""
    if intervention.needs_statistics:
        data.hold_if_read_once()
    if intervention.kind == "resample":
        data.hold()


def _is_abrupt(
    model: nn.Module,
    graph: Graph | None,
    jobs: Sequence[Job],
    decided: Exact | Replay,
    sample: Tensor,
) -> bool:
    """Find what jumps or is as good as a step; behind it values are computed, not differences.

    In front of it differences are right, but not those from a clean run in low precision, which may
    have fallen on another side of the jump.
    """
    if graph is None:
        jump = observed_jump(model, two_images(sample))
        if jump is not None:
            logger.info("all pairs are decided in float64, since %s jumps", jump)
        return jump is not None
    abrupt = {*steep(graph, sample), *jumps(behind_images(graph))}
    if abrupt:
        names = ", ".join(sorted({str(node.target) for node in abrupt}))
        logger.info("all pairs are decided in float64, since %s jumps or is steep", names)
    if isinstance(decided, Exact):
        decided.recomputed.update(
            job for job in jobs if not abrupt.isdisjoint(Suffix.of(graph, job).nodes)
        )
    return bool(abrupt)


def check_options(model: Any, options: SetupOptions) -> None:
    """Check the arguments that need nothing else to be known."""
    check_model(model)
    check_choice_of_logits(options.logits)
    for name, value in (("batch_size", options.batch_size), ("memory", options.memory)):
        if value is not None:
            check_count(name, value)
    check_choice("strategy", options.strategy, STRATEGIES)
    check_choice("precision", options.precision, PRECISIONS)
    check_choice("guarantee", options.guarantee, GUARANTEES)
    if options.guarantee != "exact" and options.measures:
        raise ValueError(
            f"measures: {', '.join(options.measures)} need the logits of every pair; expected "
            f'guarantee="exact", got {options.guarantee!r}'
        )


def _low_precisions(
    precision: str, full: torch.dtype, device: torch.device
) -> tuple[torch.dtype, ...]:
    """Cheaper arithmetic for the dense suffix, cheapest first.

    GPUs multiply float16 as fast as bfloat16, and it has three more bits; processors do not.
    """
    if precision in ("fp32", "fp64") or full != torch.float32:
        return ()
    if precision == "int8" and (device.type != "cpu" or not int8_conv.available()):
        raise ValueError(
            'precision: expected a processor with 8-bit arithmetic (VNNI) for "int8", this device '
            f'({device}) has none that is exact; "auto" takes the best there is'
        )
    on_gpu = device.type == "cuda"
    if precision == "fp16" and not on_gpu:
        raise ValueError(
            f'precision: expected a GPU for "fp16", not this device ({device}); "auto" takes the '
            "best there is"
        )
    asked = {"int8": torch.int8, "bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    found: list[torch.dtype] = []
    stage("measuring this machine")
    rate = convolution_rate(str(device), full, alone=True)
    half = torch.float16 if on_gpu and precision != "bf16" else torch.bfloat16
    for dtype in (half, torch.int8):
        own = convolution_rate(str(device), dtype, alone=True)
        worthwhile = own > WORTHWHILE * rate and precision != "bf16"
        if dtype == asked or worthwhile:
            found.insert(0, dtype)
            rate = own
    if half in found:
        # Now: nothing can be timed while a slice is recorded.
        pointwise.worthwhile(device)
    return tuple(found)


def _free(device: torch.device) -> int:
    """Bytes of memory that nobody uses where the work is done."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held  # PyTorch holds it and does not use it
    return int(psutil.virtual_memory().available)


def _replay_is_quicker(cost: Cost, pairs: int) -> bool:
    """Whether a large network is done with a few pairs before it would be captured.

    Counted at rates that are written down here, not timed: a run that is resumed has to go on by
    the same strategy. ``cost`` is of two images.
    """
    operations = cost.total / 2
    worthwhile = pairs * operations / RATE >= cost.calls * CAPTURE
    quicker = pairs <= FEW and operations >= LARGE and not worthwhile
    if quicker:
        logger.info(
            "%d pairs run by replay of the whole network: its capture would take longer", pairs
        )
    return quicker


def _known(
    model: nn.Module, copy: nn.Module, sample: Tensor, marked: Sequence[Site], how: Hashable
) -> Graph | None:
    """Return the graph that is kept of a model, or capture its copy."""
    graph = capture_memory.find(model, how)
    if graph is None and (graph := _capture(copy, sample, marked)) is not None:
        capture_memory.keep(model, how, graph)
    return graph


def _capture(model: nn.Module, sample: Tensor, marked: Sequence[Site]) -> Graph | None:
    stage("capturing the network")
    try:
        graph = capture(model, sample, marked)
        if graph.half:
            # It rounds there itself, and differences do not: they would decide otherwise.
            raise CaptureError("parts of it compute in half precision")
        with torch.no_grad():
            found = graph.run(sample, [graph.logits])[graph.logits]
            expected = forward(model, sample)
        if not alike(tensor(found), expected, SAME):
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


def _images_per_batch(
    graph: Graph | None, jobs: Sequence[Job], sample: Tensor, memory: int, extra: int
) -> int:
    """As many images as let the clean tensors fit into half the memory; a few hundred are plenty.

    ``extra`` bytes of each image stand beside these.

    Small networks take more at a time: what a batch costs by itself would show.
    """
    if graph is None:
        return 64
    per_image = image_bytes(graph, jobs, sample) + extra
    widest = graph.widest * sample.element_size()
    enough = min(max(256, CLEAN // max(widest, 1)), max(1, LARGEST // max(widest, 1)))
    return int(max(1, min(enough, memory // 2 // max(per_image, 1))))


def image_bytes(graph: Graph, jobs: Sequence[Job], sample: Tensor) -> int:
    """Bytes that are held of one image while its batch is worked on."""
    kept = {_owner(node) for node in needed(Suffix.of(graph, job) for job in jobs)}
    # Beside the clean tensors stand the changes of one layer's units, while on their channels: as
    # differences, in the precision of the dense part, and on the way from one to the other.
    units = max((graph.elements(marker) for marker in graph.markers), default=0)
    numbers = sum(graph.elements(node) for node in kept) + 3 * units
    return int(numbers * sample.element_size())


def _owner(node: fx.Node) -> fx.Node:
    """Find the node whose tensor another one is: marked outputs are no copies."""
    while node.target is MARKER:
        node = node.all_input_nodes[0]
    return node
