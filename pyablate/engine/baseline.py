"""The clean run of one image batch: the one forward pass that all ablations share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from pyablate import near_tie
from pyablate.batches import Batch
from pyablate.engine.delta import Clean
from pyablate.engine.exact import Exact
from pyablate.engine.replay import Replay, forward
from pyablate.graph import CONVOLUTIONS, Graph
from pyablate.transfer import sent

MARGIN = 3e-5
"""Share of the spread of an image's logits that float32 rounding may reach, with much to spare."""

ULPS = 4
"""Units in the last place by which the competing logits are doubted at least."""

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
        Of the largest magnitude among an image's logits that compete.
    least : float
        In logits. An image whose logits all but cancel is rounded no better than others.
    """

    share: float = 0.0
    least: float = 0.0

    @classmethod
    def measured(cls, logits: Tensor, exact: Tensor) -> Rounding:
        """Measure on a few images, ``[N, K]``; ``exact`` are the logits in float64.

        Where logits come about by cancellation, float32 can be far worse than usual.
        """
        # What is not finite the clean run will name.
        error = near_tie.difference(logits, exact).nan_to_num(0.0, 0.0, 0.0)
        share = float((error / near_tie.largest(exact).clamp(min=1e-300)).max())
        return cls(SAFETY * share, SAFETY * float(error.max()))

    def __or__(self, other: Rounding) -> Rounding:
        """Doubt what either of two does."""
        return Rounding(max(self.share, other.share), max(self.least, other.least))

    def tolerance(self, logits: Tensor) -> Tensor:
        """Top-2 margins up to which these logits ``[N, K]`` decide nothing, ``[N]``."""
        share = max(self.share, ULPS * torch.finfo(logits.dtype).eps)
        by_size = share * near_tie.largest(logits)
        return torch.maximum(by_size, MARGIN * near_tie.spread(logits)).clamp(min=self.least)


def outlying(images: Tensor, count: int) -> Tensor:
    """Choose ``count`` of some images: the most unusual in offset, contrast and size, and others.

    What rounds worst is often a regime of its own: images of low contrast, which a normalisation
    blows up, or far from zero. An even choice would miss a few such images among many.

    Parameters
    ----------
    images : Tensor
        ``[N, ...]``.
    count : int
        At most.

    Returns
    -------
    Tensor
        int64, ascending, on the CPU: positions, the same each time.
    """
    if len(images) <= count:
        return torch.arange(len(images))
    flat = images.flatten(1)
    deviation = flat.std(dim=1, correction=0)
    offset = flat.mean(dim=1).abs() / deviation.clamp(min=torch.finfo(flat.dtype).tiny)
    unusual = [offset.argmax(), deviation.argmin(), flat.abs().amax(dim=1).argmax()]
    draw = torch.Generator().manual_seed(len(images))
    others = torch.randperm(len(images), generator=draw)[:count]
    chosen = dict.fromkeys(torch.stack(unusual).tolist()[:count] + others.tolist())
    return torch.tensor(sorted(list(chosen)[:count]))


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
    tolerance = rounding.tolerance(logits)
    good, close = torch.stack([near_tie.usable(logits), close_calls(logits, tolerance)]).cpu()
    near_tie.check(good, batch.index)
    return Clean(tensors, logits, _predict(logits, close, exact, batch), tolerance)


def close_calls(logits: Tensor, tolerance: Tensor) -> Tensor:
    """Bool ``[N]``: rows whose top-2 margin is within ``tolerance``."""
    return near_tie.margin(logits) <= tolerance


def _predict(logits: Tensor, close: Tensor, exact: Exact | Replay, batch: Batch) -> Tensor:
    """Argmax, with close calls (bool ``[N]`` on the CPU) decided by exact replay."""
    prediction = logits.argmax(dim=1).to(torch.int32)
    open_ = close.nonzero().squeeze(1)
    if len(open_):
        decided = exact.decide(batch, None, open_, open_).prediction
        prediction[sent(open_, logits.device)] = sent(decided, logits.device)
    return prediction
