"""The clean run of one image batch: the one forward pass that all ablations share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from pyablate.batches import Batch
from pyablate.engine.delta import Clean
from pyablate.engine.exact import Exact
from pyablate.engine.replay import Replay, forward
from pyablate.graph import CONVOLUTIONS, Graph
from pyablate.transfer import sent

MARGIN = 3e-5
"""Share of an image's largest logit that float32 rounding may reach, with much to spare."""

CACHED = 4 << 20
"""Bytes of the widest tensor up to which the clean run takes images together."""

SAFETY = 8.0
"""How many times the largest rounding error seen is doubted."""


@dataclass(frozen=True)
class Rounding:
    """How far the logits of the clean run are not trusted.

    Attributes
    ----------
    share : float
        Of an image's largest logit.
    least : float
        In logits. An image whose logits all but cancel is rounded no better than others.
    """

    share: float
    least: float

    @classmethod
    def measured(cls, logits: Tensor, exact: Tensor) -> Rounding:
        """Measure on a few images, ``[N, K]``; ``exact`` are the logits in float64.

        Where logits come about by cancellation, float32 can be far worse than usual.
        """
        # What is not finite the clean run will name.
        error = (logits.to(exact.dtype) - exact).abs().amax(dim=1).nan_to_num(0.0, 0.0)
        share = float((error / exact.abs().amax(dim=1).clamp(min=1e-300)).max())
        return cls(max(MARGIN, SAFETY * share), SAFETY * float(error.max()))

    def tolerance(self, logits: Tensor) -> Tensor:
        """Top-2 margins up to which these logits ``[N, K]`` decide nothing, ``[N]``."""
        return (self.share * logits.abs().amax(dim=1)).clamp(min=self.least)


def measure_rounding(model: nn.Module, exact: Replay, batch: Batch) -> Rounding:
    """Measure how far this network's own precision is not to be trusted."""
    every = torch.arange(len(batch))
    with torch.no_grad():
        logits = forward(model, batch.images).cpu()
    return Rounding.measured(logits, exact.logits(batch, None, every, every))


def run_graph(
    graph: Graph,
    keep: Iterable[fx.Node],
    exact: Exact | Replay,
    batch: Batch,
    *,
    rounding: Rounding,
) -> Clean:
    """Run a captured network and keep what the suffixes read."""
    images = batch.images
    convolves = any(node.target in CONVOLUTIONS for node in graph.graph.nodes)
    if images.ndim == 4 and convolves:
        images = images.contiguous(memory_format=torch.channels_last)
    wanted = {graph.logits, *keep}
    with torch.no_grad():
        size = _images_at_a_time(graph, images, wanted)
        if len(images) > size and all(graph.joins(node) for node in wanted):
            parts = [graph.run(some, wanted) for some in images.split(size)]
            # Each part is let go as soon as it is joined: all of them twice would not fit.
            tensors = {node: graph.join(node, [p.pop(node) for p in parts]) for node in wanted}
        else:
            tensors = graph.run(images, wanted)
    return _clean(tensors, tensors[graph.logits], exact, batch, rounding)


def _images_at_a_time(graph: Graph, images: Tensor, wanted: Iterable[fx.Node]) -> int:
    """Images whose widest tensor stays in a processor's caches, never fewer than 16.

    All of them where more is kept than that, since joining the parts copies it.
    """
    widest = graph.widest
    kept = sum(graph.elements(node) for node in wanted)
    if images.device.type != "cpu" or kept >= widest:
        return len(images)
    return max(16, CACHED // (widest * images.element_size()))


def run_model(
    model: nn.Module, exact: Exact | Replay, batch: Batch, *, rounding: Rounding, at_a_time: int
) -> Clean:
    """Run a network that was not captured, on a few images at a time."""
    with torch.no_grad():
        logits = torch.cat([forward(model, some) for some in batch.images.split(at_a_time)])
        return _clean({}, logits, exact, batch, rounding)


def _clean(
    tensors: dict[fx.Node, Tensor],
    logits: Tensor,
    exact: Exact | Replay,
    batch: Batch,
    rounding: Rounding,
) -> Clean:
    finite = torch.isfinite(logits).all(dim=1)
    tolerance = rounding.tolerance(logits)
    finite, close = torch.stack([finite, close_calls(logits, tolerance)]).cpu()
    if not bool(finite.all()):
        where = int(batch.index[~finite][0])
        raise ValueError(f"model: the logits of image {where} are NaN or infinite")
    return Clean(tensors, logits, _predict(logits, close, exact, batch), tolerance)


def close_calls(logits: Tensor, tolerance: Tensor) -> Tensor:
    """Bool ``[N]``: rows whose top-2 margin is within ``tolerance``."""
    top = logits.topk(2, dim=1).values
    return top[:, 0] - top[:, 1] <= tolerance


def _predict(logits: Tensor, close: Tensor, exact: Exact | Replay, batch: Batch) -> Tensor:
    """Argmax, with close calls (bool ``[N]`` on the CPU) decided by exact replay."""
    prediction = logits.argmax(dim=1).to(torch.int32)
    open_ = close.nonzero().squeeze(1)
    if len(open_):
        decided = exact.decide(batch, None, open_, open_).prediction
        prediction[sent(open_, logits.device)] = sent(decided, logits.device)
    return prediction
