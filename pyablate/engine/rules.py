"""Delta rules per operator: how the change of a node follows from the changes of its inputs.

Two families. A *linear* node carries a delta as it carries a value, without its bias. Anything
else is a *difference*, f(base + d) - f(base). The rules here speak about dense deltas
``[P, ...]``, one row per pair; :mod:`pyablate.engine.channel` has those for deltas that are
still on one channel.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx

from pyablate import ops
from pyablate.engine import eight_bit, pending
from pyablate.engine.channel import (
    DIVISIONS,
    LINEAR_POOLS,
    SAME,
    SUBTRACTIONS,
    Channel,
    keeps_shape,
)
from pyablate.engine.pending import Activated, FirstMap, Scaled, Sum
from pyablate.graph import (
    BATCH_NORM,
    CONVOLUTIONS,
    PADS,
    Graph,
    function,
    norm_scale,
    operands,
    settings,
)
from pyablate.ops import Activation, Codes

aten = torch.ops.aten


@dataclass(frozen=True)
class Full:
    """A changed value itself, for tensors that have no difference: integers and booleans."""

    value: Tensor


class Pairs(Protocol):
    """What a rule may look at: one slice of pairs."""

    graph: Graph
    dtype: torch.dtype  # of dense arithmetic; other operators keep what they get or widen it
    eight_bit: bool  # whether convolutions run in 8-bit integers
    codes: dict[fx.Node, Codes]  # of deltas that an 8-bit convolution will read
    image: Tensor  # int32 [P], position in the batch
    image_long: Tensor  # int64 [P], the same
    column: Tensor  # int64 [P], position in the job

    def raw(self, node: fx.Node) -> Any:
        """Return the delta of a node as held: Tensor, Channel, Pending, Full, list, or None."""

    def delta(self, node: fx.Node) -> Any:
        """Return the same with a Channel or what is pending spelt out."""

    def base(self, node: fx.Node) -> Tensor:
        """Return a tensor of the clean run, ``[N, ...]``."""

    def rows(self, node: fx.Node) -> Any:
        """Return it gathered per pair, ``[P, ...]``; constants as they are."""

    def plain(self, node: fx.Node) -> bool:
        """Whether the clean tensor has exactly one row per image, first."""


Rule = Callable[[Pairs, fx.Node], Any]


def advance(pairs: Pairs, node: fx.Node) -> Any:
    """Return the change of a node, from the changes of its inputs."""
    # Taking one of several results computes nothing: there, a full one may stand beside the others.
    whole = node.target is not operator.getitem
    if whole and any(_holds_full(pairs.raw(source)) for source in node.all_input_nodes):
        return difference(pairs, node)
    return RULES.get(node.target, difference)(pairs, node)


def _holds_full(delta: Any) -> bool:
    items = delta if isinstance(delta, (list, tuple)) else [delta]
    return any(isinstance(item, Full) for item in items)


def reads_base(graph: Graph, node: fx.Node) -> bool:
    """Whether the rule of a node may read the clean run at the node and its changed inputs."""
    values = [node.meta.get("val"), *(source.meta.get("val") for source in node.all_input_nodes)]
    if any(isinstance(value, Tensor) and not value.is_floating_point() for value in values):
        return True
    if node.target in SUMS:
        return bool(node.kwargs)
    if node.target in CONVOLUTIONS or node.target is aten.linear.default:
        return node.args[1] not in graph.constants
    return node.target not in LINEAR


def difference(pairs: Pairs, node: fx.Node) -> Any:
    """f(base + d) - f(base): right for every operator, at the price of a clean value."""
    after = pairs.graph.evaluate(node, lambda n: _perturbed(pairs, n), len(pairs.image))
    before = pairs.rows(node)
    if isinstance(after, (list, tuple)):
        return [_subtract(a, b) for a, b in zip(after, before, strict=True)]
    return _subtract(after, before)


def _perturbed(pairs: Pairs, node: fx.Node) -> Any:
    delta = pairs.delta(node)
    if delta is None:
        return pairs.rows(node)
    if isinstance(delta, Full):
        return delta.value
    if isinstance(delta, (list, tuple)):
        return [
            b if d is None else d.value if isinstance(d, Full) else b + d
            for d, b in zip(delta, pairs.rows(node), strict=True)
        ]
    return pairs.rows(node) + delta


def _subtract(after: Any, before: Any) -> Any:
    if not isinstance(after, Tensor):
        return None
    if not after.is_floating_point():
        return Full(after)
    # Masked scores are minus infinity before and after: no change, rather than NaN.
    return torch.where(after == before, torch.zeros_like(after), after - before)


def _changed(pairs: Pairs, node: fx.Node) -> list[fx.Node]:
    """Arguments that change; x * x names x twice."""
    return [source for source in operands(node) if pairs.raw(source) is not None]


def _linear(pairs: Pairs, node: fx.Node) -> Any:
    """Apply a map that is linear in its one tensor argument."""
    return pairs.graph.evaluate(node, pairs.delta, len(pairs.image))


def _same(pairs: Pairs, node: fx.Node) -> Any:
    source = node.all_input_nodes[0]
    if source in pairs.codes:
        pairs.codes[node] = pairs.codes[source]
    return pairs.raw(source)


def _readers(node: fx.Node) -> list[fx.Node]:
    """Nodes that compute something from a node."""
    found: list[fx.Node] = []
    for user in node.users:
        found += _readers(user) if user.target in SAME else [user]
    return found


def _only_reader(node: fx.Node) -> fx.Node | None:
    readers = _readers(node)
    return readers[0] if len(readers) == 1 else None


def _waiting(delta: Any, source: Any = None) -> Scaled | None:
    """Return a dense delta as one that may be scaled; ``source`` is the node it comes from."""
    if isinstance(delta, Scaled):
        return delta
    if not isinstance(delta, Tensor) or delta.dtype not in FLOATS:
        return None
    # Results may go where a fresh delta stands that nobody else reads: views share memory.
    convolved = isinstance(source, fx.Node) and source.target in CONVOLUTIONS
    return Scaled(delta, fresh=convolved and len(source.users) == 1 and _is_dense(delta))


def _getitem(pairs: Pairs, node: fx.Node) -> Any:
    return pairs.delta(node.all_input_nodes[0])[node.args[1]]


def _bilinear(pairs: Pairs, node: fx.Node) -> Any:
    """Multiply: linear while one factor stands still."""
    changed = _changed(pairs, node)
    if len(changed) > 1 or node.kwargs:
        return difference(pairs, node)
    if node.target in DIVISIONS and changed[0] is not node.args[0]:
        return difference(pairs, node)

    def value(source: fx.Node) -> Any:
        return pairs.delta(source) if source is changed[0] else pairs.rows(source)

    return _full_shape(pairs, node, pairs.graph.evaluate(node, value, len(pairs.image)))


def _sum(pairs: Pairs, node: fx.Node) -> Any:
    """Add or subtract: deltas add up, what stands still drops out."""
    if node.kwargs:
        return difference(pairs, node)
    sign = -1.0 if node.target in SUBTRACTIONS else 1.0
    if sign > 0 and (waiting := _still_first(pairs, node)) is not None:
        return waiting
    first, second = (_at_least_scaled(pairs, a) for a in cast(list[fx.Node], node.args[:2]))
    if isinstance(second, Channel) and _fit(first, second, node):
        return _onto(pairs, node, cast(fx.Node, node.args[0]), second, sign)
    if isinstance(first, Channel) and sign > 0 and _fit(second, first, node):
        return _onto(pairs, node, cast(fx.Node, node.args[1]), first, sign)
    if sign > 0 and (residual := _residual(pairs, node, first, second)) is not None:
        return residual
    left, right = (pairs.delta(a) if isinstance(a, fx.Node) else None for a in node.args[:2])
    if right is not None and sign < 0:
        right = -right
    total: Any = left if right is None else right if left is None else left + right
    return _full_shape(pairs, node, total)


def _still_first(pairs: Pairs, node: fx.Node) -> FirstMap | None:
    """Let a first convolution go on waiting where only what stands still is added to it."""
    changed = _changed(pairs, node)
    raw = pairs.raw(changed[0]) if len(changed) == 1 else None
    alike = changed[0].meta["val"].shape == node.meta["val"].shape
    return raw if isinstance(raw, FirstMap) and alike else None


def _residual(pairs: Pairs, node: fx.Node, first: Any, second: Any) -> Sum | None:
    """Let a sum of two dense deltas wait for the activation that alone reads it."""
    if node.args[0] is node.args[1]:
        return None
    reader = _only_reader(node)
    left, right = _waiting(first, node.args[0]), _waiting(second, node.args[1])
    if reader is None or left is None or right is None or reader.target not in NAMED:
        return None
    shape = pairs.graph.shape(node, len(pairs.image))
    a, b = left.values, right.values
    alike = list(a.shape) == list(b.shape) == shape and a.dtype == b.dtype
    return Sum(left, right) if alike and pairs.plain(node) else None


def _at_least_scaled(pairs: Pairs, node: fx.Node) -> Any:
    """Return a delta as held, but with all pending work done that is more than a factor."""
    raw = pairs.raw(node) if isinstance(node, fx.Node) else None
    return pairs.delta(node) if isinstance(raw, (FirstMap, Sum, Activated)) else raw


def _onto(pairs: Pairs, node: fx.Node, source: fx.Node, channel: Channel, sign: float) -> Scaled:
    """Add a delta that is on its channel to the dense one of a node, in place where it may."""
    dense = _waiting(pairs.raw(source), source)
    if dense is None:
        dense = Scaled(pairs.delta(source))
    values = dense.values if dense.fresh else dense.values.clone()
    scale, factor = dense.scale, channel.values.new_tensor([sign])
    if scale is not None:
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # codes of nothing but zeros
        factor = sign / scale
    channel.add_to(values, pairs.image_long, pairs.column, factor)
    return Scaled(values, scale, fresh=len(_readers(node)) == 1)


def _fit(dense: Any, channel: Channel, node: fx.Node) -> bool:
    """Whether a dense delta and one on its channel are added without broadcasting either."""
    values = dense.values if isinstance(dense, Scaled) else dense
    shape = tuple(node.meta["val"].shape[1:])
    alike = isinstance(values, Tensor) and tuple(values.shape[1:]) == shape
    return alike and keeps_shape(channel, node)


def _full_shape(pairs: Pairs, node: fx.Node, delta: Tensor) -> Tensor:
    """Broadcast as the clean operands were broadcast."""
    shape = pairs.graph.shape(node, len(pairs.image))
    return delta if list(delta.shape) == shape else delta.expand(shape)


def _cat(pairs: Pairs, node: fx.Node) -> Any:
    """Join deltas, with zeros for what stands still."""
    parts = [
        delta if (delta := pairs.delta(part)) is not None else torch.zeros_like(pairs.rows(part))
        for part in cast(list[fx.Node], node.args[0])  # the same tensor may come twice
    ]
    if not all(part.is_floating_point() for part in parts):
        return difference(pairs, node)
    return function(node)(parts, *node.args[1:], **node.kwargs)


def _convolution(pairs: Pairs, node: fx.Node) -> Any:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    weight = pairs.graph.constant(node, 1)
    if weight is None or pairs.raw(source) is None:
        return difference(pairs, node)
    stride, padding, dilation, groups = settings(node, 3, [1], [0], [1], 1)
    delta = pairs.raw(source)
    single = isinstance(delta, Channel) and delta.axis == 1 and delta.inner == 1
    if single and groups == 1 and node.target is aten.conv2d.default:
        return _first_convolution(pairs, node, delta, weight, (stride, padding, dilation))
    if pairs.eight_bit and takes_codes(pairs.graph, node):
        return _coded_convolution(pairs, node, weight, (stride, padding, dilation))
    convolve, lowered = function(node), _weight(pairs, node, weight)
    change = pairs.delta(source).to(lowered.dtype)
    return convolve(change, lowered, None, stride, padding, dilation, groups)


def takes_codes(graph: Graph, node: fx.Node) -> bool:
    """Whether this convolution can run in 8 bits: constant filters, no groups, enough channels."""
    if node.target is not aten.conv2d.default:
        return False
    weight = graph.constant(node, 1)
    padding, groups = settings(node, 3, [1], [0], [1], 1)[1::2]
    if weight is None or groups != 1 or isinstance(padding, str):
        return False
    return weight.shape[1] >= LEAST_CHANNELS


def _coded_convolution(
    pairs: Pairs, node: fx.Node, weight: Tensor, geometry: tuple[Any, Any, Any]
) -> Scaled:
    source = cast(fx.Node, node.args[0])
    codes = pairs.codes.get(source)
    if codes is None:
        codes = pairs.codes[source] = ops.encode(pairs.delta(source))
    values = codes.values.contiguous(memory_format=torch.channels_last)
    if "filters" not in node.meta:
        stride, padding, dilation = (_two(value) for value in geometry)
        size = list(values.shape)
        node.meta["filters"] = eight_bit.prepare(weight, (stride, padding, dilation), size)
    result = eight_bit.convolve(values, node.meta["filters"])
    return Scaled(result, codes.scale, fresh=len(_readers(node)) == 1)


def _two(value: Any) -> list[int]:
    values = [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
    return values * 2 if len(values) == 1 else values


def _new_codes(pairs: Pairs, node: fx.Node, layout: torch.memory_format) -> Codes | None:
    """Memory for the codes of a node's delta, if an 8-bit convolution will read them."""
    if not pairs.eight_bit or not any(takes_codes(pairs.graph, r) for r in _readers(node)):
        return None
    shape = pairs.graph.shape(node, len(pairs.image))
    codes = Codes.empty(shape, layout, pairs.image.device)
    pairs.codes[node] = codes
    return codes


