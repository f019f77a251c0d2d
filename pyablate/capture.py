"""From a model to a graph: ``torch.export`` with the sites marked, batch norm folded.

The graph is torch.fx over ATen operators, evaluated here node by node so that the engine can
choose what to keep of the clean run and carry differences instead of values through the rest.
"""

from __future__ import annotations

import functools
import io
import logging
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind, OutputKind

from pyablate.layers import Site, evaluation, hooked
from pyablate.turns import a_moment

logger = logging.getLogger("pyablate")
aten = torch.ops.aten


@torch.library.custom_op("pyablate::site", mutates_args=())
def mark(x: Tensor, name: str, call: int) -> Tensor:
    """Identity that leaves the name of a site in an exported graph."""
    return x.clone()


@mark.register_fake
def _(x: Tensor, name: str, call: int) -> Tensor:
    return torch.empty_like(x)


MARKER = torch.ops.pyablate.site.default
BATCH_NORM = aten._native_batch_norm_legit_no_training.default


class CaptureError(Exception):
    """The model cannot be captured; it runs by replay instead."""


@dataclass(frozen=True)
class BatchLayout:
    """Where a tensor keeps the images: ``shape[axis] == outer * images * inner``."""

    axis: int
    inner: int = 1
    outer: int = 1

    @property
    def plain(self) -> bool:
        """Whether the tensor has exactly one row per image, first."""
        return self == BatchLayout(0)

    def pick(self, x: Tensor, image: Tensor) -> Tensor:
        """Gather images: the batch becomes ``len(image)`` long."""
        if self.inner == self.outer == 1:
            return x.index_select(self.axis, image)
        split: Tensor = x.unflatten(self.axis, (self.outer, -1, self.inner))
        return split.index_select(self.axis + 1, image).flatten(self.axis, self.axis + 2)


