"""Convolutions that libraries are slow at: 3 x 3 in float32, depthwise in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pyablate.ops import dispatch
from pyablate.ops import reference as reference
from pyablate.ops._checks import check_pairs, check_shape, check_tensor, two
from pyablate.ops._layout import base_rows, output
from pyablate.ops.activations import Activation
from pyablate.ops.dispatch import FLOATS, activation_arguments, backend, context

PANEL = 16
"""Output channels whose filters lie together."""

_TO_PRODUCTS = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
"""A filter's values at the points 0, 1, -1, 2, -2 and infinity, each by its share of the sum."""


def winograd_filters(weight: Tensor) -> Tensor:
    """Transform 3 x 3 filters for :func:`delta_winograd`, once for many calls.

    Parameters
    ----------
    weight : Tensor
        ``[O, C, 3, 3]``, any floating dtype.

    Returns
    -------
    Tensor
        float32 ``[36, ceil(O / 16), C, 16]``, zeros beyond the O channels. Lavin and Gray (2016),
        F(4 x 4, 3 x 3); computed in float64.

    Raises
    ------
    ValueError, TypeError
        If shape or dtype does not fit.

    Examples
    --------
    >>> pa.ops.winograd_filters(torch.randn(8, 4, 3, 3)).shape
    torch.Size([36, 1, 4, 16])
    """
    check_tensor("weight", weight, dims=4, dtypes=FLOATS)
    outputs, inputs = weight.shape[:2]
    check_shape("weight", weight, (outputs, inputs, 3, 3))
    points = torch.tensor(_TO_PRODUCTS, dtype=torch.float64)
    whole = functional.pad(weight.detach().cpu(), (0, 0, 0, 0, 0, 0, 0, -outputs % PANEL))
    # Laid out before they are transformed, while there are nine planes of them and not 36.
    panels = whole.unflatten(0, (-1, PANEL)).permute(3, 4, 0, 2, 1)
    products: Tensor = torch.kron(points, points) @ panels.double().reshape(9, -1)
    return products.float().view(36, *panels.shape[2:])


