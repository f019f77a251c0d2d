"""Export for batches of any size, also of networks that make a plain number of the batch size.

``len(x)``, ``int(x.shape[0])`` or a loop over the images fix the size for which ``torch.export``
traces. Then the network is traced for several fixed sizes, and what differs between the traces is
written as a function of the size. Where that is the operators themselves, as of a loop, one image
is traced instead and mapped over the batch.
"""

from __future__ import annotations

import operator
import re
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from pyablate._validation import first_line
from pyablate.network.graph import MARKER, aten, function, is_symbolic
from pyablate.network.graph_passes import PADDED_BY_NUMBER

PROBED = (3, 5, 9, 17, 33, 65, 129, 257, 1025, 1 << 14)
"""Sizes at which the assumptions of a trace are looked at."""

MOST = 65
"""Size up to which a network is traced: a loop over the images is written out."""


class CaptureError(Exception):
    """The model cannot be captured; it runs by replay instead."""


@dataclass(frozen=True)
class Parts:
    """What an exported program consists of.

    Attributes
    ----------
    graph : fx.Graph
        Without checks, and without what nobody reads.
    images, logits : fx.Node
        Input and output.
    constants : dict
        Values of the other placeholders.
    """

    graph: fx.Graph
    images: fx.Node
    logits: fx.Node
    constants: dict[fx.Node, Any]


def export(model: nn.Module, pair: Tensor) -> Parts:
    """Export a network for any number of images.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode.
    pair : Tensor
        Two images.

    Raises
    ------
    CaptureError
        ``torch.export`` fails, or what it gives holds for some batch sizes only.
    """
    parts = _dynamic(_Plain(model), pair)
    unfit = _unfit_size(parts)
    if unfit is None:
        return parts
    reasons = []
    for form in (_Plain, _OneByOne):
        try:
            parts = _dynamic(_generalised(form(model), pair, unfit), pair)
            still = _unfit_size(parts)
            if still is None:
                return parts
            reasons.append(CaptureError(f"its graph does not hold for {still} images"))
        except CaptureError as error:
            reasons.append(error)
    raise reasons[0]


class _Plain(nn.Module):
    """A network by what it is called with, however its own forward pass is declared."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.model(images))


class _OneByOne(_Plain):
    """A network on each image by itself, in which a loop over the images has one round."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.vmap(self._one, randomness="same")(images)

    def _one(self, image: Tensor) -> Tensor:
        return cast(Tensor, self.model(image.unsqueeze(0)).squeeze(0))


class _Traced(nn.Module):
    """A trace as a module again, to be exported for any batch size."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        for node, value in parts.constants.items():
            self.register_buffer(node.name, value)

    def forward(self, images: Tensor) -> Tensor:
        parts = self.parts
        values = {node: getattr(self, node.name) for node in parts.constants}
        values[parts.images] = images
        for node in parts.graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                # A mark has to stay one.
                call = node.target if node.target is MARKER else function(node)
                values[node] = call(*args, **kwargs)
        return cast(Tensor, values[parts.logits])


def _dynamic(model: nn.Module, pair: Tensor) -> Parts:
    return _exported(model, pair, dynamic_shapes=({0: Dim.AUTO},))


def _exported(model: nn.Module, images: Tensor, **options: Any) -> Parts:
    try:
        program = torch.export.export(model, (images,), strict=False, **options)
        return _parts(program.run_decompositions(PADDED_BY_NUMBER))
    except CaptureError:
        raise
    except Exception as error:  # torch.export raises many types; each means the same here
        where = _users_line(traceback.extract_tb(error.__traceback__))
        raise CaptureError(f"torch.export: {first_line(error)}{where}") from error


def _parts(program: ExportedProgram) -> Parts:
    constants: dict[fx.Node, Any] = {}
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
    _check_numbers(program.graph, inputs[0])
    _drop_assertions(program.graph)
    program.graph.eliminate_dead_code()
    return Parts(program.graph, inputs[0], outputs[0], constants)


def _check_numbers(graph: fx.Graph, images: fx.Node) -> None:
    """Refuse sizes and numbers that follow from what the images show."""
    size = images.meta["val"].shape[0]
    known = size.node.expr.free_symbols if is_symbolic(size) else set()
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            expression = value.node.expr
            if expression.free_symbols - known:
                raise CaptureError(f"a tensor's value becomes a number of Python{line_of(node)}")


def _drop_assertions(graph: fx.Graph) -> None:
    """Erase what computes nothing, such as the checks of dtypes that every ``.to()`` leaves."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and node.meta.get("val") is None:
            graph.erase_node(node)


def _unfit_size(parts: Parts) -> int | None:
    """Find a number of images for which a graph does not hold, if there is one."""
    size = parts.images.meta["val"].shape[0]
    if not is_symbolic(size) or not size.node.expr.is_Symbol:
        return PROBED[0]
    symbol, guards = size.node.expr, [one.expr for one in size.node.shape_env.guards]
    for images in PROBED:
        if False in [one.subs(symbol, images) for one in guards]:
            return images
    return None


