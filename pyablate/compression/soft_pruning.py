"""Soft filter pruning: filters are silenced while the network trains, and may come back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from pyablate.batches import Data
from pyablate.compression.coupling import Coupling
from pyablate.compression.evaluation import device_of, prepared
from pyablate.compression.filters import BY_WEIGHTS, filter_ranking
from pyablate.compression.ranking import check_choice
from pyablate.compression.removal import remove
from pyablate.compression.training import Augment, Schedule, cross_entropy, fit
from pyablate.compression.transforms import FLOAT_BITS, Transformed
from pyablate.prepare import undisturbed
from pyablate.progress import Report, reporting


def soft_filter_pruning(
    model: nn.Module,
    sample: Tensor,
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
    """Train a network, silence its smallest filters behind every epoch, and remove the last ones.

    A silenced filter keeps training: in the next epoch it may grow, and another goes in its place.

    Parameters
    ----------
    model : nn.Module
        It stays as it is.
    sample : Tensor
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
        The network without the filters that were silent at last, with the ``history`` of training.

    Raises
    ------
    ImportError
        Torch-Pruning is not installed.
    ValueError, TypeError
        Bad arguments or data, or a loss that is no longer finite.

    Notes
    -----
    He, Kang, Dong, Fu, Yang 2018, *Soft Filter Pruning for Accelerating Deep Convolutional Neural
    Networks*, arXiv:1808.06866. There the filters alone become zero; here their biases do as
    well, and shift and running mean of the batch norm behind them, so that the units are silent and
    removing them changes nothing. The scale stays: with it at zero they could not come back.
    """
    check_choice("criterion", criterion, BY_WEIGHTS)
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction: expected a number from 0 to 1, got {fraction!r}")
    schedule = Schedule(
        epochs, learning_rate, momentum, weight_decay, batch_size, seed=seed, augment=augment
    )
    with undisturbed(), torch.inference_mode(False), reporting(progress) as report:
        trained, dtype = prepared(model, device)
        held = Data(data, dtype=dtype, device=device_of(trained))
        held.hold()
        coupling = Coupling(trained, sample)
        silent: list[str] = []

        def after_epoch() -> None:
            ranking = filter_ranking(trained, sample, criterion)
            silent[:] = ranking.units(fraction)
            silence(trained, coupling, silent)

        loss = cross_entropy(trained)
        history = fit(trained, held, loss, schedule, after_epoch=after_epoch, report=report)
        removal = remove(trained, silent, sample)
    return Transformed(
        removal.model,
        FLOAT_BITS * removal.after.parameters,
        FLOAT_BITS * removal.before.parameters,
        removed=removal.units,
        history=pd.DataFrame(history),
    )


def silence(model: nn.Module, coupling: Coupling, units: Iterable[str]) -> None:
    """Set to zero, in place, whatever makes the units speak, batch norm scales excepted.

    Parameters
    ----------
    model : nn.Module
        Of the same modules as the network of the coupling.
    coupling : Coupling
        What makes which unit.
    units : iterable of str
        Labels ``"layer:unit"``.
    """
    for dependency, channels in coupling.channels(units):
        module = dependency.target.module
        if "out" not in dependency.handler.__name__ or not isinstance(module, nn.Module):
            continue
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        makes = isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
        if not norm and not makes:
            continue
        target = model.get_submodule(coupling.name_of(module))
        for name in ("bias", "running_mean") if norm else ("weight", "bias"):
            values = getattr(target, name)
            if values is not None:
                axis = 1 if name == "weight" and getattr(module, "transposed", False) else 0
                index = torch.tensor(channels, device=values.device)
                values.data.index_fill_(axis, index, 0)
