"""Capture of a model as a graph by ``torch.export``, with the sites marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from pyablate.network import any_batch
from pyablate.network.any_batch import CaptureError, Parts, line_of
from pyablate.network.batch_norm import fold_batch_norm
from pyablate.network.classifier import varied
from pyablate.network.exported import quiet_export
from pyablate.network.forward import two_images
from pyablate.network.graph import MARKER, Graph, aten, is_symbolic, mark, tensor
from pyablate.network.graph_passes import channels_last, fold_padding
from pyablate.network.hooks import Site, evaluation, hooked, without_recorders
from pyablate.network.layout import BatchLayout
from pyablate.runtime import interrupts

__all__ = ["CaptureError", "capture"]


@interrupts.remembered()
def capture(model: nn.Module, sample: Tensor, sites: Sequence[Site], *, fold: bool = True) -> Graph:
    """Export a model with its sites marked.

    Parameters
    ----------
    model : nn.Module
        The network; it is left as it was.
    sample : Tensor
        At least one image, ``[N, ...]``, on the model's device.
    sites : sequence of Site
        What to mark.
    fold : bool
        Whether batch norm goes into the filters of the convolution before it.

    Raises
    ------
    CaptureError
        ``torch.export`` fails, or the graph does something across images.
    """
    pair = _noisy(model, sample)
    parts = _export(model, pair, sites)
    graph = Graph(
        graph=parts.graph,
        images=parts.images,
        logits=parts.logits,
        output=parts.logits,
        constants=parts.constants,
        symbol=parts.images.meta["val"].shape[0].node.expr,
        markers=[node for node in parts.graph.nodes if node.target is MARKER],
    )
    graph.layout = _layouts(graph, pair)
    if fold:
        fold_batch_norm(graph)
    fold_padding(graph)
    channels_last(graph)
    return graph


def _export(model: nn.Module, pair: Tensor, sites: Sequence[Site]) -> Parts:
    unseen = {site.name for site in sites}

    def change(site: Site, call: int, output: Tensor) -> Tensor:
        unseen.discard(site.name)
        return cast(Tensor, mark(output, site.name, call))

    with (
        quiet_export(),
        evaluation(model),
        without_recorders(model, pair),  # which would be shown tensors without values
        hooked(model, sites, change),
    ):
        parts = any_batch.export(model, pair)
    if unseen:
        raise CaptureError(f"torch.export did not come by {', '.join(sorted(unseen))}")
    return parts


def _layouts(graph: Graph, pair: Tensor) -> dict[fx.Node, Any]:
    """Find out where tensors keep their images: swap two, repeat one, and see what follows."""
    nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
    nodes = [node for node in nodes if graph.size(node, 1) is None]
    swap = torch.tensor([1, 0, 1], device=pair.device)
    values, swapped = graph.run(pair, nodes), graph.run(pair[swap], nodes)
    found: dict[fx.Node, Any] = {graph.images: BatchLayout(0)}
    varying = set(graph.after([graph.images]))
    graph.numbering.update(node for node in nodes if _numbers(node, varying))
    for node in nodes:
        if node in graph.numbering:
            continue
        metas, before, after = node.meta["val"], values[node], swapped[node]
        if isinstance(metas, Tensor):
            found[node] = _layout(graph, node, metas, tensor(before), tensor(after), swap)
        else:
            items = zip(metas, before, after, strict=True)
            found[node] = [_layout(graph, node, *item, swap) for item in items]
    return found


def _layout(
    graph: Graph, node: fx.Node, meta: Tensor, before: Tensor, after: Tensor, swap: Tensor
) -> BatchLayout | None:
    candidates: list[BatchLayout | None] = list(_candidates(meta, graph.symbol)) or [None]
    for layout in candidates:
        straight = before if layout is None else layout.pick(before, swap)
        # Some fake kernels promise other shapes than the real ones give (LSTM in torch 2.6).
        if straight.shape != after.shape:
            continue
        if torch.allclose(straight, after, rtol=1e-3, atol=1e-5, equal_nan=True):
            return layout
    draws = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    what = "draws random numbers" if draws else "mixes images or counts them"
    raise CaptureError(f"{node.name} ({node.target}) {what}{line_of(node)}")


def _numbers(node: fx.Node, varying: set[fx.Node]) -> bool:
    """Whether a node numbers the images, so that something can be taken of each."""
    sizes = getattr(node.meta["val"], "shape", ())
    return (
        node not in varying
        and any(map(is_symbolic, sizes))
        and all(
            _numbers(user, varying)
            or (user.target is aten.index.Tensor and node is not user.args[0])
            for user in node.users
        )
    )


def _candidates(meta: Tensor, symbol: Any) -> Iterator[BatchLayout]:
    """Ways in which the symbolic sizes of a tensor can hold one batch axis."""
    for axis, size in enumerate(meta.shape):
        factor = cast(torch.SymInt, size).node.expr / symbol if is_symbolic(size) else None
        if factor is not None and factor.is_Integer:
            for outer in range(1, int(factor) + 1):
                if int(factor) % outer == 0:
                    yield BatchLayout(axis, inner=int(factor) // outer, outer=outer)


def _noisy(model: nn.Module, sample: Tensor) -> Tensor:
    """Two images that differ, so that no tensor is the same on both."""
    pair = two_images(sample)
    noise = torch.randn(pair.shape, generator=torch.Generator().manual_seed(0)).to(pair)
    differs = (sample != sample[0]).int().argmax(dim=0, keepdim=True)  # 0 where none does
    others = torch.cat([sample[:1], sample.gather(0, differs)])  # of integers, which stay whole
    return varied(model, pair, lambda x: x + (0.1 * x.std() + 1e-3) * noise, others)