def _weight(pairs: Pairs, node: fx.Node, weight: Tensor) -> Tensor:
    """Weights in the precision of the dense arithmetic, converted once."""
    if pairs.dtype == weight.dtype:
        return weight
    held: dict[torch.dtype, Tensor] = node.meta.setdefault("weight", {})
    if pairs.dtype not in held:
        if node is pairs.graph.logits:
            # What all logits share decides nothing, and must not cost their difference digits.
            weight = weight - weight.mean(dim=0)
        held[pairs.dtype] = weight.to(pairs.dtype)
    return held[pairs.dtype]


def _first_convolution(
    pairs: Pairs, node: fx.Node, delta: Channel, weight: Tensor, geometry: tuple[Any, Any, Any]
) -> Tensor | FirstMap:
    """Convolve one input channel per pair: 1/C of the work."""
    stride, padding, dilation = geometry
    filters = _by_input(node, weight.permute(1, 2, 3, 0))

    def run(**fused: Any) -> Tensor:
        geometry = {"stride": stride, "padding": padding, "dilation": dilation}
        return _single_channel(pairs, delta, delta.values, filters, **geometry, **fused)

    reader = _only_reader(node)
    if reader is not None and reader.target in SUMS:
        reader = _only_reader(reader)  # with a shortcut that mostly stands still
    waits = reader is not None and _named_activation(reader) is not None and pairs.plain(node)
    return FirstMap(run) if waits else run()


