"""Fine-tuning of a smaller network, with or without a penalty that keeps its attributions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional

from pyablate._validation import check_choice
from pyablate.attribution.collapsed import (
    VARIANTS,
    collapse,
    distances,
    draw_dropped,
    map_site,
    tapped,
)
from pyablate.comparison.evaluation import prepared
from pyablate.compression.sgd import Augment, Loss, Schedule, cross_entropy, fit, training
from pyablate.network.classifier import giving_logits
from pyablate.network.forward import device_of
from pyablate.network.sites import Site
from pyablate.runtime.progress import Report

WEIGHT = 100.0
"""Of the penalty, as in Park et al. 2020."""


@dataclass(frozen=True, eq=False)
class FineTuned:
    """A network after training.

    Attributes
    ----------
    model : nn.Module
        A copy, trained, in evaluation mode.
    history : pandas.DataFrame
        One row per epoch: ``epoch``, ``learning_rate`` at its first step, and the means of
        ``loss``, ``cross_entropy`` and ``penalty`` over its steps.
    schedule : Schedule
        How it was trained; the learning rate decides much of what is regained.

    Examples
    --------
    >>> tuned = pa.finetune(model, data, epochs=1, learning_rate=0.001)
    >>> tuned.model is model, tuned.model.training
    (False, False)
    """

    model: nn.Module
    history: pd.DataFrame
    schedule: Schedule

    def __repr__(self) -> str:
        """Rate and losses in one line."""
        first, last = self.history["loss"].iloc[0], self.history["loss"].iloc[-1]
        return (
            f"FineTuned({self.schedule.epochs} epochs, learning rate "
            f"{self.schedule.learning_rate:g}, loss {first:.4f} -> {last:.4f})"
        )


def finetune(
    model: nn.Module,
    data: Any,
    *,
    original: nn.Module | None = None,
    preserve_attributions: bool = False,
    variant: str = "weighted",
    weight: float = WEIGHT,
    layers: tuple[str | None, str | None] = (None, None),
    epochs: int = 3,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    batch_size: int = 128,
    augment: Augment | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool | Report | None = None,
) -> FineTuned:
    """Train a smaller network for a few epochs, on request so that it looks where the original did.

    Parameters
    ----------
    model : nn.Module
        The smaller network; it stays as it is, a copy is trained.
    data : pair of arrays, DataLoader or iterable of (images, labels)
        To train on; not those on which the result is judged. Held in memory.
    original : nn.Module, optional
        The network before compression, needed to preserve attributions.
    preserve_attributions : bool
        Add ``weight`` times the distance of the collapsed attribution maps of both networks to the
        cross entropy: for each image the maps of the class that the original predicts.
    variant : {"weighted", "equal", "stochastic"}
        Of the maps, see :func:`pyablate.attribution.collapse`; ``stochastic`` leaves
        out 30 % of the original's channels, others for each image and step.
    weight : float
        Of the penalty.
    layers : pair of str or None
        Layer of the original and of the smaller network; None is the last activation or block
        with positions.
    epochs, batch_size : int
        Passes over the data, and images per step.
    learning_rate, momentum, weight_decay : float
        Of stochastic gradient descent; the rate falls along a cosine to 0.
    augment : callable, optional
        Of a batch of images and a ``torch.Generator``; returns the images to train on.
    seed : int
        Of order, dropout and channels left out.
    device : str or torch.device, optional
        Where to work; by default where the model is.
    progress : bool or callable, optional
        As for :func:`pyablate.ablate`.

    Raises
    ------
    ValueError, TypeError
        Bad arguments or data, no original to preserve the attributions of, networks with
        different classes, or a loss that is no longer finite.

    Notes
    -----
    The weighted maps hold gradients, so the penalty is differentiated twice. Park, Yang, Hwang,
    Yang 2020, *Attribution Preservation in Network Compression for Reliable Network
    Interpretation*, arXiv:2010.15054.

    Examples
    --------
    >>> tuned = pa.finetune(model, data, epochs=1, learning_rate=0.001)
    >>> len(tuned.history)
    1
    """
    schedule = Schedule(
        epochs, learning_rate, momentum, weight_decay, batch_size, seed=seed, augment=augment
    )
    check_choice("variant", variant, VARIANTS)
    if not weight >= 0:
        raise ValueError(f"weight: expected 0 or more, got {weight!r}")
    if preserve_attributions and original is None:
        raise ValueError("original: expected the network whose attributions are kept, got None")
    with training(model, data, device, progress) as (tuned, held, report):
        sample = held.first(2).images
        loss = cross_entropy(tuned)
        if preserve_attributions and original is not None:
            teacher = _prepared_original(original, tuned, held.dtype)
            found = map_site(teacher, sample, layers[0]), map_site(tuned, sample, layers[1])
            _check_classes(teacher, tuned, sample)
            loss = _preserving(teacher, tuned, found, variant, weight, seed)
        history = fit(tuned, held, loss, schedule, report=report)
    return FineTuned(tuned, pd.DataFrame(history), schedule)


def _preserving(
    original: nn.Module,
    tuned: nn.Module,
    layers: tuple[Site, Site],
    variant: str,
    weight: float,
    seed: int,
) -> Loss:
    """Cross entropy, and the weighted distance of the maps of both networks."""
    generator = torch.Generator().manual_seed(seed)

    def loss(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        dropped = None
        if variant == "stochastic":
            dropped = draw_dropped(len(images), layers[0].channels, generator).to(images.device)
        logits, output = tapped(original, layers[0], images)
        target = logits.argmax(dim=1)
        kept = collapse(layers[0], logits, output, target, variant, dropped=dropped).detach()
        logits, output = tapped(tuned, layers[1], images)
        maps = collapse(layers[1], logits, output, target, variant, create_graph=True)
        return functional.cross_entropy(logits, labels), weight * distances(kept, maps).mean()

    return loss


def _prepared_original(original: nn.Module, tuned: nn.Module, dtype: torch.dtype) -> nn.Module:
    try:
        teacher, _ = prepared(original, device_of(tuned))
    except TypeError as error:
        raise TypeError(str(error).replace("model:", "original:")) from None
    return teacher.to(dtype).requires_grad_(False)


def _check_classes(original: nn.Module, tuned: nn.Module, sample: Tensor) -> None:
    with torch.no_grad(), giving_logits(original), giving_logits(tuned):
        expected, got = original(sample).shape[1], tuned(sample).shape[1]
    if expected != got:
        raise ValueError(f"original: expected {got} classes as of the model, got {expected}")
