"""The clean run of one image batch: the one forward pass that all ablations share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from pyablate.data.dataset import Batch
from pyablate.engine.clean import Clean
from pyablate.engine.discontinuous import may_be_infinite
from pyablate.engine.float64 import Exact
from pyablate.engine.replay import Replay, decision
from pyablate.engine.rounding import Rounding, outlying
from pyablate.network import near_tie
from pyablate.network.forward import forward
from pyablate.network.graph import CONVOLUTIONS, Graph, Value, tensor
from pyablate.runtime.chunking import CLEAN_SLICE
from pyablate.runtime.host_to_device import sent

FIRST, LATER = 8, 4
"""Images of the first batch, and of each later one, that are watched: their logits are computed in
float64 as well."""


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
    images = laid_out(graph, batch.images)
    wanted, watch = {graph.logits, *keep}, _Watch()
    with torch.no_grad():
        size = _images_at_a_time(graph, images, wanted)
        if len(images) > size and all(graph.joins(node) for node in wanted):
            parts = [graph.run(some, wanted, watch.look) for some in images.split(size)]
            # Each part is let go as soon as it is joined: all of them twice would not fit.
            tensors = {node: graph.join(node, [p.pop(node) for p in parts]) for node in wanted}
        else:
            tensors = graph.run(images, wanted, watch.look)
    return _clean(
        tensors,
        tensor(tensors[graph.logits]),
        exact,
        batch,
        rounding,
        trusted=trusted,
        irregular=watch.irregular,
    )


def laid_out(graph: Graph, images: Tensor) -> Tensor:
    """Lay images out as the convolutions of a network run fastest: channels last."""
    convolves = any(node.target in CONVOLUTIONS for node in graph.graph.nodes)
    if images.ndim != 4 or not convolves:
        return images
    return images.contiguous(memory_format=torch.channels_last)


def _images_at_a_time(graph: Graph, images: Tensor, wanted: Iterable[fx.Node]) -> int:
    """Images whose widest tensor stays in a processor's caches, never fewer than 16.

    All of them where more is kept than that, since joining the parts copies it.
    """
    widest = graph.widest
    kept = sum(graph.elements(node) for node in wanted)
    if images.device.type != "cpu" or kept >= widest:
        return len(images)
    return max(16, CLEAN_SLICE // (widest * images.element_size()))


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
    tensors: dict[fx.Node, Value],
    logits: Tensor,
    exact: Exact | Replay,
    batch: Batch,
    rounding: Rounding,
    *,
    trusted: bool,
    irregular: frozenset[fx.Node] = frozenset(),
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
    if irregular or not trusted:
        close.fill_(True)
    prediction = _predict(logits, close, exact, batch)
    return Clean(tensors, logits, prediction, tolerance, rounding, watched, irregular)


@dataclass(eq=False)
class _Watch:
    """Looks for NaN and infinity wherever they may come about, without a wait for the device."""

    sums: list[tuple[fx.Node, Tensor]] = field(default_factory=list)

    def look(self, node: fx.Node, value: Value) -> None:
        """Take the sum of what an operator gives: finite only if all of it is."""
        if isinstance(value, Tensor) and may_be_infinite(node):
            self.sums.append((node, value.sum().float()))

    @property
    def irregular(self) -> frozenset[fx.Node]:
        """Nodes that gave anything else than finite numbers."""
        if not self.sums:
            return frozenset()
        finite = torch.isfinite(torch.stack([total for _, total in self.sums])).tolist()
        return frozenset(
            node for (node, _), good in zip(self.sums, finite, strict=True) if not good
        )


def close_calls(logits: Tensor, tolerance: Tensor) -> Tensor:
    """Bool ``[N]``: rows whose top-2 margin is within ``tolerance``."""
    return near_tie.margin(logits) <= tolerance


def _predict(logits: Tensor, close: Tensor, exact: Exact | Replay, batch: Batch) -> Tensor:
    """Argmax, with close calls (bool ``[N]`` on the CPU) decided by exact replay."""
    prediction = logits.argmax(dim=1).to(torch.int32)
    open_ = close.nonzero().squeeze(1)
    if len(open_):
        decided = decision(exact.logits(batch, None, open_, open_)).prediction
        prediction[sent(open_, logits.device)] = sent(decided, logits.device)
    return prediction
