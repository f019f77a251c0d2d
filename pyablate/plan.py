"""What a run will do and cost, layer by layer, before it is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, fx, nn

from pyablate.capture import CONVOLUTIONS, Graph
from pyablate.engine import baseline
from pyablate.engine.ablations import Job, stand_ins
from pyablate.engine.channel import Channel
from pyablate.engine.delta import Suffix, Sweep, needed
from pyablate.interventions import Intervention, parse
from pyablate.peaks import convolution_rate, copy_rate
from pyablate.prepare import Setup, check_options, prepare, undisturbed

aten = torch.ops.aten
_SAMPLE = 16


@dataclass(frozen=True)
class Plan:
    """How a run would go.

    Attributes
    ----------
    table : pandas.DataFrame
        One row per layer: ``layer``, ``strategy``, ``units``, ``pairs`` (unit, image), ``live``
        (share of pairs that need work at all), ``gflop`` (dense arithmetic), ``gbyte`` (tensors
        read and written) and ``seconds`` (predicted).
    images : int
        Images that the run would see.
    batch_size : int
        Images per clean run.
    gflops, gbytes_per_second : float
        What this machine was measured to do just now.
    """

    table: pd.DataFrame
    images: int
    batch_size: int
    gflops: float
    gbytes_per_second: float

    @property
    def seconds(self) -> float:
        """Predicted wall time of the whole run."""
        return float(self.table["seconds"].sum())

    def explain(self) -> str:
        """Lay the plan out for people."""
        shown = self.table.assign(
            pairs=[f"{pairs:,}" for pairs in self.table["pairs"]],
            live=[f"{live:.0%}" for live in self.table["live"]],
            gflop=[f"{gflop:,.1f}" for gflop in self.table["gflop"]],
            gbyte=[f"{gbyte:,.2f}" for gbyte in self.table["gbyte"]],
            seconds=[f"{seconds:,.1f}" for seconds in self.table["seconds"]],
        )
        return "\n".join(
            [
                shown.to_string(index=False),
                f"{self.images:,} images in batches of {self.batch_size}; measured here: "
                f"{self.gflops:,.0f} GFLOP/s in convolutions, "
                f"{self.gbytes_per_second:,.1f} GB/s through memory",
                f"predicted: {self.seconds:,.0f} s in all; the pairs' live share was measured on "
                f"{min(_SAMPLE, self.images)} images",
            ]
        )


def plan(
    model: nn.Module,
    data: Any,
    layers: str | Sequence[str] | None = None,
    *,
    images: int | None = None,
    intervention: str | Intervention = "zero",
    groups: Sequence[Sequence[str]] | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    memory: int | None = None,
    precision: str = "auto",
) -> Plan:
    """Predict what :func:`pyablate.ablate` would do with the same arguments.

    Parameters
    ----------
    model, data, layers, intervention, groups, device, batch_size, memory, precision
        As for :func:`pyablate.ablate`; ``data`` may also be a batch of images alone.
    images : int, optional
        Predict for this many images; by default for as many as ``data`` has.

    Returns
    -------
    Plan
        The first few images are swept through the part that stays on single channels, to see
        which pairs are live; nothing else is run.

    Raises
    ------
    ValueError, TypeError
        As :func:`pyablate.ablate` raises.
    """
    check_options(
        model, batch_size=batch_size, memory=memory, audit=0, strategy="auto", precision=precision
    )
    if isinstance(data, Tensor):
        data = (data, torch.zeros(len(data), dtype=torch.int64))
    with undisturbed():
        setup = prepare(
            model,
            data,
            layers,
            groups,
            parse(intervention),
            None,
            device,
            batch_size=batch_size,
            memory=memory,
            strategy="auto",
            precision=precision,
        )
        count = len(setup.data) if images is None else images
        where = str(setup.data.device)
        gflops = convolution_rate(where, setup.low or setup.data.dtype) / 1e9
        bandwidth = copy_rate(where) / 1e9
        rows = [_row(cost, count, gflops, bandwidth) for cost in _costs(setup)]
    return Plan(pd.DataFrame(rows), count, setup.batch_size, gflops, bandwidth)


@dataclass(frozen=True)
class _Cost:
    """Cost of one job: per live pair, and per image whether or not pairs are live."""

    job: Job
    strategy: str
    live: float
    flop: float
    byte: float


def _row(cost: _Cost, images: int, gflops: float, bandwidth: float) -> dict[str, Any]:
    pairs = len(cost.job.rows) * images
    gflop = pairs * cost.live * cost.flop / 1e9
    gbyte = pairs * (cost.live * cost.byte) / 1e9
    return {
        "layer": cost.job.name,
        "strategy": cost.strategy,
        "units": len(cost.job.rows),
        "pairs": pairs,
        "live": cost.live,
        "gflop": gflop,
        "gbyte": gbyte,
        "seconds": gflop / gflops + gbyte / bandwidth,
    }


def _costs(setup: Setup) -> list[_Cost]:
    batch = next(iter(setup.data.batches(_SAMPLE)))
    if setup.graph is None:
        per_pair = _forward_flop(setup.model, batch.images[:1])
        return [_Cost(job, "replay", 1.0, per_pair, 0.0) for job in setup.jobs]
    suffixes = [Suffix.of(setup.graph, job) for job in setup.jobs]
    clean = baseline.run_graph(
        setup.graph, needed(suffixes), setup.exact, batch, margin=setup.margin
    )
    costs = []
    for suffix in suffixes:
        standins = stand_ins(setup.model, setup.data, batch, suffix.job, setup.statistics)
        with torch.no_grad():
            sweep = Sweep(suffix, clean, standins)
            costs.append(_cost(sweep, len(batch)))
    return costs


def _cost(sweep: Sweep, images: int) -> _Cost:
    job, graph = sweep.suffix.job, sweep.graph
    if job.channelwise:
        sweep.advance()
        if sweep.head is not None:
            # Read a delta, write a prediction; the O(1) test leaves few classes to scan.
            return _Cost(job, "closed form", 1.0, 2.0, 16.0)
    nodes = sweep.deferred if job.channelwise else sweep.suffix.nodes
    live = len(sweep.live_pairs()[0]) / (len(job.rows) * images)
    flop = sum(_flop(graph, node, sweep.values) for node in nodes)
    byte = sum(_bytes(graph, node) for node in nodes)
    return _Cost(job, "delta", live, flop, byte)


def _flop(graph: Graph, node: fx.Node, on_channel: dict[fx.Node, Channel]) -> float:
    """Multiply-adds of a node for one pair, times two; one input channel if still on one."""
    if node.target not in CONVOLUTIONS and node.target is not aten.linear.default:
        return 0.0
    filters = graph.constant(node, 1)
    if filters is None:
        return 0.0
    each = 2.0 * graph.elements(node) * filters[0].numel()
    delta = on_channel.get(node.all_input_nodes[0])
    return each if delta is None else each / delta.size


def _bytes(graph: Graph, node: fx.Node) -> float:
    """Tensors that a node reads and writes for one pair, in bytes of float32."""
    reads = [source for source in node.all_input_nodes if source not in graph.constants]
    return 4.0 * (graph.elements(node) + sum(graph.elements(source) for source in reads))


def _forward_flop(model: nn.Module, image: Tensor) -> float:
    """Arithmetic of one plain forward pass."""
    from torch.utils.flop_counter import FlopCounterMode  # slow to import, rarely needed

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return float(counter.get_total_flops())