def _fully_connected(pairs: Pairs, node: fx.Node) -> Any:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    weight = pairs.graph.constant(node, 1)
    delta = pairs.raw(source)
    if weight is None or delta is None:
        return difference(pairs, node)
    dense = _weight(pairs, node, weight)
    if isinstance(delta, Channel) and delta.axis == source.meta["val"].ndim - 1:
        return _first_linear(pairs, node, delta, weight, dense.dtype)
    change = pairs.delta(source).to(dense.dtype)
    runs = _runs(pairs, change, dense)
    if runs is None:
        return aten.linear.default(change, dense)
    rows = _by_input(node, dense.t())
    return torch.cat([_active_columns(run, rows) for run in change.split(runs)])


def _runs(pairs: Pairs, change: Tensor, weight: Tensor) -> list[int] | None:
    """Pairs of each image in turn, where leaving out what no pair of an image changes pays.

    Behind an activation most features stand still, nearly the same ones in all pairs of an image.
    Gathering the rest of the weights costs as much as a few dozen pairs; on a GPU the number of
    features would have to be waited for.
    """
    if change.ndim != 2 or change.device.type != "cpu" or weight.numel() < WORTH_GATHERING:
        return None
    runs = torch.unique_consecutive(pairs.image, return_counts=True)[1].tolist()
    return runs if len(change) >= LEAST_RUN * len(runs) else None


