"""Attributes of the weights alone: norms of filters, batch norm, spectrum, orthogonality."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from scipy import stats
from torch import Tensor, fx

from pyablate.network.channel_tracking import Link, makers, readers, weighted
from pyablate.network.graph import BATCH_NORM, CONVOLUTIONS, Graph
from pyablate.network.sites import Site

ENERGY = 0.9
"""Share of the squared singular values that the leading ones hold."""


def from_weights(graph: Graph, sites: Iterable[Site]) -> dict[str, dict[str, Tensor]]:
    """Attributes of the weights by site, float64 ``[C]``; NaN where a unit has none.

    The graph was captured with the sites marked and batch norm not folded. Filters that are summed
    before the unit is activated, as in a residual block, count together; an identity shortcut has
    no filter. Spectrum and orthogonality are those of the one layer that makes the unit, and batch
    norm counts for a unit only where the unit is one channel of it, not of a sum.
    """
    sites = list(sites)
    axes = {site.name: site.axis for site in sites}
    filters = makers(graph, weighted(graph), axes)
    norms = [node for node in graph.graph.nodes if node.target is BATCH_NORM and node.users]
    scales = makers(graph, norms, axes)
    found: dict[str, dict[str, Tensor]] = {}

    def spectral(node: fx.Node) -> Tensor:
        return leading_share(_filters(graph, node))

    def orthogonality(node: fx.Node) -> Tensor:
        return _orthogonality(graph, node)

    for site in sites:
        units = site.channels
        one, two = _maker_norms(graph, filters[site.name], units)
        out_one, out_two = _reader_norms(graph, readers(graph, site.name, site.axis), units)
        found[site.name] = {
            "l1_norm": one,
            "l2_norm": two,
            "l1_norm_outgoing": out_one,
            "l2_norm_outgoing": out_two,
            **_batch_norm(graph, scales[site.name], units),
            "spectral": _of_one_layer(filters[site.name], units, spectral),
            "orthogonality_loss": _of_one_layer(filters[site.name], units, orthogonality),
        }
    return found


def _maker_norms(graph: Graph, links: list[Link], units: int) -> tuple[Tensor, Tensor]:
    sums = torch.zeros(2, units, dtype=torch.float64)
    known = torch.zeros(units, dtype=torch.bool)
    for link in links:
        filters = _filters(graph, link.node)
        per_channel = torch.stack([filters.abs().sum(dim=1), filters.square().sum(dim=1)])
        here = link.channel >= 0
        sums[:, here] += per_channel[:, link.channel[here]]
        known |= here
        sums[:, link.channel < -1] = torch.nan
    sums[:, ~known] = torch.nan
    return sums[0], sums[1].sqrt()


def _reader_norms(graph: Graph, links: list[Link], units: int) -> tuple[Tensor, Tensor]:
    sums = torch.zeros(2, units, dtype=torch.float64)
    known = torch.zeros(units, dtype=torch.bool)
    for link in links:
        if bool((link.channel < -1).any()):  # a channel that is not one unit's alone
            sums[:] = torch.nan
        columns = columns_by_input(graph, link.node)
        per_channel = torch.stack([columns.abs().sum(dim=1), columns.square().sum(dim=1)])
        here = link.channel >= 0
        sums.index_add_(1, link.channel[here], per_channel[:, here])
        known[link.channel[here]] = True
    sums[:, ~known] = torch.nan
    return sums[0], sums[1].sqrt()


def _filters(graph: Graph, node: fx.Node) -> Tensor:
    """Return the filters by output channel, float64 ``[O, rest]``."""
    return cast(Tensor, graph.constant(node, 1)).double().cpu().flatten(1)


def columns_by_input(graph: Graph, node: fx.Node) -> Tensor:
    """Return the weights by input channel, float64 ``[I, rest]``."""
    weight = cast(Tensor, graph.constant(node, 1)).double().cpu()
    split: Tensor = weight.unflatten(0, (_option(node, 6), -1))  # [groups, O / groups, ...]
    return split.movedim(2, 1).flatten(0, 1).flatten(1)


def _option(node: fx.Node, place: int) -> Any:
    """Return stride (3), dilation (5) or groups (6) of a convolution, 1 of a linear map."""
    given = node.target in CONVOLUTIONS and len(node.args) > place
    return node.args[place] if given else 1


def _batch_norm(graph: Graph, links: list[Link], units: int) -> dict[str, Tensor]:
    gamma, beta = (torch.full((units,), torch.nan, dtype=torch.float64) for _ in range(2))
    for link in links:
        scale, shift = graph.constant(link.node, 1), graph.constant(link.node, 2)
        if scale is None or shift is None:
            continue
        here = link.channel >= 0
        gamma[here] = scale.double().cpu()[link.channel[here]]
        beta[here] = shift.double().cpu()[link.channel[here]]
        if link.summed:
            gamma[here] = torch.nan
    size = gamma.abs()
    ratio = (beta / size).numpy()
    # A channel of scale 0 is the constant beta.
    active = torch.from_numpy(stats.norm.cdf(ratio))
    mean = beta * active + size * torch.from_numpy(stats.norm.pdf(ratio))
    still = size == 0
    return {
        "bn_scale": size,
        "bn_active": torch.where(still, (beta > 0).double(), active),
        "bn_mean_relu": torch.where(still, beta.clamp(min=0), mean),
    }


def _of_one_layer(links: list[Link], units: int, measure: Callable[[fx.Node], Tensor]) -> Tensor:
    """Measure of each unit's filter within its layer; NaN where none or several make the unit."""
    values = torch.full((units,), torch.nan, dtype=torch.float64)
    seen = torch.zeros(units, dtype=torch.bool)
    for link in links:
        here = link.channel >= 0
        values[here] = measure(link.node)[link.channel[here]]
        values[here & seen] = torch.nan
        seen |= here
    return values


