"""The clean run of one image batch: the one forward pass that all ablations share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from pyablate import near_tie
from pyablate.batches import Batch
from pyablate.engine.delta import Clean
from pyablate.engine.discontinuous import users
from pyablate.engine.exact import Exact
from pyablate.engine.replay import Replay, forward
from pyablate.engine.rounding import Rounding, outlying
from pyablate.graph import CONVOLUTIONS, SOFTMAXES, Graph
from pyablate.transfer import sent

FIRST, LATER = 8, 4
"""Images of the first batch, and of each later one, that are watched: their logits are computed in
float64 as well."""

CACHED = 4 << 20
"""Bytes of the widest tensor up to which the clean run takes images together."""


def run_graph(
    graph: Graph,
    keep: Iterable[fx.Node],
    exact: Exact | Replay,
    batch: Batch,
    *,
    rounding: Rounding,
    trusted: bool = True,
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
    return _clean(tensors, tensors[graph.logits], exact, batch, rounding, trusted=trusted)


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
    model: nn.Module,
    exact: Exact | Replay,
    batch: Batch,
    *,
    rounding: Rounding,
    at_a_time: int,
    trusted: bool = True,
) -> Clean:
    """Run a network that was not captured, on a few images at a time."""
    with torch.no_grad():
        logits = torch.cat([forward(model, some) for some in batch.images.split(at_a_time)])
        return _clean({}, logits, exact, batch, rounding, trusted=trusted)


def _clean(
    tensors: dict[fx.Node, Any],
    logits: Tensor,
    exact: Exact | Replay,
    batch: Batch,
    rounding: Rounding,
    *,
    trusted: bool,
) -> Clean:
    """Decide what the clean run predicts; ``trusted`` is whether its precision may decide any."""
    watched = outlying(batch.images, LATER if rounding.known else FIRST)
    if logits.dtype != torch.float64:
        truth = exact.watch(batch, watched, tensors)
        there = sent(watched, logits.device)
        rounding |= Rounding.measured(logits[there].cpu(), truth)
    tolerance = rounding.tolerance(logits)
    good, close = torch.stack([near_tie.usable(logits), close_calls(logits, tolerance)]).cpu()
    near_tie.check(good, batch.index)
    irregular = _irregular(tensors)
    if irregular or not trusted:
        close.fill_(True)
    prediction = _predict(logits, close, exact, batch)
    return Clean(tensors, logits, prediction, tolerance, rounding, watched, irregular)


def _irregular(tensors: Mapping[fx.Node, Any]) -> frozenset[fx.Node]:
    """Nodes that hold NaN or infinity; minus infinity in front of a softmax is no trouble.

    There it stands for what is masked, before and after.
    """
    parts = [
        (node, part)
        for node, value in tensors.items()
        for part in (value if isinstance(value, (list, tuple)) else [value])
        if isinstance(part, Tensor) and part.is_floating_point() and part.numel()
    ]
    if not parts:
        return frozenset()
    # What is not finite makes a sum that is not; so may an overflow, which is looked at again.
    sums = torch.stack([part.sum().float() for _, part in parts]).cpu()
    suspects = [parts[i] for i in (~torch.isfinite(sums)).nonzero().squeeze(1).tolist()]
    return frozenset(node for node, part in suspects if _spoils(node, part))


def _spoils(node: fx.Node, value: Tensor) -> bool:
    if torch.isfinite(value).all():
        return False
    masked = all(user.target in SOFTMAXES for user in users(node))
    return not masked or bool((value.isnan() | (value == torch.inf)).any())


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
