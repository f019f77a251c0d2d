"""Statistics of activations, one reading of the maps: the operations that attributes stand on.

They keep to the rules of :mod:`pyablate.ops`: thin functions that check, allocate and dispatch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from pyablate._arguments import check_classes, check_pairs, check_range, check_shape, check_tensor
from pyablate._layout import dense
from pyablate.ops.dispatch import context, twin
from pyablate.reference import ops as reference

__all__ = ["ClassMoments", "class_moments", "joint_histogram"]

_FLOATS = (torch.float32, torch.float64, torch.bfloat16)


@dataclass(frozen=True)
class ClassMoments:
    """What one reading of the maps ``[N, ..., C, ...]`` of C units on N images tells.

    Attributes
    ----------
    pooled : Tensor
        ``[N, C]``, mean of each map over its positions; float64 for float64 maps, else float32.
    least : Tensor
        ``[C]``, smallest value at any position, dtype of ``pooled``.
    positive : Tensor
        int64 ``[C]``, positions above 0.
    total, square, maximum : Tensor
        float64 ``[C, K]``, sum, sum of squares and maximum of ``pooled`` over the images of a
        class; the maximum over no image is minus infinity.
    active : Tensor
        int64 ``[C, K]``, images of a class on which some position is above 0.
    count : Tensor
        int64 ``[K]``, images of each class.
    positions : int
        Positions of one map.
    """

    pooled: Tensor
    least: Tensor
    positive: Tensor
    total: Tensor
    square: Tensor
    maximum: Tensor
    active: Tensor
    count: Tensor
    positions: int


def class_moments(x: Tensor, label: Tensor, classes: int, *, axis: int = 1) -> ClassMoments:
    """Moments of pooled activations per unit and class, in one reading of the maps.

    Parameters
    ----------
    x : Tensor
        Activations ``[N, ...]``, at least one image, float32, float64 or bfloat16, with units
        along ``axis`` and at least one position.
    label : Tensor
        int32 ``[N]``, in ``[0, classes)``.
    classes : int
        Number of classes K.
    axis : int
        Axis of ``x`` that holds the units; not the batch axis.

    Returns
    -------
    ClassMoments

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype, device or label does not fit; the message names the argument.
    """
    check_tensor("x", x, dtypes=_FLOATS)
    if not -x.dim() < axis < x.dim() or axis % max(x.dim(), 1) == 0:
        raise ValueError(
            f"axis: expected an axis of x other than 0 (x has {x.dim()} dimensions), got {axis}"
        )
    axis %= x.dim()
    check_classes(classes)
    check_pairs(x, label=(label, 0, classes))
    check_shape("label", label, (x.shape[0],))
    if x.numel() == 0:
        raise ValueError(f"x: expected images, units and positions, got shape {tuple(x.shape)}")
    count = torch.bincount(label.long(), minlength=classes)
    return checked_moments(x, label, count, axis)


def checked_moments(x: Tensor, label: Tensor, count: Tensor, axis: int) -> ClassMoments:
    """:func:`class_moments` of what has been checked: many layers see the labels of one batch.

    Parameters
    ----------
    x, label, axis
        As there; ``axis`` above 0.
    count : Tensor
        int64 ``[K]``, images of each class.
    """
    classes = len(count)
    x = dense(x.detach().to(reference.compute_dtype(x.dtype)))
    parts = _native_moments(x, label, classes, axis)
    if parts is None:
        pooled, least, positive = reference.map_moments(x, axis)
        found = reference.class_moments(pooled, positive, label, classes)
        parts = (pooled, least.amin(dim=0), positive.sum(dim=0), *found)
    return ClassMoments(*parts, count=count, positions=x[0].numel() // x.shape[axis])


def _native_moments(
    x: Tensor, label: Tensor, classes: int, axis: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """Call the compiled twin; None where there is none for the device."""
    core = twin(x)
    if core is None:
        return None
    units = x.shape[axis]
    if axis == 1 and not x.is_contiguous():  # channels last
        outer, inner = x.shape[2] * x.shape[3], 1
    else:
        x = x.contiguous()
        outer, inner = prod(x.shape[1:axis]), prod(x.shape[axis + 1 :])

    def table(dtype: torch.dtype) -> Tensor:
        return torch.empty(units, classes, dtype=dtype, device=x.device)

    parts = (
        torch.empty(len(x), units, dtype=x.dtype, device=x.device),
        torch.empty(units, dtype=x.dtype, device=x.device),
        torch.empty(units, dtype=torch.int64, device=x.device),
        table(torch.float64),
        table(torch.float64),
        table(torch.float64),
        table(torch.int64),
    )
    core.class_moments(x, label.contiguous(), *parts, outer, units, inner, *context(x))
    return parts


def joint_histogram(code: Tensor, label: Tensor, bins: int, classes: int) -> Tensor:
    """Count images by unit, bin of the unit's activation, and class.

    Parameters
    ----------
    code : Tensor
        int32 ``[U, N]``, bin of each image's activation, in ``[0, bins)``.
    label : Tensor
        int32 ``[N]``, in ``[0, classes)``.
    bins, classes : int
        How many there are.

    Returns
    -------
    Tensor
        int32 ``[U, bins, classes]``.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype, device or index does not fit; the message names the argument.
    """
    check_classes(classes)
    if bins < 1:
        raise ValueError(f"bins: expected at least one bin, got {bins}")
    check_tensor("code", code, dims=2, dtypes=(torch.int32,))
    check_pairs(code, label=(label, 0, classes))
    check_shape("label", label, (code.shape[1],))
    check_range("code", code, 0, bins)
    return reference.joint_histogram(code, label, bins, classes)
