"""The clean run of one image batch: the one forward pass that all ablations share."""

from __future__ import annotations

from collections.abc import Iterable

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


def rounding(model: nn.Module, exact: Replay, batch: Batch) -> float:
    """Share of the largest logit within which this network's own precision is not trusted.

    Measured on a few images against the exact replay: where logits come about by cancellation,
    float32 can be far worse than usual.
    """
    every = torch.arange(len(batch))
    logits = exact.logits(batch, None, every, every)
    with torch.no_grad():
        error = (forward(model, batch.images).cpu().to(logits.dtype) - logits).abs().amax(dim=1)
    worst = float((error / logits.abs().amax(dim=1).clamp(min=1e-300)).max())
    return max(MARGIN, SAFETY * worst)


def run_graph(
    graph: Graph, keep: Iterable[fx.Node], exact: Exact | Replay, batch: Batch, *, margin: float
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
    return _clean(tensors, tensors[graph.logits], exact, batch, margin)


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
    model: nn.Module, exact: Exact | Replay, batch: Batch, *, margin: float, at_a_time: int
) -> Clean:
    """Run a network that was not captured, on a few images at a time."""
    with torch.no_grad():
        logits = torch.cat([forward(model, some) for some in batch.images.split(at_a_time)])
        return _clean({}, logits, exact, batch, margin)


def _clean(
    tensors: dict[fx.Node, Tensor],
    logits: Tensor,
    exact: Exact | Replay,
    batch: Batch,
    margin: float,
) -> Clean:
    finite = torch.isfinite(logits).all(dim=1)
    tolerance = margin * logits.abs().amax(dim=1)
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
