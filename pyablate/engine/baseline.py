"""The clean run of one image batch: the one forward pass that all ablations share."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx

from pyablate.batches import Batch
from pyablate.capture import Graph
from pyablate.engine.delta import Clean
from pyablate.engine.replay import Replay

MARGIN = 1e-4
"""Share of an image's largest logit that float32 rounding may reach, with much to spare."""


def run_graph(graph: Graph, keep: Iterable[fx.Node], exact: Replay, batch: Batch) -> Clean:
    """Run a captured network and keep what the suffixes read."""
    images = batch.images
    if images.ndim == 4:
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        tensors = graph.run(images, {graph.logits, *keep})
    return _clean(tensors, tensors[graph.logits], exact, batch)


def run_model(model: Callable[[Tensor], Tensor], exact: Replay, batch: Batch) -> Clean:
    """Run a network that was not captured."""
    with torch.no_grad():
        return _clean({}, model(batch.images), exact, batch)


def _clean(tensors: dict[fx.Node, Tensor], logits: Tensor, exact: Replay, batch: Batch) -> Clean:
    finite = torch.isfinite(logits).all(dim=1)
    if not bool(finite.all()):
        where = int(batch.index[~finite][0])
        raise ValueError(f"model: the logits of image {where} are NaN or infinite")
    tolerance = MARGIN * logits.abs().amax(dim=1)
    return Clean(tensors, logits, _predict(logits, tolerance, exact, batch), tolerance)


def _predict(logits: Tensor, tolerance: Tensor, exact: Replay, batch: Batch) -> Tensor:
    """Argmax, with close calls decided by exact replay."""
    top = logits.topk(2, dim=1)
    prediction = top.indices[:, 0].to(torch.int32)
    close = (top.values[:, 0] - top.values[:, 1] <= tolerance).nonzero().squeeze(1)
    if len(close):
        prediction[close] = exact.decide(batch, None, close, close).prediction
    return prediction