def _active_columns(change: Tensor, rows: Tensor) -> Tensor:
    """Multiply ``[P, J]`` by ``[J, K]``, of which only columns of ``change`` that are not zero."""
    active = change.abs().amax(dim=0).nonzero().squeeze(1)
    if len(active) > MOST_ACTIVE * len(rows):
        return change @ rows
    # gather: four times as fast as index_select along rows of bfloat16.
    kept = change.gather(1, active.expand(len(change), -1))
    return kept @ rows.index_select(0, active)


def _first_linear(
    pairs: Pairs, node: fx.Node, delta: Channel, weight: Tensor, dtype: torch.dtype
) -> Tensor:
    """Only the columns of the changed channel count: a convolution over its entries."""
    blocks = weight.unflatten(1, (1, delta.size, delta.inner))  # [O, 1, C, inner]
    filters = _by_input(node, blocks.permute(2, 1, 3, 0))
    values = delta.values.to(dtype)  # [N, U, inner], or [N, U, *rest] with one entry per position
    maps = values.reshape(*values.shape[:2], 1, -1)
    out = _single_channel(pairs, delta, maps, filters).permute(0, 2, 3, 1)
    rest = values.shape[2:] if delta.inner == 1 else ()
    return out.reshape(len(out), *rest, len(weight))


