"""Capture of a model as a graph by ``torch.export``, with the sites marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind, OutputKind

from pyablate._validation import first_line
from pyablate.network.batch_norm import fold_batch_norm
from pyablate.network.classifier import varied
from pyablate.network.exported import quiet_export
from pyablate.network.forward import two_images
from pyablate.network.graph import MARKER, BatchLayout, Graph, is_symbolic, mark, tensor
from pyablate.network.graph_passes import channels_last, fold_padding
from pyablate.network.hooks import Site, evaluation, hooked, without_recorders
from pyablate.runtime import interrupts


class CaptureError(Exception):
    """The model cannot be captured; it runs by replay instead."""


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
    graph = _read(_export(model, pair, sites))
    graph.layout = _layouts(graph, pair)
    if fold:
        fold_batch_norm(graph)
    fold_padding(graph)
    channels_last(graph)
    return graph


def _export(model: nn.Module, pair: Tensor, sites: Sequence[Site]) -> torch.export.ExportedProgram:
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
        try:
            program = torch.export.export(
                model, (pair,), dynamic_shapes=({0: Dim.AUTO},), strict=False
            )
            program = program.run_decompositions({})
        except Exception as error:  # torch.export raises many types; each means the same here
            raise CaptureError(f"torch.export: {first_line(error)}") from error
    if unseen:
        raise CaptureError(f"torch.export did not come by {', '.join(sorted(unseen))}")
    return cast(torch.export.ExportedProgram, program)


def _read(program: torch.export.ExportedProgram) -> Graph:
    constants: dict[fx.Node, Tensor] = {}
    inputs: list[fx.Node] = []
    held = {**program.constants, **program.state_dict}
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for spec in program.graph_signature.input_specs:
        node = placeholders[spec.arg.name]
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(node)
        else:
            value = held[cast(str, spec.target)]
            constants[node] = value.detach() if isinstance(value, Tensor) else value
    # A network that works in place on the images has their new values as an output besides.
    outputs = [
        node
        for node, spec in zip(
            cast(tuple[fx.Node, ...], program.graph.output_node().args[0]),
            program.graph_signature.output_specs,
            strict=True,
        )
        if spec.kind is not OutputKind.USER_INPUT_MUTATION
    ]
    if len(inputs) != 1 or len(outputs) != 1:
        raise CaptureError("the model takes or returns more than one tensor")
    size = inputs[0].meta["val"].shape[0]
    if not is_symbolic(size):
        raise CaptureError("the batch size is fixed in the exported graph")
    _drop_assertions(program.graph)
    program.graph.eliminate_dead_code()
    return Graph(
        graph=program.graph,
        images=inputs[0],
        logits=outputs[0],
        output=outputs[0],
        constants=constants,
        symbol=size.node.expr,
        markers=[node for node in program.graph.nodes if node.target is MARKER],
    )


def _drop_assertions(graph: fx.Graph) -> None:
    """Erase what computes nothing, such as the checks of dtypes that every ``.to()`` leaves."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and node.meta.get("val") is None:
            graph.erase_node(node)


def _layouts(graph: Graph, pair: Tensor) -> dict[fx.Node, Any]:
    """Find out where tensors keep their images: swap two, and see what swaps with them."""
    nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
    nodes = [node for node in nodes if graph.size(node, 1) is None]
    swap = torch.tensor([1, 0], device=pair.device)
    values, swapped = graph.run(pair, nodes), graph.run(pair[swap], nodes)
    found: dict[fx.Node, Any] = {graph.images: BatchLayout(0)}
    for node in nodes:
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
    raise CaptureError(f"{node.name} ({node.target}) mixes images")


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
