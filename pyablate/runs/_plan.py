"""What a run will do and cost, layer by layer, before it is run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import psutil
import torch
from torch import Tensor, nn

from pyablate._validation import check_bytes, check_count, check_fraction, check_level
from pyablate.data.dataset import Batch
from pyablate.engine import clean_run
from pyablate.engine.microbenchmarks import undisturbed_clock
from pyablate.engine.rounding import Rounding
from pyablate.engine.score import DirectionCount
from pyablate.engine.suffix import Suffix, needed
from pyablate.interventions import Intervention, parse
from pyablate.network.classifier import Choice
from pyablate.result import AblationResult
from pyablate.results.notebook import page
from pyablate.runs.audit import CALL as AUDIT_CALL
from pyablate.runs.audit import PASSES, usual_pairs
from pyablate.runs.cost_model import (
    ATTAINED,
    ATTAINED_IN_FULL,
    SAMPLE,
    Peaks,
    forward_flop,
    layer_costs,
    peaks_of,
)
from pyablate.runs.screened_plan import ScreenedPlan, plan_screened, stages_table
from pyablate.runs.setup import Setup, SetupOptions, check_options, image_bytes, prepare
from pyablate.runs.state import in_words
from pyablate.runtime.determinism import undisturbed

_BUDGET = 0.02
"""Share of the pairs of the estimated run that is planned beside an exact one."""

_MORE, _SHORT, _LONG = (32, 256), 0.2, 1.0
"""Images on which the clean run is timed besides: the larger number if it takes less than so many
seconds on a few, and none from so many on, where a batch by itself costs nothing to speak of."""


_SLICES = 8
"""Tensors of the size of a slice of pairs that live at a time, about."""


@dataclass(frozen=True)
class Plan:
    """How a run would go.

    Attributes
    ----------
    table : pandas.DataFrame
        One row per layer: ``layer``, ``strategy``, ``units``, ``pairs`` (unit, image), ``live``
        (share of pairs that need work at all), ``gflop`` (arithmetic; ``dense`` of it in the
        cheapest tier), ``gbyte`` (differences read and written) and ``seconds`` (predicted).
    images : int
        Images that the run would see.
    batch_size : int
        Images per clean run.
    slice_pairs : int
        Pairs of the widest layer that are worked on at a time.
    tiers : tuple of str
        Precisions of the dense part, cheapest first; doubtful pairs go to the next.
    clean_seconds : float
        Predicted time of the clean runs, one per image.
    peaks : Peaks
        What this machine was measured to do just now.
    remarks : tuple of str
        What should be known of the layers chosen: weights whose units are in none of them.
    other_seconds : dict
        What a call takes beside clean runs and layers: "preparation" (checks and capture, as this
        very call took) and "audit".
    screened : ScreenedPlan or None
        What ``guarantee="screened"`` would take; None where everything would be computed.
    memory : int or None
        Predicted peak of the memory of this process, or of what torch allocates on a GPU, in bytes;
        None where pairs run by replay.

    Examples
    --------
    >>> planned = pa.plan(model, data, "features.16")
    >>> planned.table["strategy"].tolist(), planned.seconds > 0
    (['closed form'], True)
    """

    table: pd.DataFrame
    images: int
    batch_size: int
    slice_pairs: int
    tiers: tuple[str, ...]
    clean_seconds: float
    peaks: Peaks
    remarks: tuple[str, ...] = ()
    other_seconds: dict[str, float] = field(default_factory=dict)
    screened: ScreenedPlan | None = None
    memory: int | None = None

    @property
    def gflops(self) -> float:
        """Measured rate of convolutions in the tier chosen, in 1e9 operations per second."""
        return self.peaks.dense / 1e9

    @property
    def seconds(self) -> float:
        """Predicted time of the call: preparation, clean runs, all layers and audit."""
        layers = float(self.table["seconds"].sum())
        return layers + self.clean_seconds + sum(self.other_seconds.values())

    def seconds_at(self, share: float) -> float:
        """Predicted time of an estimated run that computes this share of the pairs.

        The dearer layers are drawn from as the others are, as the chances of wrong predictions are
        not known before the run.

        Parameters
        ----------
        share : float
            From 0 to 1, of the pairs of layers that can be screened.
        """
        check_fraction("share", share)
        if self.screened is None:
            return self.seconds
        able = self.table["strategy"] == "delta"
        layers = self.table["seconds"].where(~able, share * self.table["seconds"]).sum()
        beside = self.clean_seconds + sum(self.other_seconds.values())
        return float(layers) + beside + self.screened.drawing_seconds

    def explain(self, result: AblationResult | None = None) -> str:
        """Lay the plan out for people.

        Parameters
        ----------
        result : AblationResult, optional
            Of the run that was planned: a column ``actual`` shows the seconds that it took. Of a
            screened run also the shares of pairs that its stages left open, and what they cost.
        """
        shown = self._shown
        if result is not None:
            actual = result.effort.layer_seconds
            shown["actual"] = [
                f"{actual[layer]:,.2f}" if layer in actual else "" for layer in shown["layer"]
            ]
        lines = [shown.to_string(index=False), *self._lines]
        stages = stages_table(self.screened, result)
        if len(stages):
            lines += ["what the stages of screening leave open of the live pairs, and their cost:"]
            lines += [stages.to_string(index=False, float_format="{:.3f}".format, na_rep="")]
        if result is not None:
            spent = sum(result.effort.layer_seconds.values())
            lines.append(f"actual: {spent:,.1f} s in the layers, {result.seconds:,.1f} s in all")
            took = result.effort.other_seconds.items()
            lines += [f"  {what}: {seconds:,.1f} s" for what, seconds in took]
        if result is not None and result.screening is not None and result.screening.layers:
            count = DirectionCount(result.screening.competitors, result.screening.random)
            lines.append(f"  predictions: along {count}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Show what :meth:`explain` says."""
        return page(f"Plan for {self.images:,} images", self._shown, notes=self._lines)

    @property
    def _shown(self) -> pd.DataFrame:
        """The table as people read it."""
        table = self.table
        return table.assign(
            pairs=[f"{pairs:,}" for pairs in table["pairs"]],
            live=[f"{live:.0%}" for live in table["live"]],
            gflop=[f"{gflop:,.1f}" for gflop in table["gflop"]],
            dense=[f"{dense:,.1f}" for dense in table["dense"]],
            gbyte=[f"{gbyte:,.2f}" for gbyte in table["gbyte"]],
            seconds=[f"{seconds:,.2f}" for seconds in table["seconds"]],
        )

    @property
    def _lines(self) -> list[str]:
        """What is said below the table."""
        return [
            f"{self.images:,} images in batches of {self.batch_size}, {self.slice_pairs:,} pairs "
            f"at a time; decided in {', doubtful pairs in '.join(map(in_words, self.tiers))}",
            f"measured here: {self.gflops:,.0f} GFLOP/s in convolutions, "
            f"{self.peaks.unit / 1e9:,.0f} in those of single maps, "
            f"{self.peaks.matrix / 1e9:,.0f} in linear layers; "
            f"{self.peaks.bandwidth / 1e9:,.1f} GB/s of differences, "
            f"{self.peaks.gelu / 1e9:,.1f} in GELU, "
            f"{self.peaks.difference / 1e9:,.1f} in operators without a rule of their own",
            f"predicted: {self.seconds:,.1f} s in all; how many pairs change anything was measured "
            f"on {min(SAMPLE, self.images)} images",
            *(f"  {what}: {seconds:,.1f} s" for what, seconds in self._parts.items()),
            *([] if self.memory is None else [f"memory: about {self.memory / 1e9:,.1f} GB"]),
            self._screened(),
            *self._estimated,
            *self.remarks,
        ]

    @property
    def _parts(self) -> dict[str, float]:
        layers = float(self.table["seconds"].sum())
        return {**self.other_seconds, "clean runs": self.clean_seconds, "layers": layers}

    @property
    def _estimated(self) -> list[str]:
        """Say what an estimated run would take."""
        if self.screened is None:
            return []
        seconds = self.seconds_at(_BUDGET)
        return [f"estimated: {seconds:,.1f} s at a budget of {_BUDGET:.0%} of the pairs"]

    def _screened(self) -> str:
        """Say what a screened run would take."""
        found = self.screened
        if found is None and (self.table["strategy"] == "replay").all():
            return "screened: not planned, these pairs run by replay"
        if found is None:
            return "screened: as exact, nothing here can be screened"
        beside = self.clean_seconds + sum(self.other_seconds.values())
        if not found.layers:
            measured = found.measuring_seconds
            more = f", and {measured:,.1f} s to find that out" if measured else ""
            return f"screened: as exact{more}, since gradients and thresholds would take as long"
        least, most = (beside + seconds for seconds in found.seconds)
        parts = (
            f"{len(found.layers)} of {len(self.table)} layers, "
            f"{found.prediction_seconds:,.1f} s of it predictions along {found.directions}, "
            f"{found.measuring_seconds:,.1f} s measuring thresholds"
        )
        if least >= self.seconds:
            return f"screened: {least:,.1f} s at least, {parts}: an exact run is no slower"
        if found.stages is not None:
            return f"screened: {least:,.1f} s, {parts}"
        return (
            f"screened: from {least:,.1f} s if no pair has to be computed to {most:,.1f} s if all "
            f"have, {parts}; measure=True (--measure) finds out how many"
        )


