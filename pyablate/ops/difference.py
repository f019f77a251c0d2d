"""Changes of what has no operation of its own: ``f(base + delta) - f(base)``, and products."""

from __future__ import annotations

import torch
from torch import Tensor

from pyablate.ops import reference
from pyablate.ops._checks import check_tensor
from pyablate.ops._layout import by_runs, read_as
from pyablate.ops.dispatch import FLOATS, REAL, check_change, context, delta_backend


def perturbed(base: Tensor, delta: Tensor, image: Tensor) -> Tensor:
    """Add deltas to the clean rows of their images.

    Parameters
    ----------
    base : Tensor
        ``[N, *S]`` of the clean run: bfloat16 or the dtype in which ``delta`` is accumulated
        (float64 for float64, else float32).
    delta : Tensor
        ``[P, *S]``, float32, float64, bfloat16 or float16.
    image : Tensor
        int32 [P], row of ``base`` for each pair.

    Returns
    -------
    Tensor
        ``base[image] + delta``, ``[P, *S]`` in the dtype of accumulation. It has no gaps in
        memory, and its axes lie there in the order of those of ``delta``.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype, device or index does not fit; the message names the argument.

    Examples
    --------
    >>> base, delta = torch.tensor([[1.0, -1.0]]), torch.tensor([[-3.0, 2.0]])
    >>> pa.ops.perturbed(base, delta, torch.zeros(1, dtype=torch.int32)).tolist()
    [[-2.0, 1.0]]
    """
    check_change(base, delta, image)
    base, delta, dtype = base.detach(), delta.detach(), reference.compute_dtype(delta.dtype)
    core = delta_backend(delta)
    if core is None:
        return reference.perturbed(base, delta, image)

    def run(change: Tensor, clean: Tensor, out: Tensor) -> None:
        core.perturbed(clean, change, image.contiguous(), out=out, **context(delta))

    return by_runs(run, dtype, delta, read_as(base, delta.dtype))


def subtracted(
    after: Tensor, base: Tensor, image: Tensor, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Take the clean rows of their images off results: the deltas of these.

    Parameters
    ----------
    after : Tensor
        ``[P, *S]``, float32 or float64.
    base : Tensor
        ``[N, *S]`` of the clean run: the dtype of ``after``, or bfloat16 beside float32.
    image : Tensor
        int32 [P], row of ``base`` for each pair.
    dtype : torch.dtype, optional
        Of the result: that of ``after``, or bfloat16 or float16 beside float32; that of ``after``
        if not given.

    Returns
    -------
    Tensor
        ``after - base[image]``, and 0 where both are equal, also where they are infinite:
        ``[P, *S]``. It has no gaps in memory, and its axes lie there in the order of those of
        ``after``.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype, device or index does not fit; the message names the argument.

    Examples
    --------
    >>> base, after = torch.tensor([[1.0, -torch.inf]]), torch.tensor([[-2.0, -torch.inf]])
    >>> pa.ops.subtracted(after, base, torch.zeros(1, dtype=torch.int32)).tolist()
    [[-3.0, 0.0]]
    """
    check_tensor("after", after, dtypes=REAL)
    dtype = after.dtype if dtype is None else dtype
    if dtype not in FLOATS or after.dtype != reference.compute_dtype(dtype):
        raise TypeError(
            f"dtype: expected {after.dtype}, or half precision beside float32, got {dtype}"
        )
    check_change(base, after, image, name="after")
    base, after = base.detach(), after.detach()
    core = delta_backend(after.new_empty(0, dtype=dtype))
    if core is None:
        return reference.subtracted(after, base, image, dtype)

    def run(result: Tensor, clean: Tensor, out: Tensor) -> None:
        core.subtracted(result, clean, image.contiguous(), out=out, **context(after))

    return by_runs(run, dtype, after, read_as(base, dtype))


def delta_product(
    base: Tensor, delta: Tensor, other_base: Tensor, other: Tensor, image: Tensor
) -> Tensor:
    """Carry the deltas of both factors through an elementwise product.

    Parameters
    ----------
    base, other_base : Tensor
        ``[N, *S]`` and ``[N, *T]`` of the clean run, where ``T`` is ``S`` or has some sizes of 1:
        the factors, both bfloat16 or both the dtype in which the deltas are accumulated (float64
        for float64, else float32).
    delta, other : Tensor
        ``[P, *S]`` and ``[P, *T]``, their deltas, both of one dtype: float32, float64, bfloat16 or
        float16.
    image : Tensor
        int32 [P], row of the bases for each pair.

    Returns
    -------
    Tensor
        ``delta * (other_base[image] + other) + base[image] * other``, ``[P, *S]``, dtype of the
        deltas; where that is not finite the difference of the products itself, 0 where they are
        equal. It has no gaps in memory, and its axes lie there in the order of those of ``delta``.

    Raises
    ------
    ValueError, TypeError
        If a shape, dtype, device or index does not fit; the message names the argument.

    Examples
    --------
    >>> base, delta = torch.tensor([[1.0, -1.0]]), torch.tensor([[-3.0, 2.0]])
    >>> image = torch.zeros(1, dtype=torch.int32)
    >>> pa.ops.delta_product(base, delta, base, delta, image).tolist()  # of squares
    [[3.0, 0.0]]
    """
    check_change(base, delta, image)
    check_change(other_base, other, image, name="other", base_name="other_base")
    check_tensor("other", other, dims=delta.ndim, dtypes=(delta.dtype,), like=delta)
    check_tensor("other_base", other_base, dtypes=(base.dtype,))
    if other_base.shape[0] != base.shape[0]:
        raise ValueError(f"other_base: expected {len(base)} rows, got {len(other_base)}")
    if any(size not in (1, full) for size, full in zip(other.shape, delta.shape, strict=True)):
        raise ValueError(
            f"other: expected sizes of {tuple(delta.shape)} or 1, got {tuple(other.shape)}"
        )
    core = delta_backend(delta)
    base, delta, other_base, other = (x.detach() for x in (base, delta, other_base, other))
    if core is None:
        return reference.delta_product(base, delta, other_base, other, image)

    def run(change: Tensor, clean: Tensor, more: Tensor, beside: Tensor, out: Tensor) -> None:
        core.delta_product(
            clean, change, beside, more, image.contiguous(), out=out, **context(delta)
        )

    factors = other.expand_as(delta), read_as(other_base, delta.dtype).expand_as(base)
    return by_runs(run, delta.dtype, delta, read_as(base, delta.dtype), *factors)