def _generalised(model: nn.Module, pair: Tensor, unfit: int) -> nn.Module:
    """Trace a network for several fixed batch sizes; what differs becomes a function of the size.

    ``unfit`` is a size for which the trace in hand does not hold.
    """
    sizes = sorted({2, 3, unfit if 3 < unfit <= MOST else 5})
    traces = [_exported(model, pair[torch.arange(size) % 2]) for size in sizes]
    first = traces[0]
    _check_constants(traces)
    with first.graph.inserting_after(first.images):
        count = first.graph.call_function(aten.sym_size.int, (first.images, 0))
    written = _Sizes(first.graph, count, sizes)
    partners: dict[fx.Node, tuple[fx.Node, ...]] = {}
    # The number of images, which is in the first trace already, has no partners.
    others = [trace.graph.nodes for trace in traces[1:]]
    nodes = [node for node in first.graph.nodes if node is not count]
    for aligned in zip_longest(nodes, *others):
        _check_operators(aligned)
        partners[aligned[0]] = aligned[1:]
        if aligned[0].op == "call_function":
            written.rewrite(aligned, partners)
    return _Traced(first)


def _check_constants(traces: Sequence[Parts]) -> None:
    for nodes in zip_longest(*(trace.constants for trace in traces)):
        values = [trace.constants.get(node) for trace, node in zip(traces, nodes, strict=True)]
        if not all(_same(values[0], value) for value in values[1:]):
            reader = next((user for node in nodes if node for user in node.users), None)
            _refuse("a constant depends", reader)


def _same(first: object, other: object) -> bool:
    if isinstance(first, Tensor) and isinstance(other, Tensor):
        same = first.data_ptr() == other.data_ptr() and first.numel() > 0
        return first.shape == other.shape and (same or first.equal(other))
    return first == other


def _check_operators(aligned: Sequence[fx.Node | None]) -> None:
    kinds = {
        (node.op, node.target if node.op == "call_function" else "") if node else None
        for node in aligned
    }
    if len(kinds) > 1:  # the last trace has most rounds of a loop
        _refuse("what it computes depends", aligned[-1] or aligned[0])


def _refuse(what: str, node: fx.Node | None) -> NoReturn:
    where = "" if node is None else line_of(node)
    raise CaptureError(f"{what} on the number of images{where}")


@dataclass(frozen=True)
class _Sizes:
    """Rewrites numbers that follow from the batch size."""

    graph: fx.Graph
    count: fx.Node
    sizes: Sequence[int]

    def rewrite(
        self, aligned: Sequence[fx.Node], partners: dict[fx.Node, tuple[fx.Node, ...]]
    ) -> None:
        """Make the arguments of the first node what they are in all traces."""
        node = aligned[0]
        flat = [pytree.tree_flatten((one.args, one.kwargs)) for one in aligned]
        if any(spec != flat[0][1] for _, spec in flat[1:]):
            _refuse("what it computes depends", aligned[-1])
        with self.graph.inserting_before(node):
            leaves = [
                self._leaf(values, node, partners)
                for values in zip(*(f[0] for f in flat), strict=True)
            ]
        node.args, node.kwargs = pytree.tree_unflatten(leaves, flat[0][1])

    def _leaf(
        self,
        values: tuple[Any, ...],
        node: fx.Node,
        partners: dict[fx.Node, tuple[fx.Node, ...]],
    ) -> Any:
        first = values[0]
        if isinstance(first, fx.Node):
            if partners[first] != values[1:]:
                _refuse("what it computes depends", node)
            return first
        if all(value == first or value != value for value in values):
            return first
        if any(type(value) is not int for value in values):
            _refuse("a number depends", node)
        step, rest = divmod(values[1] - first, self.sizes[1] - self.sizes[0])
        start = first - step * self.sizes[0]
        if rest or any(v != start + step * n for v, n in zip(values, self.sizes, strict=True)):
            _refuse("a number depends", node)
        scaled = self.graph.call_function(operator.mul, (self.count, step))
        return self.graph.call_function(operator.add, (scaled, start))


def line_of(node: fx.Node) -> str:
    """Where the user's code made a node, `` at FILE:LINE``."""
    found = re.findall(r'File "(.+)", line (\d+)', node.meta.get("stack_trace") or "")
    return _at((file, int(line)) for file, line in found)


def _users_line(frames: traceback.StackSummary) -> str:
    return _at((frame.filename, frame.lineno or 0) for frame in frames)


_NOT_THE_USERS = (Path(torch.__file__).parent, Path(__file__).parent.parent)


def _at(frames: Iterable[tuple[str, int]]) -> str:
    """Name the innermost line of code that is neither torch's nor ours, `` at FILE:LINE``."""
    own = [
        f" at {file}:{line}"
        for file, line in frames
        if not any(Path(file).is_relative_to(folder) for folder in _NOT_THE_USERS)
    ]
    return own[-1] if own else ""