@dataclass
class Graph:
    """A captured network.

    Attributes
    ----------
    graph : fx.Graph
        ATen operators; one placeholder is the images, the others are constants.
    images, logits : fx.Node
        Input and output.
    constants : dict
        Values of the other placeholders.
    layout : dict
        Where each tensor keeps its images; a list for a node that holds several.
    markers : list of fx.Node
        One per (site, call) in execution order.
    """

    graph: fx.Graph
    images: fx.Node
    logits: fx.Node
    constants: dict[fx.Node, Tensor]
    symbol: Any
    layout: dict[fx.Node, Any] = field(default_factory=dict)
    markers: list[fx.Node] = field(default_factory=list)
    _linear: dict[Any, tuple[int, int] | None] = field(default_factory=dict, repr=False)

    def run(self, images: Tensor, keep: Iterable[fx.Node]) -> dict[fx.Node, Any]:
        """Compute ``keep`` for a batch of images; other tensors are freed after their last use."""
        wanted = set(keep)
        values: dict[fx.Node, Any] = {self.images: images}
        uses = {node: len(node.users) for node in self.graph.nodes}
        for node in self.graph.nodes:
            if node.op != "call_function":
                continue
            values[node] = self.evaluate(node, values.__getitem__, len(images))
            for source in node.all_input_nodes:
                uses[source] -= 1
                if uses[source] == 0 and source not in wanted:
                    values.pop(source, None)
        return {node: values[node] for node in wanted}

    def evaluate(self, node: fx.Node, value: Callable[[fx.Node], Any], rows: int) -> Any:
        """Apply a node's operator; ``value`` gives its tensors, for a batch of ``rows``."""

        def resolve(source: fx.Node) -> Any:
            if source in self.constants:
                return self.constants[source]
            size = self.size(source, rows)
            return value(source) if size is None else size

        symbolic = self.size(node, rows)
        if symbolic is not None:
            return symbolic
        args = fx.node.map_arg(node.args, resolve)
        kwargs = fx.node.map_arg(node.kwargs, resolve)
        return function(node)(*args, **kwargs)

    def size(self, node: fx.Node, rows: int) -> int | None:
        """Value of a node that is a size (it depends on the number of rows only), else None."""
        meta = node.meta.get("val")
        if isinstance(meta, torch.SymInt):
            return self._count(meta, rows)
        return None

    def _count(self, size: Any, rows: int) -> int:
        """Value of a size for a batch of ``rows``; linear ones, nearly all, without sympy."""
        if not _is_symbolic(size):
            return int(size)
        expr = size.node.expr
        if expr not in self._linear:
            one, two, *more = (int(expr.subs(self.symbol, n)) for n in (1, 2, 7, 96, 1001))
            step = two - one
            straight = more == [one + n * step for n in (6, 95, 1000)]
            self._linear[expr] = (step, one - step) if straight else None
        line = self._linear[expr]
        return int(expr.subs(self.symbol, rows)) if line is None else line[0] * rows + line[1]

    def shape(self, node: fx.Node, rows: int) -> list[int]:
        """Shape of a node's tensor for a batch of ``rows``; empty where it holds no tensor."""
        meta = node.meta.get("val")
        sizes: Sequence[Any] = meta.shape if isinstance(meta, Tensor) else ()
        return [self._count(size, rows) for size in sizes]

    def elements(self, node: fx.Node) -> int:
        """Elements of a node's tensor for one image; 1 where it holds no single tensor."""
        return math.prod(self.shape(node, 1))

    @property
    def widest(self) -> int:
        """Elements per image of the largest tensor that depends on the images."""
        nodes = (node for node in self.graph.nodes if node not in self.constants)
        return max(self.elements(node) for node in nodes)

    def constant(self, node: fx.Node, index: int) -> Tensor | None:
        """Value of an argument of a node that is a weight, else None."""
        argument = node.args[index] if index < len(node.args) else None
        return self.constants.get(argument) if isinstance(argument, fx.Node) else None

    def pick(self, node: fx.Node, value: Any, image: Tensor) -> Any:
        """Gather images from a node's value; what does not depend on images stays as it is."""
        layout = self.layout.get(node)
        if isinstance(value, (list, tuple)):
            layouts = layout if isinstance(layout, list) else [layout] * len(value)
            return [_pick(one, item, image) for one, item in zip(layouts, value, strict=True)]
        return _pick(layout, value, image)

    def joins(self, node: fx.Node) -> bool:
        """Whether a node's values for parts of a batch can be joined to that of the whole."""
        layout = self.layout.get(node)
        layouts = layout if isinstance(layout, list) else [layout]
        return all(one is None or (one.outer == 1 and one.inner == 1) for one in layouts)

    def join(self, node: fx.Node, parts: Sequence[Any]) -> Any:
        """Value of a node for a batch, from those for its parts, where :meth:`joins` allows it."""
        layout = self.layout.get(node)
        if isinstance(parts[0], (list, tuple)):
            layouts = layout if isinstance(layout, list) else [layout] * len(parts[0])
            items = zip(layouts, zip(*parts, strict=True), strict=True)
            return [_join(one, item) for one, item in items]
        return _join(layout, parts)

    def after(self, starts: Sequence[fx.Node]) -> list[fx.Node]:
        """Nodes whose value can change when the values of ``starts`` do, in order."""
        changed = set(starts)
        for node in self.graph.nodes:
            touched = any(source in changed for source in node.all_input_nodes)
            if node.op == "call_function" and touched and self.size(node, 1) is None:
                changed.add(node)
        return [node for node in self.graph.nodes if node in changed]


def operands(node: fx.Node) -> list[fx.Node]:
    """Tensor arguments of a node, by position; for operators that take nothing else there."""
    return [argument for argument in node.args if isinstance(argument, fx.Node)]


def settings(node: fx.Node, start: int, *defaults: Any) -> list[Any]:
    """Return positional arguments of a node from ``start`` on, defaults where they end."""
    given = list(node.args[start:])
    return [*given, *defaults[len(given) :]]


def function(node: fx.Node) -> Callable[..., Any]:
    """Return what to call for a node; views become reshapes, since layouts here may differ."""
    if node.target in (aten.view.default, aten._unsafe_view.default):
        return aten.reshape.default
    if node.target is MARKER:
        return _identity
    if node.target is aten.squeeze.default:  # which would take a batch of one for an axis to drop
        shape = node.all_input_nodes[0].meta["val"].shape
        ones = [a for a, size in enumerate(shape) if not _is_symbolic(size) and size == 1]
        return functools.partial(_squeeze, dims=ones)
    return cast(Callable[..., Any], node.target)


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
    pair = _two_images(sample)
    program = _export(model, pair, sites)
    graph = _read(program)
    graph.layout = _layouts(graph, pair)
    if fold:
        _fold_batch_norm(graph)
    _fold_padding(graph)
    _channels_last(graph)
    return graph