def plan(
    model: nn.Module,
    data: Any,
    layers: str | Sequence[str] | None = None,
    *,
    images: int | None = None,
    intervention: str | Intervention = "zero",
    groups: Sequence[Sequence[str]] | None = None,
    axis: Mapping[str, int] | None = None,
    logits: Choice = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    memory: int | str | None = None,
    precision: str = "auto",
    measure: bool = False,
    risk: float = 1e-5,
) -> Plan:
    """Predict what :func:`pyablate.ablate` would do with the same arguments.

    Parameters
    ----------
    model, data, layers, intervention, groups, axis, logits, device, batch_size, memory, precision
        As for :func:`pyablate.ablate`; ``data`` may also be a batch of images alone.
    images : int, optional
        Predict for this many images; by default for as many as ``data`` has.
    measure : bool
        Measure on ``data`` which pairs a screened run would leave open, as it does before its first
        block: some thousand pairs of each layer are computed. Without it only the ends are known,
        all pairs settled and none.
    risk : float
        Of that run, as for :func:`pyablate.ablate`.

    Returns
    -------
    Plan
        The first few images are swept through the part that stays on single channels, to see
        which pairs are live, and their gradients are timed; nothing else is run unless asked for.

    Raises
    ------
    ValueError, TypeError
        As :func:`pyablate.ablate` raises.

    Examples
    --------
    >>> planned = pa.plan(model, data, "features.1*", images=10_000)
    >>> planned.table["layer"].tolist(), planned.images
    (['features.13', 'features.16'], 10000)
    """
    options = SetupOptions(
        layers,
        groups,
        parse(intervention),
        device=device,
        batch_size=batch_size,
        memory=check_bytes("memory", memory),
        precision=precision,
        axis=axis,
        logits=logits,
        images=images,
    )
    check_options(model, options)
    check_level("risk", risk)
    if images is not None:
        check_count("images", images)
    if isinstance(data, Tensor):
        data = (data, torch.zeros(len(data), dtype=torch.int64))
    begin = time.perf_counter()
    with undisturbed(model, device):
        setup = prepare(model, data, options)
        prepared = time.perf_counter() - begin
        count = len(setup.data) if images is None else images
        peaks, costs = peaks_of(setup), layer_costs(setup)
        attained = ATTAINED if setup.low else ATTAINED_IN_FULL
        table = pd.DataFrame([cost.row(count, peaks, attained) for cost in costs])
        clean = _clean_seconds(setup, count, peaks)
        pairs = min((cost.slice for cost in costs), default=1)
        slower = peaks.dense / peaks.clean
        screened = plan_screened(setup, table, count, slower, risk if measure else None)
    audited = usual_pairs(setup, count) * (AUDIT_CALL + PASSES * clean / count)
    others = {"preparation": prepared, "audit": audited}
    tiers = tuple(str(t).removeprefix("torch.") for t in (*setup.low, setup.data.dtype))
    return Plan(
        table,
        count,
        setup.batch_size,
        pairs,
        tiers,
        clean,
        peaks,
        setup.remarks,
        others,
        screened,
        _memory(setup, count),
    )