def delta_winograd(
    delta: Tensor,
    weight: Tensor,
    filters: Tensor,
    *,
    padding: int | Sequence[int] = 0,
    activation: Activation | None = None,
    base: Tensor | None = None,
    image: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    """Convolve a dense delta by 3 x 3 filters with stride 1, and do what follows in the same pass.

    By Winograd's minimal filtering: a quarter of the multiplications of the sum over taps, and
    rounding errors some ten times as large. Tiles of the maps where nothing changes are left out.

    Parameters
    ----------
    delta : Tensor
        float32 ``[P, C, H, W]``.
    weight : Tensor
        float32 ``[O, C, 3, 3]``; read only where there is no compiled version (on a GPU, PyTorch
        has its own).
    filters : Tensor
        :func:`winograd_filters` of ``weight``.
    padding : int or pair of int
        Of the convolution, (height, width).
    activation : Activation, optional
        Applied in the same pass: the result is then act(base + d) - act(base).
    base : Tensor, optional
        ``[N, O, Ho, Wo]``, float32 or bfloat16, output of the convolution (with bias) in the clean
        run. Needed with ``activation``.
    image : Tensor, optional
        int32 ``[P]``, row of ``base`` for each pair. Needed with ``activation``.
    addend : Tensor, optional
        float32 ``[P, O, Ho, Wo]``, added before the activation (residual sum).

    Returns
    -------
    Tensor
        float32 ``[P, O, Ho, Wo]`` channels_last; no bias.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype, device or index does not fit; the message names the argument.

    Examples
    --------
    >>> delta, weight = torch.randn(2, 4, 8, 8), torch.randn(8, 4, 3, 3)
    >>> filters = pa.ops.winograd_filters(weight)
    >>> pa.ops.delta_winograd(delta, weight, filters, padding=1).shape
    torch.Size([2, 8, 8, 8])
    """
    single = (torch.float32,)
    check_tensor("delta", delta, dims=4, dtypes=single)
    check_tensor("weight", weight, dims=4, dtypes=single, like=delta)
    (pairs, inputs, height, width), outputs = delta.shape, weight.shape[0]
    check_shape("weight", weight, (outputs, inputs, 3, 3))
    pad = two("padding", padding, 0)
    size = height + 2 * pad[0] - 2, width + 2 * pad[1] - 2
    if min(size) < 1:
        raise ValueError(f"delta: maps of {(height, width)} are too small with padding {pad}")
    check_tensor("filters", filters, dims=4, dtypes=single)
    check_shape("filters", filters, (36, -(-outputs // PANEL), inputs, PANEL))
    if not (activation is None) == (base is None) == (image is None):
        raise ValueError("base, image: expected tensors where activation is given, and only there")
    if base is not None and image is not None:
        check_tensor("base", base, dims=4, dtypes=FLOATS, like=delta)
        check_shape("base", base, (base.shape[0], outputs, *size))
        base = base_rows(base.detach(), torch.float32, torch.channels_last)
        check_pairs(delta, image=(image, 0, base.shape[0]))
        check_shape("image", image, (pairs,))
        image = image.contiguous()
    if addend is not None:
        check_tensor("addend", addend, dims=4, dtypes=single, like=delta)
        check_shape("addend", addend, (pairs, outputs, *size))
        addend = addend.detach().contiguous(memory_format=torch.channels_last)
    delta = delta.detach().contiguous(memory_format=torch.channels_last)
    result = output(None, (pairs, outputs, *size), delta, torch.channels_last)
    core = backend(delta) if delta.device.type == "cpu" else None
    if core is None:
        return reference.delta_winograd(
            delta,
            weight.detach(),
            padding=pad,
            activation=activation,
            base=base,
            image=image,
            addend=addend,
            out=result,
        )
    core.delta_winograd(
        delta,
        filters.detach().contiguous(),
        base=base,
        image=image,
        addend=addend,
        out=result,
        padding=pad,
        activation=activation_arguments(activation),
        threads=context(delta)["threads"],
    )
    return result


def depthwise(
    x: Tensor,
    weight: Tensor,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Convolve each channel by its own filter.

    On a processor in float64, in which libraries convolve channel after channel. On a GPU in any
    precision, since cuDNN prepares itself for each number of images that it has not met.

    Parameters
    ----------
    x : Tensor
        ``[N, C, H, W]``: float64; on a GPU float32, bfloat16 and float16, too.
    weight : Tensor
        ``[C, 1, kh, kw]``, dtype of ``x``.
    stride, padding, dilation : int or pair of int
        Of the convolution, (height, width).

    Returns
    -------
    Tensor
        ``[N, C, Ho, Wo]`` channels_last, dtype of ``x``, added up in float32 at least; no bias.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype or device does not fit; the message names the argument.

    Examples
    --------
    >>> x, weight = torch.randn(2, 4, 8, 8).double(), torch.randn(4, 1, 5, 5).double()
    >>> pa.ops.depthwise(x, weight, stride=2, padding=2).shape
    torch.Size([2, 4, 4, 4])
    """
    known = (torch.float64,) if dispatch.on_processor(x) else FLOATS
    check_tensor("x", x, dims=4, dtypes=known)
    check_tensor("weight", weight, dims=4, dtypes=(x.dtype,), like=x)
    (images, channels, *maps), kernel = x.shape, (weight.shape[2], weight.shape[3])
    check_shape("weight", weight, (channels, 1, *kernel))
    geometry = {
        "stride": two("stride", stride, 1),
        "padding": two("padding", padding, 0),
        "dilation": two("dilation", dilation, 1),
    }
    size = reference.output_size(tuple(maps), kernel, **geometry)
    if min(*size, *kernel) < 1:
        raise ValueError(
            f"x: maps of {tuple(maps)} are too small for a kernel of {kernel} with {geometry}"
        )
    x, weight = x.detach().contiguous(memory_format=torch.channels_last), weight.detach()
    out = output(None, (images, channels, *size), x, torch.channels_last)
    core = backend(x)
    if core is None:
        return reference.depthwise(x, weight, out=out, **geometry)
    filters = weight.squeeze(1).permute(1, 2, 0).contiguous()  # channels fill the vectors
    filters = filters.to(torch.promote_types(x.dtype, torch.float32))
    core.depthwise(x, filters, out, **context(x), **geometry)
    return out
