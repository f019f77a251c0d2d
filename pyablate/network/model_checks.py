"""Checks of a model and data before a run: finite weights, logits, independent images."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyablate._validation import by_number, check_names, first_line
from pyablate.data.dataset import Batch, Data
from pyablate.network import near_tie
from pyablate.network.classifier import Choice, classifier, take_inputs, varied
from pyablate.network.forward import (
    check_logits,
    device_of,
    forward,
    own_dtype,
    two_images,
    usable_device,
)
from pyablate.network.sites import Site, Survey, surveyed

logger = logging.getLogger("pyablate")


SAMPLE = 8
"""Images that are looked at before the first batch."""


@dataclass(frozen=True, eq=False)
class Ready:
    """A model and data that fit each other.

    Attributes
    ----------
    model : nn.Module
        A copy in evaluation mode, in float32 or float64, without gradients of weights.
    data : Data
        On the model's device and in its dtype; labels beyond its classes are errors.
    batch : Batch
        The first images.
    survey : Survey
        All sites, and where the weights have their units.
    classes : int
        Number of logits.
    class_names : tuple of str
        One per class.
    """

    model: nn.Module
    data: Data
    batch: Batch
    survey: Survey
    classes: int
    class_names: tuple[str, ...]

    @property
    def sites(self) -> list[Site]:
        """All of them."""
        return self.survey.sites


def open_up(
    model: nn.Module,
    source: Any,
    class_names: Sequence[str] | None,
    device: str | torch.device | None,
    *,
    double: bool = False,
    axis: Mapping[str, int] | None = None,
    unlabelled: bool = False,
    logits: Choice = None,
) -> Ready:
    """Copy the model, look at the first images and check that the two fit.

    ``unlabelled`` is whether images without labels will do.
    """
    work, dtype, where = _working_copy(model, device, double=double, logits=logits)
    data = Data(source, dtype=dtype, device=where, unlabelled=unlabelled)
    batch = data.first(SAMPLE)
    sample = batch.images
    returned = fit_inputs(work, data, sample)
    found = surveyed(work, sample, axis)
    classes = data.classes = check_logits(returned, 2).shape[1]
    _check_independence(work, sample)
    return Ready(work, data, batch, found, classes, class_names_of(work, class_names, classes))


def fit_inputs(model: nn.Module, data: Data, sample: Tensor) -> Any:
    """Let a working copy take the data as they come, its first images being ``sample``.

    Integers that came as a plain tensor are numbers, and indices where the model fails on numbers.
    Returns what the model returns for the first and the last image.

    Raises
    ------
    ValueError
        The model fails on them.
    """
    failures: list[Exception] = []
    for inputs in (data.inputs,) if data.integers is None else (data.inputs, data.integers):
        take_inputs(model, inputs)
        try:
            with torch.no_grad():
                return forward(model, two_images(sample))
        except (RuntimeError, IndexError, TypeError) as error:
            failures.append(error)
    what = data.inputs or f"images of shape {list(sample.shape[1:])}"
    reason = first_line(failures[0])
    raise ValueError(f"data: the model fails on {what}: {reason}") from failures[0]


def _working_copy(
    model: nn.Module, device: str | torch.device | None, *, double: bool, logits: Choice
) -> tuple[nn.Module, torch.dtype, torch.device]:
    """Copy the model to work on, so that nothing can happen to the caller's."""
    where = device_of(model) if device is None else usable_device(device)
    dtype = torch.float64 if double else own_dtype(model)
    work = classifier(model, logits=logits).to(where)
    work = (work.double() if dtype == torch.float64 else work.float()).eval()  # not the complex
    for tensor in (*work.parameters(), *work.buffers()):
        tensor.requires_grad_(False)
    check_weights(work)
    return work, dtype, where


def check_weights(model: nn.Module) -> None:
    """Refuse weights that are not finite, and batch norm by the statistics of each batch."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.detach()).all()):
            bad = (~torch.isfinite(tensor.detach())).nonzero()[0].tolist()
            raise ValueError(f"model: {name} holds NaN or infinite values, the first at {bad}")
    for name, module in model.named_modules():
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if batch_norm and module.running_mean is None:
            raise ValueError(
                f"model: {name} normalises by the statistics of each batch, so a prediction "
                "depends on the other images; give it running statistics"
            )


def _check_independence(model: nn.Module, sample: Tensor) -> None:
    """Refuse a network that lets one image's prediction depend on the others."""
    first, second = sample[0], sample[-1]
    with torch.no_grad():
        alone = model(torch.stack([first, second]))[0]
        changed = varied(model, second, lambda image: 1.5 * image + 1.0, first)
        other = model(torch.stack([first, changed]))[0]
    if not alike(other, alone, 2e-3):
        raise ValueError(
            "model: the logits of an image change with the other images of its batch; each image "
            "must be classified by itself"
        )


def alike(found: Tensor, expected: Tensor, share: float) -> bool:
    """Whether logits agree but for a share of the largest; NaN do, the clean run names them."""
    return near_tie.disagreement(found, expected) <= share


def class_names_of(model: nn.Module, given: Sequence[str] | None, classes: int) -> tuple[str, ...]:
    """Name the classes: as given, else as ``model.config.id2label`` has them, else by numbers.

    What fits no network of so many classes, and the names LABEL_0, LABEL_1, ... that stand there
    unless somebody sets others, are passed over.

    Raises
    ------
    ValueError, TypeError
        The names given are not as many as classes, or no names.
    """
    if given is None:
        own = getattr(getattr(model, "config", None), "id2label", None)
        placeholders = {f"LABEL_{number}" for number in range(classes)}
        if isinstance(own, Mapping) and len(own) == classes and placeholders != set(own.values()):
            with suppress(ValueError):  # keys that are no numbers
                given = by_number("id2label", own)
    names = check_names("class_names", given, classes)
    # Not an error: two of ImageNet's classes are called crane.
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        logger.warning("class_names: %s stand for more than one class", ", ".join(twice[:5]))
    return names