def _memory(setup: Setup, images: int) -> int | None:
    """Bytes in use at the peak: what there is now, one batch, and slices of pairs."""
    if setup.graph is None:
        return None
    each = image_bytes(setup.graph, setup.jobs, setup.data.first(1).images)
    device = setup.data.device
    if device.type == "cuda":
        now = int(torch.cuda.memory_allocated(device))
    else:
        now = int(psutil.Process().memory_info().rss)
    return now + min(images, setup.batch_size) * each + _SLICES * setup.slice_bytes


def _clean_seconds(setup: Setup, images: int, peaks: Peaks) -> float:
    """Seconds of the clean runs: measured, since operations of all kinds share them.

    On two numbers of images, for what a batch costs by itself: some of it is watched in float64.
    """
    graph = setup.graph
    if graph is None:
        image = setup.data.first(1).images
        return images * forward_flop(setup.model, image) / peaks.clean / ATTAINED
    keep = needed(Suffix.of(graph, job) for job in setup.jobs)
    clock = undisturbed_clock(str(setup.data.device))

    def seconds(batch: Batch) -> float:
        begin = clock()
        clean_run.run_graph(graph, keep, setup.exact, batch, rounding=Rounding())
        return clock() - begin

    def measured(size: int) -> tuple[int, float]:
        batch = setup.data.first(min(size, setup.batch_size))
        best = min(seconds(batch) for _ in range(2))  # the first prepares much
        return len(batch), best if best > _LONG else min(best, seconds(batch))

    few, short = measured(SAMPLE)
    if short > _LONG:
        return images * short / few
    more, long = measured(_MORE[short * _MORE[1] / few <= _SHORT])
    if more == few or long <= short:
        return images * long / more
    each = (long - short) / (more - few)
    batches = -(-images // setup.batch_size)
    return images * each + batches * max(0.0, short - few * each)
