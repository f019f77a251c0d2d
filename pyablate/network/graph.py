"""A captured network: ATen operators, evaluated node by node.

The engine chooses what to keep of the clean run, and carries differences instead of values through
the rest.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, fx

from pyablate import ops
from pyablate.network.layout import BatchLayout
from pyablate.ops.dispatch import backend
from pyablate.runtime.chunking import portions

aten = torch.ops.aten


@torch.library.custom_op("pyablate::site", mutates_args=())
def mark(x: Tensor, name: str, call: int) -> Tensor:
    """Identity that leaves the name of a site in an exported graph."""
    return x.clone()


@mark.register_fake
def _(x: Tensor, name: str, call: int) -> Tensor:
    return torch.empty_like(x)


@mark.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], x: Tensor, name: str, call: int) -> tuple[Tensor, int]:
    """Let a mark on one image, as a batch of one, stand for that on all of them."""
    rows = x.movedim(in_dims[0], 0)
    return mark(rows.flatten(0, 1), name, call).unflatten(0, rows.shape[:2]), 0


MARKER = torch.ops.pyablate.site.default
BATCH_NORM = aten._native_batch_norm_legit_no_training.default
CONVOLUTIONS = frozenset({aten.conv1d.default, aten.conv2d.default, aten.conv3d.default})
LINEAR_MAPS = CONVOLUTIONS | {aten.linear.default}
SOFTMAXES: frozenset[Any] = frozenset({aten.softmax.int, aten._softmax.default})
LOG_SOFTMAXES: frozenset[Any] = frozenset({aten.log_softmax.int, aten._log_softmax.default})
PADS = frozenset({aten.constant_pad_nd.default, aten.pad.default})

Value = Tensor | list[Tensor] | tuple[Tensor, ...]
"""What a node gives: a tensor, or several of an operator with several results."""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Graph:
    """A captured network.

    Attributes
    ----------
    graph : fx.Graph
        ATen operators; one placeholder is the images, the others are constants.
    images, logits : fx.Node
        Input, and what predictions are taken from.
    output : fx.Node
        What the model returns: the logits, or a softmax of them.
    constants : dict
        Values of the other placeholders.
    unrounded : dict
        The same in float64 where they were computed, as filters are into which batch norm went.
    layout : dict
        Where each tensor keeps its images; a list for a node that holds several.
    markers : list of fx.Node
        One per (site, call) in execution order.
    numbering : set of fx.Node
        What counts the images, ``arange(len(x))`` as an index: it has no rows to gather.
    """

    graph: fx.Graph
    images: fx.Node
    logits: fx.Node
    output: fx.Node
    constants: dict[fx.Node, Tensor]
    symbol: Any
    unrounded: dict[fx.Node, Tensor] = field(default_factory=dict)
    layout: dict[fx.Node, Any] = field(default_factory=dict)
    markers: list[fx.Node] = field(default_factory=list)
    numbering: set[fx.Node] = field(default_factory=set)
    _linear: dict[Any, tuple[int, int] | None] = field(default_factory=dict, repr=False)
    _prepared: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def prepared(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what ``make`` gives, made once: weights in another precision or layout.

        Not shared with a copy of this graph, whose constants may be others.
        """
        if key not in self._prepared:
            self._prepared[key] = make()
        return cast(T, self._prepared[key])

    def run(
        self,
        images: Tensor,
        keep: Iterable[fx.Node],
        look: Callable[[fx.Node, Any], None] | None = None,
    ) -> dict[fx.Node, Value]:
        """Compute ``keep`` for a batch of images; other tensors are freed after their last use.

        ``look`` is shown every node with its value.
        """
        wanted = set(keep)
        values: dict[fx.Node, Any] = {self.images: images}
        uses = {node: len(node.users) for node in self.graph.nodes}
        for node in self.graph.nodes:
            if node.op != "call_function":
                continue
            values[node] = self._compute(node, values, len(images))
            if look is not None:
                look(node, values[node])
            for source in node.all_input_nodes:
                uses[source] -= 1
                if uses[source] == 0 and source not in wanted:
                    values.pop(source, None)
        return {node: values[node] for node in wanted}

    def _compute(self, node: fx.Node, values: Mapping[fx.Node, Any], rows: int) -> Any:
        """Evaluate a node, where that would take long in several calls."""
        weight = self.constant(node, 1) if node.target in LINEAR_MAPS else None
        inputs = [source for source in node.all_input_nodes if source not in self.constants]
        if weight is None or tuple(inputs) != node.args[:1]:  # a bias may have a row per image too
            return self.evaluate(node, values.__getitem__, rows)
        source = inputs[0]
        count = portions(2 * math.prod(self.shape(node, rows)) * weight[0].numel(), weight)
        parts = [
            self.evaluate(node, {**values, source: part}.__getitem__, rows)
            for part in values[source].chunk(count)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

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

    def size(self, node: fx.Node, rows: int) -> int | float | bool | None:
        """Value of a node that is a number (it follows from the number of rows only), else None."""
        meta = node.meta.get("val")
        if isinstance(meta, torch.SymInt):
            return self._count(meta, rows)
        if isinstance(meta, (torch.SymFloat, torch.SymBool)):
            value = meta.node.expr.subs(self.symbol, rows)
            return float(value) if isinstance(meta, torch.SymFloat) else bool(value)
        return None

    def _count(self, size: Any, rows: int) -> int:
        """Value of a size for a batch of ``rows``; linear ones, nearly all, without sympy."""
        if not is_symbolic(size):
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

    @property
    def half(self) -> bool:
        """Whether anything that depends on the images is in half precision."""
        values = (node.meta.get("val") for node in self.graph.nodes if node not in self.constants)
        halves = (torch.float16, torch.bfloat16)
        return any(isinstance(value, Tensor) and value.dtype in halves for value in values)

    def constant(self, node: fx.Node, index: int) -> Tensor | None:
        """Value of an argument of a node that is a weight, else None."""
        argument = node.args[index] if index < len(node.args) else None
        return self.constants.get(argument) if isinstance(argument, fx.Node) else None

    def in_double(self, node: fx.Node) -> Tensor:
        """Value of a placeholder in float64, as exact as it is known."""
        return self.unrounded.get(node, self.constants[node]).double()

    def pick(self, node: fx.Node, value: Value, image: Tensor) -> Value:
        """Gather images from a node's value; what does not depend on images stays as it is."""
        if node in self.numbering:
            return self._number(node, len(image))
        layout = self.layout.get(node)
        if isinstance(value, (list, tuple)):
            layouts = layout if isinstance(layout, list) else [layout] * len(value)
            return [_pick(one, item, image) for one, item in zip(layouts, value, strict=True)]
        return _pick(layout, value, image)

    def _number(self, node: fx.Node, rows: int) -> Value:
        return cast(Value, self.evaluate(node, lambda one: self._number(one, rows), rows))

    def joins(self, node: fx.Node) -> bool:
        """Whether a node's values for parts of a batch can be joined to that of the whole."""
        layout = self.layout.get(node)
        layouts = layout if isinstance(layout, list) else [layout]
        return all(one is None or (one.outer == 1 and one.inner == 1) for one in layouts)

    def join(self, node: fx.Node, parts: Sequence[Value]) -> Value:
        """Value of a node for a batch, from those for its parts, where :meth:`joins` allows it."""
        layout = self.layout.get(node)
        if isinstance(parts[0], (list, tuple)):
            layouts = layout if isinstance(layout, list) else [layout] * len(parts[0])
            items = zip(layouts, zip(*parts, strict=True), strict=True)
            return [_join(one, item) for one, item in items]
        return _join(layout, [tensor(part) for part in parts])

    def after(self, starts: Sequence[fx.Node]) -> list[fx.Node]:
        """Nodes on the way to the logits whose values change with those of ``starts``, in order."""
        changed = set(starts)
        reaching = self._reaching
        for node in self.graph.nodes:
            touched = any(source in changed for source in node.all_input_nodes)
            if node.op == "call_function" and touched and self.size(node, 1) is None:
                changed.add(node)
        return [node for node in self.graph.nodes if node in changed and node in reaching]

    @property
    def _reaching(self) -> set[fx.Node]:
        """Nodes that the logits follow from."""
        found = {self.logits}
        for node in reversed(self.graph.nodes):
            if node in found:
                found.update(node.all_input_nodes)
        return found

    def before_softmax(self) -> Graph:
        """Return the same network, deciding by what goes into a softmax at its end.

        The largest is the same, and a softmax of large numbers is 1 or 0 but for nothing.
        """
        node = self.logits
        final = SOFTMAXES | LOG_SOFTMAXES
        while node.target in final and cast(int, node.args[1]) % 2 == 1:
            node = node.all_input_nodes[0]
        return replace(self, logits=node, _linear=self._linear)


def remembered(fact: Callable[P, T]) -> Callable[P, T]:
    """Keep with a node, the last argument, what follows from the network alone.

    The rules ask for it anew for every slice of pairs.
    """
    name = f"pyablate.{fact.__name__}"

    @functools.wraps(fact)
    def ask(*arguments: P.args, **named: P.kwargs) -> T:
        node = cast(fx.Node, arguments[-1])
        if name not in node.meta:
            node.meta[name] = fact(*arguments, **named)
        return cast(T, node.meta[name])

    return ask


def operands(node: fx.Node) -> list[fx.Node]:
    """Tensor arguments of a node, by position; for operators that take nothing else there."""
    return [argument for argument in node.args if isinstance(argument, fx.Node)]


def operand(node: fx.Node, index: int = 0) -> fx.Node:
    """Return an argument of a node that is a tensor."""
    argument = node.args[index]
    assert isinstance(argument, fx.Node)
    return argument


def tensor(value: object) -> Tensor:
    """Return a value where it has to be a single tensor."""
    assert isinstance(value, Tensor)
    return value


def integers(value: object) -> list[int]:
    """Return a setting that is one number or several."""
    return [int(item) for item in value] if isinstance(value, (list, tuple)) else [cast(int, value)]


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
    if node.target is aten.conv2d.default and len(node.args) > 6 and node.args[6] != 1:
        return _grouped
    if node.target is aten.squeeze.default:  # which would take a batch of one for an axis to drop
        shape = node.all_input_nodes[0].meta["val"].shape
        ones = [a for a, size in enumerate(shape) if not is_symbolic(size) and size == 1]
        return functools.partial(_squeeze, dims=ones)
    return cast(Callable[..., Any], node.target)


def pads_with_zeros(node: fx.Node) -> bool:
    """Whether a padding writes zeros, rather than another constant or copies."""
    if node.kwargs:
        return False
    if node.target is aten.constant_pad_nd.default:
        return not settings(node, 2, 0.0)[0]
    mode, value = settings(node, 2, "constant", None)[:2]
    return mode == "constant" and not value


def _pick(layout: BatchLayout | None, value: Tensor, image: Tensor) -> Tensor:
    return value if layout is None else layout.pick(value, image)


def _join(layout: BatchLayout | None, parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if layout is None else torch.cat(list(parts), dim=layout.axis)


def is_symbolic(size: Any) -> bool:
    """Whether a size depends on the number of images."""
    return isinstance(size, torch.SymInt)


def _squeeze(x: Tensor, dims: list[int]) -> Tensor:
    return cast(Tensor, aten.squeeze.dims(x, dims))


def _grouped(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve in groups; where each channel is one, PyTorch is slow in float64 and on a GPU."""
    slow = x.dtype == weight.dtype and x.ndim == 4
    slow = slow and (x.dtype == torch.float64 if x.device.type == "cpu" else backend(x) is not None)
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if not slow or wanted or type(x) is not Tensor or not len(weight) == groups == x.shape[1]:
        return cast(Tensor, aten.conv2d.default(x, weight, bias, stride, padding, dilation, groups))
    result = ops.depthwise(x, weight, stride=stride, padding=padding, dilation=dilation)
    return result if bias is None else result + bias.reshape(-1, 1, 1)


def _identity(x: Tensor, *_: Any) -> Tensor:
    return x
