"""One thin function per native operation: checks, layout, output allocation, dispatch.

*Pairs*: two int32 vectors of length P, the image and the unit of each pair; a delta is a tensor
``[P, ...]``, the change that an ablation makes to a tensor of the clean run. Base tensors
``[N, ...]`` belong to the clean run and are read by image index, never copied per pair.

Tensors on the CPU go to the C++ twin, tensors on a CUDA device to the CUDA twin, all others (and
all tensors where the compiled module is missing) to ``pyablate.reference.ops``. No operation
records gradients. On the CPU an index out of range raises ``ValueError``; on CUDA, where looking
would stop the stream, such a row comes back as NaN (-1 where the result is an integer).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from pyablate import _native
from pyablate._arguments import (
    check_classes,
    check_pairs,
    check_range,
    check_shape,
    check_tensor,
    two,
)
from pyablate._layout import (
    base_rows,
    dense,
    empty_rows,
    layout_of,
    output,
    same_layout,
    wider,
)
from pyablate.activation import Activation
from pyablate.codes import Codes
from pyablate.reference import ops as reference

__all__ = [
    "Activation",
    "Codes",
    "classify",
    "confusion_counts",
    "delta_activation",
    "delta_max_pool",
    "delta_mean",
    "encode",
    "head_flips",
    "masked_copies",
    "unit_delta",
]

_REAL = (torch.float32, torch.float64)
_FLOATS = (*_REAL, torch.bfloat16)


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
        The replacement: one for all (0-d), one per pair [P], or a map per pair
        [P, *x.shape without the batch and the unit axis].
    axis : int
        Axis of ``x`` that holds the units; not the batch axis.

    Returns
    -------
    Tensor
        [P, *x.shape[1:]] with ``out[p] = x[image[p]]`` but for unit ``unit[p]``; dtype of ``x``,
        channels_last where ``x`` is, else contiguous.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype, device or index does not fit; the message names the argument.
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
    core = _twin(x)
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
        outer,
        x.shape[axis],
        inner,
        *_context(x),
    )
    return out


def head_flips(
    logits: Tensor, delta: Tensor, weight: Tensor, baseline: Tensor, tolerance: Tensor
) -> Tensor:
    """Predict for every (image, unit) where the ablation reaches the classes by one linear map.

    Most pairs are settled without looking at the classes: the lead of the baseline class cannot
    shrink by more than ``delta`` times the spread of the unit's weights.

    Parameters
    ----------
    logits : Tensor
        [N, K], of the clean run, float32 or float64; bfloat16 is raised to float32.
    delta : Tensor
        [N, U], change of each unit's pooled activation.
    weight : Tensor
        [K, U], weight of the linear map.
    baseline : Tensor
        int32 [N], the class predicted by the clean run.
    tolerance : Tensor
        [N], smallest top-2 margin that is trusted, in units of the logits.

    Returns
    -------
    Tensor
        int32 [N, U]: argmax over k of ``logits[n, k] + delta[n, u] * weight[k, u]``, the lowest
        index on equality; -1 (undecided) unless the top-2 margin is above ``tolerance[n]``.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype, device or index does not fit; the message names the argument.
    """
    dtype = check_tensor("logits", logits, dims=2, dtypes=_FLOATS)
    images, classes = logits.shape
    check_tensor("delta", delta, dims=2, dtypes=_FLOATS, like=logits)
    units = delta.shape[1]
    check_shape("delta", delta, (images, units))
    check_tensor("weight", weight, dtypes=_FLOATS, like=logits)
    check_shape("weight", weight, (classes, units))
    check_classes(classes)
    check_pairs(logits, baseline=(baseline, 0, classes))
    check_shape("baseline", baseline, (images,))
    check_tensor("tolerance", tolerance, dtypes=_FLOATS, like=logits)
    check_shape("tolerance", tolerance, (images,))
    dtype = wider(logits, delta, weight)
    logits, delta, tolerance = (t.detach().to(dtype) for t in (logits, delta, tolerance))
    weight = weight.detach().to(dtype)
    core = _twin(logits)
    if core is None:
        return reference.head_flips(logits, delta, weight, baseline, tolerance)
    # The scan of one unit's classes wants [U, K]; no copy where weight is a view of such a tensor
    columns = weight.t().contiguous()
    if units == 0:
        return torch.empty(images, 0, dtype=torch.int32, device=logits.device)
    bounds = torch.stack([columns.amin(1), columns.amax(1), columns.abs().amax(1)])  # [3, U]
    out = torch.empty(images, units, dtype=torch.int32, device=logits.device)
    core.head_flips(
        logits.contiguous(),
        delta.contiguous(),
        columns,
        bounds,
        baseline.contiguous(),
        tolerance.contiguous(),
        out,
        *_context(logits),
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
    codes: Codes | None = None,
) -> Tensor:
    """Convolve each pair's single changed map: the first convolution after the unit.

    Parameters
    ----------
    delta : Tensor
        [N, U, H, W], change of each unit's map on each image; float32, float64 or bfloat16, any
        strides.
    weight : Tensor
        [I, kh, kw, O], the filters by input channel, output channel last
        (``conv.weight.permute(1, 2, 3, 0)``). bfloat16 maps are accumulated in float32.
    channel : Tensor
        int32 [U], input channel of the convolution that each column of ``delta`` stands for.
    image, column : Tensor
        int32 [P], the map of pair p is ``delta[image[p], column[p]]``.
    stride, padding, dilation : int or pair of int
        Of the convolution, (height, width).
    activation : Activation, optional
        Applied in the same pass: the result is then act(base + out) - act(base).
    base : Tensor, optional
        [N', O, Ho, Wo], output of the convolution (with bias) in the clean run: bfloat16 or the
        dtype in which ``delta`` is accumulated. Needed with ``activation``.
    base_image : Tensor, optional
        int32 [P], rows of ``base``; ``image`` if not given.
    out : Tensor, optional
        [P, O, Ho, Wo] channels_last to write to, dtype of ``delta``. Fresh memory costs more than
        the convolution where a result is larger than the allocator keeps at hand (32 MB).
    codes : Codes, optional
        Filled with the codes of the result, in the same pass.

    Returns
    -------
    Tensor
        [P, O, Ho, Wo] channels_last, dtype of ``delta``; no bias. ``out`` if that was given.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype, device or index does not fit; the message names the argument.
    """
    check_tensor("delta", delta, dims=4, dtypes=_FLOATS)
    check_tensor("weight", weight, dims=4, dtypes=_FLOATS, like=delta)
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
        check_tensor("base", base, dims=4, dtypes=_FLOATS, like=delta)
        check_shape("base", base, (base.shape[0], outputs, *size))
        rows = image if base_image is None else base_image
        check_pairs(delta, base_image=(rows, 0, base.shape[0]))
        check_shape("base_image", rows, (pairs,))
        base = base_rows(base.detach(), dtype, torch.channels_last)
    elif base is not None:
        raise ValueError("base: expected None because no activation is given, got a tensor")
    delta = delta.detach()
    weight = weight.detach().to(dtype).contiguous()
    result = output(out, (pairs, outputs, *size), delta, torch.channels_last)
    core = _twin(delta)
    if core is None or _cannot_encode(delta, codes):
        return reference.unit_delta(
            delta,
            weight,
            channel,
            image,
            column,
            activation=activation,
            base=base,
            base_image=base_image,
            out=result,
            codes=codes,
            **geometry,
        )
    threads, stream = _context(delta)
    scratch = None
    values, code_scale = _code_arguments(codes, result)
    if delta.device.type == "cpu":
        size_per_thread = core.unit_delta_scratch(
            delta, weight, result, values, geometry["stride"], geometry["dilation"]
        )
        scratch = torch.empty(size_per_thread * threads, dtype=dtype)
    core.unit_delta(
        delta,
        weight,
        channel.contiguous(),
        image.contiguous(),
        column.contiguous(),
        base,
        (image if base_image is None else base_image).contiguous(),
        result,
        values,
        code_scale,
        scratch,
        geometry["stride"],
        geometry["padding"],
        geometry["dilation"],
        *_activation_arguments(activation),
        threads,
        stream,
    )
    return result


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
    codes: Codes | None = None,
) -> Tensor:
    """Carry a delta through an elementwise function.

    Parameters
    ----------
    base : Tensor
        [N, *S], input of the function in the clean run: bfloat16 or the dtype in which ``delta`` is
        accumulated (float64 for float64, else float32).
    delta : Tensor
        [P, *S], float32, float64 or bfloat16.
    image : Tensor
        int32 [P], row of ``base`` for each pair.
    activation : Activation
        The function.
    scale, addend_scale : Tensor, optional
        float32 [P], factor of each pair's ``delta`` and ``addend``; 1 if not given.
    addend : Tensor, optional
        [P, *S], a second delta added to the first (residual sum), dtype of ``delta``.
    out : Tensor, optional
        [P, *S] to write to, dtype of ``delta``; may be ``delta`` itself.
    codes : Codes, optional
        Filled with the codes of the result, in the same pass.

    Returns
    -------
    Tensor
        act(base[image] + d) - act(base[image]) with d = delta * scale + addend * addend_scale,
        dtype and layout of ``delta``; ``out`` if that was given.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype, device or index does not fit; the message names the argument.
    """
    check_tensor("delta", delta, dtypes=_FLOATS)
    if delta.dim() < 1:
        raise ValueError("delta: expected at least one dimension, got none")
    check_tensor("base", base, dtypes=_FLOATS, like=delta)
    check_shape("base", base, (base.shape[0] if base.dim() else 0, *delta.shape[1:]))
    pairs = check_pairs(delta, image=(image, 0, base.shape[0]))
    check_shape("delta", delta, (pairs, *base.shape[1:]))
    for name, tensor in (("addend", addend), ("out", out)):
        if tensor is not None:
            check_tensor(name, tensor, dtypes=(delta.dtype,), like=delta)
            check_shape(name, tensor, tuple(delta.shape))
    scales = _scales(delta, scale=scale, addend_scale=addend_scale)
    change = dense(delta.detach())
    layout = layout_of(change)
    base = base_rows(base.detach(), reference.compute_dtype(delta.dtype), layout)
    if addend is not None:
        addend = addend.detach().contiguous(memory_format=layout)
    core = _twin(change)
    result = out if out is not None and same_layout(out, change) else torch.empty_like(change)
    if core is None or _cannot_encode(change, codes):
        reference.delta_activation(
            base, change, image, activation, out=result, addend=addend, scales=scales, codes=codes
        )
    else:
        threads, stream = _context(change)
        scratch = None if codes is None else torch.empty(threads * change[:1].numel())
        core.delta_activation(
            base,
            change,
            scales[0],
            addend,
            scales[1],
            image.contiguous(),
            result.detach(),
            *_code_arguments(codes, result),
            scratch,
            *_activation_arguments(activation),
            threads,
            stream,
        )
    if out is None or out is result:
        return result
    return out.copy_(result)


def encode(delta: Tensor) -> Codes:
    """Write a delta in 8 bits per number.

    Parameters
    ----------
    delta : Tensor
        [P, *S], float32, float64 or bfloat16.

    Returns
    -------
    Codes
        Of the shape of ``delta``, contiguous or channels_last as it is.

    Raises
    ------
    TypeError, ValueError
        If the dtype or the number of dimensions does not fit; the message names the argument.
    """
    check_tensor("delta", delta, dtypes=_FLOATS)
    if delta.dim() < 1:
        raise ValueError("delta: expected at least one dimension, got none")
    delta = dense(delta.detach())
    codes = Codes.empty(delta.shape, layout_of(delta), delta.device)
    each = torch.arange(len(delta), dtype=torch.int32, device=delta.device)
    # The identity reads no base, and writes what stands there already.
    delta_activation(delta, delta, each, Activation("identity"), out=delta, codes=codes)
    return codes


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
        [N, C, H, W], input of the function in the clean run: bfloat16 or the dtype in which
        ``delta`` is accumulated (float64 for float64, else float32).
    delta : Tensor
        [P, C, H, W], float32, float64 or bfloat16.
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
    """
    check_tensor("delta", delta, dims=4, dtypes=_FLOATS)
    check_tensor("base", base, dims=4, dtypes=_FLOATS, like=delta)
    check_shape("base", base, (base.shape[0], *delta.shape[1:]))
    pairs = check_pairs(delta, image=(image, 0, base.shape[0]))
    check_shape("delta", delta, (pairs, *base.shape[1:]))
    if delta.shape[2] * delta.shape[3] == 0:
        raise ValueError(f"delta: expected maps with positions, got shape {tuple(delta.shape)}")
    if addend is not None:
        check_tensor("addend", addend, dtypes=(delta.dtype,), like=delta)
        check_shape("addend", addend, tuple(delta.shape))
    scales = _scales(delta, scale=scale, addend_scale=addend_scale)
    dtype = reference.compute_dtype(delta.dtype)
    change = dense(delta.detach())
    layout = layout_of(change)
    base = base_rows(base.detach(), dtype, layout)
    if addend is not None:
        addend = addend.detach().contiguous(memory_format=layout)
    core = _twin(change)
    if core is None:
        return reference.delta_mean(base, change, image, activation, addend=addend, scales=scales)
    channels_last = layout == torch.channels_last
    threads, stream = _context(change)
    scratch = None
    if change.device.type == "cpu":
        row = delta.shape[1] if channels_last else delta.shape[2] * delta.shape[3]
        scratch = torch.empty(threads * row, dtype=dtype)
    out = torch.empty(delta.shape[:2], dtype=dtype, device=delta.device)
    core.delta_mean(
        base,
        change,
        scales[0],
        addend,
        scales[1],
        image.contiguous(),
        out,
        channels_last,
        scratch,
        *_activation_arguments(activation),
        threads,
        stream,
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
    codes: Codes | None = None,
) -> Tensor:
    """Carry a delta through max pooling, and through an elementwise function before it.

    Parameters
    ----------
    base : Tensor
        [N, C, H, W], input in the clean run: bfloat16 or the dtype in which ``delta`` is
        accumulated.
    delta : Tensor
        [P, C, H, W], float32, float64 or bfloat16.
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
    codes : Codes, optional
        Filled with the codes of the result, in the same pass.

    Returns
    -------
    Tensor
        [P, C, Ho, Wo], max_pool(act(base + delta * scale)) - max_pool(act(base)), dtype and layout
        of ``delta``; ``out`` if that was given.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype, device or index does not fit; the message names the argument.
    """
    check_tensor("delta", delta, dims=4, dtypes=_FLOATS)
    check_tensor("base", base, dims=4, dtypes=_FLOATS, like=delta)
    check_shape("base", base, (base.shape[0], *delta.shape[1:]))
    pairs = check_pairs(delta, image=(image, 0, base.shape[0]))
    check_shape("delta", delta, (pairs, *base.shape[1:]))
    geometry = {
        "kernel": two("kernel", kernel, 1),
        "stride": two("stride", stride, 1),
        "padding": two("padding", padding, 0),
        "dilation": two("dilation", dilation, 1),
        "out_size": two("out_size", out_size, 0),
    }
    for i in (0, 1):
        start = (geometry["out_size"][i] - 1) * geometry["stride"][i] - geometry["padding"][i]
        if start >= delta.shape[2 + i] > 0:
            raise ValueError(
                f"out_size: the last window must start inside the maps of {tuple(delta.shape[2:])},"
                f" got {geometry}"
            )
    scales = _scales(delta, scale=scale)
    change = dense(delta.detach())
    layout = layout_of(change)
    base = base_rows(base.detach(), reference.compute_dtype(delta.dtype), layout)
    shape = (*delta.shape[:2], *geometry["out_size"])
    result = output(out, shape, delta, layout)
    if result.numel() == 0:
        if codes is not None:
            codes.fill(result)
        return result
    core = _twin(change)
    if core is None or _cannot_encode(change, codes):
        return reference.delta_max_pool(
            base,
            change,
            image,
            activation=activation,
            scale=scales[0],
            out=result,
            codes=codes,
            **geometry,
        )
    if activation is not None and not activation.monotone:
        change = delta_activation(base, change, image, activation, scale=scales[0])
        base = reference.apply_activation(base.to(reference.compute_dtype(delta.dtype)), activation)
        activation, scales = None, [None]
    threads, stream = _context(change)
    scratch = None
    if change.device.type == "cpu":
        channels_last = layout == torch.channels_last
        part = (shape[1] if channels_last else shape[2]) * shape[3]
        parts = 0 if codes is None else shape[2] if channels_last else shape[1]
        size = threads * (2 + parts) * part
        scratch = torch.empty(size, dtype=reference.compute_dtype(delta.dtype))
    core.delta_max_pool(
        base,
        change,
        scales[0],
        image.contiguous(),
        result,
        *_code_arguments(codes, result),
        layout == torch.channels_last,
        *geometry.values(),
        scratch,
        *_activation_arguments(activation),
        threads,
        stream,
    )
    return result


def classify(
    logits: Tensor,
    delta: Tensor,
    image: Tensor,
    tolerance: Tensor,
    *,
    relative: float = 0.0,
) -> Tensor:
    """Predict each pair's class from the clean logits and their change.

    Parameters
    ----------
    logits : Tensor
        [N, K], of the clean run, float32 or float64; bfloat16 is raised to float32.
    delta : Tensor
        [P, K], change of the logits.
    image : Tensor
        int32 [P], row of ``logits`` for each pair.
    tolerance : Tensor
        [N], smallest top-2 margin that is trusted, in units of the logits.
    relative : float
        Added to the tolerance, times the spread (max - min over classes) of the pair's ``delta``:
        the rounding error of a low-precision delta grows with the delta.

    Returns
    -------
    Tensor
        int32 [P]: argmax of ``logits[image] + delta``, the lowest index on equality; -1 (undecided)
        unless the top-2 margin is above the tolerance.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype, device or index does not fit; the message names the argument.
    """
    check_tensor("logits", logits, dims=2, dtypes=_FLOATS)
    images, classes = logits.shape
    check_classes(classes)
    check_tensor("delta", delta, dims=2, dtypes=_FLOATS, like=logits)
    pairs = check_pairs(logits, image=(image, 0, images))
    check_shape("delta", delta, (pairs, classes))
    check_tensor("tolerance", tolerance, dtypes=_FLOATS, like=logits)
    check_shape("tolerance", tolerance, (images,))
    dtype = wider(logits, delta)
    logits, delta, tolerance = (t.detach().to(dtype) for t in (logits, delta, tolerance))
    core = _twin(logits)
    if core is None:
        return reference.classify(logits, delta, image, tolerance, relative=relative)
    out = torch.empty(pairs, dtype=torch.int32, device=logits.device)
    core.classify(
        logits.contiguous(),
        delta.contiguous(),
        image.contiguous(),
        tolerance.contiguous(),
        out,
        relative,
        *_context(logits),
    )
    return out


def confusion_counts(prediction: Tensor, label: Tensor, classes: int) -> Tensor:
    """Count predictions by unit, label and predicted class.

    Parameters
    ----------
    prediction : Tensor
        int32 [U, N], in [0, classes).
    label : Tensor
        int32 [N], in [0, classes).
    classes : int
        Number of classes K.

    Returns
    -------
    Tensor
        int32 [U, K, K], counts by [unit, label, predicted]. On CUDA an entry out of range is not
        counted.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype, device or index does not fit; the message names the argument.
    """
    check_classes(classes)
    check_tensor("prediction", prediction, dims=2, dtypes=(torch.int32,))
    check_pairs(prediction, label=(label, 0, classes))
    units, images = prediction.shape
    check_shape("label", label, (images,))
    check_range("prediction", prediction, 0, classes)
    core = _twin(prediction)
    if core is None:
        return reference.confusion_counts(prediction, label, classes)
    out = torch.empty(units, classes, classes, dtype=torch.int32, device=prediction.device)
    core.confusion_counts(prediction.contiguous(), label.contiguous(), out, *_context(prediction))
    return out


# --- dispatch ---------------------------------------------------------------------------------


def _twin(tensor: Tensor) -> Any:
    """Return the compiled module if it has a twin for the tensor's device, else None."""
    core = _native.core
    if core is None or tensor.device.type == "cpu":
        return core
    return core if tensor.device.type == "cuda" and core.has_cuda else None


def _context(tensor: Tensor) -> tuple[int, int]:
    """Return (number of CPU threads, CUDA stream handle) for work on ``tensor``."""
    if tensor.device.type == "cuda":
        return 1, torch.cuda.current_stream(tensor.device).cuda_stream
    return torch.get_num_threads(), 0


def _activation_arguments(activation: Activation | None) -> tuple[int, float, float]:
    if activation is None:
        return 0, 0.0, 0.0
    return activation.code, activation.a, activation.b


def _scales(like: Tensor, **scales: Tensor | None) -> list[Tensor | None]:
    """Check factors of the pairs; return them ready to be read."""
    ready: list[Tensor | None] = []
    for name, scale in scales.items():
        if scale is not None:
            check_tensor(name, scale, dims=1, dtypes=(torch.float32,), like=like)
            check_shape(name, scale, (like.shape[0],))
        ready.append(None if scale is None else scale.detach().contiguous())
    return ready


def _cannot_encode(like: Tensor, codes: Codes | None) -> bool:
    """Whether codes are wanted that the compiled twins do not write."""
    return codes is not None and (like.device.type != "cpu" or like.dtype == torch.float64)


def _code_arguments(codes: Codes | None, result: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if codes is None:
        return None, None
    check_tensor("codes", codes.values, dtypes=(torch.uint8,), like=result)
    check_shape("codes", codes.values, tuple(result.shape))
    if not codes.values.is_contiguous(memory_format=layout_of(result)):
        raise ValueError(f"codes: expected the layout of the result, {layout_of(result)}")
    return codes.values, codes.scale
