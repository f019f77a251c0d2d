"""What the layers of a run cost: operations and bytes of their pairs, and this machine's rates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from pyablate.engine import clean_run, weighted_rules, winograd
from pyablate.engine.channel_delta import ChannelDelta
from pyablate.engine.job import Job
from pyablate.engine.logit_change import carried
from pyablate.engine.microbenchmarks import (
    change_rate,
    convolution_rate,
    difference_rate,
    matrix_rate,
    unit_rate,
)
from pyablate.engine.rounding import Rounding
from pyablate.engine.rules import RULES
from pyablate.engine.suffix import Suffix, multiply_adds, needed
from pyablate.engine.sweep import Sweep
from pyablate.network.aten import DIVISIONS, MATMULS, NAMED, SAME, named_activation
from pyablate.network.graph import CONVOLUTIONS, LINEAR_MAPS, Graph, operands, settings
from pyablate.runs.setup import Setup

aten = torch.ops.aten

SAMPLE = 16
"""Images on which it is seen which pairs are live."""

CALL = 30e-6
"""Seconds that one operation on one slice of pairs costs beside its arithmetic, about."""

ATTAINED = 0.5
"""Share of the peaks that whole suffixes attained on the shipped networks, about."""

ATTAINED_IN_FULL = 0.75
"""Likewise of the rate of convolutions where all of them are in the model's own precision: what
lies between them weighs less then. On one core with AVX2: 0.6 in resnet, 0.85 in vgg_bn."""

OPERATIONS = ("dense", "floating", "matrix", "unit")
BYTES = ("passes", "gelu", "difference")
"""Kinds of work, each with a rate of its own; see :class:`Peaks`."""

_BILINEAR = frozenset({aten.mul.Tensor}) | DIVISIONS | MATMULS
"""Operators that are linear while one factor stands still."""


@dataclass(frozen=True)
class Peaks:
    """What this machine was measured to do, in operations and bytes per second.

    Attributes
    ----------
    clean, dense, floating, unit : float
        Convolutions in the model's precision, in the tier chosen, in its floating-point part, and
        those of single changed maps.
    matrix : float
        Linear layers, 1 x 1 convolutions and attention in the floating-point part.
    bandwidth : float
        Of differences through one elementwise pass.
    gelu : float
        The same where the function is the exact GELU.
    difference : float
        Of differences through operators without a rule of their own, such as layer norm, softmax
        and attention.

    Examples
    --------
    >>> peaks = pa.plan(model, data, "features.16").peaks
    >>> peaks.dense > 0, peaks.matrix > 0, peaks.bandwidth > 0
    (True, True, True)
    """

    clean: float
    dense: float
    floating: float
    unit: float
    matrix: float
    bandwidth: float
    gelu: float
    difference: float

    def seconds(self, work: Mapping[str, float], attained: float) -> float:
        """Seconds of some work by kind, where convolutions attain this share of their rate.

        Rates that are measured on a slice of pairs as a run has it are attained as they are.
        """
        rates = {
            "dense": self.dense * attained,
            "floating": self.floating * attained,
            "unit": self.unit * ATTAINED,
            "matrix": self.matrix,
            "passes": self.bandwidth * ATTAINED,
            "gelu": self.gelu,
            "difference": self.difference,
        }
        return sum(amount / rates[kind] for kind, amount in work.items())


def peaks_of(setup: Setup) -> Peaks:
    """Look up, or measure, what a plan rests on."""
    where, full = str(setup.data.device), setup.data.dtype
    tier = (*setup.low, full)[0]
    held = carried(tier)
    return Peaks(
        clean=convolution_rate(where, full),
        dense=convolution_rate(where, tier),
        floating=convolution_rate(where, held),
        unit=unit_rate(where),
        matrix=matrix_rate(where, held),
        bandwidth=change_rate(where),
        gelu=change_rate(where, held, "gelu"),
        difference=difference_rate(where, held),
    )


@dataclass(frozen=True)
class LayerCost:
    """Cost of one job: per live pair, and per image whether or not pairs are live.

    Attributes
    ----------
    work : dict
        Operations and bytes per live pair, by kind (:data:`OPERATIONS`, :data:`BYTES`).
    image_byte : float
        Bytes per image of what is done while deltas are on their channels.
    calls : int
        Operations per slice of pairs.
    slice : int
        Pairs per slice.
    """

    job: Job
    strategy: str
    live: float
    work: Mapping[str, float] = field(default_factory=dict)
    image_byte: float = 0.0
    calls: int = 0
    slice: int = 1 << 30

    def row(self, images: int, peaks: Peaks, attained: float) -> dict[str, Any]:
        """Row of the plan's table for this many images."""
        pairs = len(self.job.rows) * images
        live = pairs * self.live
        work = {kind: live * amount for kind, amount in self.work.items()}
        work["passes"] = work.get("passes", 0.0) + images * self.image_byte
        seconds = peaks.seconds(work, ATTAINED if self.strategy == "replay" else attained)
        seconds += self.calls * CALL * -(-live // self.slice)
        return {
            "layer": self.job.name,
            "strategy": self.strategy,
            "units": len(self.job.rows),
            "pairs": pairs,
            "live": self.live,
            "gflop": sum(work.get(kind, 0.0) for kind in OPERATIONS) / 1e9,
            "dense": (work.get("dense") or _floating(work)) / 1e9,
            "gbyte": sum(work.get(kind, 0.0) for kind in BYTES) / 1e9,
            "seconds": seconds,
        }


def _floating(work: Mapping[str, float]) -> float:
    return work.get("floating", 0.0) + work.get("matrix", 0.0)


def layer_costs(setup: Setup) -> list[LayerCost]:
    """Costs of all jobs of a run, whose first few images are swept."""
    batch = next(iter(setup.data.batches(SAMPLE)))
    if setup.graph is None:
        per_pair = forward_flop(setup.model, batch.images[:1])
        return [LayerCost(job, "replay", 1.0, {"floating": per_pair}) for job in setup.jobs]
    suffixes = [Suffix.of(setup.graph, job) for job in setup.jobs]
    clean = clean_run.run_graph(
        setup.graph, needed(suffixes), setup.exact, batch, rounding=Rounding()
    )
    costs = []
    tier = (*setup.low, setup.data.dtype)[0]
    for suffix in suffixes:
        replacements = setup.own.replacements(batch, suffix.job)
        with torch.no_grad():
            sweep = Sweep(suffix, clean, replacements)
            pairs = suffix.pairs_in(setup.slice_bytes, setup.data.device)(tier)
            costs.append(_cost(sweep, len(batch), tier, pairs))
    return costs


def _cost(sweep: Sweep, images: int, tier: torch.dtype, pairs: int) -> LayerCost:
    job = sweep.suffix.job
    image_byte = 0.0
    if job.channelwise:
        sweep.advance()
        on_channel = [node for node in sweep.suffix.nodes if node in sweep.values]
        # Each is read and written in full precision, with its clean value beside it.
        image_byte = sum(3.0 * _size(sweep.values[node]) for node in on_channel) / images
        if sweep.head is not None:
            # Read a delta, write a prediction; the O(1) test leaves few classes to scan.
            return LayerCost(job, "closed form", 1.0, {"passes": 16.0}, image_byte)
    nodes = sweep.deferred if job.channelwise else sweep.suffix.nodes
    calls = sum(node.target not in SAME for node in nodes)
    live = sweep.live_share()
    return LayerCost(job, "delta", live, _work(sweep, nodes, tier), image_byte, calls, pairs)


def _work(sweep: Sweep, nodes: list[fx.Node], tier: torch.dtype) -> Mapping[str, float]:
    """Operations and bytes of one pair, by kind."""
    graph, held = sweep.graph, carried(tier).itemsize
    changed = set(sweep.suffix.nodes)
    work: defaultdict[str, float] = defaultdict(float)
    for node in nodes:
        single = sweep.suffix.job.single and bool(node.all_input_nodes)
        delta = sweep.value(node.all_input_nodes[0]) if single else None
        if delta is not None:
            work["unit"] += multiply_adds(graph, node) / delta.size
        else:
            by_tiles = tier == torch.float32 and sweep.clean.logits.device.type == "cpu"
            times = winograd.gain(graph, node) if by_tiles else 1.0
            work[_rate_of(graph, node, tier)] += multiply_adds(graph, node) / times
        work["matrix"] += _products(graph, node)
        work[_pass_of(node, changed)] += _elements(graph, node) * held
    return work


def _rate_of(graph: Graph, node: fx.Node, tier: torch.dtype) -> str:
    """Rate by which a dense convolution or linear layer is done: the place to tell kernels apart.

    A 1 x 1 convolution is a product of matrices, with as few operations per number; a depthwise one
    reads one map for each that it writes, as those of single changed maps do.
    """
    if tier == torch.int8 and weighted_rules.takes_quantized(graph, node):
        return "dense"
    filters = graph.constant(node, 1) if node.target in LINEAR_MAPS else None
    if filters is None:
        return "floating"
    groups = settings(node, 6, 1)[0] if node.target in CONVOLUTIONS else 1
    if groups != 1:
        return "unit" if filters.shape[1] == 1 else "floating"
    return "matrix" if filters[0, 0].numel() == 1 else "floating"


def _products(graph: Graph, node: fx.Node) -> float:
    """Operations of matrix products of two tensors that both belong to the images."""
    if node.target in MATMULS:
        left = operands(node)[0]
        return 2.0 * graph.elements(node) * int(left.meta["val"].shape[-1])
    if node.target is aten.scaled_dot_product_attention.default:
        query, key = operands(node)[:2]  # which may be one and the same
        return 4.0 * graph.elements(query) * int(key.meta["val"].shape[-2])
    return 0.0


def _pass_of(node: fx.Node, changed: set[fx.Node]) -> str:
    """Rate by which the numbers that a node reads and writes go past."""
    if node.target in _BILINEAR and sum(source in changed for source in operands(node)) > 1:
        return "difference"
    named = named_activation(node) if node.target in NAMED else None
    if named is not None:
        return "gelu" if named.name == "gelu" else "passes"
    return "passes" if node.target in RULES and node.target not in NAMED else "difference"


def _elements(graph: Graph, node: fx.Node) -> float:
    """Elements that a node between two convolutions reads and writes for one pair."""
    weighted = node.target in CONVOLUTIONS or node.target is aten.linear.default
    if node.target in SAME or weighted or _is_view(node):
        return 0.0
    reads = [source for source in node.all_input_nodes if source not in graph.constants]
    return float(graph.elements(node) + sum(graph.elements(source) for source in reads))


def _is_view(node: fx.Node) -> bool:
    """Whether a node only looks at a tensor in another way: nothing is read or written."""
    taken = not isinstance(node.target, torch._ops.OpOverload)  # an item of several results
    return taken or bool(getattr(node.target, "is_view", False))


def _size(delta: ChannelDelta) -> int:
    """Size of a channelwise delta, all units and images."""
    return delta.values.numel() * delta.values.element_size()


def forward_flop(model: nn.Module, image: Tensor) -> float:
    """Arithmetic of one plain forward pass."""
    from torch.utils.flop_counter import FlopCounterMode  # slow to import, rarely needed

    pair = torch.cat([image, image])  # some networks squeeze a batch of one away
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pair)
    return float(counter.get_total_flops()) / len(pair)
