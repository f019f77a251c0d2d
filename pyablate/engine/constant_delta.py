"""Units replaced by one number: what comes out of channelwise operators without computing maps.

A map that holds one number everywhere stays such a map through activations and pooling. The change
is that number minus the clean map, which the clean run has computed anyway: no map is touched until
something mixes channels, and behind global pooling none ever is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from pyablate.engine.channel_delta import RESHAPES, ChannelDelta, averaged_axes, flattened
from pyablate.engine.job import Job
from pyablate.network.aten import ELEMENTWISE, SAME
from pyablate.network.graph import function, integers, settings

aten = torch.ops.aten

CONSTANT = frozenset({"zero", "constant", "mean", "class_mean"})
"""Interventions that put one number into all positions of a map."""


@dataclass(frozen=True)
class ConstantDelta:
    """One replaced channel per (image, column), the same number at all its positions.

    Attributes
    ----------
    value : Tensor
        ``[N, U]``, or ``[1, U]`` where it is the same for all images.
    axis, channel, size, inner, whole
        As in :class:`pyablate.engine.channel_delta.ChannelDelta`.
    """

    value: Tensor
    axis: int
    channel: Tensor
    size: int
    inner: int = 1
    whole: bool = False

    def change(self, clean: Tensor) -> ChannelDelta:
        """Return the number minus the clean tensor ``[N, ...]``."""
        held = ChannelDelta(self.value, self.axis, self.channel, self.size, self.inner, self.whole)
        base = held.of(clean)
        value = self.value.reshape(*self.value.shape, *[1] * (base.ndim - 2))
        return held.with_values(value - base)


def possible(job: Job) -> bool:
    """Whether a job's units are replaced by numbers."""
    return job.channelwise and job.intervention.kind in CONSTANT


def reaches(job: Job, nodes: list[fx.Node]) -> set[fx.Node]:
    """Nodes of a job's suffix whose clean tensors may be read because of this."""
    if not possible(job):
        return set()
    found = {nodes[0]} if nodes else set()
    for node in nodes:
        only = node.all_input_nodes[:1] == list(node.args[:1]) and len(node.all_input_nodes) == 1
        if only and node.all_input_nodes[0] in found and node.target in CARRIED:
            found.add(node)
    return found


def advance(held: Mapping[fx.Node, ConstantDelta], node: fx.Node) -> ConstantDelta | None:
    """Carry replaced units through a node, or return None where maps are needed."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or source not in held or len(node.all_input_nodes) > 1:
        return None
    unit, target = held[source], node.target
    if target in SAME:
        return unit
    if target in ELEMENTWISE:
        value = function(node)(unit.value, *node.args[1:], **node.kwargs)
        return replace(unit, value=value)
    if target in RESHAPES:
        return _reshape(unit, source, node)
    if target is aten.mean.dim:
        axes = averaged_axes(node, unit.axis, source.meta["val"].ndim)
        if axes is None or unit.inner > 1:
            return None
        keep = bool(settings(node, 2, False)[0])
        return unit if keep else replace(unit, axis=unit.axis - sum(a < unit.axis for a in axes))
    pools = target in POOLS and unit.axis == 1 and unit.inner == 1
    return unit if pools and source.meta["val"].ndim == 4 and _sees_no_padding(node) else None


def _reshape(unit: ConstantDelta, source: fx.Node, node: fx.Node) -> ConstantDelta | None:
    inner = flattened(node, source.meta["val"].shape, unit.axis, unit.inner)
    return None if inner is None else replace(unit, inner=inner)


def _sees_no_padding(node: fx.Node) -> bool:
    """Whether a pooling of equal numbers gives that number: averages may count padded zeros."""
    if node.target is not aten.avg_pool2d.default:
        return True
    padding, ceil = settings(node, 3, 0, False)[:2]
    divisor = settings(node, 6, None)[0]
    return not any(integers(padding)) and not ceil and divisor is None and not node.kwargs


POOLS = frozenset(
    {aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default}
)
CARRIED = SAME | ELEMENTWISE | POOLS | RESHAPES | {aten.mean.dim}
