"""Sets of ATen operators that the delta rules treat alike, and names of activations."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from pyablate.network.graph import BATCH_NORM, MARKER, PADS, remembered, settings
from pyablate.ops import Activation

aten = torch.ops.aten

LINEAR_POOLS = frozenset(
    {
        aten.avg_pool1d.default,
        aten.avg_pool2d.default,
        aten.adaptive_avg_pool1d.default,
        aten.adaptive_avg_pool2d.default,
    }
)


MAX_POOLS = frozenset({aten.max_pool1d.default, aten.max_pool2d.default})


DIVISIONS = frozenset({aten.div.Tensor, aten.div.Scalar})


SUBTRACTIONS = frozenset({aten.sub.Tensor, aten.sub.Scalar})


SAME = frozenset(
    {
        MARKER,
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.dropout.default,
        aten.feature_dropout.default,
        aten.lift_fresh_copy.default,
    }
)


ELEMENTWISE = frozenset(
    {
        aten.abs.default,
        aten.celu.default,
        aten.clamp.default,
        aten.clamp_min.default,
        aten.elu.default,
        aten.exp.default,
        aten.gelu.default,
        aten.hardsigmoid.default,
        aten.hardswish.default,
        aten.hardtanh.default,
        aten.leaky_relu.default,
        aten.log_sigmoid.default,
        aten.mish.default,
        aten.pow.Tensor_Scalar,
        aten.relu.default,
        aten.relu6.default,
        aten.selu.default,
        aten.sigmoid.default,
        aten.silu.default,
        aten.softplus.default,
        aten.sqrt.default,
        aten.tanh.default,
        aten.threshold.default,
    }
)


FLOATS = frozenset({torch.float32, torch.float64, torch.bfloat16})
"""Dtypes that the native operations take; a network may have others inside."""

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
