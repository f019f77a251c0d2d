"""Soft filter pruning: filters are set to zero while the network trains, and may come back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd
import torch
from torch import nn

from pyablate._validation import check_choice, check_fraction
from pyablate.compression._remove import remove
from pyablate.compression.coupling import Coupling
from pyablate.compression.filters import BY_WEIGHTS, filter_ranking, without_units
from pyablate.compression.sgd import Augment, Schedule, cross_entropy, fit, training
from pyablate.compression.transforms import Transformed, output_axis
from pyablate.runtime.progress import Report


def soft_filter_pruning(
    model: nn.Module,
    sample: Any,
    data: Any,
    fraction: float,
    *,
    criterion: str = "l2",
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
    """Train a network, zero its smallest filters behind every epoch, and remove the last ones.

    A zero filter keeps training: in the next epoch it may grow, and another goes in its place.

    Parameters
    ----------
    model : nn.Module
        It stays as it is.
    sample : Tensor, dict or tuple of Tensor
        A batch of inputs, ``[N, ...]``.
    data : pair of arrays, DataLoader or iterable of (images, labels)
        To train on; held in memory.
    fraction : float
        Share of the removable units of each layer, from 0 to 1.
    criterion : {"l2", "l1", "bn_scale", "nisp"}
        See :func:`filter_ranking`.
    epochs, learning_rate, momentum, weight_decay, batch_size, augment, seed, device, progress
        As for :func:`pyablate.finetune`.

    Returns
    -------
    Transformed
        The network without the filters that were zero at last, with the ``history`` of training.

    Raises
    ------
    ImportError
        Torch-Pruning is not installed.
    ValueError, TypeError
        Bad arguments or data, or a loss that is no longer finite.

    Notes
    -----
    He, Kang, Dong, Fu, Yang 2018, *Soft Filter Pruning for Accelerating Deep Convolutional Neural
    Networks*, arXiv:1808.06866. As there, the filters alone become zero: with bias and batch norm
    at zero as well, no gradient would pass the ReLU behind them and none could come back. What a
    zero filter still puts out, a constant, goes when it is removed.

    Examples
    --------
    >>> soft = pa.compression.soft_filter_pruning(model, images[:2], data, 0.3, epochs=1)
    >>> soft.ratio > 1
    True
    """
    check_choice("criterion", criterion, BY_WEIGHTS)
    check_fraction("fraction", fraction)
    schedule = Schedule(
        epochs, learning_rate, momentum, weight_decay, batch_size, seed=seed, augment=augment
    )
    with training(model, data, device, progress) as (trained, held, report):
        coupling = Coupling(trained, sample)
        zero: list[str] = []

        def after_epoch() -> None:
            ranking = filter_ranking(trained, sample, criterion)
            zero[:] = ranking.units(fraction)
            set_to_zero(trained, coupling, zero)

        loss = cross_entropy(trained)
        history = fit(trained, held, loss, schedule, after_epoch=after_epoch, report=report)
        removal = remove(trained, zero, sample)
    return without_units(removal, pd.DataFrame(history))


def set_to_zero(model: nn.Module, coupling: Coupling, units: Iterable[str]) -> None:
    """Set to zero, in place, the filters that make the units; biases and batch norm stay.

    The model has the same modules as the network of the coupling.
    """
    for dependency, channels in coupling.channels(units):
        module = dependency.target.module
        makes = isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
        if makes and "out" in dependency.handler.__name__:
            weight = model.get_parameter(f"{coupling.name_of(module)}.weight").data
            taken = torch.tensor(channels, device=weight.device)
            weight.index_fill_(output_axis(module), taken, 0)
