"""Statistics of activations: the operations that attributes stand on.

Each map is read once (:func:`map_moments`); what concerns a class is taken, late, from one number
per unit and image (:func:`class_moments`, :func:`class_ranks`). They keep to the rules of
:mod:`pyablate.ops`: thin functions that check, allocate and dispatch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from pyablate.ops import reference as reference
from pyablate.ops._checks import check_classes, check_pairs, check_shape, check_tensor
from pyablate.ops._layout import dense
from pyablate.ops.dispatch import FLOATS, REAL, backend, context

__all__ = [
    "ClassMoments",
    "ClassRanks",
    "MapMoments",
    "class_moments",
    "class_ranks",
    "map_moments",
]

_SCRATCH = 1 << 28  # bytes that the blocks of a GPU sort in
_BLOCKS = 1024  # more than a GPU runs at a time


@dataclass(frozen=True)
class MapMoments:
    """What the maps of C units are on N images.

    Attributes
    ----------
    pooled : Tensor
        ``[C, N]``, mean of each map over its positions; float64 for float64 maps, else float32.
    active : Tensor
        uint8 ``[C, N]``, 1 where some position is above 0.
    least : Tensor
        ``[C]``, smallest value at any position of any image, dtype of ``pooled``; NaN if one is.
    positive : Tensor
        int64 ``[C]``, positions above 0.
    """

    pooled: Tensor
    active: Tensor
    least: Tensor
    positive: Tensor

    @classmethod
    def empty(
        cls, units: int, images: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> MapMoments:
        """Tables that :func:`map_moments` can fill; ``dtype`` is that of the maps."""
        dtype = reference.compute_dtype(dtype)
        return cls(
            torch.empty(units, images, dtype=dtype, device=device),
            torch.empty(units, images, dtype=torch.uint8, device=device),
            torch.full((units,), torch.inf, dtype=dtype, device=device),
            torch.zeros(units, dtype=torch.int64, device=device),
        )

    def part(self, first: int, images: int) -> MapMoments:
        """Tables of some of the images, in the same memory."""
        pooled, active = (t.narrow(1, first, images) for t in (self.pooled, self.active))
        return MapMoments(pooled, active, self.least, self.positive)


@dataclass(frozen=True)
class ClassMoments:
    """Moments of pooled activations, by unit and class.

    Attributes
    ----------
    total, square, maximum : Tensor
        float64 ``[C, K]``, sum, sum of squares and maximum over the images of a class; the maximum
        over no image is minus infinity, over one that is NaN it is NaN.
    active_images : Tensor
        int64 ``[C, K]``, images of a class on which the unit is active.
    """

    total: Tensor
    square: Tensor
    maximum: Tensor
    active_images: Tensor


@dataclass(frozen=True)
class ClassRanks:
    """What the order of N images by a unit's activation x tells about their classes.

    ``greater`` and ``at_least`` are, for an image, the numbers of images with greater x, and with
    x at least as great, itself included. NaN is greater than all numbers and equals NaN.

    Attributes
    ----------
    rank_sum : Tensor
        int64 ``[C, K]``, sum of greater + at_least over the images of a class.
    gain : Tensor
        int64 ``[C, K]``, the largest of N * hits - count * at_least over the images of a class;
        count images are of that class, hits of them with x at least as great. 0 for no image.
    first : Tensor
        int32 ``[C, K]``, images of a class among the first ones, the first of equal ones first.
    quantiles : Tensor
        int32 ``[C, bins, K]``, images by class and bin (N - at_least) * bins // N.
    widths : Tensor
        int32 ``[C, bins]``, images by bins of equal width from the least x to the greatest.
    """

    rank_sum: Tensor
    gain: Tensor
    first: Tensor
    quantiles: Tensor
    widths: Tensor

    def cpu(self) -> ClassRanks:
        """Return the same in host memory."""
        return ClassRanks(*(table.cpu() for table in vars(self).values()))


def map_moments(x: Tensor, into: MapMoments, *, axis: int = 1) -> None:
    """Reduce the maps of some images, in one reading.

    Parameters
    ----------
    x : Tensor
        Activations ``[N, ...]``, at least one image, float32, float64, bfloat16 or float16,
        with units along ``axis`` and at least one position.
    into : MapMoments
        Tables of these N images, on the device of ``x``, made for its dtype. ``pooled`` and
        ``active`` are written; ``least`` and ``positive`` go on from what they are.
    axis : int
        Axis of ``x`` that holds the units; not the batch axis.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype or device does not fit; the message names the argument.
    """
    check_tensor("x", x, dtypes=FLOATS)
    if not -x.dim() < axis < x.dim() or axis % max(x.dim(), 1) == 0:
        raise ValueError(
            f"axis: expected an axis of x other than 0 (x has {x.dim()} dimensions), got {axis}"
        )
    axis %= x.dim()
    if x.numel() == 0:
        raise ValueError(f"x: expected images, units and positions, got shape {tuple(x.shape)}")
    dtype, units = reference.compute_dtype(x.dtype), x.shape[axis]
    check_tensor("into", into.pooled, dims=2, dtypes=(dtype,), like=x)
    check_shape("into", into.pooled, (units, len(x)))
    x = dense(x.detach().to(dtype))
    core = backend(x)
    if core is None:
        reference.map_moments(x, axis, into.pooled, into.active, into.least, into.positive)
        return
    if axis == 1 and not x.is_contiguous():  # channels last
        outer, inner = x.shape[2] * x.shape[3], 1
    else:
        x = x.contiguous()
        outer, inner = prod(x.shape[1:axis]), prod(x.shape[axis + 1 :])
    tables = (into.pooled, into.active, into.least, into.positive)
    core.map_moments(x, *tables, outer, units, inner, **context(x))


def class_moments(pooled: Tensor, active: Tensor, label: Tensor, classes: int) -> ClassMoments:
    """Moments of pooled activations by unit and class.

    Parameters
    ----------
    pooled, active : Tensor
        ``[C, N]``, float32 or float64, and uint8: as :class:`MapMoments` has them.
    label : Tensor
        int32 ``[N]``, in ``[0, classes)``.
    classes : int
        Number of classes K.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype, device or label does not fit; the message names the argument.
    """
    check_tensor("pooled", pooled, dims=2, dtypes=REAL)
    check_tensor("active", active, dims=2, dtypes=(torch.uint8,), like=pooled)
    check_shape("active", active, tuple(pooled.shape))
    _check_labels(pooled, label, classes)
    pooled = pooled.detach().contiguous()
    core = backend(pooled)
    if core is None:
        return ClassMoments(*reference.class_moments(pooled, active, label, classes))
    dtypes = (torch.float64, torch.float64, torch.float64, torch.int64)
    size = (len(pooled), classes)
    tables = [torch.empty(size, dtype=dtype, device=pooled.device) for dtype in dtypes]
    core.class_moments(pooled, active.contiguous(), label.contiguous(), *tables, **context(pooled))
    return ClassMoments(*tables)


def class_ranks(x: Tensor, label: Tensor, classes: int, *, bins: int, top: int) -> ClassRanks:
    """Rank the images by the activation of each unit and count by class.

    Parameters
    ----------
    x : Tensor
        ``[C, N]``, float32 or float64.
    label : Tensor
        int32 ``[N]``, in ``[0, classes)``.
    classes, bins : int
        How many there are.
    top : int
        How many images ``first`` looks at.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype, device or label does not fit; the message names the argument.
    """
    check_tensor("x", x, dims=2, dtypes=REAL)
    _check_labels(x, label, classes)
    if bins < 1:
        raise ValueError(f"bins: expected at least one bin, got {bins}")
    if top < 0:
        raise ValueError(f"top: expected a number of images, got {top}")
    x = x.detach().contiguous()
    count = torch.bincount(label, minlength=classes)
    core = backend(x)
    if core is None:
        return ClassRanks(*reference.class_ranks(x, label, count, bins, top))
    units = len(x)
    ranks = ClassRanks(
        torch.empty(units, classes, dtype=torch.int64, device=x.device),
        torch.empty(units, classes, dtype=torch.int64, device=x.device),
        torch.empty(units, classes, dtype=torch.int32, device=x.device),
        torch.empty(units, bins, classes, dtype=torch.int32, device=x.device),
        torch.empty(units, bins, dtype=torch.int32, device=x.device),
    )
    where = context(x)
    row, workers = core.class_ranks_scratch(x, classes), where["threads"]
    if x.device.type != "cpu":
        workers = max(1, min(units, _BLOCKS, _SCRATCH // (8 * row)))
    scratch = torch.empty(workers, row, dtype=torch.int64, device=x.device)
    core.class_ranks(x, label.contiguous(), count, **vars(ranks), top=top, scratch=scratch, **where)
    return ranks


def _check_labels(pooled: Tensor, label: Tensor, classes: int) -> None:
    check_classes(classes)
    check_pairs(pooled, label=(label, 0, classes))
    check_shape("label", label, (pooled.shape[1],))
