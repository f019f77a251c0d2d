"""Lazy deltas: scale, residual sum and activation awaiting one fused operation.

Between two convolutions a change is scaled, added to that of a shortcut, activated, pooled and
quantized. Each of these values says what is still to be done; the next operator that needs a plain
tensor, or the native operation that does several steps in one pass, does it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from pyablate import ops
from pyablate.ops import Activation
from pyablate.ops.quantized import spread


@dataclass(frozen=True, eq=False)
class Scaled:
    """``values[p] * scale[p]``: what an 8-bit convolution gives.

    That of a 1 x 1 convolution may have a factor for each position.

    Attributes
    ----------
    values : Tensor
        ``[P, ...]``.
    scale : Tensor or None
        float32 ``[P]`` or ``[P, H, W]``; None for 1.
    fresh : bool
        Whether nobody else reads ``values``, so that results may be written there.
    """

    values: Tensor
    scale: Tensor | None = None
    fresh: bool = False

    def spell(self) -> Tensor:
        """Return the plain tensor."""
        if self.scale is None:
            return self.values
        factor = spread(self.scale, self.values.ndim).to(self.values.dtype)
        return self.values.mul_(factor) if self.fresh else self.values * factor

    def by_pair(self) -> Scaled:
        """Multiply factors of positions out: not every operation knows them."""
        if self.scale is None or self.scale.ndim == 1:
            return self
        return Scaled(self.spell(), fresh=self.fresh)


@dataclass(frozen=True, eq=False)
class Sum:
    """A residual sum that waits for its activation."""

    first: Scaled
    second: Scaled

    def spell(self) -> Tensor:
        """Return the plain tensor."""
        return self.first.spell() + self.second.spell()


@dataclass(frozen=True, eq=False)
class WaitingConvolution:
    """A convolution that does its activation too: the first after the unit, or one that is ours.

    Attributes
    ----------
    run : callable
        :func:`pyablate.ops.unit_delta`, or ``convolve`` of :mod:`pyablate.engine.winograd` or
        :mod:`pyablate.engine.pointwise`, but for activation, base and quantized values.
    adds : bool
        Whether it takes an ``addend`` too, a dense delta of the same shape.
    """

    run: Callable[..., Tensor]
    adds: bool = False

    def spell(self) -> Tensor:
        """Return the plain tensor."""
        return self.run()


@dataclass(frozen=True, eq=False)
class Activated:
    """An activation that waits for its pooling.

    Attributes
    ----------
    source : Scaled or Sum
        The change that goes in.
    node : fx.Node
        Whose clean tensor is the base.
    activation : Activation
        The function.
    run : callable
        Does it without the pooling.
    """

    source: Scaled | Sum
    node: fx.Node
    activation: Activation
    run: Callable[[], Tensor | QuantizedDelta]

    def spell(self) -> Tensor:
        """Return the plain tensor."""
        result = self.run()
        return result if isinstance(result, Tensor) else result.spell()


@dataclass(frozen=True, eq=False)
class QuantizedDelta:
    """A delta that only 8-bit convolutions read, and that exists as quantized values alone.

    Attributes
    ----------
    quantized : Quantized
        The delta.
    dtype : torch.dtype
        What it would be.
    """

    quantized: ops.Quantized
    dtype: torch.dtype

    def spell(self) -> Tensor:
        """Return the plain tensor."""
        return self.quantized.spell(self.dtype)


Pending = Scaled | Sum | WaitingConvolution | Activated | QuantizedDelta


def held(result: Tensor, quantized: ops.Quantized | None) -> Tensor | QuantizedDelta:
    """Return what an operation has given: its result, or quantized values that are all there is."""
    if quantized is None or not quantized.alone:
        return result
    return QuantizedDelta(quantized, result.dtype)


def activate(
    source: Scaled | Sum | WaitingConvolution,
    base: Tensor,
    image: Tensor,
    activation: Activation,
    quantized: ops.Quantized | None,
) -> Tensor | QuantizedDelta:
    """Do what is pending and the activation, in one pass."""
    if isinstance(source, WaitingConvolution):
        return held(source.run(activation=activation, base=base, quantized=quantized), quantized)
    first, second = _parts(source)
    result = ops.delta_activation(
        base,
        first.values,
        image,
        activation,
        scale=first.scale,
        addend=None if second is None else second.values,
        addend_scale=None if second is None else second.scale,
        out=first.values if first.fresh else None,
        quantized=quantized,
    )
    return held(result, quantized)


def mean(source: Scaled | Sum, base: Tensor, image: Tensor, activation: Activation) -> Tensor:
    """Do what is pending, the activation and global average pooling, in one pass: ``[P, C]``."""
    first, second = _parts(source)
    first, second = first.by_pair(), None if second is None else second.by_pair()
    return ops.delta_mean(
        base,
        first.values,
        image,
        activation,
        scale=first.scale,
        addend=None if second is None else second.values,
        addend_scale=None if second is None else second.scale,
    )


def _parts(source: Scaled | Sum) -> tuple[Scaled, Scaled | None]:
    return (source.first, source.second) if isinstance(source, Sum) else (source, None)
