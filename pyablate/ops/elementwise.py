"""Operations on dense changes: what happens between two convolutions, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyablate.ops import reference as reference
from pyablate.ops._checks import check_shape, check_tensor, two
from pyablate.ops._layout import base_rows, dense, layout_of, output, same_layout
from pyablate.ops.activations import Activation
from pyablate.ops.dispatch import (
    FLOATS,
    activation_arguments,
    check_change,
    context,
    delta_backend,
    quantized_arguments,
    ready_scales,
    written,
)
from pyablate.ops.quantized import Quantized, rows, spread


def delta_activation(
    base: Tensor,
    delta: Tensor,
    image: Tensor,
    activation: Activation,
    *,
    scale: Tensor | None = None,
    addend: Tensor | None = None,
    addend_scale: Tensor | None = None,
    out: Tensor | None = None,
    quantized: Quantized | None = None,
) -> Tensor:
    """Carry a delta through an elementwise function.

    Parameters
    ----------
    base : Tensor
        ``[N, *S]``, input of the function in the clean run: the dtype in which ``delta`` is
        accumulated (float64 for float64, else float32) or that of ``delta`` or, beside float32,
        bfloat16; what is none of these is converted first.
    delta : Tensor
        ``[P, *S]``, float32, float64, bfloat16 or float16, which is for GPUs: on a processor
        PyTorch does it, not a kernel.
    image : Tensor
        int32 [P], row of ``base`` for each pair.
    activation : Activation
        The function.
    scale, addend_scale : Tensor, optional
        float32 [P], factor of each pair's ``delta`` and ``addend``; 1 if not given. Of maps
        ``[P, C, H, W]`` also ``[P, H, W]``, a factor of each position.
    addend : Tensor, optional
        ``[P, *S]``, a second delta added to the first (residual sum), dtype of ``delta``.
    out : Tensor, optional
        ``[P, *S]`` to write to, dtype of ``delta``; may be ``delta`` itself.
    quantized : Quantized, optional
        Filled with the quantized values of the result, in the same pass.

    Returns
    -------
    Tensor
        ``act(base[image] + d) - act(base[image])`` with
        ``d = delta * scale + addend * addend_scale``, dtype and layout of ``delta``, with factors
        of positions channels_last; ``out`` if that was given; nothing (``[0]``) where the quantized
        values are all that is wanted.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype, device or index does not fit; the message names the argument.

    Examples
    --------
    >>> base, delta = torch.tensor([[1.0, -1.0]]), torch.tensor([[-3.0, 2.0]])
    >>> image = torch.zeros(1, dtype=torch.int32)
    >>> pa.ops.delta_activation(base, delta, image, pa.ops.Activation("relu")).tolist()
    [[-1.0, 1.0]]
    """
    check_change(base, delta, image)
    for name, tensor in (("addend", addend), ("out", out)):
        if tensor is not None:
            check_tensor(name, tensor, dtypes=(delta.dtype,), like=delta)
            check_shape(name, tensor, tuple(delta.shape))
    finer = (scale, addend_scale, None if quantized is None else quantized.scale)
    if any(factor is not None and factor.ndim == 3 for factor in finer):
        scales = ready_scales(delta, finer=True, scale=scale, addend_scale=addend_scale)
        return _at_positions(base, delta, image, activation, scales, addend, out, quantized)
    scales = ready_scales(delta, scale=scale, addend_scale=addend_scale)
    change = dense(delta.detach())
    layout = layout_of(change)
    base = base_rows(base.detach(), delta.dtype, layout)
    if addend is not None:
        addend = addend.detach().contiguous(memory_format=layout)
    core = delta_backend(change, quantized)
    result = out if out is not None and same_layout(out, change) else torch.empty_like(change)
    if core is None:
        reference.delta_activation(
            base,
            change,
            image,
            activation,
            out=result,
            addend=addend,
            scales=scales,
            quantized=quantized,
        )
    else:
        core.delta_activation(
            base,
            change,
            image.contiguous(),
            scale=scales[0],
            addend=addend,
            addend_scale=scales[1],
            out=written(result.detach(), quantized),
            codes=quantized_arguments(quantized, result),
            activation=activation_arguments(activation),
            **context(change),
        )
    if written(result, quantized) is None:
        return result.new_empty(0)
    if out is None or out is result:
        return result
    return out.copy_(result)


def _at_positions(
    base: Tensor,
    delta: Tensor,
    image: Tensor,
    activation: Activation,
    scales: list[Tensor | None],
    addend: Tensor | None,
    out: Tensor | None,
    quantized: Quantized | None,
) -> Tensor:
    """Do the same for maps whose positions have factors of their own: each is a row."""
    pairs, _, *size = delta.shape
    positions = size[0] * size[1]
    if quantized is not None and not quantized.by_position:
        # A row knows nothing of the largest change of its pair.
        delta = _times(delta, scales[0])
        addend = None if addend is None else _times(addend, scales[1])
        return delta_activation(
            base, delta, image, activation, addend=addend, out=out, quantized=quantized
        )
    if quantized is not None:
        check_shape("quantized", quantized.values, tuple(delta.shape))
    factors = [
        None if s is None else s.repeat_interleave(positions) if s.ndim == 1 else s.reshape(-1)
        for s in scales
    ]
    place = torch.arange(positions, dtype=torch.int32, device=delta.device)
    result = delta_activation(
        rows(base),
        rows(delta),
        (image.unsqueeze(1) * positions + place).reshape(-1),
        activation,
        scale=factors[0],
        addend=None if addend is None else rows(addend),
        addend_scale=factors[1],
        out=None if out is None else rows(out),
        quantized=None if quantized is None else quantized.rows(),
    )
    if written(result, quantized) is None:
        return result
    maps = result.unflatten(0, (pairs, *size)).permute(0, 3, 1, 2)
    if out is None or out.is_contiguous(memory_format=torch.channels_last):
        return maps if out is None else out
    return out.copy_(maps)


def _times(delta: Tensor, scale: Tensor | None) -> Tensor:
    return delta if scale is None else (delta * spread(scale, 4)).to(delta.dtype)


def encode(delta: Tensor, *, by_position: bool = False) -> Quantized:
    """Write a delta in 8 bits per number.

    Parameters
    ----------
    delta : Tensor
        ``[P, *S]``, float32, float64, bfloat16 or float16.
    by_position : bool
        Whether each position of maps ``[P, C, H, W]`` has a factor of its own.

    Returns
    -------
    Quantized
        Of the shape of ``delta``, contiguous or channels_last as it is.

    Raises
    ------
    TypeError, ValueError
        If the dtype or the number of dimensions does not fit; the message names the argument.

    Examples
    --------
    >>> pa.ops.encode(torch.tensor([[1.0, -2.0], [0.0, 0.0]])).values.shape
    torch.Size([2, 2])
    """
    check_tensor("delta", delta, dtypes=FLOATS)
    if delta.dim() < 1:
        raise ValueError("delta: expected at least one dimension, got none")
    if by_position and delta.dim() != 4:
        raise ValueError(f"delta: expected maps [P, C, H, W], got shape {tuple(delta.shape)}")
    delta = dense(delta.detach())
    layout = torch.channels_last if by_position else layout_of(delta)
    quantized = Quantized.empty(
        delta.shape, layout, delta.device, alone=True, by_position=by_position
    )
    each = torch.arange(len(delta), dtype=torch.int32, device=delta.device)
    delta_activation(
        delta, delta, each, Activation("identity"), quantized=quantized
    )  # reads no base
    return quantized


def delta_mean(
    base: Tensor,
    delta: Tensor,
    image: Tensor,
    activation: Activation,
    *,
    scale: Tensor | None = None,
    addend: Tensor | None = None,
    addend_scale: Tensor | None = None,
) -> Tensor:
    """Carry a delta through an elementwise function and global average pooling.

    Parameters
    ----------
    base : Tensor
        [N, C, H, W], input of the function in the clean run: the dtype in which ``delta`` is
        accumulated (float64 for float64, else float32) or that of ``delta`` or, beside float32,
        bfloat16; what is none of these is converted first.
    delta : Tensor
        [P, C, H, W], float32, float64, bfloat16 or float16.
    image : Tensor
        int32 [P], row of ``base`` for each pair.
    activation : Activation
        The function; ``Activation("identity")`` for the mean alone.
    scale, addend, addend_scale : Tensor, optional
        As for :func:`delta_activation`.

    Returns
    -------
    Tensor
        [P, C], mean over the positions of act(base[image] + d) - act(base[image]) with
        d = delta * scale + addend * addend_scale, in the dtype of accumulation.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype, device or index does not fit; the message names the argument.

    Examples
    --------
    >>> base, delta = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    >>> image = torch.zeros(1, dtype=torch.int32)
    >>> pa.ops.delta_mean(base, delta, image, pa.ops.Activation("relu")).tolist()
    [[1.0]]
    """
    check_change(base, delta, image, dims=4)
    if delta.shape[2] * delta.shape[3] == 0:
        raise ValueError(f"delta: expected maps with positions, got shape {tuple(delta.shape)}")
    if addend is not None:
        check_tensor("addend", addend, dtypes=(delta.dtype,), like=delta)
        check_shape("addend", addend, tuple(delta.shape))
    scales = ready_scales(delta, scale=scale, addend_scale=addend_scale)
    dtype = reference.compute_dtype(delta.dtype)
    change = dense(delta.detach())
    layout = layout_of(change)
    base = base_rows(base.detach(), delta.dtype, layout)
    if addend is not None:
        addend = addend.detach().contiguous(memory_format=layout)
    core = delta_backend(change)
    if core is None:
        return reference.delta_mean(base, change, image, activation, addend=addend, scales=scales)
    out = torch.empty(delta.shape[:2], dtype=dtype, device=delta.device)
    core.delta_mean(
        base,
        change,
        image.contiguous(),
        scale=scales[0],
        addend=addend,
        addend_scale=scales[1],
        out=out,
        channels_last=layout == torch.channels_last,
        activation=activation_arguments(activation),
        **context(change),
    )
    return out


def delta_max_pool(
    base: Tensor,
    delta: Tensor,
    image: Tensor,
    *,
    kernel: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    out_size: Sequence[int],
    activation: Activation | None = None,
    scale: Tensor | None = None,
    out: Tensor | None = None,
    quantized: Quantized | None = None,
) -> Tensor:
    """Carry a delta through max pooling, and through an elementwise function before it.

    Parameters
    ----------
    base : Tensor
        [N, C, H, W], input in the clean run, of a dtype as for :func:`delta_activation`.
    delta : Tensor
        [P, C, H, W], float32, float64, bfloat16 or float16.
    image : Tensor
        int32 [P], row of ``base`` for each pair.
    kernel, stride, padding, dilation : int or pair of int
        Of the pooling, (height, width).
    out_size : pair of int
        (Ho, Wo); the caller knows whether it is rounded up (``ceil_mode``).
    activation : Activation, optional
        Applied before the pooling; the identity if not given.
    scale : Tensor, optional
        float32 [P], factor of each pair's ``delta``; 1 if not given.
    out : Tensor, optional
        [P, C, Ho, Wo] to write to, dtype and layout of ``delta``.
    quantized : Quantized, optional
        Filled with the quantized values of the result, in the same pass.

    Returns
    -------
    Tensor
        [P, C, Ho, Wo], max_pool(act(base + delta * scale)) - max_pool(act(base)), dtype and layout
        of ``delta``; ``out`` if that was given; nothing (``[0]``) where the quantized values are
        all that is wanted.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype, device or index does not fit; the message names the argument.

    Examples
    --------
    >>> base, delta = torch.zeros(1, 1, 2, 2), torch.tensor([[[[0.0, 3.0], [0.0, 0.0]]]])
    >>> image = torch.zeros(1, dtype=torch.int32)
    >>> pa.ops.delta_max_pool(base, delta, image, kernel=2, stride=2, out_size=(1, 1)).tolist()
    [[[[3.0]]]]
    """
    check_change(base, delta, image, dims=4)
    window = {
        "kernel": two("kernel", kernel, 1),
        "stride": two("stride", stride, 1),
        "padding": two("padding", padding, 0),
        "dilation": two("dilation", dilation, 1),
    }
    size = two("out_size", out_size, 0)
    for i in (0, 1):
        start = (size[i] - 1) * window["stride"][i] - window["padding"][i]
        if start >= delta.shape[2 + i] > 0:
            raise ValueError(
                f"out_size: the last window must start inside the maps of {tuple(delta.shape[2:])},"
                f" got {size} for {window}"
            )
    scales = ready_scales(delta, scale=scale)
    change = dense(delta.detach())
    layout = layout_of(change)
    base = base_rows(base.detach(), delta.dtype, layout)
    result = output(out, (*delta.shape[:2], *size), delta, layout)
    if result.numel() == 0:
        if quantized is not None:
            quantized.fill(result)
        return result
    core = delta_backend(change, quantized)
    if core is None:
        reference.delta_max_pool(
            base,
            change,
            image,
            activation=activation,
            scale=scales[0],
            out=result,
            quantized=quantized,
            out_size=size,
            **window,
        )
        return result if written(result, quantized) is not None else result.new_empty(0)
    if activation is not None and not activation.monotone:
        change = delta_activation(base, change, image, activation, scale=scales[0])
        base = reference.apply_activation(base.to(reference.compute_dtype(delta.dtype)), activation)
        activation, scales = None, [None]
    core.delta_max_pool(
        base,
        change,
        image.contiguous(),
        scale=scales[0],
        out=written(result, quantized),
        codes=quantized_arguments(quantized, result),
        channels_last=layout == torch.channels_last,
        activation=activation_arguments(activation),
        **window,
        **context(change),
    )
    return result if written(result, quantized) is not None else result.new_empty(0)
