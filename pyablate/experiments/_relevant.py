"""Directions of a layer that carry relevance: PRCA and DRSA.

Chormai, Herrmann, Mueller, Montavon 2022, arXiv:2212.14855. Relevance of a class at one position is
the product ``a . c`` of the activations and their context, which layer-wise relevance propagation
gives; both are rotated alike, so that every direction has its share of the relevance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pyablate.attribution.conditional import predicted
from pyablate.attribution.propagation import Propagation
from pyablate.interventions import random_rotation
from pyablate.network.sites import Site

STEPS = 100
"""Of gradient ascent."""

STARTS = 5
"""Random directions from which it starts; the best end counts."""

Rows = tuple[Tensor, Tensor]
"""Activations and contexts, float64 ``[positions of all images, units]``."""


def contexts(
    network: Propagation, parts: Iterator[Tensor], target: int | None
) -> Iterator[dict[str, Rows]]:
    """Activations and contexts of some images after the other, by layer."""
    for images in parts:
        found = network.run(images)
        coefficients = found.coefficients(predicted(found.logits, target))
        yield {
            site.name: (
                _rows(found.activations[site.name].detach()[: len(images)], site),
                _rows(coefficients[site.name], site),
            )
            for site in network.found
        }


def _rows(maps: Tensor, site: Site) -> Tensor:
    return maps.movedim(site.axis, -1).flatten(0, -2).double().cpu()


class Products:
    """Sum over positions of ``a c^T + c a^T``, whose eigenvectors keep most relevance."""

    def __init__(self, units: int) -> None:
        self.sums = torch.zeros(units, units, dtype=torch.float64)

    def add(self, rows: Rows) -> None:
        """Take in some positions."""
        a, c = rows
        self.sums += a.t() @ c

    def axes(self) -> Tensor:
        """Eigenvectors ``[units, units]``, largest eigenvalue first."""
        vectors: Tensor = torch.linalg.eigh(self.sums + self.sums.t()).eigenvectors
        return vectors.flip(1)


class Sample:
    """Positions drawn at random, each of all alike, in one pass over the data."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.generator = torch.Generator().manual_seed(seed)
        self.keys = torch.empty(0, dtype=torch.float64)
        self.rows: Rows | None = None

    def add(self, rows: Rows) -> None:
        """Take in some positions: those with the smallest random numbers so far are kept."""
        drawn = torch.rand(len(rows[0]), generator=self.generator, dtype=torch.float64)
        keys = torch.cat([self.keys, drawn])
        kept = keys.argsort()[: self.count]
        if self.rows is not None:
            rows = torch.cat([self.rows[0], rows[0]]), torch.cat([self.rows[1], rows[1]])
        self.keys, self.rows = keys[kept], (rows[0][kept], rows[1][kept])


def disentangled(rows: Rows, blocks: int, size: int, seed: int) -> Tensor:
    """Orthogonal blocks of directions, ``[units, blocks * size]``, most relevant block first.

    Ascent of ``mean_k (mean_n r_nk^2)^(1/4)``, squared, r_nk the rectified relevance of position n
    in block k: the mean over positions favours few high ones, that over blocks that no block stays
    without. After each step the nearest orthogonal matrix is taken.
    """
    a, c = rows
    scale = (a * c).sum(1).abs().mean().clamp(min=torch.finfo(torch.float64).tiny)
    starts = [random_rotation(a.shape[1], seed=seed * STARTS + turn) for turn in range(STARTS)]
    climbed = [_climbed(a, c / scale, each[:, : blocks * size], size) for each in starts]
    basis = max(climbed, key=lambda each: each[0])[1]
    order = _relevances(a, c, basis, size).sum(0).argsort(descending=True)
    ordered: Tensor = basis.unflatten(1, (blocks, size))[:, order]
    return ordered.flatten(1)


def _climbed(a: Tensor, c: Tensor, basis: Tensor, size: int) -> tuple[float, Tensor]:
    """Ascend from some directions: the value reached, and the directions there."""
    blocks = basis.shape[1] // size
    for step in range(STEPS + 1):
        basis = basis.detach().requires_grad_()
        soft = _relevances(a, c, basis, size).clamp(min=0).square().mean(0)
        value = (soft + 1e-12).pow(0.25).mean()
        (gradient,) = torch.autograd.grad(value, basis)
        length = gradient.norm()
        if step == STEPS or length == 0:
            break
        rate = 0.5 * (1 - step / STEPS) * blocks**0.5
        basis = _orthogonal(basis.detach() + rate * gradient / length)
    return float(value.detach()), basis.detach()


def _relevances(a: Tensor, c: Tensor, basis: Tensor, size: int) -> Tensor:
    """Relevance of each position in each block, ``[N, blocks]``."""
    parts: Tensor = ((a @ basis) * (c @ basis)).unflatten(1, (-1, size))
    return parts.sum(2)


def _orthogonal(matrix: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = u @ v
    return nearest


def check_blocks(found: Sequence[Site], subspaces: int, dimensions: int) -> None:
    """Refuse more directions than a layer has units."""
    for site in found:
        if subspaces * dimensions > site.features:
            raise ValueError(
                f"subspaces: {subspaces} of {dimensions} dimensions are more than the "
                f"{site.features} units of {site.name!r}"
            )
