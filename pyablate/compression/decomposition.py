"""Low-rank decomposition of layers by truncated SVD, also after channel pruning."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import skip_init

from pyablate._validation import first_line
from pyablate.compression.filters import prune_filters
from pyablate.compression.transforms import (
    Transformed,
    float_bits,
    is_plain,
    overwrite,
    weighted,
)
from pyablate.network.batch_norm import module_scale, norms_behind
from pyablate.network.sites import copied


def truncated_svd(
    model: nn.Module,
    share: float,
    *,
    layers: str | Sequence[str] = "*",
    energy_transfer: bool = False,
    rectify: bool = False,
) -> Transformed:
    """Replace convolutions and linear maps by two smaller ones each.

    The weights as a matrix ``[outputs, inputs * kernel]`` are cut to the largest singular values,
    ``W = U S V``: first a layer with the filters ``sqrt(S) V``, then a 1x1 one with ``U sqrt(S)``.
    A layer for which two would be no smaller than one stays as it is, and so do convolutions in
    groups and transposed ones.

    Parameters
    ----------
    model : nn.Module
        It stays as it is.
    share : float
        Of the singular values that is kept, above 0 and up to 1, rounded up.
    layers : str or sequence of str
        Module names or globs.
    energy_transfer : bool
        Multiply the kept values by ``sqrt(sum s^2 / sum kept s^2)``, so that the weights keep
        their Frobenius norm.
    rectify : bool
        Where batch norm follows, decompose the weights as they are behind it, rows scaled by
        ``gamma / sqrt(var + eps)``, and undo the scaling in the second layer: the error that is
        least is then that of what the batch norm puts out. Needs a network that ``torch.fx`` can
        trace.

    Raises
    ------
    ValueError
        The share is out of range, no layer matches, or ``torch.fx`` cannot trace the network.

    Examples
    --------
    >>> pa.compression.truncated_svd(model, 0.4).ratio > 1
    True
    """
    check_share(share)
    changed = copied(model)
    norms = batch_norms(changed) if rectify else {}
    for name, module, kept in list(decomposable(changed, layers, share)):
        two = pair(module, *factors(module, kept, norms.get(name), energy_transfer))
        changed.set_submodule(name, two)
    return Transformed(changed, float_bits(changed), float_bits(model))


def prune_and_decompose(
    model: nn.Module,
    sample: Any,
    fraction: float,
    share: float,
    *,
    criterion: str = "l1",
    scope: str = "layer",
    data: Any = None,
    energy_transfer: bool = False,
    rectify: bool = True,
) -> Transformed:
    """Remove channels, then decompose the layers that are left.

    Parameters
    ----------
    model, sample, fraction, criterion, scope, data
        As for :func:`prune_filters`.
    share, energy_transfer, rectify
        As for :func:`truncated_svd`.

    Notes
    -----
    Both at once, since they take different redundancy away: Li, Lin, Zhang et al. 2021, *Towards
    Compact CNNs via Collaborative Compression*, arXiv:2105.11228. Here the shares are given; to
    have them found, as they do, see :func:`collaborative_compression`.

    Examples
    --------
    >>> pa.compression.prune_and_decompose(model, images[:2], 0.2, 0.4).ratio > 1
    True
    """
    pruned = prune_filters(model, sample, fraction, criterion=criterion, scope=scope, data=data)
    both = truncated_svd(pruned.model, share, energy_transfer=energy_transfer, rectify=rectify)
    return Transformed(both.model, both.bits, pruned.original_bits, removed=pruned.removed)


def check_share(share: float) -> None:
    """Refuse what is no share of the singular values to keep."""
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a number above 0 and up to 1, got {share!r}")


def decomposable(
    model: nn.Module, layers: str | Sequence[str], share: float
) -> Iterator[tuple[str, Any, int]]:
    """Layers that two smaller ones can replace, with their names and the values to keep."""
    for name, module in plain(model, layers):
        sizes = len(module.weight), module.weight[0].numel()
        kept = math.ceil(share * min(sizes))
        if kept * sum(sizes) < module.weight.numel():
            yield name, module, kept


def plain(model: nn.Module, layers: str | Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Linear maps, and convolutions neither in groups nor transposed, whose names match."""
    for name, module in weighted(model, layers):
        if name and is_plain(module):
            yield name, module


def factors(module: Any, kept: int, norm: Any, energy_transfer: bool) -> tuple[Tensor, Tensor]:
    """Matrices ``[kept, inputs * kernel]`` and ``[outputs, kept]`` whose product is nearest.

    Behind the batch norm, if there is one; see :func:`truncated_svd`.
    """
    matrix = module.weight.detach().flatten(1).double()
    scale = (matrix.new_ones(len(matrix)) if norm is None else module_scale(norm))[:, None]
    u, s, v = torch.linalg.svd(scale * matrix, full_matrices=False)
    values = s[:kept]
    if energy_transfer:
        total = values.square().sum()
        values = values * (s.square().sum() / total).sqrt() if total > 0 else values
    root = values.sqrt()
    # A row that batch norm multiplies by zero may be anything: zero.
    undone = torch.where(scale == 0, 0, u[:, :kept] / torch.where(scale == 0, 1, scale))
    return root[:, None] * v[:kept], undone * root


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Batch norms with running statistics that alone read a layer, by its name."""
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # tracing fails in as many ways as there are networks
        reason = first_line(error)
        raise ValueError(f"rectify: torch.fx cannot trace this network: {reason}") from error
    found = {layer: model.get_submodule(norm) for layer, norm in norms_behind(graph, model)}
    return {layer: norm for layer, norm in found.items() if norm.running_var is not None}


def pair(module: Any, first: Tensor, second: Tensor) -> nn.Sequential:
    """Two layers with these matrices in place of a convolution or linear map."""
    like = {"device": module.weight.device, "dtype": module.weight.dtype}
    bias = module.bias is not None
    kept = len(first)
    # Not initialised, which would draw random numbers.
    if isinstance(module, nn.Linear):
        before = skip_init(nn.Linear, module.in_features, kept, bias=False, **like)
        after = skip_init(nn.Linear, kept, module.out_features, bias=bias, **like)
    else:
        kind = type(module)
        before = skip_init(
            kind,
            module.in_channels,
            kept,
            module.kernel_size,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            bias=False,
            padding_mode=module.padding_mode,
            **like,
        )
        after = skip_init(kind, kept, module.out_channels, 1, bias=bias, **like)
    overwrite(before, first)
    overwrite(after, second)
    if bias:
        with torch.no_grad():
            after.bias.copy_(module.bias)
    return nn.Sequential(before, after).train(module.training)
