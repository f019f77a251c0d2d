"""Operations on single units: copies without one, and the first convolution behind it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from pyablate.ops import reference as reference
from pyablate.ops._checks import check_pairs, check_shape, check_tensor, two
from pyablate.ops._layout import base_rows, dense, empty_rows, output
from pyablate.ops.activations import Activation
from pyablate.ops.dispatch import (
    FLOATS,
    activation_arguments,
    backend,
    context,
    delta_backend,
    quantized_arguments,
    written,
)
from pyablate.ops.quantized import Quantized


def masked_copies(
    x: Tensor, image: Tensor, unit: Tensor, value: Tensor | float, *, axis: int = 1
) -> Tensor:
    """Copy activations, with one unit of each copy replaced.

    Parameters
    ----------
    x : Tensor
        Activations [N, ...], any dtype, with units along ``axis``.
    image, unit : Tensor
        int32 [P]. A unit of -1 leaves the copy as it is.
    value : Tensor or float
        The replacement: one for all (0-d), one per pair [P], or a map per pair,
        ``x.shape`` without the batch and the unit axis.
    axis : int
        Axis of ``x`` that holds the units; not the batch axis.

    Returns
    -------
    Tensor
        ``[P, *x.shape[1:]]`` with ``out[p] = x[image[p]]`` but for unit ``unit[p]``; dtype of
        ``x``, channels_last where ``x`` is, else contiguous.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype, device or index does not fit; the message names the argument.

    Examples
    --------
    >>> x, index = torch.tensor([[1.0, 2.0]]), torch.zeros(2, dtype=torch.int32)
    >>> pa.ops.masked_copies(x, index, torch.tensor([0, 1], dtype=torch.int32), 0.0).tolist()
    [[0.0, 2.0], [1.0, 0.0]]
    """
    check_tensor("x", x)
    if not -x.dim() < axis < x.dim() or axis % max(x.dim(), 1) == 0:
        raise ValueError(
            f"axis: expected an axis of x other than 0 (x has {x.dim()} dimensions), got {axis}"
        )
    axis %= x.dim()
    pairs = check_pairs(x, image=(image, 0, x.shape[0]), unit=(unit, -1, x.shape[axis]))
    value = torch.as_tensor(value, device=x.device)
    per_pair = (pairs, *x.shape[1:axis], *x.shape[axis + 1 :])
    if value.dim() > 0 and tuple(value.shape) not in {(pairs,), per_pair}:
        raise ValueError(
            f"value: expected a number, shape {(pairs,)} or {per_pair}, got {tuple(value.shape)}"
        )
    value = value.to(x.dtype)
    x = dense(x.detach())
    core = backend(x)
    if core is None:
        return reference.masked_copies(x, image, unit, value.detach(), axis=axis)
    out = empty_rows(x, pairs)
    channels_last = axis == 1 and not x.is_contiguous()
    if channels_last:
        outer, inner = x.shape[2] * x.shape[3], 1
    else:
        x = x.contiguous()
        out = out.contiguous()
        outer, inner = prod(x.shape[1:axis]), prod(x.shape[axis + 1 :])
    core.masked_copies(
        x,
        image.contiguous(),
        unit.contiguous(),
        value.detach().contiguous(),
        out,
        outer=outer,
        units=x.shape[axis],
        inner=inner,
        **context(x),
    )
    return out


def unit_delta(
    delta: Tensor,
    weight: Tensor,
    channel: Tensor,
    image: Tensor,
    column: Tensor,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: Activation | None = None,
    base: Tensor | None = None,
    base_image: Tensor | None = None,
    out: Tensor | None = None,
    quantized: Quantized | None = None,
) -> Tensor:
    """Convolve each pair's single changed map: the first convolution after the unit.

    Parameters
    ----------
    delta : Tensor
        [N, U, H, W], change of each unit's map on each image; float32, float64, bfloat16 or
        float16, any strides.
    weight : Tensor
        [I, kh, kw, O], the filters by input channel, output channel last
        (``conv.weight.permute(1, 2, 3, 0)``). bfloat16 and float16 maps are accumulated in
        float32.
    channel : Tensor
        int32 [U], input channel of the convolution that each column of ``delta`` stands for.
    image, column : Tensor
        int32 [P], the map of pair p is ``delta[image[p], column[p]]``.
    stride, padding, dilation : int or pair of int
        Of the convolution, (height, width).
    activation : Activation, optional
        Applied in the same pass: the result is then act(base + out) - act(base).
    base : Tensor, optional
        [N', O, Ho, Wo], output of the convolution (with bias) in the clean run, of a dtype
        as for :func:`delta_activation`. Needed with ``activation``.
    base_image : Tensor, optional
        int32 [P], rows of ``base``; ``image`` if not given.
    out : Tensor, optional
        [P, O, Ho, Wo] channels_last to write to, dtype of ``delta``. Fresh memory costs more than
        the convolution where a result is larger than the allocator keeps at hand (32 MB).
    quantized : Quantized, optional
        Filled with the quantized values of the result, in the same pass.

    Returns
    -------
    Tensor
        [P, O, Ho, Wo] channels_last, dtype of ``delta``; no bias. ``out`` if that was given;
        nothing (``[0]``) where the quantized values are all that is wanted.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype, device or index does not fit; the message names the argument.

    Examples
    --------
    >>> delta, weight = torch.ones(1, 1, 4, 4), torch.randn(8, 3, 3, 3)
    >>> zero = torch.zeros(1, dtype=torch.int32)
    >>> pa.ops.unit_delta(delta, weight, zero, zero, zero, padding=1).shape
    torch.Size([1, 3, 4, 4])
    """
    check_tensor("delta", delta, dims=4, dtypes=FLOATS)
    check_tensor("weight", weight, dims=4, dtypes=FLOATS, like=delta)
    images, units, height, width = delta.shape
    inputs, kernel_h, kernel_w, outputs = weight.shape
    check_pairs(delta, channel=(channel, 0, inputs))
    check_shape("channel", channel, (units,))
    pairs = check_pairs(delta, image=(image, 0, images), column=(column, 0, units))
    geometry = {
        "stride": two("stride", stride, 1),
        "padding": two("padding", padding, 0),
        "dilation": two("dilation", dilation, 1),
    }
    size = reference.output_size((height, width), (kernel_h, kernel_w), **geometry)
    if min(size) < 1 or min(kernel_h, kernel_w) < 1:
        raise ValueError(
            f"delta: maps of {(height, width)} are too small for a kernel of "
            f"{(kernel_h, kernel_w)} with {geometry}"
        )
    dtype = reference.compute_dtype(delta.dtype)
    if activation is not None:
        if base is None:
            raise ValueError("base: expected a tensor because activation is given, got None")
        check_tensor("base", base, dims=4, dtypes=FLOATS, like=delta)
        check_shape("base", base, (base.shape[0], outputs, *size))
        rows = image if base_image is None else base_image
        check_pairs(delta, base_image=(rows, 0, base.shape[0]))
        check_shape("base_image", rows, (pairs,))
        base = base_rows(base.detach(), delta.dtype, torch.channels_last)
    elif base is not None:
        raise ValueError("base: expected None because no activation is given, got a tensor")
    delta = delta.detach()
    weight = weight.detach().to(dtype).contiguous()
    result = output(out, (pairs, outputs, *size), delta, torch.channels_last)
    core = delta_backend(delta, quantized)
    if core is None:
        reference.unit_delta(
            delta,
            weight,
            channel,
            image,
            column,
            activation=activation,
            base=base,
            base_image=base_image,
            out=result,
            quantized=quantized,
            **geometry,
        )
        return result if written(result, quantized) is not None else result.new_empty(0)
    core.unit_delta(
        delta,
        weight,
        channel.contiguous(),
        image.contiguous(),
        column.contiguous(),
        base=base,
        base_image=(image if base_image is None else base_image).contiguous(),
        out=written(result, quantized),
        codes=quantized_arguments(quantized, result),
        activation=activation_arguments(activation),
        **geometry,
        **context(delta),
    )
    return result if written(result, quantized) is not None else result.new_empty(0)