def _by_input(node: fx.Node, filters: Tensor) -> Tensor:
    """Lay filters out by input channel, ``[I, kh, kw, O]``, once."""
    held: dict[Any, Tensor] = node.meta.setdefault("by_input", {})
    key = (filters.dtype, filters.shape)  # a linear map may be seen by maps or by single numbers
    if key not in held:
        held[key] = filters.contiguous()
    return held[key]


def _single_channel(
    pairs: Pairs, delta: Channel, maps: Tensor, filters: Tensor, **geometry: Any
) -> Tensor:
    """Convolve each pair's one changed map ``[H, W]`` of ``maps`` ``[N, U, H, W]``."""
    channel, column = delta.channel.to(torch.int32), pairs.column.to(torch.int32)
    return ops.unit_delta(maps, filters, channel, pairs.image, column, **geometry)


def _batch_norm(pairs: Pairs, node: fx.Node) -> Any:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    scale = norm_scale(pairs.graph, node)[0]
    delta = pairs.delta(source)
    shape = (1, -1, *[1] * (delta.ndim - 2))
    return [delta * scale.to(delta.dtype).reshape(shape), None, None]


def _matmul(pairs: Pairs, node: fx.Node) -> Any:
    changed = _changed(pairs, node)
    if len(changed) > 1:
        return difference(pairs, node)

    def value(source: fx.Node) -> Any:
        rows = pairs.rows(source)
        return pairs.delta(source).to(rows.dtype) if source is changed[0] else rows

    return pairs.graph.evaluate(node, value, len(pairs.image))


def _addmm(pairs: Pairs, node: fx.Node) -> Any:
    bias, left, right = operands(node)
    if node.kwargs or pairs.raw(bias) is not None or pairs.raw(right) is not None:
        return difference(pairs, node)
    weight = pairs.rows(right)
    return pairs.delta(left).to(weight.dtype) @ weight


