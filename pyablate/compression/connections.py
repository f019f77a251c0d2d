"""Sparse connectivity learning: which weights stay is trained together with their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pyablate.compression.sgd import Augment, Loss, Schedule, cross_entropy, fit, training
from pyablate.compression.transforms import (
    Transformed,
    float_bits,
    output_axis,
    sparse_bits,
    weighted,
)
from pyablate.runtime.progress import Report


def learn_connections(
    model: nn.Module,
    data: Any,
    *,
    weight: float = 1.0,
    layers: str | Sequence[str] = "*",
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
    """Train a network and which of its weights it keeps, and set the others to zero at the end.

    Every weight is multiplied by a mask of 0 or 1, the unit step of a trained number of its own.
    The loss is the cross entropy and ``weight`` times the share of weights whose mask is 1, so that
    layers and filters find their own shares.

    Parameters
    ----------
    model : nn.Module
        It stays as it is.
    data : pair of arrays, DataLoader or iterable of (images, labels)
        To train on; held in memory.
    weight : float
        Of the share of weights that are kept: what all of them together may cost, in cross entropy.
    layers : str or sequence of str
        Module names or globs of the layers that get masks; all layers are trained.
    epochs, learning_rate, momentum, weight_decay, batch_size, augment, seed, device, progress
        As for :func:`pyablate.finetune`; of the masks as well.

    Returns
    -------
    Transformed
        A weight takes one bit, and 32 more if it is not zero. The ``history`` of training has the
        number of ``connections`` behind each epoch.

    Raises
    ------
    ValueError, TypeError
        Bad arguments or data, no layer matches, or a loss that is no longer finite.

    Notes
    -----
    Tang, Luo, Xie, Zhu, Zhao, Bi, Lu 2022, *Automatic Sparse Connectivity Learning for Neural
    Networks*, arXiv:2201.05020. As there, the step's gradient is taken for 1 (identity
    straight-through estimator), a mask that is 0 may come back, and the gradients of the masks of
    each output channel are normalised, here to a root mean square of 1. The masks start from the
    sizes of the trained weights, each relative to the mean of its output channel.

    Examples
    --------
    >>> sparse = pa.compression.learn_connections(model, data, epochs=1)
    >>> bool((sparse.model.features[14].weight == 0).any())
    True
    """
    schedule = Schedule(
        epochs, learning_rate, momentum, weight_decay, batch_size, seed=seed, augment=augment
    )
    if not weight >= 0:
        raise ValueError(f"weight: expected 0 or more, got {weight!r}")
    with training(model, data, device, progress) as (trained, held, report):
        own = [module for _, module in weighted(trained, layers, in_place=True)]
        of = {module.weight: Mask(module) for module in own}
        masks = list(of.values())
        modules = [module for _, module in weighted(trained, layers)]  # some may share weights
        chosen = [(module, of[module.weight]) for module in modules]
        for module, mask in chosen:
            parametrize.register_parametrization(module, "weight", mask)
        counts: list[int] = []

        def after_epoch() -> None:
            counts.append(round(float(connections(masks))))

        loss = _counting(cross_entropy(trained), masks, weight)
        history = fit(trained, held, loss, schedule, after_epoch=after_epoch, report=report)
        for module in modules:
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    table = pd.DataFrame(history).assign(connections=counts)
    return Transformed(trained, sparse_bits(trained, own), float_bits(model), history=table)


class Mask(nn.Module):
    """Masks of a layer's weights, each the unit step of a trained number."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        weight = module.weight.detach()
        self._others = [dim for dim in range(weight.ndim) if dim != output_axis(module)]
        size = weight.abs()
        mean = size.mean(self._others, keepdim=True)
        self.steps = nn.Parameter(torch.where(mean > 0, size / mean, 0))
        self.steps.register_hook(self._normalised)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weights that are kept, and zeros."""
        return weight * self.mask()

    def mask(self) -> Tensor:
        """Return 1 where the number is above 0, else 0; the gradient of either is 1."""
        return (self.steps > 0).to(self.steps) + (self.steps - self.steps.detach())

    def _normalised(self, gradient: Tensor) -> Tensor:
        size = gradient.square().mean(self._others, keepdim=True).sqrt()
        return torch.where(size > 0, gradient / size, 0)


def connections(masks: Sequence[Mask]) -> Tensor:
    """Count the weights that are kept."""
    return torch.stack([mask.mask().sum() for mask in masks]).sum()


def _counting(loss: Loss, masks: Sequence[Mask], weight: float) -> Loss:
    """Add the share of weights that are kept, times a weight."""
    total = sum(mask.steps.numel() for mask in masks)

    def counted(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        entropy, penalty = loss(images, labels)
        return entropy, penalty + weight * connections(masks) / total

    return counted
