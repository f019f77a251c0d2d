"""Operators at which a small change of the input makes a large one of the output.

Errors that are measured on a sample of pairs say nothing about a jump that none of them crossed.
Behind an ablation, such operators are found in the graph, and what they decide is computed in
float64; see :mod:`pyablate.engine.float64`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument, Target
from torch.utils._python_dispatch import TorchDispatchMode

from pyablate.engine.channel_delta import has_unbounded_slope
from pyablate.network.aten import SAME
from pyablate.network.graph import SOFTMAXES, Graph, remembered, settings, tensor

aten = torch.ops.aten

STEEP = 30.0
"""Root mean square of what goes into a saturating operator, in units of the width over which it
changes, from which on it is taken for a step: it is saturated nearly everywhere, and where it is
not, an error counts for many times its size."""

HARD = 10.0
"""The same for the lead of the largest entry that goes into a softmax, in nats."""

STEPS: frozenset[Target] = frozenset(
    {
        aten.angle.default,
        aten.ceil.default,
        aten.fake_quantize_per_channel_affine.default,
        aten.fake_quantize_per_tensor_affine.default,
        aten.floor.default,
        aten.floor_divide.default,
        aten.fmod.Scalar,
        aten.fmod.Tensor,
        aten.frac.default,
        aten.heaviside.default,
        aten.remainder.Scalar,
        aten.remainder.Tensor,
        aten.round.decimals,
        aten.round.default,
        aten.sgn.default,
        aten.sign.default,
        aten.trunc.default,
    }
)
"""Operators from numbers to floats that jump; those to integers and booleans all do."""

TESTS: frozenset[Target] = frozenset(
    {aten.isnan.default, aten.isinf.default, aten.isfinite.default}
)
"""Their answer changes only where something is not finite, which is watched by itself."""

MASKED = 1e8
"""Magnitude from which on an entry is a mask and says nothing of the others' size."""

COMPARISONS: frozenset[Target] = frozenset(
    {aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.le.Scalar}
)

EXPONENTIALS: frozenset[Target] = frozenset({aten.exp.default, aten.exp2.default})

HANDED_ON: frozenset[Target] = SAME | {aten._to_copy.default, aten.to.dtype}
"""What a mask goes through on its way from a comparison to a product."""

PARTS: frozenset[Target] = frozenset(
    {
        aten.reshape.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.split_with_sizes.default,
        aten.view.default,
        operator.getitem,
    }
)
"""What cuts a tensor into parts, as several inputs of a network are from one."""

WIDTHS: Mapping[Target, float] = {
    aten.sigmoid.default: 1.0,
    aten.tanh.default: 1.0,
    aten.erf.default: 1.0,
    aten.hardsigmoid.default: 6.0,
    aten.relu6.default: 6.0,
    aten.softmax.int: 1.0,
    aten._softmax.default: 1.0,
}
"""Saturating operators, and over what width of their input they change."""


def jumps(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Nodes among ``nodes``, which change together, whose outputs may jump."""
    changed = set(nodes)
    return [
        node
        for node in nodes
        if any(source in changed and _floats(source) for source in node.all_input_nodes)
        and (_divides_with_rounding(node) or node.target in STEPS or _decides(node))
    ]


def behind_images(graph: Graph) -> list[fx.Node]:
    """Nodes that change with the images, but for parts of these themselves.

    What is given is exact in any precision: indices and masks that are made of it do not jump.
    """
    given = {graph.images}
    for node in graph.graph.nodes:
        sources = [source for source in node.all_input_nodes if graph.size(source, 1) is None]
        if node.target in PARTS and given.issuperset(sources):
            given.add(node)
    return [node for node in graph.after([graph.images]) if node not in given]


def steep(graph: Graph, sample: Tensor) -> list[fx.Node]:
    """Saturating nodes that are as good as steps on some images, ``[N, ...]``."""
    widths = {node: _width(node) for node in graph.graph.nodes if node not in graph.constants}
    inputs = {node: node.all_input_nodes[0] for node, width in widths.items() if width}
    read = {source for source in inputs.values() if source not in graph.constants}
    with torch.no_grad():
        values = graph.run(sample, read - {graph.images}) if read else {}
    values[graph.images] = sample
    return [
        node
        for node, source in inputs.items()
        if source in values and _is_steep(node, tensor(values[source]), widths[node])
    ]


@remembered
def may_be_infinite(node: fx.Node) -> bool:
    """Whether an operator makes NaN or infinity of finite numbers.

    Minus infinity in front of a softmax, which stands for what is masked, is no trouble.
    """
    makes = has_unbounded_slope(node) or node.target in SOFTMAXES or node.target in EXPONENTIALS
    return makes and not all(user.target in SOFTMAXES for user in users(node))


class _Watch(TorchDispatchMode):
    """Notes whether something is made of the outcome of an operator that jumps."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.jumped: str | None = None
        self._decisions: dict[int, tuple[Tensor, str]] = {}  # tensors held: an id is used again

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        given = list(_tensors(args))
        used = [self._decisions[id(item)][1] for item in given if id(item) in self._decisions]
        result = func(*args, **(kwargs or {}))
        steps = func in STEPS or (kwargs or {}).get("rounding_mode") is not None
        if steps and any(map(_is_float, given)):
            used.append(str(func))
        if used and self.jumped is None:
            self.jumped = used[0]
        if any(map(_is_float, given)) and func not in TESTS:
            for item in _tensors(result):
                if not _is_float(item):
                    self._decisions[id(item)] = item, str(func)
        return result


def observed_jump(model: nn.Module, sample: Tensor) -> str | None:
    """Name an operator that may jump in a network that was not captured, or give None."""
    with torch.no_grad(), _Watch() as watch:
        model(sample.clone())
        jumped: str | None = watch.jumped
    return jumped


def _decides(node: fx.Node) -> bool:
    """Whether a node turns floats into integers or booleans that somebody uses."""
    if node.target in TESTS or node.target is operator.getitem:
        return False
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)):
        used = [user.args[1] for user in node.users if user.target is operator.getitem]
        return any(isinstance(i, int) and not _is_float(value[i]) for i in used)
    if not isinstance(value, Tensor) or _is_float(value):
        return False
    return not _selects_continuously(node)