def leading_share(filters: Tensor) -> Tensor:
    """Share of each row's squared norm within the leading right singular vectors, ``[O]``.

    As few vectors as hold :data:`ENERGY` of the squared singular values; NaN for a zero row.
    """
    u: Tensor
    s: Tensor
    u, s, _ = torch.linalg.svd(filters, full_matrices=False)
    energy = s.square().cumsum(0)
    count = int((energy < ENERGY * energy[-1]).sum()) + 1
    return (u[:, :count] * s[:count]).square().sum(dim=1) / filters.square().sum(dim=1)


def _orthogonality(graph: Graph, node: fx.Node) -> Tensor:
    weight = cast(Tensor, graph.constant(node, 1)).double().cpu()
    sizes = weight.shape[2:]
    strides, dilations = (_along(_option(node, place), len(sizes)) for place in (3, 5))
    return orthogonality_loss(weight.unflatten(0, (_option(node, 6), -1)), strides, dilations)


def _along(option: int | list[int], axes: int) -> list[int]:
    """Spell out what is given once for all axes."""
    given = [option] if isinstance(option, int) else list(option)
    return given if len(given) == axes else given * axes


def orthogonality_loss(weight: Tensor, strides: list[int], dilations: list[int]) -> Tensor:
    """Squared distance of each filter from being orthogonal to all others and their shifts.

    A convolution is a matrix, doubly block-Toeplitz, with a row for every filter and position. The
    inner products of a filter's row with all rows, less 1 with itself, are squared and summed: the
    filter's share of ``|conv(K, K) - I_0|^2`` of Wang et al. 2020, arXiv:1911.12207. Rows overlap
    whose positions are apart by a multiple of the stride, less than a kernel's extent; those of
    dilated kernels meet in whole taps only.

    Parameters
    ----------
    weight : Tensor
        Filters by group, ``[groups, O / groups, I / groups, *size]``.
    strides, dilations : list of int
        One per axis of a kernel.

    Returns
    -------
    Tensor
        ``[O]``.
    """
    sizes = weight.shape[3:]
    loss = weight.new_zeros(weight.shape[:2])
    for shift in itertools.product(*map(_shifts, sizes, strides, dilations)):
        one = other = weight
        for axis, (by, size) in enumerate(zip(shift, sizes, strict=True), start=3):
            one = one.narrow(axis, max(0, by), size - abs(by))
            other = other.narrow(axis, max(0, -by), size - abs(by))
        one, other = one.flatten(2), other.flatten(2)
        products = one @ other.transpose(1, 2)
        if not any(shift):
            products -= torch.eye(products.shape[1], dtype=products.dtype)
        loss += products.square().sum(dim=2)
    return loss.flatten()


def _shifts(size: int, stride: int, dilation: int) -> list[int]:
    """Distances of overlapping kernels, in taps."""
    return [taps for taps in range(1 - size, size) if taps * dilation % stride == 0]