def _export(model: nn.Module, pair: Tensor, sites: Sequence[Site]) -> torch.export.ExportedProgram:
    def change(site: Site, call: int, output: Tensor) -> Tensor:
        return cast(Tensor, mark(output, site.name, call))

    with a_moment(), _quiet(), evaluation(model), hooked(model, sites, change):
        try:
            program = torch.export.export(
                model, (pair,), dynamic_shapes=({0: Dim.AUTO},), strict=False
            )
            return cast(torch.export.ExportedProgram, program.run_decompositions({}))
        except Exception as error:  # torch.export raises many types; each means the same here
            reason = str(error).strip().splitlines()
            raise CaptureError(f"torch.export: {reason[0] if reason else error!r}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's deprecations and its report of a failed export: ours says it in one line."""
    loggers = [logging.getLogger(f"torch.{name}") for name in ("export", "fx.experimental")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.CRITICAL)
    try:
        # torch writes the graph of a failed export straight to standard error
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()) as said:
            warnings.simplefilter("ignore")
            yield
        logger.debug("torch.export: %s", said.getvalue())
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


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
    if not _is_symbolic(size):
        raise CaptureError("the batch size is fixed in the exported graph")
    _drop_assertions(program.graph)
    program.graph.eliminate_dead_code()
    return Graph(
        graph=program.graph,
        images=inputs[0],
        logits=outputs[0],
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
            found[node] = _layout(graph, node, metas, before, after, swap)
        else:
            items = zip(metas, before, after, strict=True)
            found[node] = [_layout(graph, node, *item, swap) for item in items]
    return found


def _layout(
    graph: Graph, node: fx.Node, meta: Tensor, before: Tensor, after: Tensor, swap: Tensor
) -> BatchLayout | None:
    candidates: list[BatchLayout | None] = list(_candidates(meta, graph.symbol)) or [None]
    for layout in candidates:
        straight = _pick(layout, before, swap)
        if torch.allclose(straight, after, rtol=1e-3, atol=1e-5, equal_nan=True):
            return layout
    raise CaptureError(f"{node.name} ({node.target}) mixes images")


def _candidates(meta: Tensor, symbol: Any) -> Iterator[BatchLayout]:
    """Ways in which the symbolic sizes of a tensor can hold one batch axis."""
    for axis, size in enumerate(meta.shape):
        factor = cast(torch.SymInt, size).node.expr / symbol if _is_symbolic(size) else None
        if factor is not None and factor.is_Integer:
            for outer in range(1, int(factor) + 1):
                if int(factor) % outer == 0:
                    yield BatchLayout(axis, inner=int(factor) // outer, outer=outer)


def _pick(layout: BatchLayout | None, value: Tensor, image: Tensor) -> Tensor:
    return value if layout is None else layout.pick(value, image)


def _join(layout: BatchLayout | None, parts: Sequence[Any]) -> Any:
    return parts[0] if layout is None else torch.cat(list(parts), dim=layout.axis)


def _fold_batch_norm(graph: Graph) -> None:
    """Scale the filters of a convolution by the batch norm that alone reads it."""
    for node in list(graph.graph.nodes):
        if node.target is not BATCH_NORM:
            continue
        conv = node.args[0]
        value = next((user for user in node.users if user.target is operator.getitem), None)
        foldable = (
            value is not None
            and len(node.users) == 1
            and len(conv.users) == 1
            and conv.target in CONVOLUTIONS
            and conv.args[1] in graph.constants
            and (len(conv.args) < 3 or conv.args[2] is None or conv.args[2] in graph.constants)
        )
        if foldable:
            _fold(graph, conv, node)
            cast(fx.Node, value).replace_all_uses_with(conv)
            graph.graph.erase_node(cast(fx.Node, value))
            graph.graph.erase_node(node)


def _fold(graph: Graph, conv: fx.Node, norm: fx.Node) -> None:
    scale, shift = norm_scale(graph, norm)
    weight = graph.constants[cast(fx.Node, conv.args[1])]
    bias = conv.args[2] if len(conv.args) > 2 else None
    old = graph.constants[bias].double() if isinstance(bias, fx.Node) else 0.0
    folded = weight.double() * scale.reshape(-1, *[1] * (weight.ndim - 1))
    new_weight = _add_constant(graph, f"{conv.name}_folded_weight", folded.to(weight.dtype))
    new_bias = _add_constant(
        graph, f"{conv.name}_folded_bias", (old * scale + shift).to(weight.dtype)
    )
    conv.args = (conv.args[0], new_weight, new_bias, *conv.args[3:])


def _add_constant(graph: Graph, name: str, value: Tensor) -> fx.Node:
    with graph.graph.inserting_before(graph.images):
        node = graph.graph.placeholder(name)
    node.meta["val"] = graph.constants[node] = value
    return node


def _fold_padding(graph: Graph) -> None:
    """Let convolutions do the zero padding in front of them; networks from TensorFlow pad apart."""
    for pad in list(graph.graph.nodes):
        if pad.target not in PADS or not pads_with_zeros(pad):
            continue
        readers = list(pad.users)
        unpadded = [_unpadded(graph, conv, pad) for conv in readers]
        if not readers or None in unpadded:
            continue
        for conv, (weight, padding) in zip(readers, filter(None, unpadded), strict=True):
            filters = _add_constant(graph, f"{conv.name}_unpadded_weight", weight)
            bias, stride = settings(conv, 2, None, [1])[:2]
            conv.args = (pad.args[0], filters, bias, stride, padding, *conv.args[5:])
        graph.graph.erase_node(pad)


def _unpadded(graph: Graph, conv: fx.Node, pad: fx.Node) -> tuple[Tensor, list[int]] | None:
    """Give filters and symmetric padding with which a convolution needs no padded input.

    Padding that is wider behind than in front becomes symmetric with zeros in front of the filter.
    """
    margins = [int(m) for m in cast(list[int], pad.args[1])]
    weight = graph.constant(conv, 1) if conv.target is aten.conv2d.default else None
    if weight is None or len(margins) != 4 or min(margins) < 0 or conv.args[0] is not pad:
        return None
    stride, padding, dilation = settings(conv, 3, [1], [0], [1])[:3]
    if isinstance(padding, str):
        return None
    size = cast(fx.Node, pad.args[0]).meta["val"].shape[2:]
    symmetric, zeros = [], [0, 0, 0, 0]
    for i in (0, 1):
        own, step = (value[i % len(value)] for value in (padding, dilation))
        before, after = (m + own for m in margins[2 - 2 * i : 4 - 2 * i])
        width = max(before, after)
        shift, rest = divmod(width - before, step)
        reach = step * (weight.shape[2 + i] + shift - 1) + 1
        out = (int(size[i]) + 2 * width - reach) // stride[i % len(stride)] + 1
        if rest or out != int(conv.meta["val"].shape[2 + i]):
            return None
        symmetric.append(width)
        zeros[2 - 2 * i] = shift
    return (torch.nn.functional.pad(weight, zeros) if any(zeros) else weight), symmetric


def norm_scale(graph: Graph, norm: fx.Node) -> tuple[Tensor, Tensor]:
    """Float64 scale and shift per channel to which batch norm comes down in evaluation mode."""
    gamma, beta, mean, variance = (
        graph.constants[arg].double() if isinstance(arg, fx.Node) else None
        for arg in norm.args[1:5]
    )
    assert mean is not None
    assert variance is not None
    scale = torch.rsqrt(variance + cast(float, norm.args[6]))
    scale = scale if gamma is None else scale * gamma
    shift = -mean * scale
    return scale, shift if beta is None else shift + beta


def _channels_last(graph: Graph) -> None:
    """Give 4-D filters the layout in which convolutions need no reordering."""
    for node in graph.graph.nodes:
        if node.target in CONVOLUTIONS:
            weight = graph.constants.get(node.args[1])
            if weight is not None and weight.ndim == 4:
                last = weight.contiguous(memory_format=torch.channels_last)
                graph.constants[node.args[1]] = last


PADS = frozenset({aten.constant_pad_nd.default, aten.pad.default})


def pads_with_zeros(node: fx.Node) -> bool:
    """Whether a padding writes zeros, rather than another constant or copies."""
    if node.kwargs:
        return False
    if node.target is aten.constant_pad_nd.default:
        return not settings(node, 2, 0.0)[0]
    mode, value = settings(node, 2, "constant", None)[:2]
    return mode == "constant" and not value


CONVOLUTIONS = frozenset({aten.conv1d.default, aten.conv2d.default, aten.conv3d.default})


def _two_images(sample: Tensor) -> Tensor:
    """Two different images, noisy so that no tensor is 0 on both and keeps its secret."""
    pair = torch.stack([sample[0], sample[-1]])
    noise = torch.randn(pair.shape, generator=torch.Generator().manual_seed(0)).to(pair)
    return pair + (0.1 * pair.std() + 1e-3) * noise


def _is_symbolic(size: Any) -> bool:
    return isinstance(size, torch.SymInt)


def _squeeze(x: Tensor, dims: list[int]) -> Tensor:
    return cast(Tensor, aten.squeeze.dims(x, dims))


def _identity(x: Tensor, *_: Any) -> Tensor:
    return x
