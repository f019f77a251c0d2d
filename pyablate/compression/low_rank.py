"""Low-rank training: SGD and the projection of weights to a low rank, in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import nn

from pyablate.compression.decomposition import (
    batch_norms,
    check_share,
    decomposable,
    factors,
    truncated_svd,
)
from pyablate.compression.sgd import Augment, Schedule, cross_entropy, fit, training
from pyablate.compression.transforms import Transformed, overwrite
from pyablate.runtime.progress import Report


def low_rank_training(
    model: nn.Module,
    data: Any,
    share: float,
    *,
    layers: str | Sequence[str] = "*",
    rectify: bool = True,
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
    """Train a network, project its weights to a low rank behind every epoch, and split its layers.

    The projection is that of :func:`truncated_svd` with ``energy_transfer``: the singular values
    that are kept grow so that the weights keep their norm. In between weights may have any rank.

    Parameters
    ----------
    model : nn.Module
        It stays as it is.
    data : pair of arrays, DataLoader or iterable of (images, labels)
        To train on, not those on which the result is judged; held in memory.
    share, layers, rectify
        As for :func:`truncated_svd`; the batch norm is that of the end of the epoch.
    epochs, learning_rate, momentum, weight_decay, batch_size, augment, seed, device, progress
        As for :func:`pyablate.finetune`.

    Returns
    -------
    Transformed
        With two layers for one where that is smaller, and the ``history`` of training.

    Raises
    ------
    ValueError, TypeError
        Bad arguments or data, no layer matches, a network that ``torch.fx`` cannot trace where
        ``rectify`` is set, or a loss that is no longer finite.

    Notes
    -----
    Guo, Lin, Chen, Xing, Liu, Xu 2022, *Compact Model Training by Low-Rank Projection with Energy
    Transfer* (LRPET), arXiv:2204.05566. The share is the same for all layers; they search for it.

    Examples
    --------
    >>> low = pa.compression.low_rank_training(model, data, 0.4, layers="features.14", epochs=1)
    >>> len(low.model.features[14]), low.ratio > 1
    (2, True)
    """
    check_share(share)
    schedule = Schedule(
        epochs, learning_rate, momentum, weight_decay, batch_size, seed=seed, augment=augment
    )
    with training(model, data, device, progress) as (trained, held, report):
        norms = batch_norms(trained) if rectify else {}

        def after_epoch() -> None:
            for name, module, kept in decomposable(trained, layers, share):
                first, second = factors(module, kept, norms.get(name), energy_transfer=True)
                overwrite(module, second @ first)

        loss = cross_entropy(trained)
        history = fit(trained, held, loss, schedule, after_epoch=after_epoch, report=report)
    # The weights have that rank already: this splits the layers and changes nothing.
    return replace(truncated_svd(trained, share, layers=layers), history=pd.DataFrame(history))
