"""Which layers it pays to screen: arithmetic of a screened run beside that of an exact one.

A layer whose pairs cost little is computed as a whole: gradients and thresholds would take longer.
That is reckoned at rates that are written down here. No clock is read, so that all processes and
shards on processors of one kind choose alike.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from pyablate.engine import int8_conv
from pyablate.engine.job import Job
from pyablate.engine.suffix import Suffix, multiply_adds
from pyablate.engine.weighted_rules import takes_quantized
from pyablate.runs.setup import Setup

BACKWARD = 1.3
"""Operations of pairs in full precision that are done in the time of one of a backward pass, about.

On one core with AVX2 it is 0.6 in vit, 1.1 in EfficientNet-Lite0 and convnext, 1.3 in alexnet, 2.4
in vgg_bn and 2.7 in resnet."""

EIGHT_BITS, HALF_ON_GPU = 2.0, 10.0
"""How many times as fast as in full precision pairs are computed with convolutions in 8 bits, and
on a GPU in half precision; about, doubtful pairs included. bfloat16 on a processor counts for
nothing: transformers were as fast in float32 (AVX-512 with VNNI and BF16)."""

DEARER = 1.5
"""Time of an open pair to that of another, about: it is close to a change and has few beside it."""

LAYER = {"cpu": 1e10, "cuda": 1e13}
"""Operations that are done in the time that the thresholds of a layer take beside its pairs: a
tenth of a second, on a GPU half of one (reckoned, not measured)."""

GAIN = 0.5
"""Share of a layer's work which is to be saved at least, or it is not even measured."""


@dataclass(frozen=True)
class Work:
    """What the pairs of a job take, in operations at the rate of full precision.

    Attributes
    ----------
    suffix : Suffix
        Of the job.
    exact : float
        In an exact run.
    screened : float
        In a screened one, without gradients.
    """

    suffix: Suffix
    exact: float
    screened: float


def faster(setup: Setup, suffix: Suffix) -> float:
    """How many times as fast pairs are computed as in full precision, about.

    By what is asked for and what the device can do: which precision pays is told by a clock.
    """
    if setup.precision in ("fp32", "fp64") or setup.data.dtype != torch.float32:
        return 1.0
    if setup.data.device.type == "cuda":
        return HALF_ON_GPU
    coded = setup.precision in ("auto", "int8") and int8_conv.available()
    work = {node: multiply_adds(suffix.graph, node) for node in suffix.nodes}
    eight = sum(work[n] for n in work if coded and takes_quantized(suffix.graph, n))
    whole = sum(work.values())
    return whole / (whole - eight * (1.0 - 1.0 / EIGHT_BITS)) if whole else 1.0


def behind(suffixes: Iterable[Suffix], seen: Collection[fx.Node] = ()) -> float:
    """Operations of a pass through what lies behind any of these sites, but for what was seen."""
    nodes = {node: one.graph for one in suffixes for node in one.nodes if node not in seen}
    return sum(multiply_adds(graph, node) for node, graph in nodes.items())


def worthwhile(
    works: Mapping[Job, Work], passes: float, gain: float = 0.0
) -> tuple[frozenset[Job], float]:
    """Choose the jobs to screen: those that gain by it, from some depth on, where gradients begin.

    Parameters
    ----------
    works : mapping
        Of the jobs that can be screened.
    passes : float
        Backward passes through what lies behind those chosen.
    gain : float
        Share of the work of each that is chosen, and of all of them together, which is to be saved
        at least.

    Returns
    -------
    jobs : frozenset of Job
        Those with which most is saved beyond that.
    operations : float
        Of all jobs, these screened and the others computed.
    """
    exact = sum(work.exact for work in works.values())
    able = [job for job, work in works.items() if work.screened < (1 - gain) * work.exact]
    able.sort(key=lambda job: (works[job].suffix.work, job.rows.start))
    chosen, operations = 0, exact
    most = saved = margin = 0.0
    seen = set[fx.Node]()
    for number, job in enumerate(able, start=1):
        work = works[job]
        gradients = BACKWARD * passes * behind([work.suffix], seen)
        saved += work.exact - work.screened - gradients
        seen.update(work.suffix.nodes)
        margin += gain * work.exact
        if saved - margin > most:
            chosen, operations, most = number, exact - saved, saved - margin
    return frozenset(able[:chosen]), operations
