"""Near ties: which logits compete, on what scale, and which predictions are too close to call.

Networks push classes out of the competition with large negative numbers (-1e9, minus infinity), and
may add the same number to all logits. Neither says anything about how close a decision is, so no
tolerance may be a share of the largest magnitude.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEAR_TIE = 1e-5
"""Top-2 margin, as a share of the competing scale, below which a prediction may fall either way."""

ROUNDING = 1e-12
"""Share of the leading logits' magnitude that float64 itself may get wrong, with much to spare."""

OUT = 100.0
"""A class so many magnitudes of the leading logits behind, and nats, does not compete."""


def magnitude(logits: Tensor) -> Tensor:
    """Larger magnitude of the two leading logits: ``[..., K]`` to ``[...]``."""
    top = logits.topk(min(2, logits.shape[-1]), dim=-1).values
    return torch.where(torch.isfinite(top), top.abs(), torch.zeros_like(top)).amax(dim=-1)


def competing_scale(logits: Tensor) -> Tensor:
    """Scale of the logits that compete: ``[..., K]`` to ``[...]``.

    The distance from the leading class to the middle one of all, from which an offset that all
    classes share drops out; or the magnitude of the two leading logits where that is smaller, as
    where most classes are masked.

    Examples
    --------
    >>> from pyablate.network.near_tie import competing_scale
    >>> competing_scale(torch.tensor([[105.0, 103.0, 101.0]])).tolist()  # an offset drops out
    [4.0]
    """
    classes = logits.shape[-1]
    middle = min(classes - 1, max(2, classes // 2))
    top = logits.topk(middle + 1, dim=-1).values
    return torch.minimum(magnitude(logits), top[..., 0] - top[..., middle])


def margin(logits: Tensor) -> Tensor:
    """Leading logit minus the second: ``[..., K]`` to ``[...]``."""
    top = logits.topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


def near_tie(logits: Tensor) -> Tensor:
    """Whether the leading two are too close to call: ``[..., K]`` to bool ``[...]``.

    Examples
    --------
    >>> from pyablate.network.near_tie import near_tie
    >>> near_tie(torch.tensor([[5.0, 5.00001, 0.0], [5.0, 1.0, 0.0]])).tolist()
    [True, False]
    """
    if logits.shape[-1] < 2:
        return torch.zeros(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    width = torch.maximum(NEAR_TIE * competing_scale(logits), ROUNDING * magnitude(logits))
    return margin(logits) <= width


def competing(logits: Tensor) -> Tensor:
    """Classes that compete with the leading one: bool ``[..., K]``."""
    behind = logits.amax(dim=-1, keepdim=True) - logits
    return behind <= OUT * magnitude(logits).clamp(min=1.0).unsqueeze(-1)


def spread(logits: Tensor) -> Tensor:
    """Largest distance between two classes that compete: ``[..., K]`` to ``[...]``."""
    behind = logits.amax(dim=-1, keepdim=True) - logits
    return torch.where(competing(logits), behind, torch.zeros_like(behind)).amax(dim=-1)


def largest(logits: Tensor) -> Tensor:
    """Largest magnitude of the classes that compete: ``[..., K]`` to ``[...]``."""
    return torch.where(competing(logits), logits.abs(), torch.zeros_like(logits)).amax(dim=-1)


def difference(found: Tensor, expected: Tensor) -> Tensor:
    """Largest difference between two sets of logits in classes that compete: ``[N, K]`` to ``[N]``.

    Infinite where only one of the two is finite; 0 where both are the same infinity or NaN.
    """
    found = found.to(expected.dtype)
    same = (found == expected) | (found.isnan() & expected.isnan())
    apart = (found - expected).abs().nan_to_num(torch.inf, torch.inf)
    apart = torch.where(same, torch.zeros_like(apart), apart)
    # A class may compete by the one set only: then the two do differ.
    both_out = ~(competing(found) | competing(expected)) & ~(found.isnan() | expected.isnan())
    return torch.where(both_out, torch.zeros_like(apart), apart).amax(dim=-1)


def disagreement(found: Tensor, expected: Tensor) -> float:
    """Largest :func:`difference` as a share of the largest competing logit of all rows."""
    apart = float(difference(found, expected).amax())
    return apart / float(largest(expected).amax().clamp(min=1e-30)) if apart else 0.0


def usable(logits: Tensor) -> Tensor:
    """Rows that decide something: bool ``[N]``.

    Minus infinity is a class that cannot win; NaN, plus infinity and rows of nothing but minus
    infinity are of no use.
    """
    return torch.isfinite(logits.amax(dim=-1)) & ~logits.isnan().any(dim=-1)


def check(good: Tensor, index: Tensor) -> None:
    """Refuse images ``index`` (int64 ``[N]``) whose logits are not :func:`usable`; both on the CPU.

    Raises
    ------
    ValueError
        Some are NaN or plus infinity, or an image's are all minus infinity.
    """
    if not bool(good.all()):
        raise ValueError(
            f"model: the logits of image {int(index[~good][0])} are NaN or infinite (only masked "
            "classes may be minus infinity, and not all of them)"
        )