def _pad(pairs: Pairs, node: fx.Node) -> Any:
    """Pad: a constant border does not change, so its delta is 0; one of copies is linear."""
    delta = pairs.delta(node.all_input_nodes[0])
    constant = node.target is aten.constant_pad_nd.default
    mode = "constant" if constant else settings(node, 2, "constant")[0]
    return aten.pad.default(delta, node.args[1], mode)


def _activation(pairs: Pairs, node: fx.Node) -> Any:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    named = _named_activation(node)
    raw = pairs.raw(source)
    delta = raw if isinstance(raw, (FirstMap, Sum)) else _waiting(raw, source)
    if named is None or delta is None or not pairs.plain(source):
        return difference(pairs, node)

    def run() -> Tensor:
        codes = _new_codes(pairs, node, _layout(delta))
        return pending.activate(delta, pairs.base(source), pairs.image, named, codes)

    reader = _only_reader(node)
    pooled = reader is not None and _pools(reader) and named.monotone
    averaged = reader is not None and _averages(pairs, reader)
    if (pooled or averaged) and not isinstance(delta, FirstMap):
        return Activated(delta, source, named, run)
    return run()


def _layout(delta: Scaled | Sum | FirstMap) -> torch.memory_format:
    """Layout that a native operation gives its result."""
    if isinstance(delta, FirstMap):
        return torch.channels_last
    values = (delta.first if isinstance(delta, Sum) else delta).values
    last = values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not values.is_contiguous() else torch.contiguous_format


def _pools(node: fx.Node) -> bool:
    return node.target is aten.max_pool2d.default


def _averages(pairs: Pairs, node: fx.Node) -> bool:
    """Whether a node averages each map ``[H, W]`` as a whole."""
    source = node.args[0] if node.args else None
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    if not isinstance(value, Tensor) or value.ndim != 4 or not pairs.plain(cast(fx.Node, source)):
        return False
    if node.target is aten.adaptive_avg_pool2d.default:
        return _two(node.args[1]) == [1, 1]
    if node.target is not aten.mean.dim or node.kwargs or len(node.args) < 2:
        return False
    dims = node.args[1]
    return isinstance(dims, (list, tuple)) and sorted(cast(int, d) % 4 for d in dims) == [2, 3]


def _average(pairs: Pairs, node: fx.Node) -> Any:
    source = cast(fx.Node, node.args[0])
    raw = pairs.raw(source)
    if not isinstance(raw, (Activated, Scaled, Tensor)) or not _averages(pairs, node):
        return _linear(pairs, node)
    if isinstance(raw, Activated):
        result = pending.mean(raw.source, pairs.base(raw.node), pairs.image, raw.activation)
    else:
        delta = _waiting(raw)
        if delta is None:
            return _linear(pairs, node)
        each = torch.arange(len(pairs.image), dtype=torch.int32, device=pairs.image.device)
        # The identity reads no clean tensor: any of the right shape will do.
        result = pending.mean(delta, delta.values, each, Activation("identity"))
    return result.reshape(pairs.graph.shape(node, len(pairs.image)))


def _is_dense(delta: Tensor) -> bool:
    if delta.is_contiguous():
        return True
    return delta.ndim == 4 and delta.is_contiguous(memory_format=torch.channels_last)


def _named_activation(node: fx.Node) -> Activation | None:
    """Return our name for an activation with its settings, or None where we have none."""
    given = node.args[1:]
    if node.kwargs.get("approximate") == "tanh":
        return Activation("gelu_tanh") if node.target is aten.gelu.default else None
    if node.kwargs:
        return None
    if node.target is aten.hardtanh.default:
        return Activation("hardtanh", *map(float, settings(node, 1, -1.0, 1.0)))
    if node.target is aten.relu6.default:
        return Activation("hardtanh", 0.0, 6.0)
    if node.target is aten.leaky_relu.default:
        return Activation("leaky_relu", float(settings(node, 1, 0.01)[0]))
    if node.target is aten.elu.default:
        return Activation("elu", float(settings(node, 1, 1.0)[0])) if len(given) < 2 else None
    name = ACTIVATIONS.get(node.target)
    return None if name is None or given else Activation(name)


