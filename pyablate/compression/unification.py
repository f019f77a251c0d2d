"""Weight unification: blocks of weights that share one magnitude, each weight with its own sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from pyablate._validation import check_count, check_fraction
from pyablate.compression.sgd import Augment, Loss, Schedule, cross_entropy, fit, training
from pyablate.compression.transforms import (
    FLOAT_BITS,
    Transformed,
    float_bits,
    overwrite,
    weighted,
)
from pyablate.network.sites import copied
from pyablate.runtime.progress import Report


def unify_weights(
    model: nn.Module,
    block: tuple[int, int] = (1, 8),
    *,
    fraction: float = 1.0,
    layers: str | Sequence[str] = "*",
    data: Any = None,
    rho: float = 1.0,
    epochs: int = 3,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 128,
    augment: Augment | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool | Report | None = None,
) -> Transformed:
    """Let the weights of a block share one magnitude and keep their signs.

    The weights as a matrix ``[outputs, inputs * kernel]`` (of transposed convolutions ``[inputs,
    outputs * kernel]``) are cut into blocks, smaller ones at its edges. A block becomes ``sign(w)
    mean |w|``, which is the nearest one by squares; 0 counts as positive. With ``data`` the network
    is first trained towards that.

    Parameters
    ----------
    model : nn.Module
        It stays as it is.
    block : pair of int
        Rows and columns, such as (1, 8) or (4, 4).
    fraction : float
        Share of the blocks of each layer, from 0 to 1; those that lose least by squares.
    layers : str or sequence of str
        Module names or globs.
    data : pair of arrays, DataLoader or iterable of (images, labels), optional
        To train on, not those on which the result is judged; held in memory.
    rho : float
        Weight of the distance from unified weights while training, above 0. The weights follow
        them within an epoch if ``learning_rate rho steps / (1 - momentum)`` is 2 or more; with
        less, training need not converge, and the ``penalty`` of the history does not fall.
    epochs, learning_rate, momentum, weight_decay, batch_size, augment, seed, device, progress
        As for :func:`pyablate.finetune`; without data nothing is trained.

    Returns
    -------
    Transformed
        A unified block takes 31 bits and one a weight for its sign, another 32 bits a weight;
        unless all are unified, a bit a block tells which. With the ``history`` of training.

    Raises
    ------
    ValueError, TypeError
        Bad arguments or data, no layer matches, or a loss that is no longer finite.

    Notes
    -----
    Lin, Jiang, Wang, Xu, Wang, Liu, Li 2021, *Efficient Micro-Structured Weight Unification and
    Pruning for Neural Network Compression*, arXiv:2106.08301. Training is by ADMM: an epoch on
    ``loss + rho / 2 |W - Z + U|^2``, then ``Z``, the unified weights nearest to ``W + U``, and
    ``U <- U + W - Z``; at last ``W`` is unified. Batch norm keeps the statistics of the last epoch.

    Examples
    --------
    >>> unified = pa.compression.unify_weights(model, (4, 4))
    >>> round(unified.ratio, 1)
    10.6
    >>> unified.model.features[14].weight.flatten(1)[:4, :4].abs().unique().numel()
    1
    """
    if not isinstance(block, Sequence) or len(block) != 2:
        raise ValueError(f"block: expected two counts, rows and columns, got {block!r}")
    for count in block:
        check_count("block", count)
    check_fraction("fraction", fraction)
    if not rho > 0:
        raise ValueError(f"rho: expected a number above 0, got {rho!r}")
    schedule = Schedule(
        epochs, learning_rate, momentum, weight_decay, batch_size, seed=seed, augment=augment
    )
    changed, history = copied(model), None
    if data is not None:
        with training(model, data, device, progress) as (changed, held, report):
            alternation = Alternation(
                [m for _, m in weighted(changed, layers, in_place=True)], block, fraction, rho
            )
            loss = alternation.penalised(cross_entropy(changed))
            history = pd.DataFrame(
                fit(changed, held, loss, schedule, after_epoch=alternation.update, report=report)
            )
    bits = float_bits(model)
    for _, module in weighted(changed, layers, in_place=True):
        values, taken, sizes = unified(module.weight.detach(), block, fraction)
        overwrite(module, values)
        bits -= (FLOAT_BITS - 1) * int((sizes[taken] - 1).sum())
        bits += 0 if bool(taken.all()) else len(taken)
    return Transformed(changed, bits, float_bits(model), history=history)


class Alternation:
    """The alternating direction method of multipliers between a loss and unified weights."""

    def __init__(
        self, modules: Sequence[Any], block: tuple[int, int], fraction: float, rho: float
    ) -> None:
        self._weights = [module.weight for module in modules]
        self._block, self._fraction, self._rho = block, fraction, rho
        self._dual = [torch.zeros_like(weight) for weight in self._weights]
        self._unified = [self._project(weight.detach()) for weight in self._weights]

    def penalised(self, plain: Loss) -> Loss:
        """Return a loss whose penalty is ``rho / 2 |W - Z + U|^2``, of all layers together."""

        def loss(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            entropy, penalty = plain(images, labels)
            for weight, z, u in zip(self._weights, self._unified, self._dual, strict=True):
                distance = functional.mse_loss(weight, z - u, reduction="sum")
                penalty = penalty + self._rho / 2 * distance
            return entropy, penalty

        return loss

    def update(self) -> None:
        """Project ``W + U``, and add what is left to the dual variable."""
        self._unified = [
            self._project(weight + u) for weight, u in zip(self._weights, self._dual, strict=True)
        ]
        for u, weight, z in zip(self._dual, self._weights, self._unified, strict=True):
            u += weight - z

    def _project(self, weight: Tensor) -> Tensor:
        return unified(weight, self._block, self._fraction)[0].to(weight)


def unified(
    weight: Tensor, block: tuple[int, int], fraction: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the nearest weights of which a share of the blocks is unified, float64.

    Of ``[outputs, ...]``, in its shape; and for each block whether it is unified, and its size.
    """
    matrix = weight.flatten(1).double().cpu()
    rows, columns = (torch.arange(n) // size for n, size in zip(matrix.shape, block, strict=True))
    number = rows[:, None] * (int(columns[-1]) + 1) + columns
    sizes = number.flatten().bincount()
    magnitude = matrix.abs()
    mean = number.flatten().bincount(magnitude.flatten()) / sizes
    lost = number.flatten().bincount((magnitude - mean[number]).square().flatten())
    taken = torch.zeros(len(sizes), dtype=torch.bool)
    taken[lost.argsort(stable=True)[: round(fraction * len(sizes))]] = True
    shared = torch.where(matrix < 0, -mean[number], mean[number])
    return torch.where(taken[number], shared, matrix).reshape(weight.shape), taken, sizes