def _selects_continuously(node: fx.Node) -> bool:
    """Whether a comparison with 0 chooses between values that are equal there: ``x * (x > 0)``."""
    if node.target not in COMPARISONS or node.args[1] != 0:
        return False
    x = _origin(node.args[0])
    return all(_vanishes(user, node, x) for user in users(node))


def _vanishes(user: fx.Node, mask: fx.Node, x: Argument) -> bool:
    """Whether what a mask selects at a node is 0 where ``x`` is, on either side."""
    if user.target is aten.mul.Tensor:
        return any(_is_multiple(other, x) for other in user.args if _origin(other) is not mask)
    if user.target is aten.where.self:
        return all(_is_multiple(arm, x) or _is_zero(arm) for arm in user.args[1:])
    if user.target is aten.where.ScalarOther:
        return _is_multiple(user.args[1], x) and _is_zero(user.args[2])
    if user.target is aten.masked_fill.Scalar:
        return _is_multiple(user.args[0], x) and _is_zero(user.args[2])
    return False


def _is_multiple(value: Argument, x: Argument) -> bool:
    value = _origin(value)
    if value is x:
        return True
    if not isinstance(value, fx.Node):
        return False
    if value.target is aten.neg.default:
        return _is_multiple(value.args[0], x)
    if value.target in (aten.mul.Scalar, aten.mul.Tensor):
        return any(_is_multiple(factor, x) for factor in value.args)
    return False


def _is_zero(value: Argument) -> bool:
    if not isinstance(value, fx.Node):
        return bool(value == 0)
    if value.target in (aten.zeros_like.default, aten.zeros.default):
        return True
    if value.target is aten.scalar_tensor.default:
        return _is_zero(value.args[0])
    return value.target in (aten.full.default, aten.full_like.default) and _is_zero(value.args[1])


def _origin(value: Argument) -> Argument:
    """Follow a value back through what only hands it on, conversions of masks included."""
    while isinstance(value, fx.Node) and value.target in HANDED_ON:
        value = value.args[0]
    return value


def users(node: fx.Node) -> Iterator[fx.Node]:
    """Nodes that make something of a node's value, past those that only hand it on."""
    for user in node.users:
        if user.target in HANDED_ON:
            yield from users(user)
        else:
            yield user


def _divides_with_rounding(node: fx.Node) -> bool:
    return node.kwargs.get("rounding_mode") is not None


def _width(node: fx.Node) -> float:
    """Width over which a saturating node changes; 0 for others."""
    if node.target is aten.hardtanh.default:
        low, high = settings(node, 1, -1.0, 1.0)
    elif node.target is aten.clamp.default:
        low, high = settings(node, 1, None, None)
    else:
        return WIDTHS.get(node.target, 0.0)
    numbers = all(isinstance(limit, (int, float)) for limit in (low, high))
    return float(high - low) if numbers and math.isfinite(high - low) else 0.0


def _is_steep(node: fx.Node, value: Tensor, width: float) -> bool:
    """Judge a saturating node by what goes into it."""
    if node.target not in SOFTMAXES:
        return _root_mean_square(value) > STEEP * width
    axis = cast(int, node.args[1])
    if value.shape[axis] < 2:
        return False
    top = value.double().topk(2, dim=axis).values
    return _root_mean_square(top.select(axis, 0) - top.select(axis, 1)) > HARD


def _root_mean_square(value: Tensor) -> float:
    """Over what is finite and not masked by a large number; 0 of nothing."""
    value = value.double()
    known = value.abs() < MASKED
    if not bool(known.all()):  # seldom, and slow
        value = value[known]
    return float(value.square().mean().sqrt()) if value.numel() else 0.0


def _floats(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return any(_is_float(item) for item in (value if isinstance(value, (list, tuple)) else [value]))


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Tensor):
        yield value