def _max_pool(pairs: Pairs, node: fx.Node) -> Any:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    raw = pairs.raw(source)
    activation, origin = None, source
    delta = _waiting(raw)
    if isinstance(raw, Activated) and isinstance(raw.source, Scaled):
        delta, origin, activation = raw.source, raw.node, raw.activation
    elif isinstance(raw, Activated):
        delta = Scaled(pairs.delta(source))
    if delta is None or delta.values.ndim != 4 or not pairs.plain(origin):
        return difference(pairs, node)
    kernel, stride, padding, dilation = settings(node, 1, [], [], 0, 1)[:4]
    return ops.delta_max_pool(
        pairs.base(origin),
        delta.values,
        pairs.image,
        kernel=kernel,
        stride=stride or kernel,
        padding=padding,
        dilation=dilation,
        out_size=[int(size) for size in node.meta["val"].shape[2:]],
        activation=activation,
        scale=delta.scale,
        codes=_new_codes(pairs, node, _layout(delta)),
    )


FLOATS = frozenset({torch.float32, torch.float64, torch.bfloat16})
"""Dtypes that the native operations take; a network may have others inside."""

WORTH_GATHERING = 1 << 19
"""Weights of a linear layer from which on leaving out columns pays."""

LEAST_RUN = 48
"""Pairs of one image, on average, that pay for gathering its weights."""

MOST_ACTIVE = 0.75
"""Share of columns that change above which all are multiplied."""

LEAST_CHANNELS = 16
"""Input channels below which an 8-bit convolution is no faster than one in bfloat16."""

STRUCTURE = frozenset(
    getattr(getattr(aten, name), overload)
    for name, overload in (
        item.split(".")
        for item in (
            "view.default _unsafe_view.default reshape.default flatten.using_ints "
            "unflatten.int permute.default transpose.int t.default squeeze.default squeeze.dim "
            "squeeze.dims unsqueeze.default select.int slice.Tensor narrow.default split.Tensor "
            "split_with_sizes.default chunk.default unbind.int expand.default flip.default "
            "roll.default repeat.default mean.dim sum.dim_IntList neg.default "
            "pixel_shuffle.default pixel_unshuffle.default channel_shuffle.default "
            "upsample_nearest2d.vec upsample_bilinear2d.vec movedim.int avg_pool3d.default "
            "adaptive_avg_pool3d.default"
        ).split()
    )
)
ACTIVATIONS: dict[Any, Any] = {
    aten.relu.default: "relu",
    aten.gelu.default: "gelu",
    aten.silu.default: "silu",
    aten.hardswish.default: "hardswish",
    aten.hardsigmoid.default: "hardsigmoid",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
}
NAMED = frozenset(ACTIVATIONS) | {
    aten.hardtanh.default,
    aten.relu6.default,
    aten.leaky_relu.default,
    aten.elu.default,
}
MATMULS = frozenset({aten.matmul.default, aten.mm.default, aten.bmm.default})
LINEAR = STRUCTURE | SAME | LINEAR_POOLS | PADS | {aten.cat.default, BATCH_NORM, operator.getitem}
SUMS = frozenset({aten.add.Tensor, aten.add.Scalar}) | SUBTRACTIONS
RULES: Mapping[Any, Rule] = {
    **dict.fromkeys(STRUCTURE | LINEAR_POOLS, _linear),
    **dict.fromkeys((aten.adaptive_avg_pool2d.default, aten.mean.dim), _average),
    **dict.fromkeys(SAME, _same),
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar, *DIVISIONS), _bilinear),
    **dict.fromkeys(SUMS, _sum),
    **dict.fromkeys(MATMULS, _matmul),
    **dict.fromkeys(NAMED, _activation),
    operator.getitem: _getitem,
    aten.addmm.default: _addmm,
    aten.cat.default: _cat,
    **dict.fromkeys(PADS, _pad),
    aten.linear.default: _fully_connected,
    aten.max_pool2d.default: _max_pool,
    BATCH_NORM: _batch_norm,
}
