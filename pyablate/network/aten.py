"""Sets of ATen operators that the delta rules treat alike, and names of activations."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from pyablate.network.graph import BATCH_NORM, MARKER, PADS, remembered, settings
from pyablate.ops import Activation

aten = torch.ops.aten


def _overloads(names: str) -> frozenset[Any]:
    """ATen overloads by name, ``"view.default neg.default"``."""
    pairs = (name.split(".") for name in names.split())
    return frozenset(getattr(getattr(aten, name), overload) for name, overload in pairs)


LINEAR_POOLS = _overloads(
    "avg_pool1d.default avg_pool2d.default adaptive_avg_pool1d.default adaptive_avg_pool2d.default"
)

MAX_POOLS = _overloads("max_pool1d.default max_pool2d.default")

DIVISIONS = _overloads("div.Tensor div.Scalar")

SUBTRACTIONS = _overloads("sub.Tensor sub.Scalar")

SAME = frozenset({MARKER}) | _overloads(
    "alias.default clone.default contiguous.default detach.default dropout.default "
    "feature_dropout.default lift_fresh_copy.default"
)

ELEMENTWISE = _overloads(
    "abs.default celu.default clamp.default clamp_min.default elu.default exp.default gelu.default "
    "hardsigmoid.default hardswish.default hardtanh.default leaky_relu.default log_sigmoid.default "
    "mish.default pow.Tensor_Scalar relu.default relu6.default selu.default sigmoid.default "
    "silu.default softplus.default sqrt.default tanh.default threshold.default"
)

FLOATS = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
"""Dtypes that the native operations take; a network may have others inside."""

STRUCTURE = _overloads(
    "view.default _unsafe_view.default reshape.default flatten.using_ints unflatten.int "
    "permute.default transpose.int t.default squeeze.default squeeze.dim squeeze.dims "
    "unsqueeze.default select.int slice.Tensor narrow.default split.Tensor "
    "split_with_sizes.default chunk.default unbind.int expand.default flip.default roll.default "
    "repeat.default mean.dim sum.dim_IntList neg.default pixel_shuffle.default "
    "pixel_unshuffle.default channel_shuffle.default upsample_nearest2d.vec "
    "upsample_bilinear2d.vec movedim.int avg_pool3d.default adaptive_avg_pool3d.default"
)

VIEWS = _overloads(
    "view.default _unsafe_view.default reshape.default flatten.using_ints unflatten.int "
    "permute.default transpose.int unsqueeze.default"
)
"""Of :data:`STRUCTURE` what leaves each number as it is, once."""

ACTIVATIONS: dict[Any, Any] = {
    aten.relu.default: "relu",
    aten.gelu.default: "gelu",
    aten.silu.default: "silu",
    aten.hardswish.default: "hardswish",
    aten.hardsigmoid.default: "hardsigmoid",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
}

NAMED = frozenset(ACTIVATIONS) | _overloads(
    "hardtanh.default relu6.default leaky_relu.default elu.default"
)

MATMULS = _overloads("matmul.default mm.default bmm.default")

LINEAR = STRUCTURE | SAME | LINEAR_POOLS | PADS | {aten.cat.default, BATCH_NORM, operator.getitem}

SUMS = _overloads("add.Tensor add.Scalar") | SUBTRACTIONS


@remembered
def named_activation(node: fx.Node) -> Activation | None:
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


def two(value: Any) -> list[int]:
    """Return both sizes of a setting that may be given once for both."""
    values = [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]
    return values * 2 if len(values) == 1 else values
